"""The mixtures of llama-quantize as tables: which tensors get another type than the recipe's own, and when.

Source of every row: src/llama-quant.cpp of llama.cpp 11434; `tests/test_recipes_engine.py` holds them against the tool.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from convert_drafter.converters.errors import WrongInput


class Category(Enum):
    """What a tensor is for, as far as it decides its type; a rule's reason uses these words."""

    OUTPUT = "output head"
    EMBEDDING = "token embedding"
    ATTN_V = "attention values"
    ATTN_K = "attention keys"
    ATTN_Q = "attention queries"
    ATTN_OUTPUT = "attention output"
    FFN_UP = "feed forward up"
    FFN_GATE = "feed forward gate"
    FFN_DOWN = "feed forward down"
    OTHER = "other"


# first match wins (tensor_get_category)
CATEGORIES: tuple[tuple[str, Category], ...] = (
    ("output.weight", Category.OUTPUT),
    ("token_embd.weight", Category.EMBEDDING),
    ("per_layer_token_embd.weight", Category.EMBEDDING),
    ("*attn_qkv.weight*", Category.ATTN_V),
    ("*attn_kv_b.weight*", Category.ATTN_V),
    ("*attn_v.weight*", Category.ATTN_V),
    ("*attn_k.weight*", Category.ATTN_K),
    ("*attn_q.weight*", Category.ATTN_Q),
    ("*attn_output.weight*", Category.ATTN_OUTPUT),
    ("*ffn_up*", Category.FFN_UP),
    ("*ffn_gate*", Category.FFN_GATE),
    ("*ffn_down*", Category.FFN_DOWN),
)


@dataclass(frozen=True)
class Facts:
    """What llama-quantize reads of a file's hyper-parameters to decide types; heads are those of layer 0."""

    architecture: str
    layer_count: int
    expert_count: int
    head_count: int
    kv_head_count: int

    @property
    def queries_per_key(self) -> int:
        return self.head_count // self.kv_head_count if self.kv_head_count else 0


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name; the tool takes "blk.", digits and whatever follows."""
    found = re.match(r"blk\.([0-9]+)", name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Situation:
    """One tensor where the walk meets it: `counted` of its category came before it, `count` is their assumed number.

    `stacked`: it has a third dimension.
    """

    name: str
    category: Category
    stacked: bool
    counted: int
    count: int
    facts: Facts
    importance: bool

    @property
    def index(self) -> int:
        """The layer, as the tool has it: with experts as the name says, else by counting."""
        if self.facts.expert_count <= 1 or self.category is not Category.FFN_DOWN:
            return self.counted
        layer = layer_of(self.name)
        if layer is None or layer >= self.count:
            key = f"{self.facts.architecture}.block_count"
            raise WrongInput(f"{self.name}: found layer {layer}, expected one below {self.count} ({key})")
        return layer

    @property
    def place(self) -> str:
        is_layer = self.index == layer_of(self.name) and self.count == self.facts.layer_count
        return f"{'layer' if is_layer else 'number'} {self.index} of {self.count}"


@dataclass(frozen=True)
class Condition:
    """Holds for a situation `s` or does not; `words`, a format string, become the reason."""

    words: str
    holds: Callable[[Situation], bool]


@dataclass(frozen=True)
class Rule:
    """Tensors of `category` (None: of every one) get `type` where all conditions hold. A recipe's first rule wins."""

    category: Category | None
    type: str
    when: tuple[Condition, ...] = ()


# --- conditions ---


def _more_bits(s: Situation) -> bool:
    """The first and last eighth, and every third layer between (use_more_bits)."""
    first = s.count // 8
    return s.index < first or s.index >= 7 * s.count // 8 or (s.index - first) % 3 == 2


SIZE_70B = {"llama": 80, "llama-embed": 80, "deci": 80, "qwen2": 80, "olmo": 80, "jais2": 68}  # LLM_TYPE_70B


def _is_70b(s: Situation) -> bool:
    facts = s.facts
    if SIZE_70B.get(facts.architecture) != facts.layer_count:
        return False
    is_llama = facts.architecture.startswith("llama")
    return not is_llama or (facts.head_count != facts.kv_head_count and facts.expert_count != 8)


def _is_expert(s: Situation) -> bool:
    """Three dimensions; in BailingMoE3 attention has them too."""
    feed_forward = s.category in (Category.FFN_UP, Category.FFN_GATE, Category.FFN_DOWN)
    return s.stacked and (s.facts.architecture != "bailingmoe3" or feed_forward)


def _is_kept_glm5(s: Situation) -> bool:
    pieces = ("attn_q_a", "attn_q_b", "nextn.eh_proj")
    return s.facts.architecture == "glm5-next" and any(piece in s.name for piece in pieces)


MORE_BITS = Condition("{s.place} is one of the more-bits layers", _more_bits)
FIRST_2 = Condition("{s.place} is one of the first 2", lambda s: s.index < 2)
FIRST_4 = Condition("{s.place} is one of the first 4", lambda s: s.index < 4)
FIRST_8TH = Condition("{s.place} is in the first eighth", lambda s: s.index < s.count // 8)
FIRST_16TH = Condition("{s.place} is in the first sixteenth", lambda s: s.index < s.count // 16)
FALCON = Condition("Falcon", lambda s: s.facts.architecture == "falcon")
GLM5 = Condition("kept at 8 bits in GLM5-Next", _is_kept_glm5)
EIGHT_EXPERTS = Condition("8 experts", lambda s: s.facts.expert_count == 8)
GROUPED = Condition("{s.facts.queries_per_key} query heads per key", lambda s: s.facts.queries_per_key >= 4)
SIZE_OF_70B = Condition("shared by all heads of a 70B model", _is_70b)
WEIGHTED = Condition("with an importance matrix", lambda s: s.importance)
UNWEIGHTED = Condition("without an importance matrix", lambda s: not s.importance)
EXPERTS = Condition("experts", _is_expert)
NO_EXPERTS = Condition("no experts", lambda s: not _is_expert(s))


# --- rules (llama_tensor_get_type_impl) ---


def _iq4(own: str) -> tuple[Rule, ...]:
    """What both 4-bit IQ recipes share."""
    return (
        Rule(Category.ATTN_V, "Q5_K", (GROUPED,)),
        Rule(Category.FFN_DOWN, "Q5_K", (UNWEIGHTED, FIRST_8TH)),
        Rule(Category.ATTN_OUTPUT, own, (FALCON,)),
        Rule(Category.ATTN_OUTPUT, "Q5_K", (EIGHT_EXPERTS,)),
    )


C = Category
# Every recipe below 8 bits has these. The tool also says Q8_0 for heads whose rows are no whole blocks: so does its
# fallback from Q6_K.
COMMON = (
    Rule(None, "Q8_0", (GLM5,)),
    Rule(C.OUTPUT, "Q8_0", (FALCON,)),
    Rule(C.OUTPUT, "Q6_K"),
    Rule(C.ATTN_V, "Q8_0", (EIGHT_EXPERTS,)),
    Rule(C.ATTN_K, "Q8_0", (EIGHT_EXPERTS,)),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "Q6_K": COMMON,
    "Q5_K_M": (*COMMON, Rule(C.ATTN_V, "Q6_K", (MORE_BITS,)), Rule(C.FFN_DOWN, "Q6_K", (MORE_BITS,))),
    "Q5_K_S": COMMON,
    "Q4_K_M": (
        *COMMON,
        Rule(C.ATTN_V, "Q6_K", (MORE_BITS,)),
        Rule(C.ATTN_V, "Q5_K", (SIZE_OF_70B,)),
        Rule(C.FFN_DOWN, "Q6_K", (FALCON, FIRST_16TH)),
        Rule(C.FFN_DOWN, "Q5_K", (FALCON, MORE_BITS)),
        Rule(C.FFN_DOWN, "Q6_K", (MORE_BITS,)),
        Rule(C.ATTN_OUTPUT, "Q4_K", (FALCON,)),
        Rule(C.ATTN_OUTPUT, "Q5_K", (EIGHT_EXPERTS,)),
    ),
    "Q4_K_S": (
        *COMMON,
        Rule(C.ATTN_V, "Q5_K", (FIRST_4,)),
        Rule(C.ATTN_V, "Q5_K", (SIZE_OF_70B,)),
        Rule(C.FFN_DOWN, "Q4_K", (FALCON,)),
        Rule(C.FFN_DOWN, "Q5_K", (FIRST_8TH,)),
        Rule(C.ATTN_OUTPUT, "Q4_K", (FALCON,)),
        Rule(C.ATTN_OUTPUT, "Q5_K", (EIGHT_EXPERTS,)),
    ),
    "Q3_K_L": (
        *COMMON,
        Rule(C.ATTN_V, "Q5_K"),
        Rule(C.FFN_DOWN, "Q4_K", (FALCON,)),
        Rule(C.FFN_DOWN, "Q5_K"),
        Rule(C.ATTN_OUTPUT, "Q4_K", (FALCON,)),
        Rule(C.ATTN_OUTPUT, "Q3_K", (EIGHT_EXPERTS,)),
        Rule(C.ATTN_OUTPUT, "Q5_K"),
    ),
    "Q3_K_M": (
        *COMMON,
        Rule(C.ATTN_V, "Q5_K", (FIRST_2,)),
        Rule(C.ATTN_V, "Q5_K", (SIZE_OF_70B,)),
        Rule(C.ATTN_V, "Q4_K"),
        Rule(C.FFN_DOWN, "Q5_K", (FIRST_16TH,)),
        Rule(C.FFN_DOWN, "Q4_K", (MORE_BITS,)),
        Rule(C.FFN_DOWN, "Q3_K", (FALCON,)),
        Rule(C.FFN_DOWN, "Q4_K"),
        Rule(C.ATTN_OUTPUT, "Q3_K", (FALCON,)),
        Rule(C.ATTN_OUTPUT, "Q5_K", (EIGHT_EXPERTS,)),
        Rule(C.ATTN_OUTPUT, "Q4_K"),
    ),
    "Q3_K_S": (
        *COMMON,
        Rule(C.ATTN_V, "Q5_K", (SIZE_OF_70B,)),
        Rule(C.ATTN_OUTPUT, "Q3_K", (FALCON,)),
        Rule(C.ATTN_OUTPUT, "Q5_K", (EIGHT_EXPERTS,)),
    ),
    "Q2_K": (
        *COMMON,
        Rule(C.ATTN_V, "Q5_K", (SIZE_OF_70B,)),
        Rule(C.ATTN_V, "Q4_K", (GROUPED,)),
        Rule(C.ATTN_V, "Q3_K"),
        Rule(C.FFN_DOWN, "Q3_K"),
        Rule(C.ATTN_OUTPUT, "Q2_K", (FALCON,)),
        Rule(C.ATTN_OUTPUT, "Q5_K", (EIGHT_EXPERTS,)),
        Rule(C.ATTN_OUTPUT, "Q3_K"),
    ),
    "Q5_1": COMMON,
    "Q5_0": (*COMMON, Rule(C.FFN_DOWN, "Q5_1", (WEIGHTED, FIRST_8TH))),
    "Q4_1": COMMON,
    "Q4_0": (*COMMON, Rule(C.FFN_DOWN, "Q4_1", (WEIGHTED, FIRST_8TH))),
    "IQ4_NL": (*COMMON, *_iq4("IQ4_NL")),
    "IQ4_XS": (*COMMON, *_iq4("IQ4_XS")),
    "MXFP4_MOE": (Rule(None, "MXFP4", (EXPERTS,)), Rule(None, "Q8_0", (NO_EXPERTS,))),
}
