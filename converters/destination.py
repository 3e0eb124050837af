"""Where a file may be written: under no name that is one of its sources; and how a text is written whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from convert_drafter.converters.checkpoint import Checkpoint
from convert_drafter.converters.errors import WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import file_access, partial_name

OURS = (".gguf", ".partial")


def sources_of(checkpoint: Checkpoint, target: Path | None) -> tuple[Path, ...]:
    """Every file a conversion may read: weights, config, index, tokenizer, target. Old GGUFs may be replaced."""
    folders = {checkpoint.root, *(file.parent for file in checkpoint.files)}
    if target is not None and target.is_dir():
        folders.add(target)
    beside = (path for folder in folders for path in folder.iterdir() if path.suffix not in OURS and path.is_file())
    return (*checkpoint.files, *([target] if target is not None and not target.is_dir() else []), *beside)


def refuse_overwriting(out: Path, sources: Iterable[Path]) -> None:
    """A destination that is one of the sources, under whatever name or link, is refused (T-24)."""
    if out.is_dir():
        raise WrongUsage(f"{out}: is a folder, expected a file name ending in .gguf")
    if out.exists() and not out.is_file():
        raise WrongUsage(f"{out}: is a device or a pipe, expected a file name ending in .gguf")
    if not out.parent.is_dir():
        raise WrongInput(f"{out}: there is no folder {out.parent}; make it first")
    taken = [path for path in (out, partial_name(out)) if path.exists()]
    for source in filter(Path.exists, sources) if taken else ():  # a repository on the hub is nowhere here
        inside = source.is_dir() and any(path.resolve().is_relative_to(source.resolve()) for path in taken)
        if inside or any(path.samefile(source) for path in taken):
            raise WrongUsage(f"{out}: is the same file as the source {source}; choose another output")
    if out.is_symlink():  # renaming onto it would replace the link and leave what it points to as it was
        raise WrongUsage(f"{out}: is a link to {out.readlink()}, expected the name of the file itself")


def write_whole(content: str, path: Path) -> None:
    """Write UTF-8 under `path`, completely or not at all. Raises `WrongInput` for a place it cannot have."""
    partial = partial_name(path)
    with file_access(path, "written"):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder; give a file name")
        partial.unlink(missing_ok=True)  # what a killed run left behind; never through a link
        try:
            with partial.open("x", encoding="utf-8", newline="\n") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
