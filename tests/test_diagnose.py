"""Diagnose: the explanations that are tried mend what was planted, and the right one is found.

The table of explanations is facts and arrays, so most of this needs no torch; trying them on the pair does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from faults import METADATA, NOTHING, WEIGHTS, Fault, Workspace, interleaved
from published import PAIR, small_checkpoint

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import SlidingWindow, facts_of
from convert_drafter.converters.verify.diagnosis.explanations import explanations, layers_needed
from convert_drafter.converters.verify.diagnosis.repair import repair
from convert_drafter.converters.verify.diagnosis.view import Explanation, Hints, View, changes, with_facts
from convert_drafter.converters.verify.diagnosis.weight_explanations import (
    furthest_weights,
    largest_error,
    relative_error,
    source_weights,
)
from convert_drafter.quant import TYPES, dequantize

if TYPE_CHECKING:
    from convert_drafter.converters.verdict import Diagnosis
    from convert_drafter.converters.verify.in_torch.drafting import Variant
    from convert_drafter.converters.verify.in_torch.target import TorchTarget

ROOT = Path(__file__).parent.parent
BY_NAME = {fault.name: fault for fault in (*METADATA, *WEIGHTS)}
THETA, SPECIALS = 1e6, (2044, 2046)  # of the pair's target
# Faults that nobody can mend without the source: what was right is in no table.
ONLY_BY_SOURCE = {
    "capture layers of another drafter",
    "window lost",
    "mask token of a donor",
    "fusion columns rotated",
    "norm epsilon 1e-2",
}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def right(space: Workspace) -> View:
    return view_of_file(space.converted("F32"))


def view_of_file(path: Path, captures: tuple[int, ...] | None = None) -> View:
    """A file as a view; `captures` for a list that no spec can hold."""
    settings = {} if captures is None else {"capture_layers": "[0, 2, 4]"}
    drafter = read_drafter_file(path, settings)
    weights = {
        key: dequantize(drafter.file.tensor_bytes(stored.name), TYPES[stored.type.name], stored.shape)
        for key, stored in drafter.tensors.items()
    }
    return View(drafter.spec, weights, captures or drafter.spec.capture_layers)


def planted(space: Workspace, name: str) -> View:
    lower = (-1, 1, 3) if name == "capture layers one lower" else None
    return view_of_file(BY_NAME[name].case(space).file, lower)


def same_drafter(one: View, other: View) -> bool:
    """The same function: fc's columns follow the capture layers, whatever their order."""
    first, second = in_order(one), in_order(other)
    facts = first.facts() == second.facts()
    return facts and all(np.array_equal(first.weights[key], second.weights[key]) for key in second.weights)


def in_order(view: View) -> View:
    order = np.argsort(view.captures)
    fusion = view.weights[Role.FUSION, None]
    columns = fusion.reshape(len(fusion), len(order), -1)[:, order].reshape(fusion.shape)
    return View(view.spec, {**view.weights, (Role.FUSION, None): columns}, tuple(sorted(view.captures)))


def that_mend(view: View, hints: Hints, right: View) -> list[Explanation]:
    return [explanation for explanation in explanations(view, hints) if same_drafter(explanation.view, right)]


BY_TENSOR = {  # what no table knows either, but the source tells which tensors
    "one matrix is noise": ["ATTN_V of layer 1"],
    "hidden norm as ones": ["FUSION_NORM"],
    "q and k norms as ones": [f"ATTN_{x}_NORM of layer {i}" for x in "QK" for i in (0, 1)],
}
CAUSES = [fault for fault in (*METADATA, *WEIGHTS) if fault.cause not in (None, NOTHING)]
ROUNDED = {"norms minus one", "norms plus one"}
EXACT = [fault for fault in CAUSES if fault.name not in ROUNDED | BY_TENSOR.keys() and "Lucebox" not in fault.name]
IN_TABLE = [fault for fault in EXACT if fault.name not in ONLY_BY_SOURCE]

IN_METADATA = [fault for fault in METADATA if fault.cause and "Lucebox" not in fault.name]


# --- the table, without torch ---


@pytest.mark.parametrize("fault", EXACT, ids=lambda fault: f"{fault.ids[0]} {fault.name}")
def test_some_explanation_mends_what_was_planted(space: Workspace, right: View, fault: Fault) -> None:
    """With the source: the drafter as it was, and the explanation's name tells what was wrong."""
    view = planted(space, fault.name)
    found = that_mend(view, Hints(THETA, SPECIALS, right), right)
    assert found and found[0].name.startswith(fault.cause or "")


@pytest.mark.parametrize("fault", IN_TABLE, ids=lambda fault: f"{fault.ids[0]} {fault.name}")
def test_it_is_in_the_table_without_the_source(space: Workspace, right: View, fault: Fault) -> None:
    """The usual suspects are enough for what converters do wrong."""
    view = planted(space, fault.name)
    found = that_mend(view, Hints(THETA, SPECIALS), right)
    assert found and found[0].name.startswith(fault.cause or "")


@pytest.mark.parametrize("name", sorted(ROUNDED))
def test_norms_without_their_one_are_mended(space: Workspace, right: View, name: str) -> None:
    """P-42, up to the rounding of the one."""
    for explanation in explanations(planted(space, name), Hints()):
        if explanation.about == "norms" and largest_error(explanation.view, right) < 1e-5:
            return
    raise AssertionError("no explanation gives the norms back")


def test_a_right_drafter_has_no_fact_to_mend(right: View) -> None:
    """Nothing is explained by the source where the file says the same."""
    assert not changes(right, right)
    assert not [e for e in explanations(right, Hints(THETA, SPECIALS, right)) if "source" in e.mended]


def test_none_is_tried_twice(space: Workspace, right: View) -> None:
    """The source's theta is also among the usual suspects."""
    view = planted(space, "theta 1e4")
    tried = list(explanations(view, Hints(THETA, SPECIALS, right)))
    facts = [(e.view.spec, e.view.captures) for e in tried if e.view.weights is view.weights]
    assert len(facts) == len(set(facts)) and (view.spec, view.captures) not in facts
    assert len({e.name for e in tried}) == len(tried)


def test_the_source_s_facts_come_first_one_by_one(space: Workspace, right: View) -> None:
    spoilt = with_facts(right, {"rope.theta": 1e4, "causal": True, "mask_token_id": 2044})
    assert spoilt is not None
    first = list(explanations(spoilt, Hints(original=right)))[:4]
    assert [e.about for e in first] == [
        "rope.theta",
        "mask_token_id",
        "causal",
        "rope.theta and mask_token_id and causal",
    ]
    assert first[3].view.spec == right.spec


def test_a_patch_leaves_the_file_s_weights_alone(space: Workspace, right: View) -> None:
    before = {key: array.copy() for key, array in right.weights.items()}
    for explanation in explanations(right, Hints(THETA, SPECIALS, right)):
        assert explanation.view.weights.keys() == right.weights.keys()
    assert all(np.array_equal(before[key], right.weights[key]) for key in before)


@pytest.mark.parametrize("dimensions", [64, 32])
def test_rotary_rows_go_both_ways(right: View, dimensions: int) -> None:
    """T-57: pairs to halves undoes halves to pairs, on the rotated dimensions only."""
    view = with_facts(right, {"rope.dimensions": dimensions})
    assert view is not None

    def rotary(view: View) -> dict[str, View]:
        return {e.mended: e.view for e in explanations(view, Hints()) if e.about == "RoPE rows of q, k and their norms"}

    there = rotary(view)["halves -> pairs"]
    back = rotary(there)["pairs -> halves"]
    assert not same_drafter(there, view) and same_drafter(back, view)
    key = (Role.ATTN_Q, 0)
    if dimensions == 64:
        assert np.array_equal(there.weights[key], interleaved(view.weights[key]))
    else:
        heads = there.weights[key].reshape(8, 64, 256)
        assert np.array_equal(heads[:, 32:], view.weights[key].reshape(8, 64, 256)[:, 32:])


def test_states_are_asked_for_that_explanations_read(right: View) -> None:
    """T-51: one lower than layer 0 is the embedding's output."""
    assert layers_needed(right, Hints()) == [-1, 0, 1, 2, 3, 4, 5]
    last = replace(right, captures=(1, 3, 5))
    assert layers_needed(last, Hints()) == [0, 1, 2, 3, 4, 5]  # there is no layer 6


@pytest.mark.parametrize("window", [None, SlidingWindow(48, (True, True)), SlidingWindow(1, (False, True))])
def test_windows_of_any_kind_are_explained(right: View, window: SlidingWindow | None) -> None:
    """T-16: what is left over of a window is a window."""
    view = replace(right, spec=replace(right.spec, window=window))
    about = [e for e in explanations(view, Hints()) if e.about.startswith("window")]
    assert about
    for explanation in about:
        mended = explanation.view.spec.window
        assert mended != window and (mended is None or any(mended.layers))


def test_other_drafters_are_explained_too(tmp_path: Path) -> None:
    """One layer, other widths, no window, no target known: nothing is assumed about the pair."""
    source = small_checkpoint(tmp_path / "drafter", num_hidden_layers=1, head_dim=8, num_attention_heads=8)
    out = tmp_path / "small.gguf"
    convert(ConvertJob(source, None, "lucebox", "F16", out))
    view = view_of_file(out)
    tried = list(explanations(view, Hints()))
    assert {"rope.theta", "capture_layers", "mask_token_id", "window", "norms", "ATTN_Q"} <= {e.about for e in tried}
    assert all(array.shape == view.weights[key].shape for e in tried for key, array in e.view.weights.items())


# --- weights against the source's ---


@pytest.mark.parametrize("name", BY_TENSOR)
def test_the_broken_tensors_are_tried_first(space: Workspace, right: View, name: str) -> None:
    """T-49, T-19: of all tensors those furthest from the source, and no more than are needed."""
    *_, last = furthest_weights(planted(space, name), right)
    assert sorted(last.about.split(", ")) == sorted(BY_TENSOR[name]) and same_drafter(last.view, right)


def test_other_weights_are_not_called_quantized(space: Workspace, right: View) -> None:
    """T-61: a drafter of the same shapes trained elsewhere is not the source's file, however it is read."""
    assert source_weights(planted(space, "a random drafter of the same shapes"), right) is None
    for recipe in ("Q8_0", "Q4_0", "Q2_K"):
        assert source_weights(view_of_file(space.converted(recipe)), right) is not None


def test_relative_error_of_what_is_no_number() -> None:
    ones = np.ones(8, np.float32)
    assert relative_error(ones, ones) == 0
    assert relative_error(ones, ones * 1.5) == pytest.approx(0.5)
    assert relative_error(ones, np.full(8, np.nan, np.float32)) == np.inf
    assert relative_error(ones * 0, ones) == 1


# --- what is found is what repairs ---


@pytest.mark.parametrize(
    "fault",
    [f for f in METADATA if f.cause and "Lucebox" not in f.name],
    ids=lambda fault: f"{fault.ids[0]} {fault.name}",
)
def test_the_facts_of_the_cause_repair_the_file(space: Workspace, right: View, tmp_path: Path, fault: Fault) -> None:
    """From a planted file to the right one: explain, then repair by what the explanation changed."""
    view, file = planted(space, fault.name), fault.case(space).file
    mended = that_mend(view, Hints(THETA, SPECIALS, right), right)[0]
    out = repair(file, changes(view, mended.view), tmp_path / "repaired.gguf")
    wanted, found = read_gguf(space.converted()), read_gguf(out)
    assert {k: v.value for k, v in found.keys.items() if "redialect" not in k} == {
        k: v.value for k, v in wanted.keys.items()
    }


def test_the_table_needs_no_torch() -> None:
    """T-7."""
    modules = "explanations, repair, view, weight_explanations"
    blocked = "import sys; sys.modules.update(torch=None, transformers=None)"
    code = f"from convert_drafter.converters.verify.diagnosis import {modules}"
    subprocess.run([sys.executable, "-c", f"{blocked}; {code}"], check=True, cwd=ROOT)


# --- tried on the pair ---


@dataclass(frozen=True)
class Bench:
    """The pair's target, its published drafter and some of its prompts."""

    target: TorchTarget
    original: Variant
    prompts: list[Any]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    import torch

    from convert_drafter.converters.convert import read_published
    from convert_drafter.converters.verify.in_torch.drafting import variant
    from convert_drafter.converters.verify.in_torch.target import TorchTarget
    from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights
    from convert_drafter.converters.verify.prompts import Encoded

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model is slower with more
    published = read_published(PAIR / "drafter", PAIR / "target")
    lines = (PAIR / "prompts.jsonl").read_text().splitlines()[::3]
    prompts = [Encoded(f"prompt {n}", tuple(json.loads(line)["tokens"])) for n, line in enumerate(lines)]
    original = variant("source", published.spec, checkpoint_weights(published))
    yield Bench(TorchTarget(PAIR / "target"), original, prompts)
    torch.set_num_threads(threads)


def diagnosed(bench: Bench, view: View, source: bool = True, tokens: int = 80) -> Diagnosis:
    from convert_drafter.converters.verify.diagnosis.diagnose import diagnose
    from convert_drafter.converters.verify.in_torch.drafting import Variant

    file = Variant("file", view.spec, dict(view.weights), view.captures)
    return diagnose(file, bench.original if source else None, bench.target, bench.prompts, tokens)


# Of each family one; `fault_bench.py` explains them all and records it, which takes an hour.
BESIDE_THE_SOURCE = (
    "theta 5e6", "capture layers one higher", "window lost", "causal", "block size 16", "rotary rows interleaved",
    "one matrix is noise",
)  # fmt: skip
ALONE = ("theta 1e4", "mask token is the padding", "norms minus one")


@pytest.mark.engine
@pytest.mark.parametrize("name", BESIDE_THE_SOURCE)
def test_the_planted_fault_is_the_one_found(space: Workspace, bench: Bench, name: str) -> None:
    """Also where acceptance hardly feels it: a causal block, half the theta, capture layers one higher."""
    found = diagnosed(bench, planted(space, name)).found
    assert found is not None and found.name.startswith(BY_NAME[name].cause or "")
    assert found.kl is not None and found.kl < 1e-3
    wanted = facts_of(bench.original.spec)
    assert found.facts == {field: wanted.get(field) for field in found.facts}
    assert bool(found.facts) is (BY_NAME[name] in METADATA)


@pytest.mark.engine
@pytest.mark.parametrize("name", ALONE)
def test_a_collapse_is_explained_without_the_source(space: Workspace, bench: Bench, name: str) -> None:
    answer = diagnosed(bench, planted(space, name), source=False)
    assert answer.goal is None and answer.found is not None
    assert answer.found.name.startswith(BY_NAME[name].cause or "")
    assert answer.found.length > 1.3 * answer.file_length


@pytest.mark.engine
def test_quantization_is_told_from_a_mistake(space: Workspace, bench: Bench) -> None:
    """T-62: Q2_K costs this drafter half its acceptance, and no fact gives it back."""
    found = diagnosed(bench, view_of_file(space.converted("Q2_K"))).found
    assert found is not None and found.name.startswith("all weights") and not found.facts


@pytest.mark.engine
def test_a_wrong_fact_of_a_quantized_file_is_found(space: Workspace, bench: Bench) -> None:
    """What its quantization diverges by anyway is not held against the explanation."""
    view = with_facts(view_of_file(space.converted("Q4_K_M")), {"rope.theta": 1e6})
    assert view is not None
    found = diagnosed(bench, view).found
    assert found is not None and found.name.startswith("rope.theta") and found.facts == {"rope.theta": 1e7}


@pytest.mark.engine
def test_two_faults_hide_each_other(space: Workspace, bench: Bench) -> None:
    """A wrong theta and swapped matrices: mending one is not enough, and both are named."""
    view = with_facts(planted(space, "gate and up swapped"), {"rope.theta": 1e4})
    assert view is not None
    found = diagnosed(bench, view).found
    assert found is not None and {"rope.theta", "FFN_GATE and FFN_UP"} == {
        part.split(":")[0] for part in found.name.split("; ")
    }
    assert found.facts == {"rope.theta": 1e7}


@pytest.mark.engine
@pytest.mark.parametrize("source", [True, False])
def test_another_drafter_is_explained_by_nothing(space: Workspace, bench: Bench, source: bool) -> None:
    """T-61: a drafter of another target, or none at all, is not made this one's by any key."""
    answer = diagnosed(bench, planted(space, "a random drafter of the same shapes"), source)
    assert answer.found is None and answer.tried


@pytest.mark.engine
@pytest.mark.parametrize(("recipe", "source"), [("BF16", True), ("BF16", False), ("Q4_K_M", False)])
def test_a_right_file_is_explained_by_nothing(space: Workspace, bench: Bench, recipe: str, source: bool) -> None:
    """Sixty explanations on few prompts: none of them may look better by chance."""
    answer = diagnosed(bench, view_of_file(space.converted(recipe)), source)
    assert answer.found is None
    assert bool(answer.tried) is not source
