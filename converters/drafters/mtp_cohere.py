"""The MTP head of Cohere2-MoE: one more layer behind the target's last, attention and experts side by side.

Names and facts as transformers (`cohere2_moe`) and llama.cpp's converter have them (conversion/command_r.py:
Cohere2MoeModel). The head's own layer is not in transformers: it attends to everything and is rotated
(src/models/cohere2moe.cpp: graph_mtp).
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import mtp
from convert_drafter.converters.drafters.decoder import MLP, attention
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp_latent import read_dense_layers
from convert_drafter.converters.ops import PERMUTE_ROPE
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Experts, Trunk
from convert_drafter.converters.target import Target

LAYER = "layers.{i}."
RMS, CENTRED = "rms_norm_eps", "layer_norm_eps"
SLIDING, FULL = "sliding_attention", "full_attention"
SHARED = "num_shared_experts"
IGNORED = (
    *mtp.IGNORED, "sliding_window_pattern", "use_embedding_sharing", "use_gated_activation", "use_parallel_embedding",
    "cache_implementation", "order_of_interleaved_layers", "layer_switch",
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a Cohere2-MoE. Raises `WrongInput` naming the key that is missing or wrong."""
    check(reader)
    depth = mtp.read_depth(reader)
    count = mtp.count_appended(reader, headers, depth)
    experts = read_experts(reader)
    epsilon = read_epsilon(reader)
    return mtp.read_head(
        *("mtp-cohere2moe", reader, target, count, "intermediate_size", mtp.read_whole_rope(reader)),
        norm_epsilon=reader.get("norm_epsilon", float, epsilon),
        experts=experts,
        trunk=read_trunk(reader, depth),
        layer_norm_epsilon=reader.get("layer_norm_epsilon", float, CENTRED) if epsilon == CENTRED else None,
        logit_scale=reader.get("logit_scale", float, "logit_scale"),
    )


def check(reader: ConfigReader) -> None:
    """What llama.cpp's graph takes for granted (src/models/cohere2moe.cpp)."""
    reader.expect("hidden_act", "silu", "the feed-forward is SwiGLU")
    reader.expect("attention_bias", False, "llama.cpp's Cohere2-MoE has no biases")
    reader.expect("use_qk_norm", False, "llama.cpp's Cohere2-MoE has no norms of queries and keys")
    reader.expect("use_parallel_block", True, "attention and feed-forward read the same normed state")
    reader.expect("position_embedding_type", "rope_gptj", "llama.cpp rotates neighbouring rows")
    reader.expect("rotary_pct", 1, "llama.cpp rotates whole heads here")
    reader.expect("shared_expert_combination_strategy", "average", "llama.cpp halves the sum with the shared expert")
    reader.expect("prefix_dense_sliding_window_pattern", 1, "llama.cpp rotates the first, dense layers of the target")
    mtp.refuse_scaling(reader)


def read_epsilon(reader: ConfigReader) -> str:
    """The key of the norms in use: RMS norms where they have an epsilon, else norms that take the mean away first."""
    if reader.find("norm_epsilon", float, RMS) is not None:
        reader.ignore(CENTRED)
        return RMS
    if reader.find("norm_epsilon", float, CENTRED) is None:
        raise reader.missing("norm_epsilon", "a finite number", RMS, CENTRED)
    return CENTRED


def read_experts(reader: ConfigReader) -> Experts:
    width, shared = reader.get("feed_forward_size", int, "intermediate_size"), reader.find("shared", int, SHARED)
    scoring = reader.get("experts.scoring", str, "expert_selection_fn")
    normed = reader.get("experts.normed", bool, "norm_topk_prob")
    if scoring == "softmax" and not normed:
        expected = "true: the chosen experts' scores are a softmax of their own, as llama.cpp has it only with true"
        raise reader.error("norm_topk_prob", "found False beside softmax", expected)
    if shared:
        reader.origins["experts.shared_feed_forward_size"] = reader.origins["shared"]
    return Experts(
        count=reader.get("experts.count", int, "num_experts"),
        used=reader.get("experts.used", int, "num_experts_per_tok"),
        shared_feed_forward_size=shared * width if shared else None,
        scoring=scoring,
        normed=normed,
    )


def read_trunk(reader: ConfigReader, depth: int) -> Trunk:
    types = reader.find_list("trunk.sliding_layers", str, "layer_types")
    if types is None:
        raise reader.missing("trunk.sliding_layers", "the type of each layer", "layer_types")
    if wrong := sorted(set(types) - {SLIDING, FULL}):
        raise reader.error("layer_types", f"found {', '.join(wrong)}", f"{SLIDING} or {FULL}")
    width = reader.find("trunk.feed_forward_size", int, "prefix_dense_intermediate_size")
    if width is None:  # as transformers and llama.cpp's converter read it
        width = reader.get("trunk.feed_forward_size", int, "intermediate_size")
    return Trunk(
        dense_layer_count=read_dense_layers(reader),
        feed_forward_size=width,
        window_size=reader.get("trunk.window_size", int, "sliding_window"),
        sliding_layers=tuple(name == SLIDING for name in types),
    )


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """Checkpoints rotate neighbouring rows, the hub halves. A head may have an embedding and an output of its own."""
    return (
        *mtp.shared_rules(reader),
        TensorRule(f"{LAYER}input_layernorm.weight", Role.ATTN_NORM, ("hidden",)),
        *attention(rotary=PERMUTE_ROPE),
        *mtp.expert_rules(MLP),
        *shared_expert_rules(reader),
        *mtp.joining_rules(LAYER),
        *mtp.own_table_rules(LAYER),
    )


def shared_expert_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """There where the config counts one; of no config nothing is known."""
    if reader.raw and not reader.find("shared", int, SHARED):
        return ()
    return mtp.shared_expert_rules(f"{MLP}shared_experts.", optional=not reader.raw)


COHERE2MOE = Kind(
    name="mtp-cohere2moe",
    summary="MTP head of a Cohere2-MoE",
    architectures=("Cohere2MoeForCausalLM",),
    read_spec=read_spec,
    rules=head_rules,
    dropped=mtp.dropped,
    ignored=IGNORED,
    in_target=True,
)
FAMILIES = (COHERE2MOE,)
