"""Texts: prompts with the target's own greedy continuation, and the hidden states a drafter would have captured.

Greedy speculative decoding gives the target's own text whatever the drafter says, so a text is written once and every
drafter is measured on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from convert_drafter.converters.verify.in_torch.target import TorchTarget
from convert_drafter.converters.verify.prompts import Encoded


@dataclass(frozen=True)
class Text:
    """A prompt and its continuation: `tokens` (T,), `states` layer -> (T, H), the last token's are left out."""

    prompt: Encoded
    tokens: tuple[int, ...]
    limit: int  # tokens the text could have had, had no end token come
    states: Mapping[int, Tensor]

    @property
    def prompt_length(self) -> int:
        return len(self.prompt.tokens)

    @property
    def continuation(self) -> tuple[int, ...]:
        return self.tokens[self.prompt_length :]


def write_texts(
    target: TorchTarget, prompts: Sequence[Encoded], new_tokens: int, layers: Sequence[int]
) -> Iterator[Text]:
    """The target's text of each prompt, one at a time: states are large."""
    for prompt in prompts:
        continuation, states = target.write(prompt.tokens, new_tokens, layers)
        tokens = (*prompt.tokens, *continuation)
        yield Text(prompt, tokens, len(prompt.tokens) + new_tokens, states)
