"""A target in torch: any causal language model that transformers has, from a local folder, greedy.

Nothing is downloaded, no code of the folder is run, and only safetensors are opened.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import MissingEngine, Problems, WrongInput, WrongUsage
from convert_drafter.converters.verify.job import DTYPES, INSTALL

try:
    import torch
    import transformers
    from torch import Tensor, nn
    from transformers import AutoModelForCausalLM

    from convert_drafter.converters.verify.in_torch.reference.drafter import Tables
    from convert_drafter.converters.verify.in_torch.text import (
        FULL,
        Captured,
        TargetText,
        continues_rightly,
        quiet,
    )
except ImportError as error:
    raise MissingEngine(f"{error.name}: not installed, and the torch engine needs it: {INSTALL}") from error

NAMED = 5  # tensors named in a message


class TorchTarget:
    """A `TargetModel` over transformers, one text at a time.

    `embedding` and `head` are the raw tables (vocab, H) in the target's dtype; hidden states are f32 whatever it is.
    Raises `WrongInput` for a folder that is no such model, `WrongUsage` for another dtype.
    """

    def __init__(self, path: Path, dtype: str = "float32") -> None:
        self.model = load_model(path, dtype)
        config = self.model.config.get_text_config(decoder=True)
        self.name = path.resolve().name
        self.architecture = type(self.model).__name__
        self.layers = decoder_layers(path, self.model, config.num_hidden_layers)
        self.layer_count: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.context_length: int = getattr(config, "max_position_embeddings", None) or 2**20
        self.theta = rope_theta(config)
        self.end_tokens = end_tokens(self.model, config)
        self.embedding: Tensor = self.model.get_input_embeddings().weight
        self.head = head_table(path, self.model)
        self.vocab_size: int = self.embedding.shape[0]
        self._captures: tuple[int, ...] = ()
        self._text = self._new_text(())
        if not continues_rightly(self.model, self.layers, self.vocab_size):
            raise MissingEngine(
                f"transformers {transformers.__version__}: continues {self.architecture} wrongly from its cache;"
                " drafts cannot be verified: install a newer transformers"
            )

    @property
    def tables(self) -> Tables:
        return Tables(self.embedding, self.head)

    def session(self) -> TorchTarget:
        """The same weights for another text at the same time."""
        other = TorchTarget.__new__(TorchTarget)
        vars(other).update(vars(self))
        other._text = self._new_text(())
        return other

    # --- TargetModel ---

    def prefill(self, prompt: Sequence[int]) -> int:
        self._text = self._new_text(self._captures)
        return int(self._text.prefill(self._checked(prompt)).argmax())

    def verify(self, tokens: Sequence[int]) -> list[int]:
        choices: list[int] = self._text.verify(self._checked(tokens)).argmax(-1).tolist()
        return choices

    def keep(self, count: int) -> None:
        self._text.keep(count)

    # --- what drafters and measurements need beyond it ---

    def capture(self, layers: Iterable[int]) -> None:
        """Record the states after these layers too, or what `text` has other numbers below 0 for; from then on."""
        self._captures = tuple(sorted({*self._captures, *self._known(layers)}))

    def captured(self, start: int, stop: int) -> Captured:
        """States of kept positions, `start` to before `stop`: layer -> (stop - start, H) f32."""
        return self._text.captured(start, stop)

    def write(self, prompt: Sequence[int], count: int, layers: Iterable[int] = ()) -> tuple[list[int], Captured]:
        """The greedy continuation, at most `count` tokens, and the states of every position that was processed.

        It ends with an end token. States are layer -> (T, H) f32 with T = len(prompt) + len(continuation) - 1: the
        last token is not processed. The text that is being verified stays as it is.
        """
        text = self._new_text(self._known(layers))
        tokens = [int(text.prefill(self._checked(prompt)).argmax())][:count]
        while tokens and len(tokens) < count and tokens[-1] not in self.end_tokens:
            tokens.append(int(text.prefill(tokens[-1:]).argmax()))
        return tokens, text.captured(0, text.length)

    def margin(self, tokens: Sequence[int]) -> float:
        """How far apart the two best tokens after these are, in nats: near 0 it is a tie."""
        best, second = self._new_text(()).prefill(self._checked(tokens)).topk(2).values.tolist()
        return float(best - second)

    def _new_text(self, captures: Sequence[int]) -> TargetText:
        return TargetText(self.model, self.layers, captures)

    def _known(self, layers: Iterable[int]) -> list[int]:
        found = sorted(set(layers))
        if wrong := [layer for layer in found if not FULL <= layer < self.layer_count]:
            raise WrongInput(f"{self.name}: capture layers {wrong}: expected 0 to {self.layer_count - 1}")
        return found

    def _checked(self, tokens: Sequence[int]) -> Sequence[int]:
        if not tokens or not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise WrongInput(f"{self.name}: tokens {list(tokens)[:8]}: expected one or more below {self.vocab_size}")
        return tokens


def load_model(path: Path, dtype: str) -> Any:
    """The model in evaluation mode, every weight from its files. Raises `WrongInput` naming the folder and why."""
    if dtype not in DTYPES:
        raise WrongUsage(f"dtype: found {dtype!r}, expected {', '.join(DTYPES)}")
    if not (path / "config.json").is_file():
        raise WrongInput(f"{path}: no config.json; the torch engine needs the target's folder as published")
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told below, all of them
                output_loading_info=True,
            )
    except Exception as error:  # transformers, safetensors and their helpers raise kinds of their own
        raise WrongInput(f"{path}: transformers cannot read this target: {first_line(error)}") from error
    # transformers only logs these, and goes on with random numbers
    absent = [f"{name}: missing, or of another shape" for name in unfilled_tensors(info)]
    if absent:
        more = [f"and {len(absent) - NAMED} more"] if len(absent) > NAMED else []
        raise Problems(str(path), [*absent[:NAMED], *more])
    return check_forward(path, model.eval().requires_grad_(False))


def first_line(error: Exception) -> str:
    """An exception as part of one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[:2]).strip()


def unfilled_tensors(info: dict[str, Any]) -> list[str]:
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys", ())]
    return sorted({*info.get("missing_keys", ()), *mismatched})


def check_forward(path: Path, model: Any) -> Any:
    """Raises `WrongInput` for a model whose cache is not transformers' common one: nothing could be taken back."""
    taken = inspect.signature(model.forward).parameters
    if not {"past_key_values", "logits_to_keep"} <= set(taken):
        raise WrongInput(f"{path}: {type(model).__name__}: its cache is its own; expected one with past_key_values")
    return model


def decoder_layers(path: Path, model: Any, count: int) -> nn.ModuleList:
    """The decoder's layers, whatever the model calls them."""
    decoder = model.get_decoder()
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise WrongInput(f"{path}: {type(decoder).__name__}: found no list of its {count} layers")


def head_table(path: Path, model: Any) -> Tensor:
    """The output head's weights (vocab, H). A cap or scale of logits keeps their order; a bias would not."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        found = "no output head" if head is None else "an output head with a bias"
        raise WrongInput(f"{path}: {type(model).__name__}: found {found}, expected one without: drafters share it")
    table: Tensor = head.weight
    return table


def end_tokens(model: Any, config: Any) -> frozenset[int]:
    """Tokens that end a text: the generation config's, else the model config's."""
    for source in (getattr(model, "generation_config", None), config, model.config):
        stated = getattr(source, "eos_token_id", None)
        if stated is not None:
            return frozenset(stated if isinstance(stated, list | tuple) else [stated])
    return frozenset()


def rope_theta(config: Any) -> float | None:
    """Base of the full layers' rotary embedding; None where the target has none or several without telling."""
    stated = getattr(config, "rope_parameters", None) or {}
    theta = stated.get("full_attention", stated).get("rope_theta", getattr(config, "rope_theta", None))
    return None if theta is None else float(theta)
