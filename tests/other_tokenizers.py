"""Copies of the tiny target's tokenizer with something changed in them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from published import PAIR

Change = Callable[[dict[str, Any]], object]


def write_tokenizer(folder: Path, change: Change = lambda raw: None) -> Path:
    """The target's tokenizer into a folder that is there."""
    raw = json.loads((PAIR / "target" / "tokenizer.json").read_text())
    change(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copy(PAIR / "target" / "tokenizer_config.json", folder)
    return folder


def swapped(raw: dict[str, Any]) -> None:
    """Two ordinary tokens change places: the same words, the same number of them."""
    vocab = raw["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
