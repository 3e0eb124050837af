"""Quantized checkpoints against the libraries that write and read them: transformers, compressed-tensors, torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from published import DTYPE_NAMES, PAIR, dflash_shapes, small_config, write_checkpoint
from quantized_sources import SOURCES, Source, ct_config, fp8_config, tensors_of, weights_args

from convert_drafter.converters import ConvertJob, convert
from convert_drafter.converters.checkpoint import open_checkpoint, read_rows
from convert_drafter.converters.cli import main
from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.packed import E4M3, E8M0
from convert_drafter.converters.quantized import expand
from convert_drafter.converters.roles import Role

pytestmark = pytest.mark.engine
torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

SHAPE = (96, 64)
CT = [source for source in SOURCES if source.config.get("quant_method") == "compressed-tensors"]
TORCH = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "BF16": torch.bfloat16}


def as_torch(array: np.ndarray) -> torch.Tensor:
    """Also of the types that numpy has from ml_dtypes."""
    kind = TORCH.get(DTYPE_NAMES[array.dtype.name])
    if kind is None:
        return torch.from_numpy(np.array(array))
    bits = torch.from_numpy(np.array(array).view(np.uint8 if array.itemsize == 1 else np.int16))
    return bits.view(kind)


def read(folder: Path, config: Any, parts: dict[str, torch.Tensor]) -> np.ndarray:
    """The weights of tensor `x`, f32, from a file that safetensors wrote."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file({f"x.{name}": tensor.contiguous() for name, tensor in parts.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    tensor = expand(checkpoint, ConfigReader(checkpoint.config, "config")).tensors["x.weight"]
    return read_rows(tensor, 0, tensor.rows)


def scheme_of(config: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = next(iter(config["config_groups"].values()))["weights"]
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))


def decompressed(form: str, scheme: Any, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    from compressed_tensors.compressors import BaseCompressor

    weight: torch.Tensor = BaseCompressor.get_value_from_registry(form).decompress(dict(parts), scheme)["weight"]
    return weight


def four_bits_in_f32(scheme: Any, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What decompress does, which has BF16 written into it for these two formats."""
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed, scale = parts["weight_packed"], parts["weight_scale"]
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1]).float()
    scale = decompress_mx_scale(scale) if scale.dtype == torch.uint8 else scale
    second = parts.get("weight_global_scale")
    weights: torch.Tensor = dequantize(codes, scale.float(), None, scheme.weights, torch.float32, second)
    return weights


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Ours rounded to their type, signs of zeros included."""
    return ours.to(theirs.dtype).view(torch.uint8).equal(theirs.contiguous().view(torch.uint8))


def test_torch_has_the_same_eight_bit_floats() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for table, kind in ((E4M3[:, 0], torch.float8_e4m3fn), (E8M0, torch.float8_e8m0fnu)):
        np.testing.assert_array_equal(table, codes.view(kind).float().numpy(), strict=True)


@pytest.mark.parametrize("source", CT, ids=lambda s: s.name)
def test_compressed_tensors_reads_the_same(tmp_path: Path, source: Source) -> None:
    """Bit for bit with its scales in f32. As published it rounds what we keep to the scales' type, or BF16, no more."""
    raw, _ = tensors_of(source, {"x.weight": SHAPE})
    parts = {name.removeprefix("x."): as_torch(array) for name, array in raw.items()}
    ours = torch.from_numpy(read(tmp_path, source.config, parts))
    form, scheme = source.config["format"], scheme_of(source.config)
    published = decompressed(form, scheme, parts)
    assert published.shape == SHAPE
    assert same_bits(ours, published)
    if "fp4" in form:
        exact = four_bits_in_f32(scheme, parts)
    else:
        exact = decompressed(form, scheme, {**parts, "weight_scale": parts["weight_scale"].float()})
    assert exact.dtype == torch.float32 and same_bits(ours, exact)


WRITTEN = [
    ("float-quantized", weights_args("float", 8, "channel")),
    ("float-quantized", weights_args("float", 8, "block", block_structure=[40, 48])),
    ("int-quantized", weights_args("int", 8, "channel")),
    ("pack-quantized", weights_args("int", 4, "group", group_size=32)),
    ("pack-quantized", weights_args("int", 4, "group", group_size=32, symmetric=False)),
    ("pack-quantized", weights_args("int", 8, "channel", symmetric=False)),
    ("nvfp4-pack-quantized", weights_args("float", 4, "tensor_group", group_size=16)),
    ("mxfp4-pack-quantized", weights_args("float", 4, "group", group_size=32, scale_dtype="torch.uint8")),
]


@pytest.mark.parametrize(("form", "args"), WRITTEN, ids=[f"{f} {a['strategy']} {a['symmetric']}" for f, a in WRITTEN])
def test_what_compressed_tensors_writes_is_read(tmp_path: Path, form: str, args: dict[str, Any]) -> None:
    """Weights that it quantized itself, its names, dtypes and shapes: exactly what it makes of them again."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    config = ct_config(form, args)
    scheme = scheme_of(config)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    state: dict[str, torch.Tensor] = {"weight": weight}
    lowest, highest = extremes(weight, args)
    if args["strategy"] == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
    scale, zero = calculate_qparams(lowest, highest, scheme.weights, state.get("weight_global_scale"))
    state |= {"weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(form)
    parts = compressor.compress(state, scheme)
    ours = torch.from_numpy(read(tmp_path, config, parts))
    assert same_bits(ours, decompressed(form, scheme, parts))
    assert (weight - ours).abs().mean() < 0.15 * weight.abs().mean()


def extremes(weight: torch.Tensor, args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest weight of everything that shares a scale."""
    if args["strategy"] == "block":
        tall, wide = args["block_structure"]
        grid = [list(rows.split(wide, 1)) for rows in weight.split(tall, 0)]
        return tuple(torch.tensor([[float(pick(b)) for b in row] for row in grid]) for pick in (torch.min, torch.max))  # type: ignore[return-value]
    groups = weight.unflatten(1, (-1, args["group_size"] or weight.shape[1]))
    return groups.amin(-1), groups.amax(-1)


def test_transformers_reads_the_same_fp8(tmp_path: Path) -> None:
    """Whole blocks, which are all it takes; in f32 bit for bit."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for name in ("fp8 blocks, BF16 scales", "fp8 blocks", "fp8 per tensor"):
        source = next(source for source in SOURCES if source.name == name)
        raw, _ = tensors_of(source, {"x.weight": (128, 256)})
        parts = {part.removeprefix("x."): as_torch(array) for part, array in raw.items()}
        ours = read(tmp_path, source.config, parts)
        scale = parts["weight_scale_inv"].reshape(parts["weight_scale_inv"].shape or (1, 1))
        theirs = Fp8Dequantize(None)._dequantize_one(parts["weight"], scale, torch.float32)
        assert theirs.numpy().tobytes() == ours.tobytes()


def test_transformers_reads_the_same_mxfp4(tmp_path: Path) -> None:
    """All codes under all exponents of finite numbers; it turns (experts, out, in) for its own product."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(1)
    blocks = torch.from_numpy(rng.integers(0, 256, (2, 125, 8, 16), np.uint8))
    scales = torch.arange(0, 2000, dtype=torch.int32).remainder(250).to(torch.uint8).reshape(2, 125, 8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).contiguous()
    folder = tmp_path / "experts"
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    save_file({"x.up_blocks": blocks, "x.up_scales": scales}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    tensor = expand(checkpoint, ConfigReader(checkpoint.config, "config")).tensors["x.up"]
    assert read_rows(tensor, 0, 2).tobytes() == theirs.numpy().tobytes()


# --- the reference drafter and a whole verification ---


@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_the_reference_gets_the_weights(tmp_path: Path, source: Source) -> None:
    from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, reference

    config = small_config(quantization_config=source.config)
    raw, wanted = tensors_of(source, dflash_shapes(config))
    published = read_published(write_checkpoint(tmp_path, config, raw))
    weights = checkpoint_weights(published)
    np.testing.assert_array_equal(weights[Role.FUSION, None], wanted["fc.weight"], strict=True)
    reference(published.spec, weights)


def test_a_quantized_drafter_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained pair's drafter in FP8 blocks: converted, held against itself, and as good as before."""
    source = tmp_path / "fp8"
    config = json.loads((PAIR / "drafter" / "config.json").read_text())
    tensors: dict[str, np.ndarray] = {}
    for name, header in open_checkpoint(PAIR / "drafter").tensors.items():
        array = read_rows(header, 0, header.rows)
        tensors |= in_blocks(name, array.astype(np.float32)) if array.ndim == 2 else {name: array}
    write_checkpoint(source, {**config, "quantization_config": fp8_config([128, 128])}, tensors)
    out = tmp_path / "out.gguf"
    convert(ConvertJob(source, PAIR / "target", "llama.cpp", "Q8_0", out))
    words = ["--target", PAIR / "target", "--source", source, "--prompts", PAIR / "prompts.jsonl"]
    few = ["--max-prompts", "6", "--new-tokens", "48", "--contexts", "24", "--threads", "1"]
    with pytest.raises(SystemExit) as exit_:
        main(["verify", str(out), *map(str, words), *few])
    text = capsys.readouterr().out
    assert exit_.value.code == 0, text
    assert "✓ structure" in text and "✓ same drafts" in text


def in_blocks(name: str, weights: np.ndarray, side: int = 128) -> dict[str, np.ndarray]:
    """Weights as DeepSeek publishes them: each block's largest is 448."""
    rows, columns = weights.shape
    scale = np.zeros((-(-rows // side), -(-columns // side)), np.float32)
    codes = np.zeros(weights.shape, ml_dtypes.float8_e4m3fn)
    for i, j in np.ndindex(scale.shape):
        block = np.s_[i * side : (i + 1) * side, j * side : (j + 1) * side]
        scale[i, j] = np.abs(weights[block]).max() / 448
        codes[block] = (weights[block] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}
