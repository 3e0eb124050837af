"""Our files for llama.cpp against those of llama.cpp's own converter: every key, every tensor, every byte.

Where the two differ on purpose, the difference stands in `fixtures/dialects/llama.cpp-differences.json` with its
reason. A difference that is not listed fails, and so does a listed one that is gone. The order of keys and tensors
is not compared: no reader depends on it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from llama_source import run_converter
from make_checkpoints import CHECKPOINTS, make
from published import (
    DELETE,
    FIXTURES,
    PAIR,
    changed,
    dflash_shapes,
    random_tensors,
    small_config,
    write_checkpoint,
    write_safetensors,
)

from convert_drafter.converters import ConvertJob, convert, inspect
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf

GOLDEN = FIXTURES / "dialects" / "llama.cpp-differences.json"
RECIPES = ("F32", "F16", "BF16", "Q8_0")
LARGEST_EXPONENT = 10
ANY, ALL = "any", "all"
LONGEST = 100  # characters of a value that are shown as they are
Facts = dict[str, str]
Differences = dict[str, tuple[str | None, str | None]]  # name -> (ours, llama.cpp's), None: not there


@dataclass(frozen=True)
class Case:
    """A small drafter for the pair's target: changes to both configs by dotted path, and what its checkpoint holds."""

    config: Mapping[str, Any] = field(default_factory=dict)
    target: Mapping[str, Any] = field(default_factory=dict)
    more_tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: Any = ml_dtypes.bfloat16
    spread: float = 0.0  # standard deviation of the weights' binary exponents
    prefix: str = ""
    shards: int = 1
    checkpoint: str = ""  # one of fixtures/make_checkpoints.py, as it is


BASE = {
    "dflash_config.mask_token_id": 2047,
    "hidden_size": 256,
    "intermediate_size": 128,
    "model_type": "qwen3",  # as published: llama.cpp then reads the config through transformers
    "vocab_size": 2048,
}
HEADS, VOCAB, HIDDEN = 4, 2048, 256
THETA = 1000000
YARN = {"rope_theta": THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
YARN_ALL = {**YARN, "attention_factor": 1.25, "extrapolation_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
LINEAR = {"type": "linear", "factor": 2.0}
MROPE = {"rope_theta": THETA, "rope_type": "default", "mrope_section": [11, 11, 10]}
MROPE_TARGET = {"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": {"rope_parameters": MROPE}}
SCALES = {"input_embedding_scale": 16.0, "output_multiplier": 0.25, "final_logit_softcapping": 30.0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 48}
EMBEDDINGS = {"embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}

UNREAD = ("dflash of speculators",)  # llama.cpp's converter knows that layout of DSpark alone
CASES: dict[str, Case] = {
    "no window": Case(),
    "no model_type": Case({"model_type": DELETE}),
    "no head_dim": Case({"head_dim": DELETE}),
    "no head_dim, no model_type": Case({"head_dim": DELETE, "model_type": DELETE}),
    "a layer slides": Case({**SLIDING, "use_sliding_window": True}),
    "layer_types alone": Case({**SLIDING, "model_type": DELETE}),
    "a window that no layer uses": Case(
        {"layer_types": ["full_attention"] * 2, "sliding_window": 48, "use_sliding_window": True}
    ),
    "use_swa": Case({"dflash_config.use_swa": True, "dflash_config.swa_window_size": 32}),
    "use_swa, sliding_window": Case({"dflash_config.use_swa": True, "sliding_window": 32, "model_type": DELETE}),
    "theta at the top level": Case({"rope_parameters": DELETE, "rope_theta": THETA}),
    "theta at the top level, no model_type": Case(
        {"rope_parameters": DELETE, "rope_theta": THETA, "model_type": DELETE}
    ),
    "theta twice": Case({"rope_theta": THETA, "model_type": DELETE}),
    "theta per layer type": Case(
        {
            "rope_parameters": {name: {"rope_theta": THETA} for name in ("full_attention", "sliding_attention")},
            **SLIDING,
            "use_sliding_window": True,
            "model_type": DELETE,
        }
    ),
    "YaRN": Case({"rope_parameters": YARN_ALL, "model_type": DELETE}),
    "YaRN, few parameters": Case({"rope_parameters": YARN}),
    "YaRN, other spellings": Case(
        {
            "rope_parameters": DELETE,
            "rope_theta": THETA,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "attn_factor": 1.25},
            "original_max_position_embeddings": 1024,
            "model_type": DELETE,
        }
    ),
    "linear scaling in rope_scaling": Case({"rope_parameters": DELETE, "rope_theta": THETA, "rope_scaling": LINEAR}),
    "null rope_parameters beside rope_scaling": Case(
        {"rope_parameters": None, "rope_theta": THETA, "rope_scaling": LINEAR, "model_type": DELETE}
    ),
    "partial rotary": Case({"rope_parameters.partial_rotary_factor": 0.5}),
    "partial rotary at the top level": Case({"partial_rotary_factor": 0.5, "model_type": DELETE}),
    "interleaved rope": Case({"rope_is_neox_style": False}),
    "M-RoPE target": Case(target=MROPE_TARGET),
    "M-RoPE target in rope_scaling": Case(target={"rope_parameters": DELETE, "rope_scaling": MROPE}),
    "M-RoPE target, partial rotary": Case({"rope_parameters.partial_rotary_factor": 0.5}, target=MROPE_TARGET),
    "value scale": Case({"dflash_config.attention_value_scale": 0.707}),
    "scales": Case({f"dflash_config.{key}": value for key, value in SCALES.items()}),
    "scales at the top level": Case(SCALES),
    "softcap of zero": Case({"dflash_config.final_logit_softcapping": 0.0}),
    "causal": Case({"is_causal": True}),
    "not causal": Case({"is_causal": False}),
    "causal in dflash_config": Case({"dflash_config.causal": True}),
    "causal in other spellings": Case({"draft_causal": True, "dflash_query_causal": True}),
    "draft_block_size": Case({"block_size": DELETE, "dflash_config.draft_block_size": 12}),
    "block size and captures elsewhere": Case(
        {
            "block_size": DELETE,
            "dflash_config.block_size": 12,
            "dflash_config.target_layer_ids": DELETE,
            "target_layer_ids": [4, 0, 2],
        }
    ),
    "mask id at the top level": Case({"dflash_config.mask_token_id": DELETE, "mask_token_id": 2044}),
    "sinks": Case(
        {"num_hidden_layers": 3},
        more_tensors={
            "layers.0.self_attn.sinks": (HEADS,),
            "layers.1.self_attn.attention_sink_bias": (HEADS,),
            "layers.2.self_attn.learnable_sink_param": (HEADS,),
        },
    ),
    "own embeddings": Case(more_tensors=EMBEDDINGS),
    "own embeddings not used": Case({"has_embed_tokens": False}, more_tensors=EMBEDDINGS),
    "more rows than tokens": Case({"vocab_size": 2080}, target={"vocab_size": 2080}),
    "names under model.": Case(prefix="model."),
    "two shards": Case(shards=2),
    "F32 checkpoint": Case(dtype=np.float32, spread=4),
    "F16 checkpoint": Case(dtype=np.float16, spread=3),
    "wide BF16 checkpoint": Case(spread=6),
    "rows of 80": Case({"intermediate_size": 80}),
    **{name: Case(checkpoint=name) for name in CHECKPOINTS if name not in UNREAD},
}
RUNS = [(name, recipe) for name in ("pair", *CASES) for recipe in RECIPES]


# --- the inputs ---


def build_drafter(case: Case, folder: Path) -> Path:
    if case.checkpoint:
        return make(case.checkpoint, folder)
    config = small_config(**{**BASE, **case.config})
    shapes = dflash_shapes({"head_dim": 16, **config}) | dict(case.more_tensors)
    tensors = {
        f"{case.prefix}{name}": (array * spread_of(name, array.shape, case.spread)).astype(case.dtype)
        for name, array in random_tensors(shapes, np.float32).items()
    }
    write_checkpoint(folder, config, tensors)
    if case.shards > 1:
        split(folder, tensors, case.shards)
    return folder


def spread_of(name: str, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Random powers of two: weights of very different size in one row, none beyond F16's range."""
    exponents = np.random.default_rng(len(name)).standard_normal(shape) * deviation
    return np.exp2(np.minimum(np.round(exponents), LARGEST_EXPONENT)).astype(np.float32)


def split(folder: Path, tensors: Mapping[str, np.ndarray], count: int) -> None:
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for n in range(count):
        part = {name: tensors[name] for name in list(tensors)[n::count]}
        file = f"model-{n + 1:05}-of-{count:05}.safetensors"
        write_safetensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def build_target(case: Case, folder: Path) -> Path:
    """The pair's target, or its config and tokenizer with the case's changes."""
    original = PAIR / "target"
    if not case.target:
        return original
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(original / name, folder)
    config = json.loads((original / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(changed(config, case.target)))
    return folder


@dataclass(frozen=True)
class Input:
    drafter: Path
    target: Path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("against-llama-cpp")


@pytest.fixture(scope="module")
def inputs(workplace: Path) -> dict[str, Input]:
    found = {"pair": Input(PAIR / "drafter", PAIR / "target")}
    for name, case in CASES.items():
        folder = workplace / name
        found[name] = Input(build_drafter(case, folder / "drafter"), build_target(case, folder / "target"))
    return found


@pytest.fixture(scope="module")
def theirs(inputs: Mapping[str, Input], workplace: Path) -> Path:
    """A folder with llama.cpp's file of every run, all made by one process: its imports take longer than the work."""
    folder = workplace / "llama.cpp"
    folder.mkdir()
    jobs = []
    for name, recipe in RUNS:
        options = ["--outtype", recipe.lower(), "--outfile", str(folder / f"{name}-{recipe}.gguf")]
        jobs.append([str(inputs[name].drafter), "--target-model-dir", str(inputs[name].target), *options])
    run_converter(jobs, workplace / "llama.cpp.log")
    return folder


# --- the comparison ---


def facts_of_file(file: GGUFFile) -> Facts:
    """Everything a file says, by name and as text: keys with their types, tensors with type, shape and bytes."""
    facts = {"GGUF version": str(file.version), "alignment": str(file.alignment)}
    facts |= {name: shown(entry) for name, entry in file.keys.items()}
    for name, tensor in file.tensors.items():
        digest = hashlib.sha256(file.tensor_bytes(name).tobytes()).hexdigest()[:16]
        facts[f"tensor {name}"] = f"{tensor.type.name} {list(tensor.shape)}, bytes {digest}"
    return facts


def shown(entry: KeyValue) -> str:
    element = "" if entry.element is None else f" of {entry.element.name}"
    value = list(entry.value) if isinstance(entry.value, tuple) else entry.value
    text = f"{entry.type.name}{element} {json.dumps(value, ensure_ascii=False)}"
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... {len(text)} characters, {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def differences(ours: Facts, theirs: Facts) -> Differences:
    names = {**ours, **theirs}
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}


def listed_for(case: str, recipe: str, entries: list[dict[str, Any]]) -> Differences:
    """What the golden list says about one case. Fails where it says two things of one name."""
    listed: Differences = {}
    for entry in entries:
        cases = entry["cases"]
        if recipe not in entry.get("recipes", RECIPES):
            continue
        if case in entry.get("except", ()) or not (cases == ALL or case in cases):
            continue
        for name in entry["names"]:
            assert name not in listed, f"{GOLDEN.name}: {name} is listed twice for {case!r}"
            listed[name] = (entry["ours"], entry["llama.cpp"])
    return listed


def verdict(found: Differences, listed: Differences) -> Iterator[str]:
    """One line for each difference that is not listed, and for each that is listed otherwise than it is."""
    for name in sorted({*found, *listed}):
        if name not in listed:
            yield f"not listed: {name}: ours {found[name][0]}, llama.cpp's {found[name][1]}"
        elif name not in found:
            yield f"listed, but there is no difference: {name}"
        elif not all(map(agrees, found[name], listed[name])):
            yield f"listed otherwise: {name}: ours {found[name][0]}, llama.cpp's {found[name][1]}"


def agrees(found: str | None, listed: str | None) -> bool:
    return found is not None if listed == ANY else found == listed


# --- the tests ---


def golden() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["differences"]
    return entries


# Without head_dim llama.cpp's converter leaves it to a default or writes one that the tensors contradict.
WRONG_SHAPES = ("no head_dim", "no head_dim, no model_type")
GUESSED = ("eagle3 with llama3 scaling",)  # capture layers: of so shallow a target one of them twice


@pytest.mark.engine
@pytest.mark.parametrize(("name", "recipe"), RUNS, ids=[f"{name}-{recipe}" for name, recipe in RUNS])
def test_same_as_llama_cpp_or_listed(
    name: str, recipe: str, inputs: Mapping[str, Input], theirs: Path, tmp_path: Path
) -> None:
    given, our_file, their_file = inputs[name], tmp_path / "ours.gguf", theirs / f"{name}-{recipe}.gguf"
    convert(ConvertJob(given.drafter, given.target, "llama.cpp", recipe, our_file))
    found = differences(facts_of_file(read_gguf(our_file)), facts_of_file(read_gguf(their_file)))
    ours, upstream = (inspect(file).runtimes["llama.cpp"] for file in (our_file, their_file))
    our_file.unlink()
    their_file.unlink()
    problems = list(verdict(found, listed_for(name, recipe, golden())))
    assert not problems, "\n".join(problems)
    assert ours == "", "inspect has to take our own file"
    assert (upstream != "") == (name in (*WRONG_SHAPES, *GUESSED)), upstream


def test_golden_list_speaks_of_known_cases_and_gives_reasons() -> None:
    for entry in golden():
        mentioned = {*(() if entry["cases"] == ALL else entry["cases"]), *entry.get("except", ())}
        assert mentioned <= {"pair", *CASES}, entry
        assert entry["names"] and entry["reason"].strip(), entry
        assert entry["ours"] != entry["llama.cpp"] or entry["ours"] == ANY, entry


def test_verdict_names_what_is_new_gone_or_changed() -> None:
    found: Differences = {"a": ("1", None), "b": ("1", "2"), "c": ("1", "2")}
    listed: Differences = {"b": (ANY, "2"), "c": ("1", "3"), "d": (None, "1")}
    assert list(verdict(found, listed)) == [
        "not listed: a: ours 1, llama.cpp's None",
        "listed otherwise: c: ours 1, llama.cpp's 2",
        "listed, but there is no difference: d",
    ]
    assert list(verdict({"a": (None, "2")}, {"a": (ANY, "2")})) == ["listed otherwise: a: ours None, llama.cpp's 2"]
