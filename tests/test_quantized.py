"""Quantized checkpoints: each published scheme is read to the last bit, everything else is refused by name."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import DELETE, PAIR, changed, dflash_shapes, random_tensors, small_config, tiny_target, write_checkpoint
from quantized_sources import (
    SOURCES,
    Parts,
    Source,
    ct_config,
    fp8_config,
    modelopt_config,
    tensors_of,
    weights_args,
)

from convert_drafter.converters import ConvertJob, Problems, WrongInput, convert, inspect
from convert_drafter.converters.checkpoint import open_checkpoint, read_rows, row_ranges
from convert_drafter.converters.commands import show
from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.convert import prepare, read_published
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.errors import DrafterError
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.packed import E2M1, E4M3, E8M0, INT4_UP, INT8, INT8_UP
from convert_drafter.converters.quantized import expand
from convert_drafter.converters.verdict import Outcome

F, FP8, BF16 = np.float32, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16
SHAPES = {"a.weight": (130, 96), "b.weight": (8, 320), "c.weight": (1, 32), "a_norm.weight": (96,)}
BY_NAME = {source.name: source for source in SOURCES}
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)


def opened(folder: Path, config: Any, raw: Parts) -> Any:
    """A checkpoint of no drafter kind, its quantized tensors expanded."""
    checkpoint = open_checkpoint(write_checkpoint(folder, {"quantization_config": config}, raw))
    return expand(checkpoint, ConfigReader(checkpoint.config, str(checkpoint.config_path)))


def drafter(folder: Path, source: Source, **changes: Any) -> tuple[Path, Parts]:
    """A small DFlash drafter published so, and its weights."""
    config = small_config(quantization_config=dict(source.config), **changes)
    raw, weights = tensors_of(source, dflash_shapes(config))
    return write_checkpoint(folder, config, raw), weights


def problems(folder: Path, config: Any, raw: Parts) -> str:
    with pytest.raises(WrongInput) as caught:
        opened(folder, config, raw)
    return str(caught.value)


# --- what bytes stand for ---


def test_codes_of_every_byte() -> None:
    """OCP 8-bit floating point: E4M3; OCP Microscaling Formats 1.0: E2M1 and E8M0."""
    assert E4M3[[0x00, 0x01, 0x38, 0x7E, 0xB8, 0xFE], 0].tolist() == [0, 2.0**-9, 1, 448, -1, -448]
    assert np.isnan(E4M3[[0x7F, 0xFF], 0]).all() and np.isnan(E4M3).sum() == 2
    assert E2M1[0x72].tolist() == [1, 6] and E2M1[0xF9].tolist() == [-0.5, -6]
    assert np.signbit(E2M1[0x08]).tolist() == [True, False]
    assert INT4_UP[0xF0].tolist() == [-8, 7] and INT8_UP[[0, 128, 255], 0].tolist() == [-128, 0, 127]
    assert INT8[[0, 127, 128, 255], 0].tolist() == [0, 127, -128, -1]
    assert E8M0[[0, 127, 128, 254]].tolist() == [2.0**-127, 1, 2, 2.0**127] and np.isnan(E8M0[255])


def test_golden_nvfp4(tmp_path: Path) -> None:
    """By hand: two scales of one row, a global scale that compressed-tensors divides by and ModelOpt multiplies by."""
    codes = np.array([[0x21, 0x43, 0x65, 0x07, 0xA9, 0xCB, 0xED, 0x8F, *[0x22] * 8]], np.uint8)
    scale = np.array([[2, 0.5]], F).astype(FP8)
    wanted = [0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6, 0]
    parts = {"x.weight_packed": codes, "x.weight_scale": scale, "x.weight_global_scale": np.array([4], F)}
    tensors = opened(tmp_path / "ct", BY_NAME["nvfp4-pack-quantized"].config, parts).tensors
    assert read_rows(tensors["x.weight"], 0, 1).tolist() == [[*(w / 2 for w in wanted), *[0.125] * 16]]
    parts = {"x.weight": codes, "x.weight_scale": scale, "x.weight_scale_2": np.array(4, F)}
    tensors = opened(tmp_path / "modelopt", BY_NAME["ModelOpt NVFP4"].config, parts).tensors
    assert read_rows(tensors["x.weight"], 0, 1).tolist() == [[*(w * 8 for w in wanted), *[2] * 16]]


def test_golden_int4(tmp_path: Path) -> None:
    """By hand: nine columns take two words, the lowest four bits come first; a zero point is packed down the rows."""
    word = int("76543210", 16)
    packed = np.array([[word, 0xF], [0x88888888, 0x8]], np.uint32).view(np.int32)
    parts = {"x.weight_packed": packed, "x.weight_scale": np.array([[2], [0.5]], BF16)}
    parts |= {"x.weight_shape": np.array([2, 9]), "x.weight_zero_point": np.array([[0x79]], np.int32)}
    config = ct_config("pack-quantized", weights_args("int", 4, "channel", symmetric=False))
    rows = read_rows(opened(tmp_path, config, parts).tensors["x.weight"], 0, 2)
    assert rows.tolist() == [[2.0 * (n - 8 - 1) for n in range(8)] + [2.0 * (7 - 1)], [0.5] * 9]


# --- every scheme, whole and in parts ---


@each_source
def test_every_weight_is_exact(tmp_path: Path, source: Source) -> None:
    """Bit for bit, in f32, whatever rows are asked for and wherever blocks end."""
    raw, weights = tensors_of(source, SHAPES)
    checkpoint = opened(tmp_path, source.config, raw)
    assert list(checkpoint.tensors) == sorted(SHAPES)
    for name, header in checkpoint.tensors.items():
        wanted = weights[name]
        assert (header.shape, header.stored) == (SHAPES[name], source.title if name != "a_norm.weight" else "")
        if not header.stored:
            continue
        assert header.dtype == "F32" and read_rows(header, 0, header.rows).dtype == F
        assert header.n_bytes < wanted.nbytes
        for start, stop in [(0, header.rows), (0, 0), (header.rows - 1, header.rows), *row_ranges(header, 7 * 400)]:
            found = read_rows(header, start, stop)
            assert found.shape == wanted[start:stop].shape
            assert found.tobytes() == wanted[start:stop].tobytes(), (name, start, stop)
        with pytest.raises(IndexError):
            read_rows(header, 0, header.rows + 1)


def test_experts_in_blocks_keep_their_axes(tmp_path: Path) -> None:
    """gpt-oss' experts (experts, out, in), in torch order; transformers turns them for its own product."""
    rng = np.random.default_rng(1)
    blocks, scales = rng.integers(0, 256, (3, 4, 2, 16), np.uint8), rng.integers(110, 140, (3, 4, 2), np.uint8)
    parts = {"mlp.experts.gate_up_proj_blocks": blocks, "mlp.experts.gate_up_proj_scales": scales}
    header = opened(tmp_path, {"quant_method": "mxfp4"}, parts).tensors["mlp.experts.gate_up_proj"]
    assert header.shape == (3, 4, 64)
    wanted = (E2M1[blocks].reshape(3, 4, 2, 32) * np.exp2(scales.astype(F) - 127)[..., None]).reshape(3, 4, 64)
    np.testing.assert_array_equal(read_rows(header, 0, 3), wanted)
    np.testing.assert_array_equal(read_rows(header, 1, 2), wanted[1:2])


def test_groups_of_modules_may_differ(tmp_path: Path) -> None:
    """A mixed checkpoint: what the config states of several groups, each tensor's own shapes decide."""
    first, second = BY_NAME["INT4 groups"], BY_NAME["float-quantized channel"]
    groups = [next(iter(source.config["config_groups"].values()))["weights"] for source in (first, second)]
    config = ct_config("mixed-precision", *groups)
    config["config_groups"]["group_0"]["format"] = "pack-quantized"
    config["config_groups"]["group_1"]["format"] = "float-quantized"
    raw, weights = tensors_of(first, {"a.weight": (8, 64)})
    more, others = tensors_of(second, {"b.weight": (8, 64)})
    checkpoint = opened(tmp_path, config, raw | more)
    assert checkpoint.quantization == "compressed-tensors: FP8, INT4, 2 of 2 tensors"
    for name, wanted in (weights | others).items():
        assert read_rows(checkpoint.tensors[name], 0, 8).tobytes() == wanted.tobytes()


def test_modelopt_may_mix_its_own(tmp_path: Path) -> None:
    layers = {"a": {"quant_algo": "NVFP4", "group_size": 16}, "b": {"quant_algo": "FP8"}}
    raw, _ = tensors_of(BY_NAME["ModelOpt NVFP4"], {"a.weight": (8, 64)})
    more, _ = tensors_of(BY_NAME["ModelOpt FP8"], {"b.weight": (8, 64)})
    config = modelopt_config("MIXED_PRECISION", quantized_layers=layers)
    tensors = opened(tmp_path, config, raw | more).tensors
    assert {name: header.stored for name, header in tensors.items()} == {"a.weight": "NVFP4", "b.weight": "FP8"}


def test_what_modelopt_writes_beside_the_config_is_read(tmp_path: Path) -> None:
    raw, weights = tensors_of(BY_NAME["ModelOpt FP8"], {"a.weight": (8, 64)})
    folder = write_checkpoint(tmp_path, {}, raw)
    stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (folder / "hf_quant_config.json").write_text(json.dumps(stated))
    checkpoint = open_checkpoint(folder)
    reader = ConfigReader(checkpoint.config, str(checkpoint.config_path))
    tensor = expand(checkpoint, reader).tensors["a.weight"]
    assert read_rows(tensor, 0, 8).tobytes() == weights["a.weight"].tobytes()
    assert reader.origins["quantization"] == "hf_quant_config.json"
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "W4A8_AWQ"}}')
    with pytest.raises(WrongInput, match=r"hf_quant_config\.json: quantization\.quant_algo: ModelOpt's W4A8_AWQ"):
        expand(checkpoint, reader)


@pytest.mark.parametrize("value", [None, {}])
def test_no_quantization_is_no_objection(tmp_path: Path, value: Any) -> None:
    config = small_config(quantization_config=value, quantization=value)
    folder = write_checkpoint(tmp_path, config, random_tensors(dflash_shapes(config)))
    published = read_published(folder)
    assert published.checkpoint.quantization == "" and not published.reader.unread()


def test_lists_of_modules_decide_nothing(tmp_path: Path) -> None:
    """Excepted or not, and whatever their patterns say: a plain tensor is plain, one with a scale is quantized."""
    source = BY_NAME["fp8 blocks"]
    raw, _ = tensors_of(source, {"a.weight": (8, 64)})
    plain = random_tensors({"b.weight": (8, 64), "b.bias": (8,)})
    config = {**source.config, "modules_to_not_convert": ["a", "re:.*b.*"]}
    tensors = opened(tmp_path, config, raw | plain).tensors
    assert [tensors[name].stored for name in ("a.weight", "b.bias", "b.weight")] == ["FP8", "", ""]
    np.testing.assert_array_equal(read_rows(tensors["b.weight"], 0, 8), plain["b.weight"])


# --- memory ---


def test_reading_some_rows_never_holds_the_tensor(tmp_path: Path) -> None:
    """Of 16 million weights, in each scheme's own way of spreading scales."""
    shape = (8192, 2048)
    codes = np.full(shape, 0.5, F).astype(FP8)
    grids = [((1, 1), [8192, 2048]), ((64, 16), [128, 128]), ((8192, 1), [1, 2048])]
    for number, (grid, block) in enumerate(grids):
        parts = {"x.weight": codes, "x.weight_scale_inv": np.ones(grid, F)}
        header = opened(tmp_path / str(number), fp8_config(block), parts).tensors["x.weight"]
        tracemalloc.start()
        for start in (0, 8000):
            assert (read_rows(header, start, start + 64) == 0.5).all()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 << 20


# --- a whole drafter ---


@each_source
def test_a_drafter_converts_like_its_weights(tmp_path: Path, source: Source) -> None:
    """The same bytes as from an F32 checkpoint of what the quantized one stands for, and no key that nobody reads."""
    folder, weights = drafter(tmp_path / "quantized", source)
    plain = write_checkpoint(tmp_path / "plain", small_config(), weights)
    files = []
    for n, path in enumerate((folder, plain)):
        report = convert(ConvertJob(path, None, "lucebox", "Q8_0", tmp_path / f"{n}.gguf", strict=True))
        assert report.conversion.warnings == ()
        files.append(read_gguf(report.out))
    assert list(files[0].tensors) == list(files[1].tensors)
    for name in files[0].tensors:
        assert files[0].tensor_bytes(name).tobytes() == files[1].tensor_bytes(name).tobytes()


def test_a_file_made_from_it_is_found_right(tmp_path: Path) -> None:
    """Structure, every fact and every tensor, against the quantized source."""
    changes = {"vocab_size": 2048, "dflash_config.mask_token_id": 250}
    folder, _ = drafter(tmp_path / "drafter", BY_NAME["fp8 blocks"], **changes)
    target = tiny_target(
        tmp_path / "target", architectures=["Qwen3ForCausalLM"], model_type="qwen3", hidden_size=64, num_hidden_layers=6
    )
    out = tmp_path / "out.gguf"
    convert(ConvertJob(folder, target, "llama.cpp", "Q8_0", out))
    structure, *_ = doctor(out, target, folder)
    assert (structure.outcome, structure.details) == (Outcome.PASS, ())


def test_the_reports_say_what_the_source_was(tmp_path: Path) -> None:
    source = BY_NAME["ModelOpt NVFP4"]
    config = small_config(quantization_config=source.config)
    raw, _ = tensors_of(source, dflash_shapes(config))
    for name in ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj"):
        raw |= {f"{name}.input_scale": np.array(1, F), f"{name}.k_scale": np.array(1, F)}
    folder = write_checkpoint(tmp_path / "drafter", config, raw)
    text = "modelopt: NVFP4, 15 of 25 tensors"

    found = inspect(folder)
    assert ("quantization", text, "quantization_config") in [(f.name, f.value, f.origin) for f in found.facts]
    types = {line.name: line.type for line in found.tensors}
    assert (types["fc.weight"], types["norm.weight"]) == ("NVFP4", "BF16")
    assert found.warnings == () and "quantization" in show.inspection(found)

    report = convert(ConvertJob(folder, None, "lucebox", "F16", tmp_path / "out.gguf"))
    shown = show.report(report)
    assert f"note: the source is quantized ({text})" in shown
    assert "left out layers.0.mlp.up_proj.input_scale and 1 more: it scales activations" in shown
    assert "left out layers.0.mlp.up_proj.k_scale and 1 more: it scales the key-value cache" in shown
    assert show.report_json(report)["quantization"] == text
    assert read_gguf(report.out).keys["drafter.source.quantization"].value == text


def test_nothing_of_it_is_quantized(tmp_path: Path) -> None:
    """A config may state what was done to the target it came with."""
    config = small_config(quantization_config=fp8_config([128, 128]))
    folder = write_checkpoint(tmp_path, config, random_tensors(dflash_shapes(config)))
    published = read_published(folder)
    assert published.checkpoint.quantization == "fp8: nothing, 0 of 25 tensors"
    assert not published.match().problems and not published.reader.unread()


def test_a_scale_that_is_no_number_is_found_when_it_is_read(tmp_path: Path) -> None:
    source = BY_NAME["fp8 blocks"]
    config = small_config(quantization_config=source.config)
    raw, _ = tensors_of(source, dflash_shapes(config))
    raw["layers.1.mlp.down_proj.weight_scale_inv"][:] = np.nan
    folder = write_checkpoint(tmp_path / "drafter", config, raw)
    with pytest.raises(WrongInput, match=r"layers\.1\.mlp\.down_proj\.weight: row 0: found nan.*the file is damaged"):
        convert(ConvertJob(folder, None, "lucebox", "Q8_0", tmp_path / "out.gguf"))


# --- what does not fit ---

FP8_BLOCK, INT4, NVFP4 = BY_NAME["fp8 blocks"], BY_NAME["INT4 groups"], BY_NAME["nvfp4-pack-quantized"]
ASYMMETRIC, CT_FP8, MXFP4 = (
    BY_NAME["INT4 asymmetric groups"],
    BY_NAME["float-quantized channel"],
    BY_NAME["mxfp4 blocks"],
)
Edit = Callable[[Parts], Any]


def put(name: str, array: np.ndarray) -> Edit:
    return lambda parts: parts.update({f"x.weight{name}": array})


def drop(name: str) -> Edit:
    return lambda parts: parts.pop(f"x.weight{name}")


WRONG: list[tuple[str, Source, Edit, list[str]]] = [
    ("scale missing", FP8_BLOCK, drop("_scale_inv"), ["x.weight (F8_E4M3): missing x.weight_scale_inv"]),
    ("two names for a scale", BY_NAME["fp8 per tensor"], drop("_scale_inv"),
     ["_scale_inv or x.weight_scale, its scale"]),
    ("another method's scale", CT_FP8, lambda p: put("_scale_inv", p.pop("x.weight_scale"))(p),
     ["x.weight (F8_E4M3): missing x.weight_scale", "x.weight_scale_inv (BF16)"]),
    ("weight missing", FP8_BLOCK, drop(""), ["x.weight_scale_inv (F32): there is no x.weight with it in fp8"]),
    ("codes missing", INT4, drop("_packed"), ["x.weight_scale (BF16): there is no x.weight", "x.weight_shape (I64)"]),
    ("plain weight with a scale", FP8_BLOCK, put("", np.zeros((96, 64), BF16)),
     ["x.weight_scale_inv (F32): BF16 x.weight has no such part in fp8"]),
    ("scale of the wrong shape", FP8_BLOCK, put("_scale_inv", np.ones((2, 1), F)),
     ["x.weight_scale_inv: found shape [2, 1] for [96, 64] weights, expected [1, 1]"]),
    ("scale turned", CT_FP8, put("_scale", np.ones((1, 96), BF16)), ["found shape [1, 96]", "expected [96, 1]"]),
    ("scale of three axes", CT_FP8, put("_scale", np.ones((96, 1, 1), BF16)), ["found shape [96, 1, 1]"]),
    ("scale of integers", FP8_BLOCK, put("_scale_inv", np.ones((1, 1), np.int64)),
     ["x.weight_scale_inv: found dtype I64, expected F32 or BF16 or F16 or F8_E8M0"]),
    ("groups that do not divide", BY_NAME["float-quantized group"], put("", np.zeros((96, 60), FP8)),
     ["x.weight_scale: found shape [96, 2] for [96, 60]"]),
    ("three axes", FP8_BLOCK, put("", np.zeros((2, 96, 64), FP8)), ["x.weight: found shape [2, 96, 64]", "columns]"]),
    ("no weights", FP8_BLOCK, put("", np.zeros((0, 64), FP8)), ["x.weight: found shape [0, 64]"]),
    ("scale of scales missing", NVFP4, drop("_global_scale"),
     ["x.weight_packed (U8): missing x.weight_global_scale, the scale of its scales"]),
    ("two scales of scales", NVFP4, put("_global_scale", np.ones(2, F)),
     ["_global_scale: found F32 [2], expected one"]),
    ("scale of scales in BF16", NVFP4, put("_global_scale", np.ones(1, BF16)), ["found BF16 [1], expected one F32"]),
    ("a scale of MXFP4 in NVFP4", NVFP4, put("_scale", np.ones((96, 4), np.uint8)),
     ["found dtype U8, expected F8_E4M3"]),
    ("blocks of another size", MXFP4, put("_blocks", np.zeros((96, 4, 8), np.uint8)),
     ["found shape [96, 4, 8]", "16]"]),
    ("scales of other blocks", MXFP4, put("_scales", np.ones((96, 3), np.uint8)), ["[96, 3]", "expected [96, 2]"]),
    ("shape missing", INT4, drop("_shape"), ["x.weight_packed (I32): missing x.weight_shape, its shape"]),
    ("shape of three numbers", INT4, put("_shape", np.array([96, 64, 1])), ["x.weight_shape: found I64 [3]"]),
    ("shape that does not hold", INT4, put("_shape", np.array([96, 640])),
     ["x.weight_shape [96, 640] with x.weight_packed [96, 8]", "in 4 bits a weight"]),
    ("shape below zero", INT4, put("_shape", np.array([96, -64])), ["x.weight_shape [96, -64]"]),
    ("shape beyond everything", INT4, put("_shape", np.array([96, 2**62])),
     ["x.weight_shape [96, 4611686018427387904]"]),
    ("zero points missing", ASYMMETRIC, drop("_zero_point"), ["x.weight_scale: missing the zero points beside it"]),
    ("zero points of another shape", ASYMMETRIC, put("_zero_point", np.zeros((96, 2), np.int32)),
     ["x.weight_zero_point: found shape [96, 2], expected [12, 2]"]),
    ("zero points in F32", ASYMMETRIC, put("_zero_point", np.zeros((12, 2), F)),
     ["found dtype F32, expected I32 or I8"]),
    ("actorder", INT4, put("_g_idx", np.zeros(64, np.int32)),
     ["x.weight_g_idx", "actorder", "the unquantized release"]),
    ("AWQ's scale", BY_NAME["ModelOpt NVFP4"], lambda p: p.update({"x.pre_quant_scale": np.ones(64, BF16)}),
     ["x.pre_quant_scale: its inputs are scaled first (AWQ, SmoothQuant)"]),
    ("sparse", CT_FP8, put("_bitmask", np.zeros((96, 8), np.uint8)), ["x.weight_bitmask: it is sparse"]),
    ("twice", INT4, put("", np.zeros((96, 64), BF16)), ["x.weight: is there twice, also as x.weight_packed"]),
    ("another scheme's codes", CT_FP8, put("_packed", np.zeros((96, 8), np.int32)), ["x.weight_packed (I32)"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "edit", "parts"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, source: Source, edit: Edit, parts: list[str]) -> None:
    """T-25: and nothing is allocated by what a header promises."""
    raw, _ = tensors_of(source, {"x.weight": (96, 64)})
    edit(raw)
    text = problems(tmp_path, source.config, raw)
    for part in (str(tmp_path), *parts):
        assert part in text


def test_every_problem_at_once(tmp_path: Path) -> None:
    raw, _ = tensors_of(FP8_BLOCK, {"x.weight": (96, 64), "y.weight": (96, 64), "z.weight": (96, 64)})
    del raw["x.weight_scale_inv"], raw["y.weight"]
    with pytest.raises(Problems) as caught:
        opened(tmp_path, FP8_BLOCK.config, raw)
    assert [problem.split()[0] for problem in caught.value.problems] == ["x.weight", "y.weight_scale_inv"]


@pytest.mark.parametrize(
    ("source", "lost", "mask"),
    [
        (FP8_BLOCK, "weight_scale_inv", "rotary_emb.extra.weight"),
        (FP8_BLOCK, "weight", "rotary_emb.extra.weight_scale_inv"),
        (FP8_BLOCK, "weight", "rotary_*"),
        (INT4, "weight_scale", "rotary_emb.extra.weight_packed"),
        (INT4, "weight_shape", "rotary_emb.extra.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incomplete_tensor_may_be_left_out(tmp_path: Path, source: Source, lost: str, mask: str) -> None:
    """By its own name or by a part's; the file that is made then is the checkpoint's, and says what was left out."""
    config = small_config(quantization_config=dict(source.config), vocab_size=2048)
    config["dflash_config"]["mask_token_id"] = 250
    raw, _ = tensors_of(source, dflash_shapes(config) | {"rotary_emb.extra.weight": (96, 64)})
    raw.pop(f"rotary_emb.extra.{lost}")
    folder, out = write_checkpoint(tmp_path / "drafter", config, raw), tmp_path / "out.gguf"
    with pytest.raises(Problems, match=r"rotary_emb\.extra"):
        prepare(ConvertJob(folder, None, "lucebox", "F16", out))
    report = convert(ConvertJob(folder, None, "lucebox", "F16", out, ignore=(mask,)))
    dropped = {drop.source: drop.reason for drop in report.conversion.plan.dropped}
    assert any(reason == f"--ignore-tensor '{mask}'" for reason in dropped.values()), dropped
    assert all("rotary_emb.extra" in name for name in dropped)
    assert not any("extra" in name for name in read_gguf(out).tensors)
    structure, *_ = doctor(out, None, folder)
    assert structure.outcome is Outcome.PASS, structure.details


def test_a_pattern_that_matches_something_else_does_not_help(tmp_path: Path) -> None:
    raw, _ = tensors_of(FP8_BLOCK, {"x.weight": (96, 64)})
    del raw["x.weight_scale_inv"]
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, {"quantization_config": FP8_BLOCK.config}, raw))
    with pytest.raises(Problems, match=r"x\.weight"):
        expand(checkpoint, ConfigReader(checkpoint.config, str(checkpoint.config_path)), ("y.*",))


def test_two_groups_that_both_fit_are_not_chosen_between(tmp_path: Path) -> None:
    """Two rows of blocks: of 100 rows and of 128."""
    groups = [weights_args("float", 8, "block", block_structure=[rows, 64]) for rows in (100, 128)]
    text = problems(
        tmp_path,
        ct_config("float-quantized", *groups),
        {"x.weight": np.zeros((130, 64), FP8), "x.weight_scale": np.ones((2, 1), F)},
    )
    assert (
        "x.weight_scale: found shape [2, 1] for [130, 64] weights, expected one of the config's groups to fit" in text
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, FP8, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("stated", [DELETE, fp8_config([128, 128])])
def test_quantized_tensors_that_nothing_is_said_of(tmp_path: Path, dtype: Any, stated: Any) -> None:
    config = small_config(quantization_config=stated)
    tensors = random_tensors(dflash_shapes(config))
    tensors["fc.weight"] = np.zeros(tensors["fc.weight"].shape, dtype)
    source = write_checkpoint(tmp_path / "drafter", config, tensors)
    expected = r"fc\.weight.*(expected one of F32.*use the unquantized release|missing fc\.weight_scale_inv)"
    with pytest.raises(Problems, match=expected):
        prepare(ConvertJob(source, None, "lucebox", "F32", tmp_path / "out.gguf"))


# --- configs ---

REFUSED: list[tuple[Any, list[str]]] = [
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, ["gptq"]),
    ({"quant_method": "awq", "bits": 4}, ["awq"]),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes"]),
    ({"quant_method": "quark"}, ["quark"]),
    ({"quant_method": "fbgemm_fp8"}, ["fbgemm_fp8"]),
    ({"quant_method": "mxfp8"}, ["mxfp8"]),
    ({"quant_method": ["fp8"]}, ["['fp8']"]),
    ({"bits": 8}, ["8 bits"]),
    ("nvfp4", ["nvfp4"]),
    ({"quant_algo": "W4A8_AWQ"}, ["quant_algo", "ModelOpt's W4A8_AWQ", "NVFP4"]),
    (modelopt_config("NVFP4_AWQ"), ["ModelOpt's NVFP4_AWQ"]),
    (modelopt_config("MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "W4A16_AWQ"}}), ["W4A16_AWQ"]),
    (modelopt_config("MIXED_PRECISION"), ["ModelOpt's MIXED_PRECISION"]),
    ({"quant_method": "modelopt"}, ["quant_algo: missing"]),
    ({**fp8_config([128, 128]), "fmt": "e5m2"}, ["fmt: found 'e5m2', expected 'e4m3'"]),
    (fp8_config([128]), ["weight_block_size: found (128,), expected two whole numbers"]),
    (fp8_config([128, 0]), ["weight_block_size"]),
    ({**fp8_config(), "weight_block_size": 128}, ["weight_block_size: found 128, expected an array"]),
    (ct_config("pack-quantized", weights_args("int", 4, "group")), ["group_size: missing"]),
    (ct_config("marlin-24", weights_args("int", 4, "channel")),
     ["format: compressed-tensors' marlin-24", "pack-quantized"]),
    (ct_config("mxfp8-quantized", weights_args("float", 8, "channel")), ["mxfp8-quantized"]),
    ({"quant_method": "compressed-tensors"}, ["format: missing"]),
    (ct_config("mixed-precision", weights_args("int", 4, "channel")), ["compressed-tensors' mixed-precision"]),
    (ct_config("pack-quantized", weights_args("int", 3, "channel")),
     ["group_0.weights.num_bits: found 3, expected 4 or 8"]),
    (ct_config("pack-quantized", weights_args("int", 4, "attn_head")), ["weights.strategy: found 'attn_head'"]),
    (ct_config("pack-quantized", weights_args("int", 4, "group", group_size=-1)), ["weights.group_size: found -1"]),
    (ct_config("float-quantized", weights_args("float", 8, "block")), ["weights.block_structure: found None"]),
    (ct_config("float-quantized", sparsity_config={"format": "sparse-24-bitmask"}), ["sparsity_config", "24-bitmask"]),
    (ct_config("pack-quantized", transform_config={"config_groups": {"R1": {}}}), ["transform_config", "R1"]),
]  # fmt: skip
REFUSED_IDS = [str(row[0])[:60] for row in REFUSED]


@pytest.mark.parametrize(("config", "parts"), REFUSED, ids=REFUSED_IDS)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, config: Any, parts: list[str]) -> None:
    """G-27."""
    text = problems(tmp_path, config, random_tensors({"x.weight": (96, 64)}))
    for part in (f"{tmp_path / 'config.json'}: quantization_config", "expected", *parts):
        assert part in text


@pytest.mark.parametrize("config", [{"quant_method": "gptq"}, {"bits": 8}, "nvfp4", {"quant_algo": "W4A8_AWQ"}])
def test_the_advice_names_what_would_be_read(tmp_path: Path, config: Any) -> None:
    text = problems(tmp_path, config, random_tensors({"x.weight": (96, 64)}))
    assert "the unquantized release" in text
    assert any(name in text for name in ("compressed-tensors", "W4A16_NVFP4"))


@pytest.mark.parametrize(
    ("value", "part"), [({"group_size": 64, "bits": 4}, "4 bits, MLX"), ("fp8", "fp8"), ({"quant_method": "x"}, "(x)")]
)
def test_mlx_is_refused_by_name(tmp_path: Path, value: Any, part: str) -> None:
    """G-27."""
    config = small_config(quantization=value)
    folder = write_checkpoint(tmp_path, config, random_tensors(dflash_shapes(config)))
    with pytest.raises(WrongInput, match=r"config\.json: quantization: a quantized checkpoint") as caught:
        read_published(folder)
    assert part in str(caught.value)


def test_the_user_may_overrule_the_config(tmp_path: Path) -> None:
    """The pair's plain weights under a config that says gptq, as copied from a target's."""
    config = {
        **json.loads((PAIR / "drafter" / "config.json").read_text()),
        "quantization_config": {"quant_method": "gptq"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(PAIR / "drafter" / "model.safetensors")
    with pytest.raises(WrongInput, match="gptq"):
        read_published(tmp_path)
    assert read_published(tmp_path, settings={"quantization_config": "null"}).checkpoint.quantization == ""


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.sampled_from(["group", "block", "FP8", "e4m3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["weights", "format", "a"]), inner),
    max_leaves=4,
)
PATHS = (
    "weight_block_size", "fmt", "config_groups", "config_groups.group_0", "config_groups.group_0.weights", "format",
    "config_groups.group_0.weights.strategy", "config_groups.group_0.weights.num_bits", "quantized_layers",
    "config_groups.group_0.weights.group_size", "config_groups.group_0.weights.block_structure", "sparsity_config",
    "quant_method", "quant_algo", "transform_config", "config_groups.group_0.weights.symmetric",
)  # fmt: skip


@given(source=st.sampled_from(SOURCES), path=st.sampled_from(PATHS), value=ANY, whole=st.booleans())
def test_any_config_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, source: Source, path: str, value: Any, whole: bool
) -> None:
    """No traceback, whatever stands there."""
    raw, _ = tensors_of(source, {"x.weight": (32, 64)})
    config = value if whole else changed(source.config, {path: value})
    try:
        tensors = opened(tmp_path_factory.mktemp("any"), config, raw).tensors
    except DrafterError:
        return
    for header in tensors.values():
        read_rows(header, 0, header.rows)
