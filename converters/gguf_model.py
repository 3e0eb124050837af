"""A model that lies in one GGUF or was split into several: its keys in the first, its tensors in all of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_read import GGUFFile, read_part
from convert_drafter.converters.holes import has_holes

# One file of several (llama_split_path in llama.cpp's include/llama.h)
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)


def read_model(path: Path) -> GGUFFile:
    """A model by its first file, with the tensors of all parts that it was split into; not their data.

    Of a repository's model only the first part's header is fetched, which has all keys. Raises `WrongInput` for a part
    that is missing, and for one that is not the first.
    """
    first = read_part(path)
    if first.parts == 1 or has_holes(path):
        return first
    match, where = PART.fullmatch(path.name), f"one of {first.parts} parts"
    if match is None or (int(match["number"]), int(match["count"])) != (1, first.parts):
        expected = f"the first of them under its own name, ...-00001-of-{first.parts:05}.gguf"
        raise WrongInput(f"{path}: found {where}, expected {expected}; the others have to lie beside it")
    tensors = dict(first.tensors)
    for part in parts_of(path)[1:]:
        if not part.exists():
            raise WrongInput(f"{part}: missing, {path.name} is {where}; download it beside the others")
        tensors |= read_part(part).tensors
    return replace(first, tensors=tensors)


def parts_of(path: Path) -> tuple[Path, ...]:
    """Every file of a model by the name of one, whether it is there or not; the one alone where it was not split."""
    match = PART.fullmatch(path.name)
    if match is None:
        return (path,)
    numbers = range(1, int(match["count"]) + 1)
    return tuple(path.with_name(f"{match['stem']}-{i:05}-of-{match['count']}.gguf") for i in numbers)
