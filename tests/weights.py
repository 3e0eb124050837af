"""Weights for tests of the encoders: every shape of input that has broken one, and importance of their columns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

SUPER = 256
F = np.float32


def named_rows(largest: float, n_rows: int = 16, width: int = 1024, seed: int = 1) -> dict[str, np.ndarray]:
    """Named (n_rows, width) f32 arrays of magnitudes up to `largest`."""
    rng = np.random.default_rng(seed)
    shape = (n_rows, width)
    normal = rng.standard_normal(shape, dtype=F)
    single = np.zeros(shape, F)
    single[np.arange(n_rows), rng.integers(0, width, n_rows)] = -0.3
    outlier = normal * F(0.01)
    outlier[:, 7::64] = 30
    halves = rng.integers(-16, 16, shape).astype(F)
    halves[:, ::32], halves[:, 1::32] = -16, 15.5
    top = F(min(largest, 1e30) / 8)  # a fit under importance may need scales several times as large
    rows = {
        "normal": normal,
        "bf16": (normal.view(np.uint32) & np.uint32(0xFFFF0000)).view(F),
        "heavy tails": np.clip(rng.standard_t(2, shape), -1e3, 1e3).astype(F),
        "constant": np.full(shape, 0.25, F),
        "constant negative": np.full(shape, -0.7, F),
        "zero": np.zeros(shape, F),
        "minus zero": np.full(shape, -0.0, F),
        "denormal": normal * F(1e-40),
        "around the smallest normal": normal * F(2e-38),
        "tiny": normal * F(1e-30),
        "negligible": normal * F(1e-15),
        "scale below f16": normal * F(1e-6),
        "scale at f16's denormals": normal * F(1e-4),
        "large": normal * F(1e4),
        "huge": np.clip(normal / 3, -1, 1) * top,
        "outlier": outlier,
        "all negative": -np.abs(normal) - F(0.01),
        "all positive": np.abs(normal) + F(0.01),
        "offset": normal * F(1e-5) - F(1000),
        "offset up": normal * F(1e-5) + F(1000),
        "single": single,
        "exact halves": halves / 2,
        "few values": rng.choice(np.array([-1, -0.5, 0, 0.25, 1], F), shape),
        "two values": rng.choice(np.array([-1, 1], F), shape),
        "sparse": np.where(rng.random(shape) < 0.05, normal, F(0)).astype(F),
        "powers of two": np.ldexp(rng.choice(np.array([-1, 1], F), shape), rng.integers(-20, 10, shape)).astype(F),
        "uniform": rng.uniform(-1, 1, shape).astype(F),
    }
    return {**rows, "mixed": mixed_rows(rows, rng)}


def mixed_rows(rows: dict[str, np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Sixteen weights from here, sixteen from there: blocks within a super-block that have nothing in common."""
    pieces = np.stack([array.reshape(-1, 16) for name, array in rows.items() if name != "huge"])
    n = pieces.shape[1]
    chosen = pieces[rng.integers(0, len(pieces), n), rng.integers(0, n, n)]
    return chosen.reshape(next(iter(rows.values())).shape)


def named_importance(width: int, seed: int = 2) -> dict[str, np.ndarray]:
    """Named (width,) f32 arrays, none negative."""
    rng = np.random.default_rng(seed)
    plain = rng.random(width).astype(F)
    return {
        "uniform": plain,
        "equal": np.ones(width, F),
        "mostly zeros": np.where(rng.random(width) < 0.94, 0, plain).astype(F),
        "zeros among them": np.where(rng.random(width) < 0.2, 0, plain).astype(F),
        "all zero": np.zeros(width, F),
        "wide spread": (10.0 ** rng.uniform(-12, 6, width)).astype(F),
    }


def stream(n_weights: int, largest: float, seed: int) -> Iterator[np.ndarray]:
    """At least `n_weights` weights in arrays of (64, 1024), all the named kinds in turn, new ones each time."""
    sent = 0
    while sent < n_weights:
        for rows in named_rows(largest, 64, 1024, seed).values():
            sent += rows.size
            yield rows
        seed += 1
