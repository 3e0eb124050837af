"""From what is asked to what is done: the request is kept apart from what it resolves to (A3-20).

Nothing here raises for what a server cannot do: the server starts without drafting, and a remark says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from convert_drafter.converters.launch.abilities import can
from convert_drafter.converters.launch.modes import AUTO, DRAFTERS, MTP, NGRAM, OFF, SPEC_TYPES, ways_of
from convert_drafter.converters.verify.in_llama_cpp.probe import Abilities, Ability, Known

SMALL = 3_000_000_000  # weights of a target below which a head costs more than it brings (0.58x at 0.8B, 0.82x at 2B)
MLA = "27 tokens a second with it, 45 without"  # as unsloth measured in llama.cpp (its issue 6468)
HEAD_LENGTH = {Known.YES: 2, Known.NO: 3, Known.UNKNOWN: 2}  # a head drafts so many tokens with a GPU, without, ...

NOT_ASKED = Ability(Known.UNKNOWN)


@dataclass(frozen=True)
class Ngram:
    """ngram-mod: tokens that have to match, and the fewest and most that are drafted (llama-server's own numbers)."""

    match: int = 24
    shortest: int = 48
    longest: int = 64


@dataclass(frozen=True)
class Request:
    """What is asked. `mode` is canonical, None where nothing was said; `draft_length` None leaves it to us."""

    mode: str | None = None
    draft_length: int | None = None
    ngram: Ngram = field(default_factory=Ngram)
    extra: tuple[str, ...] = ()  # the user's own options of llama-server


@dataclass(frozen=True)
class Source:
    """What a way of drafting reads: `path` None is the target's own file. `limit` is the most it drafts, if any.

    `usual` is the length to take unless one is asked for or measured, with the reason; `n_bytes` are its tensors', of a
    file of its own; `head` tells an MTP head, which is a layer of its target, `latent` one with latent attention (MLA).
    """

    path: Path | None
    limit: int | None = None
    usual: int | None = None
    why: str = ""
    n_bytes: int = 0
    head: bool = False
    latent: bool = False


@dataclass(frozen=True)
class Measured:
    """What `verify` measured of a drafter: the best length and its speed-up, None where times were not taken."""

    best_length: int | None
    speedup: float | None


@dataclass(frozen=True)
class Situation:
    """What there is: `sources` by way of drafting, the target's weights, a GPU.

    `n_bytes` are the target's tensors', `memory` is what all GPUs have, None where that decides nothing.
    """

    sources: Mapping[str, Source] = field(default_factory=dict)
    weights: int | None = None
    gpu: Ability = NOT_ASKED
    measured: Measured | None = None
    n_bytes: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Remark:
    """Something a user should know; `code` stays the same from version to version, `warning` if it is not as asked."""

    code: str
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Resolved:
    """What is done. `ways` drafters first, none without drafting; `draft_length` only where a drafter drafts."""

    ways: tuple[str, ...] = ()
    draft_length: int | None = None
    default: bool = False  # the server's own default drafting, --spec-default
    own_types: bool = False  # the user's --spec-type decides
    remarks: tuple[Remark, ...] = ()

    @property
    def drafter(self) -> str | None:
        return next((way for way in self.ways if way in DRAFTERS), None)


def resolve(request: Request, situation: Situation, abilities: Abilities) -> Resolved:
    """Decide how to draft. What cannot be done is left out with a remark, never emitted."""
    if _own_types(request.extra):
        said = "--spec-type is your own: nothing is added to it"
        return Resolved(own_types=True, remarks=(Remark("own_spec_type", said),))
    mode = request.mode or AUTO
    if mode == OFF:
        return Resolved()
    remarks: list[Remark] = []
    ways = _auto(situation, abilities, remarks) if mode == AUTO else ways_of(mode)
    done = _chained(tuple(way for way in ways if _possible(way, situation, abilities, remarks)), abilities, remarks)
    default = mode == AUTO and not situation.sources and abilities.has("default drafting").known is Known.YES
    length = None
    if drafter := next((way for way in done if way in DRAFTERS), None):
        remarks += _room(drafter, situation, "a part of them stays on the processor")
        length = _length(drafter, request, situation, remarks)
    return Resolved(done, length, default, remarks=tuple(remarks))


def _own_types(extra: Sequence[str]) -> bool:
    return any(word.split("=")[0] == "--spec-type" for word in extra)


def _auto(situation: Situation, abilities: Abilities, remarks: list[Remark]) -> tuple[str, ...]:
    """A3-15. A drafter that is there is used, where nothing is known that makes it cost more than it brings."""
    way = next((way for way in situation.sources if way in DRAFTERS), None)
    if way is None:
        return ()
    ngram_ok = can(abilities, NGRAM).known is not Known.NO
    instead = f"{'ngram instead' if ngram_ok else 'no drafting'}; --mode {way} has it anyway"
    if dear := () if _pays(situation) else _too_dear(way, situation, instead):
        remarks += dear
        return (NGRAM,) if ngram_ok else ()
    if not situation.sources[way].head:
        return (way,)
    if situation.gpu.known is Known.UNKNOWN:
        said = f"is there a GPU? {situation.gpu.reason or 'unknown'}: taken for one; --device says it"
        remarks.append(Remark("device_unknown", said))
    return (MTP, NGRAM) if situation.gpu.known is Known.NO and ngram_ok else (MTP,)


def _too_dear(way: str, situation: Situation, instead: str) -> tuple[Remark, ...]:
    """Why a drafter is not worth its cost, unless a measurement says otherwise; none where nothing is known."""
    source = situation.sources[way]
    if source.latent:
        said = f"a head with latent attention (MLA) costs more than it brings in llama.cpp ({MLA}): {instead}"
        return (Remark("mla_head", said),)
    if source.head and situation.weights is not None and situation.weights < SMALL:
        size = f"{situation.weights / 1e9:.2g} billion weights"
        said = f"a head does not pay in a target of {size}, below {SMALL / 1e9:g}: {instead}"
        return (Remark("small_target", said),)
    return tuple(remark for remark in _room(way, situation, instead) if remark.warning)


def _room(way: str, situation: Situation, then: str) -> tuple[Remark, ...]:
    """Whether both models fit the GPUs. Their whole memory counts: what is free changes as soon as a server runs,
    and would make a server that runs look as if it had to be started again."""
    base, drafter, memory = situation.n_bytes, situation.sources[way].n_bytes, situation.memory
    if base is None or memory is None or base + drafter <= memory:
        return ()
    has = f"the GPUs have {_gigabytes(memory)} in all"
    if base > memory:
        said = f"the target takes {_gigabytes(base)}, {has}: a part of it runs on the processor; measure what drafting"
        return (Remark("partial_offload", f"{said} brings there (verify, --measured)"),)
    both = f"the target takes {_gigabytes(base)} and the drafter {_gigabytes(drafter)}"
    return (Remark("no_vram", f"{both}, {has}: {then}", True),)


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g} GB"


def _pays(situation: Situation) -> bool:
    return situation.measured is not None and (situation.measured.speedup or 0) > 1


def _possible(way: str, situation: Situation, abilities: Abilities, remarks: list[Remark]) -> bool:
    """T-30: the same questions on every path. T-34: a head that is not there stops the server."""
    if way in DRAFTERS and way not in situation.sources:
        there = ", ".join(way for way in situation.sources if way in DRAFTERS) or "none"
        code = "no_head" if way == MTP else "no_drafter"
        what = "neither the file nor the target has an MTP head" if way == MTP else f"the file is no {way} drafter"
        remarks.append(Remark(code, f"{way}: {what} (found: {there}): starting without it", True))
        return False
    found = can(abilities, way)
    if found.known is Known.NO:
        code = f"binary_no_{way.split('-')[0]}"
        remarks.append(Remark(code, f"{way}: the server cannot: {found.reason}: starting without it", True))
    elif found.known is Known.UNKNOWN:
        remarks.append(Remark("unknown_ability", f"{way}: whether the server can is unknown: {found.reason}"))
    return found.known is not Known.NO


def _chained(ways: tuple[str, ...], abilities: Abilities, remarks: list[Remark]) -> tuple[str, ...]:
    drafters = [way for way in ways if way in DRAFTERS]
    if len(drafters) > 1:
        remarks.append(Remark("one_drafter", f"one drafter at a time: {drafters[0]}, not {drafters[1]}", True))
        ways = tuple(way for way in ways if way not in drafters[1:])
    if len(ways) > 1 and abilities.chains.known is Known.NO:
        left = ", ".join(ways[1:])
        remarks.append(Remark("binary_no_chain", f"the server drafts in one way: {ways[0]}, not {left}", True))
        return ways[:1]
    return ways


def _length(way: str, request: Request, situation: Situation, remarks: list[Remark]) -> int:
    """Asked for, else measured, else the file's; never more than the drafter has (A6-8)."""
    source, measured = situation.sources[way], situation.measured
    usual, why = source.usual, source.why
    if usual is None:
        usual = HEAD_LENGTH[situation.gpu.known]
        why = f"a head's usual length {'without' if situation.gpu.known is Known.NO else 'with'} a GPU"
    wanted = request.draft_length
    if wanted is None and measured is not None and measured.best_length is not None:
        usual, why = measured.best_length, "measured as the fastest"
        if not _pays(situation):
            gain = f"{measured.speedup:.2f} times the speed" if measured.speedup else "no gain"
            remarks.append(Remark("does_not_pay", f"measured: drafting gives {gain}, at its best length too", True))
    length = usual if wanted is None else wanted
    if source.limit is not None and length > source.limit:
        remarks.append(Remark("length_cut", f"{length} tokens: the drafter gives {source.limit} at most", True))
        return source.limit
    if wanted is None:
        remarks.append(Remark("length", f"draft length {length}: {why}"))
    return length


def spec_type(ways: Sequence[str], abilities: Abilities) -> str:
    """The value of --spec-type. N-grams go first, as the server tries them first anyway."""
    ordered = [*(way for way in ways if way not in DRAFTERS), *(way for way in ways if way in DRAFTERS)]
    return ",".join(abilities.spec_type(SPEC_TYPES[way]) or SPEC_TYPES[way] for way in ordered)
