"""Every recipe against the real llama-quantize: the types of whole files, of all architectures it treats apart.

`RECORD=1 python -m pytest -m engine tests/test_recipes_engine.py -k recorded` writes fixtures/recipes anew.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from engine import llama_binary
from gguf import GGMLQuantizationType, GGUFValueType
from published import PAIR
from recipe_models import RECORDED, Model, condensed, dflash, models, recorded

from convert_drafter.converters import ConvertJob, convert, prepare
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.type_choice import TypeOptions, choose_types, facts_of_file

pytestmark = pytest.mark.engine

MODELS = models()
NAMES = [name for name, recipe in RECIPES.items() if not recipe.kept]
LINE = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^\]]*\], type = +(\w+), size = [^(\n]*(?:\((\w+)\))?$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def quantize(*arguments: object) -> str:
    command = [str(llama_binary("llama-quantize")), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def tool_types(path: Path, recipe: str, *options: object) -> dict[str, str]:
    """What llama-quantize would store every tensor as; it says so without doing it."""
    said = quantize(*options, "--dry-run", path, recipe)
    return {found[1]: (found[3] or found[2]).upper() for found in LINE.finditer(said)}


@cache
def decided(folder: Path, name: str) -> dict[str, dict[str, str]]:
    """What llama-quantize decides about a model: recipe -> tensor -> type."""
    path = model_file(folder, name)
    return {recipe: tool_types(path, recipe) for recipe in NAMES}


def model_file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.gguf"
    return path if path.exists() else MODELS[name].write(path)


def our_types(path: Path, model: Model, recipe: str, options: TypeOptions | None = None) -> dict[str, str]:
    tensors = model.candidates()
    choices = choose_types(RECIPES[recipe], tensors, facts_of_file(read_gguf(path)), options)
    return {tensor.name: choice.type.name for tensor, choice in zip(tensors, choices, strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_every_recipe_decides_as_llama_quantize(name: str, folder: Path) -> None:
    path = model_file(folder, name)
    for recipe, types in decided(folder, name).items():
        assert our_types(path, MODELS[name], recipe) == types, recipe


@pytest.mark.parametrize("count", range(1, 13))
def test_every_depth(count: int, folder: Path) -> None:
    model = dflash(count)
    path = model.write(folder / "model.gguf")
    for recipe in ("Q5_K_M", "Q4_K_M", "Q4_K_S", "Q3_K_M", "IQ4_XS"):
        assert our_types(path, model, recipe) == tool_types(path, recipe), recipe


def test_what_is_recorded_is_what_it_decides(folder: Path) -> None:
    """The golden file of `test_recipes.py`."""
    found = {
        name: {recipe: condensed(types, RECIPES[recipe].weights) for recipe, types in decided(folder, name).items()}
        for name in MODELS
    }
    if os.environ.get("RECORD"):
        RECORDED.parent.mkdir(exist_ok=True)
        lines = json.dumps(found, indent=1).replace("\n   ", " ").replace("\n  }", " }")
        RECORDED.write_text(f"{lines}\n")
    assert recorded() == found


# --- options ---

PATTERNS = (
    "attn_v", r"blk\.[0-3]\.", "FFN_down", "fc", "weight$", "embd", "output", "selector|markov", "exps",
    r"attn_(q|k)\.", "^blk.*up", "per_layer",
)  # fmt: skip
ANY_TYPE = ("q8_0", "Q6_K", "f16", "bf16", "f32", "q5_K", "iq4_xs", "q4_0", "mxfp4", "iq4_nl", "q2_k", "q3_k")


@cache
def importance(folder: Path) -> Path:
    """An importance matrix about a tensor that nobody has: it is there, and that is what counts."""
    f32 = GGMLQuantizationType.F32
    stored = [StoredTensor("none.in_sum2", (1, 32), f32), StoredTensor("none.counts", (1, 1), f32)]
    keys = [
        KeyValue("general.architecture", GGUFValueType.STRING, "none"),
        KeyValue("general.type", GGUFValueType.STRING, "imatrix"),
        KeyValue("imatrix.datasets", GGUFValueType.ARRAY, ("none",), GGUFValueType.STRING),
        KeyValue("imatrix.chunk_count", GGUFValueType.UINT32, 1),
        KeyValue("imatrix.chunk_size", GGUFValueType.UINT32, 1),
    ]
    write_gguf(folder / "imatrix.gguf", keys, stored, lambda tensor: [np.ones(tensor.shape, np.float32)])
    return folder / "imatrix.gguf"


def mutilated(model: Model, draw: random.Random) -> Model:
    """Other rows, fewer tensors: what no loader takes, but a type is decided for."""
    rows = draw.choice(([256, 512], [256, 288, 100], [32, 33], [2880, 256], [1, 256, 32]))
    shapes = {name: (*s[:-1], draw.choice(rows)) if len(s) > 1 else s for name, s in model.tensors.items()}
    kept = {name: shape for name, shape in shapes.items() if name == "token_embd.weight" or draw.random() < 0.9}
    return replace(model, tensors=kept)


@pytest.mark.parametrize("seed", range(8))
def test_options_and_odd_files(seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and options by chance. An option that decides nothing is an error here and none there."""
    monkeypatch.setattr("convert_drafter.converters.type_choice._Walk.check_options_decided", lambda walk: None)
    draw = random.Random(seed)
    for _ in range(40):
        model = mutilated(MODELS[draw.choice(list(MODELS))], draw)
        path = model.write(folder / "model.gguf")
        own = tuple((draw.choice(PATTERNS), draw.choice(ANY_TYPE)) for _ in range(draw.choice((0, 0, 1, 2))))
        # 16 bits take every row; with another type's rows the tool stops in the middle of its work
        output, embedding = (draw.choice((None, None, None, "f16", "bf16")) for _ in range(2))
        options = TypeOptions(draw.random() < 0.2, own, output, embedding, importance=draw.random() < 0.3)
        words: list[object] = ["--pure"] * options.pure
        words += [word for regex, kind in own for word in ("--tensor-type", f"{regex}={kind}")]
        words += ["--output-tensor-type", output] if output else []
        words += ["--token-embedding-type", embedding] if embedding else []
        words += ["--imatrix", importance(folder)] if options.importance else []
        recipe = draw.choice(NAMES)
        assert our_types(path, model, recipe, options) == tool_types(path, recipe, *words), (model, recipe, words)


# --- whole files ---


@pytest.mark.parametrize("recipe", NAMES)
def test_written_files_have_the_same_types_and_number(recipe: str, folder: Path) -> None:
    model = dflash(5)
    path, out = model.write(folder / "model.gguf"), folder / f"{recipe}.gguf"
    quantize(path, out, recipe)
    file = read_gguf(out)
    assert {name: tensor.type.name for name, tensor in file.tensors.items()} == our_types(path, model, recipe)
    assert file.keys["general.file_type"].value == RECIPES[recipe].file_type


def test_convert_chooses_what_llama_quantize_chooses_for_its_file(folder: Path) -> None:
    def job(recipe: str, out: Path) -> ConvertJob:
        return ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", recipe, out)

    path = convert(job("F32", folder / "pair.gguf")).out
    for recipe in NAMES:
        planned = prepare(job(recipe, folder / "out.gguf")).plan.tensors
        assert {t.name: t.choice.type.name for t in planned} == tool_types(path, recipe), recipe
