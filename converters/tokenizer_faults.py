"""The tokenizer in a drafter's file, held against what llama.cpp's loader stops at (llama_vocab::impl::load).

Source: src/llama-vocab.cpp of llama.cpp 11434; ik_llama.cpp, a fork, reads the same keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from gguf import GGUFValueType

from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.structure import Finding
from convert_drafter.converters.tokenizer import MASK, SCORES, TOKEN_TYPE, TOKENS

T = GGUFValueType
Keys = Mapping[str, KeyValue]
MODEL, PRE, MERGES = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.merges"
NO_TOKENS = ("no_vocab", "none")
MODELS = (
    "gpt2", "llama", "bert", "t5", "rwkv", "plamo2", "gemma4", "hybriddna", "whitespace", "test",
)  # fmt: skip
WITH_MERGES = ("gpt2", "hybriddna", "whitespace", "gemma4")
WITHOUT_MERGES = "kimi-k2"
PRE_TOKENIZERS = (
    "default", "minicpm5", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
    "jina-v5-nano", "deepseek-llm", "deepseek-coder", "deepseek-v3", "spark2_5", "youtu", "falcon", "mpt",
    "starcoder", "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
    "modern-bert", "jais-2", "gemma4", "granite-embed-multi-311m", "mmbert", "sarvam-moe", "jina-v1-en",
    "jina-v2-code", "roberta-bpe", "whitespace", "refact", "command-r", "qwen2", "deepseek-r1-qwen", "kormo",
    "f2llmv2", "qwen35", "stablelm2", "olmo", "dbrx", "smaug-bpe", "poro-chat", "chatglm-bpe", "glm4", "glm5",
    "viking", "jais", "tekken", "smollm", "codeshell", "bloom", "gpt3-finnish", "exaone", "exaone4", "exaone-moe",
    "chameleon", "minerva-7b", "megrez", "gpt-4o", "llama4", "kanana2", "talkie", "granite-embed-multi-97m",
    "tiny_aya", "cohere2moe", "superbpe", "trillion", "granite-docling", "bailingmoe", "bailingmoe2", "llada-moe",
    "seed-coder", "hunyuan", "hunyuan-dense", "hy_v4", "joyai-llm", "kimi-k2", "ufakzeka", "grok-2", "afmoe",
    "laguna", "minimax-m2", "solar-open", "mellum2",
)  # fmt: skip
ARRAYS = {TOKEN_TYPE: (T.INT32,), SCORES: (T.FLOAT32, T.INT32), MERGES: (T.STRING,)}


def tokenizer_faults(keys: Keys, facts: Mapping[str, Any], needed: bool) -> Iterator[Finding]:
    """Everything about the tokenizer; `needed` where the runtime does not load a file without one."""
    entry = keys.get(TOKENS)
    texts = entry.value if entry is not None and entry.element is T.STRING and isinstance(entry.value, tuple) else ()
    if needed:
        yield from _model(keys)
        if entry is None and _text(keys, MODEL) not in NO_TOKENS:
            yield Finding(f"{TOKENS}: missing, expected the target's tokens: this runtime needs them in the file")
    if not texts:
        return
    vocab = facts.get("vocab_size")
    if len(texts) != vocab:
        yield Finding(f"{TOKENS}: found {len(texts)} tokens, expected {vocab} (vocab_size)")
    yield from _arrays(keys, len(texts))
    yield from _repeated(texts)
    for key, entry in keys.items():
        special = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if not special or key == MASK:  # the mask is a fact of the drafter, judged with the others
            continue
        if entry.value == facts.get("mask_token_id") and "pad" not in key:
            yield Finding(f"{key}: {entry.value} is the mask token too", fault=False)
        if isinstance(entry.value, int) and not 0 <= entry.value < len(texts):
            yield Finding(f"{key}: found {entry.value}, expected an id below the {len(texts)} tokens")


def _text(keys: Keys, key: str) -> str | None:
    return str(keys[key].value) if key in keys else None


def _model(keys: Keys) -> Iterator[Finding]:
    model, pre = _text(keys, MODEL), _text(keys, PRE)
    if model is None:
        yield Finding(f"{MODEL}: missing, expected the target's, such as 'gpt2': no loader takes a file without it")
    elif model in NO_TOKENS:
        yield Finding(f"{MODEL}: found {model!r}: without tokens there is no mask token, and nothing is drafted")
    elif model not in MODELS:
        yield Finding(f"{MODEL}: found {model!r}, expected one of {', '.join(MODELS)}")
    elif model in WITH_MERGES:
        if MERGES not in keys and pre != WITHOUT_MERGES:
            yield Finding(f"{MERGES}: missing, expected the merges of a {model} tokenizer")
        if pre is None:
            yield Finding(f"{PRE}: missing: text is split as by no known model", fault=False)
        elif pre not in PRE_TOKENIZERS and model != "gemma4":
            yield Finding(f"{PRE}: found {pre!r}, which llama.cpp 11434 does not know")


def _arrays(keys: Keys, count: int) -> Iterator[Finding]:
    for key, elements in ARRAYS.items():
        entry = keys.get(key)
        if entry is None:
            continue
        if entry.element not in elements:
            found = entry.type.name if entry.element is None else f"an array of {entry.element.name}"
            yield Finding(f"{key}: found {found}, expected an array of {elements[0].name}")
        elif key != MERGES and len(entry.value) != count:  # type: ignore[arg-type]
            yield Finding(f"{key}: found {len(entry.value)} entries, expected one for each of {count} tokens")  # type: ignore[arg-type]


def _repeated(texts: tuple[Any, ...]) -> Iterator[Finding]:
    """llama.cpp asserts as many texts as ids; it names empty ones itself."""
    first: dict[str, int] = {}
    for token_id, text in enumerate(text or f"[EMPTY_{i}]" for i, text in enumerate(texts)):
        if first.setdefault(text, token_id) != token_id:
            yield Finding(f"{TOKENS}: ids {first[text]} and {token_id} are both {text!r}, expected each text once")
            return
