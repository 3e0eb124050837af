"""Memory stays bounded however large the model (R6, T-64): measured on a checkpoint of 3.5 GB."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from published import changed, dflash_shapes, small_config

pytestmark = pytest.mark.slow

BOUND = 400 << 20  # bytes above the interpreter with the package loaded
SIZES = {
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 5,
    "num_target_layers": 64,
    "dflash_config.target_layer_ids": [1, 16, 31, 46, 61],
}
MEASURE = """
import resource, sys
from pathlib import Path
from convert_drafter.converters import ConvertJob, convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if len(sys.argv) > 1:
    convert(ConvertJob(Path(sys.argv[1]), None, "lucebox", sys.argv[2], Path(sys.argv[3])))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint as large as a 27B target's drafter, of random weights, written a piece at a time."""
    folder = tmp_path_factory.mktemp("large")
    config = changed(small_config(), SIZES)
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in dflash_shapes(config).items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    weights = np.random.default_rng(0).standard_normal(8 << 20, dtype=np.float32).view(np.uint16)[1::2]
    with (folder / "model.safetensors").open("wb") as file:
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        piece, written = weights.tobytes(), 0
        while written < offset:
            written += file.write(piece[: offset - written])
    assert offset > 3_400_000_000
    return folder


@pytest.mark.parametrize("recipe", ["BF16", "Q8_0"])
def test_peak_memory_does_not_follow_the_model(large: Path, tmp_path: Path, recipe: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(large), recipe, str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "out.gguf").unlink()
    assert int(done.stdout) < BOUND
