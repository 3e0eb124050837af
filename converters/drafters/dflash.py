"""DFlash: a block of mask tokens denoised in one pass over the target's captured hidden states.

Config and tensor names as z-lab publishes them (z-lab/dflash, SpecForge recipes); the spellings of every fact were
collected from the published configs in `fixtures/configs`.
"""

from __future__ import annotations

from typing import Any

from convert_drafter.converters.config import ConfigReader, lookup
from convert_drafter.converters.drafters.captures import (
    read_captures,
    read_embedding_scale,
    read_target_depth,
    read_target_width,
)
from convert_drafter.converters.drafters.decoder import (
    ATTENTION,
    DRAFT_TO_TARGET,
    TARGET_TO_DRAFT,
    attention,
    attention_biases,
    feed_forward,
    head_norms,
)
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.rope import LAYER_TYPES, read_half_split, read_rope
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.ops import COPY, PERMUTE_ROPE
from convert_drafter.converters.plan import Dropped, TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, SlidingWindow
from convert_drafter.converters.target import Target

BLOCK_SIZES = ("dflash_config.block_size", "block_size", "dflash_config.draft_block_size", "draft_block_size")
SOFTCAPS = ("dflash_config.final_logit_softcapping", "final_logit_softcapping")
WINDOW_SIZES = ("dflash_config.swa_window_size", "sliding_window")
DEEPSPEC = "Qwen3DSparkModel"
FROM_ANCHOR = ("sample_from_anchor", "dflash_config.sample_from_anchor")
SLIDING_CAUSALITY = "sliding_window_non_causal"
CAUSAL = ("is_causal", "dflash_config.causal", "dflash_query_causal", "draft_causal")

IGNORED = (
    "architectures", "attention_dropout", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "torch_dtype", "initializer_range", "max_window_layers", "model_type", "transformers_version", "use_cache",
    "pard_token", "attention_mode", "name_or_path", "_name_or_path", "pruned_heads",
    "rope_parameters.rope_type", "rope_scaling.rope_type", "rope_parameters.mrope_interleaved", "hidden_dropout",
    "markov_head_type", "enable_confidence_head", "confidence_head_with_markov", "has_lm_head", "train_embed_tokens",
    "speculators_config", "speculators_model_type", "speculators_version",
    "num_anchors", "max_anchors", "dflash_config.num_anchors", "dflash_config.loss_decay_gamma",
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of a DFlash checkpoint. Raises `WrongInput` naming the key that is missing or wrong."""
    check_assumptions(reader)
    for path in FROM_ANCHOR:
        reader.expect(path, False, "a DFlash block starts with the anchor, which is not drafted")
    for path in ("markov_rank", "dflash_config.markov_rank"):
        reader.expect(path, 0, "a Markov head makes it a DSpark drafter, and there is none among the tensors")
    spec = read_block_spec("dflash", reader, headers, target)
    check_deepspec(reader)
    return spec


def read_block_spec(
    kind: str, reader: ConfigReader, headers: Headers, target: Target | None, **own: Any
) -> DrafterSpec:
    """Any drafter that denoises a block over captured hidden states; `own` are the facts that only its kind has."""
    refuse_mask_embedding(headers)
    layer_count = read_layer_count(reader, headers)
    hidden = reader.get("hidden_size", int, "hidden_size", "n_embd")
    heads = reader.get("head_count", int, "num_attention_heads", "n_head")
    kv_heads = reader.get("kv_head_count", int, "num_key_value_heads", "n_kv_heads")
    head_dim = read_head_dim(reader, headers, kv_heads)
    layer_types = read_layer_types(reader, layer_count)
    captures = read_captures(reader)
    uses_mrope = None if target is None else target.uses_mrope
    return DrafterSpec(
        kind=kind,
        layer_count=layer_count,
        hidden_size=hidden,
        feed_forward_size=reader.get("feed_forward_size", int, "intermediate_size"),
        head_count=heads,
        kv_head_count=kv_heads,
        head_dim=head_dim,
        context_length=reader.get("context_length", int, "max_position_embeddings"),
        vocab_size=reader.get("vocab_size", int, "vocab_size"),
        draft_vocab_size=read_draft_vocab_size(reader),
        norm_epsilon=reader.get("norm_epsilon", float, "rms_norm_eps", "norm_eps"),
        rope=(rope := read_rope(reader, head_dim, types_in_use(reader, layer_types), uses_mrope)),
        block_size=reader.get("block_size", int, *BLOCK_SIZES),
        mask_token_id=reader.get("mask_token_id", int, "dflash_config.mask_token_id", "mask_token_id"),
        capture_layers=captures,
        target_layer_count=read_target_depth(reader, target),
        target_hidden_size=read_target_width(reader, headers, target, len(captures)),
        causal=read_causal(reader, window := read_window(reader, layer_types, layer_count)),
        window=window,
        context_theta=read_context_theta(reader, rope.theta),
        attention_value_scale=reader.find(
            "attention_value_scale", float, "dflash_config.attention_value_scale", "attention_value_scale"
        ),
        embedding_scale=read_embedding_scale(reader, target),
        logit_scale=reader.find("logit_scale", float, "dflash_config.output_multiplier", "output_multiplier"),
        logit_softcap=reader.find("logit_softcap", float, *SOFTCAPS) or None,  # zero turns it off
        **own,
    )


def check_assumptions(reader: ConfigReader) -> None:
    """What the algorithm takes for granted; a config that says otherwise is another kind of model."""
    for path in ("hidden_act", "hidden_activation"):
        reader.expect(path, "silu", "DFlash's feed-forward is SwiGLU")
    reader.expect("rope_interleave", False, "interleaved rotary pairs are understood as rope_is_neox_style: false")


def check_deepspec(reader: ConfigReader) -> None:
    """DeepSpec's class drafts from the anchor's own place, Markov head or not; a DFlash block throws that one away."""
    deepspec = DEEPSPEC in (reader.find_list("architectures", str, "architectures") or ())
    stated = reader.find("sample_from_anchor", bool, *FROM_ANCHOR)
    if deepspec and stated is None:
        found = f"not stated beside {DEEPSPEC}, which drafts from the anchor's own place unless it was told otherwise"
        expected = "false: no runtime drafts so without a Markov head; if it was trained so, give it with --set"
        raise reader.error(FROM_ANCHOR[0], found, f"{expected} {FROM_ANCHOR[0]}=false")


def refuse_mask_embedding(headers: Headers) -> None:
    """MiMo keeps the mask token's trained embedding in a pickle; the target's own row for it is untrained."""
    for folder in {header.file.parent for header in headers.values()}:
        path = folder / "mask_embedding.pt"
        if path.exists():
            raise WrongInput(
                f"{path}: found the mask token's own embedding in a pickle, which is never opened; expected it in"
                " embed_tokens.weight: without it the drafter drafts from an untrained row. Write it there, then move"
                " this file away"
            )


def read_layer_count(reader: ConfigReader, headers: Headers) -> int:
    count = reader.get("layer_count", int, "num_hidden_layers", "n_layers", "num_layers")
    if not 0 < count <= len(headers):  # nobody has to count up to a nonsense number; the plan checks every tensor
        expected = f"at least 1 and at most {len(headers)}, the number of tensors"
        raise reader.error(reader.origins["layer_count"], f"found {count}", expected)
    return count


def read_draft_vocab_size(reader: ConfigReader) -> int | None:
    """Rows of the drafter's own head, where it drafts some of the target's tokens only."""
    size = reader.find("draft_vocab_size", int, "draft_vocab_size")
    return None if size == reader.get("vocab_size", int, "vocab_size") else size


def read_context_theta(reader: ConfigReader, theta: float) -> float | None:
    """MiMo rotates the context's keys by a base of their own; the same base is none."""
    base = reader.find("context_theta", float, "dflash_config.backbone_rotary_base")
    return None if base == theta else base


def read_head_dim(reader: ConfigReader, headers: Headers, kv_heads: int) -> int:
    """The config's head_dim, else by the shape of k_proj; never hidden_size / heads, which is wrong for most."""
    head_dim = reader.find("head_dim", int, "head_dim")
    if head_dim is not None:
        reader.expect("v_head_dim", head_dim, "values as wide as keys")
        return head_dim
    name = "layers.0.self_attn.k_proj.weight"
    header = headers.get(name) or headers.get(f"model.{name}")
    if header is None or len(header.shape) != 2 or kv_heads <= 0 or header.shape[0] % kv_heads:
        raise reader.missing("head_dim", f"an integer, or {name} with a multiple of {kv_heads} rows", "head_dim")
    reader.origins["head_dim"] = f"rows of {name} / num_key_value_heads"
    return header.shape[0] // kv_heads


def read_layer_types(reader: ConfigReader, layer_count: int) -> tuple[str, ...]:
    """`layer_types`, or () where the config has none."""
    types = reader.find_list("window.layers", str, "layer_types") or ()
    wrong = sorted(set(types) - set(LAYER_TYPES))
    if wrong:
        raise reader.error("layer_types", f"found {', '.join(wrong)}", " or ".join(LAYER_TYPES))
    if types and len(types) != layer_count:
        raise reader.error("layer_types", f"found {len(types)} entries", f"num_hidden_layers = {layer_count}")
    return types


def types_in_use(reader: ConfigReader, layer_types: tuple[str, ...]) -> tuple[str, ...]:
    """The layer types whose rope parameters count: `use_swa` makes every layer slide, whatever layer_types says."""
    return ("sliding_attention",) if reader.find("window", bool, "dflash_config.use_swa") else layer_types


def read_window(reader: ConfigReader, layer_types: tuple[str, ...], layer_count: int) -> SlidingWindow | None:
    """The sliding window in its three spellings.

    `layer_types` with `use_sliding_window` true; `layer_types` alone; or `dflash_config.use_swa`, where every layer
    slides. Where the spellings contradict each other nobody can know what was trained: an error.
    """
    slides = tuple(name == "sliding_attention" for name in layer_types)
    switches = {path: reader.find("window", bool, path) for path in ("dflash_config.use_swa", "use_sliding_window")}
    off = [path for path, value in switches.items() if value is False]
    source = "layer_types"
    if switches["dflash_config.use_swa"]:
        if any(slides) and not all(slides):
            raise reader.error("dflash_config.use_swa", "true: every layer slides", "layer_types to agree, or false")
        slides = (True,) * layer_count
        source = reader.origins["window.layers"] = "dflash_config.use_swa"
    if any(slides):
        if off:
            expected = f"true, or {source} without sliding layers; settle it with --set"
            raise reader.error(off[0], f"false, but {source} has sliding layers", expected)
        return SlidingWindow(reader.get("window.size", int, *WINDOW_SIZES), slides)
    reader.ignore(*WINDOW_SIZES)
    stated = [path for path in (*switches, *WINDOW_SIZES) if lookup(reader.raw, path) is not None]
    if stated and not layer_types and not off:
        raise reader.missing("which layers slide", f"layer_types beside {stated[0]}", "layer_types")
    return None


def read_causal(reader: ConfigReader, window: SlidingWindow | None) -> bool:
    """Inside a block. Speculators say it of sliding layers, which look only backwards unless they say otherwise."""
    stated = reader.find("causal", bool, *CAUSAL)
    origin = reader.origins.get("causal", "")
    otherwise = reader.find("causal", bool, SLIDING_CAUSALITY)
    settled = stated is not None and origin.startswith("--set")
    if window is not None and not settled and (reader.speculators or otherwise is not None):
        return read_sliding_causality(reader, window, otherwise, stated)
    reader.origins["causal"] = origin or "DFlash's definition (no key says otherwise)"
    return bool(stated)


def read_sliding_causality(
    reader: ConfigReader, window: SlidingWindow, otherwise: bool | None, stated: bool | None
) -> bool:
    """A file says one thing of all layers, so that all of them have to slide where sliding ones look backwards."""
    settle = "settle it with --set is_causal=VALUE"
    if otherwise is None:
        raise reader.missing(SLIDING_CAUSALITY, "true or false: exporters take either for granted", SLIDING_CAUSALITY)
    if stated not in (None, not otherwise):
        raise reader.error(SLIDING_CAUSALITY, f"{otherwise}, but another key says causal = {stated}", settle)
    if not otherwise and not all(window.layers):
        one = "one thing for all layers, which is all that a file can say and llama.cpp compute"
        others = "ik_llama.cpp and Lucebox let sliding layers look backwards whatever it says: for them is_causal=false"
        raise reader.error(SLIDING_CAUSALITY, "false, but some layers do not slide", f"{one}; {settle} ({others})")
    return not otherwise


def rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """Every tensor of the kind. Interleaved checkpoints get their rotary rows re-ordered to the hub's halves."""
    half_split = read_half_split(reader)
    rotary = COPY if half_split else PERMUTE_ROPE
    no_sinks = not reader.find("sinks", bool, "attention_sink_bias", "dflash_config.attention_sink_bias")
    # runtimes take an embedding without a head for both
    own_head = Role.TOKEN_EMBEDDING if reader.find("head", bool, "tie_word_embeddings") is False else None
    return (
        TensorRule("fc.weight", Role.FUSION, ("hidden", "features")),
        TensorRule("hidden_norm.weight", Role.FUSION_NORM, ("hidden",)),
        TensorRule("norm.weight", Role.OUTPUT_NORM, ("hidden",)),
        TensorRule("embed_tokens.weight", Role.TOKEN_EMBEDDING, ("vocab", "hidden"), optional=True),
        TensorRule(
            "lm_head.weight",
            Role.OUTPUT,
            ("draft_vocab", "hidden"),
            required_with=own_head,
            needed_for="draft_vocab_size",
        ),
        DRAFT_TO_TARGET,
        TensorRule("layers.{i}.input_layernorm.weight", Role.ATTN_NORM, ("hidden",)),
        *attention(rotary=rotary),
        *attention_biases(reader, half_split),
        *head_norms(ATTENTION, rotary),
        TensorRule(f"{ATTENTION}sinks", Role.ATTN_SINKS, ("heads",), optional=no_sinks),
        TensorRule(f"{ATTENTION}attention_sink_bias", Role.ATTN_SINKS, ("heads",), optional=no_sinks),
        TensorRule(f"{ATTENTION}learnable_sink_param", Role.ATTN_SINKS, ("heads",), optional=no_sinks),
        TensorRule("layers.{i}.post_attention_layernorm.weight", Role.FFN_NORM, ("hidden",)),
        *feed_forward(),
    )


def dropped(reader: ConfigReader) -> tuple[Dropped, ...]:
    if reader.find("own embedding", bool, "has_embed_tokens") is False:
        return (
            TARGET_TO_DRAFT,
            Dropped("embed_tokens.weight", "has_embed_tokens is false: the target's embedding is used"),
        )
    return (TARGET_TO_DRAFT,)


DFLASH = Kind(
    name="dflash",
    summary="DFlash: one pass denoises a block of tokens over the target's hidden states",
    architectures=("DFlashDraftModel", "DflashDraftModel", "DFlashSpeculator", "Qwen3DSparkModel"),
    read_spec=read_spec,
    rules=rules,
    dropped=dropped,
    ignored=IGNORED,
)
