"""The target a drafter was made for: the few facts a drafter needs of it, and its tokenizer. Weights are never read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from convert_drafter.converters.config import ConfigReader, lookup
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.gguf_model import PART, read_model
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.repository import name_of
from convert_drafter.converters.tokenizer import TOKENS, Tokenizer, copy_tokenizer, read_json, read_tokenizer

T = TypeVar("T", int, str)
# The sub-configs of multimodal models that llama.cpp merges over the top level (load_hparams in conversion/base.py;
# the later ones win there)
TEXT_CONFIGS = ("lfm", "language_config", "thinker_config.text_config", "lm_config", "llm_config", "text_config")
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
GEMMA4, GEMMA4_GGUF, SLIDING = "Gemma4", "gemma4", "sliding_attention"
HIDDEN = ("hidden_size", "n_embd", "dim")


@dataclass(frozen=True)
class CachedLayer:
    """Keys and values of one layer: width and number of heads, the base they are turned by, and how far it looks back.

    A number is None where it is not told, `window` also where the layer is a full one.
    """

    head_dim: int | None
    kv_head_count: int | None
    theta: float | None
    window: int | None


@dataclass(frozen=True)
class Target:
    """`architecture` as the source names it: a class in a config, a llama.cpp name in a GGUF.

    `layer_count` leaves out next-token-prediction layers; `embedding_scale` is what the target multiplies its
    embeddings by, None if it does not; `context_length` in tokens, None where it is not told. `last_layers` are the
    last two of a Gemma 4, None of any other target.
    """

    name: str
    architecture: str
    layer_count: int
    hidden_size: int
    vocab_size: int
    uses_mrope: bool
    embedding_scale: float | None
    context_length: int | None = None
    last_layers: tuple[CachedLayer, CachedLayer] | None = None


def read_target(path: Path) -> Target:
    """The target in a Hugging Face folder (its config.json) or a GGUF file; `WrongInput` names what is missing."""
    return _from_config(path) if _is_folder(path) else _from_gguf(path, read_model(path))


def target_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of the target at `path`, with exactly `vocab_size` tokens."""
    if _is_folder(path):
        return read_tokenizer(path, vocab_size)
    keys = read_model(path).keys
    try:
        return copy_tokenizer(keys, vocab_size)
    except WrongInput as error:
        raise WrongInput(f"{path}: {error}") from error


def _is_folder(path: Path) -> bool:
    """True for a folder with a config.json, False for a file."""
    if path.is_file():
        return False
    if not path.is_dir():
        state = "a link to nothing" if path.is_symlink() else "nothing there"
        raise WrongInput(f"{path}: {state}, expected the target's folder or its GGUF file")
    if not (path / "config.json").is_file():
        state = "no config.json in it" if any(path.iterdir()) else "an empty folder"
        raise WrongInput(f"{path}: {state}, expected the target's Hugging Face files or a GGUF file")
    return True


# --- Hugging Face ---


def _from_config(folder: Path) -> Target:
    path = folder / "config.json"
    raw = read_json(path)
    text = next((t for t in (lookup(raw, key) for key in TEXT_CONFIGS) if isinstance(t, dict)), {})
    # null counts as missing, so a null in the sub-config does not hide the top level's value
    reader = ConfigReader({**raw, **{key: value for key, value in text.items() if value is not None}}, str(path))
    hidden = _fact(reader, int, *HIDDEN)
    architecture = _architecture(reader)
    return Target(
        name=Path(reader.find("name", str, "_name_or_path") or name_of(folder)).name,
        architecture=architecture,
        layer_count=_fact(reader, int, *LAYERS),
        hidden_size=hidden,
        vocab_size=_fact(reader, int, "vocab_size"),
        uses_mrope=any(_has_mrope(config) for config in (text, raw)),
        embedding_scale=_scale(architecture, "Gemma", hidden),
        context_length=reader.find("context_length", int, "max_position_embeddings"),
        last_layers=_last_of_config(reader) if architecture.startswith(GEMMA4) else None,
    )


def _fact(reader: ConfigReader, kind: type[T], *paths: str) -> T:
    """A fact of the target; the user's `--set` is for the drafter's config, so it is no advice here."""
    value = reader.find(paths[0], kind, *paths)
    if value is None:
        raise WrongInput(f"{reader.where}: {paths[0]}: missing (looked at {' or '.join(paths)})")
    return value


def _architecture(reader: ConfigReader) -> str:
    names = reader.find_list("architecture", str, "architectures")
    if not names:
        raise WrongInput(f"{reader.where}: architectures: missing, expected the target's class")
    return names[0]


def _last_of_config(reader: ConfigReader) -> tuple[CachedLayer, CachedLayer] | None:
    """As transformers reads it: full layers have heads of their own where keys serve as values, or where it is said."""
    types = reader.find_list("layer_types", str, "layer_types") or ()
    if len(types) < 2:
        return None

    def layer(i: int) -> CachedLayer:
        own, slides = f"per_layer_config.{i}.", types[i] == SLIDING
        k_is_v = reader.find("keys as values", bool, "attention_k_eq_v")
        width, count = ("head_dim", "num_key_value_heads")
        widths = (f"{own}{width}", *([] if slides else [f"global_{width}"]))
        counts = (f"{own}{count}", *(["num_global_key_value_heads"] if k_is_v and not slides else []))
        return CachedLayer(
            reader.find(width, int, *widths) or (reader.find(width, int, width) if slides else None),
            reader.find(count, int, *counts) or reader.find(count, int, count),
            reader.find("theta", float, f"rope_parameters.{types[i]}.rope_theta"),
            reader.find("window", int, "sliding_window") if slides else None,
        )

    return layer(len(types) - 2), layer(len(types) - 1)


def _has_mrope(config: Mapping[str, Any]) -> bool:
    """M-RoPE targets position tokens in several dimensions (_target_uses_mrope in llama.cpp's conversion/qwen.py)."""
    return any(lookup(config, f"{key}.mrope_section") for key in ("rope_parameters", "rope_scaling"))


def _scale(architecture: str, prefix: str, hidden: int) -> float | None:
    """Gemma multiplies its embeddings by the root of their width (DFlashModel in llama.cpp's conversion/qwen.py)."""
    return math.sqrt(hidden) if architecture.startswith(prefix) else None


# --- GGUF ---


def _from_gguf(path: Path, file: GGUFFile) -> Target:
    architecture = _key(path, file.keys, "general.architecture", str)
    nextn = f"{architecture}.nextn_predict_layers"
    hidden = _key(path, file.keys, f"{architecture}.embedding_length", int)
    sections = file.keys.get(f"{architecture}.rope.dimension_sections")
    room = f"{architecture}.context_length"
    return Target(
        name=_key(path, file.keys, "general.name", str) if "general.name" in file.keys else _stem(path),
        architecture=architecture,
        layer_count=_key(path, file.keys, f"{architecture}.block_count", int)
        - (_key(path, file.keys, nextn, int) if nextn in file.keys else 0),
        hidden_size=hidden,
        vocab_size=_gguf_vocab_size(path, file.keys, f"{architecture}.vocab_size"),
        uses_mrope=sections is not None and isinstance(sections.value, tuple) and any(sections.value),
        embedding_scale=_scale(architecture, "gemma", hidden),
        context_length=_key(path, file.keys, room, int) if room in file.keys else None,
        last_layers=_last_of_gguf(path, file.keys, architecture) if architecture == GEMMA4_GGUF else None,
    )


def _stem(path: Path) -> str:
    """The file's name, without its number among the parts of a model."""
    part = PART.fullmatch(path.name)
    return part["stem"] if part else path.stem


def _last_of_gguf(path: Path, keys: Mapping[str, KeyValue], arch: str) -> tuple[CachedLayer, CachedLayer] | None:
    """As llama.cpp reads it (load_arch_hparams in src/models/gemma4.cpp)."""
    found = {name: entry.value for name, entry in keys.items() if name.startswith(f"{arch}.")}
    pattern = found.get(f"{arch}.attention.sliding_window_pattern")
    if not isinstance(pattern, tuple) or len(pattern) < 2:
        return None
    counts = found.get(f"{arch}.attention.head_count_kv")

    def layer(i: int) -> CachedLayer:
        slides = pattern[i] is True
        number = {
            name: found.get(f"{arch}.{key}{'_swa' if slides else ''}")
            for name, key in {"head_dim": "attention.key_length", "theta": "rope.freq_base"}.items()
        }
        count = counts[i] if isinstance(counts, tuple) and len(counts) == len(pattern) else counts
        window = _key(path, keys, f"{arch}.attention.sliding_window", int) if slides else None
        head_dim, theta = number["head_dim"], number["theta"]
        return CachedLayer(
            head_dim if isinstance(head_dim, int) else None,
            count if isinstance(count, int) else None,
            float(theta) if isinstance(theta, float) else None,
            window,
        )

    return layer(len(pattern) - 2), layer(len(pattern) - 1)


def _gguf_vocab_size(path: Path, keys: Mapping[str, KeyValue], key: str) -> int:
    """The key is optional: llama.cpp itself counts the token list."""
    tokens = keys[TOKENS].value if TOKENS in keys else None
    if not isinstance(tokens, tuple):
        return _key(path, keys, key, int)
    if key in keys and _key(path, keys, key, int) != len(tokens):
        raise WrongInput(f"{path}: {key}: found {keys[key].value}, but {TOKENS} has {len(tokens)} tokens")
    return len(tokens)


def _key(path: Path, keys: Mapping[str, KeyValue], key: str, kind: type[T]) -> T:
    value = keys[key].value if key in keys else None
    if not isinstance(value, kind) or isinstance(value, bool):
        state = "missing" if value is None else f"found {value!r}"
        raise WrongInput(f"{path}: {key}: {state}, expected {kind.__name__}")
    return value
