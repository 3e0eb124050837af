"""A target's tokenizer, from its Hugging Face files or from its GGUF, as the `tokenizer.*` keys of a drafter's file.

What is read is what llama.cpp's own converter would write for the target, so both files agree on every id; only
byte-level BPE is built from Hugging Face files, every other tokenizer is copied from a GGUF of the target.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from gguf import GGUFValueType, GGUFWriter, SpecialVocab, TokenType

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.pre_tokenizers import ADVICE, components, pre_tokenizer_name
from convert_drafter.converters.weight_files import reading

TOKENS, TOKEN_TYPE, SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"
MASK = "tokenizer.ggml.mask_token_id"
PADDING_SCORE = -10000.0  # what llama.cpp's converter gives ids without a token (conversion/base.py)
OTHER_FILES = {
    "tekken.json": "Mistral's tekken", "tiktoken.model": "tiktoken", "tokenizer.model": "SentencePiece or tiktoken",
    "spiece.model": "SentencePiece", "vocab.txt": "WordPiece", "vocab.json": "BPE in the old vocab.json and merges.txt",
}  # fmt: skip


@dataclass(frozen=True)
class Tokenizer:
    """Every `tokenizer.*` key except the mask token's, which the drafter's own config decides.

    `vocab_sha256` is `vocabulary_hash` of the ordered tokens; `mask_token_id` is the tokenizer's own, if it has one.
    """

    keys: tuple[KeyValue, ...]
    vocab_sha256: str
    token_count: int
    mask_token_id: int | None


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a target's Hugging Face folder, with exactly `vocab_size` tokens.

    Raises `WrongInput` for a tokenizer that is no byte-level BPE, splits llama.cpp has no known name for, and ids
    that are out of range or given twice. Rules of the token list: get_vocab_base in llama.cpp's conversion/base.py.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise WrongInput(_no_tokenizer_json(folder))
    raw, config = read_json(path), read_json(folder / "tokenizer_config.json")
    _require_byte_level_bpe(raw, path)
    texts, types = _token_list(raw, config, vocab_size, path)
    special = _special_vocab(folder, vocab_size)
    mask = special.special_token_ids.pop("mask", None)
    ignore_merges = raw["model"].get("ignore_merges") is True
    writer = GGUFWriter(None, "")  # only collects the keys, under the names llama.cpp reads
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(raw, ignore_merges, "bos" in special.special_token_ids, path))
    writer.add_token_list(texts)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)
    return Tokenizer(_collected(writer), vocabulary_hash(texts), len(texts), mask)


def copy_tokenizer(keys: Mapping[str, KeyValue], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a target's GGUF: its `tokenizer.*` keys as they are, in order, padded up to `vocab_size`.

    Raises `WrongInput` where the file has no token list or one that is longer than `vocab_size`.
    """
    tokens = keys[TOKENS].value if TOKENS in keys else None
    if not isinstance(tokens, tuple) or not tokens:
        raise WrongInput(f"{TOKENS}: missing, expected the target's tokens (a file with its own tokenizer)")
    wanted = len(tokens) if vocab_size is None else vocab_size
    if wanted < len(tokens):
        raise WrongInput(f"{TOKENS}: found {len(tokens)} tokens, expected at most the vocabulary size {wanted}")
    mask = keys[MASK].value if MASK in keys else None
    own = tuple(_padded(kv, wanted) for name, kv in keys.items() if name.startswith("tokenizer.") and name != MASK)
    texts = cast("tuple[str, ...]", next(kv.value for kv in own if kv.key == TOKENS))
    return Tokenizer(own, vocabulary_hash(texts), wanted, mask if isinstance(mask, int) else None)


def vocabulary_hash(tokens: Iterable[str]) -> str:
    """SHA-256 over the ordered tokens: of each its UTF-8 length (8 bytes, little endian), then its UTF-8 bytes."""
    digest = hashlib.sha256()
    for token in tokens:
        data = token.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; `WrongInput` where there is none."""
    with reading(path):
        raw = path.read_bytes()
    return json_object(str(path), raw)


# --- what kind of tokenizer it is ---


def _no_tokenizer_json(folder: Path) -> str:
    other = next((f" (found {name}: {kind})" for name, kind in OTHER_FILES.items() if (folder / name).is_file()), "")
    return f"{folder}: tokenizer.json is missing{other}; {ADVICE}"


def _require_byte_level_bpe(raw: Mapping[str, Any], path: Path) -> None:
    model = raw.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type", "without a type") if isinstance(model, dict) else "missing"
        raise WrongInput(f"{path}: model: found {kind}, expected a BPE with a vocab; {ADVICE}")
    if not isinstance(model.get("merges"), list) or not model["merges"]:
        raise WrongInput(f"{path}: model.merges: missing, empty or no list, expected the merges of a BPE; {ADVICE}")
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise WrongInput(f"{path}: model.{key}: found {model[key]!r}, expected a byte-level BPE; {ADVICE}")
    # llama.cpp does not normalize a BPE's text at all. NFC is let through: Qwen's files ask for it and llama.cpp
    # gave them a name; text that is composed already, as nearly all is, comes out the same.
    if any(step != "NFC" for step in (n.get("type") for n in components(raw.get("normalizer"), "normalizers"))):
        raise WrongInput(f"{path}: normalizer: found {json.dumps(raw['normalizer'])}, expected NFC or none; {ADVICE}")


# --- the token list ---


def _token_list(
    raw: Mapping[str, Any], config: Mapping[str, Any], vocab_size: int, path: Path
) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids without a token are padding (the embedding has more rows than tokens)."""
    vocab, added = raw["model"]["vocab"], _added_tokens(raw, config, path)
    entries = [(text, token_id, TokenType.NORMAL) for text, token_id in vocab.items() if text not in added]
    for text, (token_id, special) in added.items():
        control = special or _looks_special(text)
        # llama.cpp matches user-defined tokens against plain text, so a sentencepiece space is written as a space
        entry = (text, TokenType.CONTROL) if control else (text.replace("\u2581", " "), TokenType.USER_DEFINED)
        entries.append((entry[0], token_id, entry[1]))
    texts = [f"[PAD{i}]" for i in range(vocab_size)]
    types, owner = [int(TokenType.UNUSED)] * vocab_size, dict[int, str]()
    for text, token_id, kind in entries:
        _check_id(text, token_id, vocab_size, owner, path)
        texts[token_id], types[token_id] = text, int(kind)
    _check_unique(texts, path)
    return texts, types


def _added_tokens(raw: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> dict[str, tuple[int, bool]]:
    """text -> (id, special), from both files: transformers adds tokenizer_config.json's tokens to tokenizer.json's."""
    try:
        listed = [(entry["id"], str(entry["content"]), entry) for entry in raw.get("added_tokens") or ()]
        decoder = config.get("added_tokens_decoder") or {}
        listed += [(int(key), str(entry["content"]), entry) for key, entry in decoder.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WrongInput(f"{path}: added tokens without an id or a content: {error!r}") from error
    vocab, added = raw["model"]["vocab"], dict[str, tuple[int, bool]]()
    for token_id, text, entry in listed:
        known, special = added.get(text, (vocab.get(text, token_id), False))
        if known != token_id:
            raise WrongInput(f"{path}: token {text!r}: found ids {known} and {token_id}, expected one")
        added[text] = (token_id, special or entry.get("special") is True)
    for text in _named_tokens(config):
        if text in vocab and text not in added:
            added[text] = (vocab[text], True)
    return added


def _named_tokens(config: Mapping[str, Any]) -> list[str]:
    """The texts tokenizer_config.json gives a role (eos_token ...), which makes them special in transformers."""
    values = [config.get(f"{role}_token") for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    more = config.get("additional_special_tokens")
    values += more if isinstance(more, list) else []
    texts = [value.get("content") if isinstance(value, dict) else value for value in values]
    return [text for text in texts if isinstance(text, str)]


def _looks_special(text: str) -> bool:
    """Added tokens that some models forget to mark special (does_token_look_special in llama.cpp's converter)."""
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    known = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    return text in known or any(text.startswith(left) and text.endswith(right) for left, right in pairs)


def _check_id(text: str, token_id: object, vocab_size: int, owner: dict[int, str], path: Path) -> None:
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
        raise WrongInput(f"{path}: token {text!r}: found id {token_id}, expected one below the size {vocab_size}")
    if owner.setdefault(token_id, text) != text:
        raise WrongInput(f"{path}: id {token_id}: found tokens {owner[token_id]!r} and {text!r}, expected one")


def _check_unique(texts: Sequence[str], path: Path) -> None:
    """llama.cpp aborts on a file that has one text twice (llama-vocab.cpp asserts as many texts as ids)."""
    first: dict[str, int] = {}
    for token_id, text in enumerate(texts):
        if first.setdefault(text, token_id) != token_id:
            raise WrongInput(f"{path}: token {text!r}: found at ids {first[text]} and {token_id}, expected once")


# --- special ids, merges, template ---


def _special_vocab(folder: Path, vocab_size: int) -> Any:
    """gguf's SpecialVocab, as llama.cpp's converter calls it, with its gaps closed; merges are in it too."""
    try:
        special = SpecialVocab(folder, load_merges=True)
        template = folder / "chat_template.jinja"
        if special.chat_template is None and template.is_file():  # "chat_template": null hides it from SpecialVocab
            special.chat_template = template.read_text(encoding="utf-8")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WrongInput(f"{folder}: the tokenizer's special tokens cannot be read: {error!r}") from error
    for role, token_id in special.special_token_ids.items():
        if token_id >= vocab_size:
            raise WrongInput(f"{folder}: {role}_token_id: found {token_id}, expected one below the size {vocab_size}")
    if "eos" not in special.special_token_ids:  # llama.cpp would silently take token 11
        raise WrongInput(f"{folder}: eos_token: missing in tokenizer_config.json and config.json; {ADVICE}")
    # llama-bpe and tekken files without this key get a BOS in llama.cpp; Hugging Face adds none unless told to
    if special.add_special_token.setdefault("bos", False) and "bos" not in special.special_token_ids:
        raise WrongInput(f"{folder}: bos_token: missing in tokenizer_config.json, but add_bos_token is true")
    return special


def _collected(writer: Any) -> tuple[KeyValue, ...]:
    """The `tokenizer.*` keys a GGUFWriter has been given."""
    return tuple(_key_value(key, kv) for key, kv in writer.kv_data[0].items() if key.startswith("tokenizer."))


def _key_value(key: str, kv: Any) -> KeyValue:
    if kv.type != GGUFValueType.ARRAY:
        return KeyValue(key, kv.type, kv.value)
    # the writer takes template names from a set: sorted, the same input gives the same bytes
    value = sorted(kv.value) if key == "tokenizer.chat_templates" else kv.value
    return KeyValue(key, kv.type, tuple(value), GGUFValueType.get_type(value[0]))


def _padded(kv: KeyValue, size: int) -> KeyValue:
    """A per-token array with entries for ids `len` to `size`, any other key as it is."""
    if kv.key not in (TOKENS, TOKEN_TYPE, SCORES) or not isinstance(kv.value, tuple):
        return kv
    fill = {TOKEN_TYPE: int(TokenType.UNUSED), SCORES: PADDING_SCORE}
    missing = range(len(kv.value), size)
    extra = tuple(f"[PAD{i}]" if kv.key == TOKENS else fill[kv.key] for i in missing)
    return KeyValue(kv.key, kv.type, kv.value + extra, kv.element)
