"""The head of Qwen4Exp in the real llama.cpp, beyond what every family is asked in test_mtp_engine.py."""

from __future__ import annotations

from pathlib import Path

import make_mtp_qwen4
import pytest
from mtp_checkpoints import job
from test_quantize_engine import assert_same_file, llama_quantize

from convert_drafter.converters import QuantizeJob, convert, quantize
from convert_drafter.converters.gguf_read import read_gguf

pytestmark = pytest.mark.engine
WIDE = {"hidden_size": 256, "hc_lowrank": 256, "moe_intermediate_size": 256, "ple_layer_ids": []}


@pytest.mark.parametrize("recipe", ["Q4_K_M"])
def test_a_quantized_head_is_llama_quantize_s(recipe: str, tmp_path: Path) -> None:
    """In one pass from the checkpoint and from the BF16 file; rows are wide enough for the recipe's own blocks."""
    source = make_mtp_qwen4.random(tmp_path / "target", **WIDE)
    plain, ours, once = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "once"))
    convert(job(source, plain, recipe="BF16"))
    theirs = llama_quantize(plain, tmp_path / "theirs.gguf", recipe)
    quantize(QuantizeJob(plain, ours, recipe))
    assert_same_file(read_gguf(ours), theirs)
    convert(job(source, once, recipe=recipe))
    assert_same_file(read_gguf(once), theirs)
