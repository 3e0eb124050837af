"""Folders of models as people have them, small, for `scan` to look at."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from published import PAIR, write_safetensors
from target_gguf import write_target

from convert_drafter.converters import ConvertJob, RedialectJob, convert, redialect
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf

T, F32 = GGUFValueType, GGMLQuantizationType.F32
REVISION = "0123456789abcdef0123456789abcdef01234567"


def small_gguf(path: Path, arch: str | None = "llama", names: Sequence[str] = ("blk.0.a",), **keys: Any) -> Path:
    """A GGUF with a small matrix of each name; `keys` have `__` for dots, `arch__` for the architecture's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = [] if arch is None else [KeyValue("general.architecture", T.STRING, arch)]
    for name, value in keys.items():
        key = name.replace("arch__", f"{arch}.", 1).replace("__", ".")
        entries.append(KeyValue(key, T.STRING if isinstance(value, str) else T.UINT32, value))
    tensors = [StoredTensor(name, (4, 32), F32) for name in names]
    if arch is None or not tensors:  # what this project's own writer refuses to write
        return _by_hand(path, entries, tensors)
    write_gguf(path, entries, tensors, lambda tensor: [np.ones(tensor.shape, np.float32)])
    return path


def _by_hand(path: Path, entries: Sequence[KeyValue], tensors: Sequence[StoredTensor]) -> Path:
    def text(value: str) -> bytes:
        return len(value).to_bytes(8, "little") + value.encode()

    head = b"GGUF" + (3).to_bytes(4, "little") + len(tensors).to_bytes(8, "little") + len(entries).to_bytes(8, "little")
    for entry in entries:
        raw = text(entry.value) if isinstance(entry.value, str) else int(entry.value).to_bytes(4, "little")  # type: ignore[arg-type]
        head += text(entry.key) + int(entry.type).to_bytes(4, "little") + raw
    for i, tensor in enumerate(tensors):
        dims = b"".join(size.to_bytes(8, "little") for size in reversed(tensor.shape))
        head += text(tensor.name) + len(tensor.shape).to_bytes(4, "little") + dims
        head += int(F32).to_bytes(4, "little") + (i * tensor.n_bytes).to_bytes(8, "little")
    data = np.ones(sum(tensor.n_elements for tensor in tensors), np.float32).tobytes()
    path.write_bytes(head + bytes(-len(head) % 32 if tensors else 0) + data)
    return path


def small_folder(folder: Path, config: Mapping[str, Any] | None, names: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", {name: np.ones((4, 32), np.float32) for name in names})
    return folder


def hub(root: Path, repository: str, source: Path, revision: str = REVISION) -> Path:
    """A repository as huggingface_hub caches it: blobs under their hash, a snapshot of links to them."""
    home = root / f"models--{repository.replace('/', '--')}"
    snapshot, blobs = home / "snapshots" / revision, home / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir(exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(revision)
    for path in sorted(source.iterdir()):
        if path.is_file():
            blob = blobs / f"{abs(hash(path.name)):064x}"
            shutil.copy(path, blob)
            (snapshot / path.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def drafter_gguf(path: Path, runtime: str = "llama.cpp", recipe: str = "BF16", target: Path = PAIR / "target") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    convert(ConvertJob(PAIR / "drafter", target, runtime, recipe, path))
    return path


def everything(root: Path) -> Path:
    """One folder with what people's folders have: a hub's cache, files of LM Studio, links, and broken things."""
    target = hub(root / "hub", "Qwen/Qwen3-Tiny", PAIR / "target")
    hub(root / "hub", "z-lab/Qwen3-Tiny-DFlash", PAIR / "drafter")
    studio = root / "lmstudio" / "someone" / "Qwen3-Tiny-GGUF"
    studio.mkdir(parents=True)
    write_target(PAIR / "target", studio / "Qwen3-Tiny-F32.gguf")
    drafter_gguf(studio / "dflash-Qwen3-Tiny-BF16.gguf", target=target)
    drafter_gguf(studio / "dflash-Qwen3-Tiny-Q8_0.gguf", recipe="Q8_0", target=target)
    ik = studio / "dflash-Qwen3-Tiny-ik-BF16.gguf"
    redialect(RedialectJob(studio / "dflash-Qwen3-Tiny-BF16.gguf", None, "ik_llama.cpp", ik))
    (studio / "Qwen3-Tiny-DFlash-Q4_K_M.gguf").write_bytes((studio / "dflash-Qwen3-Tiny-Q8_0.gguf").read_bytes()[:9000])
    whole = (studio / "Qwen3-Tiny-F32.gguf").read_bytes()
    (studio / "Qwen3-Tiny-Q8_0.gguf").write_bytes(whole[: len(whole) // 2])
    small_gguf(studio / "mmproj-F16.gguf", "clip", general__type="mmproj")
    small_gguf(root / "forks" / "Qwen3-Tiny-DSpark.gguf", "dspark", ("markov_w1.weight",))
    (root / "loop").symlink_to(root)
    (root / "nothing.gguf").symlink_to(root / "not here.gguf")
    (root / "big.gguf.part").write_bytes(b"GGUF")
    return root
