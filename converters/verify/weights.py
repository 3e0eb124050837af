"""A drafter's weights as f32 by canonical key, from a checkpoint or a GGUF: one code path to the torch reference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from convert_drafter.converters.checkpoint import read_rows
from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.convert import Published
from convert_drafter.converters.dialects import cell_of_arch, read
from convert_drafter.converters.drafters import KINDS
from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.plan import TensorRule, match_tensors
from convert_drafter.converters.roles import TensorKey
from convert_drafter.converters.spec import DrafterSpec, spec_from
from convert_drafter.converters.verify.reference.dflash import DFlash
from convert_drafter.quant import TYPES, dequantize

Weights = dict[TensorKey, NDArray[np.float32]]


def checkpoint_weights(published: Published) -> Weights:
    """Every tensor of a checkpoint in the hub's conventions. Raises `Problems` where tensors do not fit."""
    kind, reader, spec = published.kind, published.reader, published.spec
    matcher = match_tensors(spec, kind.rules(reader), kind.dropped(reader), published.checkpoint.tensors)
    if matcher.problems:
        raise Problems(str(published.checkpoint.root), matcher.problems)
    out = {}
    for key, match in matcher.matches.items():
        rows = read_rows(match.header, 0, match.header.rows)
        out[key] = match.rule.op.apply(rows, spec.head_dim).astype(np.float32)
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
    for key in keys_of(spec, rules_of(spec)):
        stored = file.tensors.get(cell.tensor_name(key) or "")
        if stored is not None:
            data = file.tensor_bytes(stored.name)
            weights[key] = dequantize(data, TYPES[stored.type.name], stored.shape)
    return spec, weights


def rules_of(spec: DrafterSpec) -> tuple[TensorRule, ...]:
    """The kind's tensors with the checkpoint's names, which are also the reference's parameter names."""
    return KINDS[spec.kind].rules(ConfigReader({}, ""))


def keys_of(spec: DrafterSpec, rules: tuple[TensorRule, ...]) -> dict[TensorKey, str]:
    """Canonical key -> parameter name, for every layer."""
    return {
        (rule.role, layer): rule.source.replace("{i}", str(layer))
        for rule in rules
        for layer in (range(spec.layer_count) if rule.role.per_layer else [None])
    }


def reference(spec: DrafterSpec, weights: Mapping[TensorKey, NDArray[Any]]) -> DFlash:
    """The torch reference with these weights; a missing or extra parameter is an error of torch's."""
    names = keys_of(spec, rules_of(spec))
    drafter = DFlash(spec)
    drafter.load_state_dict({names[key]: torch.from_numpy(array.copy()) for key, array in weights.items()})
    return drafter.eval()
