"""What one drafter kind has to say: how its config is read and what its tensors are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert_drafter.converters.checkpoint import TensorHeader
from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.plan import Dropped, TensorRule
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.target import Target

Headers = Mapping[str, TensorHeader]


@dataclass(frozen=True)
class Kind:
    """One drafter kind. `read_spec` raises `WrongInput` naming the key; `ignored` config keys mean nothing for it.

    `made` are tensors that no checkpoint has but its config implies: vectors by the names in the rules. `in_target`: it
    lies in its target's own checkpoint. `arranged` describes a checkpoint's tensors as the rules name them, where some
    of them are parts of one.
    """

    name: str
    summary: str
    architectures: tuple[str, ...]
    read_spec: Callable[[ConfigReader, Headers, Target | None], DrafterSpec]
    rules: Callable[[ConfigReader], tuple[TensorRule, ...]]
    dropped: Callable[[ConfigReader], tuple[Dropped, ...]]
    ignored: tuple[str, ...]
    in_target: bool = False
    made: Callable[[DrafterSpec], Mapping[str, tuple[float, ...]]] = lambda spec: {}
    arranged: Callable[[Headers, DrafterSpec], Headers] = lambda headers, spec: headers

    def implied(self, spec: DrafterSpec, config: Path) -> dict[str, TensorHeader]:
        """Headers of what is `made`, as if `config` held them."""

        def header(name: str, numbers: tuple[float, ...]) -> TensorHeader:
            rows = np.array(numbers, np.float32)
            return TensorHeader(name, "F32", rows.shape, config, 0, 0, expand=lambda start, stop: rows[start:stop])

        return {name: header(name, numbers) for name, numbers in self.made(spec).items()}
