"""ConfigReader: what counts as there, what may be cast, whose word counts, and what nobody read."""

from __future__ import annotations

import math
from typing import Any

import pytest
from published import DELETE, changed

from convert_drafter.converters.config import ConfigReader, leaves, lookup, override
from convert_drafter.converters.errors import WrongInput, WrongUsage

WHERE = "drafter/config.json"
HUGE = 10**400  # valid JSON, beyond every float


def reader(config: dict[str, Any], **settings: str) -> ConfigReader:
    return ConfigReader(config, WHERE, {key.replace("__", "."): value for key, value in settings.items()})


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(WrongInput) as caught:
        call(*args)
    message = str(caught.value)
    assert message.startswith(f"{WHERE}: ")
    return message


# --- what counts as there ---


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="absent"),
        pytest.param({"a": None}, id="parent null (T-11)"),
        pytest.param({"a": {}}, id="parent empty"),
        pytest.param({"a": {"b": None}}, id="null (T-10)"),
        pytest.param({"a": [1]}, id="parent a list (T-6)"),
        pytest.param({"a": 3}, id="parent a number (T-6)"),
        pytest.param({"a": "b"}, id="parent a string (T-6)"),
    ],
)
def test_missing(config: dict[str, Any]) -> None:
    assert lookup(config, "a.b") is None
    assert reader(config).find("fact", int, "a.b") is None
    assert reader(config).find_list("fact", int, "a.b") is None
    assert reader(config).section("a.b") == {}


@pytest.mark.parametrize(("value", "kind"), [(0, int), (0.0, float), (False, bool), ("", str), ([], list)])
def test_falsy_is_there(value: Any, kind: type) -> None:
    """G-6: mask token 0 is a token."""
    assert reader({"a": value}).get("fact", kind, "a") == value


def test_missing_fact_names_file_places_and_the_way_out() -> None:
    message = refusal(reader({}).get, "block_size", int, "a.block_size", "block_size")
    assert "block_size: missing (looked at a.block_size or block_size)" in message
    assert "an integer" in message
    assert "--set a.block_size=VALUE" in message


def test_null_gives_way_to_the_next_place() -> None:
    read = reader({"a": {"x": None}, "x": 8})
    assert read.get("fact", int, "a.x", "x") == 8
    assert read.origins == {"fact": "x"}


# --- several places ---


def test_first_place_is_the_origin() -> None:
    read = reader({"a": {"x": 8}, "x": 8})
    assert read.get("fact", int, "a.x", "x") == 8
    assert read.origins == {"fact": "a.x"}


def test_places_that_disagree_are_both_named() -> None:
    message = refusal(reader({"a": {"x": 8}, "x": 16}).get, "fact", int, "a.x", "x")
    assert "fact: two places disagree: a.x = 8, x = 16" in message
    assert "--set" in message


def test_places_may_agree_in_another_spelling_of_the_number() -> None:
    assert reader({"a": {"x": 8}, "x": 8.0}).get("fact", int, "a.x", "x") == 8


def test_lists_that_disagree_are_both_shown() -> None:
    message = refusal(reader({"a": [1, 2], "b": [2, 1]}).find_list, "fact", int, "a", "b")
    assert "a = [1, 2], b = [2, 1]" in message


def test_a_wrong_type_in_a_second_place_is_an_error_too() -> None:
    assert "x: found '8'" in refusal(reader({"a": {"x": 8}, "x": "8"}).get, "fact", int, "a.x", "x")


# --- casts ---


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [(500000, float, 500000.0), (16.0, int, 16), (-3, int, -3), (1e-6, float, 1e-6), (True, bool, True)],
)
def test_casts(value: Any, kind: type, expected: Any) -> None:
    """A1-2: theta is a float even where the JSON holds an integer."""
    found = reader({"a": value}).get("fact", kind, "a")
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize(
    ("kind", "expected", "values"),
    [
        (int, "an integer", ["16", [16], True, {"a": 1}, 16.5, math.nan, math.inf, -math.inf, HUGE]),
        (float, "a finite number", ["1e6", [1e6], False, {"a": 1}, math.nan, math.inf, -math.inf, HUGE]),
        (bool, "true or false", [0, 1, "true", [], {}]),
        (str, "a string", [1, True, ["a"], {}]),
        (list, "an array", [1, "[1]", {"0": 1}, True]),
    ],
)
def test_wrong_types_name_the_key_and_what_was_found(kind: type, expected: str, values: list[Any]) -> None:
    """T-22, T-9"""
    for value in values:
        message = refusal(reader({"a": {"x": value}}).get, "fact", kind, "a.x")
        assert f"a.x: found {value!r}, expected {expected}" in message


@pytest.mark.parametrize("item", ["1", None, True, 1.5, math.nan, HUGE, [1]])
def test_wrong_items_name_their_position(item: Any) -> None:
    assert "ids[1]: found" in refusal(reader({"ids": [3, item]}).find_list, "fact", int, "ids")


def test_list_of_whole_floats() -> None:
    assert reader({"ids": [1.0, 3]}).find_list("fact", int, "ids") == (1, 3)


# --- assumptions ---


@pytest.mark.parametrize("config", [{}, {"act": None}, {"act": "silu"}])
def test_expected_value_may_be_absent(config: dict[str, Any]) -> None:
    read = reader(config)
    read.expect("act", "silu", "it is SwiGLU")
    assert read.unread() == []


def test_other_value_than_expected_says_what_it_means() -> None:
    message = refusal(reader({"act": "gelu"}).expect, "act", "silu", "it is SwiGLU")
    assert "act: found 'gelu', expected 'silu'; it is SwiGLU" in message


# --- the user's own facts ---


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("1e7", 1e7),
        ("[1, 2]", [1, 2]),
        ("null", None),
        ("true", True),
        ('"8"', "8"),
        ("gelu", "gelu"),
        ("", ""),
    ],
)
def test_set_takes_json_and_bare_words(text: str, value: Any) -> None:
    assert override({"a": 1}, {"a": text, "b.c": text}) == {"a": value, "b": {"c": value}}


def test_set_makes_parents_and_keeps_siblings() -> None:
    config = {"a": {"x": 1}, "b": None, "c": "text"}
    assert override(config, {"a.y": "2", "b.z": "3", "c.d.e": "4"}) == {
        "a": {"x": 1, "y": 2},
        "b": {"z": 3},
        "c": {"d": {"e": 4}},
    }
    assert config == {"a": {"x": 1}, "b": None, "c": "text"}, "the published config is never changed"


@pytest.mark.parametrize("path", ["", "a.", "a.b."])
def test_set_without_a_key_is_wrong_usage(path: str) -> None:
    with pytest.raises(WrongUsage, match=r"--set .*expected KEY=VALUE"):
        ConfigReader({}, WHERE, {path: "1"})


def test_set_supplies_and_settles() -> None:
    assert reader({}, block_size="8").get("block_size", int, "d.block_size", "block_size") == 8
    two = {"d": {"block_size": 8}, "block_size": 16}
    for settings in ({"block_size": "8"}, {"block_size": "null"}, {"d__block_size": "8", "block_size": "8"}):
        assert reader(two, **settings).get("block_size", int, "d.block_size", "block_size") == 8


def test_set_is_checked_like_a_config() -> None:
    assert "block_size: found 'eight'" in refusal(reader({}, block_size="eight").get, "fact", int, "block_size")
    assert "block_size: found nan" in refusal(reader({}, block_size="NaN").get, "fact", int, "block_size")


def test_set_is_the_origin() -> None:
    read = reader({"b": 1}, a__x="8")
    read.get("first", int, "a.x")
    read.get("second", int, "b")
    assert read.origins == {"first": "--set a.x", "second": "b"}


# --- what nobody read ---


def test_leaves_are_values_not_nulls_and_not_objects() -> None:
    config = {"a": {"b": {"c": 1, "d": None}, "e": [{"f": 1}]}, "g": None, "h": {}, "i": False}
    assert list(leaves(config)) == ["a.b.c", "a.e", "i"]


def test_unread_keys_are_listed() -> None:
    config = {"a": 1, "b": {"x": 1, "y": 2}, "c": {"z": {"w": 3}}, "cc": 4, "null": None}
    read = reader(config)
    assert read.unread() == ["a", "b.x", "b.y", "c.z.w", "cc"]
    read.find("fact", int, "a", "elsewhere")
    read.expect("b.x", 1, "")
    read.ignore("c")
    assert read.unread() == ["b.y", "cc"]


def test_places_that_were_looked_at_and_lost_count_as_read() -> None:
    read = reader({"a": 8, "b": 8})
    read.get("fact", int, "a", "b")
    assert read.unread() == []


def test_set_of_a_key_nobody_reads_is_noticed() -> None:
    read = reader({"block_size": 8}, blok_size="16")
    read.get("fact", int, "block_size")
    assert read.unread() == ["blok_size"]


def test_warnings_name_the_file() -> None:
    read = reader({})
    read.warn("doubtful")
    assert read.warnings == [f"{WHERE}: doubtful"]


def test_section_is_an_object_or_empty() -> None:
    """T-6"""
    for value in (None, [], 3, "x", True):
        assert reader({"rope_parameters": value}).section("rope_parameters") == {}
    assert reader({"a": {"b": {"c": 1}}}).section("a.b") == {"c": 1}


def test_helper_deletes() -> None:
    assert changed({"a": {"b": 1, "c": 2}}, {"a.b": DELETE}) == {"a": {"c": 2}}
