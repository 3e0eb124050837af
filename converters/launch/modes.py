"""Modes: how drafting is asked for, whatever the spelling. One canonical name for each way and for each chain of ways.

Spellings are those of llama-server's --spec-type in all its versions, and what front ends call it.
"""

from __future__ import annotations

import re

AUTO, OFF, NGRAM, MTP = "auto", "off", "ngram", "mtp"
DRAFTERS = (MTP, "dflash", "dspark", "eagle3")  # they need a model; the n-gram ways need none
NGRAMS = (NGRAM, "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-cache")
WAYS = (*DRAFTERS, *NGRAMS)
MODES = (AUTO, OFF, *WAYS)
SPELLINGS = {
    "default": AUTO,
    "ngram-mod": NGRAM,
    **{f"draft-{way}": way for way in DRAFTERS},
    # every way to say no has to mean no: taken for the default, it turns drafting on (T-31)
    **dict.fromkeys(("none", "disable", "disabled", "false", "no", "0"), OFF),
}
# llama-server's name for a way; drafters have a prefix, ngram is its ngram-mod
SPEC_TYPES = {**{way: f"draft-{way}" for way in DRAFTERS}, **{way: way for way in NGRAMS}, NGRAM: "ngram-mod"}


def canonical(value: object) -> str | None:
    """The canonical mode: "mtp", "mtp+ngram" ... None for nothing said, which is auto further on.

    A word nobody knows is auto too (`unknown` tells it apart), and False is off; other values that are no text
    say nothing.
    """
    if value is False:
        return OFF
    words = _words(value)
    if not words:
        return None
    ways = {SPELLINGS.get(word, word) for word in words}
    if ways == {OFF}:
        return OFF
    if AUTO in ways or not ways <= {*WAYS, OFF}:
        return AUTO
    return "+".join(way for way in WAYS if way in ways)


def unknown(value: object) -> tuple[str, ...]:
    """Words of a request that name no mode."""
    return tuple(word for word in _words(value) if SPELLINGS.get(word, word) not in MODES)


def ways_of(mode: str) -> tuple[str, ...]:
    """The ways of a canonical mode, drafters first; none of `auto` and `off`."""
    return tuple(way for way in mode.split("+") if way in WAYS)


def _words(value: object) -> list[str]:
    return [word for word in re.split(r"[,+\s]+", value.lower()) if word] if isinstance(value, str) else []
