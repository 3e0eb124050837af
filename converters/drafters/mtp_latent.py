"""MTP heads whose layer has multi-head latent attention (MLA): those of GLM-4.7-Flash, GLM-5 and DeepSeek-V3.2.

One more layer behind the target's last, like GLM-4.5's; only the attention is another one, with an indexer in the last
two. Names and facts as transformers (`glm4_moe_lite`, `glm_moe_dsa`, `deepseek_v32`) and llama.cpp's converter have
them (conversion/glm.py, conversion/deepseek.py).
"""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.decoder import ATTENTION
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp import (
    IGNORED,
    count_appended,
    dropped,
    read_depth,
    read_head,
    refuse_scaling,
)
from convert_drafter.converters.drafters.mtp_glm import appended_rules, read_experts
from convert_drafter.converters.drafters.rope import read_scaling, read_theta
from convert_drafter.converters.latent import KEYS, VALUES, part_keys_values
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import (
    DrafterSpec,
    Indexer,
    LatentAttention,
    Rope,
    RopeScaling,
    Trunk,
    yarn_attention,
)
from convert_drafter.converters.target import Target

INDEXER = f"{ATTENTION}indexer."
MSCALES = ("mscale", "mscale_all_dim")
FULL, SHARED = "full", "shared"  # what a layer does for its choice of positions, in transformers' words
KEY_VALUE = f"{ATTENTION}kv_b_proj.weight"


def read_flash(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a GLM-4.7-Flash. Raises `WrongInput` naming the key that is missing or wrong."""
    refuse_scaling_of(reader)
    return read_latent("mtp-deepseek2", reader, headers, target)


def read_dsa(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a GLM-5. Raises `WrongInput` naming the key that is missing or wrong."""
    refuse_scaling_of(reader)
    reader.expect("indexer_rope_interleave", True, "llama.cpp rotates neighbouring dimensions of this indexer")
    reader.ignore("index_share_for_mtp_iteration")  # llama.cpp's head looks at every position
    indexer = replace(read_indexer(reader), layers=read_choosing_layers(reader))
    return read_latent("mtp-glm-dsa", reader, headers, target, indexer=indexer)


def read_v32(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a DeepSeek-V3.2. Raises `WrongInput` naming the key that is missing or wrong."""
    reader.enter("text_config")
    reader.expect("indexer_rope_interleave", False, "llama.cpp rotates halves of this indexer")
    return read_latent("mtp-deepseek32", reader, headers, target, read_yarn(reader), read_indexer(reader))


def refuse_scaling_of(reader: ConfigReader) -> None:
    reader.enter("text_config")
    refuse_scaling(reader)


def read_latent(
    kind: str,
    reader: ConfigReader,
    headers: Headers,
    target: Target | None,
    scaling: RopeScaling | None = None,
    indexer: Indexer | None = None,
) -> DrafterSpec:
    reader.enter("text_config")
    check_latent(reader)
    count = count_appended(reader, headers, read_depth(reader))
    heads = reader.get("head_count", int, "num_attention_heads")
    reader.expect("num_key_value_heads", heads, "each head has keys and values of its own, out of one latent state")
    plain, rotated = read_key(reader)
    reader.expect("head_dim", rotated, "transformers' other name of qk_rope_head_dim")
    experts = read_experts(reader)
    return read_head(
        *(kind, reader, target, count, "moe_intermediate_size", Rope(read_theta(reader, []), rotated, scaling)),
        kv_head_count=1,
        head_dim=plain + rotated,
        latent_attention=LatentAttention(
            query_rank=reader.get("latent_attention.query_rank", int, "q_lora_rank"),
            kv_rank=reader.get("latent_attention.kv_rank", int, "kv_lora_rank"),
            value_head_dim=reader.get("latent_attention.value_head_dim", int, "v_head_dim"),
        ),
        indexer=indexer,
        experts=experts,
        trunk=Trunk(
            dense_layer_count=read_dense_layers(reader),
            feed_forward_size=reader.get("trunk.feed_forward_size", int, "intermediate_size"),
        ),
    )


def check_latent(reader: ConfigReader) -> None:
    """What every loader takes for granted."""
    reader.expect("hidden_act", "silu", "the feed-forward is SwiGLU")
    reader.expect("attention_bias", False, "llama.cpp's latent attention has no biases")
    reader.expect("rope_interleave", True, "llama.cpp rotates neighbouring dimensions in these architectures")
    for path in ("partial_rotary_factor", "rope_parameters.partial_rotary_factor"):
        reader.expect(path, 1, "all of qk_rope_head_dim is rotated")
    reader.expect("moe_layer_freq", 1, "every layer behind the dense ones is a mixture")
    reader.expect("scoring_func", "sigmoid", "transformers computes no other scores")
    reader.expect("topk_method", "noaux_tc", "experts are chosen by groups and with a bias")
    reader.ignore("ep_size", "pretraining_tp")


def read_yarn(reader: ConfigReader) -> RopeScaling | None:
    """YaRN as DeepSeek has it: `mscale_all_dim` scales all scores, and what rotates by `mscale` in proportion to it."""
    scaling = read_scaling(reader, ("yarn",), MSCALES)
    if scaling is None:
        return None
    if scaling.attention_factor is not None:
        where = reader.origins["rope.scaling.attention_factor"]
        raise reader.error(where, f"found {scaling.attention_factor:g}", f"none beside {' and '.join(MSCALES)}")
    mscale, multiplier = (
        reader.get(field, float, *(f"{home}.{key}" for home in ("rope_parameters", "rope_scaling")))
        for field, key in zip(("rope.scaling.attention_factor", "rope.scaling.log_multiplier"), MSCALES, strict=True)
    )
    rotating, all_scores = (yarn_attention(scaling.factor, number) for number in (mscale, multiplier))
    return replace(scaling, attention_factor=rotating / all_scores, log_multiplier=multiplier)


def read_indexer(reader: ConfigReader) -> Indexer:
    return Indexer(
        head_count=reader.get("indexer.head_count", int, "index_n_heads"),
        head_dim=reader.get("indexer.head_dim", int, "index_head_dim"),
        top_k=reader.get("indexer.top_k", int, "index_topk"),
    )


def read_choosing_layers(reader: ConfigReader) -> tuple[bool, ...]:
    """Which layers of the target choose positions for themselves: a list, or every so manieth from an offset on.

    transformers takes an offset where none is stated, which is not that of the published GLM-5.2.
    """
    field, depth = "indexer.layers", read_depth(reader)
    types = reader.find_list(field, str, "indexer_types")
    if types is not None:
        reader.ignore("index_topk_freq", "index_skip_topk_offset", "index_topk_pattern")  # what the list was made of
        if wrong := sorted(set(types) - {FULL, SHARED}):
            raise reader.error("indexer_types", f"found {', '.join(wrong)}", f"{FULL} or {SHARED}")
        return tuple(name == FULL for name in types)
    frequency = reader.find(field, int, "index_topk_freq")
    if frequency in (None, 1):
        reader.origins.setdefault(field, "no index_topk_freq: all of them")
        return (True,) * depth
    offset = reader.get(field, int, "index_skip_topk_offset")
    if frequency < 1:
        raise reader.error("index_topk_freq", f"found {frequency}", "a number above 0")
    return tuple(max(i - offset + 1, 0) % frequency == 0 for i in range(depth))


def read_key(reader: ConfigReader) -> tuple[int, int]:
    """How wide the one key of all heads is: dimensions that are not rotated, and those that are."""
    reader.origins["kv_head_count"] = "what is kept is one latent state for all heads"
    rotated = reader.get("rope.dimensions", int, "qk_rope_head_dim")
    plain = reader.get("head_dim", int, "qk_nope_head_dim")
    reader.origins["head_dim"] = "qk_nope_head_dim + qk_rope_head_dim"
    reader.expect("qk_head_dim", plain + rotated, "the width of a key, rotated and not")
    return plain, rotated


def read_dense_layers(reader: ConfigReader) -> int:
    """How many layers come before the first mixture: a number, or a list of each layer's type that is one."""
    field, depth = "trunk.dense_layer_count", read_depth(reader)
    types = reader.find_list(field, str, "mlp_layer_types")
    if types is None:
        return reader.get(field, int, "first_k_dense_replace", "mlp_layer_types")
    dense = types.count("dense")
    if types != ("dense",) * dense + ("sparse",) * (depth - dense):
        raise reader.error("mlp_layer_types", f"found {list(types)}", f"{depth}: dense ones, then sparse ones")
    reader.expect("first_k_dense_replace", dense, "as many dense layers as mlp_layer_types has")
    return dense


def latent_rules() -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{ATTENTION}q_a_proj.weight", Role.ATTN_Q_A, ("query_rank", "hidden")),
        TensorRule(f"{ATTENTION}q_a_layernorm.weight", Role.ATTN_Q_A_NORM, ("query_rank",)),
        TensorRule(f"{ATTENTION}q_b_proj.weight", Role.ATTN_Q_B, ("queries", "query_rank")),
        TensorRule(f"{ATTENTION}kv_a_proj_with_mqa.weight", Role.ATTN_KV_A, ("kv_rank and rotated", "hidden")),
        TensorRule(f"{ATTENTION}kv_a_layernorm.weight", Role.ATTN_KV_A_NORM, ("kv_rank",)),
        TensorRule(KEY_VALUE + KEYS, Role.ATTN_K_B, ("heads", "kv_rank", "unrotated")),
        TensorRule(KEY_VALUE + VALUES, Role.ATTN_V_B, ("heads", "value_head_dim", "kv_rank")),
        TensorRule(f"{ATTENTION}o_proj.weight", Role.ATTN_OUTPUT, ("hidden", "values")),
    )


def indexer_rules() -> tuple[TensorRule, ...]:
    """All of them or none: a head may leave the choice to the layer before it, and llama.cpp's looks everywhere."""
    first = Role.INDEXER_Q_B
    return (
        TensorRule(f"{INDEXER}wq_b.weight", first, ("indexer_queries", "query_rank"), optional=True),
        *(
            TensorRule(f"{INDEXER}{name}", role, shape, optional=True, required_with=first)
            for name, role, shape in (
                ("wk.weight", Role.INDEXER_K, ("indexer_head_dim", "hidden")),
                ("k_norm.weight", Role.INDEXER_K_NORM, ("indexer_head_dim",)),
                ("k_norm.bias", Role.INDEXER_K_NORM_BIAS, ("indexer_head_dim",)),
                ("weights_proj.weight", Role.INDEXER_PROJ, ("indexer_heads", "hidden")),
            )
        ),
    )


def parted(headers: Headers, spec: DrafterSpec) -> Headers:
    latent = spec.latent_attention
    assert latent is not None  # no spec of these kinds is without
    return part_keys_values(headers, spec.head_count, spec.head_dim - spec.rope.dimensions, latent.value_head_dim)


def flash_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    reader.enter("text_config")
    return appended_rules(reader, latent_rules())


def dsa_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    reader.enter("text_config")
    return appended_rules(reader, (*latent_rules(), *indexer_rules()))


FLASH = Kind(
    name="mtp-deepseek2",
    summary="MTP head of a GLM-4.7-Flash, which llama.cpp runs as a DeepSeek-V2",
    architectures=("Glm4MoeLiteForCausalLM",),
    read_spec=read_flash,
    rules=flash_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
    arranged=parted,
)
DSA = Kind(
    name="mtp-glm-dsa",
    summary="MTP head of a GLM-5, whose own layers have sparse attention",
    architectures=("GlmMoeDsaForCausalLM",),
    read_spec=read_dsa,
    rules=dsa_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
    arranged=parted,
)
V32 = Kind(
    name="mtp-deepseek32",
    summary="MTP head of a DeepSeek-V3.2",
    architectures=("DeepseekV32ForCausalLM",),
    read_spec=read_v32,
    rules=dsa_rules,
    dropped=dropped,
    ignored=IGNORED,
    in_target=True,
    arranged=parted,
)
FAMILIES = (FLASH, DSA, V32)
