"""The key that all quants of one model share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_drafter.converters.model_key import (
    base_key,
    model_words,
    normalize_model_key,
    path_words,
    plays_a_part,
    split_name,
    storage_label,
)

FROZEN = {  # A0-7: the nine of the original's own test
    "qwen3.6-35b-a3b": "qwen3.6-35b-a3b",
    "Qwen3.6-35B-A3B-DFlash": "qwen3.6-35b-a3b-dflash",
    "Qwen3.6-35B-A3B-DFlash-Q4_K_M": "qwen3.6-35b-a3b-dflash",
    "qwen3.6-35b-a3b-bf16": "qwen3.6-35b-a3b",
    "qwen3.6-35b-a3b-bf16-unfused": "qwen3.6-35b-a3b",
    "qwen3.6-35b-a3b-q4_k_m": "qwen3.6-35b-a3b",
    "qwen3.6-35b-a3b-UD-Q4_K_M": "qwen3.6-35b-a3b",
    "glm-4.7-flash": "glm-4.7-flash",
    "qwen3-embedding-4b-q8_0": "qwen3-embedding-4b",
}
RAN = {  # A0-7: those of its own that were run besides
    "glm-4.7-flash-Q8_0": "glm-4.7-flash",
    "GLM-4.7-Flash-MTP-Q8_0": "glm-4.7-flash-mtp",
    "Qwen3.6-27B-DFlash-bf16-unfused": "qwen3.6-27b-dflash",
    "mtp-Qwen3.6-27B-Q8_0": "mtp-qwen3.6-27b",
}
GAPS = (  # A0-8
    *("m-UD-Q4_K_XL", "m-IQ4_NL", "m-IQ2_M", "m-TQ1_0", "m-NVFP4", "m-MXFP4_MOE", "m-4bit", "m-w4a16"),
    *("m.gguf", "m-00001-of-00003.gguf", "m-00001-of-00003", "m.Q4_K_M", "m.Q4_K_M.gguf", "m--q8_0"),
    *("m.i1-Q4_K_M.gguf", "m-IQ2_XXS", "m-MLX-4bit", "m-4.0bpw", "M-GGUF", "m-Q4_0-00002-of-00002.gguf"),
)
WORDS_OF_STORAGE = (  # A0-4: the original's vocabulary, every word
    *("q2_k", "Q3_K_S", "q4_0", "Q4_K_M", "q5_k_l", "Q6_K", "q8_0", "iq1_s", "IQ3_XS", "iq4_xs", "iq2_a"),
    *("bf16", "fp16", "FP32", "fp8", "f16", "F32", "int4", "INT8", "nf4", "mxfp4", "ud", "awq", "GPTQ", "gguf", "MLX"),
    *("unfused", "fused"),
)
EDGES = {  # A0-1, A0-2, A0-3, A0-6
    "": "",
    "   ": "",
    "  Qwen3-4B ": "qwen3-4b",
    "q4_k_m": "q4_k_m",
    "gguf-gguf": "gguf",
    "-q8_0": "-q8_0",
    ".gguf": ".gguf",
    "a-q8_0-b": "a-q8_0-b",
    "a-fp8-dynamic": "a-fp8-dynamic",
    "llama-3.2": "llama-3.2",
}


@pytest.mark.parametrize(("name", "key"), [*FROZEN.items(), *RAN.items(), *EDGES.items()])
def test_keys(name: str, key: str) -> None:
    """A0-1, A0-2, A0-3, A0-5, A0-6, A0-7."""
    assert normalize_model_key(name) == key


@pytest.mark.parametrize("word", WORDS_OF_STORAGE)
def test_words_that_only_tell_the_format(word: str) -> None:
    """A0-3, A0-4: at the end, alone or with others behind; in the middle they stay."""
    assert normalize_model_key(f"M-{word}") == normalize_model_key(f"M-{word}-q8_0") == "m"
    assert normalize_model_key(f"M-{word}-Chat") == f"m-{word.lower()}-chat"


@pytest.mark.parametrize("word", ["chat", "instruct", "it", "4b", "a3b", "v2", "flash", "mtp", "dflash", "q", "quant"])
def test_words_that_tell_a_model(word: str) -> None:
    """A0-4, A0-5: what is not in the vocabulary is identity."""
    assert normalize_model_key(f"M-{word}") == f"m-{word}"


@pytest.mark.parametrize("name", GAPS)
def test_gaps(name: str) -> None:
    """A0-8: what the original's vocabulary left on, and so made a second model of."""
    assert normalize_model_key(name) == "m"


WORDS = st.sampled_from(["qwen3.6", "27b", "a3b", "dflash", "mtp", "q4_k_m", "UD", "bf16", "gguf", "", "4bit", "flash"])


@given(st.one_of(st.text(max_size=30), st.builds("-".join, st.lists(WORDS)), st.builds(".".join, st.lists(WORDS))))
def test_a_key_is_its_own_key_and_never_empty(name: str) -> None:
    """A0-1, A0-6."""
    key = normalize_model_key(name)
    assert normalize_model_key(key) == key
    assert bool(key) == bool(name.strip())
    assert key == key.lower()


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Qwen3.6-27B-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("m-bf16-unfused-00001-of-00002.gguf", "bf16-unfused"),
        ("m-GGUF", ""),
        ("m.i1-IQ4_XS.gguf", "i1-IQ4_XS"),
    ],
)
def test_storage(name: str, label: str) -> None:
    assert storage_label(name) == label
    assert split_name(name)[0] in ("m", "qwen3.6-27b")


def test_words_of_a_model() -> None:
    """A0-5: role words are identity of a key, and no part of the target's name."""
    assert base_key("mtp-Qwen3.6-27B-Q8_0.gguf") == base_key("Qwen3.6-27B-MTP") == "qwen3.6-27b"
    assert model_words("dflash-Qwen3.6-27B-Q8_0.gguf") == {"qwen3.6", "27b"}
    assert not model_words("model.gguf") and not base_key("drafter") and not base_key("mtp")
    assert plays_a_part("mtp-Qwen3.6-27B") and not plays_a_part("glm-4.7-flash")


@pytest.mark.parametrize(
    "place", ["/models/X-DFlash", "D:\\models\\X-DFlash", "org/X-DFlash/", "X-DFlash", " X-DFlash "]
)
def test_last_part_of_a_path(place: str) -> None:
    """A0-11."""
    assert path_words(place) == "X-DFlash"
