"""`convert --attach`: a head into its target's own GGUF, and every way in which it does not belong there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from mtp_checkpoints import job, small
from published import PAIR

from convert_drafter.converters import ConvertJob, DrafterError, WrongUsage, convert, doctor
from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.cli import main
from convert_drafter.converters.convert import write_conversion
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.verdict import Outcome

U32, BOOL, ARRAY = GGUFValueType.UINT32, GGUFValueType.BOOL, GGUFValueType.ARRAY
DEPTH = 4
WITHOUT = {
    "qwen35.block_count": KeyValue("qwen35.block_count", U32, DEPTH),
    "qwen35.attention.recurrent_layers": KeyValue(
        "qwen35.attention.recurrent_layers", ARRAY, (True, True, True, False), BOOL
    ),
}
Keys = dict[str, KeyValue]
Change = Callable[[Keys], Keys]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("attach") / "target")


@pytest.fixture(scope="module")
def head(source: Path) -> GGUFFile:
    out = source.parent / "mtp.gguf"
    convert(job(source, out))
    return read_gguf(out)


def target_keys(head: GGUFFile) -> Keys:
    """The keys of the target's own file, some of a kind that nobody else knows."""
    keys = {name: entry for name, entry in head.keys.items() if not name.startswith("drafter.")}
    keys.pop("qwen35.nextn_predict_layers")
    own = {"general.note": KeyValue("general.note", GGUFValueType.STRING, "from elsewhere")}
    return {**keys, **WITHOUT, **own}


def write_target(path: Path, head: GGUFFile, change: Change = lambda keys: keys) -> Path:
    """A target as far as an attachment looks at it: its keys, and some tensors in types of its own."""
    tensors = [
        StoredTensor("token_embd.weight", (2048, 64), GGMLQuantizationType.Q8_0),
        StoredTensor("output_norm.weight", (64,), GGMLQuantizationType.F32),
        *(StoredTensor(f"blk.{i}.ffn_up.weight", (96, 64), GGMLQuantizationType.IQ4_NL) for i in range(DEPTH)),
    ]
    random = np.random.default_rng(1)
    keys = list(change(target_keys(head)).values())
    write_gguf(path, keys, tensors, lambda t: [random.integers(0, 256, t.n_bytes).astype(np.uint8)])
    return path


@pytest.fixture
def target(tmp_path: Path, head: GGUFFile) -> Path:
    return write_target(tmp_path / "target.gguf", head)


def attach(source: Path, target: Path, **options: Any) -> GGUFFile:
    out = target.with_name("attached.gguf")
    write_conversion(prepare_attach(job(source, out, attach=target, **options)))
    return read_gguf(out)


def test_the_target_stays_as_it_was_but_for_the_keys_that_count(source: Path, head: GGUFFile, target: Path) -> None:
    before, after = read_gguf(target), attach(source, target)
    assert list(after.tensors)[: len(before.tensors)] == list(before.tensors)
    for name in before.tensors:
        assert after.tensors[name] == before.tensors[name]
        assert (after.tensor_bytes(name) == before.tensor_bytes(name)).all()
    changed = {name for name, entry in before.keys.items() if after.keys[name] != entry}
    assert changed == set(WITHOUT)
    assert after.keys["qwen35.block_count"].value == DEPTH + 1
    assert after.keys["qwen35.attention.recurrent_layers"].value == (True, True, True, False, False)
    added = {name for name in after.keys.keys() - before.keys.keys() if not name.startswith("drafter.")}
    assert added == {"qwen35.nextn_predict_layers"}


def test_the_head_is_the_one_of_its_own_file(source: Path, head: GGUFFile, target: Path) -> None:
    after = attach(source, target)
    own = [name for name in head.tensors if name.startswith(f"blk.{DEPTH}.")]
    assert own == [name for name in after.tensors if name.startswith(f"blk.{DEPTH}.")]
    assert all((after.tensor_bytes(name) == head.tensor_bytes(name)).all() for name in own)


def test_doctor_looks_at_the_head_alone(source: Path, target: Path) -> None:
    """The target's tensors may be of types that nobody here decodes; they are no fault of the head's."""
    attached = attach(source, target)
    structure, pairing = doctor(attached.path, source)
    assert pairing.outcome is Outcome.PASS
    assert all("blk.0" not in line for line in structure.details)


def test_a_target_without_the_list_of_layers_does_not_get_one(tmp_path: Path, source: Path, head: GGUFFile) -> None:
    """Older files leave it to full_attention_interval, and so does their loader."""

    def older(keys: Keys) -> Keys:
        return {name: entry for name, entry in keys.items() if not name.endswith("recurrent_layers")}

    after = attach(source, write_target(tmp_path / "older.gguf", head, older))
    assert "qwen35.attention.recurrent_layers" not in after.keys
    assert after.keys["qwen35.block_count"].value == DEPTH + 1
    (structure,) = doctor(after.path)
    assert not [line for line in structure.details if "recurrent_layers" in line]


def with_value(name: str, value: Any) -> Change:
    return lambda keys: {**keys, name: replace(keys[name], value=value)}


def declared(keys: Keys) -> Keys:
    return {**keys, "qwen35.nextn_predict_layers": KeyValue("qwen35.nextn_predict_layers", U32, 1)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_value("general.architecture", "qwen3"), "general.architecture: found 'qwen3', expected 'qwen35'"),
        (with_value("qwen35.block_count", 5), "qwen35.block_count: found 5, expected 4"),
        (
            with_value("qwen35.embedding_length", 128),
            "qwen35.embedding_length: found 128, the head's checkpoint",
        ),
        (with_value("qwen35.rope.freq_base", 1e6), "qwen35.rope.freq_base: found 1000000.0, the head's checkpoint has"),
        (with_value("qwen35.ssm.inner_size", 128), "qwen35.ssm.inner_size: found 32, the head's checkpoint has 16"),
        (declared, "qwen35.nextn_predict_layers: found 1, expected none: it has a head already, or says so"),
    ],
    ids=["architecture", "depth", "width", "theta", "linear attention", "A5-2 declared"],
)
def test_another_target_is_refused(tmp_path: Path, source: Path, head: GGUFFile, change: Change, said: str) -> None:
    path = write_target(tmp_path / "target.gguf", head, change)
    with pytest.raises(DrafterError) as caught:
        attach(source, path)
    assert said in str(caught.value)
    assert not path.with_name("attached.gguf").exists()


def test_a_target_with_a_head_is_refused(source: Path, target: Path) -> None:
    """A5-2: its tensors count as well as its keys."""
    once = attach(source, target)
    again = job(source, target.with_name("again.gguf"), attach=once.path)
    with pytest.raises(DrafterError, match=r"blk\.4\.attn_norm\.weight and 14 more: expected no layer from 4 on"):
        prepare_attach(again)


def test_another_vocabulary_is_doubted(tmp_path: Path, source: Path, head: GGUFFile) -> None:
    tokens = head.keys["tokenizer.ggml.tokens"].value
    assert isinstance(tokens, tuple)
    path = write_target(tmp_path / "t.gguf", head, with_value("tokenizer.ggml.tokens", (*tokens[:-1], "<other>")))
    decided = prepare_attach(job(source, tmp_path / "out.gguf", attach=path))
    assert "its tokens are not those of" in decided.warnings[-1]
    with pytest.raises(DrafterError, match="its tokens are not those of"):
        prepare_attach(job(source, tmp_path / "out.gguf", attach=path, strict=True))


def test_the_target_is_not_overwritten(source: Path, target: Path) -> None:
    """T-24."""
    with pytest.raises(WrongUsage, match="is the same file as the source"):
        prepare_attach(job(source, target, attach=target))


def test_a_drafter_of_its_own_is_not_attached(target: Path, tmp_path: Path) -> None:
    drafter = ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", "F32", tmp_path / "o.gguf", attach=target)
    with pytest.raises(WrongUsage, match="a dflash drafter is a model of its own, expected an MTP head"):
        prepare_attach(drafter)


def test_the_command_says_what_it_did(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = target.with_name("o.gguf")
    arguments = [
        "convert",
        str(source),
        "--for",
        "llama.cpp",
        "--quant",
        "F16",
        "--attach",
        str(target),
        "-o",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", ["convert-drafter", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
        raise SystemExit(0)
    printed = capsys.readouterr().out
    assert ended.value.code in (0, None), printed
    assert f"beside the 6 tensors of {target}, every byte as it was" in printed
    assert f"llama-server -m {out} --spec-type draft-mtp --spec-draft-n-max 3" in printed
