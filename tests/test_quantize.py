"""`quantize`: any GGUF in, the same model with smaller weights out, the source untouched, nothing half written."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from json_results import checked
from published import PAIR
from test_cli import Run, run  # noqa: F401
from test_importance import entry, gguf_bytes

from convert_drafter.converters import (
    ConvertJob,
    Problems,
    QuantizeJob,
    WrongInput,
    WrongUsage,
    convert,
    prepare_quantize,
    quantize,
)
from convert_drafter.converters.checkpoint import read_rows
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.type_choice import TypeOptions
from convert_drafter.quant import TYPES, dequantize
from convert_drafter.quant import quantize as encode
from convert_drafter.quant.measure import measure

STRING, U32 = GGUFValueType.STRING, GGUFValueType.UINT32
KEYS = (
    KeyValue("general.architecture", STRING, "somebody-elses"),
    KeyValue("general.alignment", U32, 64),
    KeyValue("general.file_type", U32, 1),
    KeyValue("somebody-elses.block_count", U32, 2),
    KeyValue("tokenizer.ggml.tokens", GGUFValueType.ARRAY, ("a", "b"), STRING),
    KeyValue("quantize.imatrix.file", STRING, "old.gguf"),
)


def model(path: Path, kind: str = "F32", row: int = 512, **changes: np.ndarray) -> Path:
    """A file of an architecture nobody knows: two layers with experts, a router, a norm and integers."""
    rng = np.random.default_rng(3)
    shapes = {
        "token_embd.weight": (64, row),
        "output.weight": (64, row),
        "blk.0.attn_v.weight": (128, row),
        "blk.0.ffn_down_exps.weight": (3, 32, row),
        "blk.0.ffn_gate_inp.weight": (3, row),
        "blk.1.attn_v.weight": (128, row),
        "blk.1.attn_norm.weight": (row,),
    }
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()} | changes
    matrices = {name for name, array in weights.items() if array.ndim > 1 and "gate_inp" not in name}
    types = {name: kind if name in matrices else "F32" for name in weights}
    data = {name: encode(array, TYPES[types[name]]) for name, array in weights.items()}
    stored = [StoredTensor(n, a.shape, GGMLQuantizationType[types[n]]) for n, a in weights.items()]
    stored.append(StoredTensor("d2t", (8,), GGMLQuantizationType.I64))
    data["d2t"] = np.arange(64, dtype=np.uint8)
    write_gguf(path, KEYS, stored, lambda tensor: [data[tensor.name]])
    return path


def weights_of(path: Path, name: str) -> np.ndarray:
    file = read_gguf(path)
    tensor = file.tensors[name]
    return dequantize(file.tensor_bytes(name), TYPES[tensor.type.name], tensor.shape)


def types_of(path: Path) -> dict[str, str]:
    return {name: tensor.type.name for name, tensor in read_gguf(path).tensors.items()}


def test_a_foreign_architecture(tmp_path: Path) -> None:
    source, out = model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    before = hashlib.sha256(source.read_bytes()).hexdigest()
    quantize(QuantizeJob(source, out, "Q4_K_M"))
    assert hashlib.sha256(source.read_bytes()).hexdigest() == before
    assert types_of(out) == {
        "token_embd.weight": "Q4_K",
        "output.weight": "Q6_K",
        "blk.0.attn_v.weight": "Q4_K",
        "blk.0.ffn_down_exps.weight": "Q4_K",
        "blk.0.ffn_gate_inp.weight": "F32",
        "blk.1.attn_v.weight": "Q6_K",
        "blk.1.attn_norm.weight": "F32",
        "d2t": "I64",
    }
    for name, kind in types_of(out).items():
        if kind in ("Q4_K", "Q6_K"):
            expected = encode(weights_of(source, name), TYPES[kind])
        else:
            expected = read_gguf(source).tensor_bytes(name)
        assert np.array_equal(read_gguf(out).tensor_bytes(name), expected), name


def test_keys_are_kept_but_for_what_the_weights_are(tmp_path: Path) -> None:
    source, out = model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    quantize(QuantizeJob(source, out, "Q5_K_S"))
    expected = {entry.key: entry for entry in KEYS if not entry.key.startswith("quantize.")}
    expected["general.file_type"] = KeyValue("general.file_type", U32, 16)
    expected["general.quantization_version"] = KeyValue("general.quantization_version", U32, 2)
    assert read_gguf(out).keys == expected
    assert list(read_gguf(out).keys) == list(expected)


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_sources_of_half_precision(tmp_path: Path, kind: str) -> None:
    source, out = model(tmp_path / "in.gguf", kind), tmp_path / "out.gguf"
    quantize(QuantizeJob(source, out, "Q6_K"))
    name = "blk.0.ffn_down_exps.weight"
    assert np.array_equal(read_gguf(out).tensor_bytes(name), encode(weights_of(source, name), TYPES["Q6_K"]))


def test_quantized_sources_are_refused_and_can_be_allowed(tmp_path: Path) -> None:
    source, out = model(tmp_path / "in.gguf", "Q8_0"), tmp_path / "out.gguf"
    with pytest.raises(Problems, match=r"blk\.0\.attn_v\.weight: is Q8_0 already.*--allow-requantize"):
        quantize(QuantizeJob(source, out, "Q4_0"))
    assert not out.exists()
    quantize(QuantizeJob(source, out, "Q4_0", allow_requantize=True))
    name = "blk.0.attn_v.weight"
    assert np.array_equal(read_gguf(out).tensor_bytes(name), encode(weights_of(source, name), TYPES["Q4_0"]))


def test_a_tensor_that_has_its_type_already_is_copied(tmp_path: Path) -> None:
    source, out = model(tmp_path / "in.gguf", "Q8_0"), tmp_path / "out.gguf"
    quantize(QuantizeJob(source, out, "Q8_0"))
    for name in types_of(source):
        assert np.array_equal(read_gguf(out).tensor_bytes(name), read_gguf(source).tensor_bytes(name))


def test_types_that_are_only_read(tmp_path: Path) -> None:
    """The gguf package decodes what we do not write."""
    source, out, kind = tmp_path / "in.gguf", tmp_path / "out.gguf", GGMLQuantizationType.IQ2_XXS
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (4, 2 * n_bytes), np.uint8)
    data[:, 1::n_bytes] &= 0x3F  # f16 scales that are finite
    stored = StoredTensor("blk.0.ffn_up.weight", (4, 512), kind)
    write_gguf(source, KEYS, [stored], lambda tensor: [data])
    quantize(QuantizeJob(source, out, "Q8_0", allow_requantize=True))
    expected = encode(gguf.quants.dequantize(data, kind), TYPES["Q8_0"])
    assert np.array_equal(read_gguf(out).tensor_bytes(stored.name), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_no_number_names_tensor_and_row(tmp_path: Path, bad: float) -> None:
    broken = np.zeros((128, 512), np.float32)
    broken[77, 3] = bad
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    good = model(tmp_path / "good.gguf")
    file = read_gguf(good)

    def data(tensor: StoredTensor) -> Sequence[np.ndarray]:
        return [broken if tensor.name == "blk.1.attn_v.weight" else file.tensor_bytes(tensor.name)]

    write_gguf(source, KEYS, list(file.tensors.values()), data)
    with pytest.raises(WrongInput, match=r"in\.gguf: blk\.1\.attn_v\.weight: row 77: found (nan|inf)"):
        quantize(QuantizeJob(source, out, "Q4_K_M"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.gguf", "in.gguf"]


@pytest.mark.parametrize("link", [os.link, os.symlink, None], ids=["hard link", "link", "itself"])
def test_the_source_is_never_the_output(tmp_path: Path, link: object) -> None:
    source = model(tmp_path / "in.gguf")
    out = tmp_path / "out.gguf" if link else source
    if callable(link):
        link(source, out)
    with pytest.raises(WrongUsage, match="is the same file as the source"):
        quantize(QuantizeJob(source, out, "Q4_K_M"))


def test_the_importance_matrix_is_never_the_output(tmp_path: Path) -> None:
    path = importance(tmp_path, {})
    with pytest.raises(WrongUsage, match="is the same file as the source"):
        prepare_quantize(QuantizeJob(model(tmp_path / "in.gguf"), path, "Q4_K_M", importance=path))


def test_threads_do_not_change_the_file(tmp_path: Path) -> None:
    source = model(tmp_path / "in.gguf")
    for threads in (1, 3):
        quantize(QuantizeJob(source, tmp_path / f"{threads}.gguf", "Q3_K_M", threads=threads))
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


def test_slabs_do_not_change_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "in.gguf")
    quantize(QuantizeJob(source, tmp_path / "whole.gguf", "Q4_K_M"))
    monkeypatch.setattr(sys.modules[quantize.__module__], "SLAB_WEIGHTS", 3 * 512)
    quantize(QuantizeJob(source, tmp_path / "slabs.gguf", "Q4_K_M"))
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "slabs.gguf").read_bytes()


def importance(folder: Path, more: dict[str, tuple[Sequence[int], np.ndarray]]) -> Path:
    rng = np.random.default_rng(1)
    path = folder / "importance.gguf"
    path.write_bytes(gguf_bytes(entry(rng.random(512), [4.0], "blk.0.attn_v.weight") | more))
    return path


def test_importance_weighs_the_tensors_it_has_entries_for(tmp_path: Path) -> None:
    """No tool collects importance for a whole drafter (users' demand 16): what has none goes on without."""
    source, out, name = model(tmp_path / "in.gguf"), tmp_path / "out.gguf", "blk.0.attn_v.weight"
    path = importance(tmp_path, {})
    report = quantize(QuantizeJob(source, out, "Q4_K_S", importance=path))
    (warning,) = report.quantization.warnings
    assert warning.startswith(
        f"{path}: no entry for 4 of 5 tensors, quantized without: token_embd.weight, output.weight"
    )
    columns = np.random.default_rng(1).random(512).astype(np.float32) / np.float32(4)
    kind = TYPES[types_of(out)[name]]
    assert np.array_equal(read_gguf(out).tensor_bytes(name), encode(weights_of(source, name), kind, columns))
    other = "blk.1.attn_v.weight"
    assert np.array_equal(read_gguf(out).tensor_bytes(other), encode(weights_of(source, other), kind))
    assert read_gguf(out).keys["quantize.imatrix.file"].value == "importance.gguf"
    with pytest.raises(Problems, match="no entry for 4 of 5 tensors"):
        quantize(QuantizeJob(source, tmp_path / "strict.gguf", "Q4_K_S", importance=path, strict=True))


def test_every_expert_has_its_own_importance(tmp_path: Path) -> None:
    source, out, name = model(tmp_path / "in.gguf"), tmp_path / "out.gguf", "blk.0.ffn_down_exps.weight"
    columns = np.random.default_rng(2).random((3, 512)).astype(np.float32)
    path = importance(tmp_path, entry(columns.reshape(-1), [1.0, 1.0, 1.0], name))
    quantize(QuantizeJob(source, out, "Q4_K_S", importance=path))
    kind = TYPES[types_of(out)[name]]
    experts = weights_of(source, name)
    expected = b"".join(encode(e, kind, c).tobytes() for e, c in zip(experts, columns, strict=True))
    assert read_gguf(out).tensor_bytes(name).tobytes() == expected


def test_importance_of_another_model_is_refused(tmp_path: Path) -> None:
    path = importance(tmp_path, entry(np.ones(256), [1.0], "blk.1.attn_v.weight"))
    with pytest.raises(WrongInput, match=r"blk\.1\.attn_v\.weight: found 256 values, expected 512"):
        prepare_quantize(QuantizeJob(model(tmp_path / "in.gguf"), tmp_path / "out.gguf", "Q4_K_M", importance=path))


@pytest.mark.parametrize("runtime", ["llama.cpp", "ik_llama.cpp", "lucebox"])
def test_the_floor_for_drafters_knows_every_dialect(tmp_path: Path, runtime: str) -> None:
    """A drafter's own tensors have other names in other runtimes; one pass and two give the same file."""
    target = None if runtime == "lucebox" else PAIR / "target"
    for recipe in ("BF16", "Q2_K-drafter"):
        convert(ConvertJob(PAIR / "drafter", target, runtime, recipe, tmp_path / f"{recipe}.gguf"))
    quantize(QuantizeJob(tmp_path / "BF16.gguf", tmp_path / "two.gguf", "Q2_K-drafter"))
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "Q2_K-drafter.gguf").read_bytes()
    assert types_of(tmp_path / "two.gguf")[next(n for n in types_of(tmp_path / "two.gguf") if "fc" in n)] == "Q8_0"


def test_importance_that_serves_nothing_is_said(tmp_path: Path) -> None:
    source, path = model(tmp_path / "in.gguf"), importance(tmp_path, {})
    report = quantize(QuantizeJob(source, tmp_path / "out.gguf", "F16", importance=path))
    assert report.quantization.warnings == (f"{path}: used for nothing: no tensor gets a type that weighs columns",)
    assert not [key for key in read_gguf(report.out).keys if key.startswith("quantize.imatrix")]


@pytest.mark.parametrize("allow", [False, True])
def test_types_that_nobody_can_decode_are_named(tmp_path: Path, allow: bool) -> None:
    stored = StoredTensor("blk.0.ffn_up.weight", (4, 256), GGMLQuantizationType.I32)
    write_gguf(tmp_path / "in.gguf", KEYS, [stored], lambda tensor: [np.zeros(1024, np.int32)])
    with pytest.raises(Problems, match=r"ffn_up\.weight: found I32, which cannot be decoded, expected F32, F16, BF16"):
        prepare_quantize(QuantizeJob(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0", allow_requantize=allow))


def test_a_link_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.gguf")
    with pytest.raises(
        WrongUsage, match=r"link\.gguf: is a link to .*real\.gguf, expected the name of the file itself"
    ):
        prepare_quantize(QuantizeJob(model(tmp_path / "in.gguf"), tmp_path / "link.gguf", "Q8_0"))


def test_a_pipe_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WrongInput, match="is a device or a pipe, expected a file"):
        prepare_quantize(QuantizeJob(tmp_path / "pipe", tmp_path / "out.gguf", "Q8_0"))


def test_fallbacks_are_announced_and_can_be_refused(tmp_path: Path, run: Run) -> None:  # noqa: F811
    """A6-10, and users' demand 17: 141 of 417 tensors fell back and nobody was told."""
    source, out = model(tmp_path / "in.gguf", row=288), tmp_path / "out.gguf"
    done = run("quantize", source, out, "Q4_K_M")
    assert "token_embd.weight: row 288 is no multiple of 256: Q5_0 instead" in done.stdout
    assert "5 of 8 tensors fell back to another type" in done.stdout
    out.unlink()
    refused = run("quantize", source, out, "Q4_K_M", "--no-fallback", code=3)
    assert "token_embd.weight: row 288 is no multiple of 256: Q5_0 instead" in refused.stderr
    assert not out.exists()


def test_errors_are_measured(tmp_path: Path, run: Run) -> None:  # noqa: F811
    source, out, name = model(tmp_path / "in.gguf"), tmp_path / "out.gguf", "blk.0.attn_v.weight"
    done = checked(run("quantize", source, out, "Q3_K_S", "--report", "--json").stdout)
    expected = measure(weights_of(source, name), weights_of(out, name))
    found = done["errors"][name]
    assert found["rmse"] == pytest.approx(expected.rmse)
    assert found["relative"] == pytest.approx(expected.relative)
    assert found["max"] == pytest.approx(expected.max)
    assert found["cosine"] == pytest.approx(expected.cosine)
    assert 0.05 < found["relative"] < 0.3
    assert "cosine" in run("quantize", source, out, "Q3_K_S", "--report").stdout


def test_a_dry_run_tells_sizes_and_writes_nothing(tmp_path: Path, run: Run) -> None:  # noqa: F811
    source, out = model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    plan = checked(run("quantize", source, out, "q4_k_m", "--dry-run", "--json").stdout)
    assert not out.exists()
    done = checked(run("quantize", source, out, "Q4_K_M", "--json").stdout)
    stored = read_gguf(out).tensors.values()
    assert plan["bytes"] == done["bytes"] == sum(tensor.n_bytes for tensor in stored)
    assert plan["bits_per_weight"] == pytest.approx(8 * plan["bytes"] / sum(t.n_elements for t in stored))
    text = run("quantize", source, out, "Q4_K_M", "--dry-run").stdout
    assert "bits per weight" in text
    assert "blk.1.attn_v.weight" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tensor-type", "attn_v"], "expected REGEX=TYPE"),
        (["--tensor-type", "attn_(v=Q8_0"], "is no regular expression"),
        (["--tensor-type", "attn_v=Q9_0"], "unknown type 'Q9_0'; there are: F32, F16, BF16, Q8_0"),
        (["--tensor-type", "nobody=Q8_0"], "matches no tensor that can be quantized; there are: token_embd.weight"),
        (["--threads", "0"], "0 is not in the range"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, run: Run, options: list[str], message: str) -> None:  # noqa: F811
    done = run("quantize", model(tmp_path / "in.gguf"), tmp_path / "out.gguf", "Q4_K_M", *options, code=2)
    assert message in done.stderr
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("source", ["folder", "text", "nothing"])
def test_what_is_no_gguf_is_refused(tmp_path: Path, run: Run, source: str) -> None:  # noqa: F811
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("not a model")
    done = run("quantize", tmp_path / source, tmp_path / "out.gguf", "Q8_0", code=2 if source == "folder" else 3)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_drafter_in_one_pass_and_in_two(tmp_path: Path, run: Run) -> None:  # noqa: F811
    """Checkpoint to Q4_K_M, and by way of BF16: the same file, and the line that runs it."""
    common = ["--target", PAIR / "target", "--for", "llama.cpp"]
    run("convert", PAIR / "drafter", *common, "--quant", "Q4_K_M", "-o", tmp_path / "pass.gguf")
    run("convert", PAIR / "drafter", *common, "--quant", "BF16", "-o", tmp_path / "bf16.gguf")
    done = run("quantize", tmp_path / "bf16.gguf", tmp_path / "two.gguf", "Q4_K_M")
    assert (tmp_path / "pass.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()
    assert f"-md {tmp_path / 'two.gguf'} --spec-type draft-dflash" in done.stdout


def test_options_reach_a_conversion(tmp_path: Path) -> None:
    path = tmp_path / "importance.gguf"
    columns = np.random.default_rng(1).random(256).astype(np.float32)
    path.write_bytes(gguf_bytes(entry(columns, [1.0], "blk.1.attn_k.weight")))
    options = TypeOptions(tensor_types=(("attn_k", "Q5_K"),))
    out = tmp_path / "out.gguf"
    job = ConvertJob(PAIR / "drafter", None, "lucebox", "Q4_K_M", out, importance=path, options=options, measure=True)
    report = convert(job)
    name = next(t.name for t in report.conversion.plan.tensors if "blk.1.attn_k.weight" in t.name)
    assert types_of(out)[name] == "Q5_K"
    source = report.conversion.published.checkpoint.tensors["layers.1.self_attn.k_proj.weight"]
    weights = read_rows(source, 0, source.shape[0]).astype(np.float32)
    assert np.array_equal(read_gguf(out).tensor_bytes(name), encode(weights, TYPES["Q5_K"], columns))
    assert report.errors[name].relative < 0.1
    assert "no entry for" in report.conversion.warnings[-1]
