"""The trained EAGLE-3 drafter verified: right files pass, and planted faults are found and named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted_faults import Draft
from published import FIXTURES, PAIR
from safetensors.numpy import load_file

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.verdict import Outcome

pytestmark = pytest.mark.engine
pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_drafter.converters.verify.job import VerifyJob  # noqa: E402
from convert_drafter.converters.verify.verify import verify  # noqa: E402

EAGLE, TARGET, PROMPTS = FIXTURES / "pair-eagle3", PAIR / "target", PAIR / "prompts.jsonl"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eagle3") / "drafter.gguf"
    convert(ConvertJob(EAGLE, TARGET, "llama.cpp", "BF16", out))
    return out


def outcomes(file: Path, **options: Any) -> tuple[dict[str, Outcome], Any]:
    verdict = verify(
        VerifyJob(file, (TARGET,), prompts=PROMPTS, max_prompts=6, new_tokens=32, contexts=(32,), **options)
    )
    return {gate.name: gate.outcome for gate in verdict.gates}, verdict


def test_a_right_file_passes(file: Path) -> None:
    found, verdict = outcomes(file, source=EAGLE)
    assert verdict.exit_code(strict=False) == 0, verdict.gates
    for name in ("structure", "pairing", "lossless", "same drafts", "acceptance"):
        assert found[name] is Outcome.PASS, verdict.gates


def unpermuted(draft: Draft) -> None:
    for part in ("q", "k"):
        rows = load_file(EAGLE / "model.safetensors")[f"midlayer.self_attn.{part}_proj.weight"]
        draft.put(f"blk.0.attn_{part}.weight", rows.astype(np.float32), "BF16")


# What a runtime runs without a word, and what diagnosis says of it; half a minute each, so not of all every time.
NAMED = ("q and k not permuted", "another residual")
IDS = "eagle3.target_layers"
FAULTS: dict[str, tuple[Callable[[Draft], object], str]] = {
    "q and k not permuted": (unpermuted, "RoPE rows of q"),
    "no theta": (lambda d: d.set("rope.freq_base", 10000.0), "rope.theta: 10000 -> 500000"),
    "T-52 a triple made up": (lambda d: d.set(IDS, (2, 3, 4)), "capture_layers: [1, 2, 3] -> [0, 2, 4]"),
    "ids in another order": (lambda d: d.set(IDS, (5, 3, 1)), "capture_layers: [4, 2, 0] -> [0, 2, 4]"),
    "another residual": (lambda d: d.set("norm_before_residual", True), "norm_before_residual: true -> false"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name: str, file: Path, tmp_path: Path) -> None:
    edit, cause = FAULTS[name]
    draft = Draft.of(file)
    edit(draft)
    spoilt = draft.write(tmp_path / "spoilt.gguf")
    found, verdict = outcomes(spoilt, source=EAGLE, diagnose=name in NAMED)
    assert Outcome.FAIL in (found["structure"], found["same drafts"])
    assert found["lossless"] is Outcome.PASS  # whatever is drafted, the text stays the target's
    if name in NAMED:
        assert verdict.diagnosis is not None and verdict.diagnosis.found is not None, verdict.diagnosis
        assert verdict.diagnosis.found.name.startswith(cause)
