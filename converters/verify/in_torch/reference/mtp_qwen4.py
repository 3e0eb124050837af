"""An MTP head of several residual streams in torch (Qwen4Exp), to be read from top to bottom.

As other heads it reads a token beside the target's state of the position before, here all streams of it before they are
mixed, and hands all of its own on. Each part of its layer reads one mixture of the streams and gives to each its share.
Attention looks at the positions that an indexer chooses, in pools of neighbours, and at those after the last whole
pool. Source: transformers' `qwen4_exp`, and llama.cpp's `src/models/qwen4exp.cpp` (graph_mtp).

Shapes as in `mtp.py`; C streams, so that a state is C * H wide; P pools, r and i the indexer's heads and their width.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from convert_drafter.converters.roles import Role, TensorKey
from convert_drafter.converters.spec import DrafterSpec, Indexer, Streams
from convert_drafter.converters.verify.in_torch.reference.dflash import RMSNorm
from convert_drafter.converters.verify.in_torch.reference.mixture import Mixture
from convert_drafter.converters.verify.in_torch.reference.mtp import Attention, Head, KeysValues
from convert_drafter.converters.verify.in_torch.reference.mtp_chain import MtpChain
from convert_drafter.converters.verify.in_torch.reference.rope import rotate

_LAYER = "layers.0."
# Parameters of one head, beside those in `mtp.py`; where others norm for the output head, this one mixes its streams.
NAMES = {
    Role.INDEXER_Q_PROJ: f"{_LAYER}self_attn.indexer.q_proj.weight",
    Role.INDEXER_K_PROJ: f"{_LAYER}self_attn.indexer.k_proj.weight",
    Role.INDEXER_Q_NORM: f"{_LAYER}self_attn.indexer.q_norm.weight",
    Role.ATTN_MIX_NORM: f"{_LAYER}attn_streams.norm.weight",
    Role.ATTN_MIX_DOWN: f"{_LAYER}attn_streams.down.weight",
    Role.ATTN_MIX_UP: f"{_LAYER}attn_streams.up.weight",
    Role.ATTN_SHARES: f"{_LAYER}attn_streams.shares.weight",
    Role.FFN_MIX_NORM: f"{_LAYER}mlp_streams.norm.weight",
    Role.FFN_MIX_DOWN: f"{_LAYER}mlp_streams.down.weight",
    Role.FFN_MIX_UP: f"{_LAYER}mlp_streams.up.weight",
    Role.FFN_SHARES: f"{_LAYER}mlp_streams.shares.weight",
    Role.NEXTN_MIX_NORM: "norm.norm.weight",
    Role.NEXTN_MIX_DOWN: "norm.down.weight",
    Role.NEXTN_MIX_UP: "norm.up.weight",
}


class StreamNorm(nn.Module):
    """Each stream by itself, (..., C * H) -> the same, with weights of all of them."""

    def __init__(self, spec: DrafterSpec, facts: Streams) -> None:
        super().__init__()
        self.count, self.epsilon = facts.count, spec.norm_epsilon
        self.weight = nn.Parameter(torch.ones(facts.count * spec.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.unflatten(-1, (self.count, -1))
        normed = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.epsilon)
        return normed.flatten(-2) * self.weight


class Mixing(nn.Module):
    """One state of all streams: their mean, each number of it gated. As the output's it has no shares."""

    def __init__(self, spec: DrafterSpec, facts: Streams, shared: bool = True) -> None:
        super().__init__()
        self.count, width = facts.count, facts.count * spec.hidden_size
        self.norm = StreamNorm(spec, facts)
        self.down = nn.Linear(width, facts.rank, bias=False)
        self.up = nn.Linear(facts.rank, width, bias=False)
        self.shares = nn.Linear(width, facts.count, bias=False) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C * H) -> (..., H)"""
        normed = self.norm(x)
        gates = self.up(nn.functional.silu(self.down(normed) / self.count)).sigmoid()
        out: Tensor = (gates * normed).unflatten(-1, (self.count, -1)).mean(-2)
        return out

    def spread(self, x: Tensor, out: Tensor) -> Tensor:
        """The streams (..., C * H) with what was made of their mixture (..., H), to each its share of it."""
        assert self.shares is not None
        parts = 2 * (self.shares(self.norm(x)) / self.count).sigmoid()  # (..., C)
        return x + (out[..., None, :] * parts[..., None]).flatten(-2)


class PoolIndexer(nn.Module):
    """Chooses pools of positions by the mean of their keys, which is turned as the first of them."""

    def __init__(self, spec: DrafterSpec, facts: Indexer) -> None:
        super().__init__()
        self.spec, self.facts, self.size = spec, facts, facts.pool_size or 1
        self.q_proj = nn.Linear(spec.hidden_size, facts.head_count * facts.head_dim, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, facts.head_dim, bias=False)
        self.q_norm = RMSNorm(facts.head_dim, spec.norm_epsilon)
        self.k_norm = RMSNorm(facts.head_dim, spec.norm_epsilon)

    def rope(self, x: Tensor, at: Tensor) -> Tensor:
        return rotate(x, at, self.spec.rope, self.spec.rope.theta, self.spec.context_length)

    def scores(self, x: Tensor, at: Tensor, raw: Tensor) -> Tensor:
        """Of each query for each whole pool of the T positions whose keys are `raw` (1, T, i): (S, P)."""
        pools = raw.shape[-2] // self.size
        means = raw[:, : pools * self.size].unflatten(-2, (pools, self.size)).mean(-2)  # (1, P, i)
        keys = self.rope(self.k_norm(means), torch.arange(pools, device=x.device) * self.size)
        q = self.q_proj(x).unflatten(-1, (self.facts.head_count, -1)).transpose(-2, -3)  # (r, S, i)
        q = self.rope(self.q_norm(q), at)
        return (q @ keys.transpose(-1, -2)).relu().sum(-3) / math.sqrt(self.facts.head_dim)

    def forward(self, x: Tensor, at: Tensor, raw: Tensor, visible: Tensor) -> Tensor:
        """Which of the `visible` (S, T) each query at `at` (S,) looks at: those before it from position 0 on."""
        length = visible.shape[-1]
        whole = visible.sum(-1, keepdim=True) // self.size  # (S, 1) pools that a query sees all of
        scores = self.scores(x, at, raw)
        unseen = torch.arange(scores.shape[-1], device=x.device) >= whole  # (S, P)
        best = scores.masked_fill(unseen, -torch.inf).topk(min(self.facts.top_k // self.size, scores.shape[-1])).indices
        chosen = torch.zeros_like(unseen).scatter(-1, best, True).repeat_interleave(self.size, dim=-1)
        chosen = nn.functional.pad(chosen, (0, length - chosen.shape[-1]))
        rest = torch.arange(length, device=x.device) >= whole * self.size
        return visible & (chosen & ~rest | rest)


class PoolAttention(Attention):
    """Attention to what its indexer chooses. Of a position the indexer's key is kept as well: (1, T, i), as it is."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role]) -> None:
        super().__init__(spec, roles)
        assert spec.indexer is not None
        self.indexer = PoolIndexer(spec, spec.indexer)

    def keys_values(self, x: Tensor, at: Tensor) -> KeysValues:
        return (*super().keys_values(x, at), self.indexer.k_proj(x).unsqueeze(-3))

    def forward(self, x: Tensor, at: Tensor, every: KeysValues, visible: Tensor) -> Tensor:
        keys, values, raw = every
        return super().forward(x, at, (keys, values), self.indexer(x, at, raw, visible))


class StreamLayer(nn.Module):
    """Attention, then a mixture of experts; each reads the streams mixed."""

    def __init__(self, spec: DrafterSpec, facts: Streams, roles: Collection[Role]) -> None:
        super().__init__()
        assert spec.experts is not None
        self.attn_streams, self.mlp_streams = Mixing(spec, facts), Mixing(spec, facts)
        self.self_attn = PoolAttention(spec, roles)
        self.mlp = Mixture(spec, spec.experts, roles)

    def keys_values(self, x: Tensor, at: Tensor) -> KeysValues:
        return self.self_attn.keys_values(self.attn_streams(x), at)

    def forward(self, x: Tensor, at: Tensor, every: KeysValues, visible: Tensor) -> Tensor:
        x = self.attn_streams.spread(x, self.self_attn(self.attn_streams(x), at, every, visible))
        return self.mlp_streams.spread(x, self.mlp(self.mlp_streams(x)))


class StreamHead(Head):
    """The head; `norm` is the mixing whose state the output head reads."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role]) -> None:
        super().__init__(spec, roles)
        assert spec.streams is not None
        self.count = spec.streams.count
        self.pre_fc_norm_hidden = StreamNorm(spec, spec.streams)
        self.layers = nn.ModuleList([StreamLayer(spec, spec.streams, roles)])
        self.norm = Mixing(spec, spec.streams, shared=False)

    def join(self, embedded: Tensor, states: Tensor) -> Tensor:
        """A token's embedding (..., S, H) beside each stream of the state before it, (..., S, C * H) -> the same."""
        normed = self.pre_fc_norm_hidden(states).unflatten(-1, (self.count, -1))  # (..., S, C, H)
        token = self.pre_fc_norm_embedding(embedded).unsqueeze(-2).expand(normed.shape)
        out: Tensor = self.fc(torch.cat([token, normed], dim=-1)).flatten(-2)
        return out


class MtpQwen4(MtpChain):
    """A head of several streams as a drafter; states are all streams of a position."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role] = ()) -> None:
        super().__init__(spec, roles)
        self.heads = nn.ModuleList([StreamHead(spec, roles) for _ in spec.layers])

    @staticmethod
    def parameter_names(spec: DrafterSpec) -> dict[TensorKey, str]:
        own = {(role, i): f"heads.{n}.{name}" for n, i in enumerate(spec.layers) for role, name in NAMES.items()}
        return MtpChain.parameter_names(spec) | own
