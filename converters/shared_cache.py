"""Whether a target's cache is the one that an assistant looks at: keys and values of its last two layers.

llama.cpp takes the last layer but one for sliding layers and the last for full ones (llama_model::create_memory in
src/llama-model.cpp), and reads them with the assistant's own widths, whatever the target's are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import CachedLayer, Target

TYPES = ("sliding", "full")
WIDTHS = ("head_dim", "kv_head_count")
BEHAVIOUR = ("theta", "window")


def cache_misfits(spec: DrafterSpec, target: Target) -> Iterator[str]:
    """Why the target's cache cannot be read, one line each; nothing where the drafter has one of its own."""
    if spec.sliding is None or target.last_layers is None:
        return
    slides = tuple(layer.window is not None for layer in target.last_layers)
    if slides != (True, False):
        found = " and ".join(TYPES[not one] for one in slides)
        yield f"layer_types: the target {target.name} ends with {found} layers, an assistant looks at sliding and full"
    else:
        yield from _differing(spec, target, WIDTHS)


def cache_doubts(spec: DrafterSpec, target: Target) -> Iterator[str]:
    """In what it is read otherwise than the target does itself: one of the two is wrong."""
    yield from _differing(spec, target, BEHAVIOUR)


def _differing(spec: DrafterSpec, target: Target, names: tuple[str, ...]) -> Iterator[str]:
    if spec.sliding is None or spec.window is None or target.last_layers is None:
        return
    for i, theirs in enumerate(target.last_layers):
        ours = as_cached(spec, spec.window.layers.index(i == 0))
        for name in names:
            one, other = getattr(ours, name), getattr(theirs, name)
            if None not in (one, other) and not math.isclose(one, other, rel_tol=1e-6):  # a theta is one of 32 bits
                what = f"{name} of {TYPES[i]} layers: the drafter has {one:.10g}"
                yield f"{what}, the target {target.name}, whose keys and values it looks at, {other:.10g}"


def as_cached(spec: DrafterSpec, layer: int) -> CachedLayer:
    """What a layer of the drafter expects of the cache."""
    here, window = spec.of_layer(layer), spec.window
    size = window.size if window is not None and window.layers[layer] else None
    return CachedLayer(here.head_dim, here.kv_head_count, here.rope.theta, size)
