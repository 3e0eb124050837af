"""What may be wrong with a drafter's weights: rows, names and norms that a converter got wrong, and quantization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from convert_drafter.converters.roles import Role, TensorKey, describe
from convert_drafter.converters.spec import HEADS, DrafterSpec
from convert_drafter.converters.verify.diagnosis.view import Array, Explanation, Hints, View
from convert_drafter.quant.measure import measure

Q_AND_K = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_Q_BIAS, Role.ATTN_K_BIAS)
Q_AND_K_NORMS = (Role.ATTN_Q_NORM, Role.ATTN_K_NORM)
NORMS = (
    Role.FUSION_NORM, Role.OUTPUT_NORM, Role.ATTN_NORM, Role.ATTN_NORM_2, Role.FFN_NORM,
    Role.ATTN_Q_NORM, Role.ATTN_K_NORM, Role.ATTN_POST_NORM, Role.FFN_POST_NORM,
    Role.NEXTN_EMBEDDING_NORM, Role.NEXTN_STATE_NORM, Role.NEXTN_OUTPUT_NORM,
    Role.ATTN_MIX_NORM, Role.FFN_MIX_NORM, Role.NEXTN_MIX_NORM, Role.INDEXER_Q_NORM, Role.INDEXER_K_NORM,
)  # fmt: skip
MATRICES = (
    Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.ATTN_OUTPUT, Role.FFN_GATE, Role.FFN_UP, Role.FFN_DOWN, Role.FUSION,
    Role.NEXTN_PROJ, Role.NEXTN_PRE_PROJ, Role.NEXTN_POST_PROJ,
    Role.MARKOV_IN, Role.MARKOV_OUT, Role.SELECTOR_HIDDEN, Role.SELECTOR_PREDECESSOR,
    Role.SELECTOR_SUCCESSOR,
)  # fmt: skip
CONVOLUTIONS = (Role.ATTN_CONV_BASE, Role.ATTN_CONV_PROJ, Role.FFN_CONV_BASE, Role.FFN_CONV_PROJ)
LISTED = 4  # names in a line
FAR = 0.5  # relative error; Q2_K is at 0.3, other weights of the same size are at 1.4
SWAPS = (
    (Role.FFN_GATE, Role.FFN_UP),
    (Role.ATTN_K, Role.ATTN_V),
    (Role.ATTN_Q_NORM, Role.ATTN_K_NORM),
    (Role.ATTN_NORM, Role.FFN_NORM),
    (Role.ATTN_NORM, Role.ATTN_NORM_2),
    (Role.ATTN_MIX_NORM, Role.FFN_MIX_NORM),
    (Role.ATTN_POST_NORM, Role.FFN_NORM),
    (Role.ATTN_POST_NORM, Role.FFN_POST_NORM),
    (Role.FUSION_NORM, Role.OUTPUT_NORM),
    (Role.ATTN_Q, Role.ATTN_OUTPUT),
    (Role.NEXTN_EMBEDDING_NORM, Role.NEXTN_STATE_NORM),
    (Role.SELECTOR_PREDECESSOR, Role.SELECTOR_SUCCESSOR),
    (Role.MARKOV_IN, Role.MARKOV_OUT),
)


def changed(view: View, change: Callable[[Array], Array], *roles: Role) -> View:
    """The same drafter with `change` on every tensor of these roles."""
    return replace(view, weights={key: change(a) if key[0] in roles else a for key, a in view.weights.items()})


def token_ids(view: View, hints: Hints) -> Iterator[Explanation]:
    """P-41: offsets from each row's own number in the place of tokens."""
    ids = view.weights.get((Role.DRAFT_TO_TARGET, None))
    if ids is None:
        return
    tokens = (ids + np.arange(len(ids))).astype(np.float32)
    if tokens.max() < view.spec.vocab_size:
        yield Explanation("d2t", "offsets -> tokens", changed(view, lambda a: tokens, Role.DRAFT_TO_TARGET))


def rotary_rows(view: View, hints: Hints) -> Iterator[Explanation]:
    """P-43, T-57: rotary pairs beside each other or as halves, in the rows of q and k, in their norms, or in both."""
    both = (*Q_AND_K, *Q_AND_K_NORMS)
    for how, back in {"pairs -> halves": False, "halves -> pairs": True}.items():
        for what, roles in {"q, k and their norms": both, "q and k": Q_AND_K, "q and k norms": Q_AND_K_NORMS}.items():
            new = {
                key: reordered(array, view.spec.of_layer(key[1]), back) if key[0] in roles else array
                for key, array in view.weights.items()
            }
            yield Explanation(f"RoPE rows of {what}", how, replace(view, weights=new))


def reordered(array: Array, spec: DrafterSpec, back: bool) -> Array:
    """Of each head the even rotated rows first, then the odd ones; or `back` to pairs."""
    size, head_dim = spec.rope.dimensions, spec.head_dim
    halves = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2), np.arange(size, head_dim)])
    by_head: Array = array.reshape(-1, head_dim, *array.shape[1:])[:, np.argsort(halves) if back else halves]
    return by_head.reshape(array.shape)


def norms(view: View, hints: Hints) -> Iterator[Explanation]:
    """P-42: norms stored as the difference from one, or given their one twice."""
    present = [role for role in NORMS if role in roles_of(view)]
    for step, how in ((1, "one added"), (-1, "one taken away")):
        groups = {"norms": present, " and ".join(role.name for role in Q_AND_K_NORMS): Q_AND_K_NORMS}
        for what, roles in (groups | {role.name: [role] for role in present}).items():
            yield Explanation(what, how, changed(view, lambda a, step=step: a + np.float32(step), *roles))  # type: ignore[misc]


def swaps(view: View, hints: Hints) -> Iterator[Explanation]:
    """T-63: tensors under each other's names."""
    weights = view.weights
    for one, other in SWAPS:
        place = {one: other, other: one}
        new = {(role, i): weights.get((place.get(role, role), i), a) for (role, i), a in weights.items()}
        if all(new[key].shape == a.shape for key, a in weights.items()):
            yield Explanation(f"{one.name} and {other.name}", "swapped", replace(view, weights=new))
    yield from halves(view)
    if view.spec.layer_count == 1:
        return
    ends = view.spec.layers[0] + view.spec.layers[-1]
    turned = {(role, i): a if i is None else weights[role, ends - i] for (role, i), a in weights.items()}
    if all(turned[key].shape == a.shape for key, a in weights.items()):
        yield Explanation("layers", "in reverse order", replace(view, weights=turned))


def halves(view: View) -> Iterator[Explanation]:
    """What a chain reads beside each other, the token's embedding and the target's state, the other way round."""
    wide = view.spec.kind == "eagle3"  # its attention reads both
    fusions: tuple[tuple[Role, ...], ...] = ((Role.NEXTN_PROJ,), (Role.NEXTN_PRE_PROJ,))
    for roles in (*fusions, *([(Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)] if wide else [])):
        if roles_of(view).issuperset(roles):
            turned = changed(view, lambda a: np.roll(a, a.shape[1] // 2, axis=1), *roles)
            yield Explanation(_listed([role.name for role in roles]), "embedding and state exchanged", turned)


def gated_queries(view: View, hints: Hints) -> Iterator[Explanation]:
    """Of attention with an output gate: every head's query and gate are stored beside each other, not apart."""
    heads, d = view.spec.head_count, view.spec.head_dim
    if view.spec.kind not in HEADS or any(
        len(array) != 2 * heads * d for (role, _), array in view.weights.items() if role is Role.ATTN_Q
    ):
        return

    def beside(array: Array) -> Array:
        parts: Array = array.reshape(2, heads, d, -1)
        return np.ascontiguousarray(parts.swapaxes(0, 1)).reshape(array.shape)

    yield Explanation("ATTN_Q", "queries and gates beside each other", changed(view, beside, Role.ATTN_Q))


def kernels(view: View, hints: Hints) -> Iterator[Explanation]:
    """DFlash2's filters: the taps from the other end, or those of a sublayer's input on its output."""
    part = view.spec.convolution
    if part is None:
        return

    def turned(axis: int) -> Callable[[Array], Array]:
        def change(array: Array) -> Array:
            by_tap: Array = array.reshape(2, part.kernel_size, -1, array.shape[-1])  # side, tap, ...
            return np.ascontiguousarray(np.flip(by_tap, axis)).reshape(array.shape)

        return change

    yield Explanation("convolutions", "taps in reverse order", changed(view, turned(1), *CONVOLUTIONS))
    yield Explanation("convolutions", "sides exchanged", changed(view, turned(0), *CONVOLUTIONS))


def roles_of(view: View) -> set[Role]:
    return {role for role, _ in view.weights}


def by_columns(view: View, hints: Hints) -> Iterator[Explanation]:
    """A matrix transposed, or stored column by column: the same where it is square."""
    for role in (role for role in MATRICES if role in roles_of(view)):
        new = changed(view, lambda a: np.ascontiguousarray(a.reshape(a.shape[::-1]).T), role)
        yield Explanation(role.name, "transposed", new)


def source_weights(view: View, original: View) -> Explanation | None:
    """All weights as the source has them: quantization, where no single mistake explains it.

    None where they are not the source's weights at all, which would explain nothing.
    """
    if weight_shapes(original) != weight_shapes(view):
        return None
    if np.median([relative_error(original.weights[key], a) for key, a in view.weights.items() if a.ndim > 1]) > FAR:
        return None
    return Explanation("all weights", "as the source has them", replace(view, weights=original.weights))


def source_tensors(view: View, hints: Hints) -> Iterator[Explanation]:
    """Tensors that only one of both has, as the source has them: factors of rotary pairs, sinks, biases."""
    original = hints.original
    if original is None or original.spec.kind != view.spec.kind or original.weights.keys() == view.weights.keys():
        return
    other = [key for key in (*original.weights, *view.weights) if (key in original.weights) != (key in view.weights)]
    mended = {key: view.weights.get(key, array) for key, array in original.weights.items()}
    yield Explanation(_listed([describe(key) for key in other]), "as the source has it", replace(view, weights=mended))


def furthest_weights(view: View, original: View) -> Iterator[Explanation]:
    """The tensor that differs most as the source has it, then the two that do, and so on: damage is in a few."""
    errors = {key: relative_error(original.weights[key], a) for key, a in view.weights.items()}
    mended, names = dict(view.weights), list[str]()
    for key in sorted((key for key in errors if errors[key]), key=lambda key: -errors[key]):
        mended[key] = original.weights[key]
        names.append(describe(key))
        off = f"{errors[key]:.2g} of {'their sizes or more' if names[1:] else 'its size'}"
        how = f"as the source has {'them' if names[1:] else 'it'} (off by {off})"
        yield Explanation(_listed(names), how, replace(view, weights=dict(mended)))


def _listed(names: list[str]) -> str:
    more = f", {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def largest_error(view: View, original: View) -> float:
    """Of any tensor; infinite where the shapes are not the source's."""
    if weight_shapes(original) != weight_shapes(view):
        return math.inf
    return max(relative_error(original.weights[key], a) for key, a in view.weights.items())


def weight_shapes(view: View) -> dict[TensorKey, tuple[int, ...]]:
    return {key: array.shape for key, array in view.weights.items()}


def relative_error(original: Array, other: Array) -> float:
    """Root mean square difference over the original's root mean square; infinite for NaN."""
    with np.errstate(invalid="ignore"):
        errors = measure(original, other)
    found = errors.relative if errors.squares else errors.rmse
    return found if math.isfinite(found) else math.inf
