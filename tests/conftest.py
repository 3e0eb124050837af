"""Hypothesis for shared machines, no deadline on a slow moment and the same examples in every run; a hub on loopback.

`HYPOTHESIS_PROFILE=explore python -m pytest` looks for new ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._cache_assets
import huggingface_hub.utils._http
import pytest
from fake_hub import FakeHub, fake_hub
from hypothesis import HealthCheck, settings
from mtp_checkpoints import small
from published import PAIR

settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", deadline=None, max_examples=3000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with a head, in shards."""
    return small(tmp_path_factory.mktemp("repository") / "target", shards=8)


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with that target and the pair's, an empty cache, and nothing of these names here."""
    known = {"org/target": repository, "org/drafter": PAIR / "drafter", "org/pair": PAIR / "target"}
    with fake_hub(known) as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.utils._cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # it speaks git-lfs' protocol
        monkeypatch.delenv("HF_TOKEN", raising=False)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield running
