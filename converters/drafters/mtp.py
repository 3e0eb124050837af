"""MTP heads (NextN): one more decoder layer, which lies in its target's own checkpoint and shares its embedding.

Where they lie and what they are called as llama.cpp's converter reads them (conversion/qwen.py: _QwenMtpMixin). A kind
is one family of targets, because a runtime loads the head as a part of its target: with the target's architecture and
the target's keys.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.plan import plain_name

HEAD = re.compile(r"mtp\.")
LAYER = re.compile(r"mtp\.layers\.(\d{1,9})\.")
SHARED = re.compile(r"(embed_tokens|norm|lm_head)\.")  # of the target, and in the head's own file
COUNT = "mtp_num_hidden_layers"

# Other targets with a head, by the class or model type in their config, and why it is not converted.
NO_RUNTIME, NOT_YET = "no runtime loads it", "not converted yet"
REFUSED = {
    "DeepseekV3ForCausalLM": f"{NO_RUNTIME}: llama.cpp's converter drops it (conversion/deepseek.py)",
    "deepseek_v3": f"{NO_RUNTIME}: llama.cpp's converter drops it (conversion/deepseek.py)",
    "MiMoForCausalLM": f"{NO_RUNTIME}: llama.cpp has no MiMo before V2",
    "Exaone4ForCausalLM": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
    "ExaoneMoEForCausalLM": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
    "ExaoneMoeForCausalLM": f"{NO_RUNTIME}: llama.cpp keeps its tensors and has no graph for them",
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


# --- which tensors, which family ---


def needed(names: Collection[str]) -> Collection[str]:
    """Of a target's tensors those its head's file has; all of them where there is no head."""
    plain = {name: plain_name(name) for name in names}
    if not any(HEAD.match(name) for name in plain.values()):
        return names
    return [name for name, short in plain.items() if HEAD.match(short) or SHARED.match(short)]


def declared(reader: ConfigReader) -> int | None:
    """How many layers of a head the config counts; None where it does not say."""
    return reader.find("layer_count", int, COUNT, "num_nextn_predict_layers")


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
    raise reader.error("architectures", f"the MTP head of {found}, {why}", f"one of {', '.join(known)}")


def refuse_without_head(reader: ConfigReader, others: int) -> None:
    """A5-2: fine-tunes and quantized copies keep the count of a head that they do not have."""
    reader.enter("text_config")
    if count := declared(reader):
        raise reader.error(
            reader.origins["layer_count"],
            f"{count}, but there is no tensor of an MTP head among {others}",
            "the head's tensors (mtp.*): this copy of the target was saved without them; use the original release",
        )


def read_count(reader: ConfigReader, headers: Headers, has_key: bool = True) -> int:
    """The number of layers, by the tensors; what the config says has to agree (A5-2).

    A family without `has_key` is published without one, and its tensors alone count.
    """
    found = sorted({int(match[1]) for name in headers if (match := LAYER.match(plain_name(name)))})
    if not found:
        raise WrongInput(f"{reader.where}: mtp.layers.0: no tensor of it, though there are others under mtp.")
    count = declared(reader)
    if count is None and not has_key:
        reader.origins["layer_count"] = "tensor names"
        return read_count_of(reader, found, len(found))
    if count is None or count == 0:
        said = "0" if count == 0 else "no such key"
        expected = f"{len(found)}: the checkpoint has tensors of as many; if that is right, give it with --set"
        raise reader.error(reader.places(COUNT)[0], said, f"{expected} {reader.places(COUNT)[0]}={len(found)}")
    return read_count_of(reader, found, count)


def read_count_of(reader: ConfigReader, found: list[int], count: int) -> int:
    if len(found) != count or found[-1] != count - 1:
        layers = ", ".join(f"mtp.layers.{i}" for i in found)
        raise reader.error(reader.origins["layer_count"], f"{count}, but the tensors are {layers}", "as many layers")
    return count
