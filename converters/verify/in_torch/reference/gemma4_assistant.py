"""A Gemma-4 assistant in torch, to be read from top to bottom: what a converted one has to compute.

An assistant has no keys and values: each of its layers looks at those of its target, a sliding layer at its last
sliding one's, a full layer at its last full one's. At the anchor's position it reads the anchor's embedding and the
target's final state of the position before, both as the target has them. To draft further it reads its own draft and
its own state, projected to the target's width, still at the anchor's position: there are no keys after it. Source of
the algorithm: transformers' `models/gemma4_assistant`, in the form of llama.cpp's `src/models/gemma4-assistant.cpp`
and `common/speculative.cpp` (draft-mtp with a shared memory).

How far a sliding layer looks is the target's own rule, as in llama.cpp: fewer than `window` positions back, the
anchor's included. transformers counts keys from the last one, and looks at two more.

Shapes: T positions read, H hidden, W hidden of the target, n/m heads and kv heads, d head_dim, of each layer its own.
The modules carry the checkpoint's tensor names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.in_torch.reference.dflash import RMSNorm
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, Tables, followed, over_head
from convert_drafter.converters.verify.in_torch.reference.gemma4 import Layer
from convert_drafter.converters.verify.in_torch.reference.rope import rotate

KeysValues = tuple[Tensor, Tensor]  # keys, turned by their positions, and values, both (m, T, d)


class Context(NamedTuple):
    """What the target has of T positions: its final states (T, W), and the keys and values of two layers."""

    states: Tensor
    sliding: KeysValues
    full: KeysValues


class Attention(nn.Module):
    """Queries over another model's keys and values; scores are not divided by the root of a head's width."""

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.spec, d = spec, spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, spec.head_count * d, bias=False)
        self.o_proj = nn.Linear(spec.head_count * d, spec.hidden_size, bias=False)
        self.q_norm = RMSNorm(d, spec.norm_epsilon)

    def forward(self, x: Tensor, at: Tensor, theirs: KeysValues, factors: Tensor | None) -> Tensor:
        """(1, H) at one position `at` (1,) -> (1, H)."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.spec.head_count, -1))).transpose(-2, -3)  # (n, 1, d)
        q = rotate(q, at, self.spec.rope, self.spec.rope.theta, self.spec.context_length, factors)
        keys, values = theirs
        o = F.scaled_dot_product_attention(q[None], keys[None], values[None], scale=1.0, enable_gqa=True)[0]
        out: Tensor = self.o_proj(o.transpose(-2, -3).flatten(-2))
        return out


class Gemma4Assistant(nn.Module):
    """The assistant as a drafter. Its own embedding serves as its head alone: tokens come in the target's."""

    depends = True

    def __init__(self, spec: DrafterSpec, roles: Collection[Role] = ()) -> None:
        super().__init__()
        self.spec = spec
        width = spec.target_hidden_size
        self.pre_projection = nn.Linear(2 * width, spec.hidden_size, bias=False)
        self.post_projection = nn.Linear(spec.hidden_size, width, bias=False)
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList([Layer(spec, Attention(spec.of_layer(i))) for i in range(spec.layer_count)])
        self.norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.rope_factors = nn.Parameter(torch.ones(spec.rope.dimensions // 2))  # of full layers

    def forward(self, embedded: Tensor, state: Tensor, context: Context) -> Tensor:
        """The anchor's or a draft's embedding and the state before it, (1, W) both -> normed (1, H)."""
        length = len(context.states)
        at = torch.tensor([length], device=state.device)
        assert self.spec.window is not None
        near = slice(max(0, length - self.spec.window.size + 1), length)
        keys, values = context.sliding
        x: Tensor = self.pre_projection(torch.cat([embedded * self.spec.target_hidden_size**0.5, state], dim=-1))
        for layer, slides in zip(self.layers, self.spec.window.layers, strict=True):
            if slides:
                x = layer(x, at, (keys[:, near], values[:, near]), None)
            else:
                x = layer(x, at, context.full, self.rope_factors)
        out: Tensor = self.norm(x)
        return out

    # --- ReferenceDrafter ---

    def read(self, context: Context | None, captured: Tensor, tokens: Sequence[int], tables: Tables) -> Context:
        """`captured` (n, W + 2 * m * d + 2 * m * d): final states, keys and values of a sliding and of a full layer.

        Raises `WrongInput` for those of another target.
        """
        layers = [self.spec.of_layer(self._first(slides)) for slides in (True, False)]
        widths = [self.spec.target_hidden_size]
        widths += [layer.kv_head_count * layer.head_dim for layer in layers for _ in ("keys", "values")]
        if captured.shape[-1] != sum(widths):
            found = f"found {captured.shape[-1]} columns of its state, keys and values"
            raise WrongInput(f"the target: {found}, expected {sum(widths)}: its heads are of another width or number")
        states, *parts = captured.split(widths, dim=-1)
        heads = [layer.kv_head_count for layer in layers for _ in ("keys", "values")]
        each = [part.unflatten(-1, (count, -1)).transpose(0, 1) for part, count in zip(parts, heads, strict=True)]
        new = Context(states, (each[0], each[1]), (each[2], each[3]))
        if context is None:
            return new
        return Context(
            torch.cat([context.states, states]),
            extended(context.sliding, new.sliding),
            extended(context.full, new.full),
        )

    def _first(self, slides: bool) -> int:
        assert self.spec.window is not None
        return self.spec.window.layers.index(slides)

    def until(self, context: Context, length: int) -> Context:
        return Context(
            context.states[:length],
            (context.sliding[0][:, :length], context.sliding[1][:, :length]),
            (context.full[0][:, :length], context.full[1][:, :length]),
        )

    @torch.no_grad()
    def draft(
        self, context: Context, anchor: int, count: int, tables: Tables, follow: Sequence[int] | None = None
    ) -> Drafted:
        """All at the anchor's position, each on top of the state of the one before."""
        head = self.embed_tokens.weight
        token, state, tokens, rows = anchor, context.states[-1:], [], []  # the state (1, W) before the anchor
        for _ in range(count):
            normed = self(tables.embedding[[token]].to(state.dtype), state, context)
            rows.append(over_head(normed[0], head))
            tokens.append(rows[-1].argmax())
            state, token = self.post_projection(normed), followed(tokens, follow)
        return Drafted(torch.stack(tokens), torch.stack(rows))


def extended(before: KeysValues, more: KeysValues) -> KeysValues:
    keys, values = (torch.cat([old, new], dim=-2) for old, new in zip(before, more, strict=True))
    return keys, values
