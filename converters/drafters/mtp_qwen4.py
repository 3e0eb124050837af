"""The MTP head of Qwen4Exp: one more layer of several streams, with sparse attention and a mixture of experts.

Names and facts as transformers (`qwen4_exp`) and llama.cpp's converter (conversion/qwen4exp.py) have them. The head
knows nothing of its target's n-gram embedding. Norms are published as what they differ from one by.
"""

from __future__ import annotations

import re

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp import (
    IGNORED,
    count_own,
    dropped,
    read_depth,
    read_head,
    read_rope,
    shared_rules,
)
from convert_drafter.converters.drafters.mtp_qwen import (
    FULL,
    LAYER,
    check_qwen,
    gated_attention,
    mixture,
    read_experts,
    read_linear,
    read_sections,
)
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.matrices import Part, below, beside
from convert_drafter.converters.ops import PLUS_ONE
from convert_drafter.converters.plan import TensorRule, plain_name
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Indexer, Streams
from convert_drafter.converters.target import Target

FULLS = (FULL, "indexed_attention")  # as published, and as transformers saves it
INDEXER = f"{LAYER}self_attn.indexer."
BOTH = re.compile(r"mtp\.layers\.\d{1,9}\.self_attn\.indexer\.index_qk_proj\.weight")
QUERIES, KEY = " (queries)", " (key)"  # behind the name of the matrix they are parts of
JOINING = ("fc_embedding", "fc_hidden")  # in the order of the columns that llama.cpp's `eh_proj` has


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a Qwen4Exp. Raises `WrongInput` naming the key that is missing or wrong."""
    reader.enter("text_config")
    check_qwen(reader)
    reader.expect("output_gate_type", "sigmoid", "llama.cpp's linear attention has no other gate")
    count = count_own(reader, headers)
    rope = read_sections(reader, read_rope(reader))
    check_layers(reader, count, rope.theta)
    return read_head(
        *("mtp-qwen4exp", reader, target, count, "moe_intermediate_size", rope),
        linear_attention=read_linear(reader, read_depth(reader), FULLS),
        experts=read_experts(reader),
        indexer=read_indexer(reader),
        streams=Streams(
            count=reader.get("streams.count", int, "hc_count"),
            rank=reader.get("streams.rank", int, "hc_lowrank"),
        ),
    )


def check_layers(reader: ConfigReader, count: int, theta: float) -> None:
    """What the config says of the head alone, which llama.cpp takes for its target's."""
    types = reader.find_list("head's layers", str, "mtp.layer_types")
    if types is not None and (len(types) != count or set(types) - set(FULLS)):
        place = reader.origins["head's layers"]
        raise reader.error(place, f"found {list(types)}", f"{count} of {FULL}: llama.cpp's head has no other layers")
    reader.expect("mtp.rope_theta", theta, "llama.cpp turns the head as its target")
    reader.expect("mtp.mtp_use_hidden_state_from_layer", None, "llama.cpp's head reads the last layer's state")
    reader.expect("mtp.hybrid", True, "no other head is known")


def read_indexer(reader: ConfigReader) -> Indexer:
    """What chooses positions for the target's full layers and for the head's."""
    reader.expect("indexer_kv_heads", 1, "llama.cpp's indexer has one key for all heads")
    return Indexer(
        head_count=reader.get("indexer.head_count", int, "indexer_n_heads"),
        head_dim=reader.get("indexer.head_dim", int, "indexer_head_dim"),
        top_k=reader.get("indexer.top_k", int, "indexer_budget"),
        pool_size=reader.get("indexer.pool_size", int, "indexer_compress_ratio"),
    )


# --- tensors ---


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    both = f"{INDEXER}index_qk_proj.weight"
    return (
        *shared_rules(reader, norm=None),
        *mixing(f"{LAYER}attn_hyper_connection.", Role.ATTN_MIX_NORM, Role.ATTN_MIX_DOWN, Role.ATTN_MIX_UP),
        shares(f"{LAYER}attn_hyper_connection.", Role.ATTN_SHARES),
        *gated_attention(f"{LAYER}self_attn."),
        TensorRule(both + QUERIES, Role.INDEXER_Q_PROJ, ("indexer_queries", "hidden")),
        TensorRule(both + KEY, Role.INDEXER_K_PROJ, ("indexer_head_dim", "hidden")),
        TensorRule(f"{INDEXER}q_layernorm.weight", Role.INDEXER_Q_NORM, ("indexer_head_dim",), PLUS_ONE),
        TensorRule(f"{INDEXER}k_layernorm.weight", Role.INDEXER_K_NORM, ("indexer_head_dim",), PLUS_ONE),
        *mixing(f"{LAYER}mlp_hyper_connection.", Role.FFN_MIX_NORM, Role.FFN_MIX_DOWN, Role.FFN_MIX_UP),
        shares(f"{LAYER}mlp_hyper_connection.", Role.FFN_SHARES),
        *mixture(f"{LAYER}mlp."),
        TensorRule(joined_name("mtp."), Role.NEXTN_PROJ, ("hidden", "embedding and state")),
        TensorRule("mtp.pre_fc_norm_embedding.weight", Role.NEXTN_EMBEDDING_NORM, ("hidden",), PLUS_ONE),
        TensorRule("mtp.pre_fc_norm_hidden.weight", Role.NEXTN_STATE_NORM, ("all streams",), PLUS_ONE),
        *mixing("mtp.hyper_connection_mixer.", Role.NEXTN_MIX_NORM, Role.NEXTN_MIX_DOWN, Role.NEXTN_MIX_UP),
    )


def mixing(place: str, norm: Role, down: Role, up: Role) -> tuple[TensorRule, ...]:
    """What makes one state of all streams."""
    return (
        TensorRule(f"{place}hc_norm.weight", norm, ("all streams",), PLUS_ONE),
        TensorRule(f"{place}input_mix_weight_down.weight", down, ("mixing_rank", "all streams")),
        TensorRule(f"{place}input_mix_weight_up.weight", up, ("all streams", "mixing_rank")),
    )


def shares(place: str, role: Role) -> TensorRule:
    return TensorRule(f"{place}block_inject_weight.weight", role, ("streams", "all streams"))


def arranged(headers: Headers, spec: DrafterSpec) -> Headers:
    """The indexer's queries and key apart, and what joins embedding and state in one matrix, as llama.cpp has them."""
    found = dict(headers)
    for name, header in headers.items():
        if BOTH.fullmatch(plain_name(name)) and spec.indexer is not None:
            del found[name]
            end = min(spec.indexer.head_count * spec.indexer.head_dim, header.rows)
            for which, part in {QUERIES: Part(header, 0, end), KEY: Part(header, end, header.rows)}.items():
                found[name + which] = below(name + which, [part])
    return joined(found)


def joined(headers: Headers) -> Headers:
    """Both at once, e(x) + h(y), is one matrix over x beside y. Raises `WrongInput` where one is there alone."""
    found, left, right = dict(headers), *(f"{name}.weight" for name in JOINING)
    places = {name.removesuffix(end) for name in headers for end in (left, right) if plain_name(name) == f"mtp.{end}"}
    for place in sorted(places):
        if absent := [place + end for end in (left, right) if place + end not in headers]:
            raise WrongInput(f"{absent[0]}: missing, expected {' and '.join(JOINING)} to join embedding and state")
        name = joined_name(place)
        found[name] = beside(name, found.pop(place + left), found.pop(place + right))
    return found


def joined_name(place: str) -> str:
    return f"{place}{JOINING[0]}.weight beside {JOINING[1]}.weight"


NO_FACTS = (
    *IGNORED, "heads_per_ngram", "make_ngram_vocab_size_divisible_by", "ngram_size", "ngram_vocab_size_base",
    "ple_conv_kernel_size", "ple_embed_dim", "ple_layer_ids", "seed", "split_ngram_parts",
)  # fmt: skip
QWEN4EXP = Kind(
    name="mtp-qwen4exp",
    summary="MTP head of a Qwen4Exp: several residual streams, sparse attention and a mixture of experts",
    architectures=("Qwen4ExpForConditionalGeneration", "Qwen4ExpForCausalLM"),
    read_spec=read_spec,
    rules=head_rules,
    dropped=dropped,
    ignored=NO_FACTS,
    in_target=True,
    arranged=arranged,
)
FAMILIES = (QWEN4EXP,)
