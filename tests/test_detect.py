"""Which kind a checkpoint is: by its tensors, then its architecture, never by a name of file, folder or model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import DELETE, dflash_shapes, random_tensors, small_config, write_checkpoint

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.drafters import DFLASH, KINDS, SIGNATURES, detect
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.spec import HEADS

WHERE = "drafter/config.json"
PLAIN = tuple(dflash_shapes(small_config()))
LAYER = ("layers.0.input_layernorm.weight", "layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight")
DFLASH2 = (*PLAIN, "candidate_selector.hidden_projection.weight", "candidate_selector.predecessor_codebook")
DSPARK = (*PLAIN, "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight")
MODELOPT = (*PLAIN, "markov_w1.weight", "markov_w2.weight", "gate_proj.weight")
DOMINO = (*PLAIN, "prefix_gru.weight_ih_l0", "domino_proj.weight")
LAGUNA = ("fc.weight", "hidden_norm.weight", "aux_hidden_norms.0.weight", "layers.0.self_attn.qkv_proj.weight")
LAGUNA_GATED = ("fc.weight", "hidden_norm.weight", "layers.0.self_attn.g_proj.weight")
EAGLE3 = ("fc.weight", "midlayer.hidden_norm.weight", "midlayer.self_attn.q_proj.weight", "norm.weight", "d2t", "t2d")
EAGLE3_LAYERS = ("fc.weight", "layers.0.hidden_norm.weight", "layers.0.self_attn.q_proj.weight", "norm.weight", "d2t")
EAGLE3_MLA = (*EAGLE3, "midlayer.self_attn.q_a_proj.weight", "midlayer.self_attn.kv_a_proj_with_mqa.weight")
MTP = ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight")
GLM_MTP = ("model.layers.78.eh_proj.weight", "model.layers.78.enorm.weight", "model.embed_tokens.weight")
MIMO = ("model.mtp_layers.0.input_proj.weight", "model.embed_tokens.weight")
HY_V4 = ("model.mtp_layers.0.eh_proj.weight", "model.embed_tokens.weight")
ERNIE = ("model.mtp_block.0.self_attn.q_proj.weight", "model.mtp_emb_norm.0.weight", "model.embed_tokens.weight")
GEMMA = ("pre_projection.weight", "post_projection.weight", *LAYER)
REDUCED = (*PLAIN, "embed_tokens.weight", "lm_head.weight", "d2t", "t2d")
TARGET = ("model.embed_tokens.weight", *(f"model.{name}" for name in LAYER), "model.norm.weight", "lm_head.weight")


def found(tensors: tuple[str, ...], **config: Any) -> Any:
    return detect(ConfigReader(config, WHERE), dict.fromkeys(tensors))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tensors", "architectures"),
    [
        pytest.param(PLAIN, ["DFlashDraftModel"], id="z-lab"),
        pytest.param(PLAIN, ["DflashDraftModel"], id="lower-case f"),
        pytest.param(PLAIN, ["Qwen3DSparkModel"], id="G-15 a DSpark label on plain DFlash (DeepSeek)"),
        pytest.param(PLAIN, [], id="empty list"),
        pytest.param(PLAIN, None, id="no architectures"),
        pytest.param(tuple(f"model.{name}" for name in PLAIN), ["DFlashDraftModel"], id="under model."),
        pytest.param((*PLAIN, "embed_tokens.weight", "lm_head.weight"), ["DFlashDraftModel"], id="own embedding"),
    ],
)
def test_dflash(tensors: tuple[str, ...], architectures: list[str] | None) -> None:
    assert found(tensors, architectures=architectures) is DFLASH


@pytest.mark.parametrize(
    ("tensors", "architecture", "kind"),
    [
        pytest.param(DFLASH2, "DFlash2DraftModel", "dflash2", id="DFlash2"),
        pytest.param(DFLASH2, "DFlashDraftModel", "dflash2", id="G-15 DFlash2 weights, DFlash label"),
        pytest.param(DSPARK, "DSparkDraftModel", "dspark", id="DSpark"),
        pytest.param(DSPARK, "DFlashDraftModel", "dspark", id="G-15 DSpark weights, DFlash label"),
        pytest.param(DSPARK, "Qwen3DSparkModel", "dspark", id="DeepSpec"),
        pytest.param(DSPARK, "Lfm2DSparkDraftModel", "dspark", id="LFM2"),
        pytest.param(MODELOPT, None, "dspark", id="ModelOpt's flat names"),
        pytest.param(REDUCED, "DFlashSpeculator", "dflash", id="G-24 d2t"),
        pytest.param((*PLAIN, "t2d"), "DFlashDraftModel", "dflash", id="G-24 t2d alone"),
    ],
)
def test_relatives_of_dflash(tensors: tuple[str, ...], architecture: str | None, kind: str) -> None:
    for names in (tensors, tuple(reversed(tensors))):
        assert found(names, architectures=architecture and [architecture]) is KINDS[kind]


@pytest.mark.parametrize(
    ("tensors", "architecture"),
    [
        pytest.param(EAGLE3, "LlamaForCausalLMEagle3", id="SpecForge"),
        pytest.param(EAGLE3, "LlamaForCausalLM", id="G-15 under Llama's name (SafeAILab)"),
        pytest.param(EAGLE3_LAYERS, "Eagle3DraftModel", id="speculators"),
        pytest.param(EAGLE3_LAYERS, "Eagle3Speculator", id="speculators, older"),
        pytest.param(tuple(f"model.{name}" for name in EAGLE3), None, id="under model."),
    ],
)
def test_eagle3(tensors: tuple[str, ...], architecture: str | None) -> None:
    for names in (tensors, tuple(reversed(tensors))):
        assert found(names, architectures=architecture and [architecture]) is KINDS["eagle3"]


@pytest.mark.parametrize("architecture", ["Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM", None])
def test_assistants(architecture: str | None) -> None:
    for names in (GEMMA, tuple(reversed(GEMMA)), (*GEMMA, "masked_embedding.centroids.weight")):
        assert found(names, architectures=architecture and [architecture]) is KINDS["gemma4-assistant"]


@pytest.mark.parametrize("architecture", ["Gemma4DSparkModel", None])
def test_dspark_of_gemma_4(architecture: str | None) -> None:
    """Its layers have a norm that no other DSpark's have, and its Markov head no other Gemma 4."""
    norm = "layers.0.pre_feedforward_layernorm.weight"
    for names in ((*DSPARK, norm), (norm, *DSPARK), tuple(f"model.{name}" for name in (*DSPARK, norm))):
        assert found(names, architectures=architecture and [architecture]) is KINDS["gemma4-dspark"]


@pytest.mark.parametrize("architecture", ["PEagleDraftModel", "Eagle3DeepseekV2ForCausalLM", "LlamaForCausalLMEagle"])
def test_eagle3_of_another_build_is_refused(architecture: str) -> None:
    """G-27: parallel drafting, multi-head latent attention, EAGLE-1."""
    with pytest.raises(WrongInput, match=rf"architectures: {architecture} on eagle3 tensors \(.+\), expected one of"):
        found(EAGLE3, architectures=[architecture])


@pytest.mark.parametrize(
    "architecture", ["KimiK3DSpark5MLADraftModel", "Gemma4DSparkModel", "LagunaDSparkModel", "Qwen35DSparkModel"]
)
def test_dspark_of_another_build_is_refused(architecture: str) -> None:
    """G-27: their attention or feed-forward is another one, under the same names of the Markov head."""
    with pytest.raises(WrongInput, match=rf"architectures: {architecture} on dspark tensors \(.+\), expected one of"):
        found(DSPARK, architectures=[architecture])


@pytest.mark.parametrize(
    ("tensors", "architectures", "kind"),
    [
        pytest.param(DOMINO, ["DominoDraftModel"], "Domino", id="G-27 Domino"),
        pytest.param(LAGUNA, ["DFlashLagunaForCausalLM"], "Laguna DFlash", id="G-18 Laguna"),
        pytest.param(LAGUNA_GATED, ["DFlashDraftModel"], "Laguna DFlash", id="G-18 Laguna by its gate"),
        pytest.param(EAGLE3_MLA, ["Eagle3DeepseekV2ForCausalLM"], "EAGLE-3 with multi-head latent", id="G-27 MLA"),
        pytest.param((*EAGLE3_LAYERS, "mask_hidden"), ["PEagleDraftModel"], "P-EAGLE", id="G-27 P-EAGLE"),
    ],
)
def test_other_kinds_are_refused_by_name(tensors: tuple[str, ...], architectures: list[str] | None, kind: str) -> None:
    for names in (tensors, tuple(reversed(tensors))):
        with pytest.raises(WrongInput) as caught:
            found(names, architectures=architectures)
        for fragment in (WHERE, kind, "not converted yet", "list kinds"):
            assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "architecture",
    ["DFlash2DraftModel", "DSparkDraftModel", "DominoDraftModel", "PEagleDraftModel", "DFlareDraftModel",
     "Gemma4DSparkModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "dflashdraftmodel"],
)  # fmt: skip
def test_another_kind_s_label_on_plain_tensors_is_refused(architecture: str) -> None:
    """Its special tensors are gone, or it computes something else with these (G-13 dflare, G-27 PEagle)."""
    with pytest.raises(WrongInput) as caught:
        found(PLAIN, architectures=[architecture])
    for fragment in (WHERE, f"architectures: {architecture} on dflash tensors", "DFlashDraftModel"):
        assert fragment in str(caught.value)


def test_every_label_has_to_fit() -> None:
    with pytest.raises(WrongInput, match="architectures: DSparkDraftModel on dflash"):
        found(PLAIN, architectures=["DFlashDraftModel", "DSparkDraftModel"])


@pytest.mark.parametrize("tensors", [TARGET, ("x.weight",), ("my_hidden_norm.weight",), ("layers.0.d2t",)])
def test_what_is_no_drafter(tensors: tuple[str, ...]) -> None:
    with pytest.raises(WrongInput) as caught:
        found(tensors, architectures=["Qwen3ForCausalLM"])
    for fragment in (WHERE, "no drafter's tensors", "Qwen3ForCausalLM", "list kinds"):
        assert fragment in str(caught.value)


@pytest.mark.parametrize("value", ["DFlashDraftModel", 3, {"0": "DFlashDraftModel"}, True])
def test_architectures_are_a_list(value: Any) -> None:
    with pytest.raises(WrongInput, match=r"config\.json: architectures: found .*, expected an array"):
        found(PLAIN, architectures=value)


def test_architectures_are_strings() -> None:
    with pytest.raises(WrongInput, match=r"config\.json: architectures\[0\]: found 3"):
        found(PLAIN, architectures=[3])


@pytest.mark.parametrize(
    ("tensors", "architecture", "why"),
    [
        pytest.param(MTP, "MTPDraftModel", "not converted yet", id="a speculator"),
        pytest.param(GLM_MTP, "Glm6ForCausalLM", "not converted yet", id="inside a target"),
        pytest.param(
            GLM_MTP, "DeepseekV3ForCausalLM", "no runtime loads it: llama.cpp's converter drops", id="DeepSeek-V3"
        ),
        pytest.param(HY_V4, "HYV4ForCausalLM", "no runtime loads it: llama.cpp's converter drops", id="Hunyuan-V4"),
        pytest.param(ERNIE, "Ernie4_5_MoeForCausalLM", "no runtime loads it: llama.cpp's converter drops", id="ERNIE"),
        pytest.param(GLM_MTP, "GlmOcrForConditionalGeneration", "no runtime loads it: llama.cpp keeps", id="GLM-OCR"),
        pytest.param(MIMO, "MiMoForCausalLM", "no runtime loads it: llama.cpp has no MiMo before V2", id="MiMo-7B"),
    ],
)
def test_heads_of_other_targets_are_refused_by_name(tensors: tuple[str, ...], architecture: str, why: str) -> None:
    with pytest.raises(WrongInput) as caught:
        found(tensors, architectures=[architecture])
    for fragment in (WHERE, f"the MTP head of {architecture}, {why}", "list kinds"):
        assert fragment in str(caught.value)


def test_a_head_is_told_by_its_target() -> None:
    assert found(MTP, architectures=["Qwen3_5ForConditionalGeneration"]) is KINDS["mtp-qwen35"]


def test_every_kind_is_reachable() -> None:
    kinds = [signature.kind for signature in SIGNATURES]
    assert set(KINDS) - HEADS <= set(kinds) and len(kinds) == len(set(kinds))


# --- names that decide nothing ---


@pytest.mark.parametrize("name", ["Qwen3-EAGLE3-DSpark", "gemma-assistant-mtp", "llama", "Qwen3 (DFlash2)"])
@pytest.mark.parametrize("model_type", ["qwen3", "gpt_oss", "llama", "eagle3", DELETE])
def test_names_of_folders_files_and_model_types_decide_nothing(tmp_path: Path, name: str, model_type: Any) -> None:
    """T-47: not the substring 'qwen', nor any other; G-16: model_type neither."""
    config = small_config(model_type=model_type)
    folder = write_checkpoint(tmp_path / name, config, random_tensors(dflash_shapes(config)))
    (folder / "model.safetensors").rename(folder / f"{name.lower()}-eagle3.safetensors")
    published = read_published(folder)
    assert published.kind is DFLASH
    assert published.reader.origins["kind"] == "tensor names"


def test_a_dflash_name_on_eagle3_tensors_helps_nothing(tmp_path: Path) -> None:
    tensors = {name: np.zeros(2, np.float32) for name in EAGLE3}
    folder = write_checkpoint(tmp_path / "Qwen3-DFlash", small_config(), tensors)
    (folder / "model.safetensors").rename(folder / "dflash_draft_model.safetensors")
    with pytest.raises(
        WrongInput, match=r"Qwen3-DFlash/config\.json: architectures: DFlashDraftModel on eagle3 tensors"
    ):
        read_published(folder)
