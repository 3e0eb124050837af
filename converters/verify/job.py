"""What to verify and how, and what an engine answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.hub import Part, fetch
from convert_drafter.converters.hub_gguf import fetch_whole
from convert_drafter.converters.repository import repository_of
from convert_drafter.converters.verdict import Diagnosis, Gate
from convert_drafter.converters.verify.measured import Measured

ENGINES = ("torch", "llama.cpp")
DTYPES = ("float32", "bfloat16", "float16")
INSTALL = 'pip install "convert-drafter[verify]"'
STEP_SLACK = 0.02  # of the verify steps: one rounding tie moves a few (fixture: 601 against 602)
MEASURED = ("lossless", "same drafts", "acceptance", "length sweep", "does it pay")


@dataclass(frozen=True)
class VerifyJob:
    """What to verify, and how. `targets` are a Hugging Face folder, a GGUF, or one of each.

    `max_drop` is a share of the original's acceptance length; `contexts` are the length sweep's, in tokens;
    `template` are the chat template's own options; `settings` correct the source's config as in a conversion.
    """

    file: Path
    targets: tuple[Path, ...]
    source: Path | None = None
    engine: str | None = None
    prompts: Path | None = None
    max_prompts: int | None = None
    new_tokens: int = 128
    max_drop: float = 0.05
    least_length: float | None = None
    contexts: tuple[int, ...] | None = None
    dtype: str = "float32"
    server: Path | None = None
    threads: int | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    diagnose: bool = False
    repair: Path | None = None
    command: str | None = None  # the words that asked for this, for the report

    @property
    def folder(self) -> Path | None:
        return next((target for target in self.targets if _is_folder(target)), None)

    @property
    def gguf(self) -> Path | None:
        return next((target for target in self.targets if not _is_folder(target)), None)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Every file and folder that is read; none of them is ever written."""
        return tuple(
            path for path in (self.file, *self.targets, self.source, self.prompts, self.server) if path is not None
        )

    def fetched(self) -> VerifyJob:
        """The same with what is run fetched, where it lies on the hub."""
        targets = tuple(fetch(target, Part.WHOLE) for target in self.targets)
        return replace(self, file=fetch_whole(self.file), targets=targets)

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that the given targets are for. Raises `WrongUsage` where --engine has no target."""
        given = {"torch": self.folder, "llama.cpp": self.gguf}
        wanted = ENGINES if self.engine is None else (self.engine,)
        found = tuple(name for name in wanted if given[name] is not None)
        if not found:
            kind = "its Hugging Face folder" if self.engine == "torch" else "a GGUF"
            raise WrongUsage(f"--engine {self.engine} runs the target from {kind}: give that with --target")
        return found


@dataclass(frozen=True)
class EngineAnswer:
    """An engine's gates, how it measured, what it measured, and what its diagnosis found."""

    gates: tuple[Gate, ...]
    settings: Mapping[str, Any]
    measured: Measured = field(default_factory=Measured)
    diagnosis: Diagnosis | None = None


def _is_folder(target: Path) -> bool:
    """A repository on the hub becomes one, unless a GGUF of it is named."""
    repository = repository_of(target)
    return target.is_dir() or (repository is not None and not repository.gguf)
