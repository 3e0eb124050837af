"""The MTP head of GLM-4.5, 4.6 and 4.7: one more layer behind the target's last, a mixture of experts.

Names and facts as transformers (`glm4_moe`) and llama.cpp's converter have them (conversion/glm.py: Glm4MoeModel).
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.decoder import ATTENTION, MLP, attention
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp import (
    IGNORED,
    count_appended,
    dropped,
    expert_rules,
    joining_rules,
    own_table_rules,
    read_depth,
    read_head,
    read_rope,
    refuse_scaling,
    shared_expert_rules,
    shared_rules,
)
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Experts, Trunk
from convert_drafter.converters.target import Target

LAYER = "layers.{i}."


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a GLM-4.5. Raises `WrongInput` naming the key that is missing or wrong."""
    reader.enter("text_config")
    reader.expect("hidden_act", "silu", "the feed-forward is SwiGLU")
    refuse_scaling(reader)
    count = count_appended(reader, headers, read_depth(reader))
    experts = read_experts(reader)
    rope = read_rope(reader)
    return read_head(
        *("mtp-glm4moe", reader, target, count, "moe_intermediate_size", rope),
        experts=experts,
        trunk=Trunk(
            dense_layer_count=reader.get("trunk.dense_layer_count", int, "first_k_dense_replace"),
            feed_forward_size=reader.get("trunk.feed_forward_size", int, "intermediate_size"),
        ),
    )


def read_experts(reader: ConfigReader) -> Experts:
    """DeepSeek-V3's routing: sigmoid scores, a bias for the choice alone, groups of experts."""
    width = reader.get("feed_forward_size", int, "moe_intermediate_size")
    shared = reader.get("experts.shared_feed_forward_size", int, "n_shared_experts")
    reader.origins["experts.scoring"] = "the routing of GLM-4.5"
    return Experts(
        count=reader.get("experts.count", int, "n_routed_experts"),
        used=reader.get("experts.used", int, "num_experts_per_tok"),
        shared_feed_forward_size=shared * width,
        scoring="sigmoid",
        normed=reader.get("experts.normed", bool, "norm_topk_prob"),
        scale=reader.get("experts.scale", float, "routed_scaling_factor"),
        groups=reader.get("experts.groups", int, "n_group"),
        groups_used=reader.get("experts.groups_used", int, "topk_group"),
    )


def attention_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """Biases and norms of queries and keys are there where the config says so; of no config nothing is known."""
    biased = reader.find("biases", bool, "attention_bias")
    normed = reader.find("norms", bool, "use_qk_norm")
    rules = [*attention()]
    if biased or not reader.raw:
        rules += [
            TensorRule(f"{ATTENTION}q_proj.bias", Role.ATTN_Q_BIAS, ("queries",), optional=not biased),
            TensorRule(f"{ATTENTION}k_proj.bias", Role.ATTN_K_BIAS, ("keys",), optional=not biased),
            TensorRule(f"{ATTENTION}v_proj.bias", Role.ATTN_V_BIAS, ("keys",), optional=not biased),
        ]
    if normed or not reader.raw:
        rules += [
            TensorRule(f"{ATTENTION}q_norm.weight", Role.ATTN_Q_NORM, ("head_dim",), optional=not normed),
            TensorRule(f"{ATTENTION}k_norm.weight", Role.ATTN_K_NORM, ("head_dim",), optional=not normed),
        ]
    return tuple(rules)


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    reader.enter("text_config")
    return appended_rules(reader, attention_rules(reader))


def appended_rules(reader: ConfigReader, attending: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    """A head that is one more layer with experts, and what belongs to it; all of GLM's and DeepSeek's are."""
    return (
        *shared_rules(reader),
        TensorRule(f"{LAYER}input_layernorm.weight", Role.ATTN_NORM, ("hidden",)),
        *attending,
        TensorRule(f"{LAYER}post_attention_layernorm.weight", Role.FFN_NORM, ("hidden",)),
        *expert_rules(MLP),
        TensorRule(f"{MLP}gate.e_score_correction_bias", Role.FFN_ROUTER_BIAS, ("experts",)),
        *shared_expert_rules(f"{MLP}shared_experts."),
        *joining_rules(LAYER),
        *own_table_rules(LAYER),
    )


GLM4MOE = Kind(
    name="mtp-glm4moe",
    summary="MTP head of a GLM-4.5, 4.6 or 4.7",
    architectures=("Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration"),
    read_spec=read_spec,
    rules=head_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
)
FAMILIES = (GLM4MOE,)
