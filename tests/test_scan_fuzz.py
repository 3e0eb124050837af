"""No file can stop a scan: whatever is in it, it is an entry, and the report can be made."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published import dflash_shapes, small_config
from scan_tree import drafter_gguf, small_folder

from convert_drafter.converters import scan
from convert_drafter.converters.commands import show_scan
from convert_drafter.converters.scan.report import SCHEMA_FILE, as_json

SCHEMA = jsonschema.Draft202012Validator(json.loads(SCHEMA_FILE.read_text()))
DRAFTER = tuple(dflash_shapes(small_config()))
TARGET = ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight", "model.layers.1.eh_proj.weight")
KEYS = st.sampled_from([
    *("architectures", "model_type", "dflash_config", "hidden_size", "num_hidden_layers", "vocab_size", "text_config"),
    *("num_nextn_predict_layers", "mtp_num_hidden_layers", "quantization_config", "quant_method", "bits", "format"),
    *("speculators_config", "verifier", "name_or_path", "transformer_layer_config", "target_layer_ids", "eagle_config"),
    *("target_hidden_size", "num_target_layers", "_name_or_path", "rope_parameters"),
])  # fmt: skip
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["a/b", "mtp"]),
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


def whole(root: Path) -> dict[str, Any]:
    """The report of a scan, in both forms."""
    found = scan(root)
    show_scan.scanned(found)
    data: dict[str, Any] = json.loads(json.dumps(as_json(found)))
    SCHEMA.validate(data)
    return data


@settings(max_examples=60)
@given(st.dictionaries(KEYS, VALUES, max_size=6), st.sampled_from([DRAFTER, TARGET, ("x",), ("mtp.fc.weight",)]))
def test_configs(config: dict[str, Any], names: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = small_folder(Path(name) / "m", config, names)
        (folder / "config.json").write_text(json.dumps(config))
        assert whole(Path(name))["counts"]["variants"] == 1


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = drafter_gguf(tmp_path_factory.mktemp("fuzz") / "d.gguf", "lucebox")  # it has no tokenizer: a small header
    return path.read_bytes()[:6000]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(4, 3000), st.integers(0, 255)), max_size=6), st.integers(0, 6000))
def test_ggufs(header: bytes, changes: list[tuple[int, int]], length: int) -> None:
    raw = bytearray(header)
    for at, byte in changes:
        raw[at] = byte
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "x-DFlash-Q8_0.gguf").write_bytes(bytes(raw[:length]) + bytes(2**12 if length == 6000 else 0))
        counts = whole(Path(name))["counts"]
        assert (counts["variants"], counts["faulty"]) == (1, 1)
