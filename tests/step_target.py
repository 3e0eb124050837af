"""A Step-3.5 target in torch, for tests: transformers has its decoder (`step3p7`), but no causal model over it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from convert_drafter.converters.verify.in_torch.reference.drafter import Tables

RENAMED = {
    ".moe.gate.weight": ".mlp.gate.weight",
    ".moe.router_bias": ".mlp.gate.e_score_correction_bias",
    ".moe.down_proj.weight": ".mlp.experts.down_proj",
    ".share_expert.": ".mlp.shared_experts.",
}


class StepTarget:
    """As much of a `TorchTarget` as a comparison of drafts needs."""

    def __init__(self, folder: Path) -> None:
        config = Step3p7TextConfig(**json.loads((folder / "config.json").read_text()))
        with torch.device("meta"):
            self.model = Step3p7TextModel(config)
        self.layer_count = config.num_hidden_layers
        tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        self.tables = Tables(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])
        wanted = dict(self.model.state_dict())
        state = {name: tensor for name, tensor in renamed(tensors).items() if name in wanted}
        self.model.load_state_dict(state, assign=True)
        self.model.rotary_emb = type(self.model.rotary_emb)(config=config)  # it has no weights of its own
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def write(
        self, prompt: Sequence[int], count: int, layers: Iterable[int] = ()
    ) -> tuple[list[int], dict[int, Tensor]]:
        """The next token, and the states of every position: layer -> (T, H)."""
        assert count == 1
        found: dict[int, Tensor] = {}
        hooks = [
            self.model.layers[layer].register_forward_hook(
                lambda m, args, out, layer=layer: found.update({layer: out[0]})
            )
            for layer in layers
        ]
        out = self.model(input_ids=torch.tensor([list(prompt)]), use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        return [int((out[0, -1] @ self.tables.head.T).argmax())], found


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers renames them where it reads a Step-3.7 (conversion_mapping.py)."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.")
        if fused := re.fullmatch(r"(.*)\.moe\.(?:gate|up)_proj\.weight", short):
            both = [tensors[f"model.{fused[1]}.moe.{part}_proj.weight"] for part in ("gate", "up")]
            out[f"{fused[1]}.mlp.experts.gate_up_proj"] = torch.cat(both, dim=1)
            continue
        for old, new in RENAMED.items():
            short = short.replace(old, new)
        out[short] = tensor
    return out
