"""Planted faults of the kinds beside DFlash: what goes wrong with their files, and files of theirs that are right.

`pair-eagle3` and `mtp` were trained; DFlash2 and DSpark are the trained DFlash drafter with the parts of their kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from faults import ACCEPTANCE, NOTHING, PAD, PAIRING, REFUSED, STRUCTURE, Array, Case, Fault, Good, Plant, Workspace
from gguf import GGMLQuantizationType, GGUFValueType
from planted_faults import Draft, Edit, extra, several

T, I64 = GGUFValueType, GGMLQuantizationType.I64
CONVOLUTIONS = ("blk.0.attn_conv", "blk.1.attn_conv", "blk.0.ffn_conv", "blk.1.ffn_conv")
HEAD = "blk.7."  # of the MTP fixture: the first layer behind its target's seven
MARKOV = ("markov_w1.weight", "markov_w2.weight")
CODEBOOKS = ("selector_predecessor.weight", "selector_successor.weight")


# --- how a file is spoilt ---


def edited(edit: Edit, recipe: str = "F32") -> Plant:
    def plant(space: Workspace, name: str) -> Case:
        draft = Draft.of(space.converted(recipe))
        edit(draft)
        return space.case(draft.write(space.place(name)))

    return plant


def put(change: Callable[[Array], Array], *parts: str) -> Edit:
    """`change` on every tensor of floats whose name contains one of these parts."""

    def edit(draft: Draft) -> None:
        for name in [n for n in draft.tensors if any(part in n for part in parts) and n != "d2t"]:
            draft.put(name, change(draft.weights(name)))

    return edit


def swap(*pairs: tuple[str, str]) -> Edit:
    return lambda draft: [draft.swap(*pair) for pair in pairs]


def drop(*names: str) -> Edit:
    return lambda draft: [draft.tensors.pop(name) for name in names]


def key(ending: str, value: Any) -> Edit:
    return lambda draft: draft.set(ending, value)


def no_key(*endings: str) -> Edit:
    return lambda draft: draft.drop(*endings)


def in_type(kind: str, *names: str) -> Edit:
    return lambda draft: [draft.put(name, draft.weights(name), kind) for name in names]


# --- what is done to weights ---


def of_heads(head_dim: int, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """Each head's rows as this shape, turned over its first two axes."""

    def change(array: Array) -> Array:
        parts = array.reshape(-1, *shape, *array.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(array.shape)

    assert head_dim == shape[0] * shape[1]
    return change


to_pairs, to_halves = of_heads(64, (2, 32)), of_heads(64, (32, 2))  # the file's halves to pairs, its pairs to halves


def halves_exchanged(array: Array) -> Array:
    return np.roll(array, array.shape[1] // 2, axis=1)


def gates_first(array: Array) -> Array:
    """All heads' queries and then all gates, as a plain split has them."""
    heads = array.reshape(-1, 2, 64, array.shape[1])
    return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(array.shape)


def by_columns(array: Array) -> Array:
    return np.ascontiguousarray(array.T).reshape(array.shape)


def taps_reversed(array: Array) -> Array:
    """Of fixed kernels (2, k, H) and of the rows that make the others, (2 * k * groups, H)."""
    if array.ndim == 3:
        return array[:, ::-1]
    return array.reshape(2, 2, -1, array.shape[1])[:, ::-1].reshape(array.shape)


def sides_swapped(array: Array) -> Array:
    """What filters a sublayer's input filters its output."""
    return array.reshape(2, -1, array.shape[-1])[::-1].reshape(array.shape)


def offsets(draft: Draft) -> None:
    ids = draft.tensors["d2t"][1].view("<i8")
    draft.raw("d2t", I64, ids - np.arange(len(ids)))


def less_one(array: Array) -> Array:
    return array - 1


def as_trained(array: Array) -> Array:
    """Noise of the same size."""
    return np.random.default_rng(7).standard_normal(array.shape, np.float32) * array.std()


def made_up(draft: Draft) -> None:
    """Other weights everywhere, in the same sizes: another target's drafter."""
    for number, (name, (stored, _)) in enumerate(draft.tensors.items()):
        if len(stored.shape) > 1 and name not in ("d2t", "token_embd.weight"):
            array = draft.weights(name)
            random = np.random.default_rng(number).standard_normal(array.shape, np.float32)
            draft.put(name, random * array.std())


# --- the catalogue ---

THETA, CAPTURES, BLOCK = "rope.freq_base", ".target_layers", ".block_size"
Row = tuple[str, tuple[str, ...], str, Edit, str | None]


def of(checkpoint: str, *rows: Row, **more: Any) -> tuple[Fault, ...]:
    """Name, traps, the gate that has to fail, the edit, and the cause that is named (None: not asked)."""
    return tuple(
        Fault(name, ids, gate, edited(edit), cause, checkpoint=checkpoint, **more)
        for name, ids, gate, edit, cause in rows
    )


def shared(checkpoint: str) -> tuple[Fault, ...]:
    """What DFlash2 and DSpark have from DFlash, whose record has the causes."""
    return of(
        checkpoint,
        ("theta missing", ("T-9", "A1-43", "P-1"), STRUCTURE, no_key(THETA), None),
        ("theta 1e4", ("T-22", "A1-43"), STRUCTURE, key(THETA, 1e4), None),
        ("capture layers reversed", ("T-51",), STRUCTURE, key(CAPTURES, (5, 3, 1)), None),
        ("capture layers one lower", ("T-51", "P-31"), STRUCTURE, key(CAPTURES, (0, 2, 4)), None),
        ("capture layers evenly spaced", ("T-52",), STRUCTURE, key(CAPTURES, (1, 3, 6)), None),
        ("window lost", ("T-55", "P-27"), STRUCTURE,
         no_key("attention.sliding_window", "sliding_window_pattern"), None),
        ("mask token is the padding", ("T-53",), STRUCTURE, key("mask_token_id", PAD), None),
        ("mask token missing", ("T-53", "P-5"), STRUCTURE, no_key("mask_token_id"), None),
        ("block size 16", ("T-54", "P-6"), STRUCTURE, key(BLOCK, 16), None),
        ("block size missing", ("T-54", "P-17"), STRUCTURE, no_key(BLOCK), None),
        ("causal", ("T-66", "P-11"), STRUCTURE, key("attention.causal", True), None),
        ("one layer too few", ("T-19",), STRUCTURE,
         several(key("block_count", 1), key("sliding_window_pattern", (True,))), None),
        ("norms minus one", ("P-42",), STRUCTURE, put(less_one, "norm.weight"), None),
        ("rotary rows interleaved", ("T-57", "P-43"), STRUCTURE, put(to_pairs, "attn_q", "attn_k"), None),
        ("a random drafter of the same shapes", ("T-61",), STRUCTURE, made_up, None),
    )  # fmt: skip


DFLASH2 = (
    *shared("dflash2"),
    *of(
        "dflash2",
        ("codebooks swapped", ("T-63",), STRUCTURE, swap(CODEBOOKS), "SELECTOR_PREDECESSOR and SELECTOR_SUCCESSOR"),
        ("convolution taps reversed", ("T-63",), STRUCTURE, put(taps_reversed, *CONVOLUTIONS), "convolutions"),
        ("convolution sides swapped", ("T-63",), STRUCTURE, put(sides_swapped, *CONVOLUTIONS), "convolutions"),
        ("half the candidates", ("T-9",), STRUCTURE, key("selector_top_k", 4), "selector.top_k"),
        ("candidates missing", ("T-9",), STRUCTURE, no_key("selector_top_k"), None),
        ("kernel size missing", ("T-9",), STRUCTURE, no_key("conv_kernel_size"), None),
        ("groups twice as wide", ("T-13",), STRUCTURE, key("conv_group_size", 32), None),
        ("no selector", ("P-29", "T-19"), STRUCTURE, drop("selector_hidden.weight", *CODEBOOKS), None),
        ("one codebook missing", ("T-19",), STRUCTURE, drop(CODEBOOKS[1]), None),
        ("a convolution missing", ("P-29", "T-19"), STRUCTURE, drop("blk.0.attn_conv_base"), None),
        ("a codebook stored by columns", ("T-63",), STRUCTURE, put(by_columns, CODEBOOKS[0]), None),
        ("a codebook is noise", ("T-49",), STRUCTURE, put(as_trained, CODEBOOKS[1]), None),
    ),
)  # fmt: skip

DSPARK = (
    *shared("dspark"),
    *of(
        "dspark",
        ("sample_from_anchor flipped", ("P-13",), STRUCTURE, key("sample_from_anchor", True), "sample_from_anchor"),
        ("sample_from_anchor missing", ("P-13",), STRUCTURE, no_key("sample_from_anchor"), None),
        ("Markov matrices swapped", ("T-63",), STRUCTURE, swap(MARKOV), "MARKOV_IN and MARKOV_OUT"),
        ("Markov head stored by columns", ("T-63",), STRUCTURE, put(by_columns, "markov_w1"), "MARKOV_IN"),
        ("no Markov head", ("T-19", "P-35"), STRUCTURE, drop(*MARKOV), None),
        ("half a Markov head", ("T-19",), STRUCTURE, drop(MARKOV[1]), None),
        ("a Markov matrix is noise", ("T-49",), STRUCTURE, put(as_trained, MARKOV[1]), None),
        ("confidence head denied", ("T-66",), STRUCTURE, key("has_confidence_head", False), None),
        ("confidence head missing", ("T-19",), STRUCTURE, drop("conf_proj.weight"), None),
    ),
    *of(
        "dspark from the anchor",
        ("sample_from_anchor denied", ("P-13",), STRUCTURE, key("sample_from_anchor", False), "sample_from_anchor"),
    ),
    *of(
        "dspark of speculators",
        ("d2t as offsets", ("P-41", "T-67"), STRUCTURE, offsets, None),
        ("no d2t", ("P-41", "T-67"), STRUCTURE, drop("d2t"), None),
    ),
)  # fmt: skip

EAGLE3 = (
    *of(
        "eagle3",
        ("theta missing", ("T-9", "A1-43", "P-1"), STRUCTURE, no_key(THETA), None),
        ("theta 1e4", ("T-22", "A1-43"), STRUCTURE, key(THETA, 1e4), "rope.theta"),
        ("theta 1e6, the target's own", ("T-57",), STRUCTURE, key(THETA, 1e6), "rope.theta"),
        ("a triple made up", ("T-52", "P-15"), STRUCTURE, key(CAPTURES, (2, 3, 4)), "capture_layers"),
        ("llama.cpp's triple", ("T-52", "P-15"), STRUCTURE, key(CAPTURES, (2, 3, 3)), None),
        ("capture layers reversed", ("T-51",), STRUCTURE, key(CAPTURES, (5, 3, 1)), "capture_layers"),
        ("capture layers one lower", ("T-51",), STRUCTURE, key(CAPTURES, (0, 2, 4)), None),
        ("capture layers one higher", ("T-51",), STRUCTURE, key(CAPTURES, (2, 4, 6)), None),
        ("capture layers missing", ("T-12", "P-7"), STRUCTURE, no_key(CAPTURES), None),
        ("two capture layers", ("T-12",), STRUCTURE, key(CAPTURES, (1, 3)), None),
        ("q and k not permuted", ("P-43", "T-57"), STRUCTURE, put(to_halves, "attn_q.", "attn_k."), "RoPE rows of q"),
        ("k not permuted", ("P-43", "T-57"), STRUCTURE, put(to_halves, "attn_k."), "ATTN_K of layer 0"),
        ("d2t as offsets", ("P-41", "T-67"), STRUCTURE, offsets, "d2t"),
        ("no d2t", ("P-41", "T-67"), STRUCTURE, drop("d2t"), None),
        ("norm_before_residual flipped", ("P-16",), STRUCTURE,
         key("norm_before_residual", True), "norm_before_residual"),
        ("norm_before_fc claimed", ("P-16",), STRUCTURE, key("norm_before_fc", True), None),
        ("embedding and feature exchanged", ("T-63",), STRUCTURE,
         put(halves_exchanged, "attn_q.", "attn_k.", "attn_v."), "ATTN_Q, ATTN_K, ATTN_V"),
        ("their norms swapped", ("T-17",), STRUCTURE,
         swap(("blk.0.attn_norm.weight", "blk.0.attn_norm_2.weight")), "ATTN_NORM and ATTN_NORM_2"),
        ("norms minus one", ("P-42",), STRUCTURE, put(less_one, "norm"), "norms"),
        ("the feature's norm as ones", ("T-19",), STRUCTURE, put(np.ones_like, "attn_norm_2"), "ATTN_NORM_2"),
        ("fusion columns rotated", ("T-51", "A1-40"), STRUCTURE,
         put(lambda a: np.roll(a, 256, axis=1), "fc.weight"), "capture_layers"),
        ("gate and up swapped", ("T-63",), STRUCTURE,
         swap(("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight")), "FFN_GATE and FFN_UP"),
        ("two layers", ("T-19",), STRUCTURE, key("block_count", 2), None),
        ("another width of the target", ("T-61",), STRUCTURE, key("target_hidden_size", 512), None),
        ("a random drafter of the same shapes", ("T-61",), STRUCTURE, made_up, NOTHING),
    ),
    *of(
        "eagle3 of speculators",
        ("norm_before_residual denied", ("P-16",), STRUCTURE,
         key("norm_before_residual", False), "norm_before_residual"),
        ("norm_before_residual missing", ("P-16",), STRUCTURE,
         no_key("norm_before_residual"), "norm_before_residual"),
        ("norm_before_fc denied", ("P-16",), STRUCTURE, key("norm_before_fc", False), None),
        ("the fusion's norm missing", ("P-16", "T-19"), STRUCTURE, drop("enc.output_norm.weight"), None),
    ),
    *of(
        "eagle3 with llama3 scaling",
        ("llama3 factors lost", ("P-4", "T-56"), STRUCTURE, drop("rope_freqs.weight"), "ROPE_FACTORS"),
        ("llama3 factors as ones", ("P-4", "T-56"), STRUCTURE, put(np.ones_like, "rope_freqs"), "ROPE_FACTORS"),
        ("llama3 factors of another model", ("P-4",), STRUCTURE, put(lambda a: 1 + 7 * (a - 1), "rope_freqs"),
         "ROPE_FACTORS"),
    ),
)  # fmt: skip

MTP = of(
    "mtp",
    ("norms without their one", ("P-42",), STRUCTURE, put(less_one, "norm.weight"), "norms"),
    ("hnorm without its one", ("P-42",), STRUCTURE, put(less_one, "nextn.hnorm"), "NEXTN_STATE_NORM"),
    ("q and k norms without their one", ("P-42",), STRUCTURE, put(less_one, "q_norm", "k_norm"), "ATTN_Q_NORM and"),
    ("state and embedding exchanged", ("T-63",), STRUCTURE, put(halves_exchanged, "eh_proj"), "NEXTN_PROJ"),
    ("their norms swapped", ("T-17",), STRUCTURE,
     swap((f"{HEAD}nextn.enorm.weight", f"{HEAD}nextn.hnorm.weight")), "NEXTN_EMBEDDING_NORM and NEXTN_STATE_NORM"),
    ("all queries, then all gates", ("T-63",), STRUCTURE, put(gates_first, "attn_q."), "ATTN_Q: queries"),
    ("rotary rows interleaved", ("T-57", "P-43"), STRUCTURE, put(to_pairs, "attn_q", "attn_k"), "RoPE rows"),
    ("theta missing", ("T-9", "A1-43", "P-1"), STRUCTURE, no_key(THETA), None),
    ("theta 1e4", ("T-22", "A1-43"), STRUCTURE, key(THETA, 1e4), "rope.theta"),
    ("a quarter of the rotary dimensions", ("P-21",), STRUCTURE,
     key("rope.dimension_count", 16), "rope.dimensions"),
    ("rotary sections missing", ("P-10",), STRUCTURE, no_key("dimension_sections"), None),
    ("declared and absent", ("A5-2", "P-19"), REFUSED,
     lambda d: [d.tensors.pop(n) for n in list(d.tensors) if n.startswith(HEAD)], None),
    ("present and undeclared", ("A5-2", "P-20"), STRUCTURE, no_key("nextn_predict_layers"), None),
    ("counted as two", ("A5-2", "P-20"), STRUCTURE, key("nextn_predict_layers", 2), None),
    ("the target's own layer count", ("A5-2", "T-19"), STRUCTURE, key("block_count", 7), None),
    ("eh_proj missing", ("T-44", "T-19"), REFUSED, drop(f"{HEAD}nextn.eh_proj.weight"), None),
    ("the last norm missing", ("T-19",), STRUCTURE, drop(f"{HEAD}nextn.shared_head_norm.weight"), None),
    ("the last norm is the target's", ("T-63",), STRUCTURE,
     lambda d: d.put(f"{HEAD}nextn.shared_head_norm.weight", d.weights("output_norm.weight")), "NEXTN_OUTPUT_NORM"),
    ("no embedding", ("T-19", "P-29"), STRUCTURE, drop("token_embd.weight"), None),
    ("k and v swapped", ("T-63",), STRUCTURE,
     swap((f"{HEAD}attn_k.weight", f"{HEAD}attn_v.weight")), "ATTN_K and ATTN_V"),
    ("an unknown tensor", ("T-19",), STRUCTURE, extra(f"{HEAD}nextn.mystery.weight", (8, 256)), None),
    ("a random head of the same shapes", ("T-61",), STRUCTURE, made_up, NOTHING),
)  # fmt: skip

UNDECIDED = of(  # what its type is known to cost; more prompts would decide
    "mtp",
    ("eh_proj in two bits", ("T-62",), ACCEPTANCE, in_type("Q2_K", f"{HEAD}nextn.eh_proj.weight"), None),
    outcome="undecided",
)


def another_target(space: Workspace, name: str) -> Case:
    """A file for llama.cpp of a target with the same shapes, whose last tokens are others."""
    draft = Draft.of(space.converted())
    stated: Any = draft.keys["tokenizer.ggml.tokens"]
    moved = (*stated.value[1:], stated.value[0])
    draft.keys[stated.key] = dataclasses.replace(stated, value=moved)
    draft.keys.pop("drafter.vocab.sha256", None)
    return space.case(draft.write(space.place(name)))


OTHERS = tuple(
    Fault("another vocabulary", ("T-61",), PAIRING, another_target, checkpoint=checkpoint)
    for checkpoint in ("dflash2", "dspark", "eagle3", "mtp")
)
KIND_FAULTS = (*DFLASH2, *DSPARK, *EAGLE3, *MTP, *UNDECIDED, *OTHERS)


def right(checkpoint: str, *recipes: str) -> tuple[Good, ...]:
    suffix = "" if " " not in checkpoint else f", {checkpoint}"
    return tuple(
        Good(f"{recipe}{suffix}", lambda space, recipe=recipe: space.case(space.converted(recipe)), checkpoint)  # type: ignore[misc]
        for recipe in recipes
    )


KIND_RIGHT = (
    *(good for kind in ("dflash2", "dspark", "eagle3", "mtp") for good in right(kind, "F32", "BF16", "Q8_0", "Q4_K_M")),
    *right("dspark from the anchor", "Q8_0"),
    *right("dspark of speculators", "Q8_0"),
    *right("eagle3 of speculators", "Q8_0"),
    *right("eagle3 with llama3 scaling", "Q8_0"),
)
