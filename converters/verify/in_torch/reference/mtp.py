"""An MTP head (NextN) in torch, to be read from top to bottom: what a converted head has to compute.

A head is one more decoder layer of its target. At position p it reads the token there and the target's final hidden
state of the position before, and predicts the token at p + 1. To draft further it reads its own draft and its own
output in place of the target's state. Source of the algorithm: DeepSeek-V3 (arXiv 2412.19437, section 2.2), in the form
of llama.cpp's `src/models/qwen35.cpp` (graph_mtp) and `common/speculative.cpp` (draft-mtp).

Shapes: T positions read, S positions in one pass, H hidden, n/m heads and kv heads, d head_dim; `...` are leading batch
dimensions. A head's modules carry the names that follow `mtp.` in a Qwen3.5 checkpoint, whatever its family calls them
(`mtp_names.py`); norms multiply by their weight as it is, where Qwen stores what it differs from one by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role, TensorKey
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.in_torch.reference.dflash import FeedForward, RMSNorm
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, Tables, followed, over_head
from convert_drafter.converters.verify.in_torch.reference.latent import Latent
from convert_drafter.converters.verify.in_torch.reference.mixture import Mixture
from convert_drafter.converters.verify.in_torch.reference.mtp_names import NAMES, SHARED_NAMES
from convert_drafter.converters.verify.in_torch.reference.rope import rotate

# What follows from a kind alone.
PACKED_GATES = frozenset({"mtp-qwen35", "mtp-qwen35moe", "mtp-qwen3next", "mtp-qwen4exp"})  # in the query projection
# Keys, turned by their positions, and values, both (..., m, T, d); and what else a kind keeps of T positions.
KeysValues = tuple[Tensor, ...]


def norm_of(spec: DrafterSpec) -> nn.Module:
    """Over a state: its mean is taken away first where the family does so."""
    if spec.layer_norm_epsilon is not None:
        return nn.LayerNorm(spec.hidden_size, spec.layer_norm_epsilon, bias=False)
    return RMSNorm(spec.hidden_size, spec.norm_epsilon)


class Attention(nn.Module):
    """Full attention. Of some kinds a gate weighs its output, which the query projection yields beside each query."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role]) -> None:
        super().__init__()
        self.spec = spec
        self.gated = spec.kind in PACKED_GATES
        hidden, d = spec.hidden_size, spec.head_dim
        queries, keys = spec.head_count * d, spec.kv_head_count * d
        self.q_proj = nn.Linear(hidden, queries * (2 if self.gated else 1), bias=Role.ATTN_Q_BIAS in roles)
        self.k_proj = nn.Linear(hidden, keys, bias=Role.ATTN_K_BIAS in roles)
        self.v_proj = nn.Linear(hidden, keys, bias=Role.ATTN_V_BIAS in roles)
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        self.q_norm = RMSNorm(d, spec.norm_epsilon) if Role.ATTN_Q_NORM in roles else nn.Identity()
        self.k_norm = RMSNorm(d, spec.norm_epsilon) if Role.ATTN_K_NORM in roles else nn.Identity()

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
        q, gate = self.heads(self.q_proj(x), self.spec.head_count), None  # (..., n, S, d or 2 * d)
        if self.gated:
            q, gate = q.chunk(2, dim=-1)
        q = self.rope(self.q_norm(q), at)
        keys, values = every
        o = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)
        o = o if gate is None else o * gate.sigmoid()
        out: Tensor = self.o_proj(o.transpose(-2, -3).flatten(-2))  # (..., S, H)
        return out


class Layer(nn.Module):
    """Attention, then feed-forward; side by side where the feed-forward has no norm of its own."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role]) -> None:
        super().__init__()
        self.input_layernorm = norm_of(spec)
        latent = spec.latent_attention
        self.self_attn = Attention(spec, roles) if latent is None else Latent(spec, latent, roles)
        self.post_attention_layernorm = norm_of(spec) if Role.FFN_NORM in roles else None
        self.mlp = (
            Mixture(spec, spec.experts, roles) if Role.FFN_ROUTER in roles and spec.experts else FeedForward(spec)
        )

    def keys_values(self, x: Tensor, at: Tensor) -> KeysValues:
        found: KeysValues = self.self_attn.keys_values(self.input_layernorm(x), at)
        return found

    def forward(self, x: Tensor, at: Tensor, every: KeysValues, visible: Tensor) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, at, every, visible)
        out: Tensor = x + self.mlp(
            normed if self.post_attention_layernorm is None else self.post_attention_layernorm(x)
        )
        return out


class Head(nn.Module):
    """One head by itself: what lies behind `mtp.` in a checkpoint of Qwen3.5."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role]) -> None:
        super().__init__()
        hidden = spec.hidden_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm_of(spec), norm_of(spec)
        self.layers = nn.ModuleList([Layer(spec, roles)])
        self.norm = norm_of(spec) if Role.NEXTN_OUTPUT_NORM in roles else None
        size = (spec.vocab_size, hidden)
        self.embed_tokens = nn.Embedding(*size) if Role.NEXTN_EMBEDDING in roles else None
        self.lm_head = nn.Linear(*size[::-1], bias=False) if Role.NEXTN_OUTPUT in roles else None

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
        """Final states (..., S, H), normed where the head has a norm of its own, and the keys and values with those of
        these positions at their end.

        `at` (S,) are positions, `visible` (S, T + S) is True where a query may look.
        """
        x = self.join(embedded, states)
        every = extended(before, self.layers[0].keys_values(x, at))
        out: Tensor = self.layers[0](x, at, every, visible)
        return out if self.norm is None else self.norm(out), every


def extended(before: KeysValues, more: KeysValues) -> KeysValues:
    return tuple(torch.cat([old, new], dim=-2) for old, new in zip(before, more, strict=True))


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

    Embedding and output are the target's, unless they are among `roles`; the target's own final norm is used where the
    head has none.
    """

    depends = True

    def __init__(self, spec: DrafterSpec, roles: Collection[Role] = ()) -> None:
        super().__init__()
        self.spec = spec
        self.heads = nn.ModuleList([Head(spec, roles) for _ in spec.layers])
        self.norm = norm_of(spec) if Role.OUTPUT_NORM in roles else None
        size = (spec.vocab_size, spec.hidden_size)
        self.embed_tokens = nn.Embedding(*size) if Role.TOKEN_EMBEDDING in roles else None
        self.lm_head = nn.Linear(*size[::-1], bias=False) if Role.OUTPUT in roles else None

    @staticmethod
    def parameter_names(spec: DrafterSpec) -> dict[TensorKey, str]:
        """Of every tensor that a head of any family may have."""
        own = {(role, i): f"heads.{n}.{name}" for n, i in enumerate(spec.layers) for role, name in NAMES.items()}
        return own | {(role, None): name for role, name in SHARED_NAMES.items()}

    def forward(
        self, embedded: Tensor, states: Tensor, at: Tensor, before: KeysValues, visible: Tensor
    ) -> tuple[Tensor, KeysValues]:
        """As the head's, but always normed: by the target's final norm where the head has none."""
        out, every = self.head(embedded, states, at, before, visible)
        return out if self.head.norm is not None or self.norm is None else self.norm(out), every

    @property
    def head(self) -> Head:
        """The one that drafts."""
        head: Head = self.heads[0]
        return head

    def tables(self, tables: Tables) -> Tables:
        """Those in use: the target's, or the drafter's own; an own embedding without an own head serves for both."""
        embedding, output = tables
        if self.embed_tokens is not None:
            embedding = output = self.embed_tokens.weight
        if self.lm_head is not None:
            output = self.lm_head.weight
        own, own_output = self.head.embed_tokens, self.head.lm_head
        return Tables(
            embedding if own is None else own.weight,
            output if own_output is None else own_output.weight,
        )

    def logits(self, state: Tensor, head: Tensor) -> Tensor:
        """A final state (..., H) over `head` (vocab, H) -> (..., vocab)."""
        out = over_head(state, head)
        return out if self.spec.logit_scale is None else out * self.spec.logit_scale

    def visible(self, at: Tensor, length: int) -> Tensor:
        """(S, length) True where queries at positions (S,) may look: backwards, and not beyond a window."""
        back = at[:, None] - torch.arange(length, device=at.device)
        return back >= 0 if self.spec.window is None else (back >= 0) & (back < self.spec.window.size)

    # --- ReferenceDrafter ---

    def read(self, context: Context | None, captured: Tensor, tokens: Sequence[int], tables: Tables) -> Context:
        """`captured` (n, H) are final states of the next n positions."""
        start = 0 if context is None else len(context.states)
        at = torch.arange(start, start + len(captured), device=captured.device)
        embedding, _ = self.tables(tables)
        embedded = embedding[list(tokens[start : start + len(captured)])].to(captured.dtype)
        before = None if context is None else context.states[-1:]
        new = self.head.keys_values(embedded, shifted(captured, before), at)
        if context is not None:
            new, captured = extended(context[:2], new), torch.cat([context.states, captured])
        keys, values = new
        return Context(keys, values, captured)

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
            embedded = embedding[[token]].to(state.dtype)
            state, known = self(embedded, state, at, known, self.visible(at, length + 1))
            rows.append(self.logits(state[0], head))
            tokens.append(rows[-1].argmax())
            token = followed(tokens, follow)
        return Drafted(torch.stack(tokens), torch.stack(rows))
