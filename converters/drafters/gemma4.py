"""What the layers of Gemma 4 are, whoever uses them to draft: tensors, and how full layers turn their heads.

Names as transformers 5 has them (models/gemma4); what a runtime computes as llama.cpp does (src/models/gemma4.cpp).
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.decoder import ATTENTION, feed_forward
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Rope

FULL, SLIDING = "rope_parameters.full_attention", "rope_parameters.sliding_attention"
PROPORTIONAL, DEFAULT = "proportional", "default"
ROPE_FACTORS = "rope_factors"  # our name of what the proportion comes to
STAYS = 1e30  # what the frequency of a pair that does not turn is divided by (generate_extra_tensors)
GELU = "gelu_pytorch_tanh"
NO_GRAPH = "llama.cpp has no graph for it in a drafter"
# What is another model, whichever drafter's layers these are. (path, expected, why)
ASSUMED: tuple[tuple[str, object, str], ...] = (
    ("attention_bias", False, "llama.cpp's Gemma-4 drafters have no biases"),
    ("enable_moe_block", False, f"a mixture of experts: {NO_GRAPH}"),
    ("hidden_size_per_layer_input", 0, f"an input of each layer's own: {NO_GRAPH}"),
)


def read_full_rope(reader: ConfigReader, head_dim: int, kinds: tuple[str, ...], home: str = FULL) -> Rope:
    """Of full layers, in which the first pairs of a head turn and the others stay, or all turn.

    `kinds` are the types that llama.cpp's converter takes of this drafter, `home` where they are stated.
    """
    kind = reader.get("rope type", str, f"{home}.rope_type")
    if kind not in kinds:
        expected = f"{' or '.join(map(repr, kinds))}: llama.cpp's converter takes no other"
        raise reader.error(reader.origins["rope type"], f"found {kind!r}", expected)
    reader.expect(f"{home}.factor", 1, "llama.cpp does not divide frequencies of this kind")
    theta = reader.get("rope.theta", float, f"{home}.rope_theta")
    reader.origins["rope.dimensions"] = reader.origins["head_dim"]
    if kind == DEFAULT:
        reader.expect(f"{home}.partial_rotary_factor", 1, "llama.cpp turns whole heads of this type")
        return Rope(theta, head_dim)
    proportion = reader.get("rope.proportion", float, f"{home}.partial_rotary_factor")
    return Rope(theta, head_dim, proportion=proportion)


def layer_rules() -> tuple[TensorRule, ...]:
    """A layer but for its keys and values: norms before and after both halves, and one number that scales it."""
    layer = "layers.{i}."
    return (
        TensorRule(f"{layer}input_layernorm.weight", Role.ATTN_NORM, ("hidden",)),
        TensorRule(f"{ATTENTION}q_proj.weight", Role.ATTN_Q, ("queries", "hidden")),
        TensorRule(f"{ATTENTION}q_norm.weight", Role.ATTN_Q_NORM, ("head_dim",)),
        TensorRule(f"{ATTENTION}o_proj.weight", Role.ATTN_OUTPUT, ("hidden", "queries")),
        TensorRule(f"{layer}post_attention_layernorm.weight", Role.ATTN_POST_NORM, ("hidden",)),
        TensorRule(f"{layer}pre_feedforward_layernorm.weight", Role.FFN_NORM, ("hidden",)),
        *feed_forward(),
        TensorRule(f"{layer}post_feedforward_layernorm.weight", Role.FFN_POST_NORM, ("hidden",)),
        TensorRule(f"{layer}layer_scalar", Role.LAYER_SCALE, ("one",)),
    )


def made(spec: DrafterSpec) -> dict[str, tuple[float, ...]]:
    """What each pair's frequency is divided by in full layers: the first turn as in a whole head, the others stay."""
    if spec.rope.proportion is None:
        return {}
    pairs, turning = spec.head_dim // 2, int(spec.head_dim * spec.rope.proportion / 2)
    return {ROPE_FACTORS: (1.0,) * turning + (STAYS,) * (pairs - turning)}
