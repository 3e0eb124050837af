"""Whole files against the real llama-quantize: same types, same bytes of every tensor, same keys."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from engine import llama_binary
from published import PAIR
from target_gguf import write_target
from test_importance import dat_bytes, entry, gguf_bytes

from convert_drafter.converters import ConvertJob, QuantizeJob, convert, quantize
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.type_choice import TypeOptions

pytestmark = pytest.mark.engine

WEIGHTED = ["Q4_K_M", "Q5_K_S", "Q2_K", "Q3_K_M", "Q6_K", "IQ4_NL", "Q4_0", "Q5_0", "Q4_1", "Q5_1"]
OF_LLAMA_QUANTIZE = [name for name, recipe in RECIPES.items() if not recipe.kept]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's drafter in BF16."""
    out = tmp_path_factory.mktemp("drafter") / "bf16.gguf"
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", "BF16", out))
    return out


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model of another architecture, in F32, with its embedding as output head."""
    return write_target(PAIR / "target", tmp_path_factory.mktemp("target") / "target.gguf")


def llama_quantize(source: Path, out: Path, recipe: str, *options: object) -> GGUFFile:
    command = [llama_binary("llama-quantize"), *options, source, out, recipe]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_gguf(out)


def assert_same_file(ours: GGUFFile, theirs: GGUFFile, ignored: frozenset[str] = frozenset()) -> None:
    assert {k: v.value for k, v in ours.keys.items() if k not in ignored} == {
        k: v.value for k, v in theirs.keys.items() if k not in ignored
    }
    assert_same_tensors(ours, theirs)


def assert_same_tensors(ours: GGUFFile, theirs: GGUFFile) -> None:
    assert {name: t.type.name for name, t in ours.tensors.items()} == {
        n: t.type.name for n, t in theirs.tensors.items()
    }
    for name in theirs.tensors:
        assert np.array_equal(ours.tensor_bytes(name), theirs.tensor_bytes(name)), name


@pytest.mark.parametrize("recipe", OF_LLAMA_QUANTIZE)
def test_a_drafter_in_every_recipe(drafter: Path, tmp_path: Path, recipe: str) -> None:
    """In one pass from the checkpoint, and from the BF16 file."""
    theirs = llama_quantize(drafter, tmp_path / "theirs.gguf", recipe)
    quantize(QuantizeJob(drafter, tmp_path / "ours.gguf", recipe))
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), theirs)
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", recipe, tmp_path / "pass.gguf"))
    assert_same_file(read_gguf(tmp_path / "pass.gguf"), theirs)


@pytest.mark.parametrize("recipe", OF_LLAMA_QUANTIZE)
def test_a_target_in_every_recipe(target: Path, tmp_path: Path, recipe: str) -> None:
    theirs = llama_quantize(target, tmp_path / "theirs.gguf", recipe)
    quantize(QuantizeJob(target, tmp_path / "ours.gguf", recipe))
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), theirs)


@pytest.mark.parametrize("recipe", ["Q4_K_M", "IQ4_XS", "Q5_0"])
def test_a_file_that_is_quantized_already(target: Path, tmp_path: Path, recipe: str) -> None:
    """Also from types we only read: IQ3_S is one."""
    for first in ("Q8_0", "Q6_K", "IQ3_S"):
        llama_quantize(target, tmp_path / "first.gguf", first)
        theirs = llama_quantize(tmp_path / "first.gguf", tmp_path / "theirs.gguf", recipe, "--allow-requantize")
        quantize(QuantizeJob(tmp_path / "first.gguf", tmp_path / "ours.gguf", recipe, allow_requantize=True))
        assert_same_file(read_gguf(tmp_path / "ours.gguf"), theirs)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (("--pure",), TypeOptions(pure=True)),
        (("--tensor-type", "attn_v=q5_1"), TypeOptions(tensor_types=(("attn_v", "Q5_1"),))),
        (("--tensor-type", r"blk\.1\.ffn=q3_k"), TypeOptions(tensor_types=((r"blk\.1\.ffn", "Q3_K"),))),
        (("--token-embedding-type", "q8_0"), TypeOptions(embedding_type="Q8_0")),
    ],
    ids=str,
)
def test_the_options_of_llama_quantize(
    target: Path, tmp_path: Path, given: tuple[str, ...], options: TypeOptions
) -> None:
    theirs = llama_quantize(target, tmp_path / "theirs.gguf", "Q4_K_M", *given)
    quantize(QuantizeJob(target, tmp_path / "ours.gguf", "Q4_K_M", options=options))
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), theirs)


def importance_for(file: GGUFFile, skip: str) -> dict[str, tuple[list[int], np.ndarray]]:
    """Entries for every matrix but those of `skip`."""
    rng = np.random.default_rng(5)
    found = {}
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 2 and skip not in name:
            found |= entry(rng.random(tensor.shape[-1]).astype(np.float32) * 9, [17.0], name)
    return found


@pytest.mark.parametrize("form", ["gguf", "dat"])
@pytest.mark.parametrize(
    "recipe", ["Q4_K_M", "Q5_K_S", "Q2_K", "Q3_K_M", "Q6_K", "IQ4_NL", "Q4_0", "Q5_0", "Q4_1", "Q5_1"]
)
def test_with_an_importance_matrix(drafter: Path, tmp_path: Path, recipe: str, form: str) -> None:
    file = read_gguf(drafter)
    entries = importance_for(file, skip="ffn_up")
    path = tmp_path / f"importance.{form}"
    if form == "gguf":
        path.write_bytes(gguf_bytes(entries))
    else:
        sums = [(name.removesuffix(".in_sum2"), 17, values) for name, (_, values) in entries.items() if "sum2" in name]
        path.write_bytes(dat_bytes(sums))
    theirs = llama_quantize(drafter, tmp_path / "theirs.gguf", recipe, "--imatrix", path)
    decided = quantize(QuantizeJob(drafter, tmp_path / "ours.gguf", recipe, importance=path)).quantization
    assert "no entry for" in decided.warnings[0]
    ignored = frozenset({"quantize.imatrix.file"})  # a path there, a name here: a file names no folder of its maker
    assert_same_file(read_gguf(tmp_path / "ours.gguf"), theirs, ignored)
    one_pass = ConvertJob(
        PAIR / "drafter", PAIR / "target", "llama.cpp", recipe, tmp_path / "pass.gguf", importance=path
    )
    convert(one_pass)
    assert_same_tensors(read_gguf(tmp_path / "pass.gguf"), theirs)
