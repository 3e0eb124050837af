"""DeepSeek-V4's head in the real llama.cpp: its converter's files, the reference's drafts, the target's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import make_mtp_deepseek4 as maker
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from llama_source import run_converter
from mtp_checkpoints import job
from test_mtp_engine import DRAFTING, PROMPTS, RECIPES, ask, same_drafts, unlisted
from test_quantize_engine import assert_same_file, llama_quantize

from convert_drafter.converters import QuantizeJob, convert, doctor, quantize
from convert_drafter.converters.gguf_file import StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.type_choice import TypeOptions
from convert_drafter.converters.verdict import Outcome
from convert_drafter.quant import STORED, dequantize

pytestmark = pytest.mark.engine
pytest.importorskip("torch")
pytest.importorskip("transformers.models.deepseek_v4")

T = GGMLQuantizationType
LAYER = "blk.3."
EXPERTS = tuple(f"{LAYER}ffn_{part}_exps.weight" for part in ("gate", "down", "up"))
ROUTER = f"{LAYER}ffn_gate_inp.weight"
STORAGES = {"deepseek4": maker.halved, "deepseek4-published": maker.published}
by_storage = pytest.mark.parametrize("name", STORAGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepseek4")


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, Path]:
    return {name: make(folder / name) for name, make in STORAGES.items()}


@pytest.fixture(scope="module")
def theirs(folder: Path, sources: dict[str, Path]) -> Path:
    """llama.cpp's files of the target and of the heads, in this order: a flag, once given, stays set."""
    jobs = [[str(sources["deepseek4"]), "--outtype", "f32", "--outfile", str(folder / "stored.gguf")]] + [
        [str(path), "--mtp", "--outtype", recipe.lower(), "--outfile", str(folder / f"{name}-{recipe}.gguf")]
        for name, path in sources.items()
        for recipe in RECIPES
    ]
    run_converter(jobs, folder / "converter.log")
    return folder


@pytest.fixture(scope="module")
def trunk(theirs: Path) -> Path:
    """llama.cpp's file of the target, the same numbers in F32: it computes MXFP4 with activations of 8 bits."""
    file, out = read_gguf(theirs / "stored.gguf"), theirs / "trunk.gguf"
    assert "blk.2.attn_norm.weight" in file.tensors and "blk.3.attn_norm.weight" not in file.tensors
    kinds = [StoredTensor(t.name, t.shape, t.type if t.type is T.I32 else T.F32) for t in file.tensors.values()]

    def data(tensor: StoredTensor) -> Iterable[np.ndarray]:
        return file.slabs(tensor.name) if tensor.type is T.I32 else [numbers(file, tensor.name)]

    write_gguf(out, list(file.keys.values()), kinds, data)
    return out


def numbers(file: GGUFFile, name: str) -> np.ndarray:
    stored = file.tensors[name]
    return np.ascontiguousarray(dequantize(file.tensor_bytes(name), STORED[stored.type.name], stored.shape))


@pytest.mark.parametrize("recipe", RECIPES)
@by_storage
def test_a_head_s_file_is_llama_cpp_s_or_the_difference_is_listed(
    name: str, recipe: str, sources: dict[str, Path], theirs: Path, tmp_path: Path
) -> None:
    """Key by key, tensor by tensor, byte by byte; each difference has its reason in the golden list."""
    out = tmp_path / "ours.gguf"
    convert(job(sources[name], out, recipe=recipe))
    assert not unlisted(name, "alone", out, theirs / f"{name}-{recipe}.gguf", recipe)


@by_storage
def test_in_llama_cpp_s_types_bytes_are_its_bytes(
    name: str, sources: dict[str, Path], theirs: Path, tmp_path: Path
) -> None:
    """Of every tensor; of experts every number, as the scale of a block may be another power of two."""
    there, out = read_gguf(theirs / f"{name}-F32.gguf"), tmp_path / "ours.gguf"
    kinds = {n: t.type.name for n, t in there.tensors.items() if len(t.shape) > 1 and n != ROUTER}
    options = TypeOptions(tensor_types=tuple((f"^{n}$", kind) for n, kind in kinds.items()))
    convert(job(sources[name], out, recipe="Q8_0", options=options))
    ours = read_gguf(out)
    for n, stored in there.tensors.items():
        if n == ROUTER or n in EXPERTS:
            np.testing.assert_array_equal(numbers(ours, n), numbers(there, n))
        else:
            assert ours.tensors[n].type is stored.type
            np.testing.assert_array_equal(ours.tensor_bytes(n), there.tensor_bytes(n), err_msg=n)


@by_storage
def test_doctor_finds_llama_cpp_s_file_right(name: str, sources: dict[str, Path], theirs: Path) -> None:
    (structure, pairing) = doctor(theirs / f"{name}-F16.gguf", sources[name], sources[name])
    assert (structure.outcome, pairing.outcome) == (Outcome.PASS, Outcome.PASS), structure.details


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[9]], ids=["64 tokens", "400 tokens"])
def test_drafts_are_the_reference_s_and_the_text_is_the_target_s_own(
    prompt: list[int], sources: dict[str, Path], trunk: Path, folder: Path
) -> None:
    """T-50. At F32, a server each: the window is 64, and the second prompt has more than one block of 128."""
    head, log = folder / "head.gguf", folder / "server.log"
    convert(job(sources["deepseek4-published"], head))
    ((alone, _),) = ask(trunk, log, prompts=[prompt])
    answers = ask(trunk, log, "-md", str(head), *DRAFTING, prompts=[prompt])
    assert answers[0][0] == alone
    same, drafted = same_drafts(maker.plain(folder / "plain"), head, [prompt], answers)
    assert drafted > 300 and same >= 0.99 * drafted, (same, drafted)


@pytest.mark.parametrize("recipe", ["Q8_0", "Q6_K", "Q4_K_M", "IQ4_XS", "MXFP4_MOE"])
def test_a_quantized_head_is_llama_quantize_s(recipe: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """In one pass from the checkpoint and from the BF16 file."""
    plain, ours, once = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "once"))
    source = sources["deepseek4-published"]
    convert(job(source, plain, recipe="F32"))
    theirs = llama_quantize(plain, tmp_path / "theirs.gguf", recipe)
    quantize(QuantizeJob(plain, ours, recipe))
    assert_same_file(read_gguf(ours), theirs)
    convert(job(source, once, recipe=recipe))
    assert_same_file(read_gguf(once), theirs)
