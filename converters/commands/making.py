"""Commands that write a GGUF: `convert`, `quantize` and `redialect`."""

from __future__ import annotations

from typing import Any

import click

from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.commands import show, show_quantize
from convert_drafter.converters.commands.options import (
    INPUT,
    RECIPE,
    changed_option,
    encoding_options,
    json_option,
    parse_settings,
    runtime_option,
    settings_option,
)
from convert_drafter.converters.commands.output import emit_made, emit_result, errors, progress
from convert_drafter.converters.convert import ConvertJob, prepare, write_conversion
from convert_drafter.converters.quantize import QuantizeJob, prepare_quantize, write_quantization
from convert_drafter.converters.redialect import RedialectJob, prepare_redialect, write_redialection
from convert_drafter.converters.stamp import if_changed


@click.command()
@click.argument("source", type=INPUT)
@click.option("--target", type=INPUT, help="The target's Hugging Face folder or GGUF: tokenizer, depth, hidden size.")
@runtime_option
@click.option(
    "--quant", "recipe", metavar="RECIPE", type=RECIPE, required=True,
    help="How weights are stored: Q8_0, Q4_K_M ... (`list recipes`).",
)  # fmt: skip
@click.option("-o", "--out", type=INPUT, required=True, help="The GGUF to write.")
@click.option("--attach", type=INPUT, metavar="TARGET.gguf", help="Put an MTP head into its target's GGUF.")
@click.option("--dry-run", is_flag=True, help="Show the plan; read no tensor data, write nothing.")
@click.option("--strict", is_flag=True, help="Treat every warning as an error.")
@click.option("--ignore-tensor", "ignore", multiple=True, metavar="GLOB", help="Leave a source tensor out on purpose.")
@changed_option
@settings_option
@encoding_options
@json_option
def convert(dry_run: bool, only_changed: bool, as_json: bool, **options: Any) -> None:
    """Convert SOURCE, a checkpoint folder or .safetensors file, to a GGUF.

    \b
    convert-drafter convert Qwen3.6-27B-DFlash --target Qwen3.6-27B \\
        --for llama.cpp --quant Q8_0 -o dflash-Qwen3.6-27B-Q8_0.gguf
    """
    job = ConvertJob(**options)
    conversion = prepare_attach(job) if job.attach else prepare(job)
    show.warnings(errors, conversion.warnings)
    if dry_run:
        emit_result(as_json, "conversion", show.plan_json(conversion), lambda: show.plan(conversion))
        return
    with progress(conversion.job.out.name, conversion.n_bytes) as advance:
        report = if_changed(conversion, only_changed, lambda: write_conversion(conversion, advance))
    emit_made(as_json, "conversion", report, job.out, show.report_json, show.report)


@click.command()
@click.argument("source", metavar="IN.gguf", type=INPUT)
@click.argument("out", metavar="OUT.gguf", type=INPUT)
@click.argument("recipe", metavar="TYPE", type=RECIPE)
@click.option("--allow-requantize", is_flag=True, help="Take tensors that are quantized already; they lose twice.")
@click.option("--dry-run", is_flag=True, help="Show types and sizes; read no tensor data, write nothing.")
@click.option("--strict", is_flag=True, help="Treat every warning as an error.")
@changed_option
@encoding_options
@json_option
def quantize(dry_run: bool, only_changed: bool, as_json: bool, **options: Any) -> None:
    """Quantize any GGUF, of a drafter or of another model, as llama-quantize does. TYPE is a recipe.

    \b
    convert-drafter quantize dflash-BF16.gguf dflash-Q4_K_M.gguf Q4_K_M
    """
    decided = prepare_quantize(QuantizeJob(**options))
    show.warnings(errors, decided.warnings)
    if dry_run:
        plan = show_quantize.quantization_json(decided)
        emit_result(as_json, "quantization", plan, lambda: show_quantize.quantization(decided))
        return
    with progress(decided.job.out.name, decided.n_bytes) as advance:
        report = if_changed(decided, only_changed, lambda: write_quantization(decided, advance))
    data, text = show_quantize.quantized_json, show_quantize.quantized
    emit_made(as_json, "quantization", report, decided.job.out, data, text)


@click.command()
@click.argument("source", metavar="FILE", type=INPUT)
@runtime_option
@click.option("--target", type=INPUT, help="The target's Hugging Face folder or GGUF: tokenizer, depth.")
@click.option("-o", "--out", type=INPUT, required=True, help="The GGUF to write.")
@click.option("--dry-run", is_flag=True, help="Show facts and names; read no tensor data, write nothing.")
@click.option("--strict", is_flag=True, help="Treat every warning as an error.")
@click.option(
    "--set", "settings", multiple=True, metavar="FACT=VALUE", callback=parse_settings,
    help="Give or correct a fact as `inspect` names it, e.g. --set rope.theta=10000000. Recorded in the file.",
)  # fmt: skip
@json_option
def redialect(dry_run: bool, as_json: bool, **options: Any) -> None:
    """Rewrite a drafter's GGUF for another runtime; weights are copied as they are.

    \b
    convert-drafter redialect dflash-Qwen3.6-27B-Q8_0.gguf \\
        --for ik_llama.cpp -o ik-dflash-Qwen3.6-27B-Q8_0.gguf
    """
    decided = prepare_redialect(RedialectJob(**options))
    show.warnings(errors, decided.warnings)
    if dry_run:
        emit_result(as_json, "redialection", show.redialection_json(decided), lambda: show.redialection(decided))
        return
    with progress(decided.job.out.name, decided.n_bytes) as advance:
        report = write_redialection(decided, advance)
    emit_result(as_json, "redialection", show.redialected_json(report), lambda: show.redialected(report))
