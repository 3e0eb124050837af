"""EAGLE-3: a single decoder layer that drafts token by token from a token and a feature of the target's states.

Config and tensor names as SafeAILab, SpecForge, ModelOpt, TorchSpec and speculators publish them; what a flag means
where it is not there, and how capture layers are counted, as SGLang and vLLM read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import dflash
from convert_drafter.converters.drafters.captures import read_target_depth, read_target_width
from convert_drafter.converters.drafters.decoder import (
    DRAFT_TO_TARGET,
    TARGET_TO_DRAFT,
    attention,
    attention_biases,
    feed_forward,
)
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.rope import LLAMA3, llama3_factors, read_half_split, read_rope
from convert_drafter.converters.ops import COPY, PERMUTE_ROPE
from convert_drafter.converters.plan import Dropped, TensorRule, plain_name
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import Target

# State k is what goes into layer k: vLLM and llama.cpp take these as they are.
STATES = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
# Layer k's output: SGLang, for which SpecForge and ModelOpt write them here, adds one (set_eagle3_layers_to_capture).
OUTPUTS = ("eagle_config.eagle_aux_hidden_state_layer_ids", "eagle_config.aux_hidden_state_layer_ids")
GUESSED = "a list of three ids; runtimes that find none take states 2, depth / 2 and depth - 3 without a word"
ROPE_FACTORS = "rope_factors"  # our name of what llama3 scaling comes to

IGNORED = (
    *dflash.IGNORED, "embed_requires_grad", "pretraining_tp", "target_model_type", "decoder_sparse_step",
    "num_aux_hidden_states", "ttt_length", "tie_word_embeddings",
)  # fmt: skip
# What llama.cpp's graph computes; a config that says otherwise is another model. (path, expected, why)
ASSUMED: tuple[tuple[str, object, str], ...] = (
    ("hidden_act", "silu", "EAGLE-3's feed-forward is SwiGLU"),
    ("use_aux_hidden_state", True, "an EAGLE-3 drafter fuses three of the target's states"),
    ("mlp_bias", False, "no runtime's EAGLE-3 has biases there"),
    ("fc_norm", False, "EAGLE-3.1 norms each captured state by itself, and llama.cpp has no tensors for it"),
    ("norm_output", False, "EAGLE-3.1 feeds the normed state back, llama.cpp the state before its norm"),
    ("parallel_draft_step", 1, "P-EAGLE drafts in parallel, which llama.cpp has no graph for"),
    ("use_input_layernorm_in_first_layer", True, "llama.cpp always norms the token's embedding"),
    ("use_last_layernorm", True, "llama.cpp always norms before the head"),
    ("use_mtp_layernorm", False, "llama.cpp has no such norm"),
)  # fmt: skip
OTHERWISE: Mapping[str, str] = {
    r"(q_a|q_b|kv_a|kv_b)_(proj|layernorm)|kv_a_proj_with_mqa": "multi-head latent attention",
    r"mlp\.(experts|gate)\.": "a mixture of experts",
    r"(q|k)_norm\.": "norms of queries and keys",
    r"^fc_norms?\.": "EAGLE-3.1's norm of each captured state",
    r"^mask_hidden": "P-EAGLE's parallel drafting",
}


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of an EAGLE-3 checkpoint. Raises `WrongInput` naming the key that is missing or wrong."""
    headers = {plain_name(name): header for name, header in headers.items()}
    check_assumptions(reader, headers)
    layer_count = read_layer_count(reader, headers)
    hidden = reader.get("hidden_size", int, "hidden_size", "n_embd")
    kv_heads = reader.get("kv_head_count", int, "num_key_value_heads", "n_kv_heads")
    head_dim = dflash.read_head_dim(reader, headers, kv_heads)
    layer_types = dflash.read_layer_types(reader, layer_count)
    captures = read_captures(reader)
    width = read_target_width(reader, headers, target, len(captures))
    check_tables(reader, headers, hidden, width)
    rope = read_rope(reader, head_dim, layer_types, None, ("linear", "yarn", LLAMA3))
    reader.origins["causal"] = "EAGLE-3's definition"
    return DrafterSpec(
        kind="eagle3",
        layer_count=layer_count,
        hidden_size=hidden,
        feed_forward_size=reader.get("feed_forward_size", int, "intermediate_size"),
        head_count=reader.get("head_count", int, "num_attention_heads", "n_head"),
        kv_head_count=kv_heads,
        head_dim=head_dim,
        context_length=reader.get("context_length", int, "max_position_embeddings"),
        vocab_size=reader.get("vocab_size", int, "vocab_size"),
        draft_vocab_size=dflash.read_draft_vocab_size(reader),
        norm_epsilon=reader.get("norm_epsilon", float, "rms_norm_eps", "norm_eps"),
        rope=replace(rope, sections=None),  # of text M-RoPE has one position, and this drafter sees no other
        capture_layers=captures,
        target_layer_count=read_target_depth(reader, target),
        target_hidden_size=width,
        causal=True,
        window=dflash.read_window(reader, layer_types, layer_count),
        norm_before_residual=read_norm_before_residual(reader),
        norm_before_fc=read_flag(reader, "norm_before_fc") or False,
    )


def check_assumptions(reader: ConfigReader, headers: Headers) -> None:
    """What the algorithm takes for granted; another EAGLE-3 is refused by name."""
    for name in headers:
        for pattern, what in OTHERWISE.items():
            if re.search(pattern, name.removeprefix("layers.0.").removeprefix("self_attn.")):
                found = f"EAGLE-3 with {what}"
                raise reader.error(name, found, "a drafter without: llama.cpp's EAGLE-3 has no graph for it")
    for path, expected, why in ASSUMED:
        for place in (path, f"eagle_config.{path}"):
            reader.expect(place, expected, why)
    if "fc.weight" not in headers:
        raise reader.error("fc.weight", "missing", "it: an EAGLE-3 drafter without one has no graph in llama.cpp")


def read_layer_count(reader: ConfigReader, headers: Headers) -> int:
    count = dflash.read_layer_count(reader, headers)
    if count != 1:
        found, expected = f"found {count}", "1: llama.cpp's EAGLE-3 stops at more layers (P-EAGLE has them)"
        raise reader.error(reader.origins["layer_count"], found, expected)
    return count


def check_tables(reader: ConfigReader, headers: Headers, hidden: int, width: int) -> None:
    """Embedding and head are the target's where the drafter has none: they have to fit, and no other may be meant."""
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name not in headers and hidden != width:
            found = f"missing, and the hidden size {hidden} is not the target's {width}"
            raise reader.error(name, found, "the drafter's own: the target's does not fit")
    if "embed_tokens.weight" in headers and "lm_head.weight" not in headers:
        reader.expect("tie_word_embeddings", False, "without a head llama.cpp takes the target's, not the embedding")


def read_flag(reader: ConfigReader, name: str) -> bool | None:
    found = reader.find(name, bool, name, f"eagle_config.{name}")
    if found is None:
        reader.origins[name] = "EAGLE-3's definition (no key says otherwise)"
    return found


def read_norm_before_residual(reader: ConfigReader) -> bool:
    """False where nobody says so; but of speculators' layout vLLM takes true then, and llama.cpp false."""
    found = read_flag(reader, "norm_before_residual")
    if found is None and reader.speculators:
        raise reader.missing("norm_before_residual", "true or false", "norm_before_residual")
    return found or False


def read_captures(reader: ConfigReader) -> tuple[int, ...]:
    """Zero-based capture layers in fc's column order, from either count; never guessed, never sorted."""
    found: dict[str, tuple[int, ...]] = {}
    for paths, first in ((STATES, 1), (OUTPUTS, 0)):
        ids = reader.find_list("capture_layers", int, *paths)
        if ids:
            origin = reader.origins["capture_layers"]
            if min(ids) < first:
                told = "from 1 on: state 0 is the embedding's output, after no layer" if first else "from 0 on"
                raise reader.error(origin, f"found {list(ids)}", f"ids {told}")
            found[origin] = tuple(k - first for k in ids)
    found = {origin: ids for origin, ids in found.items() if origin.startswith("--set")} or found
    if not found:
        raise reader.missing("capture layers", GUESSED, *STATES, *OUTPUTS)
    if len(set(found.values())) > 1:
        shown = ", ".join(f"{origin}: outputs of layers {list(ids)}" for origin, ids in found.items())
        raise reader.error("capture_layers", f"two places disagree: {shown}", "one list; settle it with --set")
    reader.origins["capture_layers"], captures = next(iter(found.items()))
    if len(captures) != 3:
        spare = "; where fc reads three of them, name those with --set" if len(captures) > 3 else ""
        raise reader.error(reader.origins["capture_layers"], f"found {len(captures)} ids", f"three{spare}")
    return captures


def rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """Every tensor of the kind; the layer's names as in speculators (`plan.plain_name` knows SafeAILab's)."""
    half_split = read_half_split(reader)
    rotary = COPY if half_split else PERMUTE_ROPE
    return (
        TensorRule("fc.weight", Role.FUSION, ("hidden", "features")),
        TensorRule("input_norm.weight", Role.FUSION_NORM, ("features",), of="norm_before_fc"),
        TensorRule("norm.weight", Role.OUTPUT_NORM, ("hidden",)),
        TensorRule("embed_tokens.weight", Role.TOKEN_EMBEDDING, ("vocab", "hidden"), needed_for="other_width"),
        TensorRule("lm_head.weight", Role.OUTPUT, ("draft_vocab", "hidden"), needed_for="draft_vocab_size"),
        DRAFT_TO_TARGET,
        TensorRule(ROPE_FACTORS, Role.ROPE_FACTORS, ("rotated_pairs",), optional=True),
        TensorRule("layers.{i}.input_layernorm.weight", Role.ATTN_NORM, ("hidden",)),
        TensorRule("layers.{i}.hidden_norm.weight", Role.ATTN_NORM_2, ("hidden",)),
        *attention(width="pair", rotary=rotary),
        *attention_biases(reader, half_split),
        TensorRule("layers.{i}.post_attention_layernorm.weight", Role.FFN_NORM, ("hidden",)),
        *feed_forward(),
    )


def dropped(reader: ConfigReader) -> tuple[Dropped, ...]:
    return (
        TARGET_TO_DRAFT,
        Dropped("layers.{i}.self_attn.rotary_emb.inv_freq", "computed from theta"),
    )


def made(spec: DrafterSpec) -> dict[str, tuple[float, ...]]:
    bands = spec.rope.llama3
    return {} if bands is None else {ROPE_FACTORS: llama3_factors(spec.rope.theta, spec.rope.dimensions, bands)}


EAGLE3 = Kind(
    name="eagle3",
    summary="EAGLE-3: one layer drafts token by token over a fusion of three of the target's states",
    architectures=(
        "LlamaForCausalLMEagle3",
        "Eagle3LlamaForCausalLM",
        "Eagle3Speculator",
        "Eagle3DraftModel",
        "LlamaForCausalLM",
    ),
    read_spec=read_spec,
    rules=rules,
    dropped=dropped,
    ignored=IGNORED,
    made=made,
)
