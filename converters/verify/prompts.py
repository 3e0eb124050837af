"""Prompts to measure acceptance on: those in the package, or a user's text or JSONL file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import file_access

BUILT_IN = "the package's own prompts"
BUILT_IN_FILE = "built_in_prompts.jsonl"
FORMS = '{"tokens": [ids]}, {"text": "..."} or {"messages": [{"role": ..., "content": ...}]}'
Messages = tuple[Mapping[str, str], ...]


class TextEncoder(Protocol):
    """A target's tokenizer, whoever runs it."""

    def encode(self, text: str) -> list[int]: ...

    def has_chat_template(self) -> bool: ...

    def encode_chat(self, messages: Messages, options: Mapping[str, Any]) -> list[int]: ...


@dataclass(frozen=True)
class Prompt:
    """What a prompt says, in one of three forms; `where` is its place in its file."""

    where: str
    tokens: tuple[int, ...] | None = None
    text: str | None = None
    messages: Messages | None = None


@dataclass(frozen=True)
class Encoded:
    """A prompt as the target reads it."""

    name: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PromptSet:
    """Encoded prompts and how they came about: their file, and whether the target's chat template was applied."""

    origin: str
    prompts: tuple[Encoded, ...]
    templated: int
    options: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What the report says of them."""
        return {
            "prompts": self.origin,
            "prompt_count": len(self.prompts),
            "chat_template": {"prompts": self.templated, "options": dict(self.options)},
            "left_out": list(self.left_out),
        }


def read_prompts(path: Path | None) -> tuple[Prompt, ...]:
    """Prompts of a JSONL file, of a text file (one a line), or the package's own. Raises `WrongInput` by line."""
    if path is None:
        lines = (files(__package__) / BUILT_IN_FILE).read_text(encoding="utf-8").splitlines()
        return tuple(_from_json(line, f"built-in {n}") for n, line in enumerate(lines, 1))
    lines = _lines(path)
    numbered = [(f"{path.name}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise WrongInput(f"{path}: no prompts in it, expected one a line")
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        return tuple(_from_json(line, where) for where, line in numbered)
    return tuple(Prompt(where, text=line) for where, line in numbered)


def _lines(path: Path) -> list[str]:
    with file_access(path, "read"):
        data = path.read_bytes()
    try:
        return [line.removesuffix("\r") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise WrongInput(f"{path}: byte {error.start} is no UTF-8; prompts are text or JSONL") from error


def _from_json(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WrongInput(f"{where}: no JSON ({error}), expected {FORMS}") from error
    if isinstance(value, str):
        return Prompt(where, text=value)
    if not isinstance(value, dict):
        raise WrongInput(f"{where}: found {type(value).__name__}, expected {FORMS}")
    text = value.get("text", value.get("prompt"))
    if _is_tokens(tokens := value.get("tokens")):
        return Prompt(where, tokens=tuple(tokens), text=text if isinstance(text, str) else None)
    if tokens is None and _is_chat(messages := value.get("messages")):
        return Prompt(where, messages=tuple(messages))
    if tokens is None and "messages" not in value and isinstance(text, str) and text:
        return Prompt(where, text=text)
    raise WrongInput(f"{where}: found keys {', '.join(map(repr, value)) or 'none'}, expected {FORMS}")


def _is_tokens(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(type(t) is int and t >= 0 for t in value)


def _is_chat(value: Any) -> TypeGuard[list[Mapping[str, str]]]:
    def is_message(message: Any) -> bool:
        return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))

    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def ask(
    path: Path | None, most: int | None, encoder: TextEncoder, vocab_size: int, options: Mapping[str, Any]
) -> PromptSet:
    """The first `most` prompts of a file, or the package's own, as the target reads them; raises as the two below."""
    return encode_prompts(read_prompts(path)[:most], encoder, str(path or BUILT_IN), vocab_size, options)


def encode_prompts(
    prompts: Sequence[Prompt], encoder: TextEncoder, origin: str, vocab_size: int, options: Mapping[str, Any]
) -> PromptSet:
    """Tokens of each prompt; the same tokens twice are taken once (T-69: a cache would answer the second).

    `options` go to the chat template (T-60: thinking on or off changes acceptance threefold). Raises `WrongInput`
    naming the prompt that has no tokens, or a token outside the vocabulary.
    """
    encoded, left_out, templated = dict[tuple[int, ...], Encoded](), list[str](), 0
    has_template = encoder.has_chat_template()
    for prompt in prompts:
        by_template = prompt.messages is not None and has_template
        tokens = _encode(prompt, encoder, by_template, options)
        if not tokens or max(tokens) >= vocab_size:
            found = f"token {max(tokens)}" if tokens else "no tokens"
            raise WrongInput(f"{prompt.where}: found {found}, expected tokens below the vocabulary's {vocab_size}")
        if tokens in encoded:
            left_out.append(f"{prompt.where}: the same as {encoded[tokens].name}")
            continue
        encoded[tokens] = Encoded(prompt.where, tokens)
        templated += by_template
    return PromptSet(origin, tuple(encoded.values()), templated, dict(options) if templated else {}, tuple(left_out))


def _encode(prompt: Prompt, encoder: TextEncoder, by_template: bool, options: Mapping[str, Any]) -> tuple[int, ...]:
    if prompt.tokens is not None:
        return prompt.tokens
    if prompt.messages is None:
        return tuple(encoder.encode(prompt.text or ""))
    if by_template:
        return tuple(encoder.encode_chat(prompt.messages, options))
    return tuple(encoder.encode("\n\n".join(message["content"] for message in prompt.messages)))  # a base model
