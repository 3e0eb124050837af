"""The sliding window's three spellings, every contradiction between them, and who may look ahead in a block.

A window that is lost runs well up to its size and then collapses (T-55); one that is made up does the opposite. So
where the keys contradict each other, the user decides.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from published import DELETE, small_checkpoint

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.convert import ConvertJob, prepare, read_published
from convert_drafter.converters.drafters.dflash import CAUSAL, read_causal, read_layer_types, read_window
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.spec_parts import SlidingWindow

WHERE = "drafter/config.json"
S, F = "sliding_attention", "full_attention"
LAYERS = 3
ALL, MIXED, NONE = [S, S, S], [S, S, F], [F, F, F]
SLIDES = {"all": (True, True, True), "mixed": (True, True, False)}


def dflash(**inner: Any) -> dict[str, Any]:
    return {"dflash_config": inner}


def read(config: dict[str, Any], **settings: str) -> tuple[SlidingWindow | None, ConfigReader]:
    reader = ConfigReader(config, WHERE, settings)
    return read_window(reader, read_layer_types(reader, LAYERS), LAYERS), reader


# --- what every spelling means ---

SPELLINGS = [
    pytest.param(
        {"layer_types": MIXED, "sliding_window": 2048, "use_sliding_window": True},
        SlidingWindow(2048, SLIDES["mixed"]),
        id="layer_types and use_sliding_window (z-lab)",
    ),
    pytest.param(
        {"layer_types": MIXED, "sliding_window": 2048},
        SlidingWindow(2048, SLIDES["mixed"]),
        id="layer_types alone (Laguna)",
    ),
    pytest.param(
        {"layer_types": ALL, "sliding_window": 512}, SlidingWindow(512, SLIDES["all"]), id="every layer by layer_types"
    ),
    pytest.param(dflash(use_swa=True, swa_window_size=1024), SlidingWindow(1024, SLIDES["all"]), id="use_swa (MiMo)"),
    pytest.param(
        {**dflash(use_swa=True, swa_window_size=1024), "sliding_window": 1024},
        SlidingWindow(1024, SLIDES["all"]),
        id="use_swa with both sizes (MiMo)",
    ),
    pytest.param(
        {**dflash(use_swa=True), "sliding_window": 1024},
        SlidingWindow(1024, SLIDES["all"]),
        id="use_swa, top-level size",
    ),
    pytest.param(
        {**dflash(use_swa=True, swa_window_size=1024), "layer_types": NONE},
        SlidingWindow(1024, SLIDES["all"]),
        id="use_swa beside all-full layer_types (ModelOpt)",
    ),
    pytest.param(
        {**dflash(use_swa=True, swa_window_size=1024), "layer_types": ALL, "use_sliding_window": True},
        SlidingWindow(1024, SLIDES["all"]),
        id="all three agree",
    ),
    pytest.param(
        {**dflash(swa_window_size=1024), "layer_types": MIXED},
        SlidingWindow(1024, SLIDES["mixed"]),
        id="layer_types with the nested size",
    ),
]
NO_WINDOW = [
    pytest.param({}, id="nothing said"),
    pytest.param({"sliding_window": None, "use_sliding_window": False, "layer_types": NONE}, id="T-16 z-lab without"),
    pytest.param({"sliding_window": None, "layer_types": NONE}, id="T-16 null window, all full"),
    pytest.param({"sliding_window": 1024, "layer_types": NONE}, id="T-16 a window, but all full (Gemma-4)"),
    pytest.param({"sliding_window": 1024, "use_sliding_window": True, "layer_types": NONE}, id="on, but all full"),
    pytest.param({"sliding_window": 32768, "use_sliding_window": False}, id="switched off, no layer_types (Qwen2.5)"),
    pytest.param({**dflash(use_swa=False, swa_window_size=1024)}, id="use_swa false"),
    pytest.param({**dflash(use_swa=False), "layer_types": NONE, "sliding_window": None}, id="Nemotron"),
    pytest.param({"layer_types": [], "use_sliding_window": False}, id="empty layer_types"),
    pytest.param({"layer_types": None, "sliding_window": None, "use_sliding_window": None}, id="all null"),
]


@pytest.mark.parametrize(("config", "expected"), SPELLINGS)
def test_spellings(config: dict[str, Any], expected: SlidingWindow) -> None:
    window, reader = read(config)
    assert window == expected
    assert reader.unread() == []
    assert reader.origins["window.size"].endswith(("sliding_window", "swa_window_size"))


@pytest.mark.parametrize("config", NO_WINDOW)
def test_no_window(config: dict[str, Any]) -> None:
    window, reader = read(config)
    assert window is None
    assert reader.unread() == [], "a size without sliding layers is known, and means nothing"


def test_origin_of_the_sliding_layers() -> None:
    assert read({"layer_types": ALL, "sliding_window": 8})[1].origins["window.layers"] == "layer_types"
    swa = {**dflash(use_swa=True, swa_window_size=8), "layer_types": NONE}
    assert read(swa)[1].origins["window.layers"] == "dflash_config.use_swa"


# --- what contradicts itself ---

CONTRADICTIONS = [
    pytest.param(
        {"layer_types": MIXED, "sliding_window": 2048, "use_sliding_window": False},
        ["use_sliding_window: false", "layer_types"],
        id="sliding layers switched off",
    ),
    pytest.param(
        {**dflash(use_swa=False), "layer_types": MIXED, "sliding_window": 2048},
        ["dflash_config.use_swa: false", "layer_types"],
        id="sliding layers, use_swa false",
    ),
    pytest.param(
        {**dflash(use_swa=True, swa_window_size=8), "use_sliding_window": False},
        ["use_sliding_window: false", "dflash_config.use_swa"],
        id="use_swa and the other switch off",
    ),
    pytest.param(
        {**dflash(use_swa=True, swa_window_size=8), "layer_types": MIXED},
        ["dflash_config.use_swa", "layer_types"],
        id="use_swa means every layer, layer_types only some",
    ),
    pytest.param({"layer_types": MIXED}, ["sliding_window", "missing"], id="T-16 sliding layers without a size"),
    pytest.param(
        {"layer_types": MIXED, "sliding_window": None, "use_sliding_window": True},
        ["sliding_window", "missing"],
        id="T-16 sliding layers, null size",
    ),
    pytest.param(
        dflash(use_swa=True), ["dflash_config.swa_window_size", "sliding_window", "missing"], id="use_swa, no size"
    ),
    pytest.param(
        {**dflash(use_swa=True, swa_window_size=1024), "sliding_window": 2048},
        ["dflash_config.swa_window_size = 1024", "sliding_window = 2048"],
        id="use_swa, two sizes",
    ),
    pytest.param(
        {**dflash(swa_window_size=1024), "layer_types": ALL, "sliding_window": 2048},
        ["dflash_config.swa_window_size = 1024", "sliding_window = 2048"],
        id="layer_types, two sizes",
    ),
    pytest.param({"use_sliding_window": True, "sliding_window": 8}, ["layer_types"], id="on, but which layers"),
    pytest.param({"use_sliding_window": True}, ["layer_types", "use_sliding_window"], id="on, nothing else"),
    pytest.param({"sliding_window": 8}, ["layer_types", "sliding_window"], id="a size, nothing else"),
    pytest.param(dflash(swa_window_size=8), ["layer_types", "swa_window_size"], id="the nested size, nothing else"),
]
WRONG = [
    pytest.param({"layer_types": [S, F]}, ["layer_types", "2 entries", "num_hidden_layers = 3"], id="too few types"),
    pytest.param({"layer_types": [S, F, F, F]}, ["layer_types", "4 entries"], id="too many types"),
    pytest.param({"layer_types": [S, S, "linear_attention"]}, ["layer_types", "linear_attention"], id="unknown type"),
    pytest.param({"layer_types": "sliding_attention"}, ["layer_types: found"], id="types are a string"),
    pytest.param({"layer_types": [True, True, False]}, ["layer_types[0]: found True"], id="types are flags"),
    pytest.param({"layer_types": ALL, "sliding_window": "2048"}, ["sliding_window: found '2048'"], id="size a string"),
    pytest.param({"layer_types": ALL, "sliding_window": True}, ["sliding_window: found True"], id="size a flag"),
    pytest.param({"layer_types": ALL, "sliding_window": [8] * 3}, ["sliding_window: found [8"], id="a size per layer"),
    pytest.param({"use_sliding_window": 1}, ["use_sliding_window: found 1"], id="switch a number"),
    pytest.param({"use_sliding_window": "false"}, ["use_sliding_window: found 'false'"], id="switch a string"),
    pytest.param(dflash(use_swa="yes"), ["dflash_config.use_swa: found 'yes'"], id="use_swa a string"),
]


@pytest.mark.parametrize(("config", "fragments"), [*CONTRADICTIONS, *WRONG])
def test_contradictions_are_refused(config: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(WrongInput) as caught:
        read(config)
    for fragment in (WHERE, *fragments):
        assert fragment in str(caught.value)


def test_the_user_settles() -> None:
    off = {"layer_types": MIXED, "sliding_window": 2048, "use_sliding_window": False}
    assert read(off, use_sliding_window="true")[0] == SlidingWindow(2048, SLIDES["mixed"])
    assert read(off, layer_types="null")[0] is None
    bare = {"sliding_window": 8}
    assert read(bare, use_sliding_window="false")[0] is None
    assert read(bare, layer_types='["sliding_attention", "sliding_attention", "full_attention"]')[0] == SlidingWindow(
        8, SLIDES["mixed"]
    )


@pytest.mark.parametrize("size", [0, -1])
def test_senseless_size_names_the_key_and_the_file(tmp_path: Path, size: int) -> None:
    source = small_checkpoint(tmp_path / "d", layer_types=[S, F], sliding_window=size)
    with pytest.raises(WrongInput, match=rf"config\.json: sliding_window: found {size}, expected .* above 0"):
        read_published(source)


# --- what reaches the file ---


def prepared(source: Path) -> dict[str, Any]:
    job = ConvertJob(source, None, "lucebox", "F32", source.parent / "out.gguf")
    return {kv.key.removeprefix("qwen35-dflash-draft."): kv.value for kv in prepare(job).keys}


@pytest.mark.parametrize("size", [None, 512])
@pytest.mark.parametrize("types", [[S, F], [F, F]])
def test_window_and_pattern_come_together_or_not_at_all(tmp_path: Path, types: list[str], size: int | None) -> None:
    """T-16, T-55, A1-11: the four combinations."""
    source = small_checkpoint(tmp_path / "d", layer_types=types, sliding_window=size)
    if S in types and size is None:
        with pytest.raises(WrongInput, match=r"config\.json: .*sliding_window"):
            prepared(source)
        return
    keys = prepared(source)
    expected = (
        {"attention.sliding_window": 512, "attention.sliding_window_pattern": (True, False)} if S in types else {}
    )
    assert {key: value for key, value in keys.items() if "sliding" in key} == expected


@pytest.mark.parametrize(("layers", "window"), [(5, 2048), (6, 4096)])
def test_known_patterns(tmp_path: Path, layers: int, window: int) -> None:
    """A1-19: all layers but the last slide, in both known generations."""
    types = [S] * (layers - 1) + [F]
    source = small_checkpoint(
        tmp_path / "d", num_hidden_layers=layers, layer_types=types, sliding_window=window, use_sliding_window=True
    )
    keys = prepared(source)
    assert keys["attention.sliding_window"] == window
    assert keys["attention.sliding_window_pattern"] == (True,) * (layers - 1) + (False,)


# --- causality ---


def causal(config: dict[str, Any]) -> tuple[bool, ConfigReader]:
    reader = ConfigReader(config, WHERE)
    return read_causal(reader, None), reader


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("path", ["is_causal", "dflash_config.causal", "dflash_query_causal", "draft_causal"])
def test_causality_keys(path: str, value: bool) -> None:
    assert path in CAUSAL
    *parents, key = path.split(".")
    found, reader = causal({parents[0]: {key: value}} if parents else {key: value})
    assert found is value
    assert reader.origins["causal"] == path


def test_no_key_is_dflash_s_own_way() -> None:
    found, reader = causal({"is_causal": None, "dflash_config": {"causal": None}})
    assert found is False
    assert "definition" in reader.origins["causal"]


def test_causality_keys_that_disagree_are_named() -> None:
    with pytest.raises(WrongInput, match=r"config\.json: causal: .*is_causal = False, dflash_config\.causal = True"):
        causal({"is_causal": False, "dflash_config": {"causal": True}})
    assert causal({"dflash_query_causal": False, "dflash_config": {"causal": False}})[0] is False  # Nemotron has both


@pytest.mark.parametrize("value", [1, "false", [], {"a": 1}])
def test_causality_is_true_or_false(value: Any) -> None:
    with pytest.raises(WrongInput, match=r"config\.json: is_causal: found .*, expected true or false"):
        causal({"is_causal": value})


@pytest.mark.parametrize("value", [True, False, DELETE])
def test_a_causal_drafter_is_not_written_for_a_runtime_that_cannot(tmp_path: Path, value: Any) -> None:
    source = small_checkpoint(tmp_path / "d", is_causal=value)
    if value is True:
        with pytest.raises(WrongInput, match=r"causal = True: lucebox has no key"):
            prepared(source)
    else:
        assert "attention.causal" not in prepared(source)
