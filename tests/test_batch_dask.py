"""Batches on a real Dask cluster: a worker killed in the middle of a job, and its memory limit."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from batches import MIDDLE, jobs_file, killed_once, killed_second
from published import dflash_shapes, small_config, write_checkpoint

from convert_drafter.converters.batch import schedule
from convert_drafter.converters.batch.crew import cluster
from convert_drafter.converters.batch.schedule import run_tasks
from convert_drafter.converters.batch.task import Summary
from convert_drafter.converters.cli import main
from convert_drafter.converters.commands.jobs_file import read_jobs

distributed = pytest.importorskip("distributed", reason="needs the extra `batch`")
pytestmark = pytest.mark.filterwarnings("ignore")  # Dask's own, on its threads

NAMES = ["first-BF16", "first-Q8_0", "second"]
LIMIT = 700 << 20  # bytes of a worker; one with this package and Dask loaded holds a third of it


@contextmanager
def dask(workers: int = 2, **options: Any) -> Iterator[str]:
    """A cluster of processes on this machine; yields its scheduler's address."""
    with distributed.LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, **options
    ) as found:
        yield found.scheduler_address


@pytest.fixture
def middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "middle"
    place.mkdir()
    monkeypatch.setenv(MIDDLE, str(place))  # the workers are our children
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return place


def run(path: Path, address: str) -> Summary:
    with cluster(address) as crew:
        return run_tasks(read_jobs(path), crew)


def outcomes(found: Summary) -> dict[str, str]:
    return {result.task: result.status.value for result in found.results}


def test_a_worker_killed_in_the_middle_of_a_job(
    tmp_path: Path, middle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dask starts a new worker and gives it the job again; a second batch finds everything done."""
    path = jobs_file(tmp_path)
    monkeypatch.setattr(schedule, "run_task", killed_once)
    with dask() as address:
        found = outcomes(run(path, address))
        # one that was made when its worker died, and whose word of it was lost, is up to date the second time
        assert found.keys() == set(NAMES) and set(found.values()) <= {"done", "up to date"}
        assert sorted(mark.name for mark in middle.iterdir()) == NAMES  # every job lost its worker once
        assert not list((tmp_path / "out").glob("*.partial"))
        monkeypatch.undo()
        with pytest.raises(SystemExit) as exit_:
            main(["batch", str(path), "--scheduler", address, "--json"])
    assert exit_.value.code == 0
    again = json.loads(capsys.readouterr().out)
    assert [task["status"] for task in again["tasks"]] == ["up to date"] * 3


@pytest.mark.slow
def test_a_job_that_kills_every_worker_fails_alone(
    tmp_path: Path, middle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jobs_file(tmp_path)
    monkeypatch.setattr(schedule, "run_task", killed_second)
    with dask() as address:
        found = run(path, address)
    assert outcomes(found) == {**dict.fromkeys(NAMES, "done"), "second": "failed"}
    failure = found.results[2].failure
    assert failure is not None
    assert "KilledWorker" in failure.message
    assert failure.message.endswith("installed for the cluster's workers, and their memory enough?")
    assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.slow
def test_a_checkpoint_larger_than_a_worker_s_memory(tmp_path: Path, middle: Path) -> None:
    """Dask's nanny kills a worker that comes near its limit; ours hold a slab of rows, never a model."""
    config = small_config(hidden_size=4096, intermediate_size=12288, num_hidden_layers=3, num_target_layers=6)
    shapes = dflash_shapes(config)
    folder = write_checkpoint(tmp_path / "drafter", config, {})
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    assert end > LIMIT
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # zeros that take no place on the disk
    path = jobs_file(tmp_path, JOBS)
    with dask(workers=1, memory_limit=LIMIT) as address:
        (result,) = run(path, address).results
    assert result.status == "done"
    assert result.attempts == 1
    assert 0 < result.worker["peak_bytes"] < LIMIT
    assert result.figures["source_bytes"] == end


JOBS = '[[job]]\nname = "large"\nsource = "drafter"\nfor = "lucebox"\nquant = "Q8_0"\nout = "out/large.gguf"\n'
