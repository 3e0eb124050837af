"""MTP heads (NextN): one more decoder layer, which lies in its target's own checkpoint and shares its embedding.

Where they lie and what they are called as llama.cpp's converter reads them (conversion/qwen.py: _QwenMtpMixin). A kind
is one family of targets, because a runtime loads the head as a part of its target: with the target's architecture and
the target's keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.rope import read_scaling, read_theta
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.ops import COPY, Op
from convert_drafter.converters.plan import Dropped, TensorRule, plain_name
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Rope
from convert_drafter.converters.target import Target

HEAD = re.compile(r"mtp\.")
LAYER = re.compile(r"mtp\.layers\.(\d{1,9})\.")
BLOCK = re.compile(r"mtp\.(\d{1,9})\.")
APPENDED = re.compile(r"layers\.(\d{1,9})\.eh_proj\.")  # one more layer of the target is a head by this tensor
NUMBER = re.compile(r"layers\.(\d{1,9})\.")
# of the target, and in the head's own file
SHARED = re.compile(r"((word_)?embed(ding|_token)s|embed(dings)?|norm(_f)?|(lm_)?head)\.")
COUNT, APPENDED_COUNT = "mtp_num_hidden_layers", "num_nextn_predict_layers"
NESTED_COUNT = "mtp.num_hidden_layers"  # Qwen4Exp counts twice

# Other targets with a head, by the class or model type in their config, and why it is not converted.
NO_RUNTIME, NOT_YET = "no runtime loads it", "not converted yet"
REFUSED = {
    "DeepseekV3ForCausalLM": f"{NO_RUNTIME}: llama.cpp's converter drops it (conversion/deepseek.py)",
    "deepseek_v3": f"{NO_RUNTIME}: llama.cpp's converter drops it (conversion/deepseek.py)",
    "MiMoForCausalLM": f"{NO_RUNTIME}: llama.cpp has no MiMo before V2",
    "Exaone4ForCausalLM": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
    "ExaoneMoEForCausalLM": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
    "ExaoneMoeForCausalLM": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
    "Glm5NextForConditionalGeneration": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
    **dict.fromkeys(
        ("Dots3NoteForCausalLM", "Dots3NoteForConditionalGeneration", "Dots3NoteTextForCausalLM"),
        f"{NO_RUNTIME}: llama.cpp reads its head past and has no graph for it",
    ),
    "NemotronHPuzzleForCausalLM": f"{NO_RUNTIME}: llama.cpp's converter drops it (conversion/nemotron.py)",
    "HYV4ForCausalLM": f"{NO_RUNTIME}: llama.cpp's converter drops it (conversion/hy_v4.py)",
    "Ernie4_5_MoeForCausalLM": f"{NO_RUNTIME}: llama.cpp's converter drops it (conversion/ernie.py)",
    "GlmOcrForConditionalGeneration": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
    "BailingMoeV2ForCausalLM": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
}

IGNORED = (
    "architectures", "model_type", "text_config.architectures", "language_model_only", "transformers_version",
    "vision_config", "audio_config", "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype",
    "initializer_range", "mamba_ssm_dtype", "use_cache", "output_gate_type", "rope_parameters.rope_type",
    "rope_parameters.mrope_interleaved", "_name_or_path", "name_or_path", "tie_word_embeddings", "router_aux_loss_coef",
    "output_router_logits",
)  # fmt: skip


# Facts that most families spell alike: type and key.
OWN: dict[str, tuple[Any, str]] = {
    "head_count": (int, "num_attention_heads"),
    "kv_head_count": (int, "num_key_value_heads"),
    "head_dim": (int, "head_dim"),
    "norm_epsilon": (float, "rms_norm_eps"),
}


# --- which tensors, which family ---


def needed(names: Collection[str]) -> Collection[str]:
    """Of a target's tensors those its head's file has; all of them where there is no head."""
    plain = {name: plain_name(name) for name in names}
    appended = {match[1] for name in plain.values() if (match := APPENDED.match(name))}

    def is_head(name: str) -> bool:
        return bool(HEAD.match(name)) or ((number := NUMBER.match(name)) is not None and number[1] in appended)

    if not any(is_head(name) for name in plain.values()):
        return names
    return [name for name, short in plain.items() if is_head(short) or SHARED.match(short)]


def declared(reader: ConfigReader) -> int | None:
    """How many layers of a head the config counts; None where it does not say."""
    return reader.find("layer_count", int, COUNT, APPENDED_COUNT, NESTED_COUNT)


def find_family(reader: ConfigReader, architectures: Iterable[str], families: Iterable[Kind]) -> Kind:
    """The kind of a head by its target's class. Raises `WrongInput` naming a target whose head is not converted."""
    named = list(architectures)
    family = reader.find("model_type", str, "model_type")
    known = {name: kind for kind in families for name in kind.architectures}
    for name in named:
        if name in known:
            return known[name]
    found = ", ".join(named) or family or "no architecture"
    why = next((REFUSED[name] for name in (*named, family) if name in REFUSED), NOT_YET)
    expected = "a target whose head `convert-drafter list kinds` has"
    raise reader.error("architectures", f"the MTP head of {found}, {why}", expected)


def refuse_without_head(reader: ConfigReader, others: int) -> None:
    """A5-2: fine-tunes and quantized copies keep the count of a head that they do not have."""
    reader.enter("text_config")
    if count := declared(reader):
        raise reader.error(
            reader.origins["layer_count"],
            f"{count}, but there is no tensor of an MTP head among {others}",
            "the head's tensors (mtp.*, or layers.N.eh_proj of one more layer): this copy of the target was saved"
            " without them; use the original release",
        )


# --- how many layers ---


def count_own(reader: ConfigReader, headers: Headers, has_key: bool = True) -> int:
    """The number of layers under `mtp.layers`, by the tensors; what the config says has to agree (A5-2).

    A family without `has_key` is published without one, and its tensors alone count.
    """
    found = numbers(headers, LAYER)
    if not found:
        raise WrongInput(f"{reader.where}: mtp.layers.0: no tensor of it, though there are others under mtp.")
    if not has_key and declared(reader) is None:
        reader.origins["layer_count"] = "tensor names"
        return _agreed(reader, [f"mtp.layers.{i}" for i in found], found, 0, len(found))
    return _agreed(reader, [f"mtp.layers.{i}" for i in found], found, 0, counted(reader, len(found), COUNT))


def count_appended(reader: ConfigReader, headers: Headers, depth: int) -> int:
    """The number of layers behind the target's `depth` own ones, by the tensors; the config has to agree (A5-2)."""
    found = numbers(headers, APPENDED)
    count = counted(reader, len(found), APPENDED_COUNT)
    return _agreed(reader, [f"layers.{i}.eh_proj" for i in found], found, depth, count)


def count_blocks(reader: ConfigReader, headers: Headers) -> int:
    """The number of heads that are numbered under `mtp`, by the tensors; the config has to agree (A5-2)."""
    found = numbers(headers, BLOCK)
    return _agreed(reader, [f"mtp.{i}" for i in found], found, 0, counted(reader, len(found), APPENDED_COUNT))


def numbers(headers: Headers, layer: re.Pattern[str]) -> list[int]:
    return sorted({int(match[1]) for name in headers if (match := layer.match(plain_name(name)))})


def counted(reader: ConfigReader, found: int, key: str) -> int:
    count = declared(reader)
    if not count:
        said = "0" if count == 0 else "no such key"
        expected = f"{found}: the checkpoint has tensors of as many; if that is right, give it with --set"
        raise reader.error(reader.places(key)[0], said, f"{expected} {reader.places(key)[0]}={found}")
    return count


def _agreed(reader: ConfigReader, names: list[str], found: list[int], first: int, count: int) -> int:
    if len(found) != count or found != list(range(first, first + len(found))):
        origin = reader.origins["layer_count"]
        raise reader.error(origin, f"{count}, but the tensors are {', '.join(names)}", _expected(first, count))
    return count


def _expected(first: int, count: int) -> str:
    return "as many layers" if first == 0 else f"as many layers, from {first} on, where the target's own end"


# --- facts and tensors that every family has ---


def read_head(
    kind: str, reader: ConfigReader, target: Target | None, count: int, width: str, rope: Rope, **more: Any
) -> DrafterSpec:
    """Every fact of a head; `width` is the key of its feed-forward's width, `more` the facts of its family alone, and
    those that it has elsewhere than most (`OWN`)."""
    depth, hidden = read_depth(reader), reader.get("hidden_size", int, "hidden_size")
    own = {name: reader.get(name, kind, path) for name, (kind, path) in OWN.items() if name not in more}
    reader.origins["target_hidden_size"] = reader.origins["hidden_size"]
    reader.origins["causal"] = "an MTP head drafts one token after the other"
    _check_target(reader, target, depth, hidden)
    return DrafterSpec(
        kind=kind,
        layer_count=count,
        hidden_size=hidden,
        feed_forward_size=reader.get("feed_forward_size", int, width),
        context_length=reader.get("context_length", int, "max_position_embeddings"),
        vocab_size=reader.get("vocab_size", int, "vocab_size"),
        rope=rope,
        target_layer_count=depth,
        target_hidden_size=hidden,
        causal=True,
        **own,
        **more,
    )


def read_depth(reader: ConfigReader) -> int:
    return reader.get("target_layer_count", int, "num_hidden_layers")


def read_head_dim(reader: ConfigReader) -> int:
    return reader.get("head_dim", int, "head_dim")


def _check_target(reader: ConfigReader, target: Target | None, depth: int, hidden: int) -> None:
    """A `--target` beside the checkpoint is another copy of the same model."""
    if target is None:
        return
    for field, ours, theirs in (
        ("target_layer_count", depth, target.layer_count),
        ("target_hidden_size", hidden, target.hidden_size),
    ):
        if ours != theirs:
            expected = f"{theirs}, as the target {target.name} has; an MTP head belongs to the model it was trained in"
            raise reader.error(reader.origins[field], f"found {ours}", expected)


def read_rope(reader: ConfigReader) -> Rope:
    """Theta and rotated dimensions; the latter have defaults in transformers and in llama.cpp, here they are facts."""
    theta = read_theta(reader, [])
    factor = reader.get("rope.dimensions", float, "rope_parameters.partial_rotary_factor", "partial_rotary_factor")
    if not 0 < factor <= 1:
        raise reader.error(reader.origins["rope.dimensions"], f"found {factor}", "a fraction of the head, in (0, 1]")
    return Rope(theta, int(read_head_dim(reader) * factor))


def read_whole_rope(reader: ConfigReader) -> Rope:
    """Theta alone: every dimension of a head is rotated, and a config that says otherwise is refused."""
    reader.expect("partial_rotary_factor", 1, "llama.cpp rotates whole heads here")
    reader.expect("rope_parameters.partial_rotary_factor", 1, "llama.cpp rotates whole heads here")
    theta = read_theta(reader, [])
    dimensions = read_head_dim(reader)
    reader.origins["rope.dimensions"] = reader.origins["head_dim"]
    return Rope(theta, dimensions)


def refuse_scaling(reader: ConfigReader) -> None:
    if (scaling := read_scaling(reader, ("linear", "yarn"))) is not None:
        raise reader.error("rope_parameters", f"found {scaling.method} scaling", "none: not converted for MTP heads")


def is_tied(reader: ConfigReader) -> bool:
    reader.enter("text_config")
    return reader.find("head", bool, "tie_word_embeddings") is True


def shared_rules(
    reader: ConfigReader, norm: Op | None = COPY, embedding: str = "embed_tokens"
) -> tuple[TensorRule, ...]:
    """What a runtime needs of the target to load the head alone; Bailing calls its `embedding` otherwise, and Qwen4Exp
    has no `norm`."""
    no_head = not reader.raw or is_tied(reader)  # of a config nobody gave nothing is known
    return (
        TensorRule(f"{embedding}.weight", Role.TOKEN_EMBEDDING, ("vocab", "hidden")),
        *([] if norm is None else [TensorRule("norm.weight", Role.OUTPUT_NORM, ("hidden",), norm)]),
        TensorRule("lm_head.weight", Role.OUTPUT, ("vocab", "hidden"), optional=no_head),
    )


def dropped(reader: ConfigReader) -> tuple[Dropped, ...]:
    if is_tied(reader):
        return (Dropped("lm_head.weight", "tie_word_embeddings is true: the embedding is the output head"),)
    return ()


def expert_rules(mlp: str) -> tuple[TensorRule, ...]:
    """A mixture's router and experts."""
    return (TensorRule(f"{mlp}gate.weight", Role.FFN_ROUTER, ("experts", "hidden")), *stacked_rules(mlp))


def stacked_rules(mlp: str) -> tuple[TensorRule, ...]:
    """Experts, which are stacked whatever the checkpoint has (`stack_experts`)."""
    experts = f"{mlp}experts."
    return (
        TensorRule(f"{experts}gate_proj.weight", Role.FFN_GATE_EXPERTS, ("experts", "feed_forward", "hidden")),
        TensorRule(f"{experts}up_proj.weight", Role.FFN_UP_EXPERTS, ("experts", "feed_forward", "hidden")),
        TensorRule(f"{experts}down_proj.weight", Role.FFN_DOWN_EXPERTS, ("experts", "hidden", "feed_forward")),
    )


def shared_expert_rules(expert: str, optional: bool = False) -> tuple[TensorRule, ...]:
    up, down = ("shared_feed_forward", "hidden"), ("hidden", "shared_feed_forward")
    return (
        TensorRule(f"{expert}gate_proj.weight", Role.FFN_GATE_SHARED, up, optional=optional),
        TensorRule(f"{expert}up_proj.weight", Role.FFN_UP_SHARED, up, optional=optional),
        TensorRule(f"{expert}down_proj.weight", Role.FFN_DOWN_SHARED, down, optional=optional),
    )


def joining_rules(layer: str, norm: Op = COPY) -> tuple[TensorRule, ...]:
    """What puts a token's embedding beside a state."""
    return (
        TensorRule(f"{layer}eh_proj.weight", Role.NEXTN_PROJ, ("hidden", "embedding and state")),
        TensorRule(f"{layer}enorm.weight", Role.NEXTN_EMBEDDING_NORM, ("hidden",), norm),
        TensorRule(f"{layer}hnorm.weight", Role.NEXTN_STATE_NORM, ("hidden",), norm),
    )


def own_table_rules(layer: str) -> tuple[TensorRule, ...]:
    """An embedding, an output head and its norm, where a head does not share its target's."""
    return (
        TensorRule(f"{layer}embed_tokens.weight", Role.NEXTN_EMBEDDING, ("vocab", "hidden"), optional=True),
        TensorRule(f"{layer}shared_head.head.weight", Role.NEXTN_OUTPUT, ("vocab", "hidden"), optional=True),
        TensorRule(f"{layer}shared_head.norm.weight", Role.NEXTN_OUTPUT_NORM, ("hidden",), optional=True),
    )
