"""A drafter's weights as f32 by canonical key, from a checkpoint or a GGUF: one code path to the torch reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from convert_drafter.converters.checkpoint import read_rows
from convert_drafter.converters.convert import Published
from convert_drafter.converters.drafter_file import DrafterFile, read_drafter_file
from convert_drafter.converters.drafters import rules_of
from convert_drafter.converters.errors import Problems
from convert_drafter.converters.roles import Role, TensorKey
from convert_drafter.converters.spec import BEFORE_NORM, HEADS, DrafterSpec
from convert_drafter.converters.target import Target
from convert_drafter.converters.verify.in_torch.reference.dflash import DFlash
from convert_drafter.converters.verify.in_torch.reference.eagle3 import Eagle3
from convert_drafter.converters.verify.in_torch.reference.gemma4 import gemma4_dspark
from convert_drafter.converters.verify.in_torch.reference.gemma4_assistant import Gemma4Assistant
from convert_drafter.converters.verify.in_torch.reference.mtp import Mtp
from convert_drafter.converters.verify.in_torch.reference.mtp_chain import MtpChain
from convert_drafter.converters.verify.in_torch.reference.mtp_deepseek4 import MtpDeepseek4
from convert_drafter.converters.verify.in_torch.reference.mtp_qwen4 import MtpQwen4
from convert_drafter.quant import STORED, dequantize

Weights = dict[TensorKey, NDArray[np.float32]]


def checkpoint_weights(published: Published) -> Weights:
    """Every tensor of a checkpoint in the hub's conventions. Raises `Problems` where tensors do not fit."""
    matcher = published.match()
    if matcher.problems:
        raise Problems(str(published.checkpoint.root), matcher.problems)
    out = {}
    for key, match in matcher.matches.items():
        rows = read_rows(match.header, 0, match.header.rows)
        out[key] = match.rule.op.apply(rows, published.spec.head_dim, 0).astype(np.float32)
    return out


def gguf_weights(
    path: Path, settings: Mapping[str, str] | None = None, target: Target | None = None
) -> tuple[DrafterSpec, Weights]:
    """Facts and dequantized tensors of a drafter's GGUF in any dialect.

    `settings` and `target` as in `read_drafter_file`. Raises `WrongInput` for another file, with all its problems.
    """
    file = read_drafter_file(path, settings, target)
    return file.spec, file_weights(file)


def file_weights(file: DrafterFile) -> Weights:
    """The dequantized tensors of a file that was read. Raises `Problems` where its tensors do not fit its facts."""
    if file.problems:
        raise Problems(str(file.file.path), file.problems)
    out = {}
    for key, stored in file.tensors.items():
        rows = dequantize(file.file.tensor_bytes(stored.name), STORED[stored.type.name], stored.shape)
        out[key] = file.cell.into_hub(key).apply(rows, file.spec.head_dim, 0)
    return out


def parameter_names(spec: DrafterSpec) -> dict[TensorKey, str]:
    """Canonical key -> parameter of the reference, which carries the checkpoint's names (the first of several), but for
    MTP heads, of which each family has names of its own."""
    if spec.kind in OF_HEADS:
        return OF_HEADS[spec.kind].parameter_names(spec)
    rules = reversed(rules_of(spec.kind))
    return {key: rule.source_name(key, spec) for rule in rules for key in rule.keys(spec)}


OF_HEADS: Mapping[str, type[Mtp]] = {
    **dict.fromkeys(HEADS - BEFORE_NORM, Mtp),
    **dict.fromkeys(BEFORE_NORM, MtpChain),
    "mtp-qwen4exp": MtpQwen4,
    "mtp-deepseek4": MtpDeepseek4,
}
REFERENCES: Mapping[str, Callable[[DrafterSpec, Collection[Role]], nn.Module]] = {
    **dict.fromkeys(("dflash", "dflash2", "dspark"), DFlash),
    "gemma4-dspark": gemma4_dspark,
    "eagle3": Eagle3,
    "gemma4-assistant": Gemma4Assistant,
    **OF_HEADS,
}


def reference(spec: DrafterSpec, weights: Mapping[TensorKey, NDArray[Any]]) -> Any:
    """The torch reference over these weights, which it shares; a missing or misshapen one is an error of torch's.

    It is a `ReferenceDrafter` and a torch module.
    """
    names, roles = parameter_names(spec), {role for role, _ in weights}
    if Role.CONFIDENCE not in roles:  # half of a head that no draft depends on
        weights = {key: array for key, array in weights.items() if key[0] is not Role.CONFIDENCE_BIAS}
    with torch.device("meta"):  # no memory, no random numbers: every parameter is assigned
        drafter = REFERENCES[spec.kind](spec, roles)
    state = {names[key]: torch.from_numpy(np.require(array, requirements=["C", "W"])) for key, array in weights.items()}
    drafter.load_state_dict(state, assign=True)
    return drafter.eval().requires_grad_(False)
