"""Prompts: the package's own, text and JSONL files, chat templates, the same prompt twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.verify.prompts import Messages, PromptSet, encode_prompts, read_prompts


class Letters:
    """A tokenizer of one token a letter; its chat template marks the turn and tells the options."""

    def __init__(self, template: bool = True) -> None:
        self.template = template

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def has_chat_template(self) -> bool:
        return self.template

    def encode_chat(self, messages: Messages, options: Mapping[str, Any]) -> list[int]:
        return [200, len(options), *self.encode(messages[-1]["content"]), 201]


def encoded(path: Path | None, template: bool = True, **options: Any) -> PromptSet:
    return encode_prompts(read_prompts(path), Letters(template), "a file", 256, options)


def test_built_in_prompts_are_many_and_distinct() -> None:
    """T-69"""
    found = encoded(None)
    assert len(found.prompts) >= 40
    assert len({p.tokens for p in found.prompts}) == len(found.prompts) == found.templated
    assert not found.left_out


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two words\n")
    found = encoded(path)
    assert [bytes(p.tokens).decode() for p in found.prompts] == ["one", "  two words"]
    assert [p.name for p in found.prompts] == ["prompts.txt:1", "prompts.txt:3"]
    assert found.templated == 0


def test_jsonl_takes_tokens_text_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    lines = [{"tokens": [1, 2], "text": "readable copy"}, {"text": "ab"}, {"prompt": "cd"}, chat]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = encoded(path, enable_thinking=False)
    assert [p.tokens for p in found.prompts] == [(1, 2), (97, 98), (99, 100), (200, 1, 104, 105, 201)]
    assert (found.templated, found.options) == (1, {"enable_thinking": False})


def test_a_target_without_a_template_reads_the_words(tmp_path: Path) -> None:
    """T-60: the report tells that no template was applied."""
    found = encoded(None, template=False, enable_thinking=False)
    assert found.templated == 0 and not found.options
    assert bytes(found.prompts[0].tokens).decode().startswith("Write a Python function")


def test_the_same_prompt_is_taken_once(tmp_path: Path) -> None:
    """T-69: a server's cache answers the second one."""
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\none\n")
    found = encoded(path)
    assert len(found.prompts) == 2
    assert found.left_out == ("prompts.txt:3: the same as prompts.txt:1",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "found list"),
        ('{"tokens": [-1]}', "found keys 'tokens'"),
        ('{"tokens": [true]}', "found keys 'tokens'"),
        ('{"tokens": []}', "found keys 'tokens'"),
        ('{"messages": [{"role": "user"}]}', "found keys 'messages'"),
        ('{"messages": []}', "found keys 'messages'"),
        ('{"text": ""}', "found keys 'text'"),
        ("{}", "found keys none"),
        ('{"tokens": [256]}', "found token 256"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(WrongInput, match=r"prompts\.jsonl:2") as found:
        encoded(path)
    assert message in str(found.value)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_prompts_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(WrongInput, match="no prompts in it"):
        read_prompts(path)


def test_bytes_that_are_no_text_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"a\xff")
    with pytest.raises(WrongInput, match="byte 1 is no UTF-8"):
        read_prompts(path)
    with pytest.raises(WrongInput, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")
