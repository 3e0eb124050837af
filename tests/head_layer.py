"""A head's decoder layer as transformers computes it: the checkpoint again, its head loaded as an ordinary layer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mtp_checkpoints import DELETE, reconfigure

COUNT = 40  # positions


def head_and_layer(source: Path, longer: Path, depth: int, **changes: Any) -> tuple[Any, Any]:
    """Final states of 40 positions, (40, H): the reference's, and those of transformers' layer under the same norm.

    `changes` are what the config has to say beside one more layer.
    """
    import torch

    from convert_drafter.converters.convert import read_published
    from convert_drafter.converters.verify.in_torch.reference.mtp import Mtp, shifted
    from convert_drafter.converters.verify.in_torch.target import TorchTarget, load_model
    from convert_drafter.converters.verify.in_torch.text import FINAL
    from convert_drafter.converters.verify.in_torch.weights import checkpoint_weights, reference

    published, tokens = read_published(source), list(range(7, 7 + COUNT))
    spec, drafter = published.spec, reference(published.spec, checkpoint_weights(published))
    assert isinstance(drafter, Mtp)
    target = TorchTarget(source)
    states = target.write(tokens, 1, [FINAL])[1][FINAL]
    embedding = drafter.tables(target.tables).embedding[torch.tensor(tokens)]
    joined, at = drafter.head.join(embedding, shifted(states)), torch.arange(COUNT)
    shutil.copytree(source, longer)
    config = {"num_hidden_layers": depth + 1, "num_nextn_predict_layers": DELETE}
    decoder = load_model(reconfigure(longer, **config, **changes), "float32").get_decoder()
    mask = torch.full((COUNT, COUNT), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        out = decoder.layers[depth](
            joined[None], position_embeddings=decoder.rotary_emb(joined[None], at[None]), attention_mask=mask
        )
        nothing = torch.zeros(spec.kv_head_count, 0, spec.head_dim)
        visible = torch.ones(COUNT, COUNT, dtype=torch.bool).tril()
        found, _ = drafter.head(embedding, shifted(states), at, (nothing, nothing), visible)
        norm = drafter.head.norm or drafter.norm
        assert norm is not None
        expected = norm((out[0] if isinstance(out, tuple) else out).reshape(COUNT, -1))
    return (norm(found) if drafter.head.norm is None else found), expected
