"""A layer of Gemma 4 in torch, whatever it attends to: norms before and after both halves.

Source: transformers' `models/gemma4`. The modules carry the checkpoint's tensor names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import ACTIVATIONS, DrafterSpec
from convert_drafter.converters.verify.in_torch.reference.dflash import Attention, DFlash, RMSNorm

GELU = partial(F.gelu, approximate="tanh")
# What llama.cpp takes an activation's name for (src/models/dflash.cpp); without one it is Gemma's.
ACTIVATION: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys((None, *ACTIVATIONS), GELU),
    "silu": F.silu,
}


class FeedForward(nn.Module):
    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.feed_forward_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.feed_forward_size, bias=False)
        self.down_proj = nn.Linear(spec.feed_forward_size, spec.hidden_size, bias=False)
        self.activation = ACTIVATION[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Norms before and after both halves, and one number that multiplies what comes out."""

    def __init__(self, spec: DrafterSpec, attention: nn.Module) -> None:
        super().__init__()
        size, epsilon = spec.hidden_size, spec.norm_epsilon
        self.input_layernorm = RMSNorm(size, epsilon)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(size, epsilon)
        self.pre_feedforward_layernorm = RMSNorm(size, epsilon)
        self.mlp = FeedForward(spec)
        self.post_feedforward_layernorm = RMSNorm(size, epsilon)
        self.layer_scalar = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, *seen: Any) -> Tensor:
        """`seen` is what attention takes beside the states."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), *seen))
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x * self.layer_scalar


def gemma4_dspark(spec: DrafterSpec, roles: Collection[Role] = ()) -> DFlash:
    """DSpark with these layers: everything else is as in `dflash` and `dspark`.

    Logits are capped before the Markov head adds its bias, as the model was trained (DeepSpec's Gemma4DSparkModel).
    llama.cpp does not cap them: it computes what this does of facts without a `logit_softcap`.
    """

    def layer(spec: DrafterSpec, i: int, roles: Collection[Role]) -> nn.Module:
        return Layer(spec, Attention(spec, i, roles, own_values=False))

    return DFlash(spec, roles, layer)
