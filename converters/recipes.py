"""Recipes as data: which type each tensor of a file is stored in. `type_choice` decides with these tables.

A recipe under a name of llama-quantize decides exactly as it does (src/llama-quant.cpp of llama.cpp 11434), so that
whole files compare equal. NAME-drafter is the same with a floor under the tensors only a drafter has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from textwrap import wrap

from convert_drafter.converters.recipe_rules import RULES, Rule
from convert_drafter.converters.roles import Role
from convert_drafter.quant.base import QuantType


@dataclass(frozen=True)
class Named:
    """Tensors by llama.cpp's name (glob patterns), what they are and why; in one architecture if it says so."""

    what: str
    patterns: tuple[str, ...]
    architecture: str | None = None
    why: str = ""

    def holds(self, name: str, architecture: str | None = None) -> bool:
        if self.architecture not in (None, architecture):
            return False
        return any(fnmatchcase(name, pattern) for pattern in self.patterns)


@dataclass(frozen=True)
class Recipe:
    """`weights` is the type of every matrix no rule speaks of, `file_type` llama.cpp's number for `general.file_type`.

    `kept` is never stored below Q8_0, `kept_f32` always as F32, whatever the rules say.
    """

    name: str
    file_type: int
    weights: str
    summary: str
    rules: tuple[Rule, ...] = ()
    kept: tuple[Named, ...] = ()
    kept_f32: tuple[Named, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A tensor's type; `reason` says why it is not the recipe's own; `fell_back`: its rows do not fit that one."""

    type: QuantType
    reason: str = ""
    fell_back: bool = False


# --- what a drafter has ---

F32_IN_DRAFTERS = (
    Named(
        "norm",
        ("*norm.weight", "*norm_2.weight"),
        why="the GPU kernels of all runtimes assert F32, and it is a few kilobytes",
    ),
    Named("base of a convolution", ("*_conv_base",), why="added to every output; llama.cpp's converter writes F32"),
    Named("factor per rotated pair", ("rope_freqs.weight",), why="ggml's rope kernels assert F32"),
    Named("scalar per head", ("*attn_sinks.weight",), why="one number a head; the kernels assert F32"),
    Named("router", ("*ffn_gate_inp*",), why="it chooses experts; llama.cpp's converter writes F32"),
    Named("one confidence per token", ("conf_proj.*",), why="decides how many tokens are drafted; a single row"),
)
ALWAYS_F32 = {role: named.what for role in Role for named in F32_IN_DRAFTERS if named.holds(role.value)}

# llama-quantize takes these for ordinary weights. In a 27B's drafter keeping them costs a few percent of the file.
KEPT_IN_DRAFTERS = (
    Named(
        "the drafter's view of its target", ("fc.weight",),
        why="all captured states pass through it; 4-bit drafters that lost nothing had it at 8 bits",
    ),
    Named("candidate selector", ("selector_*",), why="codebooks looked up by token: no sum averages their errors out"),
    Named("Markov head", ("markov_*",), why="a table looked up by token, of low rank: every error reaches the logits"),
    Named(
        "MTP head", ("*nextn.*proj*", "*nextn.shared_head_head.*"),
        why="a head at 4 bits had 0-4 % of its tokens accepted where 8 bits had 39-59 %",
    ),
    Named(
        "mixing of streams", ("*hc_attn_fn.weight", "*hc_ffn_fn.weight", "output_hc_fn.weight"),
        why="a few rows that all streams pass through; F32 in the releases and in llama.cpp's converter",
    ),
)  # fmt: skip
LEAST = "Q8_0"
DRAFTER = "-drafter"  # behind the name of a recipe that keeps them
WIDTH = 78  # columns of a message

# --- recipes ---

# Numbers: enum llama_ftype in include/llama.h; own types: llama_ftype_get_default_type.
_OF_LLAMA_QUANTIZE = tuple(
    Recipe(name, file_type, weights, summary, RULES.get(name, ()))
    for name, file_type, weights, summary in (
        ("F32", 0, "F32", "lossless, twice the size of the checkpoint"),
        ("F16", 1, "F16", "half precision: BF16 weights keep their mantissa, tiny ones lose bits"),
        ("BF16", 32, "BF16", "the checkpoint's own numbers, bit for bit when it is BF16"),
        ("Q8_0", 7, "Q8_0", "8.5 bits per weight; free wherever it was measured"),
        ("Q6_K", 18, "Q6_K", "one type for every matrix"),
        ("Q5_K_M", 17, "Q5_K", "Q6_K where errors cost most: some attention values and feed forward outputs"),
        ("Q5_K_S", 16, "Q5_K", "Q5_K for all but the output head"),
        ("Q5_1", 9, "Q5_1", "older than the K types, with an offset per block"),
        ("Q5_0", 8, "Q5_0", "older than the K types"),
        ("Q4_K_M", 15, "Q4_K", "Q6_K where errors cost most: some attention values and feed forward outputs"),
        ("Q4_K_S", 14, "Q4_K", "Q5_K for the first attention values and feed forward outputs"),
        ("IQ4_NL", 25, "IQ4_NL", "16 unevenly spaced levels; fits rows of 32"),
        ("IQ4_XS", 30, "IQ4_XS", "16 unevenly spaced levels; the smallest with 4 bits"),
        ("Q4_1", 3, "Q4_1", "older than the K types, with an offset per block"),
        ("Q4_0", 2, "Q4_0", "older than the K types; the simplest and fastest with 4 bits"),
        ("MXFP4_MOE", 38, "MXFP4", "MXFP4 for stacked experts, Q8_0 for everything else"),
        ("Q3_K_L", 13, "Q3_K", "Q5_K for attention values and outputs, feed forward outputs"),
        ("Q3_K_M", 12, "Q3_K", "Q4_K and Q5_K for attention values and outputs, feed forward outputs"),
        ("Q3_K_S", 11, "Q3_K", "Q3_K for all but the output head"),
        ("Q2_K", 10, "Q2_K", "Q3_K or Q4_K for attention values and outputs, feed forward outputs"),
    )
)


def _for_drafters(recipe: Recipe) -> Recipe:
    """The recipe to draft with: "drafter" says what such a file is made for, NAME alone compares with llama-quantize.

    A file of one is a file of the other to every runtime, so `file_type` is the same number.
    """
    summary = f"{recipe.name}, but fc, selector, Markov and MTP heads not below {LEAST}"
    return replace(
        recipe, name=f"{recipe.name}{DRAFTER}", summary=summary, kept=KEPT_IN_DRAFTERS, kept_f32=F32_IN_DRAFTERS
    )


# without rules every matrix has 8 bits and more already, and MXFP4 is only for experts
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _OF_LLAMA_QUANTIZE} | {
    drafter.name: drafter
    for drafter in map(_for_drafters, _OF_LLAMA_QUANTIZE)
    if drafter.rules and drafter.weights != "MXFP4"
}


def expected_recipe(name: str) -> str:
    """What to say in place of a name that is no recipe: what may be meant."""
    upper = {known.upper(): known for known in RECIPES}
    near = [upper[known] for known in get_close_matches(name.upper(), upper, 2)]
    return "expected a recipe" + (f"; did you mean {' or '.join(near)}?" if near else "")


def no_recipe(name: str) -> str:
    """What to say of a name that is no recipe: what may be meant, and all there are, in lines of a terminal."""
    plain = [known for known in RECIPES if not known.endswith(DRAFTER)]
    of_drafters = [known.removesuffix(DRAFTER) for known in RECIPES if known.endswith(DRAFTER)]
    kept = f"and with {DRAFTER} behind it (fc, selector, Markov and MTP heads not below {LEAST}):"
    return "\n".join([f"found {name!r}, {expected_recipe(name)}", *_lines(plain), kept, *_lines(of_drafters)])


def _lines(names: list[str]) -> list[str]:
    return wrap(" ".join(names), WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
