"""DeepSeek-V4's head in torch: transformers computes its layer alike, and what it drafts never changes the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_mtp_deepseek4 as maker
import pytest
from make_mtp import write
from mtp_checkpoints import job
from safetensors.numpy import load_file

from convert_drafter.converters import convert

torch = pytest.importorskip("torch")
pytest.importorskip("transformers.models.deepseek_v4")

from convert_drafter.converters.convert import read_published  # noqa: E402
from convert_drafter.converters.roles import Role  # noqa: E402
from convert_drafter.converters.verify.in_torch.drafter import TorchDrafter  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.mtp import shifted  # noqa: E402
from convert_drafter.converters.verify.in_torch.reference.mtp_deepseek4 import MtpDeepseek4  # noqa: E402
from convert_drafter.converters.verify.in_torch.target import TorchTarget, load_model  # noqa: E402
from convert_drafter.converters.verify.in_torch.text import captures_of  # noqa: E402
from convert_drafter.converters.verify.in_torch.weights import (  # noqa: E402
    checkpoint_weights,
    gguf_weights,
    reference,
)
from convert_drafter.converters.verify.loop import greedy, speculative_loop  # noqa: E402

DEPTH, COUNT, STREAMS = 3, 90, 4  # positions: more than the window's 64
TOKENS = [(i * i + 7) % 2000 for i in range(COUNT)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.plain(tmp_path_factory.mktemp("deepseek4") / "target")


@pytest.fixture(scope="module")
def target(source: Path) -> TorchTarget:
    torch.set_num_threads(1)
    found = TorchTarget(source)
    found.end_tokens = frozenset()
    return found


@pytest.fixture(scope="module")
def drafter(source: Path) -> MtpDeepseek4:
    published = read_published(source)
    found: MtpDeepseek4 = reference(published.spec, checkpoint_weights(published))
    return found


def with_the_head_as_its_last_layer(source: Path, folder: Path) -> Any:
    """The target's decoder, the head loaded as one more layer, and collapsed and normed as a head is."""
    own = ("e_proj", "h_proj", "enorm", "hnorm")
    tensors = load_file(source / "model.safetensors")
    head = {n.removeprefix("mtp.0."): t for n, t in tensors.items() if n.startswith("mtp.0.")}
    trunk = {n: t for n, t in tensors.items() if not n.startswith("mtp.")}
    last = {n: head.pop(n) for n in list(head) if n.startswith(("hc_head_", "norm."))}
    layer = {f"layers.{DEPTH}.{n}": t for n, t in head.items() if not n.startswith(own)}
    config = maker.deepseek4_config(num_hidden_layers=DEPTH + 1, num_nextn_predict_layers=0)
    del config["quantization_config"], config["expert_dtype"]
    return load_model(write(folder, config, {**trunk, **layer, **last}), "float32")


def test_the_reference_is_a_layer_of_transformers_with_the_head_s_weights(
    source: Path, target: TorchTarget, drafter: MtpDeepseek4, tmp_path: Path
) -> None:
    model = with_the_head_as_its_last_layer(source, tmp_path / "longer")
    decoder, at = model.get_decoder(), torch.arange(COUNT)
    states = shifted(target.write(TOKENS, 1, [DEPTH - 1])[1][DEPTH - 1])
    tables = drafter.tables(target.tables)
    embedded = tables.embedding[torch.tensor(TOKENS)]
    joined = drafter.head.join(embedded, states)
    rotary = {kind: decoder.rotary_emb(embedded[None], at[None], layer_type=kind) for kind in ("main", "compress")}
    visible = drafter.visible(at, COUNT)
    assert not visible.tril().equal(torch.ones(COUNT, COUNT).tril().bool())  # the window is heard
    with torch.no_grad():
        given = decoder.layers[DEPTH](
            joined[None],
            position_embeddings=rotary,
            position_ids=at[None],
            attention_mask=torch.zeros(COUNT, COUNT).masked_fill(~visible, -torch.inf)[None, None],
        )
        expected = model.lm_head(decoder.norm(decoder.hc_head(given)))[0]
        nothing = (torch.zeros(1, 0, drafter.spec.head_dim),) * 2
        found, _ = drafter.head(embedded, states, at, nothing, visible)
    torch.testing.assert_close(found, given[0].flatten(1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(drafter.logits(found, tables.head), expected, atol=1e-3, rtol=1e-3)


def test_what_is_joined_is_the_sum_of_both_projections(source: Path, drafter: MtpDeepseek4) -> None:
    """As the release's own code has it: e_proj(enorm(e)) for all streams, h_proj(hnorm(x)) for each."""
    raw = {n: torch.from_numpy(t.astype("f4")) for n, t in load_file(source / "model.safetensors").items()}
    token, streams = torch.randn(5, 64), torch.randn(5, STREAMS, 64)

    def normed(x: Any, name: str) -> Any:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * raw[f"mtp.0.{name}.weight"]

    of_token = normed(token, "enorm") @ raw["mtp.0.e_proj.weight"].T
    of_streams = normed(streams, "hnorm") @ raw["mtp.0.h_proj.weight"].T
    found = drafter.head.join(token, streams.flatten(1))
    torch.testing.assert_close(found, of_token[:, None] + of_streams, atol=1e-4, rtol=1e-4)


def test_a_head_drafts_on_its_target_and_its_file_drafts_the_same(
    source: Path, target: TorchTarget, drafter: MtpDeepseek4, tmp_path: Path
) -> None:
    """T-50: what a layer keeps beside its window is put back when drafts are rejected."""
    drafted = speculative_loop(target, TorchDrafter(drafter, target), TOKENS[:70], 16, 3)
    assert drafted.tokens == greedy(target, TOKENS[:70], 16).tokens
    convert(job(source, tmp_path / "head.gguf"))
    copy = reference(*gguf_weights(tmp_path / "head.gguf"))
    (layer,) = captures_of(drafter.spec)
    states = target.write(TOKENS, 1, [layer])[1][layer]
    assert states.shape == (COUNT, STREAMS * 64)
    rows = [
        one.draft(one.read(None, states, TOKENS, target.tables), 7, 3, target.tables).logits for one in (drafter, copy)
    ]
    torch.testing.assert_close(rows[0], rows[1], atol=0, rtol=0)


def test_with_the_target_s_collapse_it_drafts_otherwise(
    source: Path, target: TorchTarget, drafter: MtpDeepseek4
) -> None:
    """Why it is not attached: in the target's file llama.cpp has output_hc_* once for both."""
    raw = load_file(source / "model.safetensors")
    published = read_published(source)
    weights = dict(checkpoint_weights(published))
    for role, part in ((Role.STREAMS_OUT, "fn"), (Role.STREAMS_OUT_BASE, "base"), (Role.STREAMS_OUT_SCALE, "scale")):
        weights[role, None] = raw[f"hc_head_{part}"]
    other = reference(published.spec, weights)
    states = target.write(TOKENS, 1, [DEPTH - 1])[1][DEPTH - 1]
    chosen = []
    for one in (drafter, other):
        context = one.read(None, states, TOKENS, target.tables)
        drafts = [one.draft(one.until(context, p), TOKENS[p], 3, target.tables).tokens for p in range(1, COUNT)]
        chosen.append(torch.stack(drafts))
    assert 0.5 < (chosen[0] == chosen[1]).float().mean() < 0.97
