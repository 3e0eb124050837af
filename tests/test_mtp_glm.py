"""MTP heads that are layers behind their target's last: GLM-4.5's, which is a mixture with groups and a bias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_mtp_glm
import numpy as np
import pytest
from mtp_checkpoints import DELETE, job, planned, reconfigure, without
from safetensors.numpy import load_file, save_file
from test_mtp import refusal

from convert_drafter.converters import convert, doctor, inspect
from convert_drafter.converters.convert import read_published
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.verdict import Outcome

DEPTH = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mtp_glm.random(tmp_path_factory.mktemp("glm") / "target")


def test_the_file_says_what_the_target_s_own_layers_are(source: Path, tmp_path: Path) -> None:
    """A5-1: the head has no dense layer, and is loaded as a target that has one."""
    out = tmp_path / "mtp.gguf"
    convert(job(source, out))
    file = read_gguf(out)
    keys = {key.removeprefix("glm4moe."): entry.value for key, entry in file.keys.items()}
    assert (keys["block_count"], keys["nextn_predict_layers"], keys["leading_dense_block_count"]) == (DEPTH + 1, 1, 1)
    assert (keys["feed_forward_length"], keys["expert_feed_forward_length"], keys["expert_shared_count"]) == (96, 32, 2)
    assert (keys["expert_gating_func"], keys["expert_weights_norm"], keys["expert_weights_scale"]) == (2, True, 1.5)
    assert (keys["expert_group_count"], keys["expert_group_used_count"]) == (4, 2)
    assert keys["rope.dimension_count"] == 16
    own = {name for name in file.tensors if name.startswith(f"blk.{DEPTH}.")}
    assert len(own) == 25 and len(file.tensors) == len(own) + 3
    bias = load_file(source / "model.safetensors")[f"model.layers.{DEPTH}.mlp.gate.e_score_correction_bias"]
    np.testing.assert_array_equal(file.tensor_bytes(f"blk.{DEPTH}.exp_probs_b.bias").view("<f4"), bias)
    assert inspect(out).kind == "mtp-glm4moe"
    (structure, pairing) = doctor(out, source, source)
    assert (structure.outcome, structure.details, pairing.outcome) == (Outcome.PASS, (), Outcome.PASS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"partial_rotary_factor": DELETE},
            "rope.dimensions: missing (looked at rope_parameters.partial_rotary_factor",
        ),
        ({"rope_theta": DELETE}, "rope theta: missing"),
        ({"first_k_dense_replace": DELETE}, "trunk.dense_layer_count: missing (looked at first_k_dense_replace)"),
        ({"routed_scaling_factor": DELETE}, "experts.scale: missing (looked at routed_scaling_factor)"),
        ({"n_shared_experts": 0}, "n_shared_experts: found 0, expected a number above 0"),
        ({"n_group": 3}, "n_group: found 3, expected a divisor of 8 experts"),
        ({"topk_group": 1}, "topk_group: found 1, expected up to 4, that hold the 3 used"),
        ({"attention_bias": False}, "self_attn.q_proj.bias: unknown tensor"),
        ({"use_qk_norm": False}, "self_attn.q_norm.weight: unknown tensor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "found linear scaling"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_fact_that_is_missing_or_contradicted_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """R1: what transformers or llama.cpp would take by default is no fact."""
    assert said in refusal(planned, reconfigure(make_mtp_glm.random(tmp_path / "t"), **change))


def test_declared_but_absent(tmp_path: Path) -> None:
    """A5-2: most quantized copies keep the count of a head that they were saved without."""
    source = without(make_mtp_glm.random(tmp_path / "t"), f"model.layers.{DEPTH}.")
    assert "num_nextn_predict_layers: 1, but there is no tensor of an MTP head" in refusal(planned, source)


@pytest.mark.parametrize("count", [DELETE, 0], ids=["no key", "0"])
def test_present_but_undeclared(tmp_path: Path, count: Any) -> None:
    """A5-2."""
    source = reconfigure(make_mtp_glm.random(tmp_path / "t"), num_nextn_predict_layers=count)
    assert "--set num_nextn_predict_layers=1" in refusal(planned, source)
    assert planned(source, settings={"num_nextn_predict_layers": "1"}).published.spec.layer_count == 1


def test_another_count_or_another_depth(tmp_path: Path) -> None:
    """A5-2, both ways; a head elsewhere than behind the last layer is none of this target's."""
    source = make_mtp_glm.random(tmp_path / "t")
    said = refusal(planned, reconfigure(source, num_nextn_predict_layers=2))
    assert "num_nextn_predict_layers: 2, but the tensors are layers.3.eh_proj, expected as many layers, from 3" in said
    said = refusal(planned, reconfigure(source, num_nextn_predict_layers=1, num_hidden_layers=4))
    assert "but the tensors are layers.3.eh_proj, expected as many layers, from 4 on" in said
    two = make_mtp_glm.random(tmp_path / "two", num_nextn_predict_layers=2)
    assert "layer_count: llama.cpp drafts with a head of one layer" in refusal(planned, two)


def test_only_the_head_and_what_it_shares_is_read(source: Path) -> None:
    """T-64: the layers before it may be hundreds of gigabytes."""
    names = read_published(source).checkpoint.tensors
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {str(DEPTH)}


def test_a_repeated_embedding_and_head_may_be_left_out(source: Path, tmp_path: Path) -> None:
    """llama.cpp then takes the target's (src/models/glm4-moe.cpp)."""
    path = make_mtp_glm.random(tmp_path / "t") / "model.safetensors"
    gone = ("embed_tokens.weight", "shared_head.head.weight", "shared_head.norm.weight")
    kept = {n: t for n, t in load_file(path).items() if not n.startswith("model.layers.3") or not n.endswith(gone)}
    save_file(kept, path)
    assert len(planned(path.parent).plan.tensors) == len(planned(source).plan.tensors) - len(gone)


# --- in torch ---


def test_the_reference_is_a_layer_of_transformers_with_the_head_s_weights(source: Path) -> None:
    """The decoder layer as transformers computes it: biases, norms, groups, the bias of the choice, the scale."""
    torch = pytest.importorskip("torch")
    glm = pytest.importorskip("transformers.models.glm4_moe.modeling_glm4_moe")
    from convert_drafter.converters.verify.in_torch.reference.mtp import Mtp, shifted
    from convert_drafter.converters.verify.in_torch.target import TorchTarget
    from convert_drafter.converters.verify.in_torch.text import FINAL
    from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, reference

    target, tokens = TorchTarget(source), list(range(7, 47))
    config, published = target.model.config, read_published(source)
    drafter: Mtp = reference(published.spec, checkpoint_weights(published))
    layer = glm.Glm4MoeDecoderLayer(config, DEPTH - 1).eval()
    # transformers has the experts in two tensors, and the model's own loading puts them there
    own = dict(target.model.get_decoder().layers[DEPTH - 1].state_dict())
    loaded = {name: torch.from_numpy(array.astype(np.float32)) for name, array in load_file(
        source / "model.safetensors").items() if name.startswith(f"model.layers.{DEPTH}.")}  # fmt: skip
    mine = {name.removeprefix(f"model.layers.{DEPTH}."): tensor for name, tensor in loaded.items()}
    gate, up, down = (torch.stack([mine[f"mlp.experts.{i}.{p}_proj.weight"] for i in range(8)])
                      for p in ("gate", "up", "down"))  # fmt: skip
    mine |= {"mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1), "mlp.experts.down_proj": down}
    layer.load_state_dict({name: mine[name] for name in own})
    states = target.write(tokens, 1, [FINAL])[1][FINAL]
    embedding = drafter.tables(target.tables).embedding[torch.tensor(tokens)]
    joined, at = drafter.head.join(embedding, shifted(states)), torch.arange(40)
    rotary = target.model.get_decoder().rotary_emb(joined[None], at[None])
    mask = torch.full((40, 40), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        expected = layer(joined[None], position_embeddings=rotary, attention_mask=mask)
        nothing = torch.zeros(published.spec.kv_head_count, 0, published.spec.head_dim)
        visible = torch.ones(40, 40, dtype=torch.bool).tril()
        found, _ = drafter.head(embedding, shifted(states), at, (nothing, nothing), visible)
    normed = drafter.head.norm(expected[0] if isinstance(expected, tuple) else expected)
    torch.testing.assert_close(found, normed.reshape(found.shape), atol=2e-4, rtol=2e-3)
