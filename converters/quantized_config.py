"""What a config says about how a checkpoint was quantized: a method, its schemes, and what shares a scale.

Read from: transformers' FineGrainedFP8Config and Mxfp4Config, compressed-tensors' QuantizationConfig, ModelOpt's
convert_hf_quant_config_format (what it writes to config.json) and hf_quant_config.json (what it wrote before).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from convert_drafter.converters import packed
from convert_drafter.converters.config import ConfigReader, lookup
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.packed import Scheme
from convert_drafter.converters.weight_files import reading

KEY, MLX = "quantization_config", "quantization"
SIDECAR, SIDECAR_KEY = "hf_quant_config.json", "quantization"
UNQUANTIZED = "the unquantized release"


@dataclass(frozen=True)
class Grid:
    """Rows and columns that share a scale (0: all); `bits` of a weight, and whether there are zero points."""

    rows: int
    columns: int
    bits: int = 8
    asymmetric: bool = False


TENSOR, CHANNEL = Grid(0, 0), Grid(1, 0)


@dataclass(frozen=True)
class Statement:
    """How a checkpoint says it was quantized; `origin` is where."""

    method: str
    origin: str
    schemes: tuple[Scheme, ...]
    grids: tuple[Grid, ...] = ()


def statement(reader: ConfigReader, folder: Path) -> Statement | None:
    """None where nothing is stated. Raises `WrongInput` naming a method or variant that is not read."""
    if lookup(reader.raw, MLX):
        section = reader.section(MLX)
        method = section.get("quant_method") or (f"{section['bits']} bits, MLX" if "bits" in section else None)
        raise _refused(reader, MLX, method or lookup(reader.raw, MLX))
    reader.ignore(KEY)
    if lookup(reader.raw, KEY):
        return _stated(reader, KEY, KEY)
    sidecar = folder / SIDECAR
    if not sidecar.is_file():
        return None
    with reading(sidecar):
        beside = ConfigReader(json_object(str(sidecar), sidecar.read_bytes()), str(sidecar))
    return _stated(beside, SIDECAR_KEY, SIDECAR) if lookup(beside.raw, SIDECAR_KEY) else None


def _stated(reader: ConfigReader, key: str, origin: str) -> Statement:
    section = reader.section(key)
    method = section.get("quant_method") or ("modelopt" if "quant_algo" in section else None)
    if not isinstance(method, str) or method not in METHODS:
        bits = f"{section['bits']} bits" if "bits" in section else None
        raise _refused(reader, key, method or bits or lookup(reader.raw, key))
    schemes, grids = METHODS[method](reader, key)
    return Statement(method, origin, schemes, grids)


def _refused(reader: ConfigReader, path: str, found: object) -> WrongInput:
    readable = f"{UNQUANTIZED}, or one of: {', '.join(METHODS)}"
    return reader.error(path, f"a quantized checkpoint ({str(found)[:80]})", readable)


# --- the methods ---

Schemes: TypeAlias = tuple[Scheme, ...]
Grids: TypeAlias = tuple[Grid, ...]


def _fp8(reader: ConfigReader, key: str) -> tuple[Schemes, Grids]:
    """`weight_scale_inv` for blocks; without blocks one scale a tensor, which older releases call `weight_scale`.

    Where scales are powers of two there may be experts in four bits (DeepSeek-V4), which the tensors tell.
    """
    reader.expect(f"{key}.fmt", "e4m3", "other 8-bit floats are not read")
    block = reader.find_list(f"{key}.weight_block_size", int, f"{key}.weight_block_size")
    if block is None:
        return (packed.FP8_BLOCKS, packed.FP8), (TENSOR,)
    powers = reader.find(f"{key}.scale_fmt", str, f"{key}.scale_fmt") == "ue8m0"
    schemes = (packed.FP8_BLOCKS, *([packed.FP4_GROUPS] if powers else []))
    return schemes, (_block(reader, f"{key}.weight_block_size", block),)


def _block(reader: ConfigReader, path: str, found: object) -> Grid:
    """Rows and columns of a block, both stated."""
    sides = list(found) if isinstance(found, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and 0 < side < 2**31 for side in sides):
        raise reader.error(path, f"found {found!r}", "two whole numbers, the rows and columns of a block")
    return Grid(sides[0], sides[1])


def _mxfp4(reader: ConfigReader, key: str) -> tuple[Schemes, Grids]:
    return (packed.MXFP4_BLOCKS,), ()


ALGORITHMS: dict[str, Schemes] = {
    "FP8": (packed.FP8,),
    "FP8_PER_CHANNEL_PER_TOKEN": (packed.FP8,),
    "NVFP4": (packed.MODELOPT_NVFP4,),
    "W4A16_NVFP4": (packed.MODELOPT_NVFP4,),
}


def _modelopt(reader: ConfigReader, key: str) -> tuple[Schemes, Grids]:
    algorithm = reader.get(f"{key}.quant_algo", str, f"{key}.quant_algo")
    stated = [algorithm]
    if algorithm == "MIXED_PRECISION":
        layers = reader.section(f"{key}.quantized_layers").values()
        stated = sorted({str(lookup(layer, "quant_algo")) for layer in layers})
    if not stated or not set(stated) <= set(ALGORITHMS):
        readable = f"{', '.join(ALGORITHMS)}, or {UNQUANTIZED}"
        raise reader.error(f"{key}.quant_algo", f"ModelOpt's {algorithm} ({', '.join(stated)})", f"one of {readable}")
    schemes = dict.fromkeys(scheme for name in stated for scheme in ALGORITHMS[name])
    return tuple(schemes), (TENSOR, CHANNEL)


FORMATS: dict[str, Schemes] = {
    "float-quantized": (packed.FP8,),
    "int-quantized": (packed.INT,),
    "naive-quantized": (packed.FP8, packed.INT),
    "pack-quantized": (packed.PACKED_INT4, packed.PACKED_INT8),
    "nvfp4-pack-quantized": (packed.NVFP4,),
    "mxfp4-pack-quantized": (packed.MXFP4,),
}
MIXED = "mixed-precision"


def _compressed_tensors(reader: ConfigReader, key: str) -> tuple[Schemes, Grids]:
    """Every group of modules states its weights; which module is in which group is seen in its tensors."""
    for extra in ("sparsity_config", "transform_config"):
        found = reader.section(f"{key}.{extra}")
        if found.get("format", "dense") != "dense" or found.get("config_groups"):
            raise reader.error(f"{key}.{extra}", f"found {str(found)[:80]}", f"none, or {UNQUANTIZED}")
    stated = reader.find(f"{key}.format", str, f"{key}.format")
    groups = [f"{key}.config_groups.{name}" for name in reader.section(f"{key}.config_groups")]
    own = [name for group in groups if (name := reader.find(f"{group}.format", str, f"{group}.format")) is not None]
    formats = own if own and stated in (None, MIXED) else [*own, stated]
    schemes: dict[Scheme, None] = {}
    for name in formats:
        if name is None or name not in FORMATS:
            named = "missing" if name is None else f"compressed-tensors' {name}"
            raise reader.error(f"{key}.format", named, f"one of {', '.join(FORMATS)}, or {UNQUANTIZED}")
        schemes |= dict.fromkeys(FORMATS[name])
    weights = [f"{group}.weights" for group in groups if reader.section(f"{group}.weights")]
    return tuple(schemes), tuple(_weights(reader, path) for path in weights)


def _weights(reader: ConfigReader, path: str) -> Grid:
    """What shares a scale in the weights of one of the config's groups."""
    bits = reader.get(f"{path}.num_bits", int, f"{path}.num_bits")
    if bits not in (4, 8):
        raise reader.error(f"{path}.num_bits", f"found {bits}", f"4 or 8, or {UNQUANTIZED}")
    asymmetric = reader.find(f"{path}.symmetric", bool, f"{path}.symmetric") is False
    strategy = reader.get(f"{path}.strategy", str, f"{path}.strategy")
    if strategy not in STRATEGIES:
        raise reader.error(f"{path}.strategy", f"found {strategy!r}", f"one of {', '.join(STRATEGIES)}")
    return replace(STRATEGIES[strategy](reader, path), bits=bits, asymmetric=asymmetric)


def _group(reader: ConfigReader, path: str) -> Grid:
    size = reader.get(f"{path}.group_size", int, f"{path}.group_size")
    if not 0 < size < 2**31:
        raise reader.error(f"{path}.group_size", f"found {size}", "the number of columns that share a scale")
    return Grid(1, size)


STRATEGIES: dict[str, Callable[[ConfigReader, str], Grid]] = {
    "tensor": lambda reader, path: TENSOR,
    "channel": lambda reader, path: CHANNEL,
    "group": _group,
    "tensor_group": _group,
    "block": lambda reader, path: _block(
        reader, f"{path}.block_structure", lookup(reader.raw, f"{path}.block_structure")
    ),
}

METHODS: dict[str, Callable[[ConfigReader, str], tuple[Schemes, Grids]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "mxfp4": _mxfp4,
    "modelopt": _modelopt,
}
