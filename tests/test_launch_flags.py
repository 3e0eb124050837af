"""From a request to options: the matrix of modes, flavours and lengths (A3-10 .. A3-21, T-26 .. T-30)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_helps import HELPS, abilities

from convert_drafter.converters.launch.abilities import unprobed
from convert_drafter.converters.launch.flags import command
from convert_drafter.converters.launch.modes import DRAFTERS, NGRAMS, canonical
from convert_drafter.converters.launch.resolve import (
    Measured,
    Ngram,
    Request,
    Resolved,
    Situation,
    Source,
    resolve,
)
from convert_drafter.converters.verify.in_llama_cpp.probe import Abilities, Ability, Known

GPU, CPU = Ability(Known.YES), Ability(Known.NO)
LARGE, LITTLE = 4_000_000_000, 800_000_000
HEAD = {"mtp": Source(None, head=True)}
BLOCK = {"dflash": Source(Path("d.gguf"), 7, 7, "a block of 8")}
MTP_TARGET = Situation(HEAD, LARGE, GPU)
PAIRS = (
    ("--spec-draft-n-min", "--spec-draft-n-max"),
    ("--draft-min", "--draft-max"),
    ("--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max"),
)


def options(
    mode: object, server: str = "current", situation: Situation = MTP_TARGET, length: int | None = None, **more: object
) -> list[str]:
    """The options after the target's."""
    return decided(mode, abilities(server), situation, length, **more)[1][2:]


def decided(
    mode: object, known: Abilities, situation: Situation = MTP_TARGET, length: int | None = None, **more: object
) -> tuple[Resolved, list[str]]:
    request = Request(canonical(mode), length, **more)  # type: ignore[arg-type]
    found = resolve(request, situation, known)
    line = command("T.gguf", None, request, found, known)
    return found, [*line.words, *request.extra]


def codes(found: Resolved) -> set[str]:
    return {remark.code for remark in found.remarks}


def values(words: Sequence[str], *flags: str) -> list[str | None]:
    return [words[words.index(flag) + 1] if flag in words else None for flag in flags]


# --- n-grams ---

OWN_NAMES = ["--spec-ngram-mod-n-match", "--spec-ngram-mod-n-min", "--spec-ngram-mod-n-max"]


def test_ngram_in_names_of_its_own() -> None:
    """A3-10: the same alone and beside a head."""
    alone = options("ngram")
    assert alone == ["--spec-type", "ngram-mod", *sum(zip(OWN_NAMES, ("24", "48", "64"), strict=True), ())]
    assert options("mtp+ngram")[-6:] == alone[-6:]


def test_ngram_alone_in_the_legacy_names() -> None:
    """A3-11."""
    words = options("ngram", "legacy")
    assert words[2:] == ["--spec-ngram-size-n", "24", "--draft-min", "48", "--draft-max", "64"]


def test_ngram_beside_a_head_in_the_legacy_names() -> None:
    """A3-12, A3-14, T-26: the head's own length once, and no minimum that would be above it."""
    words = options("mtp+ngram", "legacy")
    assert words == [
        *("--spec-type", "ngram-mod,mtp", "--draft-max", "2", "--draft-p-min", "0.0", "--spec-ngram-size-n", "24"),
    ]
    assert words.count("--draft-max") == 1 and "--draft-min" not in words


@pytest.mark.parametrize("server", ["neither", "current without ngram-mod"])
def test_no_ngram_option_for_a_server_without(server: str) -> None:
    """A3-13."""
    assert options("ngram", server) == []


def test_numbers_of_one_s_own_pass_through() -> None:
    """A3-13."""
    assert values(options("ngram", ngram=Ngram(16, 24, 32)), *OWN_NAMES) == ["16", "24", "32"]


# --- the matrix ---

ALL, NO_NGRAM = "current", "current without ngram-mod"
CHAIN = "ngram-mod,draft-mtp"
MATRIX = [
    ("auto", HEAD, LARGE, ALL, ("draft-mtp", "2"), (CHAIN, "3")),
    ("auto", HEAD, LITTLE, ALL, ("ngram-mod", None), ("ngram-mod", None)),
    ("auto", HEAD, 2_000_000_000, ALL, ("ngram-mod", None), ("ngram-mod", None)),
    ("auto", HEAD, LITTLE, NO_NGRAM, (None, None), (None, None)),
    ("auto", {}, LARGE, ALL, (None, None), (None, None)),
    ("mtp", HEAD, LARGE, ALL, ("draft-mtp", "2"), ("draft-mtp", "3")),
    ("mtp", HEAD, LITTLE, ALL, ("draft-mtp", "2"), ("draft-mtp", "3")),
    ("ngram", HEAD, LARGE, ALL, ("ngram-mod", None), ("ngram-mod", None)),
    ("ngram", {}, LARGE, ALL, ("ngram-mod", None), ("ngram-mod", None)),
    ("mtp+ngram", HEAD, LARGE, ALL, (CHAIN, "2"), (CHAIN, "3")),
    ("off", HEAD, LARGE, ALL, (None, None), (None, None)),
    ("ngram-simple", HEAD, LARGE, ALL, ("ngram-simple", None), ("ngram-simple", None)),
]


@pytest.mark.parametrize("device", ["GPU", "CPU"])
@pytest.mark.parametrize("row", MATRIX, ids=lambda row: f"A3-15 {row[0]} {row[1] and 'head'} {row[2]:.0e} {row[3]}")
def test_the_matrix(
    row: tuple[str, dict[str, Source], int, str, tuple[str, str], tuple[str, str]], device: str
) -> None:
    mode, sources, weights, server, on_gpu, on_cpu = row
    situation = Situation(sources, weights, GPU if device == "GPU" else CPU)
    words = options(mode, server, situation)
    assert values(words, "--spec-type", "--spec-draft-n-max") == list(on_gpu if device == "GPU" else on_cpu)
    assert ("--spec-default" in words) is (mode == "auto" and not sources)


def test_no_knobs_and_no_default_where_there_is_none() -> None:
    """A3-15."""
    assert options("ngram-simple") == ["--spec-type", "ngram-simple"]
    assert options("auto", "without --spec-default", Situation()) == []


@pytest.mark.parametrize("mode", ["auto", None, "mtp", "mtp+ngram"])
def test_a_length_asked_for_goes_before_the_usual_one(mode: str | None) -> None:
    """A3-16."""
    assert values(options(mode, length=5), "--spec-draft-n-max") == ["5"]


@pytest.mark.parametrize("server", ["current without MTP", "legacy, no type", "neither"])
def test_mtp_on_a_server_without(server: str) -> None:
    """A3-17, T-30: it starts without drafting, and what was asked is remembered."""
    request = Request("mtp")
    found = resolve(request, MTP_TARGET, abilities(server))
    assert (found.ways, found.draft_length) == ((), None) and request.mode == "mtp"
    assert codes(found) == {"binary_no_mtp"} and all(remark.warning for remark in found.remarks)
    assert options("mtp", server) == []


@pytest.mark.parametrize("mode", ["auto", *DRAFTERS, *NGRAMS, "mtp+ngram", "dflash+ngram-map-k"])
@pytest.mark.parametrize("server", ["neither", "legacy, no type"])
def test_every_path_asks_what_the_server_can(mode: str, server: str) -> None:
    """A3-18, T-30: asked for or chosen, what it cannot do is not emitted, and is told where it was asked for."""
    sources = {way: Source(None, 7, 7) for way in DRAFTERS}
    found, words = decided(mode, abilities(server), Situation(sources, LARGE, GPU))
    assert words == ["-m", "T.gguf"] and not found.ways
    assert any(code.startswith("binary_no_") for code in codes(found))


def test_part_of_a_chain_that_the_server_can() -> None:
    assert values(options("mtp+ngram", NO_NGRAM), "--spec-type") == ["draft-mtp"]
    found, words = decided("ngram+ngram-simple", abilities("legacy, one type"))
    assert values(words, "--spec-type") == ["ngram-mod"] and "binary_no_chain" in codes(found)


@pytest.mark.parametrize("extra", [("--spec-type", "none"), ("--spec-type=draft-mtp",)])
def test_a_spec_type_of_one_s_own(extra: tuple[str, ...]) -> None:
    """A3-19."""
    found, words = decided("mtp+ngram", abilities("current"), extra=extra)
    assert words == ["-m", "T.gguf", *extra] and found.own_types and not found.ways


@pytest.mark.parametrize("mode", ["auto", "mtp", "ngram", "off", "mtp+ngram"])
@pytest.mark.parametrize("server", HELPS)
def test_what_is_asked_is_kept_apart(mode: str, server: str) -> None:
    """A3-20: asking again what was asked gives the same, whatever it resolved to."""
    request = Request(canonical(mode), 4)
    first = resolve(request, MTP_TARGET, abilities(server))
    assert request == Request(mode, 4)
    assert resolve(Request(canonical(request.mode), 4), MTP_TARGET, abilities(server)) == first


def test_a_head_that_is_not_there_is_not_asked_for() -> None:
    """T-34: the server would stop at it."""
    found, words = decided("mtp", abilities("current"), Situation(BLOCK, LARGE, GPU))
    assert codes(found) == {"no_head"} and words == ["-m", "T.gguf"]
    found, words = decided("dflash", abilities("current"), MTP_TARGET)
    assert codes(found) == {"no_drafter"} and words == ["-m", "T.gguf"]


def test_an_unknown_ability_is_tried_and_told() -> None:
    """T-33."""
    found, words = decided("mtp+ngram", unprobed("nobody knows"))
    assert values(words, "--spec-type", "--spec-draft-n-max") == [CHAIN, "2"]
    assert "unknown_ability" in codes(found) and not any(remark.warning for remark in found.remarks)


def test_an_unknown_device_is_told() -> None:
    found = resolve(Request(), Situation(HEAD, LARGE), abilities("current"))
    assert found.draft_length == 2 and "device_unknown" in codes(found)


# --- what does not pay (D3) ---

GB = 10**9


def crowded(base: int, drafter: int, memory: int | None, **more: Any) -> Situation:
    """A DFlash drafter and a target of so many bytes, and GPUs with so many."""
    return Situation({"dflash": Source(Path("d.gguf"), 7, 7, n_bytes=drafter)}, LARGE, GPU, None, base, memory, **more)


@pytest.mark.parametrize(
    ("situation", "ways", "code"),
    [
        pytest.param(crowded(15 * GB, GB, 16 * GB), ("dflash",), None, id="both fit"),
        pytest.param(crowded(15 * GB, GB, None), ("dflash",), None, id="nobody knows"),
        pytest.param(crowded(15 * GB, 2 * GB, 16 * GB), ("ngram",), "no_vram", id="D3 drafter_no_vram"),
        pytest.param(crowded(17 * GB, GB, 16 * GB), ("dflash",), "partial_offload", id="D3 mtp_partial_offload"),
    ],
)
def test_memory_of_the_gpus(situation: Situation, ways: tuple[str, ...], code: str | None) -> None:
    """A drafter that drives its target from the GPU costs more than it brings; asked for by name it is used."""
    found = resolve(Request(), situation, abilities("current"))
    assert found.ways == ways and (code is None or code in codes(found))
    forced = resolve(Request("dflash"), situation, abilities("current"))
    assert forced.ways == ("dflash",) and codes(forced) - {"length"} == ({code} if code else set())
    assert [remark.warning for remark in forced.remarks if remark.code == "no_vram"] == [True] * (code == "no_vram")


def test_memory_and_a_measurement() -> None:
    """What was measured to pay on this machine is used."""
    paying = replace(crowded(15 * GB, 2 * GB, 16 * GB), measured=Measured(4, 1.3))
    assert resolve(Request(), paying, abilities("current")).ways == ("dflash",)


@pytest.mark.parametrize("server", [ALL, NO_NGRAM])
def test_a_head_with_latent_attention(server: str) -> None:
    """D3 mla_mtp_disabled: not by itself, but where it is asked for or was measured to pay."""
    situation = Situation({"mtp": Source(None, head=True, latent=True)}, LARGE, GPU)
    found = resolve(Request(), situation, abilities(server))
    assert found.ways == (("ngram",) if server == ALL else ()) and codes(found) == {"mla_head"}
    assert "--mode mtp has it anyway" in found.remarks[0].text
    assert resolve(Request("mtp"), situation, abilities(server)).ways == ("mtp",)
    paying = replace(situation, measured=Measured(2, 1.1))
    assert resolve(Request(), paying, abilities(server)).ways == ("mtp",)


# --- lengths ---


@pytest.mark.parametrize(
    ("asked", "measured", "length", "code"),
    [
        pytest.param(None, None, 7, "length", id="A6-8 the block without its anchor"),
        pytest.param(4, None, 4, None, id="A3-16 asked for"),
        pytest.param(99, None, 7, "length_cut", id="A6-8 cut"),
        pytest.param(None, Measured(5, 1.4), 5, "length", id="measured"),
        pytest.param(None, Measured(9, 1.4), 7, "length_cut", id="measured of a longer block"),
        pytest.param(3, Measured(5, 1.4), 3, None, id="asked for beats measured"),
        pytest.param(None, Measured(2, 0.9), 2, "does_not_pay", id="measured, and it does not pay"),
        pytest.param(None, Measured(None, None), 7, "length", id="nothing measured"),
    ],
)
def test_the_length_of_a_block(asked: int | None, measured: Measured | None, length: int, code: str | None) -> None:
    found, words = decided(None, abilities("current"), Situation(BLOCK, LARGE, GPU, measured), asked)
    assert found.draft_length == length and values(words, "--spec-draft-n-max") == [str(length)]
    assert code in codes(found) if code else not codes(found)


def test_a_small_target_s_head_that_was_measured_to_pay() -> None:
    """A3-28: the rule of thumb gives way to a measurement."""
    paying, not_paying = (Situation(HEAD, LITTLE, GPU, Measured(3, gain)) for gain in (1.2, 0.8))
    assert values(options(None, situation=paying), "--spec-type", "--spec-draft-n-max") == ["draft-mtp", "3"]
    assert values(options(None, situation=not_paying), "--spec-type") == ["ngram-mod"]


# --- for all ---

MODE_WORDS = st.lists(st.sampled_from([*DRAFTERS, *NGRAMS]), min_size=1, max_size=4, unique=True).map("+".join)
SOURCES = st.fixed_dictionaries(
    {}, optional={way: st.builds(Source, st.none(), st.none() | st.integers(1, 64), st.just(5)) for way in DRAFTERS}
)
EXTRA = st.lists(
    st.sampled_from(
        [
            ("--spec-draft-n-max", "3"),
            ("--draft-max", "3"),
            ("--draft-n", "3"),
            ("--spec-ngram-mod-n-max", "9"),
            ("--draft-p-min", "0.5"),
            ("-md", "x.gguf"),
            ("--model", "y.gguf"),
            ("--ctx-size", "512"),
        ]
    ),
    max_size=2,
    unique=True,
)


@given(
    mode=st.none() | st.sampled_from(["auto", "off"]) | MODE_WORDS,
    server=st.sampled_from([*HELPS, "unprobed"]),
    sources=SOURCES,
    weights=st.none() | st.integers(0, 10**11),
    gpu=st.sampled_from(Known),
    length=st.none() | st.integers(1, 200),
    shortest=st.integers(1, 100),
    more=st.integers(0, 100),
)
def test_no_option_twice_and_no_minimum_above_its_maximum(
    mode: str | None,
    server: str,
    sources: dict[str, Source],
    weights: int | None,
    gpu: Known,
    length: int | None,
    shortest: int,
    more: int,
) -> None:
    """T-26, T-29: for every mode, flavour and length; a minimum never comes without its maximum."""
    known = unprobed() if server == "unprobed" else abilities(server)
    ngram = Ngram(24, shortest, shortest + more)
    found, words = decided(mode, known, Situation(sources, weights, Ability(gpu)), length, ngram=ngram)
    flags = [word for word in words if word.startswith("-")]
    options = [frozenset(known.aliases(flag)) for flag in flags]
    assert len(set(options)) == len(options)
    for least, most in PAIRS:
        low, high = values(words, least, most)
        assert low is None or (high is not None and int(low) <= int(high))
    assert ("--spec-type" in words) is bool(found.ways)
    assert (found.draft_length is not None) is (found.drafter is not None)


@given(mode=MODE_WORDS, server=st.sampled_from([*HELPS, "unprobed"]), extra=EXTRA)
def test_one_s_own_options_go_before_ours(mode: str, server: str, extra: list[tuple[str, str]]) -> None:
    """T-29: the last one wins in a server, so there is only one, whichever spelling the user took."""
    known = unprobed() if server == "unprobed" else abilities(server)
    own = tuple(word for pair in extra for word in pair)
    sources = {way: Source(None, 7, 7) for way in DRAFTERS}
    _, words = decided(mode, known, Situation(sources, LARGE, GPU), extra=own)
    ours = words[: len(words) - len(own)]
    for flag, _ in extra:
        assert not known.aliases(flag) & set(ours)
    if "--draft-min" in ours:
        assert "--draft-max" in ours
