"""Diagnosis of the kinds beside DFlash: the table has what mends each planted fault. No torch is needed for that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faults import NOTHING, Fault, Workspace
from kind_faults import KIND_FAULTS

from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.roles import Role
from convert_drafter.converters.verify.diagnosis.explanations import explanations, same_weights
from convert_drafter.converters.verify.diagnosis.view import Explanation, Hints, View
from convert_drafter.converters.verify.diagnosis.weight_explanations import furthest_weights
from convert_drafter.quant import STORED, dequantize

ASKED = [fault for fault in KIND_FAULTS if fault.cause not in (None, NOTHING)]
# What no table knows without the source: one of many values or tensors.
ONLY_BY_SOURCE = {
    "half the candidates", "k not permuted", "the feature's norm as ones", "fusion columns rotated",
    "llama3 factors lost", "llama3 factors as ones", "llama3 factors of another model", "a triple made up",
    "the last norm is the target's",
}  # fmt: skip


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("faults"))


def view_of(path: Path) -> View:
    """Facts and tensors of a file in the hub's order, as verify reads them."""
    drafter = read_drafter_file(path)
    weights = {}
    for key, stored in drafter.tensors.items():
        rows = dequantize(drafter.file.tensor_bytes(stored.name), STORED[stored.type.name], stored.shape)
        weights[key] = drafter.cell.into_hub(key).apply(rows, drafter.spec.head_dim, 0)
    return View(drafter.spec, weights, drafter.spec.capture_layers)


def that_mend(view: View, hints: Hints, right: View) -> Iterator[Explanation]:
    every = explanations(view, hints)
    yield from (explanation for explanation in every if same_drafter(explanation.view, right))
    if hints.original is not None and view.weights.keys() == right.weights.keys():
        yield from (few for few in furthest_weights(view, right) if same_drafter(few.view, right))


def same_drafter(one: View, other: View) -> bool:
    """Up to the rounding of a norm's one; fc's columns follow the capture layers."""
    same = one.facts() == other.facts() and one.weights.keys() == other.weights.keys()
    return same and all(np.allclose(one.weights[key], array, atol=1e-5) for key, array in other.weights.items())


@pytest.mark.parametrize("fault", ASKED, ids=lambda fault: f"{fault.kind} {fault.name}")
def test_some_explanation_mends_what_was_planted(space: Workspace, fault: Fault) -> None:
    """The first that does tells what was wrong; without the source the usual suspects do."""
    right, view = view_of(space.of(fault.checkpoint).converted("F32")), view_of(fault.case(space).file)
    if fault.name == "fusion columns rotated":  # mended by other capture layers in the place of other columns
        assert [e for e in explanations(view, Hints(original=right)) if e.name.startswith("capture_layers: [0, 2, 4]")]
        return
    found = next(that_mend(view, Hints(original=right), right), None)
    assert found is not None and found.name.startswith(fault.cause or ""), found and found.name
    alone = next(that_mend(view, Hints(), right), None)
    assert (alone is None) is (fault.name in ONLY_BY_SOURCE), alone and alone.name


@pytest.mark.parametrize("checkpoint", sorted({fault.checkpoint for fault in KIND_FAULTS}))
def test_every_explanation_changes_something(space: Workspace, checkpoint: str) -> None:
    """And leaves the shapes as they are, whatever kind the drafter is of."""
    view = view_of(space.of(checkpoint).converted("F32"))
    for explanation in explanations(view, Hints(1e6, (7, 9), view)):
        other = explanation.view
        assert not same_weights(other, view) or (other.spec, other.captures) != (view.spec, view.captures)
        assert {key: array.shape for key, array in other.weights.items()} == {
            key: array.shape for key, array in view.weights.items()
        }, explanation.name
        factors = other.weights.get((Role.ROPE_FACTORS, None))
        assert factors is None or 2 * len(factors) == other.spec.rope.dimensions, explanation.name
