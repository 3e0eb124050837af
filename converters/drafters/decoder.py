"""Tensors of a decoder layer, and of a reduced vocabulary, that several kinds name and shape alike."""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.ops import ABSOLUTE_IDS, COPY, PERMUTE_ROPE, Op
from convert_drafter.converters.plan import Dropped, TensorRule
from convert_drafter.converters.roles import Role

ATTENTION, MLP = "layers.{i}.self_attn.", "layers.{i}.mlp."
DRAFT_TO_TARGET = TensorRule("d2t", Role.DRAFT_TO_TARGET, ("draft_vocab",), ABSOLUTE_IDS, needed_for="draft_vocab_size")
TARGET_TO_DRAFT = Dropped("t2d", "the mask of d2t's tokens, which no runtime reads")


def attention(prefix: str = ATTENTION, width: str = "hidden", rotary: Op = COPY) -> tuple[TensorRule, ...]:
    """Projections of as many `width` inputs; `rotary` is what RoPE asks of queries and keys."""
    return (
        TensorRule(f"{prefix}q_proj.weight", Role.ATTN_Q, ("queries", width), rotary),
        TensorRule(f"{prefix}k_proj.weight", Role.ATTN_K, ("keys", width), rotary),
        TensorRule(f"{prefix}v_proj.weight", Role.ATTN_V, ("keys", width)),
        TensorRule(f"{prefix}o_proj.weight", Role.ATTN_OUTPUT, ("hidden", "queries")),
    )


def head_norms(prefix: str = ATTENTION, op: Op = COPY) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{prefix}q_norm.weight", Role.ATTN_Q_NORM, ("head_dim",), op),
        TensorRule(f"{prefix}k_norm.weight", Role.ATTN_K_NORM, ("head_dim",), op),
    )


def attention_biases(reader: ConfigReader, half_split: bool) -> tuple[TensorRule, ...]:
    """Needed where the config states them; queries and keys are turned by RoPE like their weights."""
    rotary = COPY if half_split else PERMUTE_ROPE
    absent = not reader.find("biases", bool, "attention_bias")
    return (
        TensorRule(f"{ATTENTION}q_proj.bias", Role.ATTN_Q_BIAS, ("queries",), rotary, optional=absent),
        TensorRule(f"{ATTENTION}k_proj.bias", Role.ATTN_K_BIAS, ("keys",), rotary, optional=absent),
        TensorRule(f"{ATTENTION}v_proj.bias", Role.ATTN_V_BIAS, ("keys",), optional=absent),
        TensorRule(f"{ATTENTION}o_proj.bias", Role.ATTN_OUTPUT_BIAS, ("hidden",), optional=absent),
    )


def feed_forward(mlp: str = MLP) -> tuple[TensorRule, ...]:
    return (
        TensorRule(f"{mlp}gate_proj.weight", Role.FFN_GATE, ("feed_forward", "hidden")),
        TensorRule(f"{mlp}up_proj.weight", Role.FFN_UP, ("feed_forward", "hidden")),
        TensorRule(f"{mlp}down_proj.weight", Role.FFN_DOWN, ("hidden", "feed_forward")),
    )
