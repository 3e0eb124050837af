"""The MTP heads of Qwen: Qwen3.5 and 3.6, dense and mixtures of experts, and Qwen3-Next.

Names and facts as transformers and llama.cpp's converter have them (conversion/qwen.py: _QwenMtpMixin).
"""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.decoder import feed_forward, head_norms
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp import (
    IGNORED,
    count_own,
    dropped,
    expert_rules,
    read_depth,
    read_head,
    read_rope,
    refuse_scaling,
    shared_expert_rules,
    shared_rules,
)
from convert_drafter.converters.ops import PLUS_ONE
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import MROPE_SECTIONS, DrafterSpec, Experts, LinearAttention, Rope
from convert_drafter.converters.target import Target

LAYER = "mtp.layers.{j}."
LINEAR, FULL = "linear_attention", "full_attention"


def read_dense(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a dense target. Raises `WrongInput` naming the key that is missing or wrong."""
    return read_qwen("mtp-qwen35", "intermediate_size", reader, headers, target)


def read_mixture(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a mixture of experts. Raises `WrongInput` naming the key that is missing or wrong."""
    reader.enter("text_config")
    return read_qwen("mtp-qwen35moe", "moe_intermediate_size", reader, headers, target, read_experts(reader))


def read_next(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a Qwen3-Next. Raises `WrongInput` naming the key that is missing or wrong."""
    return read_qwen("mtp-qwen3next", "moe_intermediate_size", reader, headers, target, read_experts(reader))


def read_experts(reader: ConfigReader) -> Experts:
    reader.expect("norm_topk_prob", True, "the weights of the chosen experts add up to one")
    reader.expect("mlp_only_layers", [], "every layer is a mixture")
    reader.expect("decoder_sparse_step", 1, "every layer is a mixture")
    reader.ignore("intermediate_size")  # of a dense layer, of which there is none
    return Experts(
        count=reader.get("experts.count", int, "num_experts"),
        used=reader.get("experts.used", int, "num_experts_per_tok"),
        shared_feed_forward_size=reader.get("experts.shared_feed_forward_size", int, "shared_expert_intermediate_size"),
    )


def read_qwen(
    kind: str,
    width: str,
    reader: ConfigReader,
    headers: Headers,
    target: Target | None,
    experts: Experts | None = None,
) -> DrafterSpec:
    reader.enter("text_config")
    check_qwen(reader)
    is_next = kind == "mtp-qwen3next"
    count = count_own(reader, headers, has_key=not is_next)
    rope = read_rope(reader) if is_next else read_sections(reader, read_rope(reader))
    linear = read_linear(reader, read_depth(reader))
    return read_head(kind, reader, target, count, width, rope, linear_attention=linear, experts=experts)


def check_qwen(reader: ConfigReader) -> None:
    """What the loader takes for granted."""
    reader.expect("hidden_act", "silu", "the feed-forward is SwiGLU")
    reader.expect("attention_bias", False, "llama.cpp's Qwen3.5 has no biases")
    reader.expect("attn_output_gate", True, "the query projection holds a gate for each head")
    reader.expect("mtp_use_dedicated_embeddings", False, "the head shares its target's embedding")
    refuse_scaling(reader)


def read_sections(reader: ConfigReader, rope: Rope) -> Rope:
    """With its M-RoPE sections, which have defaults in transformers and in llama.cpp; here they are facts."""
    sections = reader.find_list("rope.sections", int, "rope_parameters.mrope_section")
    if sections is None:
        raise reader.missing("rope.sections", "three widths", "rope_parameters.mrope_section")
    if len(sections) > MROPE_SECTIONS or 2 * sum(sections) != rope.dimensions:
        expected = f"at most {MROPE_SECTIONS} widths that together are half of {rope.dimensions} rotated dimensions"
        raise reader.error(reader.origins["rope.sections"], f"found {list(sections)}", expected)
    return replace(rope, sections=(*sections, *[0] * (MROPE_SECTIONS - len(sections))))


def read_linear(reader: ConfigReader, depth: int, others: tuple[str, ...] = (FULL,)) -> LinearAttention:
    """The target's linear layers; its `others` may go by several names."""
    types = reader.find_list("linear_attention.layers", str, "layer_types")
    interval = reader.find("linear_attention.interval", int, "full_attention_interval")
    if types is None and interval is not None and interval > 0:  # as transformers and llama.cpp read it
        reader.origins["linear_attention.layers"] = reader.origins["linear_attention.interval"]
        types = tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(depth))
    if types is None:
        places = ("layer_types", "full_attention_interval")
        raise reader.missing("linear_attention.layers", "the type of each layer", *places)
    if wrong := sorted(set(types) - {LINEAR, *others}):
        raise reader.error("layer_types", f"found {', '.join(wrong)}", " or ".join((LINEAR, *others)))
    if len(types) != depth:
        raise reader.error("layer_types", f"found {len(types)} entries", f"num_hidden_layers = {depth}")
    linear = {
        name: reader.get(f"linear_attention.{name}", int, key)
        for name, key in {
            "kernel_size": "linear_conv_kernel_dim",
            "key_head_dim": "linear_key_head_dim",
            "key_head_count": "linear_num_key_heads",
            "value_head_count": "linear_num_value_heads",
            "value_head_dim": "linear_value_head_dim",
        }.items()
    }
    return LinearAttention(**linear, layers=tuple(name == LINEAR for name in types), interval=interval)


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """The head but its feed-forward, and of its target what a runtime needs to load the head alone.

    All norms are published as what they differ from one by.
    """
    return (
        *shared_rules(reader, PLUS_ONE),
        TensorRule(f"{LAYER}input_layernorm.weight", Role.ATTN_NORM, ("hidden",), PLUS_ONE),
        *gated_attention(f"{LAYER}self_attn."),
        TensorRule(f"{LAYER}post_attention_layernorm.weight", Role.FFN_NORM, ("hidden",), PLUS_ONE),
        TensorRule("mtp.fc.weight", Role.NEXTN_PROJ, ("hidden", "embedding and state")),
        TensorRule("mtp.pre_fc_norm_embedding.weight", Role.NEXTN_EMBEDDING_NORM, ("hidden",), PLUS_ONE),
        TensorRule("mtp.pre_fc_norm_hidden.weight", Role.NEXTN_STATE_NORM, ("hidden",), PLUS_ONE),
        TensorRule("mtp.norm.weight", Role.NEXTN_OUTPUT_NORM, ("hidden",), PLUS_ONE),
    )


def gated_attention(attention: str) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{attention}q_proj.weight", Role.ATTN_Q, ("queries and gates", "hidden")),
        TensorRule(f"{attention}k_proj.weight", Role.ATTN_K, ("keys", "hidden")),
        TensorRule(f"{attention}v_proj.weight", Role.ATTN_V, ("keys", "hidden")),
        TensorRule(f"{attention}o_proj.weight", Role.ATTN_OUTPUT, ("hidden", "queries")),
        *head_norms(attention, PLUS_ONE),
    )


def dense_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    return (*head_rules(reader), *feed_forward(f"{LAYER}mlp."))


def mixture_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    return (*head_rules(reader), *mixture(f"{LAYER}mlp."))


def mixture(mlp: str) -> tuple[TensorRule, ...]:
    """A router, experts, and one that is always used behind a gate of its own."""
    return (
        *expert_rules(mlp),
        TensorRule(f"{mlp}shared_expert_gate.weight", Role.FFN_SHARED_ROUTER, ("one", "hidden")),
        *shared_expert_rules(f"{mlp}shared_expert."),
    )


QWEN35 = Kind(
    name="mtp-qwen35",
    summary="MTP head of a dense Qwen3.5 or 3.6: one more layer of its target, drafting token by token",
    architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    read_spec=read_dense,
    rules=dense_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
)
QWEN35MOE = Kind(
    name="mtp-qwen35moe",
    summary="MTP head of a Qwen3.5 or 3.6 mixture of experts",
    architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    read_spec=read_mixture,
    rules=mixture_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
)
QWEN3NEXT = Kind(
    name="mtp-qwen3next",
    summary="MTP head of a Qwen3-Next",
    architectures=("Qwen3NextForCausalLM",),
    read_spec=read_next,
    rules=mixture_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
)
FAMILIES = (QWEN35, QWEN35MOE, QWEN3NEXT)
