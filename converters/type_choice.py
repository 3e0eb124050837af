"""Deciding every tensor's type: a walk over all tensors of a file at once, in llama-quantize's order.

Source: llama_tensor_get_type, tensor_type_fallback and tensor_allows_quantization in src/llama-quant.cpp. A tensor's
type depends on how many of its kind came before it, so nothing here can be asked about one tensor alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from convert_drafter.converters.errors import Problems, WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import ARCHITECTURE
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.recipe_rules import CATEGORIES, Category, Facts, Rule, Situation, layer_of
from convert_drafter.converters.recipes import F32_IN_DRAFTERS, LEAST, Choice, Named, Recipe
from convert_drafter.quant import TYPES
from convert_drafter.quant.base import QuantType

# beside these: what has fewer than two dimensions, or a name that does not end in "weight" (tensor_allows_quantization)
NEVER_QUANTIZED = (
    Named("norm", ("*_norm.weight*",)),
    Named("router", ("*ffn_gate_inp.weight*", "*ffn_gate_tid2eid.weight*")),
    Named("very small", ("*altup*", "*laurel*", "*per_layer_model_proj*")),
    Named("position or type embedding", ("position_embd.weight", "token_types.weight", "*attn_rel_b.weight*")),
    Named("short convolution", ("*ssm_conv1d*", "*shortconv.conv.weight*")),
    Named("indexer", ("*indexer.k_proj.weight*", "*indexer.q_proj.weight*")),
    Named(
        "small in GLM5-Next",
        (
            "*hc_*", "*indexer.attn_q_b*", "*indexer.attn_k*", "*indexer.proj*", "*indexer_compressor_gate*",
            "*indexer_compressor_ape*", "*ssm_[fg]_[ab].weight*", "*ssm_beta.weight*", "*attn_kv_a_mqa.weight*",
            "*attn_[kv]_b.weight*",
        ),
        "glm5-next",
    ),
    Named(
        "small in RWKV",
        (
            "*time_mix_first.weight*", "*time_mix_w[012].weight*", "*time_mix_v[012].weight*",
            "*time_mix_a[012].weight*", "*time_mix_g[12].weight*", "*time_mix_decay_w[12].weight*",
            "*time_mix_lerp_fused.weight*",
        ),
    ),
    Named(
        "image input",
        (
            "*.position_embd*", "*sam.pos_embd*", "*sam.neck.*", "*sam.net_*", "*.rel_pos*", "*.patch_embd*",
            "*.patch_merger*",
        ),
    ),
    Named("audio codebook", ("*a.rvq.codebook*", "*mm.a.code_embd*")),
)  # fmt: skip

# the next smaller blocks for rows that are no whole ones; where these do not fit either: F16 (tensor_type_fallback)
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
LAST_FALLBACK = "F16"


@dataclass(frozen=True)
class Candidate:
    """A tensor to decide about: llama.cpp's name for it, shape in torch order [out, in], the type it has now."""

    name: str
    shape: tuple[int, ...]
    type: QuantType


@dataclass(frozen=True)
class TypeOptions:
    """What a user may say beside the recipe, as llama-quantize's options of these names do; types by name.

    `tensor_types` are (regex, type): the first regex found in a name decides. `pure` gives every matrix the recipe's
    own type, but keeps a drafter recipe's floor. `importance`: there is a matrix, which changes some recipes' mixture.
    """

    pure: bool = False
    tensor_types: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    no_fallback: bool = False
    importance: bool = False


@dataclass(frozen=True)
class _Override:
    """A type the user gave, under the words that name the option."""

    option: str
    type: QuantType
    pattern: re.Pattern[str] | None = None


def choose_types(
    recipe: Recipe, tensors: Sequence[Candidate], facts: Facts, options: TypeOptions | None = None
) -> list[Choice]:
    """The type of every tensor of a file, in the order of `tensors`.

    Raises `WrongUsage` for options that cannot be or that decide nothing, `Problems` for fallbacks under `no_fallback`,
    `WrongInput` where the type depends on a layer that the file does not have.
    """
    walk = _Walk(recipe, tensors, facts, options or TypeOptions())
    choices = {tensor.name: walk.choose(tensor) for tensor in sorted(tensors, key=_visited)}
    walk.check_options_decided()
    if walk.options.no_fallback:
        fallen = [f"{name}: {choice.reason}" for name, choice in choices.items() if choice.fell_back]
        if fallen:
            raise Problems(f"{recipe.name} without fallback", fallen)
    return [choices[tensor.name] for tensor in tensors]


def _visited(tensor: Candidate) -> tuple[int, bytes]:
    """llama-quantize's order: what has no layer first, then layer by layer, by name (weight_name_comparer)."""
    layer = layer_of(tensor.name)
    return (-1 if layer is None else layer, tensor.name.encode())


def category_of(name: str) -> Category:
    return next((category for named, category in CATEGORIES if fnmatchcase(name, named)), Category.OTHER)


def unquantized(tensor: Candidate, architecture: str) -> str:
    """What a tensor is that no recipe quantizes; empty for all others."""
    for named in NEVER_QUANTIZED:
        if named.holds(tensor.name, architecture):
            return named.what
    first = next((n for n, size in enumerate(tensor.shape) if size != 1), len(tensor.shape))
    flat = len(tensor.shape) - first < 2
    if not flat and tensor.name.endswith("weight"):
        return ""
    known = next((named.what for named in F32_IN_DRAFTERS if named.holds(tensor.name)), None)
    return known or ("1-D" if flat else "no weight")


class _Walk:
    """Visits tensors one after the other, counting those whose type depends on their number."""

    def __init__(self, recipe: Recipe, tensors: Sequence[Candidate], facts: Facts, options: TypeOptions) -> None:
        self.recipe, self.tensors, self.facts, self.options = recipe, tensors, facts, options
        self.own = TYPES[recipe.weights]
        self.categories = {tensor.name: category_of(tensor.name) for tensor in tensors}
        found = Counter(self.categories.values())
        self.tied = not found[Category.OUTPUT]
        self.counts = {Category.FFN_DOWN: facts.layer_count, Category.ATTN_V: found[Category.ATTN_V]}
        self.seen = Counter[Category]()
        self.overrides = _overrides(options.tensor_types)
        self.output = _override("--output-tensor-type", options.output_type)
        self.embedding = _override("--token-embedding-type", options.embedding_type)
        self.deciding: set[str] = set()

    def choose(self, tensor: Candidate) -> Choice:
        what = unquantized(tensor, self.facts.architecture)
        kept = next((named.what for named in self.recipe.kept_f32 if named.holds(tensor.name)), None)
        if not what and not kept:
            return _fit(self._wanted(tensor), tensor.shape[-1])
        kind = TYPES["F32"] if kept and tensor.type.name in ("F16", "BF16") else tensor.type
        return Choice(kind, f"{kept or what}: {'always' if kind.name == 'F32' else 'stays'} {kind.name}")

    def _wanted(self, tensor: Candidate) -> Choice:
        """The type a tensor is to have, whatever its rows (llama_tensor_get_type)."""
        name, category = tensor.name, self.categories[tensor.name]
        override = next((o for o in self.overrides if o.pattern and o.pattern.search(name)), None)
        named = override is not None and name == "per_layer_token_embd.weight"
        if self.embedding and category is Category.EMBEDDING and not named:
            return self._given(self.embedding)
        if self.output and category is Category.OUTPUT:
            return self._given(self.output)
        if self.own.block == 1:
            return Choice(self.own)
        if override:
            return self._given(override)
        return self._floor(name, Choice(self.own) if self.options.pure else self._by_rule(tensor))

    def _given(self, override: _Override) -> Choice:
        self.deciding.add(override.option)
        return Choice(override.type, f"{override.option}: {override.type.name}")

    def _by_rule(self, tensor: Candidate) -> Choice:
        """The mixture (llama_tensor_get_type_impl)."""
        category = self.categories[tensor.name]
        tied = self.tied and category is Category.EMBEDDING
        if tied and self.output:
            return self._given(self.output)
        situation = Situation(
            tensor.name,
            Category.OUTPUT if tied else category,
            len(tensor.shape) > 2 and tensor.shape[-3] > 1,
            self.seen[category],
            self.counts.get(category, 0),
            self.facts,
            self.options.importance,
        )
        self.seen[category] += 1
        rule = next((rule for rule in self.recipe.rules if _holds(rule, situation)), None)
        if rule is None or rule.type == self.own.name:
            return Choice(self.own)
        what = "output head and embedding in one" if tied else category.value
        words = " and ".join(condition.words.format(s=situation) for condition in rule.when) or what
        return Choice(TYPES[rule.type], f"{words}: {rule.type}")

    def _floor(self, name: str, choice: Choice) -> Choice:
        least = TYPES[LEAST]
        if choice.type.bits_per_weight >= least.bits_per_weight:
            return choice
        kept = next((named for named in self.recipe.kept if named.holds(name)), None)
        return Choice(least, f"{kept.what}: {LEAST}") if kept else choice

    def check_options_decided(self) -> None:
        """An option that decides nothing is a misspelling, which the tool takes without a word."""
        given = [o for o in (*self.overrides, self.output, self.embedding) if o and o.option not in self.deciding]
        if given:
            raise WrongUsage("; ".join(self._idle(override) for override in given))

    def _idle(self, override: _Override) -> str:
        if self.own.block == 1 and override.pattern:
            return (
                f"{override.option}: {self.recipe.name} stores every matrix as {self.own.name}; choose another recipe"
            )
        quantized = [t.name for t in self.tensors if not unquantized(t, self.facts.architecture)]
        if any(override.pattern and override.pattern.search(name) for name in quantized):
            return f"{override.option}: another option or rule decides everything it matches"
        there = dict.fromkeys(re.sub(r"^blk\.[0-9]+\.", "blk.N.", name) for name in quantized)
        what = "matches no tensor that can be quantized" if override.pattern else "decides no tensor's type"
        return f"{override.option}: {what}; there are: {', '.join(there)}"


def _holds(rule: Rule, situation: Situation) -> bool:
    return rule.category in (None, situation.category) and all(c.holds(situation) for c in rule.when)


def _fit(wanted: Choice, row: int) -> Choice:
    """The type itself, or the first that takes rows of this length."""
    blocks = [wanted.type.block]
    if row % blocks[0] == 0:
        return wanted
    kind = TYPES[FALLBACK.get(wanted.type.name, LAST_FALLBACK)]
    if row % kind.block:
        blocks.append(kind.block)
        kind = TYPES[LAST_FALLBACK]
    before = f"{wanted.reason}; " if wanted.reason else ""
    multiples = " nor of ".join(map(str, blocks))
    return Choice(kind, f"{before}row {row} is no multiple of {multiples}: {kind.name} instead", fell_back=True)


# --- options ---


def _type(option: str, name: str) -> QuantType:
    kind = TYPES.get(name.upper())
    if kind is None:
        raise WrongUsage(f"{option}: unknown type {name!r}; there are: {', '.join(TYPES)}")
    return kind


def _override(option: str, name: str | None) -> _Override | None:
    return None if name is None else _Override(f"{option} {name}", _type(option, name))


def _overrides(given: Sequence[tuple[str, str]]) -> list[_Override]:
    """The user's own types, compiled; capitals match small letters, because the tool makes a pattern small."""
    out = []
    for regex, name in given:
        option = f"--tensor-type {regex}={name}"
        try:
            pattern = re.compile(regex, re.IGNORECASE)
        except re.error as error:
            raise WrongUsage(f"{option}: {regex!r} is no regular expression: {error}") from error
        out.append(_Override(option, _type(option, name), pattern))
    return out


# --- facts ---


def facts_of_file(file: GGUFFile) -> Facts:
    """What a file's own keys say, as llama.cpp's loader takes them; raises `WrongInput` naming a key."""
    architecture = file.keys.get(ARCHITECTURE)
    if architecture is None or not isinstance(architecture.value, str):
        raise WrongInput(f"{file.path}: {ARCHITECTURE}: missing, expected the architecture's name")
    name = architecture.value
    layers = _count(file, f"{name}.block_count")
    if not layers:
        raise WrongInput(f"{file.path}: {name}.block_count: missing or 0, expected the number of layers")
    if name == "nanbeige":  # walks its layers several times (models/nanbeige.cpp)
        layers *= _count(file, f"{name}.num_loops") or 1
    if name == "graniteswitch":  # a layer more, for its router (models/granite-switch.cpp)
        layers += 1
    heads = _count(file, f"{name}.attention.head_count") or 0
    kv_heads = _count(file, f"{name}.attention.head_count_kv")
    experts = _count(file, f"{name}.expert_count") or 0
    return Facts(name, layers, experts, heads, heads if kv_heads is None else kv_heads)


def _count(file: GGUFFile, key: str) -> int | None:
    """A whole number, of an array the first; None without the key."""
    entry = file.keys.get(key)
    if entry is None:
        return None
    value = entry.value[0] if isinstance(entry.value, tuple) and entry.value else entry.value
    if not isinstance(value, int) or value < 0:
        raise WrongInput(f"{file.path}: {key}: found {value!r}, expected a whole number")
    return value
