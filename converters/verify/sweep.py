"""Acceptance by context length: a window or a theta that is wrong shows only beyond some length.

T-55: sliding layers run as full attention are fine up to the window and then collapse; A1-30: acceptance fell from
85 % to 8 % exactly where a runtime's feature ring ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle, islice

from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.prompts import Encoded

LONGEST = 2048  # tokens, unless the user asks for more: a large target takes minutes for them
NEW_TOKENS = 48
PROMPTS = 4  # at each length: fewer decide nothing (statistics.LEAST)
SHORTEST = 16


def context_lengths(spec: DrafterSpec, room: int) -> tuple[int, ...]:
    """Below and above the window and the trained context, as far as the target's `room` and patience reach."""
    marks = [64, 256, 1024]
    if spec.window is not None:
        marks += [spec.window.size // 2, 2 * spec.window.size, 8 * spec.window.size]
    marks += [spec.context_length * 3 // 4, spec.context_length + 256]
    most = min(room - NEW_TOKENS, LONGEST)
    fitting = sorted({mark for mark in marks if SHORTEST <= mark <= most})
    apart = [fitting[0]] if fitting else []
    for mark in fitting[1:]:
        if mark >= 1.4 * apart[-1]:  # neighbours tell the same
            apart.append(mark)
    return tuple(apart)


def lengths_to_sweep(own: Sequence[int] | None, spec: DrafterSpec, room: int) -> tuple[int, ...]:
    """The user's own lengths, else ours. Raises `WrongUsage` for one that the target was not made for."""
    if too_long := [length for length in own or () if length + NEW_TOKENS > room]:
        most = f"at most {room - NEW_TOKENS}: {NEW_TOKENS} tokens follow, and the target has {room} positions"
        raise WrongUsage(f"--contexts {too_long[0]}: expected {most}")
    return tuple(own or context_lengths(spec, room))


def contexts(prompts: Sequence[Encoded], length: int) -> tuple[Encoded, ...]:
    """`PROMPTS` contexts of exactly `length` tokens: the prompts one after the other, each time from another one on."""
    count = min(PROMPTS, len(prompts))
    starts = [n * len(prompts) // count for n in range(count)]
    found = (
        Encoded(f"{length} tokens from {prompts[start].name}", tuple(islice(_joined(prompts, start), length)))
        for start in starts
    )
    return tuple({encoded.tokens: encoded for encoded in found}.values())


def _joined(prompts: Sequence[Encoded], start: int) -> chain[int]:
    turned = cycle([*prompts[start:], *prompts[:start]])
    return chain.from_iterable(prompt.tokens for prompt in turned)
