"""Recipes as data: which type each tensor of a drafter is stored in.

Norms, 1-D tensors and scalars are F32 in every recipe: the GPU kernels of all runtimes assert it, and llama.cpp's
converter and quantizer do the same (`conversion/base.py: prepare_tensors`, `src/llama-quant.cpp`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from convert_drafter.converters.roles import Role
from convert_drafter.quant import TYPES
from convert_drafter.quant.base import QuantType


@dataclass(frozen=True)
class Recipe:
    """`weights` is the type of every matrix, `file_type` llama.cpp's number for `general.file_type`.

    Where a row does not divide by the type's block, `fallback` holds the types to try next, in order.
    """

    name: str
    file_type: int
    weights: str
    summary: str
    fallback: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A tensor's type; `reason` says why it is not the recipe's own; `fell_back`: its rows do not fit that one."""

    type: QuantType
    reason: str = ""
    fell_back: bool = False


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("F32", 0, "F32", "lossless, twice the size of the checkpoint"),
        Recipe("F16", 1, "F16", "half precision: BF16 weights keep their mantissa, tiny ones lose bits"),
        Recipe("BF16", 32, "BF16", "the checkpoint's own numbers, bit for bit when it is BF16"),
        Recipe("Q8_0", 7, "Q8_0", "8.5 bits per weight; free wherever it was measured", fallback=("F16",)),
    )
}
ALWAYS_F32 = {
    Role.FUSION_NORM: "norm",
    Role.OUTPUT_NORM: "norm",
    Role.ATTN_NORM: "norm",
    Role.ATTN_Q_NORM: "norm",
    Role.ATTN_K_NORM: "norm",
    Role.FFN_NORM: "norm",
    Role.ATTN_SINKS: "scalar per head",
}


def choose_type(recipe: Recipe, role: Role, shape: Sequence[int]) -> Choice:
    """The type `recipe` gives a tensor of this role and shape (torch order)."""
    if role in ALWAYS_F32:
        return Choice(TYPES["F32"], f"{ALWAYS_F32[role]}: always F32")
    if len(shape) < 2:
        return Choice(TYPES["F32"], "1-D: always F32")
    for name in (recipe.weights, *recipe.fallback):
        if shape[-1] % TYPES[name].block == 0:
            if name == recipe.weights:
                return Choice(TYPES[name])
            reason = f"row {shape[-1]} is no multiple of {TYPES[recipe.weights].block}: {name} instead"
            return Choice(TYPES[name], reason, fell_back=True)
    raise AssertionError(f"{recipe.name} has no fallback for rows of {shape[-1]}")  # F16 divides every row
