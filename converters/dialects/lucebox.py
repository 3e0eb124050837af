"""Lucebox: architecture `qwen35-dflash-draft` for every Qwen drafter, no tokenizer, fixed norm epsilon."""

from __future__ import annotations

from convert_drafter.converters.dialects.cell import (
    ARRAY,
    BIDIRECTIONAL,
    I32,
    PLAIN_SECTIONS,
    SAME_WIDTH,
    SHARED_ROWS,
    SLIDING_NOTE,
    U32,
    WHOLE_HEADS,
    Cell,
    Count,
    Limit,
    Note,
    Row,
)
from convert_drafter.converters.roles import Role

MAX_CAPTURES = 16
YARN_SHAPE = (8, 2048)  # layers and width of the drafter whose scaling is hard-coded
BOUNDS = {
    "layer_count": 1024,
    "hidden_size": 131_072,
    "feed_forward_size": 524_288,
    "head_count": 1024,
    "head_dim": 1024,
}

DFLASH = Cell(
    kind="dflash",
    runtime="lucebox",
    arch="qwen35-dflash-draft",
    rows=(
        *SHARED_ROWS,
        Row("{a}.dflash.block_size", U32, "block_size"),
        Row("{a}.dflash.mask_token_id", U32, "mask_token_id"),
        Row("{a}.dflash.target_layer_ids", ARRAY, "capture_layers", element=I32),
    ),
    counts=(Count("{a}.dflash.n_target_layers", "capture_layers"),),
    names={
        Role.FUSION: "dflash.fc.weight",
        Role.FUSION_NORM: "dflash.hidden_norm.weight",
        Role.TOKEN_EMBEDDING: None,
        Role.OUTPUT: None,
        Role.DRAFT_TO_TARGET: None,
        Role.ATTN_Q_BIAS: None,
        Role.ATTN_K_BIAS: None,
        Role.ATTN_V_BIAS: None,
        Role.ATTN_OUTPUT_BIAS: None,
        Role.ATTN_SINKS: None,
    },
    implied=(BIDIRECTIONAL, WHOLE_HEADS, SAME_WIDTH),
    harmless=PLAIN_SECTIONS,
    limits=(
        Limit(
            "layer_count",
            lambda s: (s.layer_count, s.hidden_size) != YARN_SHAPE,
            "Lucebox takes 8 layers of width 2048 for one known drafter and applies that one's YaRN",
        ),
        Limit("norm_epsilon", lambda s: s.norm_epsilon == 1e-6, "Lucebox computes every norm with 1e-06"),
        Limit(
            "target_hidden_size",
            lambda s: s.target_hidden_size == s.hidden_size,
            "Lucebox takes the drafter's hidden size for the target's; here they differ",
        ),
        Limit(
            "capture_layers",
            lambda s: len(s.capture_layers) <= MAX_CAPTURES,
            f"Lucebox ignores a list of more than {MAX_CAPTURES} capture layers",
        ),
        *(
            Limit(name, lambda s, n=name, m=bound: getattr(s, n) <= m, f"Lucebox loads at most {bound}")  # type: ignore[misc]
            for name, bound in BOUNDS.items()
        ),
    ),
    tokenizer=False,
    launch="dflash_server {target} --draft {drafter}",
    source="lucebox 62880e20 server/src/draft/draft_gguf_loader.cpp and PR 447",
    notes=(
        Note("Lucebox before PR 447 ignores the file's mask token and capture layers and uses its target's constants"),
        SLIDING_NOTE,
    ),
)
