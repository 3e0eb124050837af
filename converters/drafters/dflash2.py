"""DFlash2: DFlash with convolutions along the block and a selector that lets each draft depend on the one before.

Config and tensor names as z-lab publishes them (Qwen3.8-27B-DFlash2); the shapes as llama.cpp's loader has them
(`src/models/dflash.cpp`).
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import dflash
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.plan import TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import Convolution, DrafterSpec, Selector
from convert_drafter.converters.target import Target


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of a DFlash2 checkpoint. Raises `WrongInput` naming the key that is missing or wrong."""
    dflash.check_assumptions(reader)
    return dflash.read_block_spec(
        "dflash2",
        reader,
        headers,
        target,
        convolution=Convolution(
            kernel_size=_get(reader, "convolution.kernel_size", "conv_kernel_size"),
            group_size=_get(reader, "convolution.group_size", "conv_group_size"),
        ),
        selector=Selector(
            rank=_get(reader, "selector.rank", "selector_rank"), top_k=_get(reader, "selector.top_k", "selector_top_k")
        ),
    )


def _get(reader: ConfigReader, field: str, key: str) -> int:
    return reader.get(field, int, f"dflash_config.{key}", key)


def rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    base, projection = ("two", "taps", "hidden"), ("kernels", "hidden")
    return (
        *dflash.rules(reader),
        TensorRule("layers.{i}.attention_conv.base_kernel", Role.ATTN_CONV_BASE, base),
        TensorRule("layers.{i}.attention_conv.kernel_projection.weight", Role.ATTN_CONV_PROJ, projection),
        TensorRule("layers.{i}.mlp_conv.base_kernel", Role.FFN_CONV_BASE, base),
        TensorRule("layers.{i}.mlp_conv.kernel_projection.weight", Role.FFN_CONV_PROJ, projection),
        TensorRule("candidate_selector.hidden_projection.weight", Role.SELECTOR_HIDDEN, ("selector_rank", "hidden")),
        TensorRule("candidate_selector.predecessor_codebook", Role.SELECTOR_PREDECESSOR, ("vocab", "selector_rank")),
        TensorRule("candidate_selector.successor_codebook", Role.SELECTOR_SUCCESSOR, ("vocab", "selector_rank")),
    )


DFLASH2 = Kind(
    name="dflash2",
    summary="DFlash2: DFlash with convolutions along the block; each draft depends on the one before",
    architectures=("DFlash2DraftModel", "DFlashDraftModel"),
    read_spec=read_spec,
    rules=rules,
    dropped=dflash.dropped,
    ignored=dflash.IGNORED,
)
