"""The MTP heads of Step-3.5 and 3.7: three dense layers behind the target's last, each with an output head of its own.

Names and facts as llama.cpp's converter (conversion/step3.py: Step35Model) and transformers (`step3p7`) have them.
"""

from __future__ import annotations

from typing import Any

from convert_drafter.converters.config import ConfigReader, lookup
from convert_drafter.converters.drafters.decoder import ATTENTION, attention, feed_forward, head_norms
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp import (
    IGNORED,
    count_appended,
    dropped,
    joining_rules,
    read_depth,
    read_head,
    read_head_dim,
    shared_rules,
)
from convert_drafter.converters.drafters.rope import LLAMA3, llama3_factors, read_llama3, read_scaling
from convert_drafter.converters.ops import PLUS_ONE
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Experts, Rope, SlidingWindow, Trunk
from convert_drafter.converters.target import Target

LAYER = "layers.{i}."
FULL, SLIDING = "full_attention", "sliding_attention"
TURNED = {FULL: 0.5, SLIDING: 1.0}  # llama.cpp halves the rotated dimensions of full layers, whatever the config says
ROPE_FACTORS = "rope_factors"  # our name of what llama3 scaling comes to
OTHER = "attention_other_setting"  # of sliding layers
# What llama.cpp's graph computes; a config that says otherwise is another model. (path, expected, why)
ASSUMED: tuple[tuple[str, object, str], ...] = (
    ("hidden_act", "silu", "the feed-forward is SwiGLU"),
    ("attention_bias", False, "llama.cpp's Step-3.5 has no biases"),
    ("mlp_bias", False, "llama.cpp's Step-3.5 has no biases"),
    ("zero_centered", True, "norms are published as what they differ from one by"),
    ("use_head_wise_attn_gate", True, "a gate for each head is part of the model"),
    ("use_qk_norm", True, "norms of queries and keys are part of the model"),
    ("sink", False, "llama.cpp's Step-3.5 has no attention sinks"),
    ("att_impl_type", "GQA", "llama.cpp's Step-3.5 has no other attention"),
    ("use_rope_layers", [], "every layer is turned"),
    ("yarn_only_types", [FULL], "llama.cpp scales the rotary embedding of full layers alone"),
    (f"{OTHER}.attention_type", SLIDING, "the other layers are the sliding ones"),
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the heads of a Step-3.5. Raises `WrongInput` naming the key that is missing or wrong."""
    reader.enter("text_config")
    for path, expected, why in ASSUMED:
        reader.expect(path, expected, why)
    depth = read_depth(reader)
    count = count_appended(reader, headers, depth)
    types = read_layer_types(reader, depth, count)
    head_dim = read_head_dim(reader)
    reader.expect(f"{OTHER}.head_dim", head_dim, "llama.cpp's Step-3.5 has heads of one width")
    check_turned(reader, types)
    thetas = read_thetas(reader, types)
    heads, kv_heads = (read_heads(reader, name, key) for name, key in HEAD_COUNTS.items())
    return read_head(
        *("mtp-step35", reader, target, count, "intermediate_size", Rope(thetas[SLIDING], head_dim)),
        head_count=heads[SLIDING],
        kv_head_count=kv_heads[SLIDING],
        window=SlidingWindow(reader.get("window.size", int, "sliding_window"), (True,) * count),
        trunk=Trunk(
            **read_mixture(reader, depth),
            sliding_layers=tuple(kind == SLIDING for kind in types[:depth]),
            head_counts=tuple(heads[kind] for kind in types[:depth]),
            kv_head_counts=tuple(kv_heads[kind] for kind in types[:depth]),
            rope_theta=thetas[FULL],
            llama3=read_bands(reader),
            expert_clamps=read_clamps(reader, "trunk.expert_clamps", "swiglu_limits", depth, count),
            shared_clamps=read_clamps(reader, "trunk.shared_clamps", "swiglu_limits_shared", depth, count),
        ),
    )


HEAD_COUNTS = {"head_count": "num_attention_heads", "kv_head_count": "num_attention_groups"}


def read_layer_types(reader: ConfigReader, depth: int, count: int) -> tuple[str, ...]:
    """Of the target's layers and the heads'; where it ends before them llama.cpp takes full attention."""
    types = reader.find_list("trunk.sliding_layers", str, "layer_types")
    if types is None:
        raise reader.missing("trunk.sliding_layers", "the type of each layer", "layer_types")
    origin = reader.origins["trunk.sliding_layers"]
    if len(types) != depth + count:
        expected = f"{depth + count}: the target's {depth} layers and {count} of its MTP heads"
        raise reader.error(origin, f"found {len(types)} entries", expected)
    if wrong := sorted(set(types) - set(TURNED)):
        raise reader.error(origin, f"found {', '.join(wrong)}", " or ".join(TURNED))
    if FULL not in types[:depth]:
        raise reader.error(origin, f"found no {FULL} among the target's layers", "one at least")
    if set(types[depth:]) != {SLIDING}:
        found = f"found {', '.join(types[depth:])} for the MTP heads"
        raise reader.error(origin, found, f"{SLIDING}: heads of other layers are not converted")
    reader.origins["window.layers"] = origin
    return types


def check_turned(reader: ConfigReader, types: tuple[str, ...]) -> None:
    """llama.cpp's converter stops at any other share of turned dimensions, and takes a half where there is none."""
    factors = reader.find_list("rope.dimensions", float, "partial_rotary_factors")
    if factors is None:
        raise reader.missing("rope.dimensions", "a fraction for each layer", "partial_rotary_factors")
    expected = tuple(TURNED[kind] for kind in types)
    if factors != expected:
        wrong = next((i for i, (a, b) in enumerate(zip(factors, expected, strict=False)) if a != b), len(factors))
        found = f"found {len(factors)} entries" if wrong == len(factors) else f"found {factors[wrong]} of layer {wrong}"
        rule = f"{len(types)} of them, {TURNED[FULL]} of full and {TURNED[SLIDING]} of sliding layers"
        raise reader.error(reader.origins["rope.dimensions"], found, f"{rule}: llama.cpp turns no other share")


def read_thetas(reader: ConfigReader, types: tuple[str, ...]) -> dict[str, float]:
    """The base of each type of layer, from a list with one of each layer, or one of all."""
    listed = isinstance(raw(reader, "rope_theta"), list)
    if not listed:
        theta = reader.get("rope.theta", float, "rope_theta")
        reader.origins["trunk.rope_theta"] = reader.origins["rope.theta"]
        return dict.fromkeys(TURNED, theta)
    found = reader.find_list("rope.theta", float, "rope_theta") or ()
    origin = reader.origins["trunk.rope_theta"] = reader.origins["rope.theta"]
    if len(found) != len(types):
        raise reader.error(origin, f"found {len(found)} entries", f"{len(types)}, as layer_types has")
    thetas = {kind: {theta for theta, other in zip(found, types, strict=True) if other == kind} for kind in TURNED}
    if several := next((kind for kind, of in thetas.items() if len(of) > 1), None):
        shown = ", ".join(f"{theta:g}" for theta in sorted(thetas[several]))
        raise reader.error(origin, f"found {shown} of {several}", "one theta: llama.cpp has one for each type of layer")
    return {kind: of.pop() for kind, of in thetas.items()}


def raw(reader: ConfigReader, path: str) -> Any:
    """The first value that is set at the path's places, of whatever type."""
    found = (lookup(reader.raw, place) for place in reader.places(path))
    return next((value for value in found if value is not None), None)


def read_heads(reader: ConfigReader, field: str, key: str) -> dict[str, int]:
    """How many heads each type of layer has; sliding ones as many as full ones where nothing else is said of them."""
    full = reader.get(f"trunk.{field}s", int, key)
    sliding = reader.find(field, int, f"{OTHER}.{key}")
    if sliding is None:
        reader.origins[field] = reader.origins[f"trunk.{field}s"]
    return {FULL: full, SLIDING: full if sliding is None else sliding}


def read_bands(reader: ConfigReader) -> Any:
    read_scaling(reader, (LLAMA3,))  # refuses any other
    return read_llama3(reader)


def read_mixture(reader: ConfigReader, depth: int) -> dict[str, Any]:
    """The target's mixtures; a head that is one is another model."""
    layers = reader.find("trunk.dense_layer_count", str, "moe_layers_enum")
    numbers = sorted(int(part) for part in (layers or "").split(",") if part.strip().isdecimal())
    if numbers and numbers[-1] >= depth:
        origin = reader.origins["trunk.dense_layer_count"]
        found = f"found {numbers[-1]} among the mixtures, a layer of the MTP heads"
        raise reader.error(origin, found, f"layers below {depth}: heads that are mixtures are not converted")
    return {
        "dense_layer_count": numbers[0] if numbers else None,
        "expert_feed_forward_size": reader.get("trunk.expert_feed_forward_size", int, "moe_intermediate_size"),
        "experts": Experts(
            count=reader.get("trunk.experts.count", int, "moe_num_experts"),
            used=reader.get("trunk.experts.used", int, "moe_top_k"),
            shared_feed_forward_size=reader.find("trunk.experts.shared_feed_forward_size", int, "share_expert_dim"),
            scoring=reader.find("trunk.experts.scoring", str, "moe_router_activation"),
            normed=reader.find("trunk.experts.normed", bool, "norm_expert_weight"),
            scale=reader.find("trunk.experts.scale", float, "moe_router_scaling_factor"),
        ),
    }


def read_clamps(reader: ConfigReader, field: str, key: str, depth: int, count: int) -> tuple[float, ...]:
    """Where activations of each layer are cut off, 0 for nowhere; the heads' are not."""
    limits = raw(reader, key)
    if limits is None:
        return ()
    reader.find(field, list, key)
    if not isinstance(limits, list) or len(limits) not in (depth, depth + count):
        raise reader.error(reader.origins[field], f"found {limits!r}", f"a list of {depth} or {depth + count} numbers")
    clamps = tuple(0.0 if limit is None else float(limit) for limit in limits)
    if any(clamps[depth:]):
        found = f"found {list(clamps[depth:])} for the MTP heads"
        raise reader.error(reader.origins[field], found, "none: a head whose activations are cut off is not converted")
    return clamps[:depth]


def head_rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """All norms are published as what they differ from one by."""
    reader.enter("text_config")
    head = f"{LAYER}transformer.shared_head."
    return (
        *shared_rules(reader, PLUS_ONE),
        TensorRule(ROPE_FACTORS, Role.ROPE_FACTORS, ("rotated_pairs",), optional=True),
        TensorRule(f"{LAYER}input_layernorm.weight", Role.ATTN_NORM, ("hidden",), PLUS_ONE),
        *attention(),
        TensorRule(f"{ATTENTION}g_proj.weight", Role.ATTN_GATE, ("heads", "hidden")),
        *head_norms(ATTENTION, PLUS_ONE),
        TensorRule(f"{LAYER}post_attention_layernorm.weight", Role.FFN_NORM, ("hidden",), PLUS_ONE),
        *feed_forward(f"{LAYER}mlp."),
        *joining_rules(LAYER, PLUS_ONE),
        TensorRule(f"{LAYER}embed_tokens.weight", Role.NEXTN_EMBEDDING, ("vocab", "hidden"), optional=True),
        TensorRule(f"{head}output.weight", Role.NEXTN_OUTPUT, ("vocab", "hidden"), optional=True),
        TensorRule(f"{head}norm.weight", Role.NEXTN_OUTPUT_NORM, ("hidden",), PLUS_ONE, optional=True),
    )


def made(spec: DrafterSpec) -> dict[str, tuple[float, ...]]:
    """What full layers divide their frequencies by; half of a head is turned there, and ones stand for the rest."""
    if spec.trunk is None or spec.trunk.llama3 is None or spec.trunk.rope_theta is None:
        return {}
    dimensions = int(spec.head_dim * TURNED[FULL])
    factors = llama3_factors(spec.trunk.rope_theta, dimensions, spec.trunk.llama3)
    return {ROPE_FACTORS: (*factors, *[1.0] * (spec.head_dim // 2 - len(factors)))}


NO_FACTS = (
    *IGNORED, "auto_map", "need_fp32_gate", "use_moe", "use_moe_router_bias", "moe_every_n_layer", "moe_layer_offset",
    "max_seq_len", "share_expert_dims", "projector_bias", "understand_projector_stride",
)  # fmt: skip
STEP35 = Kind(
    name="mtp-step35",
    summary="MTP heads of a Step-3.5 or 3.7: three chained layers, of which each drafts one token",
    architectures=("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),
    read_spec=read_spec,
    rules=head_rules,
    dropped=dropped,
    ignored=NO_FACTS,
    in_target=True,
    made=made,
)
FAMILIES = (STEP35,)
