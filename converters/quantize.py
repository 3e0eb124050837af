"""Quantize: any GGUF in, the same model with smaller weights out. A job goes in, a report comes out.

Every key is kept but the three that say how the weights are stored; types are decided as llama-quantize decides them
(src/llama-quant.cpp), for drafters and for any other architecture. The source is only read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert_drafter.converters.convert import QUANTIZATION_VERSION, find_recipe
from convert_drafter.converters.destination import refuse_overwriting
from convert_drafter.converters.drafter_file import llama_cpp_names, read_drafter_file
from convert_drafter.converters.encoding import SLAB_WEIGHTS, Encoder, Tally, cores
from convert_drafter.converters.errors import DrafterError, Problems, WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.hub_gguf import fetch_header, fetch_tensors, fetch_whole
from convert_drafter.converters.importance import KEYS as IMATRIX_KEYS
from convert_drafter.converters.importance import Importance, read_importance, without_entry
from convert_drafter.converters.launch.line import launch_line
from convert_drafter.converters.recipes import Choice
from convert_drafter.converters.type_choice import Candidate, TypeOptions, choose_types, facts_of_file
from convert_drafter.quant import TYPES, QuantType
from convert_drafter.quant.base import Blocks, Bytes, F32Array, Run
from convert_drafter.quant.measure import Errors

FILE_TYPE, VERSION = "general.file_type", "general.quantization_version"
SPLIT = "split."


@dataclass(frozen=True)
class QuantizeJob:
    """What to quantize. `measure` asks for each tensor's error; without `threads` all cores are used."""

    source: Path
    out: Path
    recipe: str
    importance: Path | None = None
    options: TypeOptions = field(default_factory=TypeOptions)
    allow_requantize: bool = False
    strict: bool = False
    threads: int | None = None
    measure: bool = False


@dataclass(frozen=True)
class Recoding:
    """One tensor: as it is stored, llama.cpp's name for it, its type, whether there is importance for its columns."""

    stored: StoredTensor
    name: str
    choice: Choice
    weighted: bool = False

    @property
    def result(self) -> StoredTensor:
        return StoredTensor(self.stored.name, self.stored.shape, GGMLQuantizationType(self.choice.type.ggml_id))

    @property
    def copied(self) -> bool:
        return self.stored.type.value == self.choice.type.ggml_id


@dataclass(frozen=True)
class Quantization:
    """Everything decided, nothing written."""

    job: QuantizeJob
    file: GGUFFile
    importance: Importance | None
    recodings: tuple[Recoding, ...]
    keys: tuple[KeyValue, ...]
    warnings: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        return sum(recoding.result.n_bytes for recoding in self.recodings)

    @property
    def n_weights(self) -> int:
        return sum(recoding.stored.n_elements for recoding in self.recodings)


@dataclass(frozen=True)
class QuantizeReport:
    """What was done; sizes in bytes."""

    quantization: Quantization
    out: Path
    source_bytes: int
    out_bytes: int
    errors: Mapping[str, Errors]

    @property
    def launch(self) -> str | None:
        """The exact line that runs the result, if it is a drafter whose facts are all there."""
        try:
            drafter = read_drafter_file(self.out)
        except DrafterError:
            return None
        attached = len(drafter.tensors) < len(self.quantization.recodings)  # the others are its target's
        line = (attached and drafter.cell.launch_attached) or drafter.cell.launch
        return launch_line(drafter.cell, drafter.spec, None, self.out, line)


def prepare_quantize(job: QuantizeJob) -> Quantization:
    """Decide everything from headers alone. Raises with every problem; writes nothing."""
    recipe = find_recipe(job.recipe)
    if job.source.is_dir():
        raise WrongUsage(f"{job.source}: is a folder, expected a GGUF; `convert` reads checkpoints")
    job = replace(job, importance=job.importance and fetch_whole(job.importance))
    file = read_gguf(fetch_header(job.source))
    refuse_overwriting(job.out, (file.path, *([job.importance] if job.importance else ())))
    importance = read_importance(job.importance) if job.importance else None
    options = replace(job.options, importance=importance is not None)
    if not file.tensors:
        raise WrongInput(f"{job.source}: found no tensor, expected at least one: there is nothing to quantize")
    tensors, names = list(file.tensors.values()), llama_cpp_names(file)
    common = [names.get(tensor.name, tensor.name) for tensor in tensors]
    candidates = [Candidate(name, t.shape, stored_type(t.type)) for name, t in zip(common, tensors, strict=True)]
    choices = choose_types(recipe, candidates, facts_of_file(file), options)
    recodings = tuple(map(Recoding, tensors, common, choices))
    if importance:
        recodings = tuple(replace(r, weighted=_is_weighted(r, importance)) for r in recodings)
    if problems := list(_problems(job, recodings)):
        raise Problems(str(job.source), problems)
    encoded = ((r.name, r.stored.shape, r.choice.type) for r in recodings if not r.copied)
    warnings = tuple(without_entry(importance, encoded))
    if warnings and job.strict:
        raise Problems(f"{job.source} (--strict)", warnings)
    used = importance if any(recoding.weighted for recoding in recodings) else None
    keys = tuple(_keys(file, recipe.file_type, used))
    return Quantization(job, file, importance, recodings, keys, warnings)


def quantize(job: QuantizeJob, advance: Callable[[int], None] = lambda n: None) -> QuantizeReport:
    """Write the GGUF of a job. `advance` is told the bytes written. Raises before or instead of writing, never half."""
    return write_quantization(prepare_quantize(job), advance)


def write_quantization(decided: Quantization, advance: Callable[[int], None] = lambda n: None) -> QuantizeReport:
    """Write what `prepare_quantize` decided; the file appears under its name complete or not at all."""
    decided = replace(decided, file=fetch_tensors(decided.job.source, decided.file))
    job, by_name = decided.job, {recoding.stored.name: recoding for recoding in decided.recodings}
    tallies = {r.stored.name: Tally(r.choice.type) for r in decided.recodings if job.measure and not r.copied}
    with cores(job.threads) as run:

        def data(result: StoredTensor) -> Iterator[Bytes]:
            return _recoded(decided, by_name[result.name], run, tallies.get(result.name))

        size = write_gguf(job.out, decided.keys, [r.result for r in decided.recodings], data, advance)
    errors = {name: tally.errors for name, tally in tallies.items()}
    return QuantizeReport(decided, job.out, decided.file.path.stat().st_size, size, errors)


def stored_type(kind: GGMLQuantizationType) -> QuantType:
    """How a file's type is decoded: by us, or by the gguf package for those we do not write."""
    if kind.name in TYPES:
        return TYPES[kind.name]
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]

    def decode(blocks: Blocks) -> F32Array:
        weights: F32Array = gguf.quants.dequantize(blocks.view(np.uint8).reshape(-1, n_bytes), kind)
        return weights

    def refuse(blocks: F32Array) -> Blocks:
        raise AssertionError(f"{kind.name} is only read")

    layout = np.dtype([("bytes", "u1", (n_bytes,))])
    return QuantType(kind.name, kind.value, block, layout, refuse, decode, math.inf)


def _is_readable(kind: GGMLQuantizationType) -> bool:
    """Whether the type can be decoded: integers and some of ggml's internal types cannot."""
    if kind.name in TYPES:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _recoded(decided: Quantization, recoding: Recoding, run: Run, tally: Tally | None) -> Iterator[Bytes]:
    """The bytes of one tensor, a slab of rows at a time; stacked matrices one after the other."""
    file, stored, kind = decided.file, recoding.stored, recoding.choice.type
    if recoding.copied:
        yield from file.slabs(stored.name)
        return
    source, row, matrices = stored_type(stored.type), stored.shape[-1], math.prod(stored.shape[:-2])
    rows = stored.shape[-2] if len(stored.shape) > 1 else 1
    weighted = decided.importance if recoding.weighted else None
    importance = weighted.for_shape(recoding.name, stored.shape) if weighted else None
    step = max(1, SLAB_WEIGHTS // row)
    for matrix in range(matrices):
        columns = None if importance is None else importance.reshape(-1, row)[matrix]
        encoder = Encoder(file.path, stored.name, source, kind, columns, tally)
        for first in range(matrix * rows, (matrix + 1) * rows, step):
            last = min(first + step, (matrix + 1) * rows)
            data = file.tensor_bytes(stored.name, first * stored.row_bytes, last * stored.row_bytes)
            yield encoder.rows(data, (last - first, row), first, run)


def _is_weighted(recoding: Recoding, importance: Importance) -> bool:
    return not recoding.copied and importance.weighs(recoding.name, recoding.stored.shape, recoding.choice.type)


def _problems(job: QuantizeJob, recodings: tuple[Recoding, ...]) -> Iterator[str]:
    for recoding in recodings:
        kind = recoding.stored.type.name
        if recoding.copied:
            continue
        if not _is_readable(recoding.stored.type):
            expected = "F32, F16, BF16 or a quantized type"
            yield f"{recoding.stored.name}: found {kind}, which cannot be decoded, expected {expected}"
            continue
        if job.allow_requantize or stored_type(recoding.stored.type).block == 1:
            continue
        yield (
            f"{recoding.stored.name}: is {kind} already, and encoding it as {recoding.choice.type.name} loses weight"
            " precision twice; quantize the F32, F16 or BF16 file, or accept it with --allow-requantize"
        )


def _keys(file: GGUFFile, file_type: int, importance: Importance | None) -> Iterator[KeyValue]:
    """The source's keys in their order, those about storage as the result has them; an old imatrix's are not kept."""
    u32 = GGUFValueType.UINT32
    ours = {FILE_TYPE: KeyValue(FILE_TYPE, u32, file_type), VERSION: KeyValue(VERSION, u32, QUANTIZATION_VERSION)}
    for key, entry in file.keys.items():
        if not key.startswith((SPLIT, IMATRIX_KEYS)):
            yield ours.pop(key, entry)
    yield from ours.values()
    yield from importance.keys() if importance else ()
