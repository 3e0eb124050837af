"""Drafter kinds: what is converted, and what is known and refused by name.

A checkpoint is recognised by its tensors first and its architecture second: `DFlashDraftModel` is written on DSpark
weights and `LlamaForCausalLM` on EAGLE-3 ones. A file's name decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import (
    mtp,
    mtp_bailing,
    mtp_cohere,
    mtp_deepseek4,
    mtp_glm,
    mtp_hunyuan,
    mtp_latent,
    mtp_mimo,
    mtp_nemotron,
    mtp_qwen,
    mtp_qwen4,
    mtp_step,
)
from convert_drafter.converters.drafters.dflash import DFLASH
from convert_drafter.converters.drafters.dflash2 import DFLASH2
from convert_drafter.converters.drafters.dspark import DSPARK
from convert_drafter.converters.drafters.eagle3 import EAGLE3
from convert_drafter.converters.drafters.gemma4_assistant import GEMMA4_ASSISTANT
from convert_drafter.converters.drafters.gemma4_dspark import GEMMA4_DSPARK
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.mtp import needed
from convert_drafter.converters.drafters.refused import OTHER_BUILDS, OTHER_KINDS
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.plan import TensorRule

HEADS = (
    *mtp_qwen.FAMILIES,
    *mtp_qwen4.FAMILIES,
    *mtp_glm.FAMILIES,
    *mtp_latent.FAMILIES,
    *mtp_bailing.FAMILIES,
    *mtp_deepseek4.FAMILIES,
    *mtp_hunyuan.FAMILIES,
    *mtp_cohere.FAMILIES,
    *mtp_nemotron.FAMILIES,
    *mtp_step.FAMILIES,
    *mtp_mimo.FAMILIES,
)
KINDS: dict[str, Kind] = {
    kind.name: kind for kind in (DFLASH, DFLASH2, DSPARK, GEMMA4_DSPARK, EAGLE3, GEMMA4_ASSISTANT, *HEADS)
}


MTP = "MTP"  # a family of targets has a kind of its own
LISTED = "one of the kinds in `convert-drafter list kinds`"


@dataclass(frozen=True)
class Signature:
    """A kind's telling tensors: it is this kind if one name matches `pattern` from its start, and one `beside`."""

    kind: str
    pattern: str
    beside: str = ""

    def fits(self, names: Collection[str]) -> bool:
        return all(any(re.match(pattern, name) for name in names) for pattern in (self.pattern, self.beside))


MARKOV = r"(dspark_)?(markov_head\.)?markov_w1|markov_head\."
# The first match decides, so a kind stands before the kinds whose tensors it shares.
SIGNATURES = (
    Signature("dflash2", r"candidate_selector\."),
    Signature("DSpark inside DeepSeek-V4", r"mtp\.\d+\.(main_proj|main_norm|markov_head)\."),
    Signature("gemma4-dspark", MARKOV, r"layers\.\d+\.pre_feedforward_layernorm\."),
    Signature("dspark", MARKOV),
    Signature("Domino", r"domino_|prefix_gru\."),
    Signature(MTP, r"mtp(_[a-z]+)*\.|layers\.\d+\.eh_proj\."),
    Signature("Laguna DFlash", r"aux_hidden_norms?\.|layers\.\d+\.self_attn\.(g_proj|qkv_proj)\."),
    Signature("gemma4-assistant", r"pre_projection\."),
    Signature("EAGLE-3 with multi-head latent attention", r"midlayer\.self_attn\.(q_a|q_b|kv_a|kv_b)_"),
    Signature("P-EAGLE", r"mask_hidden"),
    Signature("eagle3", r"midlayer\.|layers\.0\.hidden_norm\."),
    Signature("dflash", r"hidden_norm\.weight$"),
)


def rules_of(kind: str) -> tuple[TensorRule, ...]:
    """The kind's tensors in the hub's own conventions, as a checkpoint without any flags has them."""
    return KINDS[kind].rules(ConfigReader({}, ""))


def detect(reader: ConfigReader, headers: Headers) -> Kind:
    """The kind of a checkpoint. Raises `WrongInput` naming what it is, when it is something we do not convert."""
    architectures = reader.find_list("architectures", str, "architectures") or ()
    found = signature_of(headers)
    if found is None:
        mtp.refuse_without_head(reader, len(headers))
        named = ", ".join(architectures) or "none"
        raise WrongInput(
            f"{reader.where}: no drafter's tensors in this checkpoint (architectures: {named}); expected {LISTED}"
        )
    if found == MTP:
        reader.origins["kind"] = "tensor names and architectures"
        return mtp.find_family(reader, architectures, HEADS)
    if found not in KINDS:
        why = f"which is not converted yet: {OTHER_KINDS[found]}"
        raise WrongInput(f"{reader.where}: the tensors are those of {found}, {why}; expected {LISTED}")
    kind = KINDS[found]
    strange = [name for name in architectures if name not in kind.architectures]
    if strange:
        why = next((f" ({OTHER_BUILDS[name]})" for name in strange if name in OTHER_BUILDS), "")
        expected = f"one of {', '.join(kind.architectures)}"
        raise reader.error("architectures", f"{', '.join(strange)} on {found} tensors{why}", expected)
    reader.origins["kind"] = "tensor names"
    return kind


def signature_of(headers: Iterable[str]) -> str | None:
    """The kind whose telling tensor is among these names, converted or not; None for a target's or others' tensors."""
    names = [name.removeprefix("model.") for name in headers]
    for signature in SIGNATURES:
        if signature.fits(names):
            return signature.kind
    return None


__all__ = [
    "DFLASH",
    "DFLASH2",
    "DSPARK",
    "EAGLE3",
    "GEMMA4_DSPARK",
    "KINDS",
    "SIGNATURES",
    "Kind",
    "detect",
    "needed",
    "rules_of",
    "signature_of",
]
