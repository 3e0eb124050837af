"""Memory stays bounded however large the model (R6, T-64): measured on a checkpoint of 3.5 GB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from make_drafter import write_drafter

pytestmark = pytest.mark.slow

BOUND = 400 << 20  # bytes above the interpreter with the package loaded
MEASURE = """
import sys
from pathlib import Path
from convert_drafter.converters import ConvertJob, convert

def peak():  # of this program; getrusage would count what pytest held when it started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

before = peak()
if len(sys.argv) > 1:
    convert(ConvertJob(Path(sys.argv[1]), None, "lucebox", sys.argv[2], Path(sys.argv[3]), threads=2))
print((peak() - before) * 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 checkpoint as large as a 27B target's drafter, of random weights, written a piece at a time."""
    folder = tmp_path_factory.mktemp("large") / "drafter"
    assert 2 * write_drafter(folder, layers=5) > 3_400_000_000
    return folder


@pytest.mark.parametrize("recipe", ["BF16", "Q8_0", "Q4_K_M"])
def test_peak_memory_does_not_follow_the_model(large: Path, tmp_path: Path, recipe: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(large), recipe, str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "out.gguf").unlink()
    assert int(done.stdout) < BOUND
