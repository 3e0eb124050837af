"""Doctor: every planted fault is found and named, and files that are right pass; nothing is run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType
from planted_faults import BYTES, HARMLESS, STRUCTURE, Draft, extra
from published import PAIR

from convert_drafter.converters import ConvertJob, RedialectJob, WrongInput, WrongUsage, convert, redialect
from convert_drafter.converters.cli import main
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.verdict import Gate, Outcome

RECIPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_M-drafter", "IQ4_XS", "Q3_K_M", "Q2_K", "MXFP4_MOE",
)  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The pair's drafter in a recipe for a runtime, converted once."""
    folder, known = tmp_path_factory.mktemp("made"), dict[tuple[str, str], Path]()

    def make(recipe: str = "Q8_0", runtime: str = "llama.cpp") -> Path:
        if (recipe, runtime) not in known:
            out = folder / f"{recipe}-{runtime}.gguf"
            convert(ConvertJob(PAIR / "drafter", PAIR / "target", runtime, recipe, out))
            known[recipe, runtime] = out
        return known[recipe, runtime]

    return make


def structure(path: Path, **options: Any) -> Gate:
    return doctor(path, **options)[0]


def spoilt(made: Path, out: Path, edit: Callable[[Draft], Any]) -> Path:
    draft = Draft.of(made)
    edit(draft)
    return draft.write(out / "spoilt.gguf")


# --- files that are right ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_correct_files_pass(made: Make, recipe: str) -> None:
    gates = doctor(made(recipe), PAIR / "target", PAIR / "drafter")
    assert [(gate.name, gate.outcome, gate.details) for gate in gates] == [
        ("structure", Outcome.PASS, ()),
        ("pairing", Outcome.PASS, ()),
    ]
    assert len(gates[0].figures["tensors"]) == 25
    assert all(tensor["relative"] <= tensor["allowed"] for tensor in gates[0].figures["tensors"])
    assert "bit for bit" in gates[0].summary


@pytest.mark.parametrize("runtime", ["ik_llama.cpp", "lucebox"])
def test_other_dialects_pass(made: Make, runtime: str) -> None:
    gates = doctor(made("Q4_K_M", runtime), PAIR / "target", PAIR / "drafter")
    assert [(gate.outcome, gate.details) for gate in gates] == [(Outcome.PASS, ())] * 2


def test_a_redialected_file_passes(made: Make, tmp_path: Path) -> None:
    redialect(RedialectJob(made(), None, "ik_llama.cpp", tmp_path / "out.gguf"))
    assert [gate.outcome for gate in doctor(tmp_path / "out.gguf", PAIR / "target", PAIR / "drafter")] == ["pass"] * 2


def test_a_file_by_itself(made: Make) -> None:
    """Without target and source there is one gate, and nothing about the checkpoint in it."""
    (gate,) = doctor(made())
    assert gate.outcome is Outcome.PASS
    assert gate.figures == {}
    assert gate.summary == "dflash drafter for llama.cpp: 25 tensors (15 Q8_0, 10 F32)"


def test_a_foreign_file_passes(made: Make, tmp_path: Path) -> None:
    """Another converter notes nothing of ours: neither depth nor hashes."""

    def edit(draft: Draft) -> None:
        for key in [key for key in draft.keys if key.startswith("drafter.")]:
            del draft.keys[key]

    path = spoilt(made(), tmp_path, edit)
    assert structure(path).outcome is Outcome.PASS
    assert structure(path, source=PAIR / "drafter").outcome is Outcome.PASS


def test_progress_counts_the_bytes(made: Make) -> None:
    heard: list[int] = []
    data = sum(tensor.n_bytes for tensor in read_gguf(made()).tensors.values())
    doctor(made(), on_bytes=heard.append)
    assert sum(heard) == data
    doctor(made(), source=PAIR / "drafter", on_bytes=heard.append)
    assert sum(heard) == 3 * data


# --- faults that the file itself shows ---


@pytest.mark.parametrize("name", STRUCTURE)
def test_planted_faults_are_found(made: Make, tmp_path: Path, name: str) -> None:
    fault = STRUCTURE[name]
    gate = structure(spoilt(made(), tmp_path, fault.edit))
    faults = [line for line in gate.details if not line.startswith("note: ")]
    assert gate.outcome is Outcome.FAIL
    assert any(fault.says in line for line in faults), gate.details


@pytest.mark.parametrize("name", BYTES)
def test_damaged_bytes_are_a_fault(made: Make, tmp_path: Path, name: str) -> None:
    says, edit = BYTES[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(edit(made().read_bytes()))
    gates = doctor(path, PAIR / "target")
    assert gates[0].outcome is Outcome.FAIL
    assert says in "\n".join(gates[0].details)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_odd_passes_with_a_note(made: Make, tmp_path: Path, name: str) -> None:
    gate = structure(spoilt(made(), tmp_path, HARMLESS[name].edit))
    assert gate.outcome is Outcome.PASS
    says = HARMLESS[name].says
    assert gate.details == () if not says else any(line.startswith(f"note: {says}") for line in gate.details)


def test_bytes_behind_the_last_tensor_are_told(made: Make, tmp_path: Path) -> None:
    (tmp_path / "longer.gguf").write_bytes(made().read_bytes() + bytes(100))
    gate = structure(tmp_path / "longer.gguf")
    assert (gate.outcome, gate.details) == (
        Outcome.PASS,
        ("note: 100 bytes after the last tensor, which nobody reads",),
    )


def test_all_faults_come_at_once(made: Make, tmp_path: Path) -> None:
    names = ("A1-43 no theta", "block size 1", "T-53 mask token -1", "T-17 F16 norm", "T-19 no query norm",
             "no merges", "a scale of NaN", "T-5 pattern of floats")  # fmt: skip
    gate = structure(spoilt(made(), tmp_path, lambda draft: [STRUCTURE[name].edit(draft) for name in names]))
    for name in names:
        assert any(STRUCTURE[name].says in line for line in gate.details), (name, gate.details)
    assert len(gate.details) == len(names)
    assert gate.summary.startswith("8 faults; ")


LUCEBOX = {
    "T-2 a count without ids": ("n_target_layers: a count without", lambda d: d.drop("dflash.target_layer_ids")),
    "A1-36 a count of others": ("n_target_layers: found 5", lambda d: d.set("n_target_layers", 5)),
    "T-5 unsigned ids": (
        "target_layer_ids: found array of UINT32",
        lambda d: d.set("dflash.target_layer_ids", (0, 2, 4), GGUFValueType.ARRAY, GGUFValueType.UINT32),
    ),
    "A1-35 another epsilon": ("computes every norm with 1e-06", lambda d: d.set("rms_epsilon", 1e-5)),
    "A1-43 no theta": ("lucebox takes 0 without", lambda d: d.drop("rope.freq_base")),
    "A1-41 heads": ("a divisor of head_count 8", lambda d: d.set("head_count_kv", 5)),
    "A1-42 gates on some layers": ("unknown tensor", extra("blk.0.attn_gate.weight", (8, 256))),
}


@pytest.mark.parametrize("name", LUCEBOX)
def test_faults_in_lucebox_files(made: Make, tmp_path: Path, name: str) -> None:
    says, edit = LUCEBOX[name]
    gate = structure(spoilt(made("Q8_0", "lucebox"), tmp_path, edit))
    assert gate.outcome is Outcome.FAIL
    assert any(says in line for line in gate.details), gate.details


# --- what is no drafter's file ---


def test_another_model_is_wrong_input(made: Make, tmp_path: Path) -> None:
    path = spoilt(made(), tmp_path, lambda draft: draft.set("general.architecture", "qwen3"))
    with pytest.raises(WrongInput, match="found 'qwen3', expected a drafter's"):
        doctor(path)


@pytest.mark.parametrize("tensor", ["dflash.domino.start", "dflash_aux_hidden_norm.0.weight"])
def test_another_kind_is_named(made: Make, tmp_path: Path, tensor: str) -> None:
    with pytest.raises(WrongInput, match="which is not checked yet"):
        doctor(spoilt(made(), tmp_path, extra(tensor, (8, 32))))


def test_no_architecture_is_a_fault(made: Make, tmp_path: Path) -> None:
    """Nothing can write one, so the key is renamed in the bytes."""
    path = tmp_path / "unnamed.gguf"
    path.write_bytes(made().read_bytes().replace(b"general.architecture", b"general.architectura", 1))
    gates = doctor(path, PAIR / "target")
    assert [gate.outcome for gate in gates] == [Outcome.FAIL, Outcome.SKIPPED]


@pytest.mark.parametrize("data", [b"", b"GGU", b"PK\x03\x04" + bytes(100), b"GGML" + bytes(100)])
def test_no_gguf_is_wrong_input(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(WrongInput):
        doctor(tmp_path / "file")


def test_a_folder_is_wrong_usage(tmp_path: Path) -> None:
    """T-35."""
    with pytest.raises(WrongUsage, match="is a folder"):
        doctor(tmp_path)
    with pytest.raises(WrongInput):
        doctor(tmp_path / "nothing.gguf")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    with pytest.raises(WrongInput):
        doctor(tmp_path / "link.gguf")


# --- the command line ---


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_exit_codes(made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", made(), "--target", PAIR / "target", "--source", PAIR / "drafter")
    assert code == 0
    assert "structure  ok " in out and "pairing    ok " in out
    bad = spoilt(made(), tmp_path, STRUCTURE["block size 1"].edit)
    code, out, err = run(capsys, "doctor", bad)
    assert (code, err) == (1, "")
    assert "- dflash.block_size: found 1, expected at least 2" in out
    assert run(capsys, "doctor", tmp_path)[0] == 1  # T-35: taken for a checkpoint, and without weights
    assert run(capsys, "doctor")[0] == 2
    assert run(capsys, "doctor", PAIR / "prompts.jsonl")[0] == 3
    assert run(capsys, "doctor", tmp_path / "nothing")[0] == 3
    assert run(capsys, "doctor", made(), "--target", tmp_path)[0] == 3
    assert run(capsys, "doctor", made(), "--source", tmp_path)[0] == 3


def test_json_is_plain(made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = spoilt(made(), tmp_path, STRUCTURE["block size 1"].edit)
    code, out, _ = run(capsys, "doctor", bad, "--json", "--source", PAIR / "drafter")
    found = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert code == 1
    assert [gate["name"] for gate in found["gates"]] == ["structure"]
    assert found["gates"][0]["outcome"] == "fail"
    assert {tensor["type"] for tensor in found["gates"][0]["figures"]["tensors"]} == {"Q8_0", "F32"}


def test_lines_fit_eighty_columns(made: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = spoilt(made(), tmp_path, lambda draft: draft.set("dflash.embedding_length", 512))
    _, out, _ = run(capsys, "doctor", bad, "--target", PAIR / "target")
    assert all(len(line) <= 80 for line in out.splitlines()[1:])  # the first is the file's path
    assert "more; --json has all of them" not in out
