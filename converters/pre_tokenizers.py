"""Which of llama.cpp's pre-tokenizers (tokenizer.ggml.pre) a tokenizer.json means, told by its own regexes.

llama.cpp's converter knows a pre-tokenizer by a hash of the ids one text gives, so a new vocabulary needs a new hash;
the splits themselves are written in tokenizer.json, and every vocabulary of a family has the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import WrongInput

ADVICE = "give the target as a GGUF file instead (--target FILE.gguf): its tokenizer is copied as it is"


@dataclass(frozen=True)
class PreTokenizer:
    """One row: the splits of a tokenizer.json, in order, and llama.cpp's name (tokenizer.ggml.pre) for them.

    `ignore_merges` and `bos` (does the tokenizer have a BOS token) tell rows of equal splits apart; None: either.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool | None = None
    bos: bool | None = None


# Regexes as they stand in tokenizer.json, CR and LF spelled \r and \n. [L]: llama.cpp's src/llama-vocab.cpp or
# src/unicode.cpp quotes it. [T]: transformers 5.23 holds it. [F]: other public code quotes the published file.
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PUNCT = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _cased(but: str = "", suffix: str = "") -> str:
    """Words split at a change of case, as o200k and its relatives have it; `but` is taken out of the letters."""
    upper, lower, lead = f"[{_UPPER}{but}]", f"[{_LOWER}{but}]", r"[^\r\n\p{L}\p{N}]?"
    return f"{lead}{upper}*{lower}+{suffix}|{lead}{upper}+{lower}*{suffix}"


_ENDINGS, _NOT_HAN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"&&[^\p{Han}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # ByteLevel's own regex
LLAMA3 = rf"{_WORD}|\p{{N}}{{1,3}}|{_PUNCT}|{_TAIL}"  # [L][T]
QWEN2 = rf"{_WORD}|\p{{N}}|{_PUNCT}|{_TAIL}"  # [L][T]
O200K = rf"{_cased(suffix=_ENDINGS)}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"  # [L][T]
CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"""| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"""
)  # [L][F]

# Where llama.cpp has several names for one row's behaviour (same splits, same ignore_merges), one of them stands here.
PRE_TOKENIZERS = (
    # Qwen 1.5, 2, 2.5, 3, MiMo; also stands for deepseek-r1-qwen, hunyuan, solar-open, grok-2, megrez, stablelm2
    PreTokenizer("qwen2", (QWEN2,)),
    # Qwen 3.5 and later [L][T]
    PreTokenizer(
        "qwen35",
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
            rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}",
        ),
    ),
    # Llama 3's regex: llama.cpp has a name for each of the four, and they differ in ignore_merges and in the BOS a
    # file without the key gets (glm4 and chatglm-bpe: none, the others: token 11). llama-bpe also stands for lfm2,
    # falcon3, falcon-h1, pixtral, midm-2.0; glm4 for glm5; smaug-bpe for dbrx.
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True, bos=True),
    PreTokenizer("glm4", (LLAMA3,), ignore_merges=True, bos=False),
    PreTokenizer("smaug-bpe", (LLAMA3,), ignore_merges=False, bos=True),
    PreTokenizer("chatglm-bpe", (LLAMA3,), ignore_merges=False, bos=False),
    # gpt-oss, GPT-4o, Llama 4, MiniMax M2, Kanana 2. llama.cpp has no name for these splits that ignores merges.
    PreTokenizer("gpt-4o", (O200K,)),
    # Mistral Nemo and later [L][T]; llama.cpp always ignores merges here
    PreTokenizer("tekken", (rf"{_cased()}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",)),
    # DeepSeek V3 and later, R1; also stands for hunyuan-dense, joyai-llm, hy_v4
    PreTokenizer("deepseek-v3", (r"\p{N}{1,3}", CJK, DEEPSEEK3)),
    # Kimi K2 [L]: published as tiktoken only; this row is for its conversions to tokenizer.json
    PreTokenizer("kimi-k2", (rf"[\p{{Han}}]+|{_cased(_NOT_HAN, _ENDINGS)}|\p{{N}}{{1,3}}|{_PUNCT}|{_TAIL}",)),
    # GPT-2: ByteLevel with use_regex; also stands for phi-2, olmo, exaone4, mellum, trillion, gigachat
    PreTokenizer("gpt-2", (GPT2,)),
    # SmolLM: single digits, then GPT-2's [F]; also stands for starcoder, refact, command-r, codeshell, exaone
    PreTokenizer("smollm", (r"\p{N}", GPT2)),
    # Ling [L][F]; also stands for bailingmoe2, llada-moe
    PreTokenizer(
        "bailingmoe",
        (
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    # Seed-Coder [L][F]
    PreTokenizer("seed-coder", (rf"{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_TAIL}",)),
    # K-EXAONE [L]
    PreTokenizer(
        "exaone-moe",
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    # MiniCPM 5 [L]
    PreTokenizer("minicpm5", (r"\p{N}{1,3}", rf"{_WORD}|\p{{N}}+|{_PUNCT}|{_TAIL}")),
    # Tiny Aya [L]; also stands for cohere2moe
    PreTokenizer("tiny_aya", (r"\d{1,3}(?=(?:\d{3})*\b)", O200K)),
    # Poolside's Laguna [F]
    PreTokenizer("laguna", (r"MergedWithNext (?:\r?\n)+(?!\r?\n)", QWEN2)),
)


def components(node: Any, key: str) -> list[Mapping[str, Any]]:
    """The components of a normalizer or pre-tokenizer, nested Sequences opened; `key` names a Sequence's list."""
    if not isinstance(node, dict):
        return []
    if node.get("type") == "Sequence":
        return [step for inner in node.get(key, []) for step in components(inner, key)]
    return [node]


def pre_tokenizer_name(raw: Mapping[str, Any], ignore_merges: bool, bos: bool, path: Path) -> str:
    """The name for the splits of a tokenizer.json; `WrongInput` shows them where it is not known."""
    found = components(raw.get("pre_tokenizer"), "pretokenizers")
    steps = tuple(step for component in found for step in _steps(component))
    byte_level = bool(found) and found[-1].get("type") == "ByteLevel"
    for row in PRE_TOKENIZERS:
        if byte_level and row.steps == steps and row.ignore_merges in (None, ignore_merges) and row.bos in (None, bos):
            return row.name
    shown = "".join(f"\n    {step}" for step in steps) or " none"
    raise WrongInput(
        f"{path}: pre_tokenizer: we know no name of llama.cpp's (tokenizer.ggml.pre) for these splits:{shown}"
        f"\n  a wrong name gives wrong tokens without a word; {ADVICE}"
    )


def _steps(component: Mapping[str, Any]) -> list[str]:
    """How one pre-tokenizer splits, spelled so that equal spellings split equally."""
    match component:
        case {"type": "ByteLevel"} if not component.get("add_prefix_space", True):
            return [GPT2] if component.get("use_regex", True) else []  # the library's own defaults
        case {"type": "Digits", "individual_digits": True}:
            return [r"\p{N}"]
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": str(behavior)}:
            regex = regex.replace("\r", r"\r").replace("\n", r"\n")  # DeepSeek and Seed write CR and LF themselves
            # Removed with invert keeps the matches: Isolated, as every regex above matches every character
            kept = behavior == "Isolated" or (behavior == "Removed" and component.get("invert") is True)
            return [regex if kept else f"{behavior} {regex}"]
    return [json.dumps(component, ensure_ascii=False)]
