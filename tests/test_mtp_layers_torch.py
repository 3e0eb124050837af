"""Heads of every family on their targets in torch: what is drafted never changes the text, and a file drafts alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from mtp_checkpoints import SOURCES, job

from convert_drafter.converters import convert

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert_drafter.converters.convert import read_published  # noqa: E402
from convert_drafter.converters.verify.in_torch.drafter import TorchDrafter  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget  # noqa: E402
from convert_drafter.converters.verify.in_torch.text import captures_of  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import (  # noqa: E402
    checkpoint_weights,
    gguf_weights,
    reference,
)
from convert_drafter.converters.verify.loop import greedy, speculative_loop  # noqa: E402

FAMILIES = ("hunyuan", "cohere", "cohere-centred", "nemotron", "qwen4")
PROMPT, COUNT = list(range(40, 60)), 12


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_drafts_on_its_target_and_its_file_drafts_the_same(name: str, tmp_path: Path) -> None:
    """T-50: recurrent states are put back, sliding layers cut, and nothing is drafted otherwise from the F32 file."""
    torch.set_num_threads(1)
    source = SOURCES[name](tmp_path / name)
    target, published, out = TorchTarget(source), read_published(source), tmp_path / "head.gguf"
    target.end_tokens = frozenset()
    original = reference(published.spec, checkpoint_weights(published))
    drafted = speculative_loop(target, TorchDrafter(original, target), PROMPT, COUNT, 3)
    assert drafted.tokens == greedy(target, PROMPT, COUNT).tokens
    convert(job(source, out))
    copy = reference(*gguf_weights(out))
    (last,) = captures_of(published.spec)
    states = target.write(PROMPT, 1, [last])[1][last]
    rows = [
        drafter.draft(drafter.read(None, states, PROMPT, target.tables), 7, 3, target.tables).logits
        for drafter in (original, copy)
    ]
    torch.testing.assert_close(rows[0], rows[1], atol=0, rtol=0)
