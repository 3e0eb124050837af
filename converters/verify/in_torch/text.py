"""One text on a transformers model: its cache, which really shrinks, and the hidden states that drafters read.

Layers that hold keys and values are cut. A layer with a recurrent state cannot be: it is copied before tokens are
verified, put back when some of them are rejected, and the kept ones are processed again (T-43).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.spec import BEFORE_NORM, DrafterSpec

CHUNK = 512  # tokens of a prompt processed at once
EMBEDDING = -1  # the "layer" whose state is the embedding's output
FINAL = -2  # the "layer" whose state is the decoder's output, after the final norm
SLIDING, FULL = -3, -4  # of the last layer of that type with a cache of its own: keys and values side by side
CACHED = {SLIDING: "sliding_attention", FULL: "full_attention"}
READS = {"gemma4-assistant": (FINAL, SLIDING, FULL)}  # kinds that name no layers and read more than the final state
STREAMED_DIM = 4  # (1, T, streams, H), where layers have hyper-connections
Captured = dict[int, Tensor]  # layer -> states (positions, H) f32


def captures_of(spec: DrafterSpec) -> tuple[int, ...]:
    """The layers whose states a drafter reads: those it names, else what its kind does, else the target's last state,
    normed or not, or all its streams."""
    last = spec.target_layer_count - 1 if spec.kind in BEFORE_NORM else FINAL
    return spec.capture_layers or READS.get(spec.kind, (last,))


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor log lines nor progress bars of transformers: what matters is raised."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def recording(decoder: nn.Module, layers: nn.ModuleList, wanted: Sequence[int]) -> Iterator[Captured]:
    """Fills in the state after each wanted layer of the decoder while it runs.

    Hooks, because the last of transformers' `hidden_states` comes after the final norm.
    """
    found: Captured = {}

    def record(layer: int, state: Tensor) -> None:
        if layer >= 0 and state.dim() == STREAMED_DIM:  # all streams of it, side by side
            state = state.flatten(2)
        if state.dim() != 3 or state.shape[0] != 1:
            raise WrongInput(f"layer {layer}: found a hidden state of shape {tuple(state.shape)}, expected (1, T, H)")
        found[layer] = state[0].float()

    def after(layer: int) -> Any:
        return lambda module, args, out: record(layer, out if isinstance(out, Tensor) else out[0])

    def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        record(EMBEDDING, args[0] if args else kwargs["hidden_states"])

    with ExitStack() as hooks:
        for layer in wanted:
            if layer == FINAL:
                hook = decoder.register_forward_hook(after(layer))
            elif layer == EMBEDDING:
                hook = layers[0].register_forward_pre_hook(before, with_kwargs=True)
            else:
                hook = layers[layer].register_forward_hook(after(layer))
            hooks.callback(hook.remove)
        yield found


def new_cache(config: Any) -> DynamicCache:
    """The model's own kinds of layers, but a sliding layer keeps all positions: its mask has the window, and it can be
    cut where a ring of the last positions cannot."""
    cache = DynamicCache(config=config)
    if any(is_more_than_sliding(layer) for layer in cache.layers):
        return cache  # its layers share a mask, so all of them hold as many positions
    cache.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in cache.layers]
    return cache


def is_more_than_sliding(layer: Any) -> bool:
    """A ring of the last positions and a state beside it (DeepSeek-V4)."""
    return isinstance(layer, DynamicSlidingWindowLayer) and type(layer) is not DynamicSlidingWindowLayer


def last_owner(config: Any, kind: str) -> int:
    """The last layer of a type that has keys and values of its own. Raises `WrongInput` for a target without one.

    Later ones share them (num_kv_shared_layers of Gemma 3n and 4), and llama.cpp's assistants read the same.
    """
    text = config.get_text_config(decoder=True)
    types = list(getattr(text, "layer_types", None) or ())
    own = types[: len(types) - (getattr(text, "num_kv_shared_layers", None) or 0)]
    if kind not in own:
        raise WrongInput(f"{text.model_type}: found no layer of {kind} with keys and values, expected one to be read")
    return max(i for i, name in enumerate(own) if name == kind)


def cut(cache: DynamicCache, length: int) -> None:
    """Drop every key and value beyond `length` positions (T-42: the arrays, not an offset)."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer and layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def uncuttable(cache: DynamicCache) -> list[Any]:
    """Layers with a state that is not one row per position; those without any state are not among them."""
    return [layer for layer in cache.layers if type(layer) is not DynamicLayer and holds_tensors(vars(layer))]


def holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return any(holds_tensors(part) for part in value.values())
    return isinstance(value, Tensor)


def snapshot(cache: DynamicCache) -> list[dict[str, Any]]:
    """A copy of everything that cannot be cut; updates may be in place."""
    return [copy.deepcopy(vars(layer)) for layer in uncuttable(cache)]


def put_back(cache: DynamicCache, saved: list[dict[str, Any]]) -> None:
    """Undo everything since the snapshot, which is used up."""
    for layer, state in zip(uncuttable(cache), saved, strict=True):
        vars(layer).clear()
        vars(layer).update(state)


class TargetText:
    """One text: tokens are processed, some of them kept. `captures` are the layers whose states are recorded."""

    def __init__(self, model: Any, layers: nn.ModuleList, captures: Sequence[int]) -> None:
        self.length = 0  # positions kept
        self.cache = new_cache(model.config)
        self._model, self._layers, self._captures = model, layers, tuple(captures)
        self._chunks: list[tuple[int, Captured]] = []  # first position, states
        self._verified: tuple[int, ...] = ()
        self._states: Captured = {}
        self._saved: list[dict[str, Any]] = []

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        """Process and keep tokens, some at a time; logits (vocab,) f32 after the last."""
        for start in range(0, len(tokens), CHUNK):
            logits = self.verify(tokens[start : start + CHUNK], last_only=True)
        self._commit(len(self._verified))
        return logits[-1]

    @torch.inference_mode()
    def verify(self, tokens: Sequence[int], last_only: bool = False) -> Tensor:
        """Process tokens in one forward: logits (n, vocab) f32 after each, or (1, vocab) after the last."""
        self._commit(len(self._verified))
        self._saved = [] if last_only or len(tokens) == 1 else snapshot(self.cache)
        recorded = [layer for layer in self._captures if layer not in CACHED]
        with recording(self._model.get_decoder(), self._layers, recorded) as self._states:
            logits = self._forward(tokens, 1 if last_only else len(tokens))
        self._verified = tuple(tokens)
        return logits

    @torch.inference_mode()
    def keep(self, count: int) -> None:
        """Keep the first `count` of the tokens last verified, as if the others had never been."""
        if not 1 <= count <= len(self._verified):
            raise ValueError(f"count: found {count}, expected 1 to {len(self._verified)}, the tokens last verified")
        if count < len(self._verified) and self._saved:
            put_back(self.cache, self._saved)
            cut(self.cache, self.length)
            self._forward(self._verified[:count], 1)
        elif count < len(self._verified):
            cut(self.cache, self.length + count)
        self._commit(count)

    def captured(self, start: int, stop: int) -> Captured:
        """States of the kept positions from `start` to before `stop`: layer -> (stop - start, H) f32.

        What a cache holds is as wide as all heads of its keys, and of its values.
        """
        if not 0 <= start < stop <= self.length:
            raise ValueError(f"positions: found {start} to {stop}, expected some of the {self.length} kept")

        def pieces(layer: int) -> Iterator[Tensor]:
            for first, states in self._chunks:
                piece = states[layer][max(0, start - first) : max(0, stop - first)]
                if len(piece):
                    yield piece

        return {
            layer: self._cached(layer, start, stop) if layer in CACHED else torch.cat(list(pieces(layer)))
            for layer in self._captures
        }

    def _cached(self, layer: int, start: int, stop: int) -> Tensor:
        """Keys, turned by their positions, and values: (stop - start, 2 * heads * d) f32."""
        held = self.cache.layers[last_owner(self._model.config, CACHED[layer])]
        both = (part[0, :, start:stop].transpose(0, 1).flatten(1) for part in (held.keys, held.values))
        return torch.cat(list(both), dim=-1).float()

    def _commit(self, count: int) -> None:
        if count:
            self._chunks.append((self.length, {layer: state[:count] for layer, state in self._states.items()}))
            self.length += count
        self._verified, self._states, self._saved = (), {}, []

    def _forward(self, tokens: Sequence[int], rows: int) -> Tensor:
        """Logits (rows, vocab) f32 after the last tokens.

        Which rows is a list, not a number: with a number Gemma 4 computes no other states in layers that share a cache.
        """
        ids = torch.tensor([list(tokens)], device=self._model.device)
        wanted = torch.arange(len(tokens) - rows, len(tokens), device=self._model.device)
        with quiet():
            out = self._model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=wanted)
        logits: Tensor = out.logits[0, -rows:].float()
        if bool(logits.isnan().any()):
            raise WrongInput("the target computes NaN: a weight is no number, or its states are beyond the dtype")
        return logits


def continues_rightly(model: Any, layers: nn.ModuleList, vocab_size: int) -> bool:
    """Whether several tokens on top of a cache give what the whole text gives at once.

    Early releases of transformers 5 start a recurrent layer anew for them, without a word.
    """
    tokens = [(i * i + 1) % vocab_size for i in range(24)]
    whole, parts = TargetText(model, layers, ()), TargetText(model, layers, ())
    expected = whole.prefill(tokens)
    if not uncuttable(whole.cache):
        return True
    parts.prefill(tokens[:16])
    error = parts.verify(tokens[16:])[-1] - expected
    noise = 0.003 if model.dtype == torch.float32 else 0.2
    return bool(error.norm() <= noise * (expected - expected.mean()).norm())
