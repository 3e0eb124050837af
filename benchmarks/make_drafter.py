"""A DFlash drafter as large as a 27B target's, with random BF16 weights, and a target folder that fits it.

    python benchmarks/make_drafter.py FOLDER [--layers 1]

Writes FOLDER/drafter and FOLDER/target. One layer is 451 M weights (0.9 GB), five are 1.73 G (3.5 GB).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from published import PAIR, dflash_shapes, small_config  # noqa: E402

PIECE = 8 << 20  # weights written at a time
VOCABULARY = 2048  # the tokenizer of the fixture's target
TARGET_LAYERS = 64


def drafter_config(layers: int) -> dict[str, object]:
    return small_config(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "head_dim": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": layers,
            "num_target_layers": TARGET_LAYERS,
            "dflash_config.mask_token_id": VOCABULARY - 1,
            "dflash_config.target_layer_ids": [1, 16, 31, 46, 61],
        }
    )


def write_drafter(folder: Path, layers: int) -> int:
    """Write the checkpoint a piece at a time, in the memory of one piece; returns the number of weights."""
    folder.mkdir(parents=True)
    config = drafter_config(layers)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in dflash_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    weights = np.random.default_rng(0).standard_normal(PIECE, dtype=np.float32) * np.float32(0.02)
    piece = weights.view(np.uint16)[1::2].tobytes()  # the upper halves: BF16
    with (folder / "model.safetensors").open("wb") as file:
        text = json.dumps(header).encode()
        file.write(len(text).to_bytes(8, "little") + text)
        written = 0
        while written < end:
            written += file.write(piece[: end - written])
    return end // 2


def write_target(folder: Path) -> None:
    """Config and tokenizer of a target that fits: nothing more is read of it."""
    folder.mkdir(parents=True)
    facts = json.loads((PAIR / "target" / "config.json").read_text())
    layers = {"num_hidden_layers": TARGET_LAYERS, "layer_types": ["full_attention"] * TARGET_LAYERS}
    (folder / "config.json").write_text(json.dumps({**facts, **layers, "hidden_size": 5120}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((PAIR / "target" / file).read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=1)
    options = parser.parse_args()
    weights = write_drafter(options.folder / "drafter", options.layers)
    write_target(options.folder / "target")
    print(f"{options.folder}: {weights / 1e6:,.0f} M weights")


if __name__ == "__main__":
    main()
