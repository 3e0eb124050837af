"""The target's own tokenizer and logits, asked of the running engine: no transformers needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from convert_drafter.converters.gguf_model import read_model
from convert_drafter.converters.verify.in_llama_cpp.answers import SAMPLING
from convert_drafter.converters.verify.in_llama_cpp.serving import Server
from convert_drafter.converters.verify.prompts import Messages

TEMPLATE = "tokenizer.chat_template"


class ServerTokenizer:
    """A `TextEncoder` over a server of the target."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def encode(self, text: str) -> list[int]:
        """With the start token where the target wants one; names of special tokens in the text are those tokens."""
        body = {"content": text, "add_special": True, "parse_special": True}
        name = f"the text {text[:40]!r}"
        answer = self._server.post("/tokenize", body, name)
        with self._server.reading(name):
            return [int(token) for token in answer["tokens"]]

    @cached_property
    def _template(self) -> bool:
        return TEMPLATE in read_model(self._server.setup.target).keys

    def has_chat_template(self) -> bool:
        """Of its own: a server without one makes one up, which no base model was trained on."""
        return self._template

    def encode_chat(self, messages: Messages, options: Mapping[str, Any]) -> list[int]:
        """By the target's chat template, ready for the answer. Raises `WrongInput` for what the template refuses."""
        body = {"messages": [dict(message) for message in messages], "chat_template_kwargs": dict(options)}
        name = f"the chat of {len(messages)} messages"
        answer = self._server.post("/apply-template", body, name)
        with self._server.reading(name):
            # the server takes a start token off the text, because tokenizing puts it there (common/chat.cpp)
            return self.encode(str(answer["prompt"]))


def logit_gap(server: Server, tokens: Sequence[int]) -> float:
    """How far the target's two best logits for the next token are apart, in nats: near 0 either is right."""
    body = {"prompt": list(tokens), "n_predict": 1, "n_probs": 2, **SAMPLING}
    name = f"the token after {len(tokens)}"
    answer = server.complete(body, name)
    with server.reading(name):
        best, second, *_ = sorted((float(t["logprob"]) for t in _candidates(answer)), reverse=True)
    return best - second


def _candidates(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    candidates: list[Mapping[str, Any]] = answer["completion_probabilities"][0]["top_logprobs"]
    return candidates
