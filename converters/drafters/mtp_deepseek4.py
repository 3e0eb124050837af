"""The MTP head of DeepSeek-V4: a layer with hyper-connections, one key for all heads, and experts.

It reads all streams of its target's last state, and makes one of its own at its end. Names and facts as the release's
own inference code, transformers (`deepseek_v4`, which leaves heads out) and llama.cpp's converter have them
(conversion/deepseek.py: DeepseekV4Model).
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import mtp
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp_latent import read_indexer
from convert_drafter.converters.drafters.rope import read_scaling, read_theta
from convert_drafter.converters.matrices import join_columns
from convert_drafter.converters.plan import Dropped, TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import (
    Compression,
    DrafterSpec,
    Experts,
    Rope,
    SharedKey,
    SlidingWindow,
    Streams,
    Trunk,
)
from convert_drafter.converters.target import Target

BLOCK = "mtp.{j}."
ATTENTION, MIXTURE = f"{BLOCK}attn.", f"{BLOCK}ffn."
SCORING = "sqrtsoftplus"
IGNORED = (*mtp.IGNORED, "expert_dtype")  # the tensors tell


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a DeepSeek-V4. Raises `WrongInput` naming the key that is missing or wrong."""
    check(reader)
    count, depth = mtp.count_blocks(reader, headers), mtp.read_depth(reader)
    rope = Rope(read_theta(reader, []), reader.get("rope.dimensions", int, "qk_rope_head_dim"))
    reader.origins["window.layers"] = "every layer that keeps all its keys slides"
    return mtp.read_head(
        *("mtp-deepseek4", reader, target, count, "moe_intermediate_size", rope),
        kv_head_count=read_shared_key_count(reader),
        window=SlidingWindow(reader.get("window.size", int, "sliding_window"), (True,) * count),
        shared_key=SharedKey(
            query_rank=reader.get("shared_key.query_rank", int, "q_lora_rank"),
            output_groups=reader.get("shared_key.output_groups", int, "o_groups"),
            output_rank=reader.get("shared_key.output_rank", int, "o_lora_rank"),
        ),
        streams=Streams(
            count=reader.get("streams.count", int, "hc_mult"),
            iterations=reader.get("streams.iterations", int, "hc_sinkhorn_iters"),
            epsilon=reader.get("streams.epsilon", float, "hc_eps"),
        ),
        experts=read_experts(reader),
        indexer=read_indexer(reader),
        compression=read_compression(reader, depth, count),
        trunk=Trunk(hash_layer_count=reader.get("trunk.hash_layer_count", int, "num_hash_layers")),
    )


def check(reader: ConfigReader) -> None:
    """What llama.cpp's graph takes for granted (src/models/deepseek4.cpp)."""
    reader.expect("hidden_act", "silu", "the feed-forward is SwiGLU")
    for bias in ("attention_bias", "mlp_bias"):
        reader.expect(bias, False, "llama.cpp's DeepSeek-V4 has no biases")
    reader.expect("tie_word_embeddings", False, "llama.cpp's DeepSeek-V4 loads an output head")
    reader.expect("topk_method", "noaux_tc", "experts are chosen with a bias")
    for groups in ("n_group", "topk_group"):
        reader.expect(groups, 1, "experts are chosen out of all there are")


def read_shared_key_count(reader: ConfigReader) -> int:
    count = reader.get("kv_head_count", int, "num_key_value_heads")
    if count != 1:
        raise reader.error("num_key_value_heads", f"found {count}", "1: all heads share a key, which is its own value")
    return count


def read_experts(reader: ConfigReader) -> Experts:
    width = reader.get("feed_forward_size", int, "moe_intermediate_size")
    shared = reader.get("experts.shared_feed_forward_size", int, "n_shared_experts")
    scoring = reader.get("experts.scoring", str, "scoring_func")
    if scoring != SCORING:
        raise reader.error("scoring_func", f"found {scoring!r}", f"{SCORING!r}: llama.cpp's loader takes no other")
    return Experts(
        count=reader.get("experts.count", int, "n_routed_experts"),
        used=reader.get("experts.used", int, "num_experts_per_tok"),
        shared_feed_forward_size=shared * width,
        scoring=scoring,
        normed=reader.get("experts.normed", bool, "norm_topk_prob"),
        scale=reader.get("experts.scale", float, "routed_scaling_factor"),
        limit=reader.get("experts.limit", float, "swiglu_limit"),
    )


def read_compression(reader: ConfigReader, depth: int, count: int) -> Compression:
    """A ratio for each layer of the target and, behind them, of the head, whose own are 0."""
    ratios = reader.find_list("compression.ratios", int, "compress_ratios")
    if ratios is None:
        raise reader.missing("compression.ratios", "positions a key for each layer", "compress_ratios")
    if len(ratios) != depth + count or any(ratios[depth:]):
        expected = f"{depth + count}: one for each layer of the target, then a 0 for each of the head"
        raise reader.error("compress_ratios", f"found {len(ratios)} entries that end in {list(ratios[-2:])}", expected)
    theta = reader.get("compression.theta", float, "compress_rope_theta")
    scaling = read_scaling(reader, ("yarn",))
    for name in [name for name in reader.origins if name.startswith("rope.scaling.")]:
        reader.origins[f"compression.{name.removeprefix('rope.')}"] = reader.origins.pop(name)
    return Compression(tuple(ratios[:depth]), theta, scaling)


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    return (
        TensorRule("embed.weight", Role.TOKEN_EMBEDDING, ("vocab", "hidden")),
        TensorRule("norm.weight", Role.OUTPUT_NORM, ("hidden",)),
        TensorRule("head.weight", Role.OUTPUT, ("vocab", "hidden")),
        TensorRule("mtp.0.hc_head_fn", Role.STREAMS_OUT, ("streams", "all streams")),
        TensorRule("mtp.0.hc_head_base", Role.STREAMS_OUT_BASE, ("streams",)),
        TensorRule("mtp.0.hc_head_scale", Role.STREAMS_OUT_SCALE, ("one",)),
        TensorRule(f"{BLOCK}attn_norm.weight", Role.ATTN_NORM, ("hidden",)),
        *stream_rules("attn", Role.ATTN_STREAMS, Role.ATTN_STREAMS_BASE, Role.ATTN_STREAMS_SCALE),
        TensorRule(f"{ATTENTION}attn_sink", Role.ATTN_SINKS, ("heads",)),
        TensorRule(f"{ATTENTION}wq_a.weight", Role.ATTN_Q_A, ("query_rank", "hidden")),
        TensorRule(f"{ATTENTION}q_norm.weight", Role.ATTN_Q_A_NORM, ("query_rank",)),
        TensorRule(f"{ATTENTION}wq_b.weight", Role.ATTN_Q_B, ("queries", "query_rank")),
        TensorRule(f"{ATTENTION}wkv.weight", Role.ATTN_KV, ("head_dim", "hidden")),
        TensorRule(f"{ATTENTION}kv_norm.weight", Role.ATTN_KV_A_NORM, ("head_dim",)),
        TensorRule(f"{ATTENTION}wo_a.weight", Role.ATTN_OUTPUT_A, ("outputs of groups", "heads of a group")),
        TensorRule(f"{ATTENTION}wo_b.weight", Role.ATTN_OUTPUT_B, ("hidden", "outputs of groups")),
        TensorRule(f"{BLOCK}ffn_norm.weight", Role.FFN_NORM, ("hidden",)),
        *stream_rules("ffn", Role.FFN_STREAMS, Role.FFN_STREAMS_BASE, Role.FFN_STREAMS_SCALE),
        *mixture_rules(),
        *mtp.joining_rules(BLOCK),
        TensorRule(f"{BLOCK}norm.weight", Role.NEXTN_OUTPUT_NORM, ("hidden",)),
    )


def stream_rules(part: str, weights: Role, base: Role, scale: Role) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{BLOCK}hc_{part}_fn", weights, ("mixed streams", "all streams")),
        TensorRule(f"{BLOCK}hc_{part}_base", base, ("mixed streams",)),
        TensorRule(f"{BLOCK}hc_{part}_scale", scale, ("three",)),
    )


def mixture_rules() -> tuple[TensorRule, ...]:
    """Gate, down and up, in the order of their numbers."""
    experts, shared = f"{MIXTURE}experts.", f"{MIXTURE}shared_experts."
    up, down = ("shared_feed_forward", "hidden"), ("hidden", "shared_feed_forward")
    return (
        TensorRule(f"{MIXTURE}gate.weight", Role.FFN_ROUTER, ("experts", "hidden")),
        TensorRule(f"{MIXTURE}gate.bias", Role.FFN_ROUTER_BIAS, ("experts",)),
        TensorRule(f"{experts}w1.weight", Role.FFN_GATE_EXPERTS, ("experts", "feed_forward", "hidden")),
        TensorRule(f"{experts}w2.weight", Role.FFN_DOWN_EXPERTS, ("experts", "hidden", "feed_forward")),
        TensorRule(f"{experts}w3.weight", Role.FFN_UP_EXPERTS, ("experts", "feed_forward", "hidden")),
        TensorRule(f"{shared}w1.weight", Role.FFN_GATE_SHARED, up),
        TensorRule(f"{shared}w2.weight", Role.FFN_DOWN_SHARED, down),
        TensorRule(f"{shared}w3.weight", Role.FFN_UP_SHARED, up),
    )


def dropped(reader: ConfigReader) -> tuple[Dropped, ...]:
    return (Dropped(f"{MIXTURE}gate.bias_vl", "the choice of experts for tokens of an image, which no head drafts"),)


def joined(headers: Headers, spec: DrafterSpec) -> Headers:
    """Embedding and state have a projection each, whose outputs are added up: one over both side by side."""
    return join_columns(headers, "e_proj", "h_proj", "eh_proj")


DEEPSEEK4 = Kind(
    name="mtp-deepseek4",
    summary="MTP head of a DeepSeek-V4",
    architectures=("DeepseekV4ForCausalLM",),
    read_spec=read_spec,
    rules=head_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
    arranged=joined,
)
FAMILIES = (DEEPSEEK4,)
