"""A drafter's weights as f32 by canonical key, from a checkpoint or a GGUF: one code path to the torch reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convert_drafter.converters.checkpoint import read_rows
from convert_drafter.converters.convert import Published
from convert_drafter.converters.dialects import cell_of_arch, read
from convert_drafter.converters.drafters import rules_of
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.roles import TensorKey
from convert_drafter.converters.spec import DrafterSpec, spec_from
from convert_drafter.converters.verify.reference.dflash import DFlash
from convert_drafter.quant import TYPES, dequantize

Weights = dict[TensorKey, NDArray[np.float32]]


def checkpoint_weights(published: Published) -> Weights:
    """Every tensor of a checkpoint in the hub's conventions. Raises `Problems` where tensors do not fit."""
    matcher = published.match()
    if matcher.problems:
        raise Problems(str(published.checkpoint.root), matcher.problems)
    out = {}
    for key, match in matcher.matches.items():
        rows = read_rows(match.header, 0, match.header.rows)
        out[key] = match.rule.op.apply(rows, published.spec.head_dim).astype(np.float32)
    return out


def gguf_weights(path: Path) -> tuple[DrafterSpec, Weights]:
    """Facts and dequantized tensors of a drafter's GGUF in any dialect. Raises `WrongInput` for another file."""
    file = read_gguf(path)
    entry = file.keys.get("general.architecture")
    cell = None if entry is None else cell_of_arch(str(entry.value))
    if cell is None:
        raise WrongInput(f"{path}: general.architecture: found {entry and entry.value!r}, expected a drafter's")
    spec = spec_from(read(cell, file.keys))
    weights = {}
    for key in parameter_names(spec):
        stored = file.tensors.get(cell.tensor_name(key) or "")
        if stored is not None:
            data = file.tensor_bytes(stored.name)
            weights[key] = dequantize(data, TYPES[stored.type.name], stored.shape)
    return spec, weights


def parameter_names(spec: DrafterSpec) -> dict[TensorKey, str]:
    """Canonical key -> parameter of the reference, which carries the checkpoint's names."""
    return {key: rule.source_name(key) for rule in rules_of(spec.kind) for key in rule.keys(spec)}


def reference(spec: DrafterSpec, weights: Mapping[TensorKey, NDArray[Any]]) -> DFlash:
    """The torch reference with these weights; a missing or extra parameter is an error of torch's."""
    names = parameter_names(spec)
    drafter = DFlash(spec)
    drafter.load_state_dict({names[key]: torch.from_numpy(array.copy()) for key, array in weights.items()})
    return drafter.eval()
