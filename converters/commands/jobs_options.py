"""Options as jobs.toml spells them: the long names of a command's own, with TOML's types for their values.

Names, choices and bounds come from the command itself, so that a job is read as its command line would be.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from convert_drafter.converters.commands.options import RECIPE
from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.recipes import expected_recipe
from convert_drafter.converters.repository import repository_of

# what belongs to a terminal, or is never right unattended: a batch always skips what is up to date
NOT_IN_JOBS = ("dry_run", "only_changed", "as_json", "repair", "help")
RENAMED = {"quantize": {"recipe": "quant"}}  # a positional argument gets the name that `convert` has for it
FETCHED = ("source", "target", "targets", "file", "attach", "importance")  # where a repository may stand
LISTS_OF_NUMBERS = ("contexts",)


class BadValue(Exception):
    """A value that its key cannot have; the text says what was found and what was expected."""


def keys(command: click.Command) -> dict[str, click.Parameter]:
    """Every key a job of this command may have."""
    renamed = RENAMED.get(command.name or "", {})
    params = (param for param in command.params if param.name not in NOT_IN_JOBS)
    return {renamed.get(param.name or "", _key(param)): param for param in params}


def _key(param: click.Parameter) -> str:
    names = [name.removeprefix("--") for name in param.opts if name.startswith("--")]
    return names[0] if names else str(param.name)


def unknown(key: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(key, known, 1)
    hint = f"; did you mean {close[0]}?" if close else f", expected one of {', '.join(known)}"
    return f"{key}: found a key that nobody reads{hint}"


def read_value(param: click.Parameter, value: Any, folder: Path) -> Any:
    """A value as the command would get it; paths count from `folder`. Raises `BadValue`."""
    context = click.Context(click.Command(None))
    words = _words(param, value)
    try:
        found = [param.type.convert(word, param, context) for word in words]
        found = [_placed(param, value, folder) if isinstance(value, Path) else value for value in found]
        single = not (isinstance(param, click.Option) and param.multiple)
        whole: Any = found[0] if single else tuple(found)
        return param.callback(context, param, whole) if param.callback else whole
    except (click.UsageError, WrongUsage) as error:
        raise BadValue(f"found {_shown(value)}, {_expected(param, value, error)}") from error


def _placed(param: click.Parameter, value: Path, folder: Path) -> Path:
    """A path from the jobs' folder; a repository on the hub is the same from everywhere."""
    place = folder / value
    asked = param.name in FETCHED and not os.path.lexists(place)
    return value if asked and repository_of(value) is not None else place


def _words(param: click.Parameter, value: Any) -> list[Any]:
    """The values as the command line would have them, each checked for TOML's type."""
    for fits, wanted, words in FORMS:
        if fits(param):
            found = words(value)
            if found is None:
                raise BadValue(f"found {_shown(value)}, expected {wanted}")
            return found
    return [value] if isinstance(value, str) else _refuse(value, "a text")


def _refuse(value: Any, wanted: str) -> list[Any]:
    raise BadValue(f"found {_shown(value)}, expected {wanted}")


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _expected(param: click.Parameter, value: Any, error: Exception) -> str:
    if param.type is RECIPE:  # thirty and more names would bury the other problems
        return f"{expected_recipe(str(value))} (`list recipes` has all)"
    if isinstance(param.type, click.Choice):
        return f"expected one of {', '.join(map(str, param.type.choices))}"
    message = error.message if isinstance(error, click.ClickException) else str(error)
    return f"but {message[0].lower()}{message[1:]}".rstrip(".")


def _is_flag(param: click.Parameter) -> bool:
    return isinstance(param, click.Option) and bool(param.is_flag)


def _is_pairs(param: click.Parameter) -> bool:
    return param.metavar is not None and "=" in param.metavar


def _pairs(value: Any) -> list[str] | None:
    """A table as KEY=VALUE, tables in it as dotted keys; what is no text, as JSON."""
    return [f"{key}={text}" for key, text in _flat(value)] if isinstance(value, dict) else None


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, str) else json.dumps(value, default=str)


def _texts(value: Any) -> list[str] | None:
    many = [value] if isinstance(value, str) else value
    return many if isinstance(many, list) and all(isinstance(one, str) for one in many) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _counts(value: Any) -> list[str] | None:
    fits = isinstance(value, list) and value and all(map(_is_whole, value))
    return [",".join(map(str, value))] if fits else None


FORMS: tuple[tuple[Callable[[Any], bool], str, Callable[[Any], list[Any] | None]], ...] = (
    (_is_flag, "true or false", lambda value: [value] if isinstance(value, bool) else None),
    (_is_pairs, "a table of names and values", _pairs),
    (lambda param: param.name in LISTS_OF_NUMBERS, "a list of whole numbers, e.g. [64, 1024]", _counts),
    (lambda param: isinstance(param, click.Option) and param.multiple, "a text or a list of texts", _texts),
    (lambda param: isinstance(param.type, click.IntRange), "a whole number",
     lambda value: [value] if _is_whole(value) else None),
    (lambda param: isinstance(param.type, click.FloatRange), "a number",
     lambda value: [value] if _is_whole(value) or isinstance(value, float) else None),
)  # fmt: skip
