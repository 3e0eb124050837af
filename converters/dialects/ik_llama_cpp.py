"""ik_llama.cpp (and the buun forks): architecture `dflash-draft`, zero-based capture layers, its own mask key."""

from __future__ import annotations

from convert_drafter.converters.dialects.cell import (
    ALL_CAPTURES,
    ARRAY,
    F32,
    I32,
    PLAIN_SECTIONS,
    SLIDING_NOTE,
    U32,
    WHOLE_HEADS,
    Cell,
    Limit,
    Row,
)
from convert_drafter.converters.dialects.llama_cpp import FORK_ROWS
from convert_drafter.converters.roles import Role

MAX_CAPTURES = 8

DFLASH = Cell(
    kind="dflash",
    runtime="ik_llama.cpp",
    arch="dflash-draft",
    rows=(
        *FORK_ROWS,
        Row("{a}.dflash.block_size", U32, "block_size"),
        Row("{a}.dflash.mask_token_id", U32, "mask_token_id"),
        Row("{a}.dflash.target_layer_ids", ARRAY, "capture_layers", element=I32, also=U32),
        Row("{a}.dflash.n_target_features", U32, "target_hidden_size", ALL_CAPTURES),
        Row("{a}.dflash.backbone_rotary_base", F32, "context_theta"),
    ),
    names={
        Role.DRAFT_TO_TARGET: None,
        Role.FUSION: "dflash_fc.weight",
        Role.FUSION_NORM: "dflash_hidden_norm.weight",
        Role.FFN_NORM: "blk.{i}.post_attention_norm.weight",
    },
    implied=(WHOLE_HEADS,),
    harmless=PLAIN_SECTIONS,
    needs={Role.OUTPUT: Role.TOKEN_EMBEDDING},
    limits=(
        Limit(
            "capture_layers",
            lambda s: len(s.capture_layers) <= MAX_CAPTURES,
            f"ik_llama.cpp reads at most {MAX_CAPTURES} capture layers",
        ),
    ),
    launch="llama-server -m {target} -md {drafter} --spec-type dflash:n_max={drafted}",
    source="ik_llama.cpp 8337e4cd convert_hf_to_gguf.py and src/llama-dflash.cpp",
    notes=(SLIDING_NOTE,),
)
