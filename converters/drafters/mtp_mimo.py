"""The MTP heads of MiMo-V2: three dense layers with a window, attention sinks, and values narrower than keys.

Names and facts as llama.cpp's converter (conversion/mimo.py: MimoV2Model) and transformers (`mimo_v2_flash`) have them.
Queries, keys and values are one matrix here, as llama.cpp's graph of the heads wants them (src/models/mimo2.cpp);
MiMo-V2-Flash is published with three.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from convert_drafter.converters.checkpoint import TensorHeader
from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.decoder import feed_forward
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp import (
    IGNORED,
    count_own,
    dropped,
    joining_rules,
    read_depth,
    read_head,
    read_head_dim,
    refuse_scaling,
    shared_rules,
)
from convert_drafter.converters.drafters.rope import read_theta
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.matrices import Part, below
from convert_drafter.converters.plan import TensorRule, plain_name
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Experts, Rope, SlidingWindow, Trunk
from convert_drafter.converters.target import Target

LAYER = "mtp.layers.{j}."
ATTENTION = f"{LAYER}self_attn."
FUSED = re.compile(r"mtp\.layers\.\d{1,9}\.self_attn\.qkv_proj\.weight")
QUERIES = re.compile(r"mtp\.layers\.\d{1,9}\.self_attn\.q_proj\.weight")
RANKS, BLOCK = (8, 4), 128  # of the FP8 releases, in the order in which llama.cpp's converter tries them
# What llama.cpp's graph computes; a config that says otherwise is another model. (path, expected, why)
ASSUMED: tuple[tuple[str, object, str], ...] = (
    ("hidden_act", "silu", "the feed-forward is SwiGLU"),
    ("attention_bias", False, "llama.cpp's MiMo-V2 has no biases"),
    ("tie_word_embeddings", False, "llama.cpp's MiMo-V2 has an output head of its own"),
    ("topk_method", "noaux_tc", "experts are chosen with a bias"),
    ("norm_topk_prob", True, "the weights of the chosen experts add up to one"),
    ("routed_scaling_factor", 1.0, "llama.cpp's MiMo-V2 does not scale the weights of experts"),
    ("n_shared_experts", 0, "llama.cpp's MiMo-V2 has no expert that is always used"),
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the heads of a MiMo-V2. Raises `WrongInput` naming the key that is missing or wrong."""
    reader.enter("text_config")
    for path, expected, why in ASSUMED:
        reader.expect(path, expected, why)
    refuse_scaling(reader)
    depth, count = read_depth(reader), count_own(reader, headers, has_key=False)
    head_dim, heads = read_head_dim(reader), reader.get("head_count", int, "num_attention_heads")
    values = reader.get("value_head_dim", int, "v_head_dim")
    for path, same in (("swa_head_dim", head_dim), ("swa_num_attention_heads", heads), ("swa_v_head_dim", values)):
        reader.expect(path, same, "llama.cpp's MiMo-V2 has them alike in all layers")
    window = reader.get("window.size", int, "sliding_window")
    reader.expect("sliding_window_size", window, "llama.cpp reads sliding_window")
    full, sliding = (reader.get(field, int, key) for field, key in KV_HEADS)
    slides = read_pattern(reader, depth)
    theta, rope = read_turned(reader, head_dim)
    return read_head(
        *("mtp-mimo2", reader, target, count, "intermediate_size", rope),
        head_count=heads,
        kv_head_count=sliding,
        value_head_dim=values,
        attention_value_scale=reader.find("attention_value_scale", float, "attention_value_scale"),
        norm_epsilon=reader.get("norm_epsilon", float, "layernorm_epsilon"),
        window=SlidingWindow(window, (True,) * count),
        trunk=Trunk(
            sliding_layers=slides,
            kv_head_counts=tuple(sliding if slide else full for slide in slides),
            rope_theta=theta,
            experts=read_experts(reader),
            expert_feed_forward_size=reader.get("trunk.expert_feed_forward_size", int, "moe_intermediate_size"),
        ),
    )


KV_HEADS = (("trunk.kv_head_counts", "num_key_value_heads"), ("kv_head_count", "swa_num_key_value_heads"))


def read_pattern(reader: ConfigReader, depth: int) -> tuple[bool, ...]:
    """Which of the target's layers slide; all heads do, as llama.cpp has it (conversion/mimo.py)."""
    pattern = reader.find_list("trunk.sliding_layers", int, "hybrid_layer_pattern")
    if pattern is None:
        raise reader.missing("trunk.sliding_layers", "0 or 1 for each layer", "hybrid_layer_pattern")
    origin = reader.origins["trunk.sliding_layers"]
    if len(pattern) != depth or not set(pattern) <= {0, 1}:
        raise reader.error(origin, f"found {list(pattern)}", f"0 (full) or 1 (sliding) for each of {depth} layers")
    reader.origins["window.layers"] = "the heads of MiMo-V2 slide"
    return tuple(slide == 1 for slide in pattern)


def read_turned(reader: ConfigReader, head_dim: int) -> tuple[float, Rope]:
    """The theta of full layers, and how the heads are turned, as sliding layers are."""
    theta = read_theta(reader, ["full_attention"])
    reader.origins["trunk.rope_theta"] = reader.origins["rope.theta"]
    kinds = [f"rope_parameters.{kind}." for kind in ("full_attention", "sliding_attention")]
    own = reader.get("rope.theta", float, "swa_rope_theta", f"{kinds[1]}rope_theta")
    places = [f"{home}partial_rotary_factor" for home in ("", "rope_parameters.", *kinds)]
    factor = reader.get("rope.dimensions", float, *places)
    if not 0 < factor <= 1:
        raise reader.error(reader.origins["rope.dimensions"], f"found {factor}", "a fraction of the head, in (0, 1]")
    return theta, Rope(own, int(head_dim * factor))


def read_experts(reader: ConfigReader) -> Experts:
    """Of the target's mixtures; the heads have none."""
    return Experts(
        count=reader.get("trunk.experts.count", int, "n_routed_experts"),
        used=reader.get("trunk.experts.used", int, "num_experts_per_tok"),
        scoring=reader.find("trunk.experts.scoring", str, "scoring_func"),
        groups=reader.find("trunk.experts.groups", int, "n_group"),
        groups_used=reader.find("trunk.experts.groups_used", int, "topk_group"),
    )


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """Sinks are there where the config says so; where it says nothing, or there is none, the tensors tell."""
    reader.enter("text_config")
    sinks = reader.find("sinks", bool, "add_swa_attention_sink_bias")
    sink = TensorRule(f"{ATTENTION}attention_sink_bias", Role.ATTN_SINKS, ("heads",), optional=sinks is None)
    return (
        *shared_rules(reader),
        TensorRule(f"{LAYER}input_layernorm.weight", Role.ATTN_NORM, ("hidden",)),
        TensorRule(f"{ATTENTION}qkv_proj.weight", Role.ATTN_QKV, ("qkv rows", "hidden")),
        TensorRule(f"{ATTENTION}o_proj.weight", Role.ATTN_OUTPUT, ("hidden", "head outputs")),
        *([] if sinks is False else [sink]),
        TensorRule(f"{LAYER}pre_mlp_layernorm.weight", Role.FFN_NORM, ("hidden",)),
        *feed_forward(f"{LAYER}mlp."),
        *joining_rules(LAYER),
        TensorRule(f"{LAYER}final_layernorm.weight", Role.NEXTN_OUTPUT_NORM, ("hidden",)),
    )


# --- queries, keys and values in one ---


def joined(headers: Headers, spec: DrafterSpec) -> Headers:
    """The checkpoint's tensors with all queries, all keys and all values of each head below each other in one."""
    found = dict(headers)
    for name, header in headers.items():
        plain = plain_name(name)
        if FUSED.fullmatch(plain) and header.stored:
            found[name] = below(name, list(without_ranks(header, spec)))
        names = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
        if QUERIES.fullmatch(plain) and all(part in headers for part in names):
            one = name.replace("q_proj", "qkv_proj")
            found[one] = below(one, [Part(found.pop(part), 0, headers[part].rows) for part in names])
    return found


def without_ranks(header: TensorHeader, spec: DrafterSpec) -> Iterator[Part]:
    """The FP8 releases have queries, keys and values of each rank that trained them, one rank after the other.

    How many there were is told by the blocks that share a scale, as llama.cpp's converter does it
    (_tp_aware_qkv_dequant in conversion/mimo.py). Raises `WrongInput` where they tell nothing.
    """
    heads, keys = spec.head_count * spec.head_dim, spec.kv_head_count * spec.head_dim
    widths = (heads, keys, spec.kv_head_count * spec.value_width)
    ranks = next((n for n in RANKS if blocks_of(header.rows, n) == -(-header.rows // BLOCK)), None)
    if ranks is None or sum(widths) != header.rows or any(width % ranks for width in widths):
        expected = f"{sum(widths)} rows of {' or '.join(map(str, RANKS))} ranks, each in whole blocks of {BLOCK}"
        raise WrongInput(f"{header.name}: found {header.rows} rows in {header.stored}, expected {expected}")
    before = 0
    for width in widths:
        for rank in range(ranks):
            start = rank * (header.rows // ranks) + before // ranks
            yield Part(header, start, start + width // ranks)
        before += width


def blocks_of(rows: int, ranks: int) -> int | None:
    """How many blocks of rows share a scale where each rank has its own."""
    return None if rows % ranks else ranks * -(-(rows // ranks) // BLOCK)


NO_FACTS = (
    *IGNORED, "auto_map", "add_full_attention_sink_bias", "attention_chunk_size", "attention_projection_layout",
    "hybrid_block_size", "layer_types", "mlp_layer_types", "moe_layer_freq", "moe_router_dtype", "rms_norm_eps",
    "rope_parameters.full_attention.rope_type", "rope_parameters.sliding_attention.rope_type",
)  # fmt: skip
MIMO2 = Kind(
    name="mtp-mimo2",
    summary="MTP heads of a MiMo-V2: three chained layers, of which each drafts one token",
    architectures=("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
    read_spec=read_spec,
    rules=head_rules,
    dropped=dropped,
    ignored=NO_FACTS,
    in_target=True,
    arranged=joined,
)
FAMILIES = (MIMO2,)
