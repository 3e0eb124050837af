"""The command as a user meets it: exit codes, messages, streams, and never a traceback."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
from json_results import checked
from published import (
    DELETE,
    PAIR,
    dflash_shapes,
    random_tensors,
    small_checkpoint,
    small_config,
    write_checkpoint,
    write_safetensors,
)

from convert_drafter.converters.cli import cli, main
from convert_drafter.converters.commands import show
from convert_drafter.converters.dialects import CELLS, RUNTIMES
from convert_drafter.converters.drafters import KINDS
from convert_drafter.converters.recipes import F32_IN_DRAFTERS, KEPT_IN_DRAFTERS, RECIPES
from convert_drafter.quant import TYPES

COMMAND = [sys.executable, "-m", "convert_drafter.converters.cli"]


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str


class Run(Protocol):
    def __call__(self, *arguments: object, code: int = 0) -> Done: ...


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command's entry point and checks its exit code."""

    def call(*arguments: object, code: int = 0) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        out = capsys.readouterr()
        assert exit_.value.code == code, f"exit {exit_.value.code}\n{out.out}\n{out.err}"
        return Done(out.out, out.err)

    return call


@pytest.fixture
def convert(run: Run) -> Run:
    def call(source: object, out: object = "", *options: object, code: int = 0) -> Done:
        return run("convert", source, "--for", "lucebox", "--quant", "Q8_0", "-o", out, *options, code=code)

    return call


def test_convert_says_what_it_did_and_how_to_run_it(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "dflash-tiny.gguf"
    done = run(
        "convert", PAIR / "drafter", "--target", PAIR / "target", "--for", "llama.cpp", "--quant", "Q8_0", "-o", out
    )
    assert out.is_file()
    assert f"wrote {out} (Q8_0 for llama.cpp)" in done.stdout
    assert f"-md {out} --spec-type draft-dflash --spec-draft-n-max 7" in done.stdout
    assert "bits per weight" in done.stdout
    assert done.stderr == ""


def test_target_gguf_stands_in_the_launch_line(tmp_path: Path, run: Run) -> None:
    from target_gguf import write_target

    target = write_target(PAIR / "target", tmp_path / "target.gguf")
    out = tmp_path / "out.gguf"
    done = run("convert", PAIR / "drafter", "--target", target, "--for", "llama.cpp", "--quant", "F16", "-o", out)
    assert f"llama-server -m {target} -md {out}" in done.stdout


def test_results_as_json(tmp_path: Path, run: Run, convert: Run) -> None:
    source = small_checkpoint(tmp_path / "drafter")
    report = checked(convert(source, tmp_path / "out.gguf", "--report", "--json").stdout)
    assert report["out_bytes"] == (tmp_path / "out.gguf").stat().st_size
    plan = checked(convert(source, tmp_path / "no.gguf", "--json", "--dry-run").stdout)
    assert plan["tensors"] == report["tensors"]
    facts = checked(run("inspect", source, "--json").stdout)["facts"]
    assert facts["rope.theta"] == {"value": 1e7, "origin": "rope_parameters.rope_theta"}


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, convert: Run) -> None:
    source = small_checkpoint(tmp_path / "drafter", intermediate_size=100)
    done = convert(source, tmp_path / "out.gguf", "--dry-run")
    assert "blk.1.ffn_down.weight" in done.stdout
    assert "row 100 is no multiple of 32: F16 instead" in done.stdout
    assert "2 of 25 tensors fell back to another type" in done.stdout
    assert not (tmp_path / "out.gguf").exists()


def test_warnings_go_to_stderr(tmp_path: Path, convert: Run) -> None:
    source = small_checkpoint(tmp_path / "drafter", rope_theta=1000000)
    done = convert(source, tmp_path / "out.gguf")
    assert "warning: " in done.stderr
    assert "rope_parameters.rope_theta = 1e+07 is used, rope_theta = 1e+06 is not" in done.stderr
    assert "warning:" not in done.stdout
    strict = convert(source, tmp_path / "strict.gguf", "--strict", code=3)
    assert "rope_theta = 1e+06 is not" in strict.stderr
    assert not (tmp_path / "strict.gguf").exists()


def test_a_missing_fact_can_be_given(tmp_path: Path, run: Run, convert: Run) -> None:
    """G-10: a config without block size is an error that says how to go on, and going on works."""
    source = small_checkpoint(tmp_path / "drafter", block_size=DELETE)
    done = convert(source, tmp_path / "out.gguf", code=3)
    assert "block_size: missing" in done.stderr
    assert "--set dflash_config.block_size=VALUE" in done.stderr
    convert(source, tmp_path / "out.gguf", "--set", "dflash_config.block_size=16")
    found = checked(run("inspect", tmp_path / "out.gguf", "--json").stdout)
    assert found["facts"]["block_size"]["value"] == 16
    assert found["keys"]["drafter.source.settings"] == ["dflash_config.block_size=16"]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_inspect_of_a_gguf_shows_every_fact_with_its_key(tmp_path: Path, runtime: str, run: Run) -> None:
    out = tmp_path / "out.gguf"
    run("convert", PAIR / "drafter", "--target", PAIR / "target", "--for", runtime, "--quant", "BF16", "-o", out)
    done = run("inspect", out)
    assert "capture_layers" in done.stdout
    assert "0, 2, 4" in done.stdout
    assert "rope.freq_base" in done.stdout
    assert "mask_token_id" in done.stdout


def test_inspect_of_a_checkpoint_says_which_runtimes_load_it(tmp_path: Path, run: Run) -> None:
    source = small_checkpoint(tmp_path / "drafter", final_logit_softcapping=30.0)
    done = run("inspect", source)
    assert "llama.cpp: loads it" in done.stdout
    assert "lucebox: logit_softcap = 30.0: lucebox has no key for it" in done.stdout


@pytest.mark.parametrize("what", show.LISTS)
def test_lists_come_from_the_tables(what: str, run: Run) -> None:
    kept = [pattern for named in (*KEPT_IN_DRAFTERS, *F32_IN_DRAFTERS) for pattern in named.patterns]
    archs = [c.arch for c in CELLS.values()]
    tables = {"kinds": KINDS, "dialects": archs, "recipes": RECIPES, "kept": kept, "types": TYPES}
    done = run("list", what)
    assert all(name in done.stdout for name in tables[what])
    rows = checked(run("list", what, "--json").stdout)["rows"]
    assert len(rows) == sum(line.strip() != "" for line in done.stdout.splitlines()) - 1


@pytest.mark.parametrize("command", cli.commands)
def test_every_command_has_help_with_an_example(command: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(command, "--help")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert "convert-drafter " in done.stdout.split("Options:")[0].split("Usage:")[1].split("\n", 1)[1]


# --- wrong usage ---

USAGE = {
    "no command": [],
    "no such command": ["conver"],
    "no options": ["convert", "x"],
    "unknown runtime": ["convert", "x", "--for", "vllm", "--quant", "F16", "-o", "o.gguf"],
    "unknown recipe": ["convert", "x", "--for", "llama.cpp", "--quant", "Q9", "-o", "o.gguf"],
    "set without value": ["inspect", "x", "--set", "theta"],
}


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_exits_with_2(name: str, run: Run) -> None:
    done = run(*USAGE[name], code=2)
    assert "Usage:" in done.stderr


def test_a_missing_target_exits_with_2(tmp_path: Path, run: Run) -> None:
    source = small_checkpoint(tmp_path / "drafter")
    done = run("convert", source, "--for", "llama.cpp", "--quant", "F16", "-o", tmp_path / "o.gguf", code=2)
    assert "give --target with the target's folder" in done.stderr


# --- bad input ---


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def overlapping(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    text = json.dumps({"a": entry, "b": {**entry, "data_offsets": [8, 24]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 24)


def wrong_dtype(folder: Path) -> None:
    tensors = random_tensors(dflash_shapes(small_config()))
    tensors["norm.weight"] = np.zeros(64, dtype=np.uint8)
    write_safetensors(folder / "model.safetensors", tensors)


def empty(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", {})


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_without_shard(folder: Path) -> None:
    weights = {"weight_map": {"norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"hidden_size": 64,')


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def foreign(folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", random_tensors({"model.layers.0.mlp.up_proj.weight": (4, 4)}))


BAD_INPUT: dict[str, tuple[Callable[[Path], None], str]] = {
    "T-70 truncated shard": (truncated, "truncated"),
    "T-25 header longer than the file": (long_header, "the header promises 1099511627784 bytes, the file has 10"),
    "T-25 overlapping offsets": (overlapping, "overlap"),
    "wrong dtype": (wrong_dtype, "norm.weight: dtype U8"),
    "T-20 empty checkpoint": (empty, "no tensor"),
    "T-35 no weights": (no_weights, "no weights"),
    "R7 only pickles": (only_pickles, "pytorch_model.bin"),
    "index without shard": (index_without_shard, "model-00002-of-00002.safetensors"),
    "A1-5 no config": (no_config, "config.json"),
    "broken config": (broken_config, "config.json"),
    "config is a list": (list_config, "config.json"),
    "T-20 foreign tensors": (foreign, "no drafter's tensors"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_exits_with_3_and_one_message(tmp_path: Path, name: str, convert: Run) -> None:
    spoil, fragment = BAD_INPUT[name]
    source = small_checkpoint(tmp_path / "mon drafter é")
    spoil(source)
    done = convert(source, tmp_path / "out.gguf", code=3)
    assert done.stderr.startswith("error: ")
    assert "mon drafter é" in done.stderr
    assert fragment in done.stderr
    assert "default" not in done.stderr  # T-8
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("source", "fragment"), [("nothing-here", "nothing-here"), ("file.txt", "file.txt"), ("empty", "empty")]
)
def test_a_source_that_is_none_is_named(tmp_path: Path, source: str, fragment: str, run: Run, convert: Run) -> None:
    """T-35."""
    (tmp_path / "file.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    assert fragment in convert(tmp_path / source, tmp_path / "out.gguf", code=3).stderr
    assert fragment in run("inspect", tmp_path / source, code=3).stderr


@pytest.mark.parametrize("what", ["missing", "empty folder", "garbage", "truncated"])
def test_an_unreadable_target_is_named(tmp_path: Path, what: str, run: Run) -> None:
    target = tmp_path / "my target.gguf"
    if what == "empty folder":
        target.mkdir()
    elif what == "garbage":
        target.write_bytes(os.urandom(400))
    elif what == "truncated":
        target.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 10, 10))
    source = small_checkpoint(tmp_path / "drafter")
    arguments = ["--target", target, "--for", "llama.cpp", "--quant", "F16", "-o", tmp_path / "out.gguf"]
    assert "my target.gguf" in run("convert", source, *arguments, code=3).stderr


def test_a_destination_that_cannot_be_written_is_named(tmp_path: Path, convert: Run) -> None:
    source = small_checkpoint(tmp_path / "drafter")
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert "a file" in convert(source, blocked / "out.gguf", code=3).stderr


def test_the_source_is_never_the_destination(tmp_path: Path, convert: Run) -> None:
    """T-24."""
    source = small_checkpoint(tmp_path / "drafter")
    done = convert(source, source / "model.safetensors", code=2)
    assert "is the same file as the source" in done.stderr


def test_the_installed_command_shows_no_traceback(tmp_path: Path) -> None:
    """One run in a process of its own: what a shell sees of a failure."""
    done = subprocess.run([*COMMAND, "inspect", tmp_path / "nothing"], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_shows_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as pipe:
        done = subprocess.run([*COMMAND, "list", "types"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr


def test_kinds_that_are_not_converted_are_refused_by_name(tmp_path: Path, convert: Run) -> None:
    shapes = dflash_shapes(small_config()) | {"prefix_gru.bias_hh_l0": (8,)}
    source = write_checkpoint(tmp_path / "drafter", small_config(), random_tensors(shapes))
    said = "the tensors are those of Domino, which is not converted yet"
    assert said in convert(source, tmp_path / "o", code=3).stderr


@pytest.mark.parametrize("value", ["x=" + "[" * 50_000, "x=" + "1" * 5000], ids=["deep", "long"])
def test_a_setting_nobody_can_read_is_wrong_usage(tmp_path: Path, value: str, run: Run) -> None:
    assert "--set x" in run("inspect", small_checkpoint(tmp_path / "d"), "--set", value, code=2).stderr


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path, convert: Run) -> None:
    shapes = dflash_shapes(small_config()) | {"x\x1b[2J\rerror": (4,)}
    source = write_checkpoint(tmp_path / "drafter", small_config(), random_tensors(shapes))
    done = convert(source, tmp_path / "o.gguf", code=3)
    assert "\x1b" not in done.stderr and "\r" not in done.stderr
    assert r"x\x1b[2J\rerror" in done.stderr


def test_names_are_taken_in_any_case(tmp_path: Path, run: Run) -> None:
    source = small_checkpoint(tmp_path / "drafter")
    run("convert", source, "--for", "LuceBox", "--quant", "q8_0", "-o", tmp_path / "o.gguf", "--dry-run")


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        (
            "nothing",
            "there is nothing of this name; expected a checkpoint's folder or its .safetensors file",
        ),
        ("a.gguf", "is a GGUF already"),
    ],
)
def test_a_source_of_another_sort_gets_its_own_advice(
    tmp_path: Path, source: str, fragment: str, convert: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert fragment in convert(source, tmp_path / "o.gguf", code=3).stderr


def test_a_terminated_run_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM ends a run as cleanly as Ctrl-C."""
    slow = "import time, convert_drafter.converters.commands.making as c; f = c.write_conversion\n"
    slow += "from convert_drafter.converters.cli import main\n"
    slow += "c.write_conversion = lambda v, a: f(v, lambda n: (print('writing', flush=True), time.sleep(0.05)))\n"
    arguments = ["convert", str(small_checkpoint(tmp_path / "d")), "--for", "lucebox", "--quant", "F32"]
    code = f"{slow}main({[*arguments, '-o', str(tmp_path / 'out.gguf')]!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1)
    assert process.stdout is not None and process.stdout.readline() == b"writing\n"
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert errors.strip() == b"error: interrupted; nothing was left behind"
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "meant"), [("q4km", "did you mean Q4_K_M"), ("Q9", ""), ("q5_0-draft", "Q5_0-drafter")]
)
def test_a_wrong_recipe_lists_all_of_them_in_lines_of_a_terminal(name: str, meant: str, run: Run) -> None:
    lines = run("quantize", "a.gguf", "b.gguf", name, code=2).stderr.splitlines()
    said = next(i for i, line in enumerate(lines) if f"found {name!r}, expected a recipe" in line)
    assert meant in lines[said] and all(len(line) <= 80 for line in lines[said + 1 :])
    listed = " ".join(lines[said + 1 :])
    assert all(recipe.removesuffix("-drafter") in listed for recipe in RECIPES) and "with -drafter behind it" in listed
