"""The MTP head of Hunyuan-V3 (Hy3): one more layer behind the target's last, a mixture of experts.

Names and facts as transformers (`hy_v3`), vLLM (hy_v3_mtp.py) and llama.cpp's converter have them
(conversion/hunyuan.py: HYV3Model).
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import mtp
from convert_drafter.converters.drafters.decoder import MLP, attention, head_norms
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.plan import Dropped, TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Experts, Trunk
from convert_drafter.converters.target import Target

LAYER = "layers.{i}."
WIDTHS = ("moe_intermediate_size", "expert_hidden_dim")  # an expert's width, in transformers and in older readers
SWITCH = "moe_router_enable_expert_bias"
IGNORED = (
    *mtp.IGNORED, "first_k_dense_replace", "mlp_layer_types", "enable_attention_fp32_softmax", "enable_lm_head_fp32",
    "enable_moe_fp32_combine", "use_grouped_mm", "eod_token_id", "sep_token_id",
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a Hunyuan-V3. Raises `WrongInput` naming the key that is missing or wrong."""
    check(reader)
    count = mtp.count_appended(reader, headers, mtp.read_depth(reader))
    experts = read_experts(reader)
    rope = mtp.read_whole_rope(reader)
    return mtp.read_head(
        *("mtp-hy_v3", reader, target, count, WIDTHS[0], rope),
        experts=experts,
        trunk=Trunk(feed_forward_size=reader.get("trunk.feed_forward_size", int, "intermediate_size")),
    )


def check(reader: ConfigReader) -> None:
    """What llama.cpp's graph takes for granted (src/models/hy-v3.cpp)."""
    reader.expect("hidden_act", "silu", "the feed-forward is SwiGLU")
    reader.expect("attention_bias", False, "llama.cpp's Hunyuan-V3 has no biases")
    reader.expect("mlp_bias", False, "llama.cpp's Hunyuan-V3 has no biases")
    reader.expect("qk_norm", True, "queries and keys are normed by head")
    reader.expect("moe_router_use_sigmoid", True, "the head's experts are chosen by sigmoid scores")
    mtp.refuse_scaling(reader)


def read_experts(reader: ConfigReader) -> Experts:
    """Sigmoid scores, a bias for the choice alone, no groups."""
    width = reader.get("feed_forward_size", int, *WIDTHS)
    shared = reader.get("experts.shared_feed_forward_size", int, "num_shared_experts")
    reader.origins["experts.scoring"] = "the routing of Hunyuan-V3"
    return Experts(
        count=reader.get("experts.count", int, "num_experts", "num_local_experts"),
        used=reader.get("experts.used", int, "num_experts_per_tok"),
        shared_feed_forward_size=shared * width,
        scoring="sigmoid",
        normed=reader.get("experts.normed", bool, "route_norm"),
        scale=reader.get("experts.scale", float, "router_scaling_factor"),
    )


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    return (
        *mtp.shared_rules(reader),
        TensorRule(f"{LAYER}input_layernorm.weight", Role.ATTN_NORM, ("hidden",)),
        *attention(),
        *head_norms(),
        TensorRule(f"{LAYER}post_attention_layernorm.weight", Role.FFN_NORM, ("hidden",)),
        TensorRule(f"{MLP}router.gate.weight", Role.FFN_ROUTER, ("experts", "hidden")),
        *choice_rules(reader),
        *mtp.stacked_rules(MLP),
        *mtp.shared_expert_rules(f"{MLP}shared_mlp."),
        *mtp.joining_rules(LAYER),
        TensorRule(f"{LAYER}final_layernorm.weight", Role.NEXTN_OUTPUT_NORM, ("hidden",)),
    )


def choice_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """The bias is there unless the config says otherwise; of no config nothing is known."""
    if reader.find("bias of the choice", bool, SWITCH) is False:
        return ()
    shape = ("experts",)
    return (TensorRule(f"{MLP}expert_bias", Role.FFN_ROUTER_BIAS, shape, optional=not reader.raw),)


def dropped(reader: ConfigReader) -> tuple[Dropped, ...]:
    unused = "the head's states go over its target's output head (vLLM hy_v3_mtp.py)"
    return (*mtp.dropped(reader), Dropped(f"{LAYER}shared_head.weight", unused))


HY_V3 = Kind(
    name="mtp-hy_v3",
    summary="MTP head of a Hunyuan-V3 (Hy3)",
    architectures=("HYV3ForCausalLM",),
    read_spec=read_spec,
    rules=head_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
)
FAMILIES = (HY_V3,)
