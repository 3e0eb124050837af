"""Quantized checkpoints: what the config states, and which parts make one tensor.

After `expand` a checkpoint has the tensors a drafter is made of, whatever they are stored as. The config says how it
was quantized, the tensors say which of them were: lists of excepted modules and patterns of targets decide nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from convert_drafter.converters import packed
from convert_drafter.converters.checkpoint import Checkpoint, Headers, TensorHeader, read_rows
from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.packed import WORD, Packed, Scheme
from convert_drafter.converters.quantized_config import UNQUANTIZED, Grid, Statement, statement

ACTIVATIONS = "it scales activations, and only weights are converted"
CACHE = "it scales the key-value cache, which the runtime has in a type of its own"
# Parts that say nothing about weights, by what stands in for `weight` in their names.
LEFT_OUT = {
    "input_scale": ACTIVATIONS, "input_zero_point": ACTIVATIONS, "input_global_scale": ACTIVATIONS,
    "output_scale": ACTIVATIONS, "output_zero_point": ACTIVATIONS,
    "k_scale": CACHE, "v_scale": CACHE, "q_scale": CACHE, "k_zero_point": CACHE, "v_zero_point": CACHE,
}  # fmt: skip
# Parts that change what the weights mean, and are not read.
REFUSED = {
    "weight_g_idx": "its groups are of columns in the order of their activations (actorder), which is not read",
    "pre_quant_scale": "its inputs are scaled first (AWQ, SmoothQuant), which no drafter's GGUF can say",
    "weight_bitmask": "it is sparse, which is not read",
}
COMPANION = re.compile(r"(.*)(_packed|_blocks|_scale|_scale_inv|_scale_2|_scales|_global_scale|_zero_point|_shape)")
PACKED = (packed.PACKED_INT4, packed.PACKED_INT8)
SCALE, LONG_SCALE = re.compile(r"(.*)\.scale"), ".weight_scale_inv"  # DeepSeek's own name of a scale, and the usual one
BLOCK_BYTES = 16  # of a block of MXFP4, which is 32 weights
ADVICE = "download the file again or use another release"


def expand(checkpoint: Checkpoint, reader: ConfigReader, ignore: Sequence[str] = ()) -> Checkpoint:
    """The checkpoint with its quantized tensors as what they stand for; the same one where it states no quantization.

    What is wrong with a tensor that `ignore` matches, its glob patterns, is nobody's concern: it is left out later.
    Raises `WrongInput` naming a way to quantize that is not read, `Problems` with every tensor that is incomplete.
    """
    stated = statement(reader, checkpoint.root)
    if stated is None:
        return checkpoint
    found = _Grouping(stated, _usual_names(checkpoint.tensors), ignore).run()
    if found.problems:
        raise Problems(f"{checkpoint.root}: {stated.origin}", found.problems)
    reader.origins["quantization"] = stated.origin
    logical = dict(sorted(found.logical.items()))
    return replace(checkpoint, tensors=logical, quantization=_summary(stated.method, logical), left_out=found.left_out)


def _usual_names(raw: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """`X.scale` beside `X.weight` is `X.weight_scale_inv` by another name (DeepSeek-V4; transformers renames it)."""
    named = {}
    for name, header in raw.items():
        own = SCALE.fullmatch(name)
        usual = f"{own[1]}{LONG_SCALE}" if own and f"{own[1]}.weight" in raw else name
        named[usual] = replace(header, name=usual)
    return named


def _summary(method: str, tensors: Headers) -> str:
    kinds = ", ".join(sorted({header.stored for header in tensors.values()} - {""}))
    count = sum(bool(header.stored) for header in tensors.values())
    return f"{method}: {kinds or 'nothing'}, {count} of {len(tensors)} tensors"


@dataclass
class _Grouping:
    """Raw tensors of one checkpoint, which become logical ones; each raw one is used once or named in `problems`."""

    stated: Statement
    raw: Mapping[str, TensorHeader]
    ignore: Sequence[str] = ()
    logical: Headers = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def run(self) -> _Grouping:
        for name, header in self.raw.items():
            schemes = [s for s in self.stated.schemes if s.dtype == header.dtype and name.endswith(s.suffix)]
            if schemes and name not in self.used:
                self._try(name, schemes)
        for name, header in self.raw.items():
            if name not in self.used:
                self._rest(name, header)
        return self

    def _try(self, name: str, schemes: list[Scheme]) -> None:
        stem = name.removesuffix(schemes[0].suffix)
        try:
            if stem != name and stem in self.raw:
                raise WrongInput(f"{stem}: is there twice, also as {name}")
            scheme = _scheme(stem, schemes, self.raw)
            self._add(stem, _packed(stem, scheme, self.raw, self.stated.grids))
        except WrongInput as error:
            parts = {stem + end for scheme in schemes for end in _ends(scheme)}
            self.used |= parts
            if not self._ignored(self.raw[name], stem, *sorted(parts)):
                self.problems.append(f"{error}; {ADVICE}")

    def _ignored(self, part: TensorHeader, *names: str) -> bool:
        """Whether the user leaves the tensor out by one of its names; under that the part stays, to be left out."""
        known = next((name for name in names if any(fnmatchcase(name, mask) for mask in self.ignore)), None)
        if known is not None and known not in self.logical:
            self.logical[known] = replace(part, name=known)
        return known is not None

    def _add(self, stem: str, tensor: Packed) -> None:
        parts = [part for part in (tensor.codes, tensor.scale, tensor.second, tensor.zeros) if part is not None]
        self.used |= {part.name for part in parts}
        if tensor.scheme.packs:
            self.used.add(f"{stem}_shape")
        size = sum(part.n_bytes for part in parts)
        title, file = tensor.scheme.title, tensor.codes.file
        self.logical[stem] = TensorHeader(stem, "F32", tensor.shape, file, 0, size, title, tensor.rows)

    def _rest(self, name: str, header: TensorHeader) -> None:
        """A tensor that is what it is, one that does not matter, or a part that belongs to nothing."""
        last, part = name.rpartition(".")[2], COMPANION.fullmatch(name)
        if last in LEFT_OUT:
            self.left_out[name] = LEFT_OUT[last]
        elif (last in REFUSED or part) and self._ignored(header, name, *([part[1]] if part else [])):
            pass
        elif last in REFUSED:
            self.problems.append(f"{name}: {REFUSED[last]}; use {UNQUANTIZED}")
        elif part and (part[1] in self.raw or last.startswith("weight_")):
            owner = self.raw.get(part[1])
            beside = f"{owner.dtype} {owner.name} has no such part" if owner else f"there is no {part[1]} with it"
            self.problems.append(f"{name} ({header.dtype}): {beside} in {self.stated.method}; {ADVICE}")
        else:
            self.logical[name] = header


def _ends(scheme: Scheme) -> set[str]:
    """What the names of a scheme's parts end in, needed or not."""
    more = {"_zero_point" * bool(scheme.zeros), "_shape" * scheme.packs, scheme.second} - {""}
    return {scheme.suffix, scheme.scale} | more


def _scheme(stem: str, schemes: list[Scheme], raw: Mapping[str, TensorHeader]) -> Scheme:
    """The schemes agree about the part with the codes; the others tell them apart."""
    codes = raw[stem + schemes[0].suffix]
    scaled = [scheme for scheme in schemes if stem + scheme.scale in raw]
    if not scaled:
        names = " or ".join(dict.fromkeys(stem + scheme.scale for scheme in schemes))
        if names == f"{stem.removesuffix('.weight')}{LONG_SCALE}":
            names += f" or {stem.removesuffix('.weight')}.scale"
        raise WrongInput(f"{codes.name} ({codes.dtype}): missing {names}, its scale")
    typed = [scheme for scheme in scaled if raw[stem + scheme.scale].dtype in scheme.scale_dtypes]
    if not typed:
        scale, kinds = raw[stem + scaled[0].scale], dict.fromkeys(d for s in scaled for d in s.scale_dtypes)
        raise WrongInput(f"{scale.name}: found dtype {scale.dtype}, expected {' or '.join(kinds)}")
    for end, wanted in ((typed[0].second, "the scale of its scales"), ("_shape" * typed[0].packs, "its shape")):
        if stem + end not in raw and end:
            raise WrongInput(f"{codes.name} ({codes.dtype}): missing {stem}{end}, {wanted}")
    return typed[0]


def _packed(stem: str, scheme: Scheme, raw: Mapping[str, TensorHeader], grids: Sequence[Grid]) -> Packed:
    codes, scale = raw[stem + scheme.suffix], raw[stem + scheme.scale]
    second = raw[stem + scheme.second] if scheme.second else None
    zeros = raw.get(f"{stem}_zero_point") if scheme.zeros else None
    if second is not None and (math.prod(second.shape), second.dtype) != (1, "F32"):
        raise WrongInput(f"{second.name}: found {second.dtype} {list(second.shape)}, expected one F32")
    if zeros is not None and zeros.dtype not in scheme.zeros:
        raise WrongInput(f"{zeros.name}: found dtype {zeros.dtype}, expected {' or '.join(scheme.zeros)}")
    if scheme.packs:
        scheme, shape = _of_words(scheme, codes, raw[f"{stem}_shape"], grids)
    else:
        shape = _of_bytes(scheme, codes)
    grid = _grid(scheme, shape, scale, grids, zeros is not None)
    if zeros is not None:
        _check_zeros(scheme, scale, zeros)
    return Packed(scheme, shape, grid, codes, scale, second, zeros)


def _of_bytes(scheme: Scheme, codes: TensorHeader) -> tuple[int, ...]:
    """The shape of the weights in whole bytes: rows and columns, or rows of blocks under any number of axes."""
    shape, blocks = codes.shape, scheme is packed.MXFP4_BLOCKS
    fits = len(shape) > 2 and shape[-1] == BLOCK_BYTES if blocks else len(shape) == 2
    if not fits or 0 in shape:
        wanted = f"[rows, blocks, {BLOCK_BYTES}] or more axes" if blocks else "[rows, columns]"
        raise WrongInput(f"{codes.name}: found shape {list(shape)}, expected {wanted}")
    rows = shape[: -2 if blocks else -1]
    return (*rows, math.prod(shape[len(rows) :]) * 8 // scheme.bits)


def _of_words(
    scheme: Scheme, codes: TensorHeader, stated: TensorHeader, grids: Sequence[Grid]
) -> tuple[Scheme, tuple[int, ...]]:
    """The scheme and shape of weights in words of 32 bits: the last word of a row may have room for more."""
    if (stated.dtype, stated.shape) not in (("I64", (2,)), ("I32", (2,))):
        raise WrongInput(f"{stated.name}: found {stated.dtype} {list(stated.shape)}, expected two I64")
    rows, columns = (int(n) for n in read_rows(stated, 0, 2))
    offered = [s for s in PACKED if s.bits in {grid.bits for grid in grids}]
    fitting = [s for s in offered if codes.shape == (rows, -(-columns * s.bits // WORD))]
    if rows < 1 or columns < 1 or len(fitting) != 1:
        bits = " or ".join(str(scheme.bits) for scheme in offered) or "4 or 8"
        found = f"{stated.name} [{rows}, {columns}] with {codes.name} {list(codes.shape)}"
        raise WrongInput(f"found {found}, expected one that holds the other in {bits} bits a weight")
    return fitting[0], (rows, columns)


def _grid(
    scheme: Scheme, shape: tuple[int, ...], scale: TensorHeader, grids: Sequence[Grid], zeros: bool
) -> tuple[int, int]:
    """Rows and columns that share a scale: of those the config states, the ones that its shape is of."""
    *rows, columns = shape
    stated = [grid for grid in grids if grid.bits == scheme.bits or not scheme.packs]
    stated = [Grid(*scheme.grid)] if scheme.grid else stated
    found: dict[tuple[int, int], Grid] = {}
    wanted: list[tuple[int, ...]] = []
    for grid in stated:
        tall, wide = min(grid.rows or rows[0], rows[0]), min(grid.columns or columns, columns)
        expected = (-(-rows[0] // tall), *rows[1:], -(-columns // wide))
        wanted.append(expected)
        if _alike(scale.shape, expected) and (grid.rows != 1 or columns % wide == 0):
            found[tall, wide] = grid
    if len(found) != 1:
        several = " or ".join(str(list(shape)) for shape in dict.fromkeys(wanted)) or "what the config does not state"
        wish = f"one of the config's groups to fit {list(scale.shape)}" if found else several
        raise WrongInput(f"{scale.name}: found shape {list(scale.shape)} for {list(shape)} weights, expected {wish}")
    key, grid = next(iter(found.items()))
    if grid.asymmetric and not zeros:
        raise WrongInput(f"{scale.name}: missing the zero points beside it (_zero_point), the config says asymmetric")
    return key


def _alike(found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """One scale for a tensor may have no axis or one, a scale for each row may have one."""
    return found == expected or (len(found) < 2 and (found or (1,)) == expected[:-1] and expected[-1] == 1)


def _check_zeros(scheme: Scheme, scale: TensorHeader, zeros: TensorHeader) -> None:
    """Zero points have the grid of the scales; packed ones have fewer rows."""
    rows, *groups = scale.shape if zeros.dtype == "I32" else (0,)
    expected = (-(-rows * scheme.bits // WORD), *groups) if zeros.dtype == "I32" else scale.shape
    if zeros.shape != expected:
        raise WrongInput(f"{zeros.name}: found shape {list(zeros.shape)}, expected {list(expected)}")
