"""A bench of planted faults: what goes wrong with drafters' files, each planted once in a file of its kind.

The ids are the traps (T-..), silent fallbacks (P-..) and seed behaviours (A..) they come from; `RIGHT` are files that
have to pass. Every fault is made on a converted file by changing keys, weights, blocks or bytes, never by a special
case in the converter. Those of DFlash are here, the others' in `kind_faults.py`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import make_mtp
import ml_dtypes
import numpy as np
from engine import llama_binary
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from make_checkpoints import make
from published import PAIR, write_safetensors

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.checkpoint import open_checkpoint
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.quant import TYPES, dequantize, quantize

T = GGUFValueType
Array = np.ndarray
Weights = dict[str, Array]
STRUCTURE, PAIRING, DRAFTS, ACCEPTANCE = "structure", "pairing", "same drafts", "acceptance"
REFUSED = "refused"  # the gate of a file that verify does not take for a drafter's at all
DELETE = object()
NOTHING = "nothing"  # the cause of what no explanation restores
HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 8, 2, 64, 2, 2048
PAD, START, MASK = 2044, 2045, 2047  # <|endoftext|>, <|im_start|>, <|mask|>


@dataclass(frozen=True)
class Case:
    """What verify is asked about. `options` are its job's fields that differ from the defaults.

    `flags` are llama-server's, after and so instead of the right ones.
    """

    file: Path
    target: Path = PAIR / "target"
    source: Path | None = PAIR / "drafter"
    options: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


class Workspace:
    """A folder of a checkpoint's converted files, each made once: the pair's DFlash drafter, or another of CHECKPOINTS.

    An MTP head's checkpoint is its target's.
    """

    def __init__(self, folder: Path, checkpoint: str = "dflash") -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.target = PAIR / "target"
        self._others = dict[str, Workspace]()

    def of(self, checkpoint: str) -> Workspace:
        """Beside this one, of another checkpoint."""
        if checkpoint == self.checkpoint:
            return self
        if checkpoint not in self._others:
            (folder := self.folder / checkpoint.replace(" ", "-")).mkdir(exist_ok=True)
            self._others[checkpoint] = Workspace(folder, checkpoint)
        return self._others[checkpoint]

    @cached_property
    def source(self) -> Path:
        if self.checkpoint == "dflash":
            return PAIR / "drafter"
        if self.checkpoint == "mtp":
            self.target = make_mtp.trained(self.folder / "source")
            return self.target
        return make(self.checkpoint, self.folder / "source")

    def converted(self, recipe: str = "BF16", runtime: str = "llama.cpp") -> Path:
        out = self.folder / f"{runtime}-{recipe}.gguf"
        if not out.exists():
            convert(ConvertJob(self.source, self.target, runtime, recipe, out))
        return out

    def place(self, name: str) -> Path:
        """Where the case's file goes: one folder per fault, so that messages tell which."""
        folder = self.folder / name.replace(" ", "-").replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "drafter.gguf"

    def case(self, file: Path, **more: Any) -> Case:
        """The file beside this checkpoint and its target."""
        source = self.source  # may make the target
        return Case(file, **{"target": self.target, "source": source, **more})


Plant = Callable[[Workspace, str], Case]


@dataclass(frozen=True)
class Fault:
    """One planted fault: the gate that has to fail, and how the diagnosis' cause begins.

    `cause` is NOTHING where no explanation may be found, None where a diagnosis is not asked: the gate says it all.
    `outcome` is the gate's, "undecided" for what cannot be known for certain; `measured` is False where verify cannot
    run the file, so that the cause is for a drafter made of it in another way.
    """

    name: str
    ids: tuple[str, ...]
    gate: str
    plant: Plant
    cause: str | None = None
    outcome: str = "fail"
    measured: bool = True
    checkpoint: str = "dflash"

    @property
    def kind(self) -> str:
        return self.checkpoint.split()[0]

    def case(self, space: Workspace) -> Case:
        return self.plant(space.of(self.checkpoint), self.name)


# --- how faults are planted ---


def keys(changes: Mapping[str, Any], recipe: str = "BF16", runtime: str = "llama.cpp") -> Plant:
    """Metadata changed: key -> value (of the key's own type), a whole `KeyValue`, or DELETE."""

    def plant(space: Workspace, name: str) -> Case:
        file, out = read_gguf(space.converted(recipe, runtime)), space.place(name)
        entries = {entry.key: entry for entry in (changed_key(file, *kv) for kv in changes.items()) if entry}
        kept = {key: entry for key, entry in file.keys.items() if key not in changes}
        write_gguf(out, list((kept | entries).values()), list(file.tensors.values()), lambda t: file.slabs(t.name))
        return space.case(out)

    return plant


def changed_key(file: GGUFFile, key: str, value: Any) -> KeyValue | None:
    if value is DELETE:
        return None
    return value if isinstance(value, KeyValue) else replace(file.keys[key], value=value)


def weights(change: Callable[[Weights], Mapping[str, Array]], recipe: str = "F32") -> Plant:
    """Weights changed: every tensor as f32 by name goes in, the new ones come out, stored in the types they had."""

    def plant(space: Workspace, name: str) -> Case:
        file, out = read_gguf(space.converted(recipe)), space.place(name)
        stored = file.tensors.values()
        known = {t.name: dequantize(file.tensor_bytes(t.name), TYPES[t.type.name], t.shape) for t in stored}
        new = {name: array for name, array in (known | dict(change(known))).items() if array is not DELETE}
        kinds = {t.name: t.type for t in stored}
        tensors = [StoredTensor(n, a.shape, kinds.get(n, GGMLQuantizationType.F32)) for n, a in new.items()]
        write_gguf(out, list(file.keys.values()), tensors, lambda t: [encoded(new[t.name], t.type.name)])
        return space.case(out)

    return plant


def encoded(array: Array, kind: str) -> Array:
    return quantize(np.ascontiguousarray(array, np.float32), TYPES[kind])


def blocks(recipe: str, tensor: str, change: Callable[[Array], None]) -> Plant:
    """Stored bytes of one tensor, (rows, row_bytes) uint8, changed in place."""

    def plant(space: Workspace, name: str) -> Case:
        file, out = read_gguf(space.converted(recipe)), space.place(name)
        data = bytearray(file.path.read_bytes())
        stored = file.tensors[tensor]
        part = np.frombuffer(data, np.uint8, stored.n_bytes, file.offsets[tensor])
        change(part.reshape(-1, stored.row_bytes))
        out.write_bytes(data)
        return space.case(out)

    return plant


def cut(size: Callable[[GGUFFile, int], int], recipe: str = "BF16") -> Plant:
    """Only the first bytes of a file."""

    def plant(space: Workspace, name: str) -> Case:
        whole, out = space.converted(recipe), space.place(name)
        data = whole.read_bytes()
        out.write_bytes(data[: size(read_gguf(whole), len(data))])
        return space.case(out)

    return plant


def without_tensors(space: Workspace, name: str) -> Case:
    """T-20: metadata as it should be and not one tensor, as converters write that recognised nothing."""
    out, writer = space.place(name), GGUFWriter(None, "")
    for entry in read_gguf(space.converted()).keys.values():
        writer.add_key_value(entry.key, entry.value, entry.type, entry.element)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return space.case(out)


# --- changes of weights ---


def layer(i: int, name: str) -> str:
    return f"blk.{i}.{name}.weight"


def each_layer(change: Callable[[Weights, int], Mapping[str, Array]]) -> Callable[[Weights], Mapping[str, Array]]:
    return lambda w: {name: array for i in range(LAYERS) for name, array in change(w, i).items()}


def swapped(first: str, second: str) -> Callable[[Weights], Mapping[str, Array]]:
    """Two tensors of each layer under each other's names."""
    return each_layer(lambda w, i: {layer(i, first): w[layer(i, second)], layer(i, second): w[layer(i, first)]})


def interleaved(array: Array) -> Array:
    """Rotary halves of each head to interleaved pairs, the layout of checkpoints that were not permuted."""
    halves = array.reshape(-1, 2, HEAD_DIM // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def changed(change: Callable[[Array], Array], *names: str) -> Callable[[Weights], Mapping[str, Array]]:
    """`change` on the tensors whose names contain one of `names`."""
    return lambda w: {name: change(a) for name, a in w.items() if any(part in name for part in names)}


def stored_by_columns(array: Array) -> Array:
    """What a reader sees who takes a matrix stored column by column for one stored row by row."""
    return np.ascontiguousarray(array.T).reshape(array.shape)


def layers_swapped(w: Weights) -> Mapping[str, Array]:
    return {name: w[name.replace("blk.0", "blk.x").replace("blk.1", "blk.0").replace("blk.x", "blk.1")] for name in w}


def fusion_rotated(w: Weights) -> Mapping[str, Array]:
    return {"fc.weight": np.roll(w["fc.weight"], 256, axis=1)}


def noise(w: Weights) -> Mapping[str, Array]:
    """One matrix as the encoder would have made it of nothing but noise of the same size."""
    name = layer(1, "attn_v")
    random = np.random.default_rng(7).standard_normal(w[name].shape, np.float32)
    return {name: random * w[name].std()}


def random_drafter(w: Weights) -> Mapping[str, Array]:
    """A drafter trained elsewhere, as far as this target is concerned: the same shapes and sizes, other weights."""
    rng = np.random.default_rng(8)
    return {n: rng.standard_normal(a.shape, np.float32) * a.std() if a.ndim > 1 else a for n, a in w.items()}


# --- changes of blocks ---


def q4_0_scales_halved(rows: Array) -> None:
    scales = rows.reshape(-1, 18)[:, :2]
    halves = scales.copy().view(np.float16) / 2
    scales[:] = halves.view(np.uint8)


def q8_0_scale(value: float) -> Callable[[Array], None]:
    def change(rows: Array) -> None:
        rows.reshape(-1, 34)[100, :2] = np.array([value], np.float16).view(np.uint8)

    return change


def q8_0_scale_bit(rows: Array) -> None:
    rows.reshape(-1, 34)[100, 1] ^= 0x20  # an exponent bit: the scale is 2 ** 8 times as large or as small


def bf16_exponent_bit(rows: Array) -> None:
    weights = rows[3].view(np.uint16)
    small = np.flatnonzero((weights & 0x7F80) < 0x3F80)[0]  # below one: the highest bit of its exponent is not set
    weights[small] ^= 0x4000


# --- other files, other targets ---


def relabelled(space: Workspace, name: str) -> Case:
    """Q2_K blocks in a file that says Q8_0."""
    file, out = read_gguf(space.converted("Q2_K")), space.place(name)
    entries = file.keys | {"general.file_type": replace(file.keys["general.file_type"], value=7)}
    write_gguf(out, list(entries.values()), list(file.tensors.values()), lambda t: file.slabs(t.name))
    return space.case(out)


def norms_of_16_bits(space: Workspace, name: str) -> Case:
    """Norms in F16, at which GPU kernels stop; CPU ones do as well in some builds."""
    file, out = read_gguf(space.converted("F32")), space.place(name)
    half = GGMLQuantizationType.F16
    tensors = [replace(t, type=half) if "norm" in t.name else t for t in file.tensors.values()]

    def data(tensor: StoredTensor) -> list[Array]:
        stored = file.tensor_bytes(tensor.name)
        return [stored.view(np.float32).astype(np.float16) if tensor.type == half else stored]

    write_gguf(out, list(file.keys.values()), tensors, data)
    return space.case(out)


def last(file: GGUFFile) -> str:
    return list(file.tensors)[-1]


def shuffled_vocabulary(space: Workspace, name: str) -> Case:
    """A file whose tokens are the target's in another order: those of another tokenizer of the same size."""
    file = read_gguf(space.converted())
    tokens: Any = file.keys["tokenizer.ggml.tokens"].value
    order = np.random.default_rng(9).permutation(VOCAB - 4)
    mixed = (*(tokens[i] for i in order), *tokens[-4:])
    return keys({"tokenizer.ggml.tokens": mixed, "drafter.vocab.sha256": "0" * 64})(space, name)


def other_target(change: Mapping[str, Any], layers: int = 6, hidden: int = 256) -> Plant:
    """A right file beside another target: random weights of the shapes this config has, the same tokenizer."""

    def plant(space: Workspace, name: str) -> Case:
        out, folder = space.place(name), space.folder / f"{name.replace(' ', '-')}-target"
        write_random_target(folder, change, layers, hidden)
        shutil.copy(space.converted(), out)
        return space.case(out, target=folder)

    return plant


def write_random_target(folder: Path, change: Mapping[str, Any], layers: int, hidden: int) -> None:
    folder.mkdir(exist_ok=True)
    for path in (PAIR / "target").glob("*.json"):
        shutil.copy(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": hidden, "layer_types": ["full_attention"] * layers, **change}
    (folder / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(10), {}
    for name, header in open_checkpoint(PAIR / "target").tensors.items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= layers:
            continue
        kept = {"q_proj": 0, "o_proj": 1}.get(parts[-2])  # the side that counts heads, not the width
        shape = tuple(hidden if n == 256 and i != kept else n for i, n in enumerate(header.shape))
        array = np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape, np.float32) * 0.05
        tensors[name] = array.astype(ml_dtypes.bfloat16)
    write_safetensors(folder / "model.safetensors", tensors)


def run_with(*flags: str) -> Plant:
    """A right file, run wrongly."""

    def plant(space: Workspace, name: str) -> Case:
        out = space.place(name)
        shutil.copy(space.converted(), out)
        return space.case(out, flags=flags)

    return plant


# --- the catalogue ---

THETA, CAPTURES, EPSILON = "dflash.rope.freq_base", "dflash.target_layers", "dflash.attention.layer_norm_rms_epsilon"
WINDOW, PATTERN = "dflash.attention.sliding_window", "dflash.attention.sliding_window_pattern"
MASK_KEY, BLOCK = "tokenizer.ggml.mask_token_id", "dflash.block_size"
SCALING = "dflash.rope.scaling"
LB = "qwen35-dflash-draft"


def yarn(method: str) -> Mapping[str, KeyValue]:
    return {
        f"{SCALING}.type": KeyValue(f"{SCALING}.type", T.STRING, method),
        f"{SCALING}.factor": KeyValue(f"{SCALING}.factor", T.FLOAT32, 4.0),
        f"{SCALING}.original_context_length": KeyValue(f"{SCALING}.original_context_length", T.UINT32, 512),
    }


def scale(name: str, value: float) -> Mapping[str, KeyValue]:
    return {f"dflash.{name}": KeyValue(f"dflash.{name}", T.FLOAT32, value)}


def ids(*values: int, element: GGUFValueType = T.INT32, key: str = CAPTURES) -> Mapping[str, KeyValue]:
    return {key: KeyValue(key, T.ARRAY, values, element)}


METADATA = (
    Fault("theta missing", ("T-9", "A1-43", "P-25"), STRUCTURE, keys({THETA: DELETE})),
    Fault("theta 1e4", ("T-22", "A1-43", "P-38"), STRUCTURE, keys({THETA: 1e4}), "rope.theta"),
    Fault("theta 1e6, the target's own", ("A1-7", "P-28", "T-57"), STRUCTURE, keys({THETA: 1e6}), "rope.theta"),
    Fault("theta 5e6", ("A1-3",), STRUCTURE, keys({THETA: 5e6}), "rope.theta"),
    Fault("theta 1e8", ("A1-3",), STRUCTURE, keys({THETA: 1e8}), "rope.theta"),
    Fault(
        "capture layers one lower", ("T-51", "P-31"), STRUCTURE, keys(ids(0, 2, 4)), "capture_layers", measured=False
    ),
    Fault("capture layers one higher", ("T-51",), STRUCTURE, keys(ids(2, 4, 6)), "capture_layers", measured=False),
    Fault("capture layers reversed", ("T-51",), STRUCTURE, keys(ids(5, 3, 1)), "capture_layers"),
    Fault("capture layers of another drafter", ("T-52", "T-61"), STRUCTURE, keys(ids(2, 4, 5)), "capture_layers"),
    Fault("window lost", ("T-55", "P-27"), STRUCTURE, keys({WINDOW: DELETE, PATTERN: DELETE}), "window"),
    Fault("window without a pattern", ("T-16", "T-55"), STRUCTURE, keys({PATTERN: DELETE})),
    Fault("window pattern swapped", ("T-16", "T-55"), STRUCTURE, keys({PATTERN: (False, True)}), "window.layers"),
    Fault("window doubled", ("T-55",), STRUCTURE, keys({WINDOW: 96}), "window.size"),
    Fault("every layer slides", ("T-16", "T-55"), STRUCTURE, keys({PATTERN: (True, True)}), "window.layers"),
    Fault("mask token is the padding", ("T-9", "T-53"), STRUCTURE, keys({MASK_KEY: PAD}), "mask_token_id"),
    Fault("mask token of a donor", ("T-53", "A1-15"), STRUCTURE, keys({MASK_KEY: START}), "mask_token_id"),
    Fault("mask token missing", ("T-53", "P-17"), STRUCTURE, keys({MASK_KEY: DELETE})),
    Fault("mask token beyond the vocabulary", ("T-53", "P-17"), STRUCTURE, keys({MASK_KEY: 4096})),
    Fault("block size 16", ("T-54", "P-26"), STRUCTURE, keys({BLOCK: 16}), "block_size"),
    Fault("block size 4", ("T-54",), STRUCTURE, keys({BLOCK: 4}), "block_size"),
    Fault("block size missing", ("T-54", "P-17"), STRUCTURE, keys({BLOCK: DELETE})),
    Fault("causal", ("T-66",), STRUCTURE, keys({"dflash.attention.causal": True}), "causal"),
    Fault("rotary dimensions halved", ("P-21",), STRUCTURE, keys({"dflash.rope.dimension_count": 32}), "rope.dim"),
    Fault("norm epsilon 1e-2", ("T-9", "P-34"), STRUCTURE, keys({EPSILON: 1e-2}), "norm_epsilon"),
    Fault("yarn written though null", ("T-56", "P-39"), STRUCTURE, keys(yarn("yarn")), "rope.scaling"),
    Fault("linear scaling written though null", ("T-56",), STRUCTURE, keys(yarn("linear")), "rope.scaling"),
    Fault("embedding scale of Gemma", ("T-9",), STRUCTURE, keys(scale("embedding_scale", 16.0)), "embedding_scale"),
    Fault("value scale", ("T-9",), STRUCTURE, keys(scale("attention.value_scale", 0.25)), "attention_value_scale"),
    Fault("ids of 64 bits", ("T-5", "P-40"), STRUCTURE, keys(ids(1, 3, 5, element=T.INT64))),
    Fault(
        "a count without ids", ("T-2", "T-12", "P-30"), STRUCTURE,
        keys({f"{LB}.dflash.target_layer_ids": DELETE}, runtime="lucebox"),
    ),
    Fault(
        "Lucebox's converter without a config", ("T-9", "P-28", "P-37"), STRUCTURE,
        keys({f"{LB}.rope.freq_base": 1e6, f"{LB}.dflash.block_size": 16}, runtime="lucebox"), "rope.theta",
    ),
)  # fmt: skip

WEIGHTS = (
    Fault("hidden norm as ones", ("T-19",), STRUCTURE, weights(changed(np.ones_like, "enc.output")), "FUSION_NORM"),
    Fault("q and k norms as ones", ("T-19",), STRUCTURE, weights(changed(np.ones_like, "_q_norm", "_k_norm")), "ATTN"),
    Fault("norms minus one", ("P-42",), STRUCTURE, weights(changed(lambda a: a - 1, "norm.weight")), "norms"),
    Fault("norms plus one", ("P-42",), STRUCTURE, weights(changed(lambda a: a + 1, "norm.weight")), "norms"),
    Fault("rotary rows interleaved", ("T-57", "P-43"), STRUCTURE, weights(changed(interleaved, "_q", "_k")), "RoPE"),
    Fault(
        "rotary rows interleaved, norms not", ("T-57", "P-43"), STRUCTURE,
        weights(changed(interleaved, "attn_q.", "attn_k.")), "RoPE",
    ),
    Fault("gate and up swapped", ("T-63",), STRUCTURE, weights(swapped("ffn_gate", "ffn_up")), "FFN_GATE and FFN_UP"),
    Fault("k and v swapped", ("T-63",), STRUCTURE, weights(swapped("attn_k", "attn_v")), "ATTN_K and ATTN_V"),
    Fault("input and post norms swapped", ("T-17",), STRUCTURE, weights(swapped("attn_norm", "ffn_norm")), "ATTN_NORM"),
    Fault("a matrix stored by columns", ("T-63",), STRUCTURE, weights(changed(stored_by_columns, "down")), "FFN_DOWN"),
    Fault("layers swapped", ("T-63", "A1-22"), STRUCTURE, weights(layers_swapped), "layers"),
    Fault("fusion columns rotated", ("T-51", "A1-40"), STRUCTURE, weights(fusion_rotated), "capture_layers"),
    Fault("one matrix is noise", ("T-49",), STRUCTURE, weights(noise), "ATTN_V of layer 1"),
    Fault("a random drafter of the same shapes", ("T-61", "P-44"), STRUCTURE, weights(random_drafter), NOTHING),
)  # fmt: skip

QUANTIZED = (
    Fault(
        "Q4_0 with scales halved", ("A1-27", "T-49"), STRUCTURE,
        blocks("Q4_0", layer(0, "ffn_down"), q4_0_scales_halved),
    ),
    Fault(
        "a scale is not a number", ("A1-34",), STRUCTURE, blocks("Q8_0", layer(0, "attn_q"), q8_0_scale(np.nan)),
        "ATTN_Q of layer 0",
    ),
    Fault(
        "a scale is infinite", ("A1-34",), STRUCTURE, blocks("Q8_0", layer(0, "attn_q"), q8_0_scale(np.inf)),
        "ATTN_Q of layer 0",
    ),
    Fault(
        "a bit of a Q8_0 scale", ("T-70",), STRUCTURE, blocks("Q8_0", layer(0, "attn_output"), q8_0_scale_bit),
        "ATTN_OUTPUT of layer 0",
    ),
    Fault(
        "a bit of a BF16 exponent", ("T-70",), STRUCTURE, blocks("BF16", layer(1, "ffn_up"), bf16_exponent_bit),
        "FFN_UP of layer 1",
    ),
    Fault("Q2_K where the file says Q8_0", ("T-21", "T-62"), ACCEPTANCE, relabelled, "all weights"),
)  # fmt: skip

CORRUPT = (
    Fault("a tensor missing", ("T-19", "T-44"), STRUCTURE, weights(lambda w: {layer(1, "ffn_up"): DELETE})),
    Fault(
        "a tensor too many", ("T-19",), STRUCTURE,
        weights(lambda w: {layer(0, "attn_gate"): np.zeros((512, 256), np.float32)}),
    ),
    Fault("a shape wrong", ("T-13", "A1-40"), STRUCTURE, weights(lambda w: {"fc.weight": w["fc.weight"][:, :512]})),
    Fault("norms of 16 bits", ("A1-23", "T-17"), STRUCTURE, norms_of_16_bits),
    Fault("no tensors", ("T-20", "P-45"), STRUCTURE, without_tensors),
    Fault("half a file", ("T-70", "T-23", "A1-44"), STRUCTURE, cut(lambda file, size: size // 2)),
    Fault(
        "the last byte missing", ("T-70", "A1-44"), STRUCTURE,
        cut(lambda file, size: file.offsets[last(file)] + file.tensors[last(file)].n_bytes - 1),
    ),
    Fault("metadata cut", ("T-70", "T-25"), STRUCTURE, cut(lambda file, size: 4000)),
)  # fmt: skip

PAIRS = (
    Fault("another vocabulary", ("T-61",), PAIRING, shuffled_vocabulary),
    Fault("a target of another width", ("T-61",), PAIRING, other_target({}, hidden=128)),
    Fault("a target with fewer layers", ("T-51", "T-61"), PAIRING, other_target({}, layers=4)),
    Fault(
        "a target of the same shapes", ("T-61", "P-44"), PAIRING,
        other_target({"_name_or_path": "somebody/else"}), outcome="undecided",
    ),
)  # fmt: skip

ENGINE = (
    Fault("three drafts of seven", ("P-24", "T-26"), ACCEPTANCE, run_with("--spec-draft-n-max", "3")),
    Fault("a confidence floor", ("T-58",), ACCEPTANCE, run_with("--spec-draft-p-min", "0.9")),
    Fault(
        "draft cache of four bits", ("T-59",), ACCEPTANCE,
        run_with("--spec-draft-type-k", "q4_0", "--spec-draft-type-v", "q4_0"),
    ),
)  # fmt: skip

FAULTS = (*METADATA, *WEIGHTS, *QUANTIZED, *CORRUPT, *PAIRS)  # of files: what verify has to find
ALL = (*FAULTS, *ENGINE)


# --- files that are right ---


@dataclass(frozen=True)
class Good:
    """A file that has to pass every gate."""

    name: str
    make: Callable[[Workspace], Case]
    checkpoint: str = "dflash"

    @property
    def kind(self) -> str:
        return self.checkpoint.split()[0]

    def case(self, space: Workspace) -> Case:
        return self.make(space.of(self.checkpoint))


def good(recipe: str, runtime: str = "llama.cpp") -> Good:
    return Good(f"{recipe} for {runtime}", lambda space: space.case(space.converted(recipe, runtime)))


def by_llama_quantize(space: Workspace) -> Case:
    """T-1: another program's quantization of our BF16 file, its own keys included."""
    out = space.place("llama-quantize")
    command = [llama_binary("llama-quantize"), space.converted("BF16"), out, "Q8_0"]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return space.case(out)


RIGHT = (
    *(good(recipe) for recipe in ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_M-drafter")),
    *(good(recipe) for recipe in ("Q4_K_M", "Q4_K_M-drafter", "IQ4_XS")),
    *(good("BF16", runtime) for runtime in ("ik_llama.cpp", "lucebox")),
    Good("Q8_0 by llama-quantize", by_llama_quantize),
)
