"""The relatives of DFlash: a checkpoint of each converts, quantizes and passes doctor, and planted faults do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from make_checkpoints import CHECKPOINTS, make
from planted_faults import Draft, Edit
from published import PAIR, write_safetensors
from safetensors.numpy import load_file

from convert_drafter.converters import (
    ConvertJob,
    QuantizeJob,
    RedialectJob,
    WrongInput,
    WrongUsage,
    convert,
    inspect,
    quantize,
    redialect,
)
from convert_drafter.converters.doctor import doctor
from convert_drafter.converters.drafter_file import read_drafter_file
from convert_drafter.converters.verdict import Gate, Outcome

TARGET = PAIR / "target"
Maker = Callable[[str], tuple[Path, Path]]
CONV, SELECTOR = "blk.0.attn_conv_base", ("selector_predecessor.weight", "selector_successor.weight")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Checkpoint and F32 file of a kind, made once."""
    folder = tmp_path_factory.mktemp("kinds")

    def both(kind: str) -> tuple[Path, Path]:
        source, out = folder / kind / "drafter", folder / kind / "f32.gguf"
        if not out.exists():
            convert(ConvertJob(make(kind, source), TARGET, "llama.cpp", "F32", out))
        return source, out

    return both


def structure(file: Path, source: Path | None = None) -> Gate:
    return doctor(file, TARGET, source)[0]


@pytest.mark.parametrize("recipe", ["F32", "BF16", "Q8_0", "Q4_K_M", "Q4_K_M-drafter"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_right_files_pass(made: Maker, tmp_path: Path, kind: str, recipe: str) -> None:
    source, f32 = made(kind)
    quantize(QuantizeJob(f32, tmp_path / "q.gguf", recipe))
    convert(ConvertJob(source, TARGET, "llama.cpp", recipe, tmp_path / "c.gguf"))
    for file in (tmp_path / "q.gguf", tmp_path / "c.gguf"):
        gates = doctor(file, TARGET, source)
        assert [gate.outcome for gate in gates] == [Outcome.PASS, Outcome.PASS], gates
        assert inspect(file).runtimes == {"llama.cpp": ""}
        assert inspect(file).kind == kind.split()[0]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_checkpoint_is_understood_whole(made: Maker, kind: str) -> None:
    found = inspect(made(kind)[0], target=TARGET)
    assert (found.kind, found.warnings, found.runtimes["llama.cpp"]) == (kind.split()[0], (), "")


@pytest.mark.parametrize("runtime", ["ik_llama.cpp", "lucebox"])
@pytest.mark.parametrize("kind", ["dflash2", "dspark"])
def test_a_runtime_without_a_loader_is_refused(made: Maker, tmp_path: Path, kind: str, runtime: str) -> None:
    with pytest.raises(WrongUsage, match=f"{runtime} has no loader for {kind} drafters; it loads: dflash"):
        redialect(RedialectJob(made(kind)[1], None, runtime, tmp_path / "out.gguf"))


def test_speculators_say_where_each_fact_stands(made: Maker) -> None:
    facts = {
        fact.name: (fact.value, fact.origin) for fact in inspect(made("dflash of speculators")[0], target=TARGET).facts
    }
    assert facts["hidden_size"] == (256, "transformer_layer_config.hidden_size")
    assert facts["rope.theta"] == (10_000_000.0, "transformer_layer_config.rope_parameters.rope_theta")
    assert facts["capture_layers"] == ((0, 2, 4), "aux_hidden_state_layer_ids")
    assert facts["block_size"] == (8, "block_size")
    assert facts["draft_vocab_size"] == (1536, "draft_vocab_size")


# --- planted faults ---


def offsets(draft: Draft) -> None:
    """T-67: the checkpoint's offsets, where the loader takes tokens."""
    ids = draft.tensors["d2t"][1].view("<i8")
    draft.raw("d2t", GGMLQuantizationType.I64, ids - np.arange(len(ids)))


def moved(by: int) -> Edit:
    def edit(draft: Draft) -> None:
        draft.raw("d2t", GGMLQuantizationType.I64, draft.tensors["d2t"][1].view("<i8") + by)

    return edit


def without(*names: str) -> Edit:
    return lambda draft: [draft.tensors.pop(name) for name in names]


def reversed_taps(draft: Draft) -> None:
    draft.put(CONV, draft.weights(CONV)[:, ::-1])


FAULTS: dict[str, tuple[str, Edit, str]] = {
    "taps the other way round": ("dflash2", reversed_taps, f"{CONV} (F32): "),
    "codebooks swapped": ("dflash2", lambda d: d.swap(*SELECTOR), "it holds what the checkpoint calls"),
    "no selector": ("dflash2", without("selector_hidden.weight"), "the file has a dflash drafter, the checkpoint"),
    "no codebook": ("dflash2", without(SELECTOR[1]), "selector_successor.weight: missing"),
    "no convolution": ("dflash2", without(CONV), f"{CONV}: missing (ATTN_CONV_BASE of layer 0)"),
    "kernel size missing": ("dflash2", lambda d: d.drop("conv_kernel_size"), "dflash.conv_kernel_size: missing"),
    "groups of another size": ("dflash2", lambda d: d.set("conv_group_size", 32), "attn_conv_proj.weight: found shape"),
    "groups that do not divide": (
        "dflash2", lambda d: d.set("conv_group_size", 48), "found 48, expected a divisor of hidden_size 256",
    ),
    "fewer candidates": ("dflash2", lambda d: d.set("selector_top_k", 4), "found 4, the checkpoint has 8"),
    "too many candidates": ("dflash2", lambda d: d.set("selector_top_k", 16), "packs top_k * (top_k + 1) scores"),
    "Markov matrices swapped": ("dspark", lambda d: d.swap("markov_w1.weight", "markov_w2.weight"), "it holds what"),
    "no Markov head": ("dspark", without("markov_w1.weight"), "the file has a dflash drafter, the checkpoint a dspark"),
    "half a Markov head": ("dspark", without("markov_w2.weight"), "markov_w2.weight: missing (MARKOV_OUT)"),
    "anchor": ("dspark", lambda d: d.set("sample_from_anchor", True), "found True, the checkpoint has False"),
    "anchor unsaid": ("dspark", lambda d: d.drop("sample_from_anchor"), "found True, the checkpoint has False"),
    "confidence denied": ("dspark", lambda d: d.set("has_confidence_head", False), "found False, the checkpoint"),
    "no confidence head": ("dspark", without("conf_proj.weight"), "found True, but the file has no conf_proj.weight"),
    "T-67 offsets": ("dflash of speculators", offsets, "offsets where tokens belong?"),
    "T-67 beyond the vocabulary": ("dspark of speculators", moved(1024), "expected tokens of the target's 2048"),
    "ids one higher": ("dflash of speculators", moved(1), "d2t"),
    "no ids": ("dflash of speculators", without("d2t"), "found 1536, but the file has no d2t"),
    "ids as floats": (
        "dflash of speculators",
        lambda d: d.raw("d2t", GGMLQuantizationType.F32, d.tensors["d2t"][1].view("<i8").astype(np.float32)),
        "d2t: found F32, expected I64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(made: Maker, tmp_path: Path, name: str) -> None:
    kind, edit, says = FAULTS[name]
    source, f32 = made(kind)
    draft = Draft.of(f32)
    edit(draft)
    gate = structure(draft.write(tmp_path / "spoilt.gguf"), source)
    assert gate.outcome is Outcome.FAIL
    assert any(says in line for line in gate.details), gate.details


# --- checkpoints that cannot be right ---


def rewritten(source: Path, out: Path, config: dict[str, object], **tensors: np.ndarray | None) -> Path:
    out.mkdir()
    whole = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({k: v for k, v in {**whole, **config}.items() if v is not None}))
    held = {**load_file(source / "model.safetensors"), **tensors}
    write_safetensors(out / "model.safetensors", {name: array for name, array in held.items() if array is not None})
    return out


ROWS = 1536
WRONG: dict[str, tuple[str, dict[str, object], dict[str, np.ndarray | None], str]] = {
    "T-67 ids beyond the vocabulary": (
        "dflash of speculators", {}, {"d2t": np.full(ROWS, 1024)}, "d2t: row 1024 is token 2048, and 511 more",
    ),
    "T-67 ids already absolute": ("dflash of speculators", {}, {"d2t": np.arange(ROWS)}, "d2t: row 1024 is token 2048"),
    "ids twice": ("dflash of speculators", {}, {"d2t": np.eye(1, ROWS, dtype=int)[0]}, "rows 0 and 1 are both token 1"),
    "G-24 no ids": ("dflash of speculators", {}, {"d2t": None}, "d2t: missing (DRAFT_TO_TARGET)"),
    "ids as floats": ("dflash of speculators", {}, {"d2t": np.zeros(ROWS, np.float32)}, "expected token ids in I64 or"),
    "two levels disagree": ("dflash of speculators", {"head_dim": 32}, {}, "transformer_layer_config.head_dim = 64"),
    "state 0": ("dflash of speculators", {"aux_hidden_state_layer_ids": [0, 2, 4]}, {}, "0 is the embedding's output"),
    "no captures": ("dflash of speculators", {"aux_hidden_state_layer_ids": None}, {}, "aux_hidden_state_layer_ids"),
    "anchor unsaid": ("dspark of speculators", {"sample_from_anchor": None}, {}, "sample_from_anchor: missing"),
    "another Markov head": ("dspark", {"markov_head_type": "gated"}, {}, "found 'gated', expected 'vanilla'"),
    "no rank": ("dspark", {"markov_rank": None}, {}, "--set markov_rank=VALUE"),
    "another rank": ("dspark", {"markov_rank": 16}, {}, "found shape [2048, 32], expected [2048, 16]"),
    "a head that is promised": ("dspark", {}, {"confidence_head.proj.weight": None}, "missing (CONFIDENCE)"),
    "bonus anchor": ("dspark", {"dspark_bonus_anchor": False}, {}, "dspark_bonus_anchor: found False, expected True"),
    "T-67 ids already absolute, few": (
        "dflash of speculators",
        {"draft_vocab_size": 512},
        {
            "d2t": np.arange(512), "t2d": np.arange(2048) < 512,
            "lm_head.weight": np.zeros((512, 256), np.float32),
        },
        "d2t: comes to tokens that t2d does not mark: its numbers are tokens, not offsets",
    ),
    "t2d of another": ("dflash of speculators", {}, {"t2d": np.zeros(2048, bool)}, "t2d marks 0 others"),
    "confidence denied": ("dspark", {"enable_confidence_head": False}, {}, "found False, expected true: there are"),
    "anchor unsaid beside states": (
        "dspark", {"aux_hidden_state_layer_ids": [1, 3, 5], "sample_from_anchor": None}, {}, "sample_from_anchor: mis",
    ),
    "DeepSpec's class, no Markov head": (
        "dflash of speculators", {"architectures": ["Qwen3DSparkModel"]}, {}, "sample_from_anchor: not stated beside",
    ),
    "sliding causality unsaid": (
        "dflash of speculators", {"sliding_window_non_causal": None}, {}, "sliding_window_non_causal: missing",
    ),
    "sliding causality twice": ("dspark of speculators", {"is_causal": True}, {}, "but another key says causal = True"),
    "groups that do not divide": (
        "dflash2",
        {
            "dflash_config": {
                "mask_token_id": 2047, "target_layer_ids": [0, 2, 4], "block_size": 8, "conv_kernel_size": 2,
                "conv_group_size": 48, "selector_rank": 32, "selector_top_k": 8,
            }
        },
        {},
        "dflash_config.conv_group_size: found 48, expected a divisor of hidden_size 256",
    ),
    "capped logits": ("dspark", {"final_logit_softcapping": 30.0}, {}, "logit_softcap: llama.cpp adds the bias of"),
    "no kernel size": (
        "dflash2", {"dflash_config": {"mask_token_id": 2047, "target_layer_ids": [0, 2, 4], "block_size": 8}}, {},
        "convolution.kernel_size: missing (looked at dflash_config.conv_kernel_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_checkpoints_are_named(made: Maker, tmp_path: Path, name: str) -> None:
    kind, config, tensors, says = WRONG[name]
    source = rewritten(made(kind)[0], tmp_path / "drafter", config, **tensors)
    with pytest.raises(WrongInput) as caught:
        convert(ConvertJob(source, TARGET, "llama.cpp", "F32", tmp_path / "out.gguf"))
    assert says in str(caught.value)
    assert not (tmp_path / "out.gguf").exists()


RIGHT: dict[str, tuple[str, dict[str, object], dict[str, np.ndarray | None]]] = {
    "a scale of one": ("dspark", {"output_multiplier": 1.0}, {}),
    "levels that name themselves otherwise": (
        "dspark of speculators", {"model_type": "speculators", "dtype": "float32", "use_cache": False}, {},
    ),
    "no confidence head, however it would work": (
        "dspark",
        {"enable_confidence_head": False, "confidence_head_with_markov": False},
        {"confidence_head.proj.weight": None, "confidence_head.proj.bias": None},
    ),
    "DeepSpec's class, asked": (
        "dflash of speculators", {"sample_from_anchor": False, "architectures": ["Qwen3DSparkModel"]}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_what_changes_nothing_is_taken(made: Maker, tmp_path: Path, name: str) -> None:
    kind, config, tensors = RIGHT[name]
    source = rewritten(made(kind)[0], tmp_path / "drafter", config, **tensors)
    convert(ConvertJob(source, TARGET, "llama.cpp", "F32", tmp_path / "out.gguf"))
    assert structure(tmp_path / "out.gguf", source).outcome is Outcome.PASS


def test_a_number_too_large_for_a_key_of_our_own_is_told_with_its_config_key(made: Maker, tmp_path: Path) -> None:
    source = rewritten(made("dflash2")[0], tmp_path / "drafter", {"num_target_layers": 2**40})
    with pytest.raises(WrongInput) as caught:
        convert(ConvertJob(source, None, "llama.cpp", "F32", tmp_path / "out.gguf"))
    said = f"target_layer_count = {2**40}: does not fit an unsigned 32-bit key (num_target_layers)"
    assert said in str(caught.value)


def test_sliding_layers_of_speculators_look_backwards(made: Maker, tmp_path: Path) -> None:
    """Unless they say otherwise; where only some slide, no key can say it."""
    source, slides = made("dspark of speculators")[0], {"sliding_window_non_causal": False}
    inner = json.loads((source / "config.json").read_text())["transformer_layer_config"]
    with pytest.raises(WrongInput, match="sliding_window_non_causal: false, but some layers do not slide") as caught:
        convert(ConvertJob(rewritten(source, tmp_path / "a", slides), TARGET, "llama.cpp", "F32", tmp_path / "a.gguf"))
    assert "ik_llama.cpp and Lucebox let sliding layers look backwards" in str(caught.value)
    assert "for them is_causal=false" in str(caught.value)
    all_slide = {"transformer_layer_config": {**inner, "layer_types": ["sliding_attention"] * 2}}
    other = rewritten(source, tmp_path / "b", {**slides, **all_slide})
    convert(ConvertJob(other, TARGET, "llama.cpp", "F32", tmp_path / "b.gguf"))
    assert read_drafter_file(tmp_path / "b.gguf").spec.causal
