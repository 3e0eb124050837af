"""Quantized tensors as they are published, of random codes and scales, and what they stand for by the slow way.

The values here are computed weight by weight from the formats' own definitions, with nothing of the converter's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

F = np.float32
E4M3 = ml_dtypes.float8_e4m3fn
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # OCP Microscaling Formats 1.0, codes 0 to 7; 8 to 15 are negative
Parts = dict[str, np.ndarray]
Rng = np.random.Generator


@dataclass(frozen=True)
class Published:
    """The parts of one quantized tensor by the end of their names, and its weights (out, in) f32."""

    parts: Parts
    weights: np.ndarray


@dataclass(frozen=True)
class Source:
    """One way to publish: what its config says, and its parts for a shape."""

    name: str
    config: Mapping[str, Any]
    make: Callable[[tuple[int, int], Rng], Published]
    title: str


def spread(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """Each weight's scale, looked up for it."""
    rows, columns = np.indices(shape)
    return scale.reshape(-(-shape[0] // block[0]), -1)[rows // block[0], columns // block[1]]


def floats(rng: Rng, shape: tuple[int, ...], dtype: Any = F) -> np.ndarray:
    return np.exp(rng.normal(-6, 1, shape)).astype(dtype)


def fp8_codes(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """All codes but the two that are no number."""
    codes = rng.integers(0, 127, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
    return codes.astype(np.uint8).view(E4M3)


def fp8(
    block: tuple[int, int], end: str = "_scale", dtype: Any = F, axes: Callable[..., Any] = lambda r, c: (r, c)
) -> Callable[[tuple[int, int], Rng], Published]:
    """Blocks of rows and columns, 0 for all of them; `axes` is the shape in which the grid is written."""

    def make(shape: tuple[int, int], rng: Rng) -> Published:
        tall, wide = block[0] or shape[0], block[1] or shape[1]
        grid = -(-shape[0] // tall), -(-shape[1] // wide)
        codes, scale = fp8_codes(rng, shape), floats(rng, grid, dtype)
        weights = codes.astype(F) * spread(scale.astype(F), shape, (tall, wide))
        return Published({"": codes, end: scale.reshape(axes(*grid))}, weights)

    return make


def integers(
    bits: int, group: int, zeros: bool = False, dtype: Any = ml_dtypes.bfloat16, rows: int = 1
) -> Callable[[tuple[int, int], Rng], Published]:
    """compressed-tensors' pack-quantized: words of 32 bits, the zero points packed down the rows."""

    def make(shape: tuple[int, int], rng: Rng) -> Published:
        wide, half, tall = group or shape[1], 2 ** (bits - 1), rows or shape[0]
        grid = -(-shape[0] // tall), shape[1] // wide
        codes, scale = rng.integers(-half, half, shape), floats(rng, grid, dtype)
        zero = rng.integers(-half, half, grid) if zeros else np.zeros(grid, np.int64)
        parts = {"_packed": packed(codes, bits), "_scale": scale, "_shape": np.array(shape, np.int64)}
        if zeros:
            parts["_zero_point"] = np.ascontiguousarray(packed(zero.T, bits).T)
        block = tall, wide
        weights = (codes - spread(zero, shape, block)).astype(F) * spread(scale.astype(F), shape, block)
        return Published(parts, weights)

    return make


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """(rows, columns) integers to (rows, words) I32, moved up so that none is negative, the first one lowest."""
    rows, columns = codes.shape
    together = 32 // bits
    words = np.zeros((rows, -(-columns // together)), np.uint64)
    for column in range(columns):
        moved = (codes[:, column] + 2 ** (bits - 1)).astype(np.uint64)
        words[:, column // together] |= moved << np.uint64(bits * (column % together))
    return words.astype(np.uint32).view(np.int32)


def int8(group: int, zeros: bool = False, axes: int = 2) -> Callable[[tuple[int, int], Rng], Published]:
    def make(shape: tuple[int, int], rng: Rng) -> Published:
        wide = group or shape[1]
        grid = (shape[0], shape[1] // wide)
        codes, scale = rng.integers(-128, 128, shape).astype(np.int8), floats(rng, grid)
        zero = rng.integers(-128, 128, grid).astype(np.int8)
        parts = {"": codes, "_scale": scale.reshape(grid[:axes])}
        if zeros:
            parts["_zero_point"] = zero
        moved = codes.astype(np.int32) - (spread(zero, shape, (1, wide)).astype(np.int32) if zeros else 0)
        return Published(parts, moved.astype(F) * spread(scale, shape, (1, wide)))

    return make


def fp4_weights(codes: np.ndarray) -> np.ndarray:
    return np.array([math.copysign(E2M1[c & 7], -1 if c & 8 else 1) for c in codes.reshape(-1)], F).reshape(codes.shape)


def in_bytes(codes: np.ndarray) -> np.ndarray:
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def nvfp4(names: tuple[str, str, str], join: Callable[..., Any]) -> Callable[[tuple[int, int], Rng], Published]:
    def make(shape: tuple[int, int], rng: Rng) -> Published:
        codes = rng.integers(0, 16, shape, np.uint8)
        scale = fp8_codes(rng, (shape[0], shape[1] // 16)).view(np.uint8) & 0x7F
        second = np.array(rng.uniform(0.001, 3), F)
        each = spread(scale.view(E4M3).astype(F), shape, (1, 16))
        parts = {names[0]: in_bytes(codes), names[1]: scale.view(E4M3), names[2]: second.reshape(1)}
        return Published(parts, fp4_weights(codes) * join(each, second))

    return make


def mxfp4(names: tuple[str, str], blocks: bool) -> Callable[[tuple[int, int], Rng], Published]:
    def make(shape: tuple[int, int], rng: Rng) -> Published:
        codes = rng.integers(0, 16, shape, np.uint8)
        exponents = rng.integers(100, 130, (shape[0], shape[1] // 32), np.uint8)
        scale = np.array([2.0 ** (int(e) - 127) for e in exponents.reshape(-1)], F).reshape(exponents.shape)
        bytes_ = in_bytes(codes).reshape(*((shape[0], -1, 16) if blocks else (shape[0], -1)))
        return Published({names[0]: bytes_, names[1]: exponents}, fp4_weights(codes) * spread(scale, shape, (1, 32)))

    return make


def fp4_groups(shape: tuple[int, int], rng: Rng) -> Published:
    """DeepSeek-V4's experts: two weights a byte, a power of two for each 32 of a row."""
    found = mxfp4(("", "_scale_inv"), blocks=False)(shape, rng)
    codes, exponents = found.parts[""].view(np.int8), found.parts["_scale_inv"].view(ml_dtypes.float8_e8m0fnu)
    return Published({"": codes, "_scale_inv": exponents}, found.weights)


# --- configs ---


def fp8_config(block: list[int] | None = None) -> dict[str, Any]:
    """As DeepSeek and Qwen publish it."""
    return {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": block,
        "modules_to_not_convert": ["lm_head", "fc"],
    }  # fmt: skip


def weights_args(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": bits,
        "observer": "minmax", "observer_kwargs": {}, "strategy": strategy, "symmetric": True, "type": kind, **more,
    }  # fmt: skip


def ct_config(form: str, *groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    return {
        "config_groups": {
            f"group_{i}": {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": w}
            for i, w in enumerate(groups)
        },
        "format": form, "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.12.2", **more,
    }  # fmt: skip


def modelopt_config(algorithm: str, **more: Any) -> dict[str, Any]:
    return {
        "config_groups": {"group_0": {"weights": {"dynamic": False, "num_bits": 8, "type": "float"}}},
        "ignore": ["lm_head"], "quant_algo": algorithm, "quant_method": "modelopt",
        "producer": {"name": "modelopt", "version": "0.37.0"}, **more,
    }  # fmt: skip


BF16 = ml_dtypes.bfloat16
CT_NVFP4 = ("_packed", "_scale", "_global_scale")
SOURCES = (
    Source("fp8 blocks", fp8_config([128, 128]), fp8((128, 128), "_scale_inv"), "FP8"),
    Source("fp8 blocks, partial", fp8_config([40, 48]), fp8((40, 48), "_scale_inv"), "FP8"),
    Source("fp8 blocks, BF16 scales", fp8_config([32, 32]), fp8((32, 32), "_scale_inv", BF16), "FP8"),
    Source("fp4 groups beside fp8 blocks", {**fp8_config([128, 128]), "scale_fmt": "ue8m0"}, fp4_groups, "FP4"),
    Source("fp8 per tensor", fp8_config(), fp8((0, 0), "_scale_inv", F, lambda r, c: ()), "FP8"),
    Source("fp8 per tensor, old name", fp8_config(), fp8((0, 0), "_scale", F, lambda r, c: (1,)), "FP8"),
    Source(
        "float-quantized tensor",
        ct_config("float-quantized", weights_args("float", 8, "tensor")),
        fp8((0, 0), "_scale", BF16, lambda r, c: (1,)),
        "FP8",
    ),
    Source(
        "float-quantized channel",
        ct_config("float-quantized", weights_args("float", 8, "channel")),
        fp8((1, 0), "_scale", BF16),
        "FP8",
    ),
    Source(
        "float-quantized block",
        ct_config("float-quantized", weights_args("float", 8, "block", block_structure=[40, 48])),
        fp8((40, 48)),
        "FP8",
    ),
    Source(
        "float-quantized group",
        ct_config("naive-quantized", weights_args("float", 8, "group", group_size=32)),
        fp8((1, 32)),
        "FP8",
    ),
    Source(
        "int-quantized channel", ct_config("int-quantized", weights_args("int", 8, "channel")), int8(0), "INT8"
    ),
    Source(
        "int-quantized asymmetric groups",
        ct_config("int-quantized", weights_args("int", 8, "group", group_size=32, symmetric=False)),
        int8(32, zeros=True),
        "INT8",
    ),
    Source(
        "INT4 groups",
        ct_config("pack-quantized", weights_args("int", 4, "group", group_size=32)),
        integers(4, 32),
        "INT4",
    ),
    Source(
        "INT4 asymmetric groups",
        ct_config("pack-quantized", weights_args("int", 4, "group", group_size=32, symmetric=False)),
        integers(4, 32, zeros=True),
        "INT4",
    ),
    Source(
        "INT4 channel", ct_config("pack-quantized", weights_args("int", 4, "channel")), integers(4, 0, dtype=F), "INT4"
    ),
    Source(
        "INT8 packed channel, asymmetric",
        ct_config("pack-quantized", weights_args("int", 8, "channel", symmetric=False)),
        integers(8, 0, zeros=True),
        "INT8",
    ),
    Source(
        "INT8 packed tensor",
        ct_config("pack-quantized", weights_args("int", 8, "tensor")),
        integers(8, 0, rows=0),
        "INT8",
    ),
    Source("mxfp4 blocks", {"quant_method": "mxfp4"}, mxfp4(("_blocks", "_scales"), True), "MXFP4"),
    Source(
        "mxfp4-pack-quantized",
        ct_config("mxfp4-pack-quantized", weights_args("float", 4, "group", group_size=32)),
        mxfp4(("_packed", "_scale"), False),
        "MXFP4",
    ),
    Source(
        "nvfp4-pack-quantized",
        ct_config("nvfp4-pack-quantized", weights_args("float", 4, "tensor_group", group_size=16)),
        nvfp4(CT_NVFP4, np.divide),
        "NVFP4",
    ),
    Source("ModelOpt NVFP4", modelopt_config("NVFP4"), nvfp4(("", "_scale", "_scale_2"), np.multiply), "NVFP4"),
    Source("ModelOpt FP8", modelopt_config("FP8"), fp8((0, 0), "_scale", F, lambda r, c: ()), "FP8"),
    Source(
        "ModelOpt FP8 per channel",
        modelopt_config("FP8_PER_CHANNEL_PER_TOKEN"),
        fp8((1, 0), "_scale", F, lambda r, c: (r,)),
        "FP8",
    ),
)  # fmt: skip


def tensors_of(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Parts, Parts]:
    """(raw tensors, weights f32) of a checkpoint: its matrices quantized, its vectors BF16."""
    raw: Parts = {}
    weights: Parts = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(list(name.encode()))
        if len(shape) == 2:
            published = source.make((shape[0], shape[1]), rng)
            raw |= {name + end: part for end, part in published.parts.items()}
            weights[name] = published.weights
        else:
            raw[name] = rng.normal(1, 0.1, shape).astype(BF16)
            weights[name] = raw[name].astype(F)
    return raw, weights
