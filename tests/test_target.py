"""The facts of a target, from its config.json or its GGUF."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.target import Target, read_target, target_tokenizer

FIXTURE = Path(__file__).parent.parent / "fixtures" / "pair" / "target"
CONFIG = {"architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 6, "hidden_size": 256, "vocab_size": 2048}
HEADER = {"test.block_count": 6, "test.embedding_length": 256, "test.vocab_size": 2048}


def folder(path: Path, config: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    return path


def gguf(path: Path, architecture: str = "test", tokens: list[str] | None = None, **keys: Any) -> Path:
    """A GGUF header; `keys` are u32 values, lists of them, or strings, `__` for a dot."""
    writer = GGUFWriter(path, architecture)
    for name, value in {key.replace("__", "."): value for key, value in keys.items()}.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_uint32(name, value)
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- config.json ---


def test_fixture() -> None:
    assert read_target(FIXTURE) == Target("target", "Qwen3ForCausalLM", 6, 256, 2048, False, None, 2048)


def test_text_config_is_merged_up(tmp_path: Path) -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": None, "architectures": ["Qwen3_5ForCausalLM"]}
    target = read_target(folder(tmp_path, CONFIG | {"text_config": text, "_name_or_path": "Qwen/Qwen3.5"}))
    assert target == Target("Qwen3.5", "Qwen3_5ForCausalLM", 3, 64, 2048, False, None)


@pytest.mark.parametrize("key", ["llm_config", "language_config", "thinker_config"])
def test_other_names_of_the_text_config(tmp_path: Path, key: str) -> None:
    text: dict[str, Any] = {"hidden_size": 64}
    target = read_target(folder(tmp_path, CONFIG | {key: {"text_config": text} if key == "thinker_config" else text}))
    assert target.hidden_size == 64


@pytest.mark.parametrize("rope", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("place", ["top", "text_config"])
@pytest.mark.parametrize(("sections", "expected"), [([11, 11, 10], True), (None, False)])
def test_mrope(tmp_path: Path, rope: str, place: str, sections: list[int] | None, expected: bool) -> None:
    found = {rope: {"rope_type": "default", "mrope_section": sections}}
    config = CONFIG | (found if place == "top" else {"text_config": found})
    assert read_target(folder(tmp_path, config)).uses_mrope is expected


def test_gemma_scales_its_embeddings(tmp_path: Path) -> None:
    target = read_target(folder(tmp_path, CONFIG | {"architectures": ["Gemma3ForConditionalGeneration"]}))
    assert target.embedding_scale == 16.0


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("key", CONFIG)
def test_missing_fact_is_named(tmp_path: Path, key: str, value: Any) -> None:
    config = {k: v for k, v in CONFIG.items() if k != key} | ({} if value == "absent" else {key: value})
    with pytest.raises(WrongInput, match=rf"config\.json: {key}: missing"):
        read_target(folder(tmp_path, config))


@pytest.mark.parametrize("value", [True, "6", 6.5])
def test_wrong_type_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(WrongInput, match=r"config\.json: num_hidden_layers: found"):
        read_target(folder(tmp_path, CONFIG | {"num_hidden_layers": value}))


# --- GGUF ---


def test_gguf_facts(tmp_path: Path) -> None:
    path = gguf(tmp_path / "x.gguf", **HEADER, general__name="Qwen 3", test__nextn_predict_layers=1)
    assert read_target(path) == Target("Qwen 3", "test", 5, 256, 2048, False, None)


def test_gguf_without_a_name_is_called_after_its_file(tmp_path: Path) -> None:
    assert read_target(gguf(tmp_path / "x.gguf", **HEADER)).name == "x"
    assert read_target(gguf(tmp_path / "x-00001-of-00001.gguf", **HEADER)).name == "x"


@pytest.mark.parametrize(("sections", "expected"), [([11, 11, 10, 0], True), ([0, 0, 0, 0], False)])
def test_gguf_mrope(tmp_path: Path, sections: list[int], expected: bool) -> None:
    path = gguf(tmp_path / "x.gguf", **HEADER, test__rope__dimension_sections=sections)
    assert read_target(path).uses_mrope is expected


def test_gguf_gemma(tmp_path: Path) -> None:
    keys = {key.replace("test.", "gemma3."): value for key, value in HEADER.items()}
    assert read_target(gguf(tmp_path / "x.gguf", "gemma3", **keys)).embedding_scale == math.sqrt(256)


def test_gguf_vocabulary_is_counted(tmp_path: Path) -> None:
    keys = {key: value for key, value in HEADER.items() if key != "test.vocab_size"}
    assert read_target(gguf(tmp_path / "x.gguf", tokens=["a", "b"], **keys)).vocab_size == 2
    with pytest.raises(WrongInput, match=r"2048.* 2 tokens"):
        read_target(gguf(tmp_path / "y.gguf", tokens=["a", "b"], **HEADER))


@pytest.mark.parametrize("key", HEADER)
def test_gguf_missing_fact_is_named(tmp_path: Path, key: str) -> None:
    keys = {k: v for k, v in HEADER.items() if k != key}
    with pytest.raises(WrongInput, match=rf"x\.gguf: {key}: missing"):
        read_target(gguf(tmp_path / "x.gguf", **keys))


def test_gguf_wrong_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"test\.block_count: found 'six', expected int"):
        read_target(gguf(tmp_path / "x.gguf", **HEADER | {"test.block_count": "six"}))


# --- neither ---


def empty(path: Path) -> None:
    path.mkdir()


def weights_only(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").touch()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda path: None, "nothing there", id="T-35 absent"),
        pytest.param(empty, "an empty folder", id="T-35 empty folder"),
        pytest.param(weights_only, "no config.json", id="T-35 folder without a config"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "a link to nothing", id="T-35 broken link"),
        pytest.param(lambda path: path.write_text("hello"), "target", id="T-35 a file that is no GGUF"),
        pytest.param(lambda path: path.touch(), "target", id="T-35 empty file"),
    ],
)
def test_what_is_no_target(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / "target"
    make(path)
    for read in (read_target, lambda p: target_tokenizer(p, 9)):
        with pytest.raises(WrongInput) as caught:
            read(path)
        assert words in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    """T-35"""
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WrongInput, match=r"config\.json"):
        read_target(tmp_path)


# --- tokenizer ---


def test_tokenizer_is_the_same_from_files_and_from_a_gguf_made_of_them(tmp_path: Path) -> None:
    read = target_tokenizer(FIXTURE, 2050)
    writer = GGUFWriter(tmp_path / "x.gguf", "test")
    for kv in target_tokenizer(FIXTURE, 2048).keys:
        writer.add_key_value(kv.key, kv.value, kv.type, sub_type=kv.element)
    writer.add_mask_token_id(2047)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert target_tokenizer(tmp_path / "x.gguf", 2050) == read


def test_tokenizer_error_names_the_file(tmp_path: Path) -> None:
    path = gguf(tmp_path / "x.gguf", tokens=["a", "b", "c"], **HEADER)
    with pytest.raises(WrongInput, match=r"x\.gguf: .* 3 tokens.* 2"):
        target_tokenizer(path, 2)
