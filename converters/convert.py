"""Convert: a published checkpoint in, a GGUF out. A job goes in, a report comes out; nothing is printed here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert_drafter.converters import provenance
from convert_drafter.converters.checkpoint import (
    Checkpoint,
    open_checkpoint,
    read_rows,
    row_ranges,
)
from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.destination import refuse_overwriting, sources_of
from convert_drafter.converters.dialects import Cell, doubts, find_cell, objections, write
from convert_drafter.converters.drafters import Kind, detect, needed
from convert_drafter.converters.encoding import SLAB_WEIGHTS, Encoder, Tally, cores
from convert_drafter.converters.errors import BadFact, Problems, WrongInput, WrongUsage
from convert_drafter.converters.experts import stack_experts
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import fetch_tensors, fetch_whole
from convert_drafter.converters.importance import Importance, read_importance, without_entry
from convert_drafter.converters.launch.line import launch_line
from convert_drafter.converters.ops import Array
from convert_drafter.converters.plan import Dropped, Matcher, Plan, PlannedTensor, match_tensors, plan_tensors
from convert_drafter.converters.quantized import expand
from convert_drafter.converters.recipes import RECIPES, Recipe, no_recipe
from convert_drafter.converters.repository import name_of
from convert_drafter.converters.roles import role_name
from convert_drafter.converters.shared_cache import cache_doubts, cache_misfits
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import Target, read_target, target_tokenizer
from convert_drafter.converters.token_ids import ids_of_checkpoint
from convert_drafter.converters.tokenizer import Tokenizer
from convert_drafter.converters.type_choice import TypeOptions
from convert_drafter.quant import I64, TYPES
from convert_drafter.quant.base import Bytes, F32Array, Run
from convert_drafter.quant.measure import Errors

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION in ggml.h


@dataclass(frozen=True)
class ConvertJob:
    """What to convert. `settings` are the user's own config values (dotted path -> JSON text).

    `options` are wishes beside the recipe, `importance` is an importance matrix of the drafter's columns. `threads` is
    the number of cores used (all of them without it); `measure` asks for each tensor's error. `attach` is the target's
    GGUF that an MTP head goes into.
    """

    source: Path
    target: Path | None
    runtime: str
    recipe: str
    out: Path
    strict: bool = False
    ignore: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    importance: Path | None = None
    options: TypeOptions = field(default_factory=TypeOptions)
    threads: int | None = None
    measure: bool = False
    attach: Path | None = None


@dataclass(frozen=True)
class Published:
    """A checkpoint understood: its kind, its facts, and where each of them came from."""

    checkpoint: Checkpoint
    kind: Kind
    reader: ConfigReader
    spec: DrafterSpec
    target: Target | None
    target_path: Path | None  # the checkpoint itself where the drafter lies in its target's
    ignore: Sequence[str] = ()  # glob patterns of tensors to leave out

    def match(self) -> Matcher:
        """Every tensor's place, with what does not fit."""
        rules, dropped = self.kind.rules(self.reader), self.kind.dropped(self.reader)
        tensors = {
            **self.kind.arranged(self.checkpoint.tensors, self.spec),
            **self.kind.implied(self.spec, self.checkpoint.config_path),
        }
        matcher = match_tensors(self.spec, rules, dropped, tensors, self.ignore)
        matcher.dropped += [Dropped(name, reason) for name, reason in self.checkpoint.left_out.items()]
        return matcher


@dataclass(frozen=True)
class Conversion:
    """Everything decided, nothing written. `base` is the target's file that the drafter is attached to."""

    job: ConvertJob
    published: Published
    cell: Cell
    plan: Plan
    importance: Importance | None
    keys: tuple[KeyValue, ...]
    warnings: tuple[str, ...]
    base: GGUFFile | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of tensors to write."""
        return self.plan.n_bytes + sum(t.n_bytes for t in (self.base.tensors.values() if self.base else ()))


@dataclass(frozen=True)
class Report:
    """What a conversion did; sizes in bytes."""

    conversion: Conversion
    out: Path
    source_bytes: int
    out_bytes: int
    errors: Mapping[str, Errors]

    @property
    def launch(self) -> str:
        return launch_command(self.conversion)


def read_published(
    source: Path, target_path: Path | None = None, settings: Mapping[str, str] | None = None, ignore: Sequence[str] = ()
) -> Published:
    """Open a checkpoint and read every fact. Raises `WrongInput` naming file and key.

    `ignore` are glob patterns of tensors to leave out; of a quantized one parts may be missing then.
    """
    source = fetch(source, Part.DRAFTER, needed)
    target_path = None if target_path is None else fetch(target_path, Part.CONFIG)
    checkpoint = open_checkpoint(source, needed)
    reader = ConfigReader(checkpoint.config, str(checkpoint.config_path), settings)
    checkpoint = stack_experts(expand(checkpoint, reader, ignore))
    kind = detect(reader, checkpoint.tensors)
    if target_path is None and kind.in_target:
        target_path = checkpoint.root
    target = None if target_path is None else read_target(target_path)
    try:
        spec = kind.read_spec(reader, checkpoint.tensors, target)
    except BadFact as bad:
        place = reader.origins.get(bad.field, bad.field)
        raise reader.error(place, f"found {bad.found!r}", bad.expected) from bad
    reader.ignore(*kind.ignored)
    return Published(checkpoint, kind, reader, spec, target, target_path, ignore)


def prepare(job: ConvertJob) -> Conversion:
    """Decide everything about a conversion from headers alone. Raises with every problem; writes nothing."""
    recipe = find_recipe(job.recipe)
    published = read_published(job.source, job.target, job.settings, job.ignore)
    job = replace(job, target=published.target_path, importance=job.importance and fetch_whole(job.importance))
    reader, spec, checkpoint = published.reader, published.spec, published.checkpoint
    cell = find_cell(published.kind.name, job.runtime)
    refuse_overwriting(job.out, sources_of(checkpoint, job.target))
    matcher = published.match()
    importance = read_importance(job.importance) if job.importance else None
    options = replace(job.options, importance=importance is not None)
    plan = plan_tensors(matcher, recipe, cell.tensor_name, cell.runtime, cell.needs, options, cell.transforms)
    target, architecture = published.target, published.target.architecture if published.target else None
    problems = [
        *matcher.problems,
        *ids_of_checkpoint(matcher, checkpoint.tensors),
        *objections(cell, spec, architecture, reader.origins),
        *_mispairing(spec, target),
    ]
    if problems:
        raise Problems(str(job.source), problems)
    tokenizer = tokenizer_for(cell, job.target, spec)
    warnings = (
        *reader.warnings,
        *(f"{reader.where}: {path}: nobody reads this key" for path in reader.unread()),
        *(f"{path}: the index does not name it, so it is not read" for path in checkpoint.unused),
        *doubts(cell, spec, architecture),
        *(cache_doubts(spec, target) if target else ()),
        *mask_doubt(spec, tokenizer),
        *without_entry(importance, ((role_name(t.key), t.shape, t.choice.type) for t in plan.tensors)),
    )
    if warnings and job.strict:
        raise Problems(f"{job.source} (--strict)", warnings)
    weighs = importance and any(importance.weighs(role_name(t.key), t.shape, t.choice.type) for t in plan.tensors)
    keys = _keys(cell, recipe, published, job, tokenizer, importance if weighs else None)
    return Conversion(job, published, cell, plan, importance, keys, warnings)


def convert(job: ConvertJob, advance: Callable[[int], None] = lambda n: None) -> Report:
    """Write the GGUF of a job. `advance` is told the bytes written. Raises before or instead of writing, never half."""
    return write_conversion(prepare(job), advance)


def write_conversion(conversion: Conversion, advance: Callable[[int], None] = lambda n: None) -> Report:
    """Write what `prepare` decided; the file appears under its name complete or not at all."""
    job, head_dim = conversion.job, conversion.published.spec.head_dim
    planned = {tensor.name: tensor for tensor in conversion.plan.tensors}
    stored = [StoredTensor(t.name, t.shape, GGMLQuantizationType(t.choice.type.ggml_id)) for t in planned.values()]
    base = conversion.base and fetch_tensors(job.attach or conversion.base.path, conversion.base)
    copied = list(base.tensors.values()) if base else []
    tallies = {name: Tally(tensor.choice.type) for name, tensor in planned.items()} if job.measure else {}
    with cores(job.threads) as run:

        def data(tensor: StoredTensor) -> Iterator[Array]:
            if base is not None and tensor.name in base.tensors:
                return base.slabs(tensor.name)
            found = planned[tensor.name]
            return encoded(found, head_dim, run, columns_of(conversion, found), tallies.get(tensor.name))

        size = write_gguf(job.out, conversion.keys, [*copied, *stored], data, advance)
    source_bytes = sum(tensor.header.n_bytes for tensor in conversion.plan.tensors)
    return Report(conversion, job.out, source_bytes, size, {name: tally.errors for name, tally in tallies.items()})


def columns_of(conversion: Conversion, tensor: PlannedTensor) -> F32Array | None:
    """Importance of a tensor's columns (row,) f32, if there is any; its entries have llama.cpp's names."""
    importance, name = conversion.importance, role_name(tensor.key)
    if importance is None or not importance.weighs(name, tensor.shape, tensor.choice.type):
        return None
    return importance.for_shape(name, tensor.shape)


def encoded(
    tensor: PlannedTensor,
    head_dim: int,
    run: Run = map,
    importance: F32Array | None = None,
    tally: Tally | None = None,
) -> Iterator[Bytes]:
    """The bytes of one output tensor, a slab of rows at a time; raises `WrongInput` naming tensor and row."""
    header = tensor.header
    source = I64 if tensor.op.ids else TYPES[tensor.op.gives or header.dtype]
    encoder = Encoder(header.file, header.name, source, tensor.choice.type, importance, tally)
    max_bytes = SLAB_WEIGHTS * source.layout.itemsize
    for start, stop in row_ranges(header, max_bytes, head_dim if tensor.op.by_head else 1):
        rows = tensor.op.apply(read_rows(header, start, stop), head_dim, start)
        yield encoder.rows(np.ascontiguousarray(rows).reshape(-1).view(np.uint8), rows.shape, start, run)


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise WrongUsage(no_recipe(name))
    return RECIPES[name]


def launch_command(conversion: Conversion) -> str:
    """The exact line that runs the result beside its target."""
    job, cell = conversion.job, conversion.cell
    attached = conversion.base is not None and cell.launch_attached
    return launch_line(cell, conversion.published.spec, job.target, job.out, attached or cell.launch)


def tokenizer_for(cell: Cell, target: Path | None, spec: DrafterSpec) -> Tokenizer | None:
    """The target's tokenizer, as far as this runtime's file needs one; `WrongUsage` where it is not given."""
    if target is None:
        if cell.tokenizer:
            raise WrongUsage(
                f"{cell.runtime} wants the target's tokenizer in the drafter's file; give --target with the target's"
                " folder (config and tokenizer files are enough) or its GGUF"
            )
        return None
    try:
        return target_tokenizer(target, spec.vocab_size)
    except WrongInput:
        if cell.tokenizer:
            raise
        return None  # this runtime's file carries no tokenizer, so one that we cannot read does not matter


def _mispairing(spec: DrafterSpec, target: Target | None) -> Iterator[str]:
    if target is not None:
        yield from cache_misfits(spec, target)
    if target is not None and target.vocab_size != spec.vocab_size:
        yield (
            f"vocab_size: the drafter has {spec.vocab_size}, the target {target.name} has {target.vocab_size};"
            " a drafter uses its target's embedding, so they have to be equal"
        )


def mask_doubt(spec: DrafterSpec, tokenizer: Tokenizer | None) -> Iterator[str]:
    ours, theirs = spec.mask_token_id, None if tokenizer is None else tokenizer.mask_token_id
    if None not in (ours, theirs) and ours != theirs:
        yield f"mask token: the drafter's {ours} is written, the target's tokenizer has {theirs}"


def _keys(
    cell: Cell,
    recipe: Recipe,
    published: Published,
    job: ConvertJob,
    tokenizer: Tokenizer | None,
    importance: Importance | None,
) -> tuple[KeyValue, ...]:
    """All metadata of the file, in its order: general, the drafter's facts, our own, the tokenizer's."""
    string, u32 = GGUFValueType.STRING, GGUFValueType.UINT32
    checkpoint, target = published.checkpoint, published.target
    name = name_of(checkpoint.root)
    return (
        KeyValue("general.architecture", string, cell.arch),
        KeyValue("general.type", string, "model"),
        KeyValue("general.name", string, name),
        KeyValue("general.file_type", u32, recipe.file_type),
        KeyValue("general.quantization_version", u32, QUANTIZATION_VERSION),
        *write(cell, published.spec),
        *provenance.source_keys(checkpoint, job.settings, job.ignore),
        *(provenance.target_keys(job.target, target, tokenizer) if job.target and target else ()),
        *(tokenizer.keys if tokenizer is not None and cell.tokenizer else ()),
        *(importance.keys() if importance else ()),
    )


__all__ = ["Conversion", "ConvertJob", "Report", "convert", "prepare", "read_published", "write_conversion"]
