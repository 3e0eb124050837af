"""A mixture of experts in torch, as the MTP heads of several families have one.

Shapes: H hidden, E experts; `...` are leading batch dimensions. Sources: llama.cpp's `src/llama-graph.cpp`
(build_moe_ffn), DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) for biases and groups.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Experts
from convert_drafter.converters.verify.in_torch.reference.dflash import FeedForward

AVERAGED = frozenset({"mtp-cohere2moe"})  # half of what the chosen experts and the shared one give together
SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
BEST_OF_GROUP = 2  # a group is worth as much as its two best experts together


class Projections(nn.Module):
    """The weights of all experts, (experts, out, in) each. Without a gate the activation is a squared ReLU."""

    def __init__(self, experts: int, width: int, hidden: int, gated: bool, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj = Stacked(experts, width, hidden) if gated else None
        self.up_proj = Stacked(experts, width, hidden)
        self.down_proj = Stacked(experts, hidden, width)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """(tokens, H) through one expert."""
        inner = x @ self.up_proj.weight[expert].T
        if self.gate_proj is None:
            gated = F.relu(inner).square()
        else:
            gated = swiglu(x @ self.gate_proj.weight[expert].T, inner, self.limit)
        return gated @ self.down_proj.weight[expert].T


def swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    """SiLU of the gate times up; the gate is cut off above `limit`, up at both sides."""
    return F.silu(gate) * up if limit is None else F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


class Stacked(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Squared(nn.Module):
    """A feed-forward without a gate: a squared ReLU."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(hidden, width, bias=False), nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.relu(self.up_proj(x)).square())
        return out


class Limited(FeedForward):
    """A feed-forward whose activation is cut off."""

    def __init__(self, spec: DrafterSpec, limit: float | None) -> None:
        super().__init__(spec)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))
        return out


class Mixture(nn.Module):
    """A few of many experts for each token, and one for all, which a gate of its own may weigh."""

    def __init__(self, spec: DrafterSpec, experts: Experts, roles: Collection[Role]) -> None:
        super().__init__()
        self.facts = experts
        self.averaged = spec.kind in AVERAGED and experts.shared_feed_forward_size is not None
        shared = experts.shared_feed_forward_size
        self.gate = nn.Linear(spec.hidden_size, experts.count, bias=False)
        self.choice_bias = nn.Parameter(torch.zeros(experts.count)) if Role.FFN_ROUTER_BIAS in roles else None
        hidden, latent, gated = spec.hidden_size, experts.latent_size, Role.FFN_GATE_EXPERTS in roles
        self.experts = Projections(experts.count, spec.feed_forward_size, latent or hidden, gated, experts.limit)
        self.latent_down = nn.Linear(hidden, latent, bias=False) if latent else nn.Identity()
        self.latent_up = nn.Linear(latent, hidden, bias=False) if latent else nn.Identity()
        own = Limited(replace(spec, feed_forward_size=shared), experts.limit) if shared and gated else None
        self.shared_expert = own or (Squared(hidden, shared) if shared else None)
        weighed = Role.FFN_SHARED_ROUTER in roles
        self.shared_expert_gate = nn.Linear(spec.hidden_size, 1, bias=False) if weighed else None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, H)
        shares, chosen = self.route(flat)
        read = self.latent_down(flat)
        out = torch.zeros_like(read)
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            out = out.index_add(0, token, self.experts(read[token], expert) * shares[token, place, None])
        out = (self.latent_up(out) + self.shared(flat)).reshape(x.shape)
        return out / 2 if self.averaged else out

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Shares and numbers of each token's experts, both (tokens, used)."""
        facts, logits = self.facts, self.gate(flat)
        scores = SCORES[facts.scoring or "softmax"](logits)  # (tokens, E)
        worth = scores if self.choice_bias is None else scores + self.choice_bias
        chosen = self.in_best_groups(worth).topk(facts.used).indices
        shares = scores.gather(-1, chosen)
        if facts.normed is not False:
            shares = shares / shares.sum(-1, keepdim=True)
        return shares if facts.scale is None else shares * facts.scale, chosen

    def in_best_groups(self, worth: Tensor) -> Tensor:
        """What experts are worth, (tokens, E), nothing outside of the best groups."""
        groups, used = self.facts.groups or 1, self.facts.groups_used or 1
        if groups == 1:
            return worth
        parted = worth.unflatten(-1, (groups, -1))  # (tokens, groups, E / groups)
        best = parted.topk(BEST_OF_GROUP).values.sum(-1).topk(used).indices
        inside = torch.zeros_like(parted[..., 0]).scatter(-1, best, 1).bool()
        return parted.masked_fill(~inside[..., None], -torch.inf).flatten(-2)

    def shared(self, flat: Tensor) -> Tensor:
        if self.shared_expert is None:
            return torch.zeros_like(flat)
        out: Tensor = self.shared_expert(flat)
        return out if self.shared_expert_gate is None else out * self.shared_expert_gate(flat).sigmoid()
