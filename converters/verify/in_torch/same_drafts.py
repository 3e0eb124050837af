"""Do two drafters draft the same? Their distributions on identical inputs, position by position.

Acceptance cannot see every fault: on a tiny pair a causal block costs 0.1 tokens per step and another capture layer
0.01, yet every distribution is another one. What a quantized file may differ by is measured, not guessed: a twin of
the original gets noise of each tensor's own quantization error, and the file may not be much further away than it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convert_drafter.converters.roles import TensorKey
from convert_drafter.converters.verify.in_torch.drafting import Reading, Variant
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted
from convert_drafter.converters.verify.measured import Agreement
from convert_drafter.quant.measure import measure

SEED = 7


def compare(original: Reading, other: Reading) -> Agreement:
    """Both drafters from the anchors of the original's steps, the other one after the original's drafts.

    Drafts that a shorter block lacks count as differing.
    """
    compared, equal, divergence, lacking = [0] * original.size, [0] * original.size, 0.0, 0
    for first, second in _pairs(original, other):
        a, b = first.logits, second.logits
        shared = min(len(a), len(b))
        same = (first.tokens[:shared] == second.tokens[:shared]).tolist()
        for i in range(len(a)):
            compared[i] += 1
            equal[i] += i < shared and same[i]
        divergence += _divergence(a[:shared], b[:shared])
        lacking += len(a) - shared
    return Agreement(tuple(compared), tuple(equal), divergence, lacking)


def _pairs(original: Reading, other: Reading) -> Iterator[tuple[Drafted, Drafted]]:
    """What both draft after each anchor, from as many anchors at once as both can."""
    steps = [position for position, _, _ in original.steps()]
    at_once = min(original.at_once, other.at_once)
    for anchors in (steps[i : i + at_once] for i in range(0, len(steps), at_once)):
        follow = [original.drafts(position) for position in anchors]
        yield from zip(original.drafted(anchors), other.drafted(anchors, follow), strict=True)


def _divergence(a: Tensor, b: Tensor) -> float:
    """Sum over rows of KL(softmax(a) || softmax(b)), both (n, vocab) f32; NaN logits diverge without bound."""
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    return float(torch.nan_to_num((p.exp() * (p - q)).sum(), nan=float("inf"), posinf=float("inf")))


def twin(original: Variant, errors: Mapping[TensorKey, float]) -> Variant:
    """The original with Gaussian noise of the given root mean square error in each tensor."""
    random = np.random.default_rng(SEED)

    def noisy(key: TensorKey, array: NDArray[np.float32]) -> NDArray[np.float32]:
        error = np.float32(errors.get(key, 0))
        return array + error * random.standard_normal(array.shape, np.float32) if error else array

    weights = {key: noisy(key, array) for key, array in original.weights.items()}
    return Variant(f"{original.name} with noise", original.spec, weights, original.captures)


def quantization_errors(
    original: Variant, other: Variant, allowed: Mapping[TensorKey, float]
) -> dict[TensorKey, float]:
    """Root mean square difference of each tensor, as far as its type explains it.

    `allowed` is that as a share of the tensor's own root mean square; a tensor not in it has nothing to explain.
    """
    with np.errstate(invalid="ignore"):  # the other may be no number
        shared = ((key, a, other.weights.get(key)) for key, a in original.weights.items())
        errors = {key: measure(a, b) for key, a, b in shared if b is not None and a.shape == b.shape}
    sizes = {key: math.sqrt(error.squares / error.count) for key, error in errors.items()}
    return {key: float(np.fmin(e.rmse, allowed.get(key, 0.0) * sizes[key])) for key, e in errors.items()}
