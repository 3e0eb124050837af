"""Engines that read the checkpoint itself: their command lines, in the options that these projects document.

vLLM: docs/features/speculative_decoding (README.md for the JSON's keys, eagle.md, mtp.md, dflash.md, n_gram.md) and,
for `dspark`, vllm/config/speculative.py. SGLang: docs/advanced_features/speculative_decoding (EAGLE-3, MTP, DFlash,
DSpark, NGRAM). Both were read in November 2026; neither is run here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from convert_drafter.converters.launch.modes import MTP, NGRAM

HEAD_LENGTH = 1  # what both take in their own examples of MTP
NGRAM_LENGTH = 5  # vLLM's example; SGLang takes any number
Options = Callable[[str, int], list[str]]  # (drafter, tokens drafted in a step) -> options


@dataclass(frozen=True)
class OtherEngine:
    """`start` are the words before the target, `drafting` the options of each way, `notes` what to know of one.

    A kind that differs from others of its way has an entry of its own, None where the engine documents nothing of it.
    """

    start: tuple[str, ...]
    drafting: Mapping[str, Options | None]
    notes: Mapping[str, str]


def _vllm(method: str, model: bool = True, **more: int) -> Options:
    def options(drafter: str, length: int) -> list[str]:
        named = {"model": drafter} if model else {}
        return [
            "--speculative-config",
            json.dumps({"method": method, **named, "num_speculative_tokens": length, **more}),
        ]

    return options


def _sglang(algorithm: str, *counts: tuple[str, int | None], model: bool = True) -> Options:
    """`counts` are options with a number: the draft length and so many more; None is a plain 1."""

    def options(drafter: str, length: int) -> list[str]:
        words = ["--speculative-algorithm", algorithm]
        words += ["--speculative-draft-model-path", drafter] if model else []
        for name, more in counts:
            words += [f"--speculative-{name}", str(1 if more is None else length + more)]
        return words

    return options


# One token per step and no tree, as a chain drafts; the verified block holds the anchor too.
CHAIN = (("num-steps", 0), ("eagle-topk", None), ("num-draft-tokens", 1))
OTHER_ENGINES = {
    "vllm": OtherEngine(
        ("vllm", "serve"),
        {
            "dflash": _vllm("dflash"),
            "dspark": _vllm("dspark"),
            "eagle3": _vllm("eagle3"),
            MTP: _vllm("mtp", model=False),
            "gemma4-assistant": _vllm("mtp"),
            NGRAM: _vllm("ngram", model=False, prompt_lookup_min=2, prompt_lookup_max=5),
        },
        {"dflash2": "vLLM has DFlash2 under the method dflash, and only in builds with pull request 52816"},
    ),
    "sglang": OtherEngine(
        ("python3", "-m", "sglang.launch_server", "--model-path"),
        {
            "dflash": _sglang("DFLASH", ("num-draft-tokens", 1)),
            "dspark": _sglang("DSPARK", ("dspark-block-size", 0)),
            "eagle3": _sglang("EAGLE3", *CHAIN),
            MTP: _sglang("EAGLE", *CHAIN, model=False),
            "gemma4-assistant": None,
            NGRAM: _sglang("NGRAM", ("num-draft-tokens", 0), model=False),
        },
        {"dspark": "SGLang documents DSpark for DeepSeek-V4's own checkpoints; others depend on the build"},
    ),
}
