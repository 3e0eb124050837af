"""Redialect: what one dialect says is what the other one gets, and what a file does not say is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_results import checked
from published import (
    PAIR,
    dflash_shapes,
    random_tensors,
    small_config,
    tiny_target,
    write_checkpoint,
)
from target_gguf import write_target

from convert_drafter.converters import (
    ConvertJob,
    DrafterError,
    Problems,
    RedialectJob,
    WrongInput,
    WrongUsage,
    convert,
    prepare_redialect,
    redialect,
)
from convert_drafter.converters.cli import main
from convert_drafter.converters.dialects import CELLS, RUNTIMES, find_cell, read
from convert_drafter.converters.dialects.cell import OWN_ROWS
from convert_drafter.converters.drafter_file import SETTABLE
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, partial_name, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.spec import required

T, Q = GGUFValueType, GGMLQuantizationType
Keys = dict[str, KeyValue]
Tensors = dict[str, StoredTensor]
Edit = Callable[[Keys, Tensors], Any]
VOCAB = 2048
HISTORY = {"drafter.redialect.from", "drafter.redialect.header_sha256"}  # what tells that a file was rewritten
WITHOUT_TOKENIZER = {cell.runtime for cell in CELLS.values() if not cell.tokenizer}
PAIRS = list(permutations(RUNTIMES, 2))


# --- drafters that more than one runtime takes ---


@dataclass(frozen=True)
class Case:
    """A small drafter: changes to config and target by dotted path, more tensors, and the runtimes that carry it."""

    config: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    runtimes: tuple[str, ...] = RUNTIMES
    recipe: str = "F16"


YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
MROPE = {"text_config": {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [11, 11, 10]}}}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48}
BOTH = ("llama.cpp", "ik_llama.cpp")
CASES = {
    "plain": Case(),
    "quantized": Case(recipe="Q8_0"),
    "a layer slides": Case(SLIDING),
    "M-RoPE target": Case(target=MROPE),
    "yarn": Case({"rope_parameters": {**YARN, "attention_factor": 1.5}}, runtimes=BOTH),
    "linear": Case({"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}, runtimes=BOTH),
    "partial rotary": Case({"rope_parameters.partial_rotary_factor": 0.5}, runtimes=BOTH),
    "causal, scaled values": Case({"is_causal": True, "dflash_config.attention_value_scale": 0.5}, runtimes=BOTH),
    "another epsilon": Case({"rms_norm_eps": 1e-5}, runtimes=BOTH),
    "sinks": Case(more={f"layers.{i}.self_attn.sinks": (4,) for i in range(2)}, runtimes=BOTH),
    "its own embedding": Case(more={"embed_tokens.weight": (VOCAB, 64), "lm_head.weight": (VOCAB, 64)}, runtimes=BOTH),
    "interleaved rope": Case({"rope_is_neox_style": False}),
}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 6, "eos_token_id": VOCAB - 2}


@dataclass(frozen=True)
class Made:
    """A case's target folder, and its file for each runtime as converted from the checkpoint."""

    target: Path
    files: Mapping[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Converts a case once for each of its runtimes."""
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            known[name] = convert_case(CASES[name], tmp_path_factory.mktemp("case"))
        return known[name]

    return make


def convert_case(case: Case, folder: Path) -> Made:
    target = tiny_target(folder / "target", **QWEN, **case.target)
    config = small_config(vocab_size=VOCAB, **{"dflash_config.mask_token_id": VOCAB - 1, **case.config})
    shapes = dflash_shapes(config) | dict(case.more)
    source = write_checkpoint(folder / "drafter", config, random_tensors(shapes, ml_dtypes.bfloat16))
    files = {runtime: folder / f"{runtime}.gguf" for runtime in case.runtimes}
    for runtime, out in files.items():
        convert(ConvertJob(source, target, runtime, case.recipe, out))
    return Made(target, files)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The fixture's drafter, which has a sliding layer, for every runtime."""
    folder = tmp_path_factory.mktemp("pair")
    files = {runtime: folder / f"{runtime}.gguf" for runtime in RUNTIMES}
    for runtime, out in files.items():
        convert(ConvertJob(PAIR / "drafter", PAIR / "target", runtime, "Q8_0", out))
    return Made(PAIR / "target", files)


def job(source: Path, out: Path, runtime: str, target: Path | None = None, **options: Any) -> RedialectJob:
    return RedialectJob(source, target, runtime, out, **options)


def contents(path: Path) -> tuple[dict[str, KeyValue], list[tuple[StoredTensor, bytes]]]:
    """Keys without the history, and every tensor with its bytes, both in the file's order."""
    file = read_gguf(path)
    keys = {name: entry for name, entry in file.keys.items() if name not in HISTORY}
    return keys, [(tensor, file.tensor_bytes(name).tobytes()) for name, tensor in file.tensors.items()]


def assert_same_file(one: Path, other: Path) -> None:
    """Same keys with the same types in the same order, same tensors and bytes; only the history differs."""
    (keys, tensors), (other_keys, other_tensors) = contents(one), contents(other)
    assert list(keys.items()) == list(other_keys.items())
    assert tensors == other_tensors


# --- from one to the other and back ---

BY_CASE = [
    pytest.param(name, here, there, id=f"{name}: {here} to {there}")
    for name, case in CASES.items()
    for here, there in permutations(case.runtimes, 2)
]


@pytest.mark.parametrize(("name", "here", "there"), BY_CASE)
def test_a_redialected_file_is_the_converted_one(
    made: Callable[[str], Made], tmp_path: Path, name: str, here: str, there: str
) -> None:
    """Byte for byte, apart from the two keys that tell of the rewriting; T-51 among the facts."""
    case = made(name)
    redialect(job(case.files[here], tmp_path / "out.gguf", there, case.target))
    assert_same_file(tmp_path / "out.gguf", case.files[there])
    new = set(read_gguf(tmp_path / "out.gguf").keys) - set(read_gguf(case.files[there]).keys)
    assert new == HISTORY


@pytest.mark.parametrize(("name", "here", "there"), BY_CASE)
def test_there_and_back_again(made: Callable[[str], Made], tmp_path: Path, name: str, here: str, there: str) -> None:
    """The target is only needed on the way back from a runtime whose files have no tokenizer.

    (And for M-RoPE sections, which are numerically nothing, so that only llama.cpp's files have them.)
    """
    case = made(name)
    asked = WITHOUT_TOKENIZER | ({"ik_llama.cpp"} if CASES[name].target else set())
    away, back = tmp_path / "away.gguf", tmp_path / "back.gguf"
    redialect(job(case.files[here], away, there, case.target if here in WITHOUT_TOKENIZER else None))
    redialect(job(away, back, here, case.target if there in asked else None))
    assert_same_file(back, case.files[here])
    arch, other = find_cell("dflash", here).arch, find_cell("dflash", there).arch
    assert read_gguf(back).keys["drafter.redialect.from"].value == (arch, other)


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_the_trained_pair(pair: Made, tmp_path: Path, here: str, there: str) -> None:
    redialect(job(pair.files[here], tmp_path / "out.gguf", there, pair.target))
    assert_same_file(tmp_path / "out.gguf", pair.files[there])


@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_tensors_are_copied_whatever_their_type(pair: Made, tmp_path: Path, here: str, there: str) -> None:
    """Types this program cannot encode, and rows of any bytes: nothing is decoded on the way."""
    seed = np.random.default_rng(1)
    noise = {name: seed.integers(0, 256, 2**20, np.uint8) for name in read_gguf(pair.files[here]).tensors}

    def edit(_: Keys, tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if len(tensor.shape) == 2:
                tensors[name] = replace(tensor, type=Q.IQ4_XS if tensor.shape[-1] % 256 == 0 else Q.IQ4_NL)

    source = spoiled(pair.files[here], tmp_path, edit, lambda t: noise[t.name][: t.n_bytes])
    redialect(job(source, tmp_path / "out.gguf", there, pair.target))
    before, after = read_gguf(source), read_gguf(tmp_path / "out.gguf")
    assert [(t.type, t.shape) for t in before.tensors.values()] == [(t.type, t.shape) for t in after.tensors.values()]
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert before.tensor_bytes(old).tobytes() == after.tensor_bytes(new).tobytes()


def test_the_same_job_gives_the_same_bytes(pair: Made, tmp_path: Path) -> None:
    """R6."""
    for name in ("a.gguf", "b.gguf"):
        redialect(job(pair.files["llama.cpp"], tmp_path / name, "lucebox"))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_file_may_be_rewritten_for_its_own_runtime(pair: Made, tmp_path: Path) -> None:
    """To mend a fact."""
    report = redialect(job(pair.files["llama.cpp"], tmp_path / "out.gguf", "llama.cpp", settings={"rope.theta": "1e6"}))
    keys = read_gguf(report.out).keys
    assert keys["dflash.rope.freq_base"].value == 1e6
    assert keys["drafter.redialect.settings"].value == ("rope.theta=1e6",)


def spoiled(
    path: Path,
    folder: Path,
    edit: Edit,
    data: Callable[[StoredTensor], np.ndarray] | None = None,
    name: str = "spoiled.gguf",
) -> Path:
    """A copy of a GGUF with keys and tensors edited; a tensor keeps its bytes while its name and size stay."""
    file = read_gguf(path)
    keys, tensors = dict(file.keys), dict(file.tensors)
    edit(keys, tensors)

    def stored(tensor: StoredTensor) -> Iterator[np.ndarray]:
        if data is not None:
            yield data(tensor)
        elif file.tensors.get(tensor.name) == tensor:
            yield file.tensor_bytes(tensor.name)
        else:
            yield np.zeros(tensor.n_bytes, np.uint8)

    out = folder / name
    write_gguf(out, list(keys.values()), list(tensors.values()), stored)
    return out


def dropping(*names: str) -> Edit:
    def edit(keys: Keys, _: Tensors) -> None:
        for name in names:
            del keys[name]

    return edit


# --- facts that are not there ---

NEEDED = sorted(required("dflash") - {"kind"} | {"window.size", "window.layers"})
CARRIED = [
    (cell.runtime, name)
    for cell in CELLS.values()
    for name in NEEDED
    if any(row.field == name for row in (*cell.rows, *OWN_ROWS))
]
# Not asked for: what the runtime does without the key, what fc's width tells, what the list of tokens tells.
TOLD = {
    "llama.cpp": {"causal", "rope.dimensions", "target_hidden_size", "vocab_size"},
    "ik_llama.cpp": {"rope.dimensions", "target_hidden_size", "vocab_size"},
    "lucebox": {"target_hidden_size"},
}


def without_fact(pair: Made, folder: Path, runtime: str, name: str) -> tuple[Path, list[str]]:
    """The pair's file without the keys of a fact, and their names."""
    cell = find_cell("dflash", runtime)
    keys = [row.key.format(a=cell.arch) for row in (*cell.rows, *OWN_ROWS) if row.field == name]
    return spoiled(pair.files[runtime], folder, dropping(*keys)), keys


@pytest.mark.parametrize(("runtime", "name"), CARRIED)
def test_a_missing_fact_is_asked_for(pair: Made, tmp_path: Path, runtime: str, name: str) -> None:
    """R1, P-1, P-6, P-17, T-52, T-53: no missing key becomes a number."""
    source, keys = without_fact(pair, tmp_path, runtime, name)
    wanted = job(source, tmp_path / "out.gguf", "lucebox")
    if name in TOLD[runtime]:
        redialect(wanted)
        assert_same_file(wanted.out, pair_for_lucebox(pair, tmp_path, runtime))
        return
    with pytest.raises(WrongInput) as caught:
        prepare_redialect(wanted)
    assert f"{keys[0]}: missing ({name}), expected " in str(caught.value)
    assert f"give it with --set {name}=VALUE" in str(caught.value)
    assert ("or give --target" in str(caught.value)) == (name in ("target_layer_count", "vocab_size"))


def pair_for_lucebox(pair: Made, folder: Path, runtime: str) -> Path:
    return redialect(job(pair.files[runtime], folder / "reference.gguf", "lucebox")).out


@pytest.mark.parametrize(("runtime", "name"), CARRIED)
def test_what_is_given_stands_for_the_key(pair: Made, tmp_path: Path, runtime: str, name: str) -> None:
    """The file comes out as it would with the key, and tells what was given."""
    source, _ = without_fact(pair, tmp_path, runtime, name)
    facts = prepare_redialect(job(pair.files[runtime], tmp_path / "out.gguf", runtime)).drafter.facts
    known = {fact.name: fact.value for fact in facts}
    given = {name: json.dumps(known[name])}
    report = redialect(job(source, tmp_path / "out.gguf", "lucebox", settings=given))
    keys, tensors = contents(report.out)
    assert keys.pop("drafter.redialect.settings").value == (f"{name}={given[name]}",)
    assert (keys, tensors) == contents(pair_for_lucebox(pair, tmp_path, runtime))


def test_every_missing_fact_is_named_at_once(pair: Made, tmp_path: Path) -> None:
    arch = "qwen35-dflash-draft"
    gone = [f"{arch}.dflash.block_size", f"{arch}.rope.freq_base", f"{arch}.dflash.target_layer_ids"]
    source = spoiled(pair.files["lucebox"], tmp_path, dropping(*gone))
    with pytest.raises(Problems) as caught:
        prepare_redialect(job(source, tmp_path / "out.gguf", "lucebox"))
    assert len(caught.value.problems) == 3


def test_the_target_tells_what_an_older_file_does_not(pair: Made, tmp_path: Path) -> None:
    """Depth and vocabulary; every key of ours is gone, as from any other converter."""

    def edit(keys: Keys, _: Tensors) -> None:
        for name in [name for name in keys if name.startswith("drafter.") or name.endswith("vocab_size")]:
            del keys[name]

    source = spoiled(pair.files["lucebox"], tmp_path, edit)
    redialect(job(source, tmp_path / "out.gguf", "llama.cpp", pair.target))
    keys, tensors = contents(tmp_path / "out.gguf")
    direct, direct_tensors = contents(pair.files["llama.cpp"])
    assert tensors == direct_tensors
    assert set(direct) - set(keys) == {f"drafter.source.{x}" for x in ("config_sha256", "files", "header_sha256")}
    assert {name: entry for name, entry in direct.items() if not name.startswith("drafter.source.")} == keys


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"theta": "1e7"}, "--set theta: no fact of a drafter's file; there are: .*rope.theta"),
        ({"kind": "dflash"}, "--set kind: no fact"),
        ({"dflash_config.block_size": "8"}, "--set dflash_config.block_size: no fact"),
        ({"block_size": "eight"}, "--set: block_size: found 'eight', expected an integer"),
        ({"block_size": "null"}, "block_size: missing"),
        ({"causal": "1"}, "--set: causal: found 1, expected"),
        ({"capture_layers": "[1, true]"}, r"capture_layers\[1\]: found True, expected an integer"),
        ({"capture_layers": "1"}, "capture_layers: found 1, expected an array"),
        ({"capture_layers": "null"}, "capture_layers: missing .*expected a list"),
        ({"capture_layers": "[0, 2, 6]"}, r"found \(0, 2, 6\), expected zero-based.*--set capture_layers="),
        ({"capture_layers": "[0, 2]"}, r"dflash.fc.weight: found shape \[256, 768\], expected \[256, 512\]"),
        ({"rope.theta": "1e300"}, "rope.theta: found inf, expected a finite"),
        ({"mask_token_id": "-1"}, "mask_token_id: found -1, expected inside the vocabulary"),
        ({"mask_token_id": "2048"}, "mask_token_id: found 2048"),
        ({"context_length": "5000000000"}, "context_length = 5000000000: does not fit"),
        ({"layer_count": "4000000000", "window.layers": "[false]"}, "found 4000000000 layers, but 25 tensors"),
        ({"layer_count": "3"}, "each of 3 layers; settle it with --set window.size=VALUE or --set window.layers="),
        ({"window.size": "-3"}, "window.size: found -3, expected a number of tokens above 0"),
        ({"attention_value_scale": "0.5"}, "attention_value_scale = 0.5: lucebox has no key for it"),
        ({"causal": "true"}, "causal = True: lucebox has no key"),
        ({"norm_epsilon": "1e-5"}, "norm_epsilon: Lucebox computes every norm with 1e-06"),
        ({"rope.scaling.factor": "4"}, "rope.scaling.method: missing, expected a string; .*--set rope.scaling.method="),
    ],
    ids=lambda x: None if isinstance(x, str) else " ".join(f"{k}={v}" for k, v in x.items()),
)  # fmt: skip
def test_what_is_given_is_checked(pair: Made, tmp_path: Path, given: dict[str, str], message: str) -> None:
    with pytest.raises(DrafterError, match=message):
        prepare_redialect(job(pair.files["lucebox"], tmp_path / "out.gguf", "lucebox", settings=given))


def test_every_fact_of_a_row_can_be_given() -> None:
    assert set(SETTABLE) >= required("dflash") - {"kind"}


# --- files of other converters ---


def strip_ours(keys: Keys, _: Tensors) -> None:
    for name in [name for name in keys if name.startswith("drafter.")]:
        del keys[name]


def foreign(pair: Made, folder: Path, runtime: str, edit: Edit = lambda keys, tensors: None) -> Path:
    """The pair's file as another converter would have written it: without a key of ours."""

    def both(keys: Keys, tensors: Tensors) -> None:
        strip_ours(keys, tensors)
        edit(keys, tensors)

    return spoiled(pair.files[runtime], folder, both, name="foreign.gguf")


def without_window(keys: Keys, _: Tensors) -> None:
    for name in [name for name in keys if "sliding_window" in name]:
        del keys[name]


DEPTH = {"target_layer_count": "6"}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_window_that_may_have_been_lost_is_doubted(pair: Made, tmp_path: Path, runtime: str) -> None:
    """T-21, T-55: a file without these keys runs dense, also where the drafter slides."""
    source = foreign(pair, tmp_path, runtime, without_window)
    wanted = job(source, tmp_path / "out.gguf", "lucebox", settings=DEPTH)
    doubt = next(w for w in prepare_redialect(wanted).warnings if "no sliding window" in w)
    assert "--set window.size=TOKENS --set window.layers=[true,...]" in doubt
    with pytest.raises(Problems, match="no sliding window"):
        prepare_redialect(replace(wanted, strict=True))
    given = {**DEPTH, "window.size": "48", "window.layers": "[true, false]"}
    report = redialect(replace(wanted, settings=given))
    assert not [w for w in report.redialection.warnings if "window" in w]
    assert (
        report.redialection.drafter.spec == prepare_redialect(replace(wanted, source=pair.files[runtime])).drafter.spec
    )
    dense = prepare_redialect(replace(wanted, settings={**DEPTH, "window.layers": "[false]"}))
    assert dense.drafter.spec.window is None
    assert not [w for w in dense.warnings if "window" in w]


def test_our_own_file_without_a_window_is_not_doubted(made: Callable[[str], Made], tmp_path: Path) -> None:
    case = made("plain")
    assert prepare_redialect(job(case.files["lucebox"], tmp_path / "o.gguf", "lucebox", strict=True)).warnings == ()


def test_a_window_without_a_pattern_is_no_guess(pair: Made, tmp_path: Path) -> None:
    """The buun converter writes the size alone where a config has no layer_types; its loader then runs dense."""
    name = "dflash-draft.attention.sliding_window_pattern"
    source = foreign(pair, tmp_path, "ik_llama.cpp", dropping(name))
    with pytest.raises(Problems, match=rf"{name}: missing \(window.layers\), expected a list"):
        prepare_redialect(job(source, tmp_path / "out.gguf", "llama.cpp", settings=DEPTH))


def test_numbers_that_lucebox_s_converters_make_up_are_doubted(pair: Made, tmp_path: Path) -> None:
    """T-9, A1-14: constants of one drafter stand in files of others."""

    def edit(keys: Keys, _: Tensors) -> None:
        for name, value in (("rope.freq_base", 1e6), ("dflash.block_size", 16)):
            key = f"qwen35-dflash-draft.{name}"
            keys[key] = replace(keys[key], value=value)

    wanted = job(foreign(pair, tmp_path, "lucebox", edit), tmp_path / "out.gguf", "lucebox", settings=DEPTH)
    (doubt,) = prepare_redialect(wanted).warnings
    assert "rope.theta = 1e+06, block_size = 16: what lucebox's converters write where they find none" in doubt
    given = {**DEPTH, "rope.theta": "1e7", "block_size": "16"}
    assert prepare_redialect(replace(wanted, settings=given, strict=True)).warnings == ()


def test_a_lucebox_file_with_a_count_and_no_ids(pair: Made, tmp_path: Path) -> None:
    """T-2, T-12: older Lucebox scripts write how many layers are captured, but not which."""
    key = "qwen35-dflash-draft.dflash.target_layer_ids"
    wanted = job(foreign(pair, tmp_path, "lucebox", dropping(key)), tmp_path / "out.gguf", "llama.cpp", pair.target)
    with pytest.raises(Problems, match=rf"{key}: missing \(capture_layers\), expected a list; .*--set capture_layers="):
        prepare_redialect(wanted)
    report = redialect(replace(wanted, settings={"capture_layers": "[0, 2, 4]"}))
    assert read_gguf(report.out).keys["dflash.target_layers"].value == (1, 3, 5)


def test_ids_counted_from_one_are_given_anew(pair: Made, tmp_path: Path) -> None:
    """T-51: auxiliary ids copied unshifted; only the user can know."""
    key = "qwen35-dflash-draft.dflash.target_layer_ids"

    def edit(keys: Keys, _: Tensors) -> None:
        keys[key] = replace(keys[key], value=(1, 3, 6))

    wanted = job(foreign(pair, tmp_path, "lucebox", edit), tmp_path / "out.gguf", "llama.cpp", pair.target)
    with pytest.raises(WrongInput, match=rf"{key}: found \(1, 3, 6\), expected zero-based.*6; settle it with"):
        prepare_redialect(wanted)
    report = redialect(replace(wanted, settings={"capture_layers": "[0, 2, 4]"}))
    assert read_gguf(report.out).keys["dflash.target_layers"].value == (1, 3, 5)


IK_NAMES = {
    "dflash.fc.weight": "dflash_fc.weight",
    "dflash.hidden_norm.weight": "dflash_hidden_norm.weight",
    **{f"blk.{i}.ffn_norm.weight": f"blk.{i}.post_attention_norm.weight" for i in range(2)},
}


def test_lucebox_s_loader_takes_ik_llama_s_names_too(pair: Made, tmp_path: Path) -> None:
    source = read_gguf(pair.files["lucebox"])
    tensors = [replace(t, name=IK_NAMES.get(t.name, t.name)) for t in source.tensors.values()]
    back = {new: old for old, new in IK_NAMES.items()}
    spelled = tmp_path / "spelled.gguf"
    write_gguf(spelled, list(source.keys.values()), tensors, lambda t: source.slabs(back.get(t.name, t.name)))
    redialect(job(spelled, tmp_path / "out.gguf", "lucebox"))
    assert_same_file(tmp_path / "out.gguf", pair.files["lucebox"])


def test_keys_nobody_reads_are_left_out_aloud(pair: Made, tmp_path: Path) -> None:
    """T-66: what the runtime would have taken from them is not known, so it is said; other tools' notes are kept."""
    notes = {
        "general.size_label": KeyValue("general.size_label", T.STRING, "1M"),
        "general.tags": KeyValue("general.tags", T.ARRAY, ("a", "b"), T.STRING),
        "quantize.imatrix.file": KeyValue("quantize.imatrix.file", T.STRING, "im.gguf"),
    }
    lost = {
        "dflash.decoder_arch": KeyValue("dflash.decoder_arch", T.STRING, "plain"),
        "dflash-draft.stray": KeyValue("dflash-draft.stray", T.UINT32, 1),
    }
    gone = {"split.count": KeyValue("split.count", T.UINT16, 1)}
    source = spoiled(pair.files["llama.cpp"], tmp_path, lambda keys, _: keys.update({**notes, **lost, **gone}))
    report = redialect(job(source, tmp_path / "out.gguf", "ik_llama.cpp"))
    keys = read_gguf(report.out).keys
    assert {name: keys.get(name) for name in notes} == notes
    assert not set(keys) & {*lost, *gone}
    assert [w.split(": ")[1] for w in report.redialection.warnings] == list(lost)


def test_norms_that_are_not_f32_are_doubted(pair: Made, tmp_path: Path) -> None:
    """A1-23: copied as they are, and GPU kernels stop at them."""

    def edit(_: Keys, tensors: Tensors) -> None:
        tensors["output_norm.weight"] = replace(tensors["output_norm.weight"], type=Q.F16)

    source = spoiled(pair.files["lucebox"], tmp_path, edit)
    (doubt,) = prepare_redialect(job(source, tmp_path / "out.gguf", "lucebox")).warnings
    assert "output_norm.weight: found F16" in doubt


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("dspark", "found 'dspark', expected a drafter's: dflash .llama.cpp., dflash-draft"),
        ("gemma4_mtp", "found 'gemma4_mtp'"),
        ("gemma4-dflash-draft", "found 'gemma4-dflash-draft'"),
        ("qwen3", "found 'qwen3'"),
    ],
)
def test_other_architectures_are_named(pair: Made, tmp_path: Path, arch: str, message: str) -> None:
    def edit(keys: Keys, _: Tensors) -> None:
        keys["general.architecture"] = replace(keys["general.architecture"], value=arch)

    with pytest.raises(WrongInput, match=message):
        prepare_redialect(job(spoiled(pair.files["lucebox"], tmp_path, edit), tmp_path / "out.gguf", "lucebox"))


# --- tensors ---


def add(name: str, shape: tuple[int, ...]) -> Edit:
    return lambda _, tensors: tensors.update({name: StoredTensor(name, shape, Q.F32)})


@pytest.mark.parametrize(
    ("runtime", "edit", "message"),
    [
        ("lucebox", lambda _, t: t.pop("dflash.fc.weight"), "dflash.fc.weight: missing .FUSION"),
        ("lucebox", lambda _, t: t.pop("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight: missing .FFN_UP of layer 1"),
        ("lucebox", add("markov_w1.weight", (4, 4)), r"markov_w1.weight: unknown tensor \[4, 4\]: none of a dflash"),
        ("lucebox", add("blk.2.ffn_up.weight", (4, 4)), "blk.2.ffn_up.weight: unknown tensor"),
        ("lucebox", add("token_embd.weight", (2048, 256)), "token_embd.weight: unknown tensor"),
        ("lucebox", add("dflash_fc.weight", (256, 768)), "FUSION is there twice, also as dflash.fc"),
        ("llama.cpp", add("token_embd.weight", (2048, 256)), "lucebox has no tensor for TOKEN_EMBEDDING; without"),
        ("llama.cpp", add("blk.0.attn_sinks.weight", (8,)), "blk.1.attn_sinks.weight: missing .ATTN_SINKS of"),
        ("llama.cpp", add("fc.weight", (256, 512)), r"fc.weight: found shape \[256, 512\], expected \[256, 768\]"),
        ("ik_llama.cpp", add("blk.0.attn_q.bias", (512,)), "lucebox has no tensor for ATTN_Q_BIAS of layer 0"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(pair: Made, tmp_path: Path, runtime: str, edit: Edit, message: str) -> None:
    """T-19, T-44: every tensor is used, or it is an error; every layer has what one layer has."""
    with pytest.raises(Problems, match=message):
        prepare_redialect(job(spoiled(pair.files[runtime], tmp_path, edit), tmp_path / "out.gguf", "lucebox"))


def test_a_head_without_its_embedding_is_refused_where_the_loader_refuses_it(pair: Made, tmp_path: Path) -> None:
    source = spoiled(pair.files["llama.cpp"], tmp_path, add("output.weight", (2048, 256)))
    with pytest.raises(Problems, match=r"OUTPUT: ik_llama.cpp takes it only with TOKEN_EMBEDDING, which is missing"):
        prepare_redialect(job(source, tmp_path / "out.gguf", "ik_llama.cpp"))


def test_a_fact_the_other_runtime_cannot_carry_is_refused(made: Callable[[str], Made], tmp_path: Path) -> None:
    source = made("partial rotary").files["llama.cpp"]
    with pytest.raises(Problems, match=r"rope.dimensions = 8: lucebox has no key for it and would run with 16"):
        prepare_redialect(job(source, tmp_path / "out.gguf", "lucebox"))


# --- target and tokenizer ---


def test_a_runtime_with_tokenizer_needs_the_target(pair: Made, tmp_path: Path) -> None:
    with pytest.raises(WrongUsage, match=r"llama.cpp wants the target's tokenizer .* give --target"):
        prepare_redialect(job(pair.files["lucebox"], tmp_path / "out.gguf", "llama.cpp"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 8}, "target_layer_count: the file has 6, the target target has 8"),
        ({"hidden_size": 128}, "target_hidden_size: the file has 64, the target target has 128"),
        ({"vocab_size": 2100}, "vocab_size: the file has 2048, the target target has 2100"),
    ],
)
def test_another_target_is_refused(
    made: Callable[[str], Made], tmp_path: Path, change: dict[str, int], message: str
) -> None:
    """T-61."""
    target = tiny_target(tmp_path / "target", **{**QWEN, **change})
    with pytest.raises(Problems, match=message):
        prepare_redialect(job(made("plain").files["llama.cpp"], tmp_path / "out.gguf", "ik_llama.cpp", target))


def test_another_vocabulary_is_doubted(pair: Made, tmp_path: Path) -> None:
    """T-61: pairing by hash; the file's own tokens stand in for the hash of a file that has none."""
    key = "tokenizer.ggml.tokens"

    def edit(keys: Keys, _: Tensors) -> None:
        strip_ours(keys, {})
        keys[key] = replace(keys[key], value=("other", *keys[key].value[1:]))  # type: ignore[index]

    source = spoiled(pair.files["llama.cpp"], tmp_path, edit)
    wanted = job(source, tmp_path / "out.gguf", "llama.cpp", pair.target, settings={"window.layers": "[true, false]"})
    (doubt,) = prepare_redialect(wanted).warnings
    assert doubt.startswith("vocabulary: the file was made for other tokens")


def test_a_tokenizer_s_own_mask_token_does_not_replace_the_drafter_s(pair: Made, tmp_path: Path) -> None:
    """T-53."""
    key = "tokenizer.ggml.mask_token_id"
    source = spoiled(
        pair.files["ik_llama.cpp"], tmp_path, lambda keys, _: keys.update({key: KeyValue(key, T.UINT32, 7)})
    )
    report = redialect(job(source, tmp_path / "out.gguf", "llama.cpp"))
    assert report.redialection.warnings == ("mask token: the drafter's 2047 is written, the target's tokenizer has 7",)
    assert read_gguf(report.out).keys[key].value == 2047


def test_a_file_s_own_tokens_have_to_be_as_many_as_its_vocabulary(pair: Made, tmp_path: Path) -> None:
    def edit(keys: Keys, _: Tensors) -> None:
        for name in ("tokens", "token_type"):
            key = f"tokenizer.ggml.{name}"
            keys[key] = replace(keys[key], value=keys[key].value[:-1])  # type: ignore[index]

    wanted = job(spoiled(pair.files["llama.cpp"], tmp_path, edit), tmp_path / "out.gguf", "ik_llama.cpp")
    with pytest.raises(
        WrongInput, match=r"found 2047 tokens, expected 2048 .vocab_size.; give --target, or --set vocab_size"
    ):
        prepare_redialect(wanted)
    report = redialect(replace(wanted, settings={"vocab_size": "2048"}))
    assert read_gguf(report.out).keys["tokenizer.ggml.tokens"].value[-1] == "[PAD2047]"  # type: ignore[index]


def test_a_vocabulary_s_hash_outlives_the_tokenizer(pair: Made, tmp_path: Path) -> None:
    """A later check can compare it with a target's."""

    def edit(keys: Keys, _: Tensors) -> None:
        strip_ours(keys, {})

    source = spoiled(pair.files["llama.cpp"], tmp_path, edit)
    report = redialect(job(source, tmp_path / "out.gguf", "lucebox", settings=DEPTH))
    name = "drafter.vocab.sha256"
    assert read_gguf(report.out).keys[name] == read_gguf(pair.files["llama.cpp"]).keys[name]


def test_a_target_s_gguf_serves_as_its_folder_does(pair: Made, tmp_path: Path) -> None:
    target = write_target(PAIR / "target", tmp_path / "target.gguf")
    report = redialect(job(pair.files["lucebox"], tmp_path / "out.gguf", "llama.cpp", target))
    assert str(target) in report.redialection.launch
    direct, keys = read_gguf(pair.files["llama.cpp"]).keys, read_gguf(report.out).keys
    named = {"drafter.target.name", "drafter.target.architecture"}
    assert {n: k for n, k in keys.items() if n not in named | HISTORY} == {
        n: k for n, k in direct.items() if n not in named
    }


def test_a_gemma_target_s_scale_is_taken_where_the_dialect_had_no_key(pair: Made, tmp_path: Path) -> None:
    """P-9 and the like: the drafter reads the target's embedding, which Gemma multiplies."""
    target = tiny_target(
        tmp_path / "target", architectures=["Gemma3ForCausalLM"], hidden_size=256, num_hidden_layers=6,
        eos_token_id=VOCAB - 2,
    )  # fmt: skip
    facts = {}
    for runtime in ("lucebox", "llama.cpp"):
        decided = prepare_redialect(job(pair.files[runtime], tmp_path / "out.gguf", "llama.cpp", target))
        facts[runtime] = decided.drafter.spec.embedding_scale
    assert facts == {"lucebox": 16.0, "llama.cpp": None}


def test_what_differs_between_the_runtimes_is_noted(pair: Made, tmp_path: Path) -> None:
    notes = {
        (here, there): " ".join(prepare_redialect(job(pair.files[here], tmp_path / "o", there, pair.target)).notes)
        for here, there in PAIRS
    }
    assert all("sliding layers look only backwards inside a block here" in text for text in notes.values())
    assert "lucebox, whose file it was: sliding" in notes["lucebox", "llama.cpp"]


# --- writing ---


def test_output_that_is_a_source_is_refused(pair: Made, tmp_path: Path) -> None:
    """T-24: by its name, a link, a hard link, the name it grows under, or the target's."""
    source = tmp_path / "source.gguf"
    source.write_bytes(pair.files["llama.cpp"].read_bytes())
    (tmp_path / "link.gguf").symlink_to(source)
    os.link(source, tmp_path / "hard.gguf")
    for name in ("source.gguf", "link.gguf", "hard.gguf", "../" + tmp_path.name + "/source.gguf"):
        with pytest.raises(WrongUsage, match="is the same file as the source"):
            prepare_redialect(job(source, tmp_path / name, "lucebox"))
    growing = partial_name(tmp_path / "out.gguf")
    growing.write_bytes(source.read_bytes())
    with pytest.raises(WrongUsage, match="is the same file as the source"):
        prepare_redialect(job(growing, tmp_path / "out.gguf", "lucebox"))
    target = write_target(PAIR / "target", tmp_path / "target.gguf")
    with pytest.raises(WrongUsage, match="is the same file as the source"):
        prepare_redialect(job(source, target, "lucebox", target))
    assert source.read_bytes() == pair.files["llama.cpp"].read_bytes()


def test_nothing_is_written_before_all_is_decided_or_when_reading_fails(
    pair: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R3, T-23: the file appears complete or not at all."""
    out = tmp_path / "out.gguf"
    prepare_redialect(job(pair.files["llama.cpp"], out, "lucebox"))
    assert list(tmp_path.iterdir()) == []

    def fails(self: GGUFFile, name: str, max_bytes: int = 0) -> Iterator[np.ndarray]:
        yield self.tensor_bytes(name, 0, 4)
        raise WrongInput(f"{name}: the disk is gone")

    monkeypatch.setattr(GGUFFile, "slabs", fails)
    with pytest.raises(WrongInput, match="the disk is gone"):
        redialect(job(pair.files["llama.cpp"], out, "lucebox"))
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte_in_slabs(pair: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = GGUFFile.slabs
    monkeypatch.setattr(GGUFFile, "slabs", lambda self, name: slabs(self, name, 4096))
    heard: list[int] = []
    report = redialect(job(pair.files["llama.cpp"], tmp_path / "out.gguf", "lucebox"), heard.append)
    assert sum(heard) == report.redialection.n_bytes
    assert max(heard) <= 4096
    assert (report.source_bytes, report.out_bytes) == (
        pair.files["llama.cpp"].stat().st_size,
        report.out.stat().st_size,
    )


@pytest.mark.parametrize("runtime", RUNTIMES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_a_damaged_head_is_never_a_traceback(
    made: Callable[[str], Made], tmp_path: Path, runtime: str, data: st.DataObject
) -> None:
    """Any entry of the metadata with any value of any type: an error of ours, or a file that holds together."""
    source = made("a layer slides").files[runtime]
    file = read_gguf(source)
    names = [name for name in file.keys if not name.startswith("tokenizer.ggml.merges")]
    keys = dict(file.keys)
    for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)):
        entry = data.draw(entries(name))
        if entry is None:
            del keys[name]
        else:
            keys[name] = entry
    if "general.architecture" not in keys or keys["general.architecture"].type is not T.STRING:
        return
    path = tmp_path / "damaged.gguf"
    try:
        write_gguf(path, list(keys.values()), list(file.tensors.values()), lambda t: file.slabs(t.name))
        redialect(job(path, tmp_path / "out.gguf", data.draw(st.sampled_from(RUNTIMES)), settings=DEPTH))
    except DrafterError:
        return
    read_gguf(tmp_path / "out.gguf")


def entries(name: str) -> st.SearchStrategy[KeyValue | None]:
    """Entries of this name with an odd value; None takes it away."""
    u32, i32 = st.integers(0, 2**32 - 1), st.integers(-(2**31), 2**31 - 1)
    small = st.integers(0, 12)
    scalars = {
        T.UINT32: small | u32,
        T.INT32: small | i32,
        T.FLOAT32: st.floats(width=32),
        T.STRING: st.text(max_size=9),
    }
    single = [st.builds(KeyValue, st.just(name), st.just(kind), value) for kind, value in scalars.items()]
    several = [
        st.builds(KeyValue, st.just(name), st.just(T.ARRAY), st.lists(v, min_size=1, max_size=5).map(tuple), st.just(k))
        for k, v in {**scalars, T.BOOL: st.booleans()}.items()
    ]
    return st.one_of(st.none(), st.builds(KeyValue, st.just(name), st.just(T.BOOL), st.booleans()), *single, *several)


# --- the command ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["redialect", *map(str, arguments)])
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_the_command_reports_and_tells_how_to_run_it(
    pair: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.gguf"
    code, said, errors = run(capsys, pair.files["lucebox"], "--for", "llama.cpp", "--target", pair.target, "-o", out)
    assert (code, errors) == (0, "")
    assert said.startswith(
        f"wrote {out} (lucebox -> llama.cpp)\n  25 tensors, 2.1 MiB, every byte as it was, tokenizer"
    )
    assert said.endswith(f"-md {out} --spec-type draft-dflash --spec-draft-n-max 7\n")


def test_the_command_s_dry_run_shows_facts_and_names(
    pair: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (pair.files["llama.cpp"], "--for", "lucebox", "-o", tmp_path / "out.gguf", "--dry-run")
    code, said, _ = run(capsys, *arguments, "--set", "rope.theta=5e6")
    assert code == 0
    lines = [line.split() for line in said.splitlines()]
    assert ["rope.theta", "5000000", "--set", "rope.theta"] in lines
    assert ["dflash.fc.weight", "fc.weight", "256", "x", "768", "Q8_0", "204.0", "KiB"] in lines
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", [True, False])
def test_the_command_s_json(pair: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], dry: bool) -> None:
    out = tmp_path / "out.gguf"
    more = ["--dry-run"] if dry else []
    code, said, _ = run(capsys, pair.files["llama.cpp"], "--for", "lucebox", "-o", out, "--json", *more)
    found = checked(said)
    assert code == 0
    assert (found["from"], found["for"], len(found["tensors"])) == ("llama.cpp", "lucebox", 25)
    assert found["facts"]["capture_layers"] == {"value": [0, 2, 4], "origin": "dflash.target_layers"}
    assert found["launch"].startswith("dflash_server ")
    assert ("out_bytes" in found) is not dry
    assert out.exists() is not dry


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--set", "nonsense=1"], 2, "--set nonsense: no fact"),
        (["--set", "nonsense"], 2, "expected KEY=VALUE"),
        (["--set", "mask_token_id=9999"], 3, "mask_token_id: found 9999"),
        (["--target", "nowhere"], 3, "nowhere: nothing there"),
    ],
)
def test_the_command_s_exit_codes(
    pair: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    found, _, errors = run(capsys, pair.files["llama.cpp"], "--for", "lucebox", "-o", tmp_path / "out.gguf", *arguments)
    assert (found, message in errors) == (code, True), errors


def test_a_folder_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, PAIR / "drafter", "--for", "lucebox", "-o", tmp_path / "out.gguf")
    assert (code, "`convert` reads checkpoints" in errors) == (2, True)


# --- memory and the real engine ---

MEASURE = """
import sys
from pathlib import Path
from convert_drafter.converters import RedialectJob, redialect

def peak():  # of this program; getrusage would count what pytest held when it started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
redialect(RedialectJob(Path(sys.argv[1]), None, "lucebox", Path(sys.argv[2])))
print((peak() - before) * 1024)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_a_slab(pair: Made, tmp_path: Path) -> None:
    """R6: a drafter of 1.4 GB whose largest tensors have 240 MB each."""
    wide = {"hidden_size": 2048, "feed_forward_size": 110_080}

    def edit(keys: Keys, tensors: Tensors) -> None:
        for name, row in ((r.key.format(a="dflash"), r) for r in find_cell("dflash", "llama.cpp").rows):
            if row.field in wide:
                keys[name] = replace(keys[name], value=wide[row.field])
        keys["drafter.target.embedding_length"] = replace(keys["drafter.target.embedding_length"], value=2048)
        sizes = {256: 2048, 768: 110_080}
        for name, tensor in tensors.items():
            shape = tuple(sizes.get(n, n) for n in tensor.shape)
            tensors[name] = replace(tensor, shape=(2048, 3 * 2048) if name == "fc.weight" else shape)

    source = spoiled(pair.files["llama.cpp"], tmp_path, edit)
    assert source.stat().st_size > 1.3e9
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 150 << 20


@pytest.mark.engine
@pytest.mark.parametrize("here", ["lucebox", "ik_llama.cpp"])
def test_llama_cpp_drafts_with_a_redialected_file_as_with_the_converted_one(
    pair: Made, tmp_path: Path, here: str
) -> None:
    from test_engine import NEW_TOKENS, PROMPTS, ask, drafting

    target = write_target(PAIR / "target", tmp_path / "target.gguf")
    redialect(job(pair.files[here], tmp_path / "out.gguf", "llama.cpp", target))
    direct = ask(target, tmp_path / "direct.log", *drafting(pair.files["llama.cpp"]), prompts=PROMPTS[:6])
    rewritten = ask(target, tmp_path / "rewritten.log", *drafting(tmp_path / "out.gguf"), prompts=PROMPTS[:6])
    assert rewritten == direct
    assert rewritten.accepted > 0.2 * NEW_TOKENS


@pytest.mark.engine
@pytest.mark.parametrize("there", RUNTIMES)
def test_a_file_of_llama_cpp_s_own_converter_is_redialected(pair: Made, tmp_path: Path, there: str) -> None:
    """Facts and weights as from the checkpoint; its converter leaves out what its loader takes anyway."""
    from llama_source import run_converter

    out, log = tmp_path / "theirs.gguf", tmp_path / "log"
    arguments = [str(PAIR / "drafter"), "--outfile", str(out), "--outtype", "q8_0"]
    run_converter([[*arguments, "--target-model-dir", str(PAIR / "target")]], log)
    report = redialect(job(out, tmp_path / "out.gguf", there, pair.target))
    direct = read_gguf(pair.files[there])
    cell = find_cell("dflash", there)
    assert report.redialection.warnings == ()
    assert read(cell, read_gguf(report.out).keys) == read(cell, direct.keys)
    assert contents(report.out)[1] == contents(pair.files[there])[1]
