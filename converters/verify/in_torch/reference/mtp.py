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

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.in_torch.reference.dflash import HEAD_ROWS, FeedForward, RMSNorm
from convert_drafter.converters.verify.in_torch.reference.rope import rotate

Context = tuple[Tensor, Tensor]  # keys, turned by their positions, and values, both (..., m, T, d)


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

    def keys_values(self, x: Tensor, at: Tensor) -> Context:
        """(..., S, H) -> keys and values (..., m, S, d)."""
        count = self.spec.kv_head_count
        return self.rope(self.k_norm(self.heads(self.k_proj(x), count)), at), self.heads(self.v_proj(x), count)

    def forward(self, x: Tensor, at: Tensor, context: Context, visible: Tensor) -> Tensor:
        """`context` holds the keys and values of all T + S positions, `visible` (S, T + S) where a query may look."""
        q, gate = self.heads(self.q_proj(x), self.spec.head_count).chunk(2, dim=-1)  # both (..., n, S, d)
        q = self.rope(self.q_norm(q), at)
        o = F.scaled_dot_product_attention(q, *context, attn_mask=visible, enable_gqa=True)
        o = o * gate.sigmoid()
        out: Tensor = self.o_proj(o.transpose(-2, -3).flatten(-2))  # (..., S, H)
        return out


class Layer(nn.Module):
    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.self_attn = GatedAttention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.mlp = FeedForward(spec)

    def keys_values(self, x: Tensor, at: Tensor) -> Context:
        found: Context = self.self_attn.keys_values(self.input_layernorm(x), at)
        return found

    def forward(self, x: Tensor, at: Tensor, context: Context, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), at, context, visible)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Mtp(nn.Module):
    """An MTP head of one layer. `roles` are the tensors it has beside those every head has.

    Embedding and output are the target's, unless they are among `roles`.
    """

    def __init__(self, spec: DrafterSpec, roles: Collection[Role] = ()) -> None:
        super().__init__()
        self.spec = spec
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

    def read(self, embedded: Tensor, states: Tensor, at: Tensor) -> Context:
        """Keys and values of positions whose token and true state are known, (..., m, S, d); no attention for it."""
        found: Context = self.layers[0].keys_values(self.join(embedded, states), at)
        return found

    def forward(
        self, embedded: Tensor, states: Tensor, at: Tensor, context: Context, visible: Tensor
    ) -> tuple[Tensor, Context]:
        """Final states (..., S, H), normed, and the context with these positions added.

        `at` (S,) are positions, `visible` (S, T + S) is True where a query may look.
        """
        x = self.join(embedded, states)
        context = extended(context, self.layers[0].keys_values(x, at))
        out: Tensor = self.norm(self.layers[0](x, at, context, visible))
        return out, context

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Final states (..., S, H) over `head` (vocab, H) -> (..., S, vocab)."""
        return torch.cat([hidden @ rows.to(hidden.dtype).T for rows in head.split(HEAD_ROWS)], dim=-1)


def extended(context: Context, more: Context) -> Context:
    keys, values = (torch.cat([old, new], dim=-2) for old, new in zip(context, more, strict=True))
    return keys, values


def shifted(states: Tensor) -> Tensor:
    """The state of the position before each, (..., T, H); before the first there is none, and zeros stand for it.

    A llama-server that has answered before takes the last state of that answer instead.
    """
    return F.pad(states, (0, 0, 1, 0))[..., :-1, :]


@torch.no_grad()
def draft(
    mtp: Mtp, embedding: Tensor, head: Tensor, context: Context, anchor: int, state: Tensor, count: int
) -> Tensor:
    """Logits of the `count` tokens after `anchor`, each drafted on top of the ones before: (count, vocab).

    `context` holds positions 0..T-1, `anchor` is the token at position T, not yet seen by the target, `state` (H,) the
    target's final state of position T - 1; `embedding` and `head` are the target's (vocab, H).
    """
    token, state, rows = anchor, state[None].to(mtp.fc.weight.dtype), []
    for _ in range(count):
        length = context[0].shape[-2]
        at = torch.tensor([length], device=state.device)
        visible = torch.ones(1, length + 1, dtype=torch.bool, device=state.device)
        state, context = mtp(embedding[[token]].to(state.dtype), state, at, context, visible)
        rows.append(mtp.logits(state[0], head))
        token = int(rows[-1].argmax())
    return torch.stack(rows)
