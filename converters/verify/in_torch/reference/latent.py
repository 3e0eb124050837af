"""Multi-head latent attention in torch, as the MTP heads of several families have it.

A position is kept as one narrow state for all heads, out of which each head has its keys and values, and one part of a
key that is rotated and the same for all heads. Sources: DeepSeek-V2 (arXiv 2405.04434, section 2.1), transformers'
`glm4_moe_lite`; llama.cpp's `src/models/deepseek2.cpp` (graph_mtp) computes the same with queries that go through the
keys' projection first.

Shapes: S positions in one pass, T before them, H hidden, n heads, r rank of the state, p plain and t turned dimensions
of a key, v of a value; `...` are leading batch dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Indexer, LatentAttention, yarn_attention
from convert_drafter.converters.verify.in_torch.reference.dflash import RMSNorm
from convert_drafter.converters.verify.in_torch.reference.rope import rotate


class Chooser(nn.Module):
    """The weights of an indexer, which no draft hears: like llama.cpp's head, this one looks at every position.

    Up to as many positions as the indexer chooses that is the same.
    """

    def __init__(self, spec: DrafterSpec, facts: LatentAttention, indexer: Indexer) -> None:
        super().__init__()
        self.wq_b = nn.Linear(facts.query_rank or 0, indexer.head_count * indexer.head_dim, bias=False)
        self.wk = nn.Linear(spec.hidden_size, indexer.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(indexer.head_dim)
        self.weights_proj = nn.Linear(spec.hidden_size, indexer.head_count, bias=False)


class Latent(nn.Module):
    """Full attention over the keys and values of all heads, which are made of the latent states once."""

    def __init__(self, spec: DrafterSpec, facts: LatentAttention, roles: Collection[Role]) -> None:
        super().__init__()
        self.spec, self.facts = spec, facts
        hidden, heads = spec.hidden_size, spec.head_count
        self.turned = spec.rope.dimensions
        self.plain = spec.head_dim - self.turned
        scaling = spec.rope.scaling
        stretched = 1.0 if scaling is None else yarn_attention(scaling.factor, scaling.log_multiplier or 0.0)
        self.scale = stretched**2 / math.sqrt(spec.head_dim)
        if facts.query_rank is None:
            self.q_proj = nn.Linear(hidden, heads * spec.head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, facts.query_rank, bias=False)
            self.q_a_layernorm = RMSNorm(facts.query_rank, spec.norm_epsilon)
            self.q_b_proj = nn.Linear(facts.query_rank, heads * spec.head_dim, bias=False)
        self.kv_a_proj = nn.Linear(hidden, facts.kv_rank + self.turned, bias=False)
        self.kv_a_layernorm = RMSNorm(facts.kv_rank, spec.norm_epsilon)
        self.k_b = nn.Parameter(torch.zeros(heads, facts.kv_rank, self.plain))
        self.v_b = nn.Parameter(torch.zeros(heads, facts.value_head_dim, facts.kv_rank))
        self.o_proj = nn.Linear(heads * facts.value_head_dim, hidden, bias=False)
        self.g_proj = nn.Linear(hidden, heads, bias=False) if Role.ATTN_GATE in roles else None
        chooses = spec.indexer is not None and Role.INDEXER_Q_B in roles
        self.indexer = Chooser(spec, facts, spec.indexer) if chooses and spec.indexer else None

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """(..., S, t) in pairs of neighbours -> the same turned by its position, all first ones before all second ones.

        Queries and keys are put into this order alike, so that their products are the same.
        """
        halves = torch.cat([x[..., ::2], x[..., 1::2]], dim=-1)
        return rotate(halves, at, self.spec.rope, self.spec.rope.theta, self.spec.context_length)

    def queries(self, x: Tensor) -> Tensor:
        """(..., S, H) -> (..., S, n * (p + t))"""
        found: Tensor
        found = self.q_proj(x) if self.facts.query_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        return found

    def keys_values(self, x: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """(..., S, H) -> keys (..., n, S, p + t) and values (..., n, S, v)."""
        state, turned = self.kv_a_proj(x).split([self.facts.kv_rank, self.turned], dim=-1)
        state = self.kv_a_layernorm(state).unsqueeze(-3)  # (..., 1, S, r)
        keys, values = state @ self.k_b, state @ self.v_b.transpose(-1, -2)
        shared = self.turn(turned, at).unsqueeze(-3).expand(*keys.shape[:-1], self.turned)
        return torch.cat([keys, shared], dim=-1), values

    def forward(self, x: Tensor, at: Tensor, every: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """`every` holds the keys and values of all T + S positions, `visible` (S, T + S) where a query may look."""
        q = self.queries(x).unflatten(-1, (self.spec.head_count, -1)).transpose(-2, -3)  # (..., n, S, p + t)
        plain, turned = q.split([self.plain, self.turned], dim=-1)
        q = torch.cat([plain, self.turn(turned, at)], dim=-1)
        o = F.scaled_dot_product_attention(q, *every, attn_mask=visible, scale=self.scale)
        if self.g_proj is not None:
            o = o * self.g_proj(x).sigmoid().transpose(-1, -2).unsqueeze(-1)  # a number for each head
        out: Tensor = self.o_proj(o.transpose(-2, -3).flatten(-2))  # (..., S, H)
        return out
