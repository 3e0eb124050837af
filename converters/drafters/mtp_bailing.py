"""The MTP head of Ling 3.0 (Bailing-MoE-V3): latent attention whose heads are gated, behind layers of delta attention.

Names and facts as transformers (`bailing_hybrid`) and llama.cpp's converter have them (conversion/bailingmoe3.py).
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp import (
    IGNORED,
    count_appended,
    dropped,
    expert_rules,
    joining_rules,
    read_depth,
    read_head,
    refuse_scaling,
    shared_expert_rules,
    shared_rules,
)
from convert_drafter.converters.drafters.mtp_latent import parted, read_dense_layers, read_key
from convert_drafter.converters.drafters.rope import read_theta
from convert_drafter.converters.latent import KEYS, VALUES
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DeltaAttention, DrafterSpec, Experts, LatentAttention, Rope, Trunk
from convert_drafter.converters.target import Target

LAYER = "layers.{i}."
ATTENTION, MLP = f"{LAYER}attention.", f"{LAYER}mlp."
CLAMPS = ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list")


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a Ling 3.0. Raises `WrongInput` naming the key that is missing or wrong."""
    check_bailing(reader)
    depth = read_depth(reader)
    count = count_appended(reader, headers, depth)
    plain, rotated = read_key(reader)
    return read_head(
        *("mtp-bailingmoe3", reader, target, count, "moe_intermediate_size", Rope(read_theta(reader, []), rotated)),
        kv_head_count=1,
        head_dim=plain + rotated,
        latent_attention=LatentAttention(
            kv_rank=reader.get("latent_attention.kv_rank", int, "kv_lora_rank"),
            value_head_dim=reader.get("latent_attention.value_head_dim", int, "v_head_dim"),
            query_rank=reader.find("latent_attention.query_rank", int, "q_lora_rank"),
        ),
        delta_attention=read_delta(reader, depth),
        experts=read_experts(reader),
        trunk=Trunk(
            dense_layer_count=read_dense_layers(reader),
            feed_forward_size=reader.get("trunk.feed_forward_size", int, "intermediate_size"),
        ),
    )


def check_bailing(reader: ConfigReader) -> None:
    """What llama.cpp's converter and loader take for granted."""
    refuse_scaling(reader)
    heads = reader.get("head_count", int, "num_attention_heads")
    reader.expect("num_key_value_heads", heads, "each head has keys and values of its own, out of one latent state")
    reader.expect("hidden_act", "silu", "the feed-forward is SwiGLU")
    for bias in ("attention_bias", "use_bias", "use_qkv_bias"):
        reader.expect(bias, False, "llama.cpp's latent attention has no biases")
    for path in ("partial_rotary_factor", "rope_parameters.partial_rotary_factor"):
        reader.expect(path, 1, "all of qk_rope_head_dim is rotated")
    for path in CLAMPS:
        reader.expect(path, None, "llama.cpp keeps a limit for each layer, and a head's is not known")
    for key, value in (("no_kda_lora", True), ("kda_safe_gate", True)):
        if (found := reader.get(key, bool, key)) is not value:
            raise reader.error(key, f"found {found}", f"{value}: llama.cpp has no other delta attention")
    gate = reader.get("gate", str, "gated_attention_proj_granularity_type")
    if gate != "head_wise":
        raise reader.error("gated_attention_proj_granularity_type", f"found {gate!r}", "'head_wise': a gate for a head")
    reader.expect("score_function", "sigmoid", "transformers computes no other scores")
    reader.ignore("pretraining_tp", "mtp_loss_scaling_factor", "num_mtp_layers")


def read_delta(reader: ConfigReader, depth: int) -> DeltaAttention:
    """All layers but the last of each group; transformers and llama.cpp read a group that is cut short differently."""
    size = reader.get("delta_attention.layers", int, "layer_group_size")
    if size < 1 or depth % size:
        raise reader.error("layer_group_size", f"found {size}", f"a divisor of num_hidden_layers = {depth}")
    types = reader.find_list("delta_attention.layers", str, "layer_types")
    layers = tuple((i + 1) % size != 0 for i in range(depth))
    if types is not None and tuple(name == "linear_attention" for name in types) != layers:
        raise reader.error("layer_types", f"found {list(types)}", f"full_attention for every layer_group_size = {size}")
    return DeltaAttention(
        kernel_size=reader.get("delta_attention.kernel_size", int, "short_conv_kernel_size"),
        head_dim=reader.get("delta_attention.head_dim", int, "head_dim"),
        lower_bound=reader.get("delta_attention.lower_bound", float, "kda_lower_bound"),
        layers=layers,
    )


def read_experts(reader: ConfigReader) -> Experts:
    width = reader.get("feed_forward_size", int, "moe_intermediate_size")
    shared = reader.get("experts.shared_feed_forward_size", int, "moe_shared_expert_intermediate_size")
    count = reader.get("shared experts", int, "num_shared_experts", "n_shared_experts")
    if shared != count * width:
        expected = f"{count * width}, {count} shared experts of {width}"
        raise reader.error("moe_shared_expert_intermediate_size", f"found {shared}", expected)
    reader.origins["experts.scoring"] = "the routing of Ling 3.0"
    return Experts(
        count=reader.get("experts.count", int, "num_experts"),
        used=reader.get("experts.used", int, "num_experts_per_tok"),
        shared_feed_forward_size=shared,
        scoring="sigmoid",
        normed=reader.get("experts.normed", bool, "norm_topk_prob"),
        scale=reader.get("experts.scale", float, "routed_scaling_factor"),
        groups=reader.get("experts.groups", int, "n_group"),
        groups_used=reader.get("experts.groups_used", int, "topk_group"),
    )


def query_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """Out of a narrow state where the config gives it a width; of no config nothing is known."""
    narrow = reader.find("rank", int, "q_lora_rank") is not None
    rules = []
    if narrow or not reader.raw:
        rules += [
            TensorRule(f"{ATTENTION}q_a_proj.weight", Role.ATTN_Q_A, ("query_rank", "hidden"), optional=not narrow),
            TensorRule(f"{ATTENTION}q_a_layernorm.weight", Role.ATTN_Q_A_NORM, ("query_rank",), optional=not narrow),
            TensorRule(f"{ATTENTION}q_b_proj.weight", Role.ATTN_Q_B, ("queries", "query_rank"), optional=not narrow),
        ]
    if not narrow:
        absent = not reader.raw
        rules += [TensorRule(f"{ATTENTION}q_proj.weight", Role.ATTN_Q, ("queries", "hidden"), optional=absent)]
    return tuple(rules)


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    both = f"{ATTENTION}kv_b_proj.weight"
    return (
        *shared_rules(reader, embedding="word_embeddings"),
        TensorRule(f"{LAYER}input_layernorm.weight", Role.ATTN_NORM, ("hidden",)),
        *query_rules(reader),
        TensorRule(f"{ATTENTION}kv_a_proj_with_mqa.weight", Role.ATTN_KV_A, ("kv_rank and rotated", "hidden")),
        TensorRule(f"{ATTENTION}kv_a_layernorm.weight", Role.ATTN_KV_A_NORM, ("kv_rank",)),
        TensorRule(both + KEYS, Role.ATTN_K_B, ("heads", "kv_rank", "unrotated")),
        TensorRule(both + VALUES, Role.ATTN_V_B, ("heads", "value_head_dim", "kv_rank")),
        TensorRule(f"{ATTENTION}g_proj.weight", Role.ATTN_GATE, ("heads", "hidden")),
        TensorRule(f"{ATTENTION}dense.weight", Role.ATTN_OUTPUT, ("hidden", "values")),
        TensorRule(f"{LAYER}post_attention_layernorm.weight", Role.FFN_NORM, ("hidden",)),
        *expert_rules(MLP),
        TensorRule(f"{MLP}gate.expert_bias", Role.FFN_ROUTER_BIAS, ("experts",)),
        *shared_expert_rules(f"{MLP}shared_experts."),
        *joining_rules(LAYER),
        TensorRule(f"{LAYER}final_layernorm.weight", Role.NEXTN_OUTPUT_NORM, ("hidden",)),
    )


BAILINGMOE3 = Kind(
    name="mtp-bailingmoe3",
    summary="MTP head of a Ling 3.0 (Bailing-MoE-V3)",
    architectures=("BailingMoeV3ForCausalLM",),
    read_spec=read_spec,
    rules=head_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
    arranged=parted,
)
FAMILIES = (BAILINGMOE3,)
