"""Rotary positions in torch: rotate-half RoPE with its scalings: linear, YaRN, and a factor for each pair.

Source of the formulas: arXiv 2104.09864 and 2309.00071, in the rounding that transformers and ggml share.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convert_drafter.converters.spec import PAPER, Rope, RopeScaling, yarn_attention


def rotate(
    x: Tensor, positions: Tensor, rope: Rope, theta: float, trained: int, factors: Tensor | None = None
) -> Tensor:
    """Turn the first `rope.dimensions` of each head by its position: x (..., heads, S, d), positions (S,).

    `theta` is the base in use, `trained` the context length that a scaling which names none stretches; `factors`
    (dimensions / 2,) divide the frequencies, as Llama 3's bands do.
    """
    half = rope.dimensions // 2
    turns = frequencies(rope, theta, trained).to(x.device)
    angle = positions[:, None].double() * (turns if factors is None else turns / factors.double())  # (S, half)
    size = attention_factor(rope.scaling)
    cos, sin = (angle.cos() * size).to(x.dtype), (angle.sin() * size).to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : rope.dimensions], x[..., rope.dimensions :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def frequencies(rope: Rope, theta: float, trained: int) -> Tensor:
    """Radians per position of each rotated pair: (dimensions / 2,) f64."""
    half, scaling = rope.dimensions // 2, rope.scaling
    plain = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    if scaling is None:
        return plain
    stretched = plain / scaling.factor
    if scaling.method == "linear":
        return stretched
    if scaling.method != "yarn":
        raise ValueError(f"rope.scaling.method: found {scaling.method!r}, expected linear or yarn")
    kept = unstretched(scaling, rope.dimensions, theta, trained)
    return stretched * (1 - kept) + plain * kept


def unstretched(scaling: RopeScaling, dimensions: int, theta: float, trained: int) -> Tensor:
    """YaRN: how much of its own frequency each pair keeps, (dimensions / 2,) f64 from 1 (fast pairs) to 0 (slow)."""
    length = scaling.original_context_length or trained

    def pair_turning(turns: float) -> float:
        """The pair, counted in fractions, that turns this often within the trained context."""
        return dimensions * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(_number(scaling, "beta_fast"))), 0)
    high = min(math.ceil(pair_turning(_number(scaling, "beta_slow"))), dimensions - 1)
    ramp = (torch.arange(dimensions // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    return (1 - ramp.clamp(0, 1)) * _number(scaling, "extrapolation_factor")


def attention_factor(scaling: RopeScaling | None) -> float:
    """What rotated queries and keys are multiplied by: 1 unless YaRN makes up for a longer context."""
    if scaling is None or scaling.method != "yarn":
        return 1.0
    return yarn_attention(scaling.factor) if scaling.attention_factor is None else scaling.attention_factor


def _number(scaling: RopeScaling, name: str) -> float:
    stated: float | None = getattr(scaling, name)
    return PAPER[name] if stated is None else stated
