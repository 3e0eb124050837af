"""Recipes: the types of whole files, held against what llama-quantize decided (fixtures/recipes), and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import small_checkpoint
from recipe_models import Model, condensed, dflash, facts, llama, models, mtp, recorded

from convert_drafter.converters import Problems, WrongInput, WrongUsage
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.dialects import RUNTIMES, find_cell
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.plan import plan_tensors
from convert_drafter.converters.recipe_rules import COMMON, RULES, Facts
from convert_drafter.converters.recipes import ALWAYS_F32, RECIPES, Choice, Recipe
from convert_drafter.converters.roles import Role
from convert_drafter.converters.type_choice import FALLBACK, Candidate, TypeOptions, choose_types, facts_of_file
from convert_drafter.quant import TYPES

MODELS, RECORDED = models(), recorded()
DRAFTERS = [name for name, recipe in RECIPES.items() if recipe.kept]
DFLASH = Facts("dflash", 5, 0, 32, 8)


def matrix(name: str, row: int = 256) -> Candidate:
    return Candidate(name, (8, row), TYPES["F32"])


def layer_matrices(part: str, count: int) -> list[Candidate]:
    return [matrix(f"blk.{layer}.{part}.weight") for layer in range(count)]


def decide(recipe: str, tensors: Sequence[Candidate], known: Facts = DFLASH, **options: object) -> dict[str, Choice]:
    choices = choose_types(RECIPES[recipe], tensors, known, TypeOptions(**options))  # type: ignore[arg-type]
    return {tensor.name: choice for tensor, choice in zip(tensors, choices, strict=True)}


def types(recipe: str, tensors: Sequence[Candidate], known: Facts = DFLASH, **options: object) -> dict[str, str]:
    return {name: choice.type.name for name, choice in decide(recipe, tensors, known, **options).items()}


def facts_of(model: Model, folder: Path) -> Facts:
    keys = replace(model, tensors={"x.weight": (1, 1)}, types={})
    return facts_of_file(read_gguf(keys.write(folder / "model.gguf")))


# --- against llama-quantize's own decisions ---


@pytest.mark.parametrize("name", MODELS)
def test_types_are_those_recorded_from_llama_quantize(name: str, tmp_path: Path) -> None:
    known, tensors = facts_of(MODELS[name], tmp_path), MODELS[name].candidates()
    for recipe, decisions in RECORDED[name].items():
        assert condensed(types(recipe, tensors, known), RECIPES[recipe].weights) == decisions, recipe


def test_everything_is_recorded() -> None:
    assert set(RECORDED) == set(MODELS)
    assert all(set(found) == set(RECIPES) - set(DRAFTERS) for found in RECORDED.values())


MORE_BITS = {
    1: {0}, 2: {1}, 3: {2}, 4: {2, 3}, 5: {2, 4}, 6: {2, 5}, 7: {2, 5, 6}, 8: {0, 3, 6, 7}, 10: {0, 3, 6, 8, 9},
    12: {0, 3, 6, 9, 10, 11},
}  # fmt: skip


@pytest.mark.parametrize(("count", "layers"), MORE_BITS.items())
@pytest.mark.parametrize("part", ["attn_v", "ffn_down"])
def test_more_bits_layers(count: int, layers: set[int], part: str) -> None:
    choices = decide("Q4_K_M", layer_matrices(part, count), replace(DFLASH, layer_count=count))
    assert {n for n, choice in enumerate(choices.values()) if choice.type.name == "Q6_K"} == layers
    for n in layers:
        reason = f"layer {n} of {count} is one of the more-bits layers: Q6_K"
        assert choices[f"blk.{n}.{part}.weight"].reason == reason
    assert {choice.reason for n, choice in enumerate(choices.values()) if n not in layers} <= {""}


@given(st.permutations(MODELS["dflash"].candidates()), st.sampled_from(list(RECIPES)))
def test_the_order_of_the_tensors_does_not_matter(shuffled: list[Candidate], recipe: str) -> None:
    """The walk has its own order; the answers come back in that of the question."""
    assert types(recipe, shuffled) == types(recipe, MODELS["dflash"].candidates())


def test_layers_are_visited_by_number() -> None:
    """2 before 10; and a layer's attention in a hybrid model is counted, not named."""
    parts = [f"blk.{layer}.attn_v.weight" for layer in (3, 7, 11, 15)]
    found = decide("Q3_K_M", [matrix(name) for name in reversed(parts)], replace(DFLASH, layer_count=16))
    assert [found[name].type.name for name in parts] == ["Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert found["blk.7.attn_v.weight"].reason == "number 1 of 4 is one of the first 2: Q5_K"


# --- the tables ---


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_numbers_and_names_are_llama_cpp_s(recipe: Recipe) -> None:
    name = recipe.name.removesuffix("-drafter")
    official = "ALL_F32" if name == "F32" else f"MOSTLY_{name}"
    assert recipe.file_type == gguf.LlamaFileType[official]
    assert recipe.weights in TYPES
    assert name.startswith((recipe.weights, "MXFP4"))
    assert {rule.type for rule in recipe.rules} <= set(TYPES)
    assert "\n" not in recipe.summary


def test_every_rule_and_fallback_is_about_something_there_is() -> None:
    assert set(RULES) <= set(RECIPES)
    assert {*FALLBACK, *FALLBACK.values()} <= set(TYPES)
    blocks = {name: kind.block for name, kind in TYPES.items()}
    assert {name for name, block in blocks.items() if block == 256} == set(FALLBACK)
    assert all(RULES[name][: len(COMMON)] == COMMON for name in RULES if name != "MXFP4_MOE")


def test_roles_that_are_always_f32() -> None:
    norms = {role for role in Role if role.name.endswith(("_NORM", "_NORM_2"))}
    assert {role for role, what in ALWAYS_F32.items() if what == "norm"} == norms
    assert ALWAYS_F32[Role.ATTN_SINKS] == "scalar per head"
    assert not set(ALWAYS_F32) & {Role.FUSION, Role.OUTPUT, Role.ATTN_Q, Role.FFN_DOWN}


# --- rows that do not divide ---

LADDER = {
    "Q6_K": ("Q8_0", "F16"), "Q5_K_S": ("Q5_1", "F16"), "Q4_K_S": ("Q5_0", "F16"), "Q3_K_S": ("Q4_0", "F16"),
    "Q2_K": ("Q4_0", "F16"), "IQ4_XS": ("IQ4_NL", "F16"), "IQ4_NL": ("IQ4_NL", "F16"), "Q8_0": ("Q8_0", "F16"),
    "Q4_0": ("Q4_0", "F16"), "F16": ("F16", "F16"), "BF16": ("BF16", "BF16"), "F32": ("F32", "F32"),
}  # fmt: skip


@pytest.mark.parametrize(("recipe", "ladder"), LADDER.items())
def test_fallback_ladder(recipe: str, ladder: tuple[str, str]) -> None:
    """2880 is a multiple of 32, 100 of nothing; 512 always fits."""
    own = RECIPES[recipe].weights
    for row, expected in ((512, own), (2880, ladder[0]), (100, ladder[1])):
        found = decide(recipe, [matrix("fc.weight", row)])["fc.weight"]
        assert found.type.name == expected
        assert found.fell_back == (expected != own)
        assert (f"row {row} is no multiple of {TYPES[own].block}" in found.reason) == found.fell_back


def test_a_fallback_says_what_it_fell_from() -> None:
    tensors = [replace(t, shape=(8, 2880)) for t in layer_matrices("ffn_down", 5)]
    found = decide("Q4_K_M", tensors)
    assert found["blk.1.ffn_down.weight"].reason == "row 2880 is no multiple of 256: Q5_0 instead"
    bumped = "layer 2 of 5 is one of the more-bits layers: Q6_K; row 2880 is no multiple of 256: Q8_0 instead"
    assert found["blk.2.ffn_down.weight"].reason == bumped
    odd = decide("Q4_K_M", [matrix("fc.weight", 100)])["fc.weight"]
    assert odd.reason == "row 100 is no multiple of 256 nor of 32: F16 instead"


def test_no_fallback_names_every_tensor() -> None:
    tensors = [matrix("fc.weight"), matrix("markov_w1.weight", 32), matrix("output.weight", 2880)]
    with pytest.raises(Problems) as caught:
        decide("Q4_K_M", tensors, no_fallback=True)
    assert caught.value.problems == (
        "markov_w1.weight: row 32 is no multiple of 256: Q5_0 instead",
        "output.weight: output head: Q6_K; row 2880 is no multiple of 256: Q8_0 instead",
    )
    assert types("Q4_K_M", tensors[:1], no_fallback=True) == {"fc.weight": "Q4_K"}


# --- options ---


def test_pure_has_no_mixture() -> None:
    tensors = [t for t in MODELS["llama"].candidates() if len(t.shape) > 1]
    assert set(types("Q4_K_M", tensors, pure=True).values()) == {"Q4_K"}
    assert set(types("MXFP4_MOE", tensors, pure=True).values()) == {"MXFP4"}


def test_the_first_matching_pattern_decides() -> None:
    given_types = (("attn_(q|k)", "q8_0"), ("blk.0", "F16"), ("ATTN_V", "Q5_K"))
    tensors = [*layer_matrices("attn_q", 2), *layer_matrices("attn_v", 2), matrix("blk.0.ffn_up.weight", 100)]
    found = decide("Q4_K_M", tensors, tensor_types=given_types)
    assert [choice.type.name for choice in found.values()] == ["Q8_0", "Q8_0", "F16", "Q5_K", "F16"]
    assert found["blk.1.attn_q.weight"].reason == "--tensor-type attn_(q|k)=q8_0: Q8_0"


def test_a_given_type_falls_back_too() -> None:
    found = decide("Q8_0", [matrix("fc.weight", 288)], tensor_types=(("fc", "Q4_K"),))["fc.weight"]
    assert (found.type.name, found.fell_back) == ("Q5_0", True)
    assert found.reason == "--tensor-type fc=Q4_K: Q4_K; row 288 is no multiple of 256: Q5_0 instead"


def test_given_tensors_are_not_counted() -> None:
    """As in llama-quantize: the layers after them move up in the mixture."""
    found = types("Q4_K_M", layer_matrices("ffn_down", 5), tensor_types=(("blk.0", "Q8_0"),))
    assert [*found.values()] == ["Q8_0", "Q4_K", "Q4_K", "Q6_K", "Q4_K"]


def test_output_and_embedding_types() -> None:
    tensors = [matrix("output.weight"), matrix("token_embd.weight")]
    assert types("Q4_K_M", tensors) == {"output.weight": "Q6_K", "token_embd.weight": "Q4_K"}
    found = types("Q4_K_M", tensors, output_type="bf16", embedding_type="Q8_0")
    assert found == {"output.weight": "BF16", "token_embd.weight": "Q8_0"}
    tied = decide("Q4_K_M", tensors[1:])["token_embd.weight"]
    assert (tied.type.name, tied.reason) == ("Q6_K", "output head and embedding in one: Q6_K")
    assert types("Q4_K_M", tensors[1:], output_type="Q5_K") == {"token_embd.weight": "Q5_K"}


def test_importance_changes_the_mixture() -> None:
    tensors, known = layer_matrices("ffn_down", 8), replace(DFLASH, layer_count=8)
    assert types("Q4_0", tensors, known)["blk.0.ffn_down.weight"] == "Q4_0"
    assert types("Q4_0", tensors, known, importance=True)["blk.0.ffn_down.weight"] == "Q4_1"
    assert types("IQ4_XS", tensors, known)["blk.0.ffn_down.weight"] == "Q5_K"
    assert types("IQ4_XS", tensors, known, importance=True)["blk.0.ffn_down.weight"] == "IQ4_XS"


WRONG_OPTIONS = {
    "no regex": (
        {"tensor_types": (("attn_(q", "Q8_0"),)},
        "--tensor-type attn_(q=Q8_0: 'attn_(q' is no regular expression: missing ), unterminated subpattern",
    ),
    "no type": (
        {"tensor_types": (("fc", "Q9_K"),)},
        "--tensor-type fc=Q9_K: unknown type 'Q9_K'; there are: F32, F16, BF16, Q8_0",
    ),
    "no tensor": (
        {"tensor_types": (("fc", "Q8_0"), ("attn_p", "Q8_0"))},
        "--tensor-type attn_p=Q8_0: matches no tensor that can be quantized; there are: fc.weight, blk.N.attn_v.weight",
    ),
    "only a norm": ({"tensor_types": (("norm", "Q8_0"),)}, "--tensor-type norm=Q8_0: matches no tensor that can be"),
    "too late": (
        {"tensor_types": (("attn", "Q8_0"), ("attn_v", "F16"))},
        "--tensor-type attn_v=F16: another option or rule decides everything it matches",
    ),
    "no output type": ({"output_type": "int4"}, "--output-tensor-type: unknown type 'int4'; there are:"),
    "no output": (
        {"output_type": "Q8_0"},
        "--output-tensor-type Q8_0: decides no tensor's type; there are: fc",
    ),
    "no embedding": ({"embedding_type": "Q8_0"}, "--token-embedding-type Q8_0: decides no tensor's type;"),
}


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_options_that_cannot_be(options: dict[str, object], message: str) -> None:
    norm = Candidate("output_norm.weight", (256,), TYPES["F32"])
    with pytest.raises(WrongUsage) as caught:
        decide("Q4_K_M", [matrix("fc.weight"), *layer_matrices("attn_v", 2), norm], **options)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2


def test_a_recipe_of_one_type_takes_no_other() -> None:
    """llama-quantize leaves these options out without a word."""
    with pytest.raises(WrongUsage, match="BF16 stores every matrix as BF16; choose another recipe"):
        decide("BF16", [matrix("fc.weight")], tensor_types=(("fc", "Q8_0"),))


# --- for drafters ---


def special(model: Model) -> set[str]:
    starts = ("fc.", "selector_", "markov_")
    heads = ("eh_proj.weight", "shared_head_head.weight")
    return {name for name in model.tensors if name.startswith(starts) or name.endswith(heads)}


@pytest.mark.parametrize("recipe", DRAFTERS)
@pytest.mark.parametrize("model", [dflash(5), mtp()], ids=["dflash", "mtp"])
@pytest.mark.parametrize("pure", [False, True])
def test_a_drafter_recipe_keeps_what_only_a_drafter_has(recipe: str, model: Model, pure: bool) -> None:
    found = decide(recipe, model.candidates(), pure=pure)
    plain = types(recipe.removesuffix("-drafter"), model.candidates(), pure=pure)
    assert RECIPES[recipe].file_type == RECIPES[recipe.removesuffix("-drafter")].file_type
    for name, choice in found.items():
        assert choice.type.name == ("Q8_0" if name in special(model) else plain[name])
        assert choice.reason or choice.type.name == RECIPES[recipe].weights


def test_every_recipe_below_8_bits_has_one_for_drafters() -> None:
    below = [r.name for r in RECIPES.values() if TYPES[r.weights].bits_per_weight < 8 and not r.kept]
    assert [f"{name}-drafter" for name in below if name != "MXFP4_MOE"] == DRAFTERS


def test_a_drafter_recipe_says_why() -> None:
    found = decide("Q4_K_M-drafter", MODELS["dflash"].candidates())
    reasons = {name: found[name].reason for name in ("fc.weight", "markov_w2.weight", "selector_hidden.weight")}
    assert reasons == {
        "fc.weight": "the drafter's view of its target: Q8_0",
        "markov_w2.weight": "Markov head: Q8_0",
        "selector_hidden.weight": "candidate selector: Q8_0",
    }
    assert found["blk.0.attn_conv_base"].reason == "base of a convolution: always F32"
    assert found["blk.0.attn_sinks.weight"].reason == "scalar per head: always F32"
    assert found["conf_proj.weight"].reason == "one confidence per token: always F32"


def test_a_drafter_recipe_gives_back_f32() -> None:
    """Of a file that has norms and the like in 16 bits; other recipes copy them, as llama-quantize does."""
    norm, base = Candidate("blk.0.attn_norm.weight", (256,), TYPES["BF16"]), "blk.0.ffn_conv_base"
    tensors = [norm, Candidate(base, (2, 4, 256), TYPES["F16"]), Candidate("conf_proj.weight", (2, 32), TYPES["BF16"])]
    assert set(types("Q4_K_M-drafter", tensors).values()) == {"F32"}
    plain = decide("Q4_K_M", tensors)
    assert [choice.type.name for choice in plain.values()] == ["BF16", "F16", "Q5_0"]
    assert plain[norm.name].reason == "norm: stays BF16"


def test_the_user_s_own_type_goes_before_the_floor() -> None:
    assert types("Q4_K_M-drafter", [matrix("fc.weight")], tensor_types=(("fc", "Q4_K"),)) == {"fc.weight": "Q4_K"}


def test_the_floor_raises_and_never_lowers() -> None:
    found = types("Q4_K_M-drafter", [matrix("fc.weight", 100), matrix("markov_w1.weight", 32)])
    assert found == {"fc.weight": "F16", "markov_w1.weight": "Q8_0"}


# --- facts ---


def file_with(folder: Path, **keys: object) -> Facts:
    return facts_of(Model("llama", {**facts(4), **{k.replace("__", "."): v for k, v in keys.items()}}, {}), folder)


def test_facts_of_a_file(tmp_path: Path) -> None:
    assert facts_of(llama(7, 8, 2, 8), tmp_path) == Facts("llama", 7, 8, 8, 2)
    assert facts_of(llama(7, 8, None), tmp_path) == Facts("llama", 7, 0, 8, 8)
    assert facts_of(MODELS["hybrid"], tmp_path).queries_per_key == 4
    assert file_with(tmp_path, attention__head_count_kv=(0, 4)).queries_per_key == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": 0}, "llama.block_count: missing or 0"),
        ({"block_count": "five"}, "llama.block_count: found 'five', expected a whole number"),
        ({"expert_count": 1.5}, "llama.expert_count: found 1.5, expected a whole number"),
        ({"attention__head_count": ("a",)}, "llama.attention.head_count: found 'a'"),
    ],
)
def test_facts_that_are_none(keys: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=message):
        file_with(tmp_path, **keys)


def test_a_file_without_block_count(tmp_path: Path) -> None:
    path = Model("clip", {}, {"x.weight": (1, 1)}).write(tmp_path / "clip.gguf")
    with pytest.raises(WrongInput, match=r"clip\.block_count: missing or 0, expected the number of layers"):
        facts_of_file(read_gguf(path))


@pytest.mark.parametrize("name", ["blk.5.ffn_down_exps.weight", "v.blk.0.ffn_down.weight"])
def test_a_layer_the_model_does_not_have(name: str) -> None:
    """Only where the type depends on it: with experts the layer is taken from the name."""
    known = replace(DFLASH, expert_count=16)
    with pytest.raises(WrongInput, match=r"found layer (5|None), expected one below 5 \(dflash\.block_count\)"):
        decide("Q4_K_M", [matrix(name)], known)
    assert types("Q6_K", [matrix(name)], known) == {name: "Q6_K"}


# --- in a plan ---


def test_the_runtime_s_names_do_not_change_the_types(tmp_path: Path) -> None:
    """Lucebox and ik_llama.cpp call tensors otherwise; a drafter's mixture is one."""
    published = read_published(small_checkpoint(tmp_path / "drafter", num_hidden_layers=5))
    found = []
    for runtime in RUNTIMES:
        plan = plan_tensors(
            published.match(), RECIPES["Q4_K_M-drafter"], find_cell("dflash", runtime).tensor_name, runtime
        )
        found.append([(tensor.key, tensor.choice) for tensor in plan.tensors])
    assert all(other == found[0] for other in found)
    assert {t for (role, _), c in found[0] if role is Role.FFN_DOWN for t in [c.type.name]} == {"Q5_0", "Q8_0"}


def test_unwanted_fallbacks_are_problems_of_the_plan(tmp_path: Path) -> None:
    matcher = read_published(small_checkpoint(tmp_path / "drafter")).match()
    name = find_cell("dflash", "lucebox").tensor_name
    plan_tensors(matcher, RECIPES["Q4_K_M"], name, "lucebox", options=TypeOptions(no_fallback=True))
    assert "fc.weight: row 128 is no multiple of 256: Q5_0 instead" in matcher.problems
    assert len(matcher.problems) == 15
