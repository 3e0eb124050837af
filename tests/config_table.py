"""The table of docs/drafters.md: every published config with tensors of its kind, and what becomes of it.

`PYTHONPATH=fixtures python tests/config_table.py` writes it anew; tests/test_config_table.py holds the page to it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from make_gemma4_assistant import assistant_shapes
from make_gemma4_dspark import dspark_shapes
from published import (
    CONFIGS,
    SMALL_HIDDEN,
    eagle3_shapes,
    published_config,
    published_shapes,
    random_tensors,
    scaled_down,
    tiny_target,
    write_checkpoint,
)

from convert_drafter.converters.convert import ConvertJob, Published, prepare, read_published
from convert_drafter.converters.dialects import CELLS, objections
from convert_drafter.converters.drafters import KINDS
from convert_drafter.converters.errors import DrafterError, Problems

PAGE = Path(__file__).parent.parent / "docs" / "drafters.md"
MARK = "<!-- table: configs -->\n"
Shapes = dict[str, tuple[int, ...]]
# Tensors that tell a kind whose shapes nobody needs: it is refused by name, or its facts are all that is read.
HEAD = {"mtp.fc.weight": (2, 2), "model.embed_tokens.weight": (2, 2)}
TOLD: dict[str, Shapes] = {
    "poolside__Laguna-XS-2.1-DFlash": {"aux_hidden_norms.0.weight": (2,)},
    "RespectMathias__Laguna-XS-2.1-DSpark": {"markov_head.markov_w1.weight": (2, 2)},
    "stanleyphoong__Ornith-1.0-9B-DSpark": {"markov_head.markov_w1.weight": (2, 2)},
    "SpecForge__kimi-k3-dspark-5mla": {"markov_head.markov_w1.weight": (2, 2)},
    "satgeze__Qwen3.6-27B-DSpark": {"markov_head.markov_w1.weight": (2, 2)},
    "SpecForge__qwen3-8b-domino": {"prefix_gru.bias_hh_l0": (2,)},
    "SpecForge__qwen3.6-27b-domino-full-attention": {"prefix_gru.bias_hh_l0": (2,)},
    "SpecForge__qwen3-8b-peagle": {"layers.0.hidden_norm.weight": (2,), "mask_hidden": (2,)},
    "Qwen__Qwen3.6-27B": HEAD | {"mtp.layers.0.self_attn.q_proj.weight": (2, 2), "lm_head.weight": (2, 2)},
    "unknown__qwen4_exp": HEAD,
    "zai-org__GLM-5.1": {"model.layers.78.eh_proj.weight": (2, 2), "model.layers.78.enorm.weight": (2,)},
    "XiaomiMiMo__MiMo-7B": {"model.mtp_layers.0.input_proj.weight": (2, 2)},
    "deepseek-ai__DeepSeek-V3-R1": {"model.layers.61.eh_proj.weight": (2, 2)},
    "deepseek-ai__DeepSeek-V4-Flash": {"mtp.0.e_proj.weight": (2, 2), "mtp.0.h_proj.weight": (2, 2)},
    "deepseek-ai__DeepSeek-V4-Flash-0731": {"mtp.0.main_proj.weight": (2, 2)},
    "deepseek-ai__DeepSeek-V4-Pro-DSpark": {"mtp.0.main_proj.weight": (2, 2)},
    **{f"google__gemma-4-{size}-it-assistant": {"pre_projection.weight": (2, 2)} for size in ("26B-A4B", "31B")},
}


def tensors_of(name: str, config: dict[str, Any]) -> Shapes:
    flat = config | config.get("transformer_layer_config", {})
    if name in TOLD:
        return TOLD[name]
    if "backbone_hidden_size" in config:
        return assistant_shapes(config)
    if config.get("architectures") == ["Gemma4DSparkModel"]:
        return dspark_shapes(config)
    return eagle3_shapes(flat) if re.search("ea[gl][gl]e3", name) else published_shapes(flat)


def outcome(name: str, folder: Path) -> tuple[str, str]:
    """(kind, what becomes of it) of one config, its widths made small unless only its facts are read."""
    whole = published_config(name)
    config = whole if name in TOLD else scaled_down(whole)
    if (config.get("dflash_config") or {}).get("selector_top_k"):
        config["dflash_config"]["selector_top_k"] = 8  # 16 * 17 scores do not fit a row of so small a hidden size
    source = write_checkpoint(folder / "drafter", config, random_tensors(tensors_of(name, config)))
    flat = config | config.get("transformer_layer_config", {})
    target = tiny_target(
        folder / "target",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=flat.get("backbone_hidden_size") or flat.get("hidden_size") or SMALL_HIDDEN,
        num_hidden_layers=flat.get("num_target_layers")
        or (flat.get("dflash_config") or {}).get("num_target_layers", 94),
    )
    try:
        published = read_published(source, None if name in TOLD else target)
    except DrafterError as error:
        return "-", said(error, folder)
    fits = {
        runtime: fault(published, runtime, target, folder) for kind, runtime in CELLS if kind == published.kind.name
    }
    runs = [runtime for runtime, why in fits.items() if not why]
    others = [f"{runtime} does not: {why}" for runtime, why in fits.items() if why]
    return published.kind.name, "; ".join([f"converts for {', '.join(runs)}"] * bool(runs) + others)


def fault(published: Published, runtime: str, target: Path, folder: Path) -> str:
    if KINDS[published.kind.name].in_target:  # a whole target at its own size: facts alone
        return "; ".join(objections(CELLS[published.kind.name, runtime], published.spec))
    try:
        prepare(ConvertJob(published.checkpoint.root, target, runtime, "F32", folder / "out.gguf"))
    except DrafterError as error:
        return said(error, folder)
    return ""


def said(error: DrafterError, folder: Path) -> str:
    """A refusal without the folder it was tried in; of several problems the first."""
    text = error.problems[0] if isinstance(error, Problems) else str(error)
    text = re.sub(rf"{re.escape(str(folder))}/(drafter|target)(/config\.json)?(: )?", "", text)
    return text.replace("|", "\\|").replace("\n", " ")


def rows() -> Iterator[tuple[str, str, str]]:
    for path in sorted(CONFIGS.glob("*.json"), key=lambda path: path.stem.lower()):
        with tempfile.TemporaryDirectory() as folder:
            yield (path.stem.replace("__", "/"), *outcome(path.stem, Path(folder)))


def table() -> str:
    lines = [f"| {config} | {kind} | {what} |" for config, kind, what in rows()]
    return "\n".join(["| config | kind | what becomes of it |", "|---|---|---|", *lines]) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text()
    before, after = text.split(MARK)
    rest = after.split("\n\n", 1)[1] if "\n\n" in after else ""
    PAGE.write_text(f"{before}{MARK}{table()}" + (f"\n{rest}" if rest else ""))
