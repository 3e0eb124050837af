"""Every published config is read or refused in words, and the page says what becomes of each."""

from __future__ import annotations

import config_table
import pytest
from published import CONFIGS


@pytest.fixture(scope="module")
def table() -> str:
    return config_table.table()


def test_the_page_says_what_becomes_of_each(table: str) -> None:
    assert config_table.MARK + table in config_table.PAGE.read_text()


def test_every_config_has_a_row_and_no_row_a_traceback(table: str) -> None:
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]]
    assert {name.replace("/", "__") for name in names} == {path.stem for path in CONFIGS.glob("*.json")}
    for line in table.splitlines()[2:]:
        *_, what = line.removesuffix(" |").split(" | ")
        assert what.startswith("converts for") or ": " in what, line
        assert "Traceback" not in line and "Error" not in line
