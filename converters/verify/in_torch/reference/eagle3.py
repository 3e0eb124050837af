"""EAGLE-3 in torch, to be read from top to bottom: what a converted drafter has to compute.

The target's states after three layers are fused into one feature per position. One decoder layer reads pairs of a token
and the feature of the position before it; its output is the next draft, and at the same time stands for the feature
that the target has not computed yet. Source of the algorithm: SafeAILab/EAGLE (arXiv 2503.01840) and llama.cpp's
`src/models/eagle3.cpp` and `common/speculative.cpp` (11434).

Shapes: T positions read, S pairs at once, H hidden, K capture layers, n/m heads and kv heads, d head_dim, V target
vocabulary, D rows of the drafter's own head; `...` are leading batch dimensions. The modules carry the checkpoint's
tensor names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.in_torch.reference.dflash import FeedForward, RMSNorm
from convert_drafter.converters.verify.in_torch.reference.drafter import (
    Drafted,
    Tables,
    followed,
    over_head,
    spread_over,
)
from convert_drafter.converters.verify.in_torch.reference.rope import rotate


class Past(NamedTuple):
    """Keys, turned by their positions, and values of pairs 0, 1, ...: (..., m, S, d) both."""

    keys: Tensor
    values: Tensor

    def followed_by(self, new: Past) -> Past:
        return Past(torch.cat([self.keys, new.keys], dim=-2), torch.cat([self.values, new.values], dim=-2))

    def first(self, count: int) -> Past:
        return Past(self.keys[..., :count, :], self.values[..., :count, :])


class Context(NamedTuple):
    """Features (T, H) of all positions read, and the keys and values of their complete pairs.

    Pair p is the token at position p + 1 with the feature of position p. So the last pair, T - 1, is not complete: its
    token is the anchor, which comes with the request for drafts.
    """

    features: Tensor
    past: Past


class Attention(nn.Module):
    """Causal attention whose input is twice as wide as the drafter: a token and a feature side by side."""

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.spec = spec
        wide, d = 2 * spec.hidden_size, spec.head_dim
        self.q_proj = nn.Linear(wide, spec.head_count * d, bias=False)
        self.k_proj = nn.Linear(wide, spec.kv_head_count * d, bias=False)
        self.v_proj = nn.Linear(wide, spec.kv_head_count * d, bias=False)
        self.o_proj = nn.Linear(spec.head_count * d, spec.hidden_size, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(..., S, heads * d) -> (..., heads, S, d)"""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(-2, -3)

    def forward(
        self, u: Tensor, at: Tensor, past: Past, factors: Tensor | None, visible: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        """u (..., S, 2H) at the positions `at` (S,) after `past` -> (..., S, H), and the keys and values of both.

        `visible` (S, past + S) is True where a query may look, by default at every pair before it and at its own.
        """
        theta, trained = self.spec.rope.theta, self.spec.context_length
        q = rotate(self.heads(self.q_proj(u)), at, self.spec.rope, theta, trained, factors)
        k = rotate(self.heads(self.k_proj(u)), at, self.spec.rope, theta, trained, factors)
        before = past.keys.shape[-2]
        past = past.followed_by(Past(k, self.heads(self.v_proj(u))))
        if visible is None:
            visible = torch.ones(len(at), past.keys.shape[-2], dtype=torch.bool, device=u.device).tril(before)
        o = F.scaled_dot_product_attention(q, past.keys, past.values, attn_mask=visible, enable_gqa=True)
        return self.o_proj(o.transpose(-2, -3).flatten(-2)), past


class Layer(nn.Module):
    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.norm_before_residual = spec.norm_before_residual
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.mlp = FeedForward(spec)

    def forward(
        self, x: Tensor, g: Tensor, at: Tensor, past: Past, factors: Tensor | None, visible: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        """Embeddings x and features g (..., S, H) -> (..., S, H)."""
        normed = self.hidden_norm(g)
        o, past = self.self_attn(torch.cat([self.input_layernorm(x), normed], dim=-1), at, past, factors, visible)
        h = (normed if self.norm_before_residual else g) + o
        return h + self.mlp(self.post_attention_layernorm(h)), past


class Eagle3(nn.Module):
    """An EAGLE-3 drafter. `roles` are the tensors it has beside those every EAGLE-3 drafter has.

    Embedding and head are the target's, unless they are among `roles`.
    """

    depends = True

    def __init__(self, spec: DrafterSpec, roles: Collection[Role] = ()) -> None:
        super().__init__()
        self.spec = spec
        width, hidden = len(spec.capture_layers) * spec.target_hidden_size, spec.hidden_size
        rows = spec.draft_vocab_size or spec.vocab_size
        self.input_norm = RMSNorm(width, spec.norm_epsilon) if spec.norm_before_fc else None
        self.fc = nn.Linear(width, hidden, bias=False)
        self.layers = nn.ModuleList([Layer(spec)])
        self.norm = RMSNorm(hidden, spec.norm_epsilon)
        self.embed_tokens = nn.Embedding(spec.vocab_size, hidden) if Role.TOKEN_EMBEDDING in roles else None
        self.lm_head = nn.Linear(hidden, rows, bias=False) if Role.OUTPUT in roles else None
        self.d2t = nn.Parameter(torch.zeros(rows)) if Role.DRAFT_TO_TARGET in roles else None
        factors = torch.ones(spec.rope.dimensions // 2)
        self.rope_factors = nn.Parameter(factors) if Role.ROPE_FACTORS in roles else None

    def fuse(self, captured: Tensor) -> Tensor:
        """Captured states side by side in capture order -> features: (..., T, K * H) -> (..., T, H)."""
        features: Tensor = self.fc(captured if self.input_norm is None else self.input_norm(captured))
        return features

    def forward(
        self, x: Tensor, g: Tensor, at: Tensor, past: Past, visible: Tensor | None = None
    ) -> tuple[Tensor, Past]:
        """Pairs of embeddings x and features g (..., S, H) -> states (..., S, H), which serve as the next features."""
        states, past = self.layers[0](x, g, at, past, self.rope_factors, visible)
        return states, past

    def logits(self, states: Tensor, head: Tensor) -> Tensor:
        """States (..., S, H) -> (..., S, D); only here are they normed."""
        head = head if self.lm_head is None else self.lm_head.weight
        normed = self.norm(states)
        return over_head(normed, head)

    def spread(self, logits: Tensor) -> Tensor:
        """Logits over the drafter's own rows (..., D) -> over the target's vocabulary (..., V)."""
        return spread_over(self.spec.vocab_size, self.d2t, logits)

    def embed(self, tokens: Sequence[int], tables: Tables) -> Tensor:
        """(S,) -> (S, H); no runtime scales them, whatever the target does with its own."""
        table = tables.embedding if self.embed_tokens is None else self.embed_tokens.weight
        return table[torch.tensor(tokens, device=table.device)].to(self.fc.weight.dtype)

    # --- ReferenceDrafter ---

    def read(self, context: Context | None, captured: Tensor, tokens: Sequence[int], tables: Tables) -> Context:
        """New features, and the pairs that they complete: with the last of n more positions, the pair before it."""
        features, past = self.fuse(captured), self.nothing(captured)
        if context is not None:
            features, past = torch.cat([context.features, features]), context.past
        first, last = past.keys.shape[-2], len(features) - 1  # pairs first, ..., last - 1 are complete now
        if last > first:
            at = torch.arange(first, last, device=captured.device)
            x = self.embed(tokens[first + 1 : last + 1], tables)
            _, past = self(x, features[first:last], at, past)
        return Context(features, past)

    def nothing(self, like: Tensor) -> Past:
        """Of no pair."""
        empty = torch.zeros(self.spec.kv_head_count, 0, self.spec.head_dim, dtype=self.fc.weight.dtype)
        return Past(empty.to(like.device), empty.to(like.device))

    def until(self, context: Context, length: int) -> Context:
        return Context(context.features[:length], context.past.first(max(0, length - 1)))

    @torch.no_grad()
    def draft(
        self, context: Context, anchor: int, count: int, tables: Tables, follow: Sequence[int] | None = None
    ) -> Drafted:
        """The anchor with the last feature gives the first draft; each draft with the state it came from the next."""
        token, g, past = anchor, context.features[-1:], context.past
        tokens, scored = list[Tensor](), list[Tensor]()
        for i in range(count):
            at = torch.tensor([len(context.features) - 1 + i], device=g.device)
            g, past = self(self.embed([token], tables), g, at, past)
            scored.append(self.spread(self.logits(g, tables.head))[0])
            tokens.append(scored[-1].argmax())
            token = followed(tokens, follow)
        return Drafted(torch.stack(tokens), torch.stack(scored))
