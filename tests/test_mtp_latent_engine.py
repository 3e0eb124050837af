"""MTP heads with latent attention in the real llama.cpp, beyond what every family is asked in test_mtp_engine.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_source import run_converter
from mtp_checkpoints import SOURCES, job
from test_mtp_engine import DRAFTING, PROMPTS, ask, same_drafts
from test_quantize_engine import assert_same_file, llama_quantize

from convert_drafter.converters import QuantizeJob, convert, quantize
from convert_drafter.converters.attach import prepare_attach
from convert_drafter.converters.convert import write_conversion
from convert_drafter.converters.gguf_read import read_gguf

pytestmark = pytest.mark.engine
FAMILIES = ("flash", "dsa", "deepseek", "bailing")
by_family = pytest.mark.parametrize("name", FAMILIES)
ASKED = PROMPTS[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latent")


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, Path]:
    return {name: SOURCES[name](folder / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def trunks(folder: Path, sources: dict[str, Path]) -> dict[str, Path]:
    """The targets without their heads, by llama.cpp's converter."""
    out = {name: folder / f"{name}-trunk.gguf" for name in FAMILIES}
    jobs = [[str(path), "--no-mtp", "--outtype", "f32", "--outfile", str(out[name])] for name, path in sources.items()]
    run_converter(jobs, folder / "converter.log")
    return out


@by_family
def test_texts_are_the_target_s_own_beside_a_head_and_with_it(
    name: str, sources: dict[str, Path], trunks: dict[str, Path], folder: Path
) -> None:
    """T-50. Attached, a head drafts what it drafts beside its target, and that is the reference's."""
    beside, inside = folder / f"{name}.gguf", folder / f"{name}-attached.gguf"
    convert(job(sources[name], beside))
    write_conversion(prepare_attach(job(sources[name], inside, attach=trunks[name])))
    for prompt in ASKED:  # a server each: after an answer position 0 reads its last state
        log, prompts = folder / f"{name}.log", [prompt]
        alone = ask(trunks[name], log, prompts=prompts)
        separate = ask(trunks[name], log, "-md", str(beside), *DRAFTING, prompts=prompts)
        attached = ask(inside, log, *DRAFTING, prompts=prompts)
        assert [text for text, _ in separate] == [text for text, _ in alone]
        assert attached == separate
        same, drafted = same_drafts(sources[name], beside, [prompt], separate)
        assert drafted > 150 and same >= 0.99 * drafted, (same, drafted)


@by_family
@pytest.mark.parametrize("recipe", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q2_K", "IQ4_XS", "MXFP4_MOE"])
def test_a_quantized_head_is_llama_quantize_s(name: str, recipe: str, sources: dict[str, Path], tmp_path: Path) -> None:
    """In one pass from the checkpoint and from the BF16 file; keys and values have three dimensions, like experts."""
    plain, ours, once = (tmp_path / f"{name}.gguf" for name in ("plain", "ours", "once"))
    convert(job(sources[name], plain, recipe="BF16"))
    theirs = llama_quantize(plain, tmp_path / "theirs.gguf", recipe)
    quantize(QuantizeJob(plain, ours, recipe))
    assert_same_file(read_gguf(ours), theirs)
    convert(job(sources[name], once, recipe=recipe))
    assert_same_file(read_gguf(once), theirs)
