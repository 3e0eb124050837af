"""MTP heads that are chained, in torch: several of them, of which each drafts one token (Step-3.5, MiMo-V2).

Every head reads what the first one does: the token at position p beside the target's state of position p - 1, here the
one before the final norm. Head i drafts the (i + 1)th token: it reads again, by its own weights, what was drafted so
far, each token beside the state that the head before it came to. A single head goes on by itself, as others do. Source:
llama.cpp's `common/speculative.cpp` (draft-mtp), `src/models/step35.cpp` and `src/models/mimo2.cpp` (graph_mtp).

Shapes as in `mtp.py`; v is the width of a head's values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, Tables, followed
from convert_drafter.converters.verify.in_torch.reference.mtp import (
    Attention,
    Head,
    KeysValues,
    Mtp,
    extended,
    shifted,
)


class WindowAttention(Attention):
    """Attention of one head through a window. What some kinds have beside it: one matrix for queries, keys and values;
    values of another width, and weighed by one number; a gate for each head; a sink, which takes a share of each head's
    attention and gives nothing.
    """

    def __init__(self, spec: DrafterSpec, roles: Collection[Role]) -> None:
        super().__init__(spec, roles)
        hidden, heads, kv_heads = spec.hidden_size, spec.head_count, spec.kv_head_count
        self.widths = [heads * spec.head_dim, kv_heads * spec.head_dim, kv_heads * spec.value_width]
        self.qkv_proj = nn.Linear(hidden, sum(self.widths), bias=False) if Role.ATTN_QKV in roles else None
        if self.qkv_proj is not None:
            del self.q_proj, self.k_proj, self.v_proj
        self.o_proj = nn.Linear(heads * spec.value_width, hidden, bias=False)
        self.g_proj = nn.Linear(hidden, heads, bias=False) if Role.ATTN_GATE in roles else None
        self.sinks = nn.Parameter(torch.zeros(heads)) if Role.ATTN_SINKS in roles else None

    def projected(self, x: Tensor) -> list[Tensor]:
        """(..., S, H) -> queries (..., n, S, d), keys (..., m, S, d) and values (..., m, S, v), none of them turned."""
        if self.qkv_proj is None:
            parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        else:
            parts = list(self.qkv_proj(x).split(self.widths, dim=-1))
        counts = (self.spec.head_count, self.spec.kv_head_count, self.spec.kv_head_count)
        return [self.heads(part, count) for part, count in zip(parts, counts, strict=True)]

    def keys_values(self, x: Tensor, at: Tensor) -> KeysValues:
        _, k, v = self.projected(x)
        return self.rope(self.k_norm(k), at), v

    def forward(self, x: Tensor, at: Tensor, every: KeysValues, visible: Tensor) -> Tensor:
        keys, values = (part.repeat_interleave(self.spec.head_count // part.shape[-3], dim=-3) for part in every)
        q = self.rope(self.q_norm(self.projected(x)[0]), at)
        scores = q @ keys.transpose(-2, -1) * self.spec.head_dim**-0.5  # (..., n, S, T + S)
        o = shares(scores.masked_fill(~visible, -torch.inf), self.sinks) @ values  # (..., n, S, v)
        if self.g_proj is not None:
            o = o * self.g_proj(x).sigmoid().transpose(-2, -1)[..., None]
        out: Tensor = self.o_proj(o.transpose(-2, -3).flatten(-2))
        scale = self.spec.attention_value_scale
        return out if scale is None else out * scale


def shares(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of each row (..., n, S, T), the share of each head's sink (n,) left out."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


class ChainContext(NamedTuple):
    """What is kept of T positions: each head's keys and values, and the target's states (T, H)."""

    heads: tuple[KeysValues, ...]
    states: Tensor


class MtpChain(Mtp):
    """Heads of which each drafts one token; states are those before the final norm."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role] = ()) -> None:
        super().__init__(spec, roles)
        for head in self.heads:
            head.layers[0].self_attn = WindowAttention(spec, roles)
        # of the target's full layers: no head uses them
        factors = torch.ones(spec.rope.dimensions // 2)
        self.rope_factors = nn.Parameter(factors) if Role.ROPE_FACTORS in roles else None

    def tables_of(self, head: Head, tables: Tables) -> Tables:
        """Embedding and output in use: the head's own, the drafter's, the target's."""
        embedding, output = super().tables(tables)
        own, own_output = head.embed_tokens, head.lm_head
        return Tables(embedding if own is None else own.weight, output if own_output is None else own_output.weight)

    def step(
        self, head: Head, tokens: Sequence[int], states: Tensor, before: KeysValues, tables: Tables
    ) -> tuple[Tensor, Tensor, KeysValues]:
        """The tokens after `before`, beside the states (S, H) of the positions before them, through one head.

        The last one's state (1, H) and logits (1, vocab), and keys and values with those of these positions.
        """
        embedding, output = self.tables_of(head, tables)
        length = before[0].shape[-2]
        at = torch.arange(length, length + len(tokens), device=states.device)
        x = head.join(embedding[list(tokens)].to(states.dtype), states)
        every = extended(before, head.layers[0].keys_values(x, at))
        visible = self.visible(at, length + len(tokens))
        state: Tensor = head.layers[0](x, at, every, visible)[-1:]
        norm = self.norm if head.norm is None else head.norm
        return state, self.logits(state if norm is None else norm(state), output), every

    # --- ReferenceDrafter ---

    def tables(self, tables: Tables) -> Tables:
        return self.tables_of(self.head, tables)

    def read(  # type: ignore[override]  # a context of its own
        self, context: ChainContext | None, captured: Tensor, tokens: Sequence[int], tables: Tables
    ) -> ChainContext:
        """`captured` (n, H) are states of the next n positions; every head reads them."""
        start = 0 if context is None else len(context.states)
        at = torch.arange(start, start + len(captured), device=captured.device)
        states = shifted(captured, None if context is None else context.states[-1:])
        read = list(tokens[start : start + len(captured)])
        new = []
        for head in self.heads:
            embedding, _ = self.tables_of(head, tables)
            new.append(head.keys_values(embedding[read].to(captured.dtype), states, at))
        if context is None:
            return ChainContext(tuple(new), captured)
        grown = tuple(extended(old, more) for old, more in zip(context.heads, new, strict=True))
        return ChainContext(grown, torch.cat([context.states, captured]))

    def until(self, context: ChainContext, length: int) -> ChainContext:  # type: ignore[override]
        heads = tuple(tuple(part[..., :length, :] for part in known) for known in context.heads)
        return ChainContext(heads, context.states[:length])

    @torch.no_grad()
    def draft(
        self, context: ChainContext, anchor: int, count: int, tables: Tables, follow: Sequence[int] | None = None
    ) -> Drafted:
        """A draft by each head, over all before it; a single head over what it keeps of them."""
        single = len(self.heads) == 1
        tokens, states, known, drafts, rows = [anchor], context.states[-1:], context.heads[0], [], []
        for i in range(count):
            head, before = (self.head, known) if single else (self.heads[i], context.heads[i])
            state, logits, known = self.step(head, tokens, states, before, tables)
            rows.append(logits[0])
            drafts.append(rows[-1].argmax())
            token = followed(drafts, follow)
            tokens = [token] if single else [*tokens, token]
            states = state if single else torch.cat([states, state])
        return Drafted(torch.stack(drafts), torch.stack(rows))
