"""The name that all quants of one model share: how files and folders are called, without what only tells their format.

A name never decides what a file is; it tells apart what headers cannot.
"""

from __future__ import annotations

import re
from functools import lru_cache

# One trailing word of a name that says how its weights are stored, and nothing about which weights they are.
_STORAGE = re.compile(
    r"(?:i?q\d[a-z\d_]*|tq\d[\d_]*"  # Q4_K_M, UD's Q4_K_XL, IQ4_NL, IQ2_XXS, TQ1_0
    r"|bf16|fp(?:32|16|8|4)|f(?:32|16|8)|int[248]|nf4|nvfp4|mxfp[468](?:_moe)?"
    r"|\d+bits?|\d+(?:\.\d+)?bpw|w\d+a\d+"
    r"|ud|i1|awq|gptq|bnb|gguf|mlx|exl[23]|unfused|fused)",
    re.IGNORECASE | re.ASCII,
)
_ENDINGS = tuple(re.compile(p, re.IGNORECASE | re.ASCII) for p in (r"\.(?:gguf|safetensors)$", r"-\d{5}-of-\d{5}$"))
# Words that say which part of speculative decoding a file is: identity for a key, not for the model it belongs to.
ROLE_WORDS = frozenset({
    "dflash", "dflash2", "dspark", "eagle", "eagle2", "eagle3", "mtp", "nextn", "draft", "drafter", "speculator",
    "assistant",
})  # fmt: skip
# Names that are no model's: of folders and files that everybody has.
_NAMELESS = frozenset({
    "model", "models", "ggml", "weights", "checkpoint", "checkpoints", "main", "snapshot", "snapshots", "target",
    "base", "consolidated", "pytorch", "tiny", "test", "out", "blobs", "files",
})  # fmt: skip


def normalize_model_key(name: str) -> str:
    """The key of a name: lower case, without trailing words for quantization, precision and layout; never emptied.

    Only trailing words go, and words such as `dflash`, `mtp` and `flash` are identity. A file's extension, a shard's
    number and separators left over at the end go too.
    """
    return split_name(name)[0]


@lru_cache(2**14)  # a scan asks for the same names again and again
def split_name(name: str) -> tuple[str, tuple[str, ...]]:
    """(key, the words that were taken off its end, as the name spells them and in its order)."""
    text, taken = name.strip(), list[str]()
    while True:
        shorter, word = _shortened(text)
        if not shorter:  # nothing would be left of it
            return text.lower(), tuple(reversed(taken))
        text = shorter
        taken += [word] if word else []


def _shortened(text: str) -> tuple[str, str]:
    """The name without one ending and the storage word that went, if one did; "" where no ending goes."""
    for ending in _ENDINGS:
        if found := ending.search(text):
            return text[: found.start()].rstrip(), ""
    for split in (text.rfind("-"), text.rfind(".")):
        word = text[split + 1 :]
        if split > 0 and (not word or _STORAGE.fullmatch(word)) and text[:split].strip("-. "):
            return text[:split].rstrip("- "), word
    return "", ""


def storage_label(name: str) -> str:
    """How the name says its weights are stored, as it spells it (`UD-Q4_K_XL`); "" where it does not."""
    return "-".join(word for word in split_name(name)[1] if word.lower() not in ("gguf", "fused", "mlx"))


@lru_cache(2**14)
def model_words(name: str) -> frozenset[str]:
    """The words of a model's name, without those for storage and for the part it plays; empty for `model.gguf`."""
    words = re.split(r"[-_ /]+", normalize_model_key(name))
    return frozenset(word for word in words if word and word not in ROLE_WORDS | _NAMELESS)


def base_key(name: str) -> str:
    """The key without the words for the part it plays, so that `mtp-X` and `X-MTP` meet; "" for `model.gguf`."""
    words = [word for word in re.split(r"[-_ ]+", normalize_model_key(name)) if word not in ROLE_WORDS]
    return "-".join(words) if any(word and word not in _NAMELESS for word in words) else ""


def plays_a_part(name: str) -> bool:
    """Whether the name alone would make it a drafter."""
    return bool(ROLE_WORDS & set(re.split(r"[-_. ]+", normalize_model_key(name))))


def path_words(place: str) -> str:
    """The last part of a Unix or Windows path, or of a repository's name."""
    return place.strip().replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
