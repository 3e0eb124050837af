"""Reading published checkpoints: what is right is read exactly, what is wrong is named before data is touched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tracemalloc
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from convert_drafter.converters.checkpoint import DTYPES, Checkpoint, open_checkpoint, read_rows, slabs
from convert_drafter.converters.errors import DrafterError, Problems, WrongInput

Entry = dict[str, Any]


def packed(header: object, data: bytes = b"") -> bytes:
    """A safetensors file of any header, right or wrong; bytes stand for themselves."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24), **more: object) -> Entry:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def folder_of(folder: Path, config: str = '{"a": 1}', **files: bytes) -> Path:
    """A folder with config.json and one NAME.safetensors for each keyword."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    for name, content in files.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return folder


def index_of(folder: Path, weight_map: object, name: str = "model") -> None:
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def values(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {n: read_rows(t, 0, t.rows).reshape(t.shape) for n, t in checkpoint.tensors.items()}


ONE = packed({"x": entry()}, bytes(24))
OTHER = packed({"y": entry()}, bytes(24))

ARRAYS: dict[str, np.ndarray] = {
    "ψ.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "half": np.linspace(-1, 1, 10).astype(np.float16).reshape(5, 2),
    "ids": np.array([3, -1, 2**40]),
    "flags": np.array([True, False, True]),
    "cube": np.arange(24, dtype=np.int32).reshape(2, 3, 4),
    "scalar": np.array(2.5, np.float64),
    "none": np.zeros((0, 7), np.uint8),
}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    """T-18: also from a folder with a space and letters outside ASCII in its name."""
    folder = folder_of(tmp_path / "a dräfter ✓")
    save_file(ARRAYS, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.tensors) == sorted(ARRAYS)
    assert (checkpoint.config, checkpoint.root) == ({"a": 1}, folder)
    with safe_open(folder / "model.safetensors", "np") as oracle:
        for name, found in values(checkpoint).items():
            np.testing.assert_array_equal(found, oracle.get_tensor(name), strict=True)


def test_header_digest_is_of_the_json_header(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, m=ONE)
    assert open_checkpoint(folder).header_sha256 == {"m.safetensors": hashlib.sha256(ONE[8:-24]).hexdigest()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_read_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    data = bytes([0, 1] * 24) if dtype == "BOOL" else bytes(range(48))
    count = len(data) // DTYPES[dtype].itemsize
    folder = folder_of(tmp_path, m=packed({"x": entry(dtype, [count], [0, len(data)])}, data))
    found = read_rows(open_checkpoint(folder).tensors["x"], 0, count)
    assert (found.dtype, found.shape, found.tobytes()) == (DTYPES[dtype], (count,), data)


def test_bf16_values(tmp_path: Path) -> None:
    """The numpy side of safetensors cannot read BF16, so the bits are written by hand: 1.0, -2.0, the largest."""
    bits = np.array([0x3F80, 0xC000, 0x7F7F], "<u2").tobytes()
    folder = folder_of(tmp_path, m=packed({"x": entry("BF16", [3], [0, 6])}, bits))
    found = read_rows(open_checkpoint(folder).tensors["x"], 0, 3)
    assert found.dtype == ml_dtypes.bfloat16
    assert found.astype(np.float32).tolist() == [1.0, -2.0, float.fromhex("0x1.fep127")]


def test_rows_are_slices_of_the_first_axis(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    save_file(ARRAYS, folder / "model.safetensors")
    tensors = open_checkpoint(folder).tensors
    for name in ("ψ.weight", "ids", "cube"):
        assert tensors[name].rows == len(ARRAYS[name])
        np.testing.assert_array_equal(read_rows(tensors[name], 1, 2), ARRAYS[name][1:2], strict=True)
        assert read_rows(tensors[name], 1, 1).shape == (0, *ARRAYS[name].shape[1:])
    assert tensors["scalar"].rows == 1
    assert read_rows(tensors["scalar"], 0, 1).tolist() == [2.5]
    for start, stop in [(-1, 1), (2, 1), (0, 5)]:
        with pytest.raises(IndexError, match="of 4"):
            read_rows(tensors["ψ.weight"], start, stop)


@pytest.mark.parametrize(("max_bytes", "sizes"), [(1, [1, 1, 1, 1]), (24, [2, 2]), (36, [3, 1]), (10**9, [4])])
def test_slabs_cover_a_tensor_within_the_limit(tmp_path: Path, max_bytes: int, sizes: list[int]) -> None:
    folder = folder_of(tmp_path)
    save_file(ARRAYS, folder / "model.safetensors")
    tensors = open_checkpoint(folder).tensors
    parts = list(slabs(tensors["ψ.weight"], max_bytes))
    assert [len(part) for part in parts] == sizes
    np.testing.assert_array_equal(np.concatenate(parts), ARRAYS["ψ.weight"])
    assert list(slabs(tensors["none"])) == []


def test_opening_and_reading_leave_the_source_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, m=ONE)
    (folder / "m.safetensors").chmod(0o444)
    read_rows(open_checkpoint(folder).tensors["x"], 0, 2)
    assert (folder / "m.safetensors").read_bytes() == ONE
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "m.safetensors"]


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    """T-70: truncated between header and data."""
    tensor = open_checkpoint(folder_of(tmp_path, m=ONE)).tensors["x"]
    os.truncate(tensor.file, tensor.end - 1)
    with pytest.raises(WrongInput, match=r"'x': found 23 bytes of rows 0\.\.2, expected 24; the file changed"):
        read_rows(tensor, 0, 2)
    tensor.file.unlink()
    with pytest.raises(WrongInput, match=r"m\.safetensors: cannot be read: No such file"):
        read_rows(tensor, 0, 2)


# Where weights lie


def one_file(tmp: Path) -> Path:
    return folder_of(tmp, model=packed({"x": entry(), "y": entry(offsets=[24, 48])}, bytes(range(48))))


def the_file_itself(tmp: Path) -> Path:
    return one_file(tmp) / "model.safetensors"


def two_shards(tmp: Path) -> Path:
    folder = folder_of(tmp)
    (folder / "dflash_draft_model-00001-of-00002.safetensors").write_bytes(packed({"y": entry()}, bytes(range(24, 48))))
    (folder / "dflash_draft_model-00002-of-00002.safetensors").write_bytes(packed({"x": entry()}, bytes(range(24))))
    return folder


def two_shards_and_index(tmp: Path) -> Path:
    folder = two_shards(tmp)
    places = {"x": "dflash_draft_model-00002-of-00002", "y": "dflash_draft_model-00001-of-00002"}
    index_of(folder, {name: f"{place}.safetensors" for name, place in places.items()}, "dflash_draft_model")
    (folder / "consolidated.safetensors").write_bytes(ONE)  # not in the index: another copy, left alone
    return folder


def sub_folder(tmp: Path) -> Path:
    (tmp / "empty").mkdir(parents=True)
    one_file(tmp / "weights").joinpath("config.json").rename(tmp / "config.json")
    return tmp


def sub_folder_with_config(tmp: Path) -> Path:
    one_file(tmp / "weights")
    return tmp


def linked_like_the_hub_cache(tmp: Path) -> Path:
    blobs = one_file(tmp / "blobs")
    (tmp / "snapshot").mkdir()
    for path in blobs.iterdir():
        (tmp / "snapshot" / path.name).symlink_to(path)
    return tmp / "snapshot"


LAYOUTS = [
    one_file, the_file_itself, two_shards, two_shards_and_index, sub_folder, sub_folder_with_config,
    linked_like_the_hub_cache,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_tensors_from_every_layout(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    """T-18: shards, index, sub-folder and links give what one file gives, in the same order."""
    source = layout(tmp_path / "s")
    checkpoint = open_checkpoint(source)
    assert checkpoint.config == {"a": 1}
    assert checkpoint.config_path == checkpoint.root / "config.json"
    assert {path.name for path in checkpoint.files} == set(checkpoint.header_sha256)
    assert [(name, found.tobytes()) for name, found in values(checkpoint).items()] == [
        ("x", bytes(range(24))),
        ("y", bytes(range(24, 48))),
    ]


def only_x(names: Collection[str]) -> Collection[str]:
    return {"x"} & set(names)


def test_only_shards_with_needed_tensors_are_opened(tmp_path: Path) -> None:
    """T-64: the others may be damaged or not be there at all."""
    folder = two_shards_and_index(tmp_path / "s")
    other, needed = sorted(folder.glob("dflash*.safetensors"))
    other.write_bytes(b"anything")
    for _ in range(2):
        checkpoint = open_checkpoint(folder, only_x)
        assert (list(checkpoint.tensors), checkpoint.others) == (["x"], ("y",))
        assert (checkpoint.files, checkpoint.unused) == ((needed,), (folder / "consolidated.safetensors",))
        other.unlink(missing_ok=True)
    with pytest.raises(Problems, match=f"shard '{re.escape(other.name)}': not found"):
        open_checkpoint(folder)


def test_tensors_that_are_not_needed_are_left_out_of_one_file_too(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(two_shards(tmp_path / "s"), only_x)
    assert (list(checkpoint.tensors), checkpoint.others) == (["x"], ("y",))


def missing_shard(tmp: Path) -> Path:
    folder = two_shards_and_index(tmp)
    (folder / "dflash_draft_model-00002-of-00002.safetensors").unlink()
    return folder


def missing_shard_without_index(tmp: Path) -> Path:
    folder = two_shards(tmp)
    (folder / "dflash_draft_model-00002-of-00002.safetensors").unlink()
    return folder


def one_shard_as_source(tmp: Path) -> Path:
    return two_shards_and_index(tmp) / "dflash_draft_model-00001-of-00002.safetensors"


def index_knows_more(tmp: Path) -> Path:
    folder = folder_of(tmp, a=ONE)
    index_of(folder, {"x": "a.safetensors", "gone": "a.safetensors"})
    return folder


def index_knows_less(tmp: Path) -> Path:
    folder = folder_of(tmp, a=ONE, b=OTHER)
    index_of(folder, {"x": "a.safetensors", "z": "b.safetensors"})
    return folder


def index_names_the_other_shard(tmp: Path) -> Path:
    folder = folder_of(tmp, a=packed({"x": entry(), "y": entry(offsets=[24, 48])}, bytes(48)), b=OTHER)
    index_of(folder, {"x": "a.safetensors", "y": "b.safetensors"})
    return folder


def index_leaves_the_folder(tmp: Path) -> Path:
    folder_of(tmp, a=ONE)
    folder = folder_of(tmp / "inner", a=ONE)
    index_of(folder, {"x": "../a.safetensors"})
    return folder


def index_of_what(weight_map: object) -> Callable[[Path], Path]:
    def build(tmp: Path) -> Path:
        index_of(folder_of(tmp, a=ONE), weight_map)
        return tmp

    return build


def two_indexes(tmp: Path) -> Path:
    folder = folder_of(tmp, a=ONE)
    index_of(folder, {"x": "a.safetensors"}, "one")
    index_of(folder, {"x": "a.safetensors"}, "two")
    return folder


def pickles_only(tmp: Path) -> Path:
    folder = folder_of(tmp)
    (folder / "pytorch_model.bin").write_bytes(b"")
    (folder / "draft.pt").write_bytes(b"")
    return folder


def two_sub_folders(tmp: Path) -> Path:
    folder_of(tmp / "eagle", a=ONE)
    folder_of(tmp / "mtp", a=ONE)
    return tmp


def no_config(tmp: Path) -> Path:
    (folder_of(tmp, a=ONE) / "config.json").unlink()
    return tmp


def no_config_anywhere(tmp: Path) -> Path:
    no_config(tmp / "weights")
    return tmp


def config_is(text: str) -> Callable[[Path], Path]:
    return lambda tmp: folder_of(tmp, config=text, a=ONE)


def dangling_link(tmp: Path) -> Path:
    (folder_of(tmp) / "m.safetensors").symlink_to(tmp / "gone")
    return tmp


WRONG_PLACES: list[tuple[str, Callable[[Path], Path], list[str]]] = [
    ("T-18 index names an absent shard", missing_shard, ["index.json", "00002-of-00002.safetensors'", "download"]),
    ("T-18 absent shard, no index", missing_shard_without_index, ["found 1 of 2 parts"]),
    ("T-18 one shard given", one_shard_as_source, ["found 1 of 2 parts", "give the folder"]),
    ("T-18 index knows more", index_knows_more, ["a.safetensors: tensor 'gone': in the index, absent here"]),
    ("T-18 index knows less", index_knows_less, ["tensor 'z'", "tensor 'y': found here", "the index lacks it"]),
    (
        "T-18 index names another shard",
        index_names_the_other_shard,
        ["'y': found here, expected only in b.safetensors"],
    ),
    ("T-25 index leaves the folder", index_leaves_the_folder, ["'../a.safetensors'", "not found beside the index"]),
    ("index maps to a number", index_of_what({"x": 5}), ["shard '5'"]),
    ("index maps to a list", index_of_what({"x": ["a.safetensors"]}), ["shard", "not found beside"]),
    ("index without a map", index_of_what(None), ["weight_map: found None"]),
    ("index with an empty map", index_of_what({}), ["weight_map: found {}"]),
    ("two indexes", two_indexes, ["one.safetensors.index.json, two.safetensors.index.json"]),
    ("pickles", pickles_only, ["looked for", "draft.pt", "pytorch_model.bin", "pickle files are never opened"]),
    ("nothing at all", lambda tmp: folder_of(tmp), ["looked for *.safetensors.index.json", "found none"]),
    ("two sub-folders", two_sub_folders, ["eagle, mtp"]),
    ("same tensor twice", lambda t: folder_of(t, a=ONE, b=ONE), ["b.safetensors: tensor 'x'", "only in a.safetensors"]),
    ("no such path", lambda tmp: tmp / "nowhere", ["nowhere", "there is nothing of this name"]),
    ("no such file", lambda tmp: tmp / "n.safetensors", ["n.safetensors"]),
    ("a pickle as source", lambda tmp: pickles_only(tmp) / "draft.pt", ["pickle files are never opened"]),
    ("no config", no_config, ["config.json: not found"]),
    ("no config in either folder", no_config_anywhere, ["weights/config.json or ", "config.json: not found"]),
    ("config is a list", config_is("[1]"), ["config.json: found [1], expected a JSON object"]),
    ("config is cut", config_is('{"a": '), ["config.json: not valid JSON"]),
    ("config says it twice", config_is('{"a": 1, "a": 2}'), ["duplicate key 'a'"]),
    ("dangling link", dangling_link, ["m.safetensors", "No such file"]),
    ("T-20 no tensors", lambda tmp: folder_of(tmp, a=packed({})), ["found no tensor in a.safetensors"]),
    ("T-20 only metadata", lambda tmp: folder_of(tmp, a=packed({"__metadata__": {}})), ["found no tensor"]),
]


@pytest.mark.parametrize(("build", "parts"), [row[1:] for row in WRONG_PLACES], ids=[row[0] for row in WRONG_PLACES])
def test_wrong_places_are_named(tmp_path: Path, build: Callable[[Path], Path], parts: list[str]) -> None:
    with pytest.raises(WrongInput) as caught:
        open_checkpoint(build(tmp_path / "s"))
    for part in parts:
        assert part in str(caught.value)


# What a header can get wrong

DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
TWO = {"x": entry(), "y": entry(offsets=[24, 48])}

WRONG_FILES: list[tuple[str, bytes, str]] = [
    ("T-70 empty file", b"", "truncated or foreign: the header promises 8 bytes, the file has 0"),
    ("T-70 shorter than a length", b"\1\0\0", "bytes, the file has 3"),
    (
        "T-25 header longer than the file",
        (10**12).to_bytes(8, "little") + b"{}",
        "the header promises 1000000000008 bytes, the file has 10",
    ),
    ("T-25 header of 2^64-1 bytes", b"\xff" * 8 + b"{}", f"the header promises {2**64 + 7} bytes, the file has 10"),
    ("git-lfs pointer", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ("not UTF-8", packed(b'{"\xff": 1}'), "header: not valid JSON"),
    ("not JSON", packed(b"{nope}"), "header: not valid JSON"),
    ("too deep", packed(DEEP), "header: not valid JSON"),
    ("huge number", packed(b'{"x": ' + b"9" * 5000 + b"}"), "header: not valid JSON"),
    ("half a surrogate pair", packed(rb'{"\ud800": {}}'), "header: not valid JSON"),
    ("a list", packed([1]), "header: found [1], expected a JSON object"),
    ("duplicate tensor", packed(b'{"x": {}, "x": {}}'), "duplicate key 'x'"),
    ("duplicate field", packed(b'{"x": {"dtype": "F32", "dtype": "F16"}}'), "duplicate key 'dtype'"),
    ("entry is a number", packed({"x": 5}), "tensor 'x': entry: found 5"),
    ("field missing", packed({"x": {"dtype": "F32"}}), "tensor 'x': entry: found {'dtype': 'F32'}"),
    ("field unknown", packed({"x": entry(strides=[1])}, bytes(24)), "'strides'"),
    ("dtype unknown", packed({"x": entry("F4")}, bytes(24)), "tensor 'x': dtype: found 'F4', expected one of BOOL"),
    ("dtype is a list", packed({"x": entry(["F32"])}, bytes(24)), "dtype: found ['F32']"),
    ("T-25 negative size", packed({"x": entry(shape=[-2, -3])}, bytes(24)), "shape: found [-2, -3]"),
    ("shape of bools", packed({"x": entry(shape=[True, 6])}, bytes(24)), "shape: found [True, 6]"),
    ("shape of floats", packed({"x": entry(shape=[2.0, 3])}, bytes(24)), "shape: found [2.0, 3]"),
    ("shape is a number", packed({"x": entry(shape=6)}, bytes(24)), "shape: found 6"),
    ("T-25 shape overflows", packed({"x": entry(shape=[2**32, 2**31])}, bytes(24)), "product below 2^63"),
    ("T-25 overflow behind a zero", packed({"x": entry(shape=[2**62, 0, 2**62])}), "product below 2^63"),
    ("too many axes", packed({"x": entry(shape=[1] * 9)}, bytes(24)), "at most 8 whole numbers"),
    ("T-25 negative offset", packed({"x": entry(offsets=[-24, 0])}, bytes(24)), "data_offsets: found [-24, 0]"),
    ("T-25 offsets swapped", packed({"x": entry(offsets=[24, 0])}, bytes(24)), "data_offsets: found [24, 0]"),
    ("one offset", packed({"x": entry(offsets=[24])}, bytes(24)), "data_offsets: found [24]"),
    ("offset is a bool", packed({"x": entry(offsets=[False, 24])}, bytes(24)), "data_offsets: found [False, 24]"),
    ("T-25 huge offset", packed({"x": entry(offsets=[10**30, 10**30 + 24])}), "data_offsets: found [1"),
    (
        "size mismatch",
        packed({"x": entry(offsets=[0, 20])}, bytes(20)),
        "expected 24 bytes between them for F32 [2, 3]",
    ),
    ("T-25 overlap", packed({**TWO, "z": entry(offsets=[20, 44])}, bytes(48)), "'z': overlaps the tensor before it"),
    ("T-25 the same range", packed({**TWO, "y": entry()}, bytes(24)), "tensor 'y': overlaps the tensor before it"),
    ("T-25 hole", packed({**TWO, "y": entry(offsets=[28, 52])}, bytes(52)), "tensor 'y': leaves a hole before it"),
    ("T-25 hole at the start", packed({"x": entry(offsets=[4, 28])}, bytes(28)), "tensor 'x': leaves a hole before it"),
    ("bytes left over", packed({"x": entry()}, bytes(30)), "found 6 bytes after the last tensor"),
    ("T-70 data cut", packed(TWO, bytes(47)), "tensor 'y' is cut"),
    (
        "T-25 end past the file",
        packed({"x": entry(shape=[2**40], offsets=[0, 2**42])}),
        "truncated: the header promises",
    ),
]


@pytest.mark.parametrize(("content", "part"), [row[1:] for row in WRONG_FILES], ids=[row[0] for row in WRONG_FILES])
def test_wrong_headers_are_named_without_allocating(tmp_path: Path, content: bytes, part: str) -> None:
    """T-25: whatever a header claims, what is allocated stays near the size of the file."""
    folder = folder_of(tmp_path, m=content)
    tracemalloc.start()
    try:
        with pytest.raises(Problems) as caught:
            open_checkpoint(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert part in str(caught.value)
    assert str(caught.value).startswith(f"{folder}: ")
    assert all(problem.startswith("m.safetensors: ") for problem in caught.value.problems)
    assert peak < 2**20 + 64 * len(content)


def test_header_limit(tmp_path: Path) -> None:
    """T-25: a sparse file is long enough for its header, the header is longer than any checkpoint's."""
    folder = folder_of(tmp_path, m=(100_000_001).to_bytes(8, "little"))
    os.truncate(folder / "m.safetensors", 200_000_000)
    with pytest.raises(Problems, match="header length: found 100000001, expected at most 100000000"):
        open_checkpoint(folder)


def test_truncation_says_how_much_is_missing(tmp_path: Path) -> None:
    """T-70."""
    folder = folder_of(tmp_path, m=ONE[:-5])
    with pytest.raises(Problems, match=f"the header promises {len(ONE)} bytes, the file has {len(ONE) - 5}"):
        open_checkpoint(folder)


def test_all_problems_of_all_files_at_once(tmp_path: Path) -> None:
    bad = packed({"x": entry("F4"), "y": entry(shape=[7])}, bytes(24))
    with pytest.raises(Problems) as caught:
        open_checkpoint(folder_of(tmp_path, a=bad, b=ONE[:-1], c=OTHER))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["a.safetensors"] * 2 + ["b.safetensors"]


VALID = packed({"x": entry(), "y": entry("BF16", [3, 2], [24, 36])}, bytes(range(36)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4), cut=st.integers(0, 200)
)
def test_damage_is_read_or_refused_never_a_crash(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    """T-25, T-70: flipped bytes and cut ends."""
    content = bytearray(VALID)
    for at, value in flips:
        content[at] = value
    folder = folder_of(tmp_path, m=bytes(content[: len(content) - (cut if cut < 100 else 0)]))
    try:
        values(open_checkpoint(folder))
    except DrafterError:
        return
