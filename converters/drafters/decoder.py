"""Tensors of a decoder layer, and of a reduced vocabulary, that several kinds name and shape alike."""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.ops import ABSOLUTE_IDS, COPY, PERMUTE_ROPE
from convert_drafter.converters.plan import Dropped, TensorRule
from convert_drafter.converters.roles import Role

ATTENTION, MLP = "layers.{i}.self_attn.", "layers.{i}.mlp."
DRAFT_TO_TARGET = TensorRule("d2t", Role.DRAFT_TO_TARGET, ("draft_vocab",), ABSOLUTE_IDS, needed_for="draft_vocab_size")
TARGET_TO_DRAFT = Dropped("t2d", "the mask of d2t's tokens, which no runtime reads")


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
