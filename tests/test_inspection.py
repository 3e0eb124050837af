"""Inspect: facts with their origins, and a runtime is only said to load what it would load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from published import (
    PAIR,
    dflash_shapes,
    published_config,
    random_tensors,
    small_checkpoint,
    small_config,
    write_checkpoint,
)

from convert_drafter.converters import ConvertJob, WrongInput, convert, inspect
from convert_drafter.converters.dialects import RUNTIMES
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf

Keys = dict[str, KeyValue]
Tensors = dict[str, StoredTensor]


@pytest.fixture
def good(tmp_path: Path) -> Callable[[str], Path]:
    def make(runtime: str) -> Path:
        out = tmp_path / f"{runtime}.gguf"
        convert(ConvertJob(PAIR / "drafter", PAIR / "target", runtime, "F16", out))
        return out

    return make


def spoiled(path: Path, edit: Callable[[Keys, Tensors], Any]) -> Path:
    """A copy of a GGUF with its keys and tensors edited; new tensors are zeros."""
    file = read_gguf(path)
    keys, tensors = dict(file.keys), dict(file.tensors)
    edit(keys, tensors)
    out = path.with_name("spoiled.gguf")
    write_gguf(out, list(keys.values()), list(tensors.values()), lambda t: iter([np.zeros(t.n_bytes, np.uint8)]))
    return out


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_our_own_files_are_loaded(good: Callable[[str], Path], runtime: str) -> None:
    found = inspect(good(runtime))
    assert found.runtimes == {runtime: ""}
    assert all(fact.origin for fact in found.facts)


def test_a_file_without_our_keys_and_optional_ones_is_loaded(good: Callable[[str], Path]) -> None:
    """llama.cpp's own converter leaves these out, and the loader takes what they would say."""
    optional = {"dflash.attention.causal", "dflash.rope.dimension_count", "dflash.vocab_size"}

    def edit(keys: Keys, _: Tensors) -> None:
        for name in [name for name in keys if name in optional or name.startswith("drafter.")]:
            del keys[name]

    found = inspect(spoiled(good("llama.cpp"), edit))
    assert found.runtimes == {"llama.cpp": ""}
    origins = {fact.name: (fact.value, fact.origin) for fact in found.facts}
    assert origins["causal"] == (False, "no key: what llama.cpp takes")
    assert origins["vocab_size"] == (2048, "no key: what llama.cpp takes")
    assert origins["rope.theta"] == (1e7, "dflash.rope.freq_base")


@pytest.mark.parametrize("key", ["target_layers", "block_size", "rope.freq_base", "attention.head_count", "mask"])
def test_a_missing_key_is_named(good: Callable[[str], Path], key: str) -> None:
    """P-1, P-6, P-17: the runtime would take a default, or draft nothing, without a word."""
    name = "tokenizer.ggml.mask_token_id" if key == "mask" else f"dflash.{key}"
    found = inspect(spoiled(good("llama.cpp"), lambda keys, _: keys.pop(name)))
    assert found.runtimes["llama.cpp"] == f"{name}: missing"


@pytest.mark.parametrize(
    ("edit", "fragment"),
    [
        (lambda _, tensors: tensors.pop("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight: missing"),
        (
            lambda _, tensors: tensors.update(
                {"blk.0.attn_gate.weight": StoredTensor("blk.0.attn_gate.weight", (4, 4), GGMLQuantizationType.F32)}
            ),
            "blk.0.attn_gate.weight: unknown tensor",
        ),
    ],
    ids=["missing", "of another kind"],
)
def test_tensors_that_do_not_fit_are_named(good: Callable[[str], Path], edit: Any, fragment: str) -> None:
    """T-44: closure both ways; the loader refuses either."""
    assert fragment in inspect(spoiled(good("llama.cpp"), edit)).runtimes["llama.cpp"]


@pytest.mark.parametrize("ids", [None, ()])
def test_a_width_without_its_capture_layers_is_no_traceback(good: Callable[[str], Path], ids: Any) -> None:
    name = "dflash-draft.dflash.target_layer_ids"

    def edit(keys: Keys, _: Tensors) -> None:
        keys[name] = replace(keys[name], value=(0, 1, 2, 3, 4))
        if ids is None:
            del keys[name]

    with pytest.raises(WrongInput, match=r"missing or empty|no multiple of 5 capture layers"):
        inspect(spoiled(good("ik_llama.cpp"), edit))


def test_a_checkpoint_s_tensors_decide_too(tmp_path: Path) -> None:
    shapes = dflash_shapes(small_config())
    shapes |= {
        f"layers.{i}.self_attn.{name}_proj.bias": (size,)
        for i in range(2)
        for name, size in {"q": 64, "k": 32, "v": 32, "o": 64}.items()
    }
    source = write_checkpoint(tmp_path / "d", small_config(attention_bias=True), random_tensors(shapes))
    found = inspect(source)
    assert found.runtimes["ik_llama.cpp"] == ""
    assert "llama.cpp has no tensor for ATTN_Q_BIAS of layer 0" in found.runtimes["llama.cpp"]
    incomplete = write_checkpoint(
        tmp_path / "e", small_config(attention_bias=True), random_tensors(dflash_shapes(small_config()))
    )
    assert "layers.0.self_attn.q_proj.bias: missing" in inspect(incomplete).runtimes["ik_llama.cpp"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "factor": 4,
                "original_max_position_embeddings": 99,
            }
        },
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        {"dflash_config.use_swa": True, "dflash_config.swa_window_size": 8},
        {"final_logit_softcapping": 30, "output_multiplier": 2, "input_embedding_scale": 3, "attention_value_scale": 4},
    ],
)
def test_every_fact_says_where_it_came_from(tmp_path: Path, changes: dict[str, Any]) -> None:
    found = inspect(small_checkpoint(tmp_path / "d", **changes))
    assert [fact.name for fact in found.facts if not fact.origin] == []


def test_a_published_config_is_shown_with_its_places(tmp_path: Path) -> None:
    published = published_config("z-lab__Qwen3.5-4B-DFlash")
    found = inspect(small_checkpoint(tmp_path / "d", rope_parameters=published["rope_parameters"]))
    theta = next(fact for fact in found.facts if fact.name == "rope.theta")
    assert (theta.value, theta.origin) == (1e7, "rope_parameters.rope_theta")


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("dflash.embedding_length", 512, "found shape"),
        ("dflash.attention.head_count_kv", 0, "expected a number above 0"),
        ("dflash.block_count", 2**32 - 1, "expected one entry for each of 4294967295 layers"),
        ("dflash.target_layers", (0, 1, 3), "dflash.target_layers: found (-1, 0, 2)"),
        ("dflash.rope.freq_base", -1.0, "dflash.rope.freq_base: found -1.0"),
        ("dflash.target_layers", (99, 98, 97), "below the target's depth"),
    ],
)
def test_values_that_a_loader_chokes_on_are_named(
    good: Callable[[str], Path], key: str, value: Any, fragment: str
) -> None:
    """Each of these makes llama-server refuse the file or stop at an assertion."""
    found = inspect(spoiled(good("llama.cpp"), lambda keys, _: keys.update({key: replace(keys[key], value=value)})))
    assert fragment in found.runtimes["llama.cpp"]


def test_a_theta_that_is_no_number_is_refused(good: Callable[[str], Path]) -> None:
    path = good("llama.cpp")
    data = path.read_bytes()
    at = data.index(b"dflash.rope.freq_base") + len(b"dflash.rope.freq_base") + 4
    path.write_bytes(data[:at] + b"\0\0\xc0\x7f" + data[at + 4 :])
    with pytest.raises(WrongInput, match=r"freq_base: found nan, expected a finite number"):
        inspect(path)
