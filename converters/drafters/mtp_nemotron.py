"""The MTP head of Nemotron-H with experts: an attention layer and a mixture, which together make one layer of a head.

Names and facts as transformers (`nemotron_h`), vLLM (nemotron_h_mtp.py) and llama.cpp's converter have them
(conversion/nemotron.py: NemotronHModel). Nothing is rotated: the target's Mamba layers tell positions apart.
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import mtp
from convert_drafter.converters.drafters.decoder import attention
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import NO_ROPE, DrafterSpec, Experts, StateSpace, Trunk
from convert_drafter.converters.target import Target

ATTENTION_LAYER, MIXTURE_LAYER = "mtp.layers.0.", "mtp.layers.1."
ATTENTION, MIXTURE = f"{ATTENTION_LAYER}mixer.", f"{MIXTURE_LAYER}mixer."
PARTS = 2  # layers of the checkpoint in one of a head
PATTERN, TYPES = "hybrid_override_pattern", "layers_block_type"
HEAD_PATTERN, HEAD_TYPES = "mtp_hybrid_override_pattern", "mtp_layers_block_type"
# What a layer is, by a pattern's letter and by transformers' names, new and old.
ATTENDS, MIXES, MAMBA = ("*", "full_attention", "attention"), ("E", "moe"), ("M", "linear_attention", "mamba")
EPSILONS = ("layer_norm_epsilon", "norm_eps")
IGNORED = (
    *mtp.IGNORED, "auto_map", "chunk_size", "expand", "hidden_dropout", "intermediate_size", "keep_mtp_spec_in_bf16",
    "mamba_hidden_act", "mamba_proj_bias", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap", "num_logits_to_keep",
    "partial_rotary_factor", "rescale_prenorm_residual", "residual_in_fp32", "rope_theta", "rope_parameters",
    "time_step_floor", "time_step_limit", "time_step_max", "time_step_min", "use_bias", "use_conv_bias",
    "use_mamba_kernels",
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the head of a Nemotron-H. Raises `WrongInput` naming the key that is missing or wrong."""
    check(reader)
    count, depth = read_count(reader, headers), mtp.read_depth(reader)
    reader.origins["rope.theta"] = reader.origins["rope.dimensions"] = "nothing is rotated"
    return mtp.read_head(
        *("mtp-nemotron_h_moe", reader, target, count, "moe_intermediate_size", NO_ROPE),
        norm_epsilon=reader.get("norm_epsilon", float, *EPSILONS),  # both have to agree
        experts=read_experts(reader),
        trunk=read_trunk(reader, depth),
        state_space=read_state_space(reader),
    )


def check(reader: ConfigReader) -> None:
    """What llama.cpp's graph takes for granted (src/models/nemotron-h-moe.cpp)."""
    reader.expect("mlp_hidden_act", "relu2", "experts square what is above zero")
    reader.expect("attention_bias", False, "llama.cpp's head has no biases")
    reader.expect("mlp_bias", False, "llama.cpp's head has no biases")
    reader.expect("sliding_window", None, "llama.cpp's head attends to everything")
    reader.expect(HEAD_PATTERN, "*E", "a head is an attention layer and a mixture")
    types = reader.find_list("layers of a head", str, HEAD_TYPES)
    if types is not None and (len(types) != PARTS or types[0] not in ATTENDS or types[1] not in MIXES):
        expected = "attention and moe: a head is an attention layer and a mixture"
        raise reader.error(HEAD_TYPES, f"found {', '.join(types)}", expected)


def read_count(reader: ConfigReader, headers: Headers) -> int:
    """The number of heads by the tensors, two layers of the checkpoint each; the config has to agree (A5-2)."""
    found = mtp.numbers(headers, mtp.LAYER)
    count = mtp.counted(reader, len(found) // PARTS, mtp.APPENDED_COUNT)
    if found != list(range(PARTS * count)):
        there = ", ".join(f"mtp.layers.{i}" for i in found) or "none under mtp.layers"
        expected = "two layers for each: one attends, one is a mixture"
        raise reader.error(reader.origins["layer_count"], f"{count}, but the tensors are {there}", expected)
    return count


def read_experts(reader: ConfigReader) -> Experts:
    """Sigmoid scores, a bias for the choice alone, groups of experts; one more expert that is wider than they are."""
    reader.expect("n_shared_experts", 1, "the width of the shared expert is said outright")
    reader.origins["experts.scoring"] = "the routing of Nemotron-H"
    return Experts(
        count=reader.get("experts.count", int, "n_routed_experts"),
        used=reader.get("experts.used", int, "num_experts_per_tok"),
        shared_feed_forward_size=reader.get(
            "experts.shared_feed_forward_size", int, "moe_shared_expert_intermediate_size"
        ),
        scoring="sigmoid",
        normed=reader.get("experts.normed", bool, "norm_topk_prob"),
        scale=reader.get("experts.scale", float, "routed_scaling_factor"),
        groups=reader.get("experts.groups", int, "n_group"),
        groups_used=reader.get("experts.groups_used", int, "topk_group"),
        latent_size=reader.find("experts.latent_size", int, "moe_latent_size"),
    )


def read_trunk(reader: ConfigReader, depth: int) -> Trunk:
    """Which layers attend and which are mixtures, by a pattern of letters or a list of names."""
    pattern = reader.find("trunk.mixture_layers", str, PATTERN)
    listed = reader.find_list("trunk.mixture_layers", str, TYPES) if pattern is None else tuple(pattern)
    if listed is None:
        raise reader.missing("trunk.mixture_layers", "a letter or a name for each layer", PATTERN, TYPES)
    reader.ignore(TYPES)
    reader.origins["trunk.attention_layers"] = reader.origins["trunk.mixture_layers"]
    if wrong := sorted(set(listed) - {*ATTENDS, *MIXES, *MAMBA}):
        expected = "Mamba, attention and mixtures: llama.cpp has no other layers beside experts"
        raise reader.error(reader.origins["trunk.mixture_layers"], f"found {', '.join(wrong)}", expected)
    if len(listed) != depth:
        raise reader.error(
            reader.origins["trunk.mixture_layers"], f"found {len(listed)} layers", f"num_hidden_layers = {depth}"
        )
    return Trunk(
        attention_layers=tuple(name in ATTENDS for name in listed),
        mixture_layers=tuple(name in MIXES for name in listed),
    )


def read_state_space(reader: ConfigReader) -> StateSpace:
    keys = {
        "kernel_size": "conv_kernel",
        "state_size": "ssm_state_size",
        "group_count": "n_groups",
        "head_count": "mamba_num_heads",
        "head_dim": "mamba_head_dim",
    }
    return StateSpace(**{name: reader.get(f"state_space.{name}", int, key) for name, key in keys.items()})


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    no_head = not reader.raw or mtp.is_tied(reader)
    expert, shared = f"{MIXTURE}experts.", f"{MIXTURE}shared_experts."
    return (
        TensorRule("embeddings.weight", Role.TOKEN_EMBEDDING, ("vocab", "hidden")),
        TensorRule("norm_f.weight", Role.OUTPUT_NORM, ("hidden",)),
        TensorRule("lm_head.weight", Role.OUTPUT, ("vocab", "hidden"), optional=no_head),
        TensorRule(f"{ATTENTION_LAYER}norm.weight", Role.ATTN_NORM, ("hidden",)),
        *attention(ATTENTION),
        TensorRule(f"{MIXTURE_LAYER}norm.weight", Role.FFN_NORM, ("hidden",)),
        TensorRule(f"{MIXTURE}gate.weight", Role.FFN_ROUTER, ("experts", "hidden")),
        TensorRule(f"{MIXTURE}gate.e_score_correction_bias", Role.FFN_ROUTER_BIAS, ("experts",)),
        *latent_rules(reader),
        TensorRule(f"{expert}up_proj.weight", Role.FFN_UP_EXPERTS, ("experts", "feed_forward", "expert_hidden")),
        TensorRule(f"{expert}down_proj.weight", Role.FFN_DOWN_EXPERTS, ("experts", "expert_hidden", "feed_forward")),
        TensorRule(f"{shared}up_proj.weight", Role.FFN_UP_SHARED, ("shared_feed_forward", "hidden")),
        TensorRule(f"{shared}down_proj.weight", Role.FFN_DOWN_SHARED, ("hidden", "shared_feed_forward")),
        *mtp.joining_rules(ATTENTION_LAYER),
        TensorRule(f"{MIXTURE_LAYER}final_layernorm.weight", Role.NEXTN_OUTPUT_NORM, ("hidden",)),
    )


def latent_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """There where the config says that experts have a width of their own; of no config nothing is known."""
    optional = not reader.raw
    if reader.raw and reader.find("latent", int, "moe_latent_size") is None:
        return ()
    return (
        TensorRule(
            f"{MIXTURE}fc1_latent_proj.weight", Role.FFN_LATENT_DOWN, ("expert_hidden", "hidden"), optional=optional
        ),
        TensorRule(
            f"{MIXTURE}fc2_latent_proj.weight", Role.FFN_LATENT_UP, ("hidden", "expert_hidden"), optional=optional
        ),
    )


NEMOTRON_H_MOE = Kind(
    name="mtp-nemotron_h_moe",
    summary="MTP head of a Nemotron-H with experts (Nemotron 3)",
    architectures=("NemotronHForCausalLM",),
    read_spec=read_spec,
    rules=head_rules,
    dropped=mtp.dropped,
    ignored=IGNORED,
    in_target=True,
)
FAMILIES = (NEMOTRON_H_MOE,)
