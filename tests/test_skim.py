"""Skimming a GGUF: what it leaves out is counted and hashed, and a file cut short still says what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from target_gguf import split_gguf, write_target

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_model import parts_of, read_model
from convert_drafter.converters.gguf_read import LONG, read_gguf, skim_gguf
from convert_drafter.converters.tokenizer import TOKENS, vocabulary_hash

T = GGUFValueType
PAIR = Path(__file__).parent.parent / "fixtures" / "pair"


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(PAIR / "target", tmp_path_factory.mktemp("skim") / "target.gguf")


def test_skimming_is_reading_without_the_long_lists(target: Path) -> None:
    whole, skimmed = read_gguf(target), skim_gguf(target)
    left_out = {key: entry for key, entry in whole.keys.items() if key not in skimmed.keys}
    assert left_out.keys() == skimmed.skipped.keys() > {TOKENS}
    assert all(len(entry.value) == skimmed.skipped[key].count > LONG for key, entry in left_out.items())  # type: ignore[arg-type]
    assert skimmed.skipped[TOKENS].sha256 == vocabulary_hash(whole.keys[TOKENS].value)  # type: ignore[arg-type]
    assert (skimmed.tensors, skimmed.offsets, skimmed.fault) == (whole.tensors, whole.offsets, "")
    assert {key: whole.keys[key] for key in skimmed.keys} == skimmed.keys


def test_a_file_cut_short_still_says_what_it_is(target: Path, tmp_path: Path) -> None:
    """T-70."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(target.read_bytes()[:-5000])
    with pytest.raises(WrongInput, match="truncated"):
        read_gguf(cut)
    found = skim_gguf(cut)
    assert "truncated" in found.fault and found.tensors == read_gguf(target).tensors


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_metadata_cut_short_is_refused(target: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    data = min(read_gguf(target).offsets.values())
    cut.write_bytes(target.read_bytes()[: int(data * share)])
    with pytest.raises(WrongInput, match=r"truncated or damaged|as many as fit|at most the"):
        skim_gguf(cut)


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
def test_a_length_in_a_long_list_is_held_against_the_file(tmp_path: Path, length: int) -> None:
    """T-25."""
    path, tokens = tmp_path / "t.gguf", tuple(f"token {i}" for i in range(LONG + 1))
    keys = [KeyValue("general.architecture", T.STRING, "x"), KeyValue(TOKENS, T.ARRAY, tokens, T.STRING)]
    tensor = StoredTensor("a", (4, 32), GGMLQuantizationType.F32)
    write_gguf(path, keys, [tensor], lambda _: [np.zeros((4, 32), np.float32)])
    raw = path.read_bytes()
    at = raw.index(b"token 700") - 8
    path.write_bytes(raw[:at] + length.to_bytes(8, "little") + raw[at + 8 :])
    with pytest.raises(WrongInput, match="truncated or damaged"):
        skim_gguf(path)


def test_a_part_of_a_model_is_taken(tmp_path: Path) -> None:
    """Only a whole model is read; a part of one is skimmed."""
    path = tmp_path / "m-00001-of-00003.gguf"
    keys = [KeyValue("general.architecture", T.STRING, "x"), KeyValue("split.count", T.UINT16, 3)]
    write_gguf(path, keys, [StoredTensor("a", (32,), GGMLQuantizationType.F32)], lambda _: [np.zeros(32, np.float32)])
    assert skim_gguf(path).parts == 3
    with pytest.raises(WrongInput, match="one of 3 parts"):
        read_gguf(path)


# --- a model in several files ---


def test_a_model_in_parts_is_the_model(target: Path, tmp_path: Path) -> None:
    whole = read_gguf(target)
    first, *others = split_gguf(target, tmp_path / "big-F32")
    found = read_model(first)
    assert found.tensors == whole.tensors and found.parts == 3
    assert {key: entry for key, entry in found.keys.items() if not key.startswith("split.")} == whole.keys
    assert parts_of(others[1]) == (first, *others) and parts_of(target) == (target,)
    assert read_model(target) == whole


def test_a_part_that_is_missing_or_not_the_first(target: Path, tmp_path: Path) -> None:
    first, second, _ = split_gguf(target, tmp_path / "big")
    with pytest.raises(WrongInput, match=r"expected the first of them under its own name, \.\.\.-00001-of-00003\.gguf"):
        read_model(second)
    with pytest.raises(WrongInput, match="the first of them"):
        read_model(first.rename(tmp_path / "renamed.gguf"))
    (tmp_path / "renamed.gguf").rename(first)
    second.unlink()
    with pytest.raises(WrongInput, match=r"big-00002-of-00003\.gguf: missing, .* download it beside the others"):
        read_model(first)
