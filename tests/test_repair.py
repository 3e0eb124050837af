"""Repair: the same file with facts put right. What is not repaired is copied, and the source stays as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import METADATA, PAD, Fault, Workspace, keys
from gguf import GGUFValueType

from convert_drafter.converters import WrongInput, WrongUsage
from convert_drafter.converters.dialects import RUNTIMES, find_cell
from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.gguf_file import KeyValue, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.spec import facts_of
from convert_drafter.converters.verify.diagnosis.repair import repair

HISTORY = {f"drafter.redialect.{name}" for name in ("from", "header_sha256", "settings")}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("faults"))


def values(file: GGUFFile) -> dict[str, Any]:
    return {name: entry.value for name, entry in file.keys.items() if name not in HISTORY}


def assert_repaired(out: Path, right: Path) -> None:
    """Every key and every byte of every tensor is the right file's, but for what tells of the repair."""
    found, wanted = read_gguf(out), read_gguf(right)
    assert values(found) == values(wanted)
    assert list(found.tensors.values()) == list(wanted.tensors.values())
    for name in wanted.tensors:
        assert np.array_equal(found.tensor_bytes(name), wanted.tensor_bytes(name))


# --- what can be repaired ---

WHAT_REPAIRS: Mapping[str, Mapping[str, Any]] = {
    "theta 1e4": {"rope.theta": 1e7},
    "capture layers one lower": {"capture_layers": (0, 2, 4)},
    "capture layers reversed": {"capture_layers": (0, 2, 4)},
    "window lost": {"window.size": 48, "window.layers": (True, False)},
    "window without a pattern": {"window.layers": (True, False)},
    "window pattern swapped": {"window.layers": (True, False)},
    "mask token is the padding": {"mask_token_id": 2047},
    "mask token missing": {"mask_token_id": 2047},
    "mask token beyond the vocabulary": {"mask_token_id": 2047},
    "block size missing": {"block_size": 8},
    "causal": {"causal": False},
    "rotary dimensions halved": {"rope.dimensions": 64},
    "norm epsilon 1e-2": {"norm_epsilon": 1e-6},
    "yarn written though null": {
        "rope.scaling.method": None,
        "rope.scaling.factor": None,
        "rope.scaling.original_context_length": None,
    },
    "embedding scale of Gemma": {"embedding_scale": None},
    "value scale": {"attention_value_scale": None},
    "theta missing": {"rope.theta": 1e7},
}
BY_NAME = {fault.name: fault for fault in METADATA}


@pytest.mark.parametrize("name", WHAT_REPAIRS)
def test_facts_put_right_give_the_right_file(space: Workspace, tmp_path: Path, name: str) -> None:
    """Exactly the file that was never spoilt, key by key in its order and byte by byte, plus the history."""
    fault: Fault = BY_NAME[name]
    case = fault.case(space)
    before = case.file.read_bytes()
    out = repair(case.file, WHAT_REPAIRS[name], tmp_path / "repaired.gguf")
    assert_repaired(out, space.converted())
    assert case.file.read_bytes() == before


def test_a_window_is_taken_away_whole(space: Workspace, tmp_path: Path) -> None:
    out = repair(space.converted(), {"window.size": None, "window.layers": None}, tmp_path / "full.gguf")
    assert "window.size" not in facts_of(read_drafter_file(out).spec)
    assert not any("sliding" in name for name in read_gguf(out).keys)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_is_repaired_for_its_own_runtime(space: Workspace, tmp_path: Path, runtime: str) -> None:
    cell = find_cell("dflash", runtime)
    theta = f"{cell.arch}.rope.freq_base"
    spoilt = keys({theta: 1e4}, runtime=runtime)(space, f"theta of {runtime}").file
    assert_repaired(repair(spoilt, {"rope.theta": 1e7}, tmp_path / "out.gguf"), space.converted("BF16", runtime))


def test_quantized_blocks_are_copied(space: Workspace, tmp_path: Path) -> None:
    """Nothing is decoded and encoded again."""
    spoilt = keys({"dflash.rope.freq_base": 1e4}, "Q4_K_M")(space, "theta of Q4_K_M").file
    assert_repaired(repair(spoilt, {"rope.theta": 1e7}, tmp_path / "out.gguf"), space.converted("Q4_K_M"))


def test_what_was_changed_stands_in_the_file(space: Workspace, tmp_path: Path) -> None:
    spoilt = keys({"dflash.rope.freq_base": 1e4, "tokenizer.ggml.mask_token_id": PAD})(space, "two facts").file
    once = repair(spoilt, {"rope.theta": 1e7, "embedding_scale": None}, tmp_path / "once.gguf")
    twice = repair(once, {"mask_token_id": 2047}, tmp_path / "twice.gguf")
    entries = read_gguf(twice).keys
    told = entries["drafter.redialect.settings"].value
    assert told == ("rope.theta=10000000.0", "embedding_scale=null", "mask_token_id=2047")
    assert len(entries["drafter.redialect.header_sha256"].value) == 2  # type: ignore[arg-type]
    assert_repaired(twice, space.converted())


def test_keys_nobody_reads_are_kept(space: Workspace, tmp_path: Path) -> None:
    """Redialect leaves them out of a file for another runtime; a repaired one is to be the same file."""
    file = read_gguf(space.converted())
    strange = KeyValue("dflash.strange", GGUFValueType.STRING, "kept")
    source = tmp_path / "strange.gguf"
    write_gguf(source, [*file.keys.values(), strange], list(file.tensors.values()), lambda t: file.slabs(t.name))
    out = repair(source, {"rope.theta": 1e6}, tmp_path / "out.gguf")
    assert read_gguf(out).keys["dflash.strange"] == strange


def test_the_same_repair_gives_the_same_bytes(space: Workspace, tmp_path: Path) -> None:
    """R6."""
    one, other = (repair(space.converted(), {"rope.theta": 1e6}, tmp_path / f"{n}.gguf") for n in "ab")
    assert one.read_bytes() == other.read_bytes()


# --- what cannot ---


def test_the_file_itself_is_refused_as_output(space: Workspace, tmp_path: Path) -> None:
    """T-24: by its own name, by a link, by a hard link; its bytes stay."""
    source = tmp_path / "drafter.gguf"
    source.write_bytes(space.converted().read_bytes())
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "hard.gguf").hardlink_to(source)
    before = source.read_bytes()
    for name in ("drafter.gguf", "link.gguf", "hard.gguf"):
        with pytest.raises(WrongUsage, match=r"same file|is a link"):
            repair(source, {"rope.theta": 1e6}, tmp_path / name)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("facts", "error", "said"),
    [
        pytest.param({}, WrongUsage, "converted again", id="nothing to change"),
        pytest.param({"rope.thea": 1e6}, WrongUsage, r"rope\.thea: no fact.*rope\.theta", id="no fact"),
        pytest.param({"rope.theta": None}, WrongUsage, "every drafter has it", id="a required fact taken away"),
        pytest.param({"mask_token_id": 4096}, WrongInput, "mask_token_id", id="T-53 beyond the vocabulary"),
        pytest.param({"capture_layers": (0, 2, 6)}, WrongInput, "capture_layers", id="T-51 beyond the target"),
        pytest.param({"capture_layers": (0, 2)}, WrongInput, r"fc\.weight", id="T-13 fewer than fc's columns"),
        pytest.param({"rope.theta": float("nan")}, WrongInput, "theta", id="T-22 no number"),
        pytest.param({"rope.theta": "1e6"}, WrongInput, "theta", id="T-22 text"),
    ],
)
def test_facts_that_do_not_fit_write_nothing(
    space: Workspace, tmp_path: Path, facts: dict[str, Any], error: type[Exception], said: str
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(error, match=said):
        repair(space.converted(), facts, out)
    assert list(tmp_path.iterdir()) == []


def test_another_model_s_file_is_refused(space: Workspace, tmp_path: Path) -> None:
    file = read_gguf(space.converted())
    other = file.keys | {"general.architecture": replace(file.keys["general.architecture"], value="qwen3")}
    source = tmp_path / "qwen3.gguf"
    write_gguf(source, list(other.values()), list(file.tensors.values()), lambda t: file.slabs(t.name))
    with pytest.raises(WrongInput, match="qwen3"):
        repair(source, {"rope.theta": 1e6}, tmp_path / "out.gguf")


@pytest.mark.parametrize("name", ["a tensor missing", "a shape wrong"])
def test_wrong_tensors_are_not_repaired_by_a_fact(space: Workspace, tmp_path: Path, name: str) -> None:
    from faults import CORRUPT

    case = next(fault for fault in CORRUPT if fault.name == name).case(space)
    with pytest.raises(WrongInput):
        repair(case.file, {"rope.theta": 1e6}, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
