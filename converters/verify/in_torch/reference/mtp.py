"""An MTP head (NextN) in torch, to be read from top to bottom: what a converted head has to compute.

A head is one more decoder layer of its target. At position p it reads the token there and the target's final hidden
state of the position before, and predicts the token at p + 1. To draft further it reads its own draft and its own
output in place of the target's state. Source of the algorithm: DeepSeek-V3 (arXiv 2412.19437, section 2.2), in the form
of llama.cpp's `src/models/qwen35.cpp` (graph_mtp) and `common/speculative.cpp` (draft-mtp).

Shapes: T positions read, S positions in one pass, H hidden, n/m heads and kv heads, d head_dim; `...` are leading batch
dimensions. The modules carry the tensor names of a Qwen3.5 checkpoint behind its `mtp.`; norms multiply by their
weight as it is, where the checkpoint stores what it differs from one by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Experts
from convert_drafter.converters.verify.in_torch.reference.dflash import FeedForward, RMSNorm
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, Tables, followed, over_head
from convert_drafter.converters.verify.in_torch.reference.rope import rotate

KeysValues = tuple[Tensor, Tensor]  # keys, turned by their positions, and values, both (..., m, T, d)


class GatedAttention(nn.Module):
    """Full attention whose output is weighted by a gate that the query projection yields beside each head's query."""

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.spec = spec
        hidden, d = spec.hidden_size, spec.head_dim
        self.q_proj = nn.Linear(hidden, 2 * spec.head_count * d, bias=False)
        self.k_proj = nn.Linear(hidden, spec.kv_head_count * d, bias=False)
        self.v_proj = nn.Linear(hidden, spec.kv_head_count * d, bias=False)
        self.o_proj = nn.Linear(spec.head_count * d, hidden, bias=False)
        self.q_norm = RMSNorm(d, spec.norm_epsilon)
        self.k_norm = RMSNorm(d, spec.norm_epsilon)

    def heads(self, x: Tensor, count: int) -> Tensor:
        """(..., S, count * width) -> (..., count, S, width)"""
        return x.unflatten(-1, (count, -1)).transpose(-2, -3)

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, self.spec.rope, self.spec.rope.theta, self.spec.context_length)

    def keys_values(self, x: Tensor, at: Tensor) -> KeysValues:
        """(..., S, H) -> keys and values (..., m, S, d)."""
        count = self.spec.kv_head_count
        return self.rope(self.k_norm(self.heads(self.k_proj(x), count)), at), self.heads(self.v_proj(x), count)

    def forward(self, x: Tensor, at: Tensor, every: KeysValues, visible: Tensor) -> Tensor:
        """`every` holds the keys and values of all T + S positions, `visible` (S, T + S) where a query may look."""
        q, gate = self.heads(self.q_proj(x), self.spec.head_count).chunk(2, dim=-1)  # both (..., n, S, d)
        q = self.rope(self.q_norm(q), at)
        o = F.scaled_dot_product_attention(q, *every, attn_mask=visible, enable_gqa=True)
        o = o * gate.sigmoid()
        out: Tensor = self.o_proj(o.transpose(-2, -3).flatten(-2))  # (..., S, H)
        return out


class Projections(nn.Module):
    """The weights of all experts, (experts, out, in) each."""

    def __init__(self, experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Stacked(experts, width, hidden)
        self.up_proj = Stacked(experts, width, hidden)
        self.down_proj = Stacked(experts, hidden, width)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """(tokens, H) through one expert."""
        inner = F.silu(x @ self.gate_proj.weight[expert].T) * (x @ self.up_proj.weight[expert].T)
        return inner @ self.down_proj.weight[expert].T


class Stacked(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Mixture(nn.Module):
    """A few of many experts for each token, and one for all, which a gate of its own weighs."""

    def __init__(self, spec: DrafterSpec, experts: Experts) -> None:
        super().__init__()
        self.used = experts.used
        self.gate = nn.Linear(spec.hidden_size, experts.count, bias=False)
        self.experts = Projections(experts.count, spec.feed_forward_size, spec.hidden_size)
        self.shared_expert = FeedForward(replace(spec, feed_forward_size=experts.shared_feed_forward_size))
        self.shared_expert_gate = nn.Linear(spec.hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, H)
        shares, chosen = self.gate(flat).softmax(-1).topk(self.used)
        shares = shares / shares.sum(-1, keepdim=True)
        out = self.shared_expert(flat) * self.shared_expert_gate(flat).sigmoid()
        for expert in chosen.unique().tolist():
            token, place = (chosen == expert).nonzero(as_tuple=True)
            out = out.index_add(0, token, self.experts(flat[token], expert) * shares[token, place, None])
        return out.reshape(x.shape)


class Layer(nn.Module):
    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.self_attn = GatedAttention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.mlp = FeedForward(spec) if spec.experts is None else Mixture(spec, spec.experts)

    def keys_values(self, x: Tensor, at: Tensor) -> KeysValues:
        found: KeysValues = self.self_attn.keys_values(self.input_layernorm(x), at)
        return found

    def forward(self, x: Tensor, at: Tensor, every: KeysValues, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), at, every, visible)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Head(nn.Module):
    """The head by itself: what lies behind `mtp.` in a checkpoint."""

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        hidden = spec.hidden_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = RMSNorm(hidden, spec.norm_epsilon)
        self.pre_fc_norm_hidden = RMSNorm(hidden, spec.norm_epsilon)
        self.layers = nn.ModuleList([Layer(spec)])
        self.norm = RMSNorm(hidden, spec.norm_epsilon)

    def join(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Token embeddings beside the states of the positions before: both (..., S, H) -> (..., S, H)."""
        both = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(states)], dim=-1)
        out: Tensor = self.fc(both)
        return out

    def keys_values(self, embedded: Tensor, states: Tensor, at: Tensor) -> KeysValues:
        """Of positions that are only read, (..., m, S, d): nothing has to be predicted there."""
        found: KeysValues = self.layers[0].keys_values(self.join(embedded, states), at)
        return found

    def forward(
        self, embedded: Tensor, states: Tensor, at: Tensor, before: KeysValues, visible: Tensor
    ) -> tuple[Tensor, KeysValues]:
        """Final states (..., S, H), normed, and the keys and values with those of these positions at their end.

        `at` (S,) are positions, `visible` (S, T + S) is True where a query may look.
        """
        x = self.join(embedded, states)
        every = extended(before, self.layers[0].keys_values(x, at))
        out: Tensor = self.norm(self.layers[0](x, at, every, visible))
        return out, every


def extended(before: KeysValues, more: KeysValues) -> KeysValues:
    keys, values = (torch.cat([old, new], dim=-2) for old, new in zip(before, more, strict=True))
    return keys, values


def shifted(states: Tensor, first: Tensor | None = None) -> Tensor:
    """The state of the position before each, (..., T, H); `first` (..., 1, H) is the one before all of them.

    Before a text's first position there is none, and zeros stand for it; a llama-server that has answered before takes
    the last state of that answer.
    """
    first = torch.zeros_like(states[..., :1, :]) if first is None else first
    return torch.cat([first, states[..., :-1, :]], dim=-2)


class Context(NamedTuple):
    """What is kept of T positions: keys and values (m, T, d), and the target's final states (T, H)."""

    keys: Tensor
    values: Tensor
    states: Tensor


class Mtp(nn.Module):
    """An MTP head as a drafter. `roles` are the tensors it has beside those every head has.

    Embedding and output are the target's, unless they are among `roles`; the target's own final norm is not used.
    """

    depends = True

    def __init__(self, spec: DrafterSpec, roles: Collection[Role] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.mtp = Head(spec)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_epsilon) if Role.OUTPUT_NORM in roles else None
        size = (spec.vocab_size, spec.hidden_size)
        self.embed_tokens = nn.Embedding(*size) if Role.TOKEN_EMBEDDING in roles else None
        self.lm_head = nn.Linear(*size[::-1], bias=False) if Role.OUTPUT in roles else None

    def tables(self, tables: Tables) -> Tables:
        """Those in use: the target's, or the drafter's own; an own embedding without an own head serves for both."""
        embedding, head = tables
        if self.embed_tokens is not None:
            embedding = head = self.embed_tokens.weight
        return Tables(embedding, head if self.lm_head is None else self.lm_head.weight)

    def logits(self, state: Tensor, head: Tensor) -> Tensor:
        """A final state (..., H) over `head` (vocab, H) -> (..., vocab)."""
        return over_head(state, head)

    # --- ReferenceDrafter ---

    def read(self, context: Context | None, captured: Tensor, tokens: Sequence[int], tables: Tables) -> Context:
        """`captured` (n, H) are final states of the next n positions."""
        start = 0 if context is None else len(context.states)
        at = torch.arange(start, start + len(captured), device=captured.device)
        embedding, _ = self.tables(tables)
        embedded = embedding[list(tokens[start : start + len(captured)])].to(captured.dtype)
        before = None if context is None else context.states[-1:]
        new = self.mtp.keys_values(embedded, shifted(captured, before), at)
        if context is None:
            return Context(*new, captured)
        return Context(*extended(context[:2], new), torch.cat([context.states, captured]))

    def until(self, context: Context, length: int) -> Context:
        keys, values, states = context
        return Context(keys[..., :length, :], values[..., :length, :], states[:length])

    @torch.no_grad()
    def draft(
        self, context: Context, anchor: int, count: int, tables: Tables, follow: Sequence[int] | None = None
    ) -> Drafted:
        """One position after the other, each on top of the ones before."""
        embedding, head = self.tables(tables)
        known: KeysValues = context[:2]
        token, state, tokens, rows = anchor, context.states[-1:], [], []  # the state (1, H) before the anchor
        for _ in range(count):
            length = known[0].shape[-2]
            at = torch.tensor([length], device=state.device)
            visible = torch.ones(1, length + 1, dtype=torch.bool, device=state.device)
            state, known = self.mtp(embedding[[token]].to(state.dtype), state, at, known, visible)
            rows.append(self.logits(state[0], head))
            tokens.append(rows[-1].argmax())
            token = followed(tokens, follow)
        return Drafted(torch.stack(tokens), torch.stack(rows))
