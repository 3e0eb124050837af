"""Keys beside a dialect's rows: those a loader reads all the same, and those that only our own checks read.

A scalar under a key that llama.cpp reads stops it where the type is another one. What a DFlash drafter does not have,
such as experts, would make another model of it or stop it as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gguf import GGUFValueType

from convert_drafter.converters.dialects import Cell
from convert_drafter.converters.dialects.cell import OWN_ROWS
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.gguf_read import SPLIT_COUNT
from convert_drafter.converters.structure import Finding
from convert_drafter.converters.tokenizer import TOKENS, vocabulary_hash

T = GGUFValueType
Keys = Mapping[str, KeyValue]
VOCAB_HASH = "drafter.vocab.sha256"
# After the architecture's name: the type, and the values that leave a DFlash drafter what it is; none: any value
# (load_hparams in src/llama-model.cpp, load_arch_hparams in src/models/dflash.cpp of llama.cpp 11434).
Known = tuple[GGUFValueType, tuple[Any, ...]]
NONE: Known = (T.UINT32, (0,))
ONLY: dict[str, dict[str, Known]] = {
    "llama.cpp": {
        "hidden_activation": (T.STRING, ("silu",)),
        "embedding_length_per_layer_input": NONE, "nextn_predict_layers": NONE, "hyper_connection.count": NONE,
        "expert_count": NONE, "expert_used_count": NONE, "expert_group_count": NONE, "expert_group_used_count": NONE,
        "conv_kernel_size": NONE, "conv_group_size": NONE, "selector_rank": NONE, "selector_top_k": NONE,
        "pooling_type": NONE, "classifier.pooling_type": NONE,
        "attention.scale": (T.FLOAT32, (0.0,)),
        # no facts of EAGLE-3's, but read all the same
        "attention.causal": (T.BOOL, (True,)), "attention.sliding_window": NONE,
        "rope.scale_linear": (T.FLOAT32, (0.0, 1.0)), "rope.scaling.alpha": (T.FLOAT32, (0.0,)),
        "rope.scaling.finetuned": (T.BOOL, ()), "rope.scaling.type": (T.STRING, ("none",)),
    }
}  # fmt: skip
# Widths that loaders take for another fact's, unless they are told.
SAME_AS = {
    "attention.key_length_swa": "head_dim", "attention.value_length_swa": "head_dim",
    "rope.dimension_count_swa": "rope.dimensions", "embedding_length_out": "hidden_size",
}  # fmt: skip
TYPES_OF = {
    "general.name": T.STRING, "general.file_type": T.UINT32, "general.quantization_version": T.UINT32,
    SPLIT_COUNT: T.UINT16, "tokenizer.ggml.model": T.STRING, "tokenizer.ggml.pre": T.STRING,
    "tokenizer.ggml.token_type_count": T.UINT32, "tokenizer.ggml.remove_extra_whitespaces": T.BOOL,
    "tokenizer.ggml.normalizer.lowercase": T.BOOL, "tokenizer.ggml.normalizer.strip_accents": T.BOOL,
}  # fmt: skip
ELEMENTS_OF = {"tokenizer.ggml.suppress_tokens": (T.INT32,), "tokenizer.ggml.precompiled_charsmap": (T.UINT8, T.INT8)}


def key_faults(cell: Cell, keys: Keys, facts: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys of the architecture that change the model or that nobody knows, and wrong types under common names."""
    known = {row.key.format(a=cell.arch) for row in cell.rows} | {c.key.format(a=cell.arch) for c in cell.counts}
    for key, entry in keys.items():
        if key.startswith(f"{cell.arch}.") and key not in known:
            yield from _beside(cell, key.removeprefix(f"{cell.arch}."), entry, facts)
        yield from _type(key, entry)
    yield from _idle_window(cell, keys)


def _beside(cell: Cell, name: str, entry: KeyValue, facts: Mapping[str, Any]) -> Iterator[Finding]:
    only = ONLY.get(cell.runtime, {})
    if only and name in SAME_AS and SAME_AS[name] in facts:
        kind, values = T.UINT32, (facts[SAME_AS[name]],)
    elif name in only:
        kind, values = only[name]
    else:
        unknown = f"{entry.key}: unknown to us: nobody may read it, or it changes what is computed"
        yield Finding(unknown, fault=False)
        return
    if entry.type is not kind or (values and entry.value not in values):
        expected = " or ".join(map(repr, values)) or f"a {kind.name}"
        yield Finding(f"{entry.key}: found {shown(entry)}, expected {expected} or no such key in a {cell.kind} drafter")


def _type(key: str, entry: KeyValue) -> Iterator[Finding]:
    expected = TYPES_OF.get(key)
    if key.startswith("tokenizer.ggml."):
        expected = T.UINT32 if key.endswith("_token_id") else T.BOOL if ".add_" in key else expected
    if expected is not None and entry.type is not expected:
        yield Finding(f"{key}: found {entry.type.name}, expected {expected.name}")
    elements = ELEMENTS_OF.get(key)
    if elements is not None and entry.element not in elements:
        yield Finding(f"{key}: found {shown(entry)}, expected an array of {elements[0].name}")


def _idle_window(cell: Cell, keys: Keys) -> Iterator[Finding]:
    """llama.cpp asserts that a window has a layer (llama_model::create_memory); a drafter without one has no keys."""
    size, layers = (keys.get(f"{cell.arch}.attention.sliding_window{end}") for end in ("", "_pattern"))
    if size is None or layers is None or not isinstance(layers.value, tuple) or any(layers.value):
        return
    stops = cell.runtime == "llama.cpp" and size.value != 0
    yield Finding(f"{layers.key}: no layer slides, expected at least one, or no {size.key}", fault=stops)


def shown(entry: KeyValue) -> str:
    value = entry.value
    text = f"{len(value)} entries" if isinstance(value, tuple) and len(value) > 16 else repr(value)
    return f"{text} ({entry.type.name if entry.element is None else f'array of {entry.element.name}'})"


# --- what our own converter notes ---


def provenance_faults(cell: Cell, keys: Keys) -> Iterator[Finding]:
    """Keys that no runtime reads, but that a later check of the pair relies on."""
    kind = keys.get("drafter.kind")
    if kind is not None and kind.type is T.STRING and kind.value != cell.kind:
        yield Finding(f"drafter.kind: found {shown(kind)}, expected {cell.kind!r}, as the architecture says")
    for key, entry in keys.items():
        own = key.startswith("drafter.") and key not in {row.key for row in OWN_ROWS}
        if own and T.STRING not in (entry.type, entry.element):
            yield Finding(f"{key}: found {shown(entry)}, expected STRING")
    recorded, tokens = keys.get(VOCAB_HASH), keys.get(TOKENS)
    if recorded is None or tokens is None or tokens.element is not T.STRING:
        return
    found = vocabulary_hash(tokens.value)  # type: ignore[arg-type]
    if recorded.value != found:
        said = f"{VOCAB_HASH}: found {str(recorded.value)[:12]}..., but the file's own tokens give {found[:12]}..."
        yield Finding(f"{said}: the tokenizer was replaced after the conversion")
