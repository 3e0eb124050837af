"""Every published config: the facts it has to be read as, or the kind and key it has to be refused for.

The facts were written out by hand from the files in fixtures/configs; the widths are those of `scaled_down`.
G-n are the config traps, T-n the traps of other converters.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import (
    CONFIGS,
    DELETE,
    PAIR,
    SMALL_FEED_FORWARD,
    SMALL_HEAD_DIM,
    SMALL_HIDDEN,
    SMALL_KV_HEADS,
    SMALL_VOCAB,
    changed,
    published_config,
    published_shapes,
    random_tensors,
    scaled_down,
    tiny_target,
    write_checkpoint,
)

from convert_drafter.converters.convert import Conversion, ConvertJob, Published, prepare, read_published
from convert_drafter.converters.dialects import CELLS, doubts, objections
from convert_drafter.converters.errors import DrafterError, WrongInput
from convert_drafter.converters.spec import Convolution, DrafterSpec, Rope, RopeScaling, Selector, SlidingWindow
from convert_drafter.converters.target import read_target

NESTED_THETA, TOP_THETA = "rope_parameters.rope_theta", "rope_theta"
NESTED_BLOCK, TOP_BLOCK = "dflash_config.block_size", "block_size"
NESTED_MASK, TOP_MASK = "dflash_config.mask_token_id", "mask_token_id"
NESTED_CAPTURES, TOP_CAPTURES = "dflash_config.target_layer_ids", "target_layer_ids"
DEPTH = "num_target_layers"
LAYOUT = ("transformer_layer_config", "draft_vocab_size")


def spec(heads: int = 8, hidden: int = SMALL_HIDDEN, kind: str = "dflash", **facts: Any) -> DrafterSpec:
    """A spec with the scaled-down widths; all other facts are the case's own."""
    return DrafterSpec(
        kind=kind,
        hidden_size=hidden,
        target_hidden_size=hidden,
        feed_forward_size=SMALL_FEED_FORWARD,
        head_count=heads,
        kv_head_count=SMALL_KV_HEADS,
        head_dim=SMALL_HEAD_DIM,
        vocab_size=SMALL_VOCAB,
        **{"causal": False, **facts},
    )


def dspark(**facts: Any) -> DrafterSpec:
    own = {"kind": "dspark", "markov_rank": 256, "confidence_head": True, "sample_from_anchor": True}
    return spec(**{**own, **facts})


def rope(theta: float, dimensions: int = SMALL_HEAD_DIM, **more: Any) -> Rope:
    return Rope(theta, dimensions, **more)


def window(size: int, *, sliding: int, full: int) -> SlidingWindow:
    return SlidingWindow(size, (True,) * sliding + (False,) * full)


@dataclass(frozen=True)
class Case:
    """`objections` maps a runtime to what it must say, facts then tensors; one that is not named takes the drafter.

    `doubts` maps a runtime to its warning.
    """

    name: str
    expected: DrafterSpec
    origins: dict[str, str]
    complete: bool
    traps: str = ""
    unread: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    objections: dict[str, tuple[str, ...]] = field(default_factory=dict)
    doubts: dict[str, str] = field(default_factory=dict)


def origins(theta: str, block: str, mask: str, captures: str) -> dict[str, str]:
    found = {"rope.theta": theta, "block_size": block, "mask_token_id": mask, "capture_layers": captures}
    return {**found, "target_layer_count": DEPTH, "head_dim": "head_dim"}


OLD = origins(TOP_THETA, TOP_BLOCK, NESTED_MASK, NESTED_CAPTURES)  # z-lab until May 2026
NEW = origins(NESTED_THETA, NESTED_BLOCK, NESTED_MASK, NESTED_CAPTURES)  # z-lab since June 2026
# llama.cpp packs 16 * 17 scores into a row of the hidden size, which is small here
EIGHT = {"dflash_config.selector_top_k": "8"}
ONLY_LLAMA_CPP, DSPARK_ONLY = (
    {runtime: (f"{runtime} has no loader for {kind} drafters",) for runtime in ("ik_llama.cpp", "lucebox")}
    for kind in ("dflash2", "dspark")
)
EPSILON_OF_LUCEBOX = ("norm_epsilon: Lucebox computes every norm with 1e-06",)

READ = [
    Case(
        "z-lab__Qwen3-4B-DFlash-b16",
        spec(
            layer_count=5,
            context_length=40960,
            norm_epsilon=1e-6,
            rope=rope(1_000_000.0),
            block_size=16,
            mask_token_id=117,  # 151669 % 2048
            capture_layers=(1, 9, 17, 25, 33),
            target_layer_count=36,
        ),
        OLD,
        complete=True,
        traps="G-11 G-23 rope_scaling null",
    ),
    Case(
        "z-lab__Qwen3.5-4B-DFlash",
        spec(
            layer_count=6,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=16,
            mask_token_id=269,  # 248077 % 2048
            capture_layers=(1, 5, 9, 13, 17, 21, 25, 29),
            target_layer_count=32,
            window=window(4096, sliding=5, full=1),
        ),
        NEW,
        complete=True,
        traps="G-1 G-3 G-11 G-23 T-46 T-54 T-55",
    ),
    Case(
        "SpecForge__qwen3-4b-dspark",
        dspark(
            layer_count=5,
            context_length=40960,
            norm_epsilon=1e-6,
            rope=rope(1_000_000.0),
            block_size=7,
            mask_token_id=117,
            capture_layers=(1, 9, 17, 25, 33),
            target_layer_count=36,
        ),
        origins(TOP_THETA, TOP_BLOCK, NESTED_MASK, NESTED_CAPTURES) | {"markov_rank": "dflash_config.markov_rank"},
        complete=True,
        objections=DSPARK_ONLY,
    ),
    Case(
        "deepseek-ai__dspark_qwen3_4b_block7",
        dspark(
            layer_count=5,
            context_length=40960,
            norm_epsilon=1e-6,
            rope=rope(1_000_000.0),
            block_size=7,
            mask_token_id=117,
            capture_layers=(1, 9, 17, 25, 33),
            target_layer_count=36,
        ),
        origins(NESTED_THETA, TOP_BLOCK, TOP_MASK, TOP_CAPTURES)
        | {"markov_rank": "markov_rank", "sample_from_anchor": "DSpark's definition (no key says otherwise)"},
        complete=False,
        objections=DSPARK_ONLY,
    ),
    Case(
        "RadixArk__Kimi-K3-DSpark",
        dspark(
            layer_count=5,
            context_length=1048576,
            norm_epsilon=1e-5,
            rope=rope(10_000.0),
            block_size=7,
            mask_token_id=2032,  # 163824 % 2048
            capture_layers=(7, 23, 51, 67, 83),
            target_layer_count=93,
        ),
        origins(NESTED_THETA, TOP_BLOCK, NESTED_MASK, NESTED_CAPTURES),
        complete=False,
        objections=DSPARK_ONLY,
    ),
    Case(
        "LiquidAI__LFM2-1.2B-16L-DSpark",
        dspark(
            hidden=128,
            layer_count=5,
            context_length=128000,
            norm_epsilon=1e-5,
            rope=rope(1_000_000.0),
            block_size=9,
            mask_token_id=914,  # 64402 % 2048
            capture_layers=(2, 5, 8, 11, 14),
            target_layer_count=16,
        ),
        origins(TOP_THETA, TOP_BLOCK, NESTED_MASK, NESTED_CAPTURES) | {"target_layer_count": f"dflash_config.{DEPTH}"},
        complete=False,
        traps="interleaved rotary rows",
        objections=DSPARK_ONLY,
    ),
    Case(
        "RedHatAI__GLM-5.3-speculator.dspark",
        dspark(
            heads=2,
            layer_count=3,
            context_length=1048576,
            norm_epsilon=1e-5,
            rope=rope(8_000_000.0),
            block_size=8,
            mask_token_id=1256,
            capture_layers=(1, 19, 38, 57, 74),
            target_layer_count=78,
            causal=True,
            window=window(2048, sliding=3, full=0),
        ),
        {
            "rope.theta": f"transformer_layer_config.{NESTED_THETA}",
            "capture_layers": "aux_hidden_state_layer_ids",
            "causal": "sliding_window_non_causal",
            "sample_from_anchor": "sample_from_anchor",
        },
        complete=True,
        traps="G-4 G-7",
        settings={"num_target_layers": "78"},
        objections=DSPARK_ONLY,
    ),
    Case(
        "z-lab__Qwen3.8-27B-DFlash2",
        spec(
            kind="dflash2",
            layer_count=5,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=8,
            mask_token_id=262,
            capture_layers=(5, 19, 33, 47, 61),
            target_layer_count=64,
            window=window(2048, sliding=5, full=0),
            convolution=Convolution(2, 16),
            selector=Selector(256, 8),
        ),
        NEW,
        complete=True,
        traps="G-19 G-15 T-55",
        settings=EIGHT,
        objections=ONLY_LLAMA_CPP,
    ),
    Case(
        "incoai__GLM-5.3-DFlash2",
        spec(
            kind="dflash2",
            heads=16,
            hidden=SMALL_HIDDEN,
            layer_count=6,
            context_length=1048576,
            norm_epsilon=1e-5,
            rope=rope(1_000_000.0),
            block_size=8,
            mask_token_id=1256,  # 154856 % 2048
            capture_layers=(5, 19, 33, 47, 61, 75),
            target_layer_count=78,
            window=window(2048, sliding=6, full=0),
            convolution=Convolution(2, 16),
            selector=Selector(256, 8),
        ),
        NEW,
        complete=True,
        traps="G-19 G-21",
        settings=EIGHT,
        objections=ONLY_LLAMA_CPP,
    ),
    Case(
        "z-lab__Qwen3.5-4B-DFlash@old",
        spec(
            layer_count=5,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=16,
            mask_token_id=262,  # 248070 % 2048
            capture_layers=(1, 8, 15, 22, 29),
            target_layer_count=32,
        ),
        OLD,
        complete=False,
        traps="G-3",
    ),
    Case(
        "z-lab__Qwen3.6-27B-DFlash",
        spec(
            layer_count=5,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=16,
            mask_token_id=262,
            capture_layers=(1, 16, 31, 46, 61),
            target_layer_count=64,
            window=window(2048, sliding=4, full=1),
        ),
        OLD,
        complete=False,
        traps="T-55 A1-19",
    ),
    Case(
        "z-lab__Qwen3.6-35B-A3B-DFlash",
        spec(
            layer_count=6,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=16,
            mask_token_id=269,
            capture_layers=(1, 6, 11, 16, 22, 27, 32, 37),
            target_layer_count=40,
            window=window(4096, sliding=5, full=1),
        ),
        NEW,
        complete=False,
        traps="G-1 G-3 T-52 A1-19",
    ),
    Case(
        "z-lab__Qwen3.5-35B-A3B-DFlash",
        spec(
            heads=16,  # 32/4
            layer_count=8,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=16,
            mask_token_id=262,
            capture_layers=(1, 10, 19, 28, 37),
            target_layer_count=40,
        ),
        OLD,
        complete=False,
        traps="G-11",
    ),
    Case(
        "z-lab__gemma-4-26B-A4B-it-DFlash",
        spec(
            layer_count=5,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(1_000_000.0),
            block_size=16,
            mask_token_id=4,
            capture_layers=(1, 6, 11, 17, 22, 27),
            target_layer_count=30,
            window=window(2048, sliding=4, full=1),
        ),
        OLD,
        complete=False,
        traps="G-6 G-11 sliding without use_sliding_window",
    ),
    Case(
        "deepseek-ai__dflash_qwen3_4b_block7",
        spec(
            layer_count=5,
            context_length=40960,
            norm_epsilon=1e-6,
            rope=rope(1_000_000.0),
            block_size=7,
            mask_token_id=117,
            capture_layers=(1, 9, 17, 25, 33),
            target_layer_count=36,
        ),
        origins(NESTED_THETA, TOP_BLOCK, TOP_MASK, TOP_CAPTURES),
        complete=False,
        traps="G-15 markov_rank 0",
        settings={"sample_from_anchor": "false"},  # DeepSpec's own drafts from the anchor's place: it has to be asked
    ),
    Case(
        "XiaomiMiMo__MiMo-V2.5-Pro-FP4-DFlash",
        spec(
            heads=32,  # 128/8
            layer_count=5,
            context_length=262144,
            norm_epsilon=1e-5,
            rope=rope(10_000.0, dimensions=8),
            block_size=8,
            mask_token_id=117,
            capture_layers=(0, 15, 31, 47, 69),
            target_layer_count=70,
            window=window(1024, sliding=5, full=0),
            context_theta=5_000_000.0,
            attention_value_scale=0.612,
        ),
        origins(TOP_THETA, NESTED_BLOCK, NESTED_MASK, NESTED_CAPTURES),
        complete=True,
        traps="G-8 G-11 backbone_rotary_base is not theta",
        objections={
            "llama.cpp": ("context_theta = 5000000.0: llama.cpp has no key",),
            "lucebox": (
                "context_theta = 5000000.0",
                "attention_value_scale = 0.612",
                "rope.dimensions = 8",
                *EPSILON_OF_LUCEBOX,
                "layers.0.self_attn.attention_sink_bias: lucebox has no tensor",
            ),
        },
    ),
    Case(
        "z-lab__gpt-oss-120b-DFlash",
        spec(
            heads=16,  # 64/8
            layer_count=8,
            context_length=131072,
            norm_epsilon=1e-5,
            rope=rope(150_000.0, scaling=RopeScaling("yarn", 32.0, 4096)),
            block_size=10,
            mask_token_id=1344,  # 200000 % 2048
            capture_layers=(1, 9, 17, 25, 33),
            target_layer_count=36,
        ),
        OLD,
        complete=True,
        traps="G-11 G-17",
        settings={"rope_scaling.truncate": "true"},
        objections={
            "llama.cpp": (
                "layers.0.self_attn.q_proj.bias: llama.cpp has no tensor for ATTN_Q_BIAS of layer 0",
                "layers.7.self_attn.o_proj.bias",
            ),
            "lucebox": (
                "rope.scaling.factor = 32.0",
                "rope.scaling.method = 'yarn'",
                *EPSILON_OF_LUCEBOX,
                "layers.0.self_attn.q_proj.bias: lucebox has no tensor",
            ),
        },
    ),
    Case(
        "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash",
        spec(
            heads=32,  # 32/2
            layer_count=6,
            context_length=1048576,
            norm_epsilon=1e-6,
            rope=rope(10_000.0, scaling=RopeScaling("yarn", 128.0, 8192)),
            block_size=8,
            mask_token_id=990,
            capture_layers=(1, 5, 19, 29, 41, 51),
            target_layer_count=52,
        ),
        {
            **origins(NESTED_THETA, "--set block_size", NESTED_MASK, NESTED_CAPTURES),
            "target_layer_count": "--set num_target_layers",
        },
        complete=False,
        traps="G-7 G-10 with what it lacks given",
        settings={"block_size": "8", "num_target_layers": "52"},
        objections={"lucebox": ("rope.scaling.factor = 128.0",)},
        doubts={"llama.cpp": "the target's last layer is captured"},  # 51 of 52; its target is a nemotron-h
    ),
    Case(
        "SpecForge__lfm2.5-1.2b-instruct-dflash",
        spec(
            hidden=128,  # 32 heads * 64 = 2048 = hidden_size, so 8 * 16
            layer_count=8,
            context_length=128000,
            norm_epsilon=1e-5,
            rope=rope(1_000_000.0),
            block_size=16,
            mask_token_id=16,
            capture_layers=(1, 4, 7, 10, 13),
            target_layer_count=16,
        ),
        OLD,
        complete=True,
        traps="G-6 no sliding keys at all",
        objections={"lucebox": EPSILON_OF_LUCEBOX},
    ),
    Case(
        "SpecForge__qwen2.5-0.5b-dflash",
        spec(
            heads=14,  # 14/2
            hidden=224,  # 14 heads * 64 = 896 = hidden_size, so 14 * 16
            layer_count=5,
            context_length=32768,
            norm_epsilon=1e-6,
            rope=rope(1_000_000.0),
            block_size=16,
            mask_token_id=117,
            capture_layers=(1, 6, 11, 16, 21),
            target_layer_count=24,
        ),
        OLD,
        complete=True,
    ),
    Case(
        "SpecForge__qwen3-4b-dflash",
        spec(
            layer_count=5,
            context_length=40960,
            norm_epsilon=1e-6,
            rope=rope(1_000_000.0),
            block_size=16,
            mask_token_id=117,
            capture_layers=(1, 9, 17, 25, 33),
            target_layer_count=36,
        ),
        OLD,
        complete=True,
        traps="G-11 tie_word_embeddings false without an embedding",
    ),
    Case(
        "SpecForge__qwen3.5-4b-dflash",
        spec(
            layer_count=5,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=16,
            mask_token_id=262,  # 248070 % 2048
            capture_layers=(1, 8, 15, 22, 29),
            target_layer_count=32,
        ),
        OLD,
        complete=True,
        traps="G-11 G-23 pad is eos",
    ),
    Case(
        "SpecForge__qwen3.5-35b-a3b-dflash",
        spec(
            heads=16,  # 32/4
            layer_count=8,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=16,
            mask_token_id=262,
            capture_layers=(1, 10, 19, 28, 37),
            target_layer_count=40,
        ),
        OLD,
        complete=True,
        traps="G-11",
    ),
    Case(
        "SpecForge__qwen3.6-27b-dflash",
        spec(
            layer_count=5,
            context_length=262144,
            norm_epsilon=1e-6,
            rope=rope(10_000_000.0),
            block_size=16,
            mask_token_id=262,
            capture_layers=(1, 16, 31, 46, 61),
            target_layer_count=64,
            window=window(2048, sliding=4, full=1),
        ),
        OLD,
        complete=True,
        traps="G-11 G-21 T-55 A1-19 bos null",
    ),
]


@dataclass(frozen=True)
class Refusal:
    """`extra` are the tensors beside a plain DFlash's that make it what it is; `instead` stands for all of them."""

    name: str
    fragments: tuple[str, ...]
    complete: bool
    traps: str = ""
    extra: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)
    kind: str = ""  # whose tensors it has, where not those of its config


OF_OTHER_KINDS = re.compile(r"selector|conv|markov|confidence")
MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight")
FUSED = ("fc.weight", "hidden_norm.weight", "aux_hidden_norms.0.weight", "layers.0.self_attn.qkv_proj.weight")


def lost_head(name: str, *fragments: str, complete: bool = False, traps: str = "") -> Refusal:
    """A DSpark config whose head's tensors are lost is refused by its config."""
    return Refusal(name, fragments, complete, f"G-15 {traps}, tensors lost", kind="dflash")


def other_build(
    name: str, architecture: str, *fragments: str, complete: bool = False, traps: str = ""
) -> list[Refusal]:
    """A DSpark head on a backbone that computes something else, with its tensors and without the head's."""
    named = f"architectures: {architecture} on"
    return [
        Refusal(name, (f"{named} dspark tensors",), complete, f"G-15 {traps}", extra=MARKOV),
        lost_head(name, *(fragments or (f"{named} dflash tensors",)), complete=complete, traps=traps),
    ]


REFUSED = [
    # complete configs of what is not converted yet, or cannot be
    Refusal(
        "z-lab__Qwen3.8-27B-DFlash2", ("DFlash2DraftModel on dflash tensors",), True, "G-15 tensors lost", kind="dflash"
    ),
    Refusal("poolside__Laguna-XS-2.1-DFlash", ("the tensors are those of Laguna DFlash",), True, "G-18", instead=FUSED),
    Refusal("poolside__Laguna-XS-2.1-DFlash", ("DFlashLagunaForCausalLM on dflash tensors",), True, "G-18 unfused"),
    Refusal("z-lab__gpt-oss-120b-DFlash", ("rope_scaling.truncate: found False", "--set"), True, "G-17 truncate false"),
    Refusal(
        "z-lab__Qwen3.5-4B-DFlash",
        ("quantization_config", "W4A8_AWQ"),
        True,
        "G-27 quantized",
        changes={"quantization_config": {"quant_algo": "W4A8_AWQ"}},
    ),
    Refusal(
        "SpecForge__qwen3-8b-domino",
        ("the tensors are those of Domino",),
        True,
        "G-27",
        extra=("prefix_gru.bias_hh_l0",),
    ),
    Refusal("SpecForge__qwen3-8b-domino", ("DominoDraftModel on dflash tensors",), True, "G-27 tensors lost"),
    Refusal("SpecForge__qwen3-8b-peagle", ("PEagleDraftModel on dflash tensors",), True, "G-27"),
    *other_build("deepseek-ai__dspark_gemma4_12b_block7", "Gemma4DSparkModel", complete=True, traps="G-2 G-12"),
    lost_head("RedHatAI__GLM-5.3-speculator.dspark", "DSparkDraftModel on dflash", complete=True, traps="G-4 G-7"),
    lost_head("SpecForge__qwen3-4b-dspark", "DSparkDraftModel on dflash tensors", complete=True),
    # speculators' layout
    Refusal("RedHatAI__Qwen3-8B-speculator.dflash", ("max_position_embeddings",), False, "G-4 G-16 G-24"),
    Refusal("RedHatAI__DeepSeek-V4-Flash-speculator.dflash", ("max_position_embeddings",), False, "G-4 G-24"),
    Refusal("RedHatAI__Qwen3-4B-speculator.dspark", ("max_position_embeddings",), False, "G-7"),
    lost_head("RedHatAI__Qwen3-4B-speculator.dspark", "sample_from_anchor: found True, expected False", traps="G-7"),
    # excerpts of configs: a key that is not there is named, never guessed
    Refusal(
        "nvidia__NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4-DFlash",
        ("block_size: missing (looked at dflash_config.block_size or block_size",),
        False,
        "G-10 T-54",
    ),
    Refusal("z-lab__LLaMA3.1-8B-Instruct-DFlash-UltraChat", ("max_position_embeddings",), False),
    Refusal("z-lab__Qwen3-Coder-30B-A3B-DFlash", (f"{NESTED_CAPTURES} or {TOP_CAPTURES}",), False, "T-52"),
    Refusal("z-lab__Qwen3-Coder-Next-DFlash", (f"{NESTED_CAPTURES} or {TOP_CAPTURES}",), False, "T-52"),
    Refusal("z-lab__Qwen3.5-122B-A10B-DFlash", ("num_target_layers",), False),
    Refusal("z-lab__Qwen3.5-122B-A10B-DFlash", ("layer_types",), False, "T-55", changes={"num_target_layers": 48}),
    Refusal("z-lab__Qwen3.5-27B-DFlash", ("rope theta: missing", NESTED_THETA, TOP_THETA), False, "G-1 T-9"),
    Refusal("z-lab__Qwen3.5-397B-A17B-DFlash", ("intermediate_size",), False),
    Refusal("z-lab__gpt-oss-20b-DFlash", ("num_target_layers",), False, "G-17"),
    Refusal("unknown__dspark-block11-fixture", ("num_hidden_layers",), False),
    Refusal("unknown__modelopt-Qwen3-30B-DSpark", ("num_key_value_heads",), False),
    lost_head("unknown__modelopt-Qwen3-30B-DSpark", "dflash_config.markov_rank: found 256", "DSpark"),
    *other_build("unknown__TorchSpec-qwen_3_dspark", "Qwen3DSparkForCausalLM", traps="G-7 G-9"),
    lost_head("deepseek-ai__dspark_qwen3_4b_block7", "markov_rank: found 256, expected 0", "DSpark"),
    Refusal("DimInfer__Qwen3.8-27B-Dspark-v1", ("num_hidden_layers",), False),
    lost_head("DimInfer__Qwen3.8-27B-Dspark-v1", "markov_rank: found 256, expected 0", "DSpark"),
    Refusal("satgeze__Qwen3.6-27B-DSpark", ("markov_rank: missing",), False, "G-14", extra=MARKOV),
    lost_head("satgeze__Qwen3.6-27B-DSpark", "num_hidden_layers", traps="G-14"),
    *other_build("stanleyphoong__Ornith-1.0-9B-DSpark", "Qwen35DSparkModel", traps="G-14"),
    *other_build("RespectMathias__Laguna-XS-2.1-DSpark", "LagunaDSparkModel", traps="G-18"),
    lost_head("RadixArk__Kimi-K3-DSpark", "DSparkDraftModel on dflash tensors"),
    lost_head("LiquidAI__LFM2-1.2B-16L-DSpark", "Lfm2DSparkDraftModel on dflash tensors"),
    *other_build("SpecForge__kimi-k3-dspark-5mla", "KimiK3DSpark5MLADraftModel", traps="G-27"),
]
# Targets, and what is looked at in test_config_table.py alone.
TARGETS = {
    "Qwen__Qwen3.6-27B", "zai-org__GLM-5.1", "XiaomiMiMo__MiMo-7B", "deepseek-ai__DeepSeek-V3-R1",
    "deepseek-ai__DeepSeek-V4-Flash", "deepseek-ai__DeepSeek-V4-Flash-0731", "deepseek-ai__DeepSeek-V4-Pro-DSpark",
    "unknown__qwen4_exp",
    "google__gemma-4-E2B-it-assistant", "google__gemma-4-26B-A4B-it-assistant", "google__gemma-4-31B-it-assistant",
    "SpecForge__glm-5.2-dspark", "SpecForge__inkling-dspark", "SpecForge__kimi-k3-dspark",
    "SpecForge__ling-3.0-tiny-dspark", "SpecForge__qwen3-8b-dspark", "SpecForge__qwen3.6-27b-domino-full-attention",
}  # fmt: skip
COMPLETE = {
    "z-lab__Qwen3-4B-DFlash-b16",
    "z-lab__Qwen3.5-4B-DFlash",
    "z-lab__Qwen3.8-27B-DFlash2",
    "z-lab__gpt-oss-120b-DFlash",
    "incoai__GLM-5.3-DFlash2",
    "XiaomiMiMo__MiMo-V2.5-Pro-FP4-DFlash",
    "poolside__Laguna-XS-2.1-DFlash",
    "RedHatAI__GLM-5.3-speculator.dspark",
    "deepseek-ai__dspark_gemma4_12b_block7",
    "SpecForge__lfm2.5-1.2b-instruct-dflash",
    "SpecForge__qwen2.5-0.5b-dflash",
    "SpecForge__qwen3-4b-dflash",
    "SpecForge__qwen3.5-35b-a3b-dflash",
    "SpecForge__qwen3.5-4b-dflash",
    "SpecForge__qwen3.6-27b-dflash",
    "SpecForge__qwen3-4b-dspark",
    "SpecForge__qwen3-8b-domino",
    "SpecForge__qwen3-8b-peagle",
}

cases = pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.name} {case.traps}".strip()) for case in READ])
refusals = pytest.mark.parametrize("case", [pytest.param(r, id=f"{r.name} {r.traps}".strip()) for r in REFUSED])


def checkpoint(folder: Path, name: str, **changes: Any) -> Path:
    config = scaled_down(changed(published_config(name), changes))
    return write_checkpoint(
        folder, config, random_tensors(published_shapes(config | config.get("transformer_layer_config", {})))
    )


def target_of(case: Case, folder: Path, **config: Any) -> Path:
    facts = {"hidden_size": case.expected.hidden_size, "num_hidden_layers": case.expected.target_layer_count}
    return tiny_target(folder, **{"architectures": ["Qwen3ForCausalLM"], **facts, **config})


def read(case: Case, folder: Path, target: Path | None = None, **changes: Any) -> Published:
    return read_published(checkpoint(folder, case.name, **changes), target, case.settings)


def planned(case: Case, runtime: str, tmp_path: Path, **target: Any) -> Conversion:
    source = checkpoint(tmp_path / "drafter", case.name)
    beside = target_of(case, tmp_path / "target", **target)
    return prepare(ConvertJob(source, beside, runtime, "F32", tmp_path / "out.gguf", settings=case.settings))


# --- the fixtures themselves ---


def test_every_config_is_expected_to_be_something() -> None:
    chains = {path.stem for path in CONFIGS.glob("*ea[gl][gl]e3*.json")}  # those are in test_eagle3.py
    assert {path.stem for path in CONFIGS.glob("*.json")} - chains == {c.name for c in (*READ, *REFUSED)} | TARGETS
    assert {c.name for c in (*READ, *REFUSED) if c.complete} == COMPLETE
    assert not {c.name for c in (*READ, *REFUSED) if not c.complete} & COMPLETE


def test_configs_hold_published_keys_only() -> None:
    for path in CONFIGS.glob("*.json"):
        assert not [key for key in published_config(path.stem) if key.startswith("_")], path


@pytest.mark.parametrize("name", sorted({case.name for case in READ}))
def test_scaling_down_changes_widths_and_mask_only(name: str) -> None:
    before, after = published_config(name), scaled_down(published_config(name))
    differing = {key for key in before if before[key] != after[key]} - {"dflash_config"}
    inner = {key for key, value in before.get("dflash_config", {}).items() if value != after["dflash_config"][key]}
    widths = {
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    }
    assert before.keys() == after.keys()
    assert differing <= widths | {"v_head_dim", "target_hidden_size", "mask_token_id", *LAYOUT}
    assert inner <= {"mask_token_id"}
    before, after = ({**c, **c.get(LAYOUT[0], {})} for c in (before, after))
    ratio = [c["num_attention_heads"] / c["num_key_value_heads"] for c in (before, after)]
    square = [c["num_attention_heads"] * c["head_dim"] == c["hidden_size"] for c in (before, after)]
    assert ratio[0] == ratio[1] and square[0] == square[1]


# --- configs that are read ---


@cases
def test_facts(case: Case, tmp_path: Path) -> None:
    published = read(case, tmp_path)
    assert published.spec == case.expected
    found = published.reader.origins
    assert {name: found[name] for name in case.origins} == case.origins
    assert published.reader.warnings == []


@cases
def test_every_key_of_theirs_is_known(case: Case, tmp_path: Path) -> None:
    """A key nobody reads is a warning, and an error with --strict: a published drafter must not have one."""
    published = read(case, tmp_path)
    published.kind.rules(published.reader)
    published.kind.dropped(published.reader)
    assert tuple(published.reader.unread()) == case.unread


@cases
def test_runtimes_take_them_or_say_why_not(case: Case, tmp_path: Path) -> None:
    for (kind, runtime), cell in CELLS.items():
        if kind != case.expected.kind:
            continue
        warnings, message = doubts(cell, case.expected), " ".join(objections(cell, case.expected))
        expected = [text for text in case.objections.get(runtime, ()) if not text.startswith("layers.")]
        assert bool(message) == bool(expected), (runtime, message)
        assert all(fragment in message for fragment in expected), message
        if not expected:
            found = [case.doubts.get(runtime, "") in warning for warning in warnings]
            assert found == [True] * (runtime in case.doubts)


@pytest.mark.parametrize("runtime", ["llama.cpp", "ik_llama.cpp", "lucebox"])
@cases
def test_conversions_are_planned_or_refused(case: Case, runtime: str, tmp_path: Path) -> None:
    if objections := case.objections.get(runtime):
        with pytest.raises(DrafterError) as caught:
            planned(case, runtime, tmp_path)
        assert any(fragment in str(caught.value) for fragment in objections), caught.value
        return
    # a Nemotron drafter captures its target's last layer, which llama.cpp hands out of its own kind of target only
    nemotron = {"architectures": ["NemotronHForCausalLM"]} if "Nemotron" in case.name else {}
    conversion = planned(case, runtime, tmp_path, **nemotron)
    keys = {kv.key.split(".", 1)[1]: kv.value for kv in conversion.keys}
    ids = case.expected.capture_layers
    if runtime == "llama.cpp":
        assert keys["target_layers"] == tuple(k + 1 for k in ids), "T-51: counted from one"
        assert keys["ggml.mask_token_id"] == case.expected.mask_token_id
    else:
        assert keys["dflash.target_layer_ids"] == ids, "T-51: counted from zero"
        assert keys["dflash.mask_token_id"] == case.expected.mask_token_id
    assert keys["rope.freq_base"] == case.expected.rope.theta
    assert len(conversion.plan.tensors) == len(conversion.published.checkpoint.tensors)
    assert not [warning for warning in conversion.warnings if "nobody reads" in warning]


# --- with their targets ---

QWEN36 = "z-lab__Qwen3.6-27B-DFlash"


def case_of(name: str) -> Case:
    return next(case for case in READ if case.name == name)


def test_mrope_target_gives_the_drafter_sections(tmp_path: Path) -> None:
    """T-57, dialects 1.3: Qwen3.6 positions with M-RoPE, its drafter's config does not say so."""
    ids = {"text_config.bos_token_id": DELETE, "text_config.eos_token_id": DELETE}  # beyond the small vocabulary
    config = changed(scaled_down(published_config("Qwen__Qwen3.6-27B")), ids)
    target = tiny_target(tmp_path / "target", **config)
    found = read_target(target)
    assert (found.layer_count, found.hidden_size, found.uses_mrope) == (64, SMALL_HIDDEN, True)
    case = case_of(QWEN36)
    spec = read(case, tmp_path / "drafter", target).spec
    assert spec == replace(case.expected, rope=rope(10_000_000.0, sections=(8, 0, 0, 0)))
    job = ConvertJob(tmp_path / "drafter", target, "llama.cpp", "F32", tmp_path / "out.gguf")
    keys = {kv.key: kv.value for kv in prepare(job).keys}
    assert keys["dflash.rope.dimension_sections"] == (8, 0, 0, 0)
    assert keys["dflash.rope.dimension_count"] == SMALL_HEAD_DIM, "the target's own 0.25 is not the drafter's"


def test_gemma_target_scales_the_embedding(tmp_path: Path) -> None:
    case = case_of("z-lab__gemma-4-26B-A4B-it-DFlash")
    target = target_of(case, tmp_path / "target", architectures=["Gemma4ForConditionalGeneration"])
    published = read(case, tmp_path / "drafter", target)
    assert published.spec == replace(case.expected, embedding_scale=math.sqrt(SMALL_HIDDEN))


def test_mimo_captures_the_last_layer(tmp_path: Path) -> None:
    """G-8: capture layers 0 and 69 of 70 are right, and llama.cpp has to be warned about the last."""
    case = case_of("XiaomiMiMo__MiMo-V2.5-Pro-FP4-DFlash")
    plain = replace(case.expected, context_theta=None)
    (warning,) = doubts(CELLS["dflash", "llama.cpp"], plain)
    assert "the target's last layer is captured" in warning


def test_mimo_s_mask_embedding_is_not_forgotten(tmp_path: Path) -> None:
    """Its mask row in the target's embedding is untrained; the trained one lies in a pickle beside the weights."""
    case = case_of("XiaomiMiMo__MiMo-V2.5-Pro-FP4-DFlash")
    source = checkpoint(tmp_path / "drafter", case.name)
    (source / "mask_embedding.pt").write_bytes(b"a pickle")
    with pytest.raises(WrongInput, match=r"mask_embedding\.pt: .*pickle.*embed_tokens"):
        read_published(source)
    shapes = published_shapes(scaled_down(published_config(case.name)))
    shapes["embed_tokens.weight"] = (SMALL_VOCAB, SMALL_HIDDEN)
    write_checkpoint(source, scaled_down(published_config(case.name)), random_tensors(shapes))
    with pytest.raises(WrongInput, match="pickle"):  # nothing shows whether that embedding is the patched one
        read_published(source)
    (source / "mask_embedding.pt").unlink()
    assert read_published(source).spec == case.expected


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"num_hidden_layers": 36}, "num_target_layers: found 64, expected 36"),
        ({"hidden_size": 256}, "fc.weight: 480 columns = 5 capture layers * 96, expected 5 * 256"),
        ({"vocab_size": 2050}, "vocab_size: the drafter has 2048, the target target has 2050"),
    ],
)
def test_another_target_is_refused(tmp_path: Path, config: dict[str, Any], fragment: str) -> None:
    """T-61: a drafter beside a target of another size."""
    with pytest.raises(WrongInput) as caught:
        planned(case_of(QWEN36), "llama.cpp", tmp_path, **config)
    assert fragment in str(caught.value)


def test_depth_comes_from_the_target_where_the_config_lacks_it(tmp_path: Path) -> None:
    case = case_of(QWEN36)
    target = target_of(case, tmp_path / "target")
    published = read(case, tmp_path / "drafter", target, num_target_layers=DELETE)
    assert published.spec == case.expected
    assert published.reader.origins["target_layer_count"] == "target target"


def test_the_pair_s_target_is_read_too() -> None:
    assert read_target(PAIR / "target").uses_mrope is False


# --- configs that are refused ---


@refusals
def test_refusals(case: Refusal, tmp_path: Path) -> None:
    config = scaled_down(changed(published_config(case.name), case.changes))
    shapes = published_shapes(config | config.get("transformer_layer_config", {}))
    if case.kind == "dflash":
        shapes = {name: shape for name, shape in shapes.items() if not OF_OTHER_KINDS.search(name)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if not case.instead}
    tensors |= {name: np.zeros(2, np.float32) for name in (*case.instead, *case.extra)}
    source = write_checkpoint(tmp_path / case.name, config, tensors)
    with pytest.raises(WrongInput) as caught:
        read_published(source)
    for fragment in (str(source / "config.json"), *case.fragments):
        assert fragment in str(caught.value)
