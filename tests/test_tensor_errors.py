"""A file against its checkpoint: every fact and every tensor, and what a wrong tensor is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from planted_faults import Draft, extra
from published import PAIR, dflash_shapes, random_tensors, small_config, tiny_target, write_checkpoint

from convert_drafter.converters import ConvertJob, RedialectJob, WrongInput, convert, redialect
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.tensor_errors import GROUP_LIMIT, TENSOR_LIMIT
from convert_drafter.converters.verdict import Gate, Outcome
from convert_drafter.quant import TYPES, dequantize, quantize

Edit = Callable[[Draft], Any]
RECORDED = "drafter.source.settings"
QWEN = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 6, "eos_token_id": 2046}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.fixture(scope="module")
def made(folder: Path) -> Callable[..., Path]:
    """The pair's drafter in a recipe, converted once with these settings; None leaves out what was recorded of them."""

    def make(recipe: str = "F32", record: bool = True, **settings: str) -> Path:
        out = folder / f"{recipe}-{record}-{abs(hash(tuple(settings.items())))}.gguf"
        if not out.exists():
            convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", recipe, out, settings=settings))
            if not record:
                draft = Draft.of(out)
                del draft.keys[RECORDED]
                draft.write(out)
        return out

    return make


def against(path: Path, source: Path = PAIR / "drafter", target: Path | None = None) -> Gate:
    return doctor(path, target, source)[0]


def spoilt(made: Path, out: Path, edit: Edit) -> Path:
    draft = Draft.of(made)
    edit(draft)
    return draft.write(out / "spoilt.gguf")


# --- facts ---

SETTINGS = {
    "A1-7 theta": ("rope_parameters.rope_theta", "1000000", "freq_base: found 1000000.0, the checkpoint has 10000000"),
    "T-53 mask": ("dflash_config.mask_token_id", "2044", "mask_token_id: found 2044, the checkpoint has 2047"),
    "T-51 order": ("dflash_config.target_layer_ids", "[4, 2, 0]", "found (4, 2, 0), the checkpoint has (0, 2, 4)"),
    "T-55 window": ("layer_types", '["full_attention", "full_attention"]', "window: found none, the checkpoint has 48"),
    "T-54 block": ("dflash_config.block_size", "16", "block_size: found 16, the checkpoint has 8"),
    "T-58 epsilon": ("rms_norm_eps", "1e-05", "rms_epsilon: found 1e-05, the checkpoint has 1e-06"),
    "causal": ("is_causal", "true", "attention.causal: found True, the checkpoint has False"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fact_that_is_not_the_checkpoints(made: Callable[..., Path], name: str) -> None:
    key, text, says = SETTINGS[name]
    gate = against(made("Q8_0", record=False, **{key: text}))
    assert gate.outcome is Outcome.FAIL
    assert any(says in line for line in gate.details), gate.details


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_set_is_the_users(made: Callable[..., Path], name: str) -> None:
    """Recorded in the file, so it is applied to the checkpoint and told; where that states another, it is a doubt."""
    key, text, _ = SETTINGS[name]
    gate = against(made("Q8_0", **{key: text}))
    *doubts, note = gate.details
    assert gate.outcome is Outcome.UNDECIDED
    assert doubts
    for doubt in doubts:
        assert ": the checkpoint says " in doubt and doubt.endswith(", as the user set it when the file was made")
    assert note == f"note: {RECORDED}: {key}={text}: set by the user when the file was made, and applied here"


def test_a_setting_the_checkpoint_needed_is_no_doubt(made: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "drafter"
    shutil.copytree(PAIR / "drafter", source)
    config = json.loads((source / "config.json").read_text())
    theta = config["rope_parameters"].pop("rope_theta")
    (source / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out.gguf"
    settings = {"rope_parameters.rope_theta": str(theta)}
    convert(ConvertJob(source, PAIR / "target", "llama.cpp", "Q8_0", out, settings=settings))
    gate = against(out, source)
    assert gate.outcome is Outcome.PASS
    assert [line for line in gate.details if "rope_theta" in line] == list(gate.details[:1])


def test_the_users_settings_of_today_go_before_the_recorded(made: Callable[..., Path]) -> None:
    path = made("Q8_0", **{"rope_parameters.rope_theta": "1000000"})
    gate = doctor(path, None, PAIR / "drafter", {"rope_parameters.rope_theta": "10000000"})[0]
    assert gate.outcome is Outcome.FAIL


def test_facts_given_to_redialect_are_the_users(made: Callable[..., Path], tmp_path: Path) -> None:
    redialect(RedialectJob(made("Q8_0"), None, "ik_llama.cpp", tmp_path / "o.gguf", settings={"rope.theta": "5000000"}))
    gate = against(tmp_path / "o.gguf")
    assert gate.outcome is Outcome.UNDECIDED
    assert "rope.theta: the checkpoint says 10000000.0, the file 5000000.0" in gate.details[0]
    assert "rope.theta=5000000" in gate.details[1]


def test_a_setting_that_nobody_reads_is_a_doubt(made: Callable[..., Path]) -> None:
    gate = doctor(made("Q8_0"), None, PAIR / "drafter", {"rope_theta_typo": "1"})[0]
    assert gate.outcome is Outcome.UNDECIDED
    assert gate.details == ("--set rope_theta_typo: nobody reads this key, so it changed nothing",)


def test_a_setting_that_cannot_be_is_wrong_input(made: Callable[..., Path], tmp_path: Path) -> None:
    def edit(draft: Draft) -> None:
        draft.keys[RECORDED] = KeyValue(RECORDED, GGUFValueType.ARRAY, ("hidden_size=[",), GGUFValueType.STRING)

    with pytest.raises(WrongInput, match="hidden_size"):
        against(spoilt(made(), tmp_path, edit))


# --- floats ---


def test_one_weight_of_a_float_tensor(made: Callable[..., Path], tmp_path: Path) -> None:
    """F32 is the source's own number, so the smallest step is a fault."""

    def edit(draft: Draft) -> None:
        weights = draft.weights("blk.0.attn_q.weight").copy()
        weights[3, 5] = np.nextafter(weights[3, 5], np.float32(9))
        draft.put("blk.0.attn_q.weight", weights)

    gate = against(spoilt(made(), tmp_path, edit))
    assert gate.outcome is Outcome.FAIL
    assert "blk.0.attn_q.weight (F32): 1 of 131072 weights are not the checkpoint's" in gate.details[0]


@pytest.mark.parametrize("recipe", ["F16", "BF16"])
def test_floats_are_rounded_once(made: Callable[..., Path], tmp_path: Path, recipe: str) -> None:
    def edit(draft: Draft) -> None:
        weights = draft.weights("fc.weight")
        draft.put("fc.weight", weights * np.float32(1 + 2.0**-7))

    assert against(made(recipe)).details == ()
    assert against(spoilt(made(recipe), tmp_path, edit)).outcome is Outcome.FAIL


def test_rounding_on_the_way_is_told(tmp_path: Path) -> None:
    """An F32 checkpoint that went through an F16 file before it became F32 again."""
    target = tiny_target(tmp_path / "target", **QWEN)
    config = small_config(vocab_size=2048, **{"dflash_config.mask_token_id": 2047})
    source = write_checkpoint(tmp_path / "d", config, random_tensors(dflash_shapes(config), np.float32))
    convert(ConvertJob(source, target, "llama.cpp", "F32", tmp_path / "f32.gguf"))

    def edit(draft: Draft) -> None:
        for name, (stored, _) in list(draft.tensors.items()):
            if len(stored.shape) > 1:
                draft.put(name, draft.weights(name).astype(np.float16).astype(np.float32))

    gate = against(spoilt(tmp_path / "f32.gguf", tmp_path, edit), source, target)
    assert gate.outcome is Outcome.PASS
    assert "note: fc.weight: rounded to F16 on its way to F32" in gate.details


# --- tensors in the wrong place ---

MISPLACED: Mapping[str, tuple[Edit, str]] = {
    "T-19 gate and up": (
        lambda d: d.swap("blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
        "blk.0.ffn_gate.weight ({kind}): ; it holds what the checkpoint calls layers.0.mlp.up_proj.weight",
    ),
    "keys and values": (
        lambda d: d.swap("blk.1.attn_k.weight", "blk.1.attn_v.weight"),
        "blk.1.attn_k.weight ({kind}): ; it holds what the checkpoint calls layers.1.self_attn.v_proj.weight",
    ),
    "two layers": (
        lambda d: d.swap("blk.0.ffn_down.weight", "blk.1.ffn_down.weight"),
        "blk.1.ffn_down.weight ({kind}): ; it holds what the checkpoint calls layers.0.mlp.down_proj.weight",
    ),
    "two norms": (
        lambda d: d.swap("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"),
        "blk.0.attn_norm.weight (F32): ; it holds what the checkpoint calls layers.0.post_attention_layernorm.weight",
    ),
    "P-43 rotary rows interleaved": (
        lambda d: d.put("blk.0.attn_q.weight", interleaved(d.weights("blk.0.attn_q.weight"), 64)),
        "blk.0.attn_q.weight ({kind}): ; its rows are in another order: row 34 is the checkpoint's row 17",
    ),
    "P-42 a norm without its one": (
        lambda d: d.put("output_norm.weight", d.weights("output_norm.weight") - np.float32(1)),
        "output_norm.weight (F32): ; it is the checkpoint's minus 1",
    ),
    "a norm in another order": (
        lambda d: d.put("output_norm.weight", d.weights("output_norm.weight")[::-1]),
        "output_norm.weight (F32): ; it is the checkpoint's in another order",
    ),
    "fc's captures in another order": (
        lambda d: d.put("fc.weight", d.weights("fc.weight").reshape(256, 3, 256)[:, ::-1].reshape(256, 768)),
        "fc.weight ({kind}): ",
    ),
    "half the weights": (
        lambda d: d.put("blk.0.ffn_up.weight", d.weights("blk.0.ffn_up.weight") * np.float32(0.5)),
        "blk.0.ffn_up.weight ({kind}): ",
    ),
}  # fmt: skip


def interleaved(weights: np.ndarray, head_dim: int) -> np.ndarray:
    return weights.reshape(-1, 2, head_dim // 2, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)


@pytest.mark.parametrize("recipe", ["F32", "Q8_0", "Q4_K_M", "Q2_K"])
@pytest.mark.parametrize("name", MISPLACED)
def test_misplaced_tensors_are_found_and_explained(
    made: Callable[..., Path], tmp_path: Path, name: str, recipe: str
) -> None:
    edit, says = MISPLACED[name]
    gate = against(spoilt(made(recipe), tmp_path, edit))
    assert gate.outcome is Outcome.FAIL
    start, _, explained = says.partition("; ")
    tensor = start.split(" ")[0]
    lines = [line for line in gate.details if line.startswith(f"{tensor} (")]
    assert len(lines) == 1, gate.details
    assert explained in lines[0]


def test_a_transposed_tensor(tmp_path: Path) -> None:
    """A square matrix on its side has the right shape; this drafter's output projection is 64 by 64."""
    target = tiny_target(tmp_path / "target", **QWEN)
    config = small_config(vocab_size=2048, **{"dflash_config.mask_token_id": 2047})
    source = write_checkpoint(tmp_path / "d", config, random_tensors(dflash_shapes(config), ml_dtypes.bfloat16))
    convert(ConvertJob(source, target, "llama.cpp", "Q8_0", tmp_path / "good.gguf"))
    name = "blk.1.attn_output.weight"
    gate = against(spoilt(tmp_path / "good.gguf", tmp_path, lambda d: d.put(name, d.weights(name).T)), source, target)
    assert next(line for line in gate.details if name in line).endswith("; it is the checkpoint's, transposed")


def test_tensors_that_only_one_side_has(tmp_path: Path) -> None:
    target = tiny_target(tmp_path / "target", **QWEN)
    config = small_config(vocab_size=2048, **{"dflash_config.mask_token_id": 2047})
    shapes = dflash_shapes(config)
    plain = write_checkpoint(tmp_path / "plain", config, random_tensors(shapes))
    sinks = {f"layers.{i}.self_attn.sinks": (4,) for i in range(2)}
    rich = write_checkpoint(tmp_path / "rich", config, random_tensors(shapes | sinks))
    for source in (plain, rich):
        convert(ConvertJob(source, target, "llama.cpp", "Q8_0", source.with_suffix(".gguf")))
    lost = against(plain.with_suffix(".gguf"), rich, target)
    assert "layers.0.self_attn.sinks: in the checkpoint, missing in the file (ATTN_SINKS of layer 0)" in lost.details
    more = against(rich.with_suffix(".gguf"), plain, target)
    assert "blk.0.attn_sinks.weight: the checkpoint has no ATTN_SINKS of layer 0" in more.details


# --- another drafter ---


def test_another_shape_is_one_line(made: Callable[..., Path], tmp_path: Path) -> None:
    config = small_config(vocab_size=2048, **{"dflash_config.mask_token_id": 2047})
    source = write_checkpoint(tmp_path / "d", config, random_tensors(dflash_shapes(config)))
    gate = against(made(), source)
    assert gate.outcome is Outcome.FAIL
    assert len(gate.details) == 1
    assert "not the drafter in" in gate.details[0]
    assert "hidden_size 256 in the file, 64 there" in gate.details[0]


def test_other_weights_are_one_line(tmp_path: Path) -> None:
    """Two trainings of one shape: nothing fits, so nothing is listed."""
    target = tiny_target(tmp_path / "target", **QWEN)
    config = small_config(vocab_size=2048, **{"dflash_config.mask_token_id": 2047})
    tensors = random_tensors(dflash_shapes(config))
    one = write_checkpoint(tmp_path / "one", config, tensors)
    two = write_checkpoint(tmp_path / "two", config, {name: -array for name, array in tensors.items()})
    convert(ConvertJob(one, target, "llama.cpp", "Q4_0", tmp_path / "one.gguf"))
    gate = against(tmp_path / "one.gguf", two, target)
    assert gate.outcome is Outcome.FAIL
    assert [line for line in gate.details if not line.startswith("note")] == [
        f"not the weights in {two}: 25 of 25 tensors differ by 200% to 200%: the file is of another drafter or another"
        " revision"
    ]


# --- damaged blocks ---


def flip(name: str, part: str, bit: int, block: int = 11) -> Edit:
    """One bit of one block's scale."""

    def edit(draft: Draft) -> None:
        blocks = draft.blocks(name)
        blocks[part][block : block + 1].view(np.uint16)[0] ^= 1 << bit

    return edit


@pytest.mark.parametrize("bit", [9, 10, 11, 12, 13, 15])
@pytest.mark.parametrize(
    ("recipe", "name", "part"),
    [("Q8_0", "fc.weight", "scale"), ("Q4_K_M", "fc.weight", "scale"), ("Q6_K", "blk.1.attn_q.weight", "scale"),
     ("Q3_K_M", "fc.weight", "scale"), ("Q2_K", "fc.weight", "scale"), ("IQ4_XS", "fc.weight", "scale")],
)  # fmt: skip
def test_a_flipped_bit_of_a_scale(
    made: Callable[..., Path], tmp_path: Path, recipe: str, name: str, part: str, bit: int
) -> None:
    """From the top bit of the mantissa upwards; lower ones change less than the type itself does."""
    gate = against(spoilt(made(recipe), tmp_path, flip(name, part, bit)))
    assert gate.outcome is Outcome.FAIL
    assert any(name in line and ("damaged" in line or "no finite" in line) for line in gate.details), gate.details


def test_a_bit_that_hardly_matters_is_told(made: Callable[..., Path], tmp_path: Path) -> None:
    gate = against(spoilt(made("Q8_0"), tmp_path, flip("fc.weight", "scale", 0)))
    assert gate.outcome is Outcome.PASS
    assert "note: fc.weight: 1 of 6144 blocks are not exactly what Q8_0 encodes to" in gate.details[0]


def test_a_row_of_noise(made: Callable[..., Path], tmp_path: Path) -> None:
    def edit(draft: Draft) -> None:
        weights = draft.weights("fc.weight")
        weights[100] = np.random.default_rng(1).standard_normal(768) * np.abs(weights).mean()
        draft.put("fc.weight", weights)

    gate = against(spoilt(made("Q4_K_M"), tmp_path, edit))
    assert any("fc.weight (Q4_K): row 100" in line for line in gate.details), gate.details


# --- importance ---


def importances(width: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """What activations look like: their squares, spreads of several orders, and a few columns that tower above."""
    rng = np.random.default_rng(seed)
    towers = np.exp(rng.standard_normal(width) * 0.5)
    towers[rng.integers(0, width, max(1, width // 200))] *= 1e3
    yield "squares", rng.chisquare(1, width) + 1e-3
    yield "spread", np.exp(rng.standard_normal(width) * 2)
    yield "towers", towers


@pytest.mark.parametrize("kind", [name for name, kind in TYPES.items() if kind.encode_weighted])
def test_the_limits_have_room_for_importance(kind: str) -> None:
    """What TENSOR_LIMIT and GROUP_LIMIT are taken from: weighted encodings against plain ones, in plain error."""
    rng, block = np.random.default_rng(0), TYPES[kind]
    for weights in (rng.standard_normal((64, 1024)), rng.standard_t(4, (64, 1024))):
        x = (weights * 0.02).astype(np.float32)
        plain = np.square(x - dequantize(quantize(x, block), block, x.shape))
        for name, importance in importances(1024, 1):
            y = dequantize(quantize(x, block, importance.astype(np.float32)), block, x.shape)
            error = np.square(x - y)
            assert np.sqrt(error.sum() / plain.sum()) < TENSOR_LIMIT * 0.85, name
            groups, own = (a.reshape(-1, 32).sum(axis=1) for a in (error, plain))
            assert np.sqrt((groups / np.maximum(own, own.mean() / 16)).max()) < GROUP_LIMIT, name


def write_importance(path: Path, source: Path) -> Path:
    """An importance matrix for every matrix of a drafter's file, as llama-imatrix would write it."""
    entries: dict[str, np.ndarray] = {}
    for number, stored in enumerate(read_gguf(source).tensors.values()):
        if len(stored.shape) == 2:
            made = [values for _, values in importances(stored.shape[1], number)][number % 3]
            entries[f"{stored.name}.in_sum2"] = made.astype(np.float32)[None]
            entries[f"{stored.name}.counts"] = np.ones((1, 1), np.float32)
    tensors = [StoredTensor(name, array.shape, GGMLQuantizationType.F32) for name, array in entries.items()]
    string, u32 = GGUFValueType.STRING, GGUFValueType.UINT32
    keys = [
        KeyValue("general.architecture", string, "none"),
        KeyValue("general.type", string, "imatrix"),
        KeyValue("imatrix.datasets", GGUFValueType.ARRAY, ("made up",), string),
        KeyValue("imatrix.chunk_count", u32, 1),
        KeyValue("imatrix.chunk_size", u32, 1),
    ]
    write_gguf(path, keys, tensors, lambda tensor: [entries[tensor.name]])
    return path


@pytest.mark.parametrize("recipe", ["Q6_K", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K"])
def test_weighted_files_pass(made: Callable[..., Path], tmp_path: Path, recipe: str) -> None:
    matrix = write_importance(tmp_path / "imatrix.gguf", made())
    out = tmp_path / "weighted.gguf"
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", recipe, out, importance=matrix))
    gate = against(out)
    assert (gate.outcome, gate.details) == (Outcome.PASS, ())
    assert "10 of 25 compared are bit for bit" in gate.summary  # the norms


def test_a_damaged_weighted_file_fails(made: Callable[..., Path], tmp_path: Path) -> None:
    matrix = write_importance(tmp_path / "imatrix.gguf", made())
    out = tmp_path / "weighted.gguf"
    convert(ConvertJob(PAIR / "drafter", PAIR / "target", "llama.cpp", "Q4_K_M", out, importance=matrix))
    gate = against(spoilt(out, tmp_path, flip("fc.weight", "scale", 11)))
    assert any("fc.weight (Q4_K): row 3, from column" in line for line in gate.details), gate.details


# --- types that we only read ---


def test_a_type_that_is_only_read(made: Callable[..., Path], tmp_path: Path) -> None:
    """TQ2_0 holds three levels: the package encodes it, we only decode it."""

    def edit(draft: Draft, name: str, weights: np.ndarray) -> None:
        data = gguf.quants.quantize(weights, GGMLQuantizationType.TQ2_0)
        draft.raw(name, GGMLQuantizationType.TQ2_0, data)

    name = "fc.weight"
    good = Draft.of(made())
    weights = good.weights(name)
    path = spoilt(made(), tmp_path, lambda draft: edit(draft, name, weights))
    assert against(path).outcome is Outcome.PASS
    path = spoilt(made(), tmp_path, lambda draft: edit(draft, name, -weights))
    assert any(name in line for line in against(path).details)


def test_a_tensor_that_is_no_number_is_only_said_once(made: Callable[..., Path], tmp_path: Path) -> None:
    def edit(draft: Draft) -> None:
        draft.blocks("fc.weight")["scale"][0] = np.inf

    gate = against(spoilt(made("Q8_0"), tmp_path, edit))
    assert len(gate.details) == 1
    assert len(gate.figures["tensors"]) == 24


def test_an_extra_tensor_does_not_hide_the_others(made: Callable[..., Path], tmp_path: Path) -> None:
    gate = against(spoilt(made("Q8_0"), tmp_path, extra("blk.0.attn_gate.weight", (8, 256))))
    assert gate.outcome is Outcome.FAIL
    assert len(gate.figures["tensors"]) == 25
