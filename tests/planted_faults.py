"""Faults planted in a drafter's file, each named after its trap: what doctor has to find, and llama.cpp may not."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.quant import TYPES, dequantize, quantize

T, Q = GGUFValueType, GGMLQuantizationType
Edit = Callable[["Draft"], Any]


@dataclass
class Draft:
    """A drafter's file taken apart: change anything, then write it."""

    keys: dict[str, KeyValue]
    tensors: dict[str, tuple[StoredTensor, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> Draft:
        file = read_gguf(path)
        return cls(dict(file.keys), {n: (t, file.tensor_bytes(n)) for n, t in file.tensors.items()})

    def write(self, out: Path) -> Path:
        stored = [tensor for tensor, _ in self.tensors.values()]
        data = {tensor.name: array for tensor, array in self.tensors.values()}
        write_gguf(out, list(self.keys.values()), stored, lambda tensor: [data[tensor.name]])
        return out

    def key(self, ending: str) -> str:
        """The drafter's key with this ending, whatever the architecture."""
        return next(key for key in self.keys if key.endswith(ending))

    def drop(self, *endings: str) -> None:
        for ending in endings:
            del self.keys[self.key(ending)]

    def set(self, ending: str, value: Any, kind: T | None = None, element: T | None = None) -> None:
        key = next((key for key in self.keys if key.endswith(ending)), ending)
        old = self.keys.get(key, KeyValue(key, T.UINT32, 0))
        self.keys[key] = KeyValue(key, kind or old.type, value, element or (old.element if kind is None else None))

    def weights(self, name: str) -> np.ndarray:
        stored, data = self.tensors[name]
        return dequantize(data, TYPES[stored.type.name], stored.shape)

    def put(self, name: str, weights: np.ndarray, kind: str | None = None) -> None:
        """Other weights under a name, in the type the tensor has, or another one."""
        kind = kind or self.tensors[name][0].type.name
        data = quantize(np.ascontiguousarray(weights, np.float32), TYPES[kind])
        self.tensors[name] = (StoredTensor(name, weights.shape, Q(TYPES[kind].ggml_id)), data)

    def raw(self, name: str, kind: Q, data: np.ndarray) -> None:
        self.tensors[name] = (StoredTensor(name, self.tensors[name][0].shape, kind), data.reshape(-1).view(np.uint8))

    def swap(self, one: str, other: str) -> None:
        """Exchange what two tensors of one shape hold."""
        (a, x), (b, y) = self.tensors[one], self.tensors[other]
        self.tensors[one], self.tensors[other] = (replace(b, name=one), y), (replace(a, name=other), x)

    def blocks(self, name: str) -> np.ndarray:
        """The tensor's blocks by field; a change of them is a change of the draft."""
        stored, data = self.tensors[name]
        copy = data.copy()
        self.tensors[name] = (stored, copy)
        return copy.view(TYPES[stored.type.name].layout)


@dataclass(frozen=True)
class Fault:
    """What is done to the file, and what doctor's finding has to say."""

    says: str
    edit: Edit


def poison(name: str, value: float) -> Edit:
    def edit(draft: Draft) -> None:
        weights = draft.weights(name)
        weights.flat[weights.size // 2] = value
        stored = draft.tensors[name][0]
        draft.tensors[name] = (stored, np.ascontiguousarray(weights, np.float32).reshape(-1).view(np.uint8))

    return edit


def block_scale(name: str, value: float) -> Edit:
    def edit(draft: Draft) -> None:
        draft.blocks(name)["scale"][7] = value

    return edit


def retyped(name: str, kind: str) -> Edit:
    return lambda draft: draft.put(name, draft.weights(name), kind)


def tokens(change: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Edit:
    def edit(draft: Draft) -> None:
        old = draft.keys["tokenizer.ggml.tokens"]
        draft.keys[old.key] = replace(old, value=change(old.value))  # type: ignore[arg-type]
        draft.keys.pop("drafter.vocab.sha256", None)

    return edit


def several(*edits: Edit) -> Edit:
    return lambda draft: [edit(draft) for edit in edits]


def extra(name: str, shape: tuple[int, ...]) -> Edit:
    def edit(draft: Draft) -> None:
        draft.tensors[name] = (StoredTensor(name, shape, Q.F32), np.ones(shape, np.float32).reshape(-1).view(np.uint8))

    return edit


def renamed(old: str, new: str) -> Edit:
    def edit(draft: Draft) -> None:
        stored, data = draft.tensors.pop(old)
        draft.tensors[new] = (replace(stored, name=new), data)

    return edit


def transposed(name: str) -> Edit:
    return lambda draft: draft.put(name, draft.weights(name).T)


# Of the pair's drafter as Q8_0 for llama.cpp: 2 layers, capture layers 0, 2, 4 of 6, window 48 on layer 0.
STRUCTURE: dict[str, Fault] = {
    "A1-43 no theta": Fault("dflash.rope.freq_base: missing", lambda d: d.drop("dflash.rope.freq_base")),
    "A6-1 no block size": Fault("dflash.block_size: missing", lambda d: d.drop("dflash.block_size")),
    "T-53 no mask token": Fault("mask_token_id: missing", lambda d: d.drop("mask_token_id")),
    "T-53 mask token beyond the vocabulary": Fault("mask_token_id: found 2048", lambda d: d.set("mask_token_id", 2048)),
    "T-53 mask token -1": Fault("mask_token_id: found 4294967295", lambda d: d.set("mask_token_id", 2**32 - 1)),
    "T-12 no capture layers": Fault("target_layers: missing", lambda d: d.drop("dflash.target_layers")),
    "T-2 capture layers as a count": Fault(
        "dflash.target_layers: found UINT32", lambda d: d.set("dflash.target_layers", 3, T.UINT32)
    ),
    "T-5 capture layers INT64": Fault(
        "dflash.target_layers: found array of INT64",
        lambda d: d.set("dflash.target_layers", (1, 3, 5), T.ARRAY, T.INT64)
    ),
    "T-51 capture layer beyond the target": Fault(
        "dflash.target_layers: found (1, 3, 7)", lambda d: d.set("dflash.target_layers", (1, 3, 7))
    ),
    "T-51 zero-based capture layers": Fault(
        "dflash.target_layers: found (0, 2, 4)", lambda d: d.set("dflash.target_layers", (0, 2, 4))
    ),
    "a capture layer twice": Fault("each target layer once", lambda d: d.set("dflash.target_layers", (1, 3, 3))),
    "T-13 one capture layer more than fc takes": Fault(
        "fc.weight: found shape [256, 768]", lambda d: d.set("dflash.target_layers", (1, 3, 4, 5))
    ),
    "T-13 fc of no whole width": Fault(
        "fc.weight: found shape", lambda d: d.put("fc.weight", d.weights("fc.weight")[:, :704])
    ),
    "T-16 window without pattern": Fault("sliding_window_pattern: missing", lambda d: d.drop("sliding_window_pattern")),
    "T-16 pattern without window": Fault(
        "attention.sliding_window: missing", lambda d: d.drop("attention.sliding_window")
    ),
    "T-16 pattern of another length": Fault(
        "sliding_window_pattern: found 3 entries", lambda d: d.set("sliding_window_pattern", (True, False, True))
    ),
    "T-16 a window no layer uses": Fault(
        "sliding_window_pattern: no layer slides", lambda d: d.set("sliding_window_pattern", (False, False))
    ),
    "T-5 pattern of floats": Fault(
        "sliding_window_pattern: found array of FLOAT32",
        lambda d: d.set("sliding_window_pattern", (1.0, 0.0), T.ARRAY, T.FLOAT32),
    ),
    "pattern as a period": Fault(
        "sliding_window_pattern: found UINT32", lambda d: d.set("sliding_window_pattern", 2, T.UINT32)
    ),
    "block size 1": Fault("dflash.block_size: found 1", lambda d: d.set("dflash.block_size", 1)),
    "block size without end": Fault(
        "dflash.block_size: found 4294967295", lambda d: d.set("dflash.block_size", 2**32 - 1)
    ),
    "block size as text": Fault("dflash.block_size: found STRING", lambda d: d.set("dflash.block_size", "8", T.STRING)),
    "heads that do not divide": Fault("head_count_kv: found 3", lambda d: d.set("head_count_kv", 3)),
    "no heads": Fault("attention.head_count: missing", lambda d: d.drop("attention.head_count")),
    "no query width": Fault("attention.key_length: missing", lambda d: d.drop("attention.key_length")),
    "no value width": Fault("attention.value_length: missing", lambda d: d.drop("attention.value_length")),
    "values wider than keys": Fault(
        "attention.value_length: found 128", lambda d: d.set("attention.value_length", 128)
    ),
    "T-22 theta 0": Fault("rope.freq_base: found 0", lambda d: d.set("rope.freq_base", 0.0)),
    "T-22 theta NaN": Fault("rope.freq_base: found nan", lambda d: d.set("rope.freq_base", float("nan"))),
    "T-22 theta infinite": Fault("rope.freq_base: found inf", lambda d: d.set("rope.freq_base", float("inf"))),
    "T-22 theta a whole number": Fault(
        "rope.freq_base: found UINT32", lambda d: d.set("rope.freq_base", 10000000, T.UINT32)
    ),
    "odd rotary width": Fault("rope.dimension_count: found 63", lambda d: d.set("rope.dimension_count", 63)),
    "rotary width beyond the head": Fault(
        "rope.dimension_count: found 128", lambda d: d.set("rope.dimension_count", 128)
    ),
    "unknown rope scaling": Fault(
        "rope.scaling.type: found 'ntk'", lambda d: d.set("dflash.rope.scaling.type", "ntk", T.STRING)
    ),
    "T-56 yarn without its factor": Fault(
        "rope.scaling.factor: missing", lambda d: d.set("dflash.rope.scaling.type", "yarn", T.STRING)
    ),
    "no epsilon": Fault("layer_norm_rms_epsilon: missing", lambda d: d.drop("layer_norm_rms_epsilon")),
    "epsilon 0": Fault("layer_norm_rms_epsilon: found 0", lambda d: d.set("layer_norm_rms_epsilon", 0.0)),
    "no context length": Fault("dflash.context_length: missing", lambda d: d.drop("dflash.context_length")),
    "no layer count": Fault("dflash.block_count: missing", lambda d: d.drop("dflash.block_count")),
    "one layer too many": Fault("blk.2.ffn_down.weight: missing", lambda d: several(
        lambda e: e.set("dflash.block_count", 3), lambda e: e.set("sliding_window_pattern", (True, False, False))
    )(d)),
    "T-19 one layer too few": Fault("blk.1.ffn_down.weight: unknown", lambda d: several(
        lambda e: e.set("dflash.block_count", 1), lambda e: e.set("sliding_window_pattern", (True,))
    )(d)),
    "layers without end": Fault("layers, but 25 tensors", lambda d: d.set("dflash.block_count", 2**31)),
    "T-19 a tensor is missing": Fault("blk.1.ffn_up.weight: missing", lambda d: d.tensors.pop("blk.1.ffn_up.weight")),
    "T-19 no query norm": Fault("attn_q_norm.weight: missing", lambda d: d.tensors.pop("blk.0.attn_q_norm.weight")),
    "T-19 an unknown tensor": Fault("blk.0.attn_gate.weight: unknown", extra("blk.0.attn_gate.weight", (8, 256))),
    "T-44 another runtime's name": Fault("dflash_fc.weight: unknown", renamed("fc.weight", "dflash_fc.weight")),
    "a matrix on its side": Fault("blk.0.ffn_down.weight: found shape", transposed("blk.0.ffn_down.weight")),
    "hidden size": Fault("found shape", lambda d: d.set("dflash.embedding_length", 512)),
    "T-17 F16 norm": Fault("attn_norm.weight: found F16", retyped("blk.0.attn_norm.weight", "F16")),
    "T-17 BF16 norm": Fault("output_norm.weight: found BF16", retyped("output_norm.weight", "BF16")),
    "T-17 quantized query norm": Fault("attn_q_norm.weight: found Q8_0", retyped("blk.1.attn_q_norm.weight", "Q8_0")),
    "a matrix of integers": Fault("blk.0.attn_v.weight: found I32", lambda d: d.raw(
        "blk.0.attn_v.weight", Q.I32, np.ones((128, 256), np.int32)
    )),
    "a matrix of doubles": Fault("blk.0.attn_v.weight: found F64", lambda d: d.raw(
        "blk.0.attn_v.weight", Q.F64, np.ones((128, 256), np.float64)
    )),
    "NaN in a norm": Fault("blk.0.attn_norm.weight (F32): 1 of 256", poison("blk.0.attn_norm.weight", float("nan"))),
    "infinity in a norm": Fault("row 0, column 128", poison("output_norm.weight", float("inf"))),
    "an infinite scale": Fault("fc.weight (Q8_0): 32 of", block_scale("fc.weight", float("inf"))),
    "a scale of NaN": Fault("blk.1.ffn_up.weight (Q8_0): 32 of", block_scale("blk.1.ffn_up.weight", float("nan"))),
    "no architecture's activation": Fault(
        "hidden_activation: found 'relu'", lambda d: d.set("dflash.hidden_activation", "relu", T.STRING)
    ),
    "another activation": Fault(
        "hidden_activation: found 'gelu'", lambda d: d.set("dflash.hidden_activation", "gelu", T.STRING)
    ),
    "MTP layers": Fault("nextn_predict_layers: found 1", lambda d: d.set("dflash.nextn_predict_layers", 1)),
    "more MTP layers than layers": Fault("nextn_predict_layers", lambda d: d.set("dflash.nextn_predict_layers", 9)),
    "another width in sliding layers": Fault(
        "key_length_swa: found 32", lambda d: d.set("dflash.attention.key_length_swa", 32, T.UINT32)
    ),
    "another rotary width in sliding layers": Fault(
        "dimension_count_swa: found 3", lambda d: d.set("dflash.rope.dimension_count_swa", 3, T.UINT32)
    ),
    "another width of the output": Fault(
        "embedding_length_out: found 64", lambda d: d.set("dflash.embedding_length_out", 64, T.UINT32)
    ),
    "pooling": Fault("pooling_type: found 'x'", lambda d: d.set("dflash.pooling_type", "x", T.STRING)),
    "alpha as text": Fault("scaling.alpha: found '1'", lambda d: d.set("dflash.rope.scaling.alpha", "1", T.STRING)),
    "suppressed tokens as text": Fault(
        "suppress_tokens: found 'x'", lambda d: d.set("tokenizer.ggml.suppress_tokens", "x", T.STRING)
    ),
    "a number for a switch": Fault(
        "remove_extra_whitespaces: found UINT32",
        lambda d: d.set("tokenizer.ggml.remove_extra_whitespaces", 1, T.UINT32),
    ),
    "a split of one part": Fault("split.count: found UINT32", lambda d: d.set("split.count", 1, T.UINT32)),
    "experts": Fault("expert_count: found 8", lambda d: d.set("dflash.expert_count", 8)),
    "a name that is a number": Fault("general.name: found UINT32", lambda d: d.set("general.name", 27, T.UINT32)),
    "26761 no tokenizer": Fault("tokenizer.ggml.model: missing", lambda d: [
        d.keys.pop(key) for key in list(d.keys) if key.startswith("tokenizer.") and "mask" not in key
    ]),
    "26761 a tokenizer of no tokens": Fault("found 'no_vocab'", lambda d: d.set("tokenizer.ggml.model", "no_vocab")),
    "no tokens": Fault("tokenizer.ggml.tokens: missing", lambda d: d.drop("tokenizer.ggml.tokens")),
    "unknown tokenizer": Fault("tokenizer.ggml.model: found 'bpe'", lambda d: d.set("tokenizer.ggml.model", "bpe")),
    "unknown split": Fault("tokenizer.ggml.pre: found 'qwen9'", lambda d: d.set("tokenizer.ggml.pre", "qwen9")),
    "no merges": Fault("tokenizer.ggml.merges: missing", lambda d: d.drop("tokenizer.ggml.merges")),
    "a token twice": Fault("both 'a b'", tokens(lambda old: ("a b", *old[1:-1], "a b"))),
    "T-67 too few tokens": Fault("found 2000 tokens", tokens(lambda old: old[:2000])),
    "T-67 end of text beyond the vocabulary": Fault("eos_token_id: found 9999", lambda d: d.set("eos_token_id", 9999)),
    "token types of another length": Fault(
        "token_type: found 3 entries", lambda d: d.set("tokenizer.ggml.token_type", (1, 1, 1))
    ),
    "token types of another type": Fault(
        "token_type: found an array of UINT32",
        lambda d: d.set("tokenizer.ggml.token_type", (1,) * 2048, T.ARRAY, T.UINT32),
    ),
    "T-53 another tokenizer put in": Fault("drafter.vocab.sha256: found", lambda d: d.set(
        "tokenizer.ggml.tokens", ("another", *d.keys["tokenizer.ggml.tokens"].value[1:])  # type: ignore[misc]
    )),
    "drafter.kind of another": Fault("drafter.kind: found 'eagle3'", lambda d: d.set("drafter.kind", "eagle3")),
}  # fmt: skip


# --- the file's bytes ---


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * share)]


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def offset_of(data: bytes, name: str) -> int:
    """Where the header keeps a tensor's offset: after its name, dimensions and type."""
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (n_dims,) = struct.unpack_from("<I", data, at)
    return at + 4 + 8 * n_dims + 4


def shifted(name: str, by: int) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        at = offset_of(data, name)
        (old,) = struct.unpack_from("<Q", data, at)
        return patched(data, at, struct.pack("<Q", old + by))

    return edit


def no_tensors(data: bytes) -> bytes:
    """T-20: a header that says so, and everything after the keys away."""
    at = data.index(struct.pack("<Q", 9) + b"fc.weight")
    return patched(data, 8, struct.pack("<Q", 0))[:at]


BYTES: Mapping[str, tuple[str, Callable[[bytes], bytes]]] = {
    "T-70 cut in the middle": ("truncated", cut(0.5)),
    "T-70 cut in the last tensor": ("truncated", lambda data: data[:-100]),
    "T-70 cut in the header": ("bytes that are left", cut(0.001)),
    "T-20 no tensors": ("no tensor", no_tensors),
    "A1-44 a tensor outside the file": ("offset", shifted("output_norm.weight", 2**40)),
    "A1-44 a tensor on another": ("overlaps", shifted("output_norm.weight", -32)),
    "a tensor between the lines": ("not aligned", shifted("output_norm.weight", 1)),
    "a version nobody reads": ("version", lambda data: patched(data, 4, struct.pack("<I", 99))),
    "more keys than bytes": ("number of keys", lambda data: patched(data, 16, struct.pack("<Q", 2**60))),
}


# Faults that llama.cpp runs without a word: what only a doctor finds.
RUNS_ANYWAY = (
    "A1-43 no theta", "A6-1 no block size", "T-51 zero-based capture layers", "a capture layer twice",
    "T-16 pattern without window", "T-16 pattern of another length", "T-22 theta 0", "T-22 theta NaN",
    "T-22 theta infinite", "T-56 yarn without its factor", "epsilon 0", "NaN in a norm", "infinity in a norm",
    "an infinite scale", "a scale of NaN", "another activation", "T-67 end of text beyond the vocabulary",
    "T-53 another tokenizer put in", "drafter.kind of another",
    "another width of the output",
)  # fmt: skip


def zeros(name: str) -> Edit:
    return lambda draft: draft.put(name, np.zeros_like(draft.weights(name)))


# What is odd and no fault: what doctor has to say about it, "" for nothing.
HARMLESS: dict[str, Fault] = {
    "implied keys left out": Fault(
        "", lambda d: d.drop("rope.dimension_count", "attention.causal", "dflash.vocab_size")
    ),
    "unsigned capture layers": Fault("", lambda d: d.set("dflash.target_layers", (1, 3, 5), T.ARRAY, T.UINT32)),
    "no window": Fault("", lambda d: d.drop("attention.sliding_window", "sliding_window_pattern")),
    "scaling of none": Fault("", lambda d: d.set("dflash.rope.scaling.type", "none", T.STRING)),
    "linear scaling": Fault("", lambda d: [
        d.set("dflash.rope.scaling.type", "linear", T.STRING), d.set("dflash.rope.scaling.factor", 2.0, T.FLOAT32)
    ]),
    "the same width in sliding layers": Fault(
        "", lambda d: d.set("dflash.attention.key_length_swa", 64, T.UINT32)
    ),
    "T-53 the end of text for a mask": Fault(
        "tokenizer.ggml.eos_token_id: 2046 is the mask token too", lambda d: d.set("mask_token_id", 2046)
    ),
    "an unknown key": Fault("dflash.moon_phase: unknown", lambda d: d.set("dflash.moon_phase", 3, T.UINT32)),
    "a matrix of zeros": Fault("blk.0.ffn_up.weight: all 196608 weights are zero", zeros("blk.0.ffn_up.weight")),
    "another recipe's label": Fault("general.file_type says Q4_K_M", lambda d: d.set("general.file_type", 15)),
    "no label": Fault("", lambda d: d.drop("general.file_type")),
    "no split": Fault("tokenizer.ggml.pre: missing", lambda d: d.drop("tokenizer.ggml.pre")),
    "four bits of another kind": Fault("", lambda d: d.put("fc.weight", d.weights("fc.weight"), "Q4_0")),
}  # fmt: skip
