"""DFlash in torch, to be read from top to bottom: what a converted drafter has to compute.

The target's hidden states after the capture layers are fused into one feature per position. A feature gives every
layer a key and a value, once: these are the context, and one block of mask tokens is denoised over it in a single pass.
Source of the algorithm: z-lab/dflash (arXiv 2602.06036) and llama.cpp's `src/models/dflash.cpp`.

Shapes: T context positions, Q block positions, H hidden, K capture layers, n/m heads and kv heads, d head_dim; `...`
are leading batch dimensions. The modules carry the checkpoint's tensor names, so `load_state_dict` takes a published
file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.in_torch.reference.dflash2 import CandidateSelector, Convolution
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, Tables, over_head, spread_over
from convert_drafter.converters.verify.in_torch.reference.dspark import ConfidenceHead, MarkovHead
from convert_drafter.converters.verify.in_torch.reference.rope import rotate

Context = list[tuple[Tensor, Tensor]]  # per layer: keys, turned by their positions, and values, both (..., m, T, d)


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class Attention(nn.Module):
    """Over the context and the block. Without values of its own they are the keys, normed and not turned (Gemma 4)."""

    def __init__(self, spec: DrafterSpec, layer: int, roles: Collection[Role], own_values: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.window = spec.window.size if spec.window and spec.window.layers[layer] else None
        hidden, d = spec.hidden_size, spec.head_dim
        self.q_proj = nn.Linear(hidden, spec.head_count * d, bias=Role.ATTN_Q_BIAS in roles)
        self.k_proj = nn.Linear(hidden, spec.kv_head_count * d, bias=Role.ATTN_K_BIAS in roles)
        values = spec.kv_head_count * d
        self.v_proj = nn.Linear(hidden, values, bias=Role.ATTN_V_BIAS in roles) if own_values else None
        self.o_proj = nn.Linear(spec.head_count * d, hidden, bias=Role.ATTN_OUTPUT_BIAS in roles)
        self.q_norm = RMSNorm(d, spec.norm_epsilon)
        self.k_norm = RMSNorm(d, spec.norm_epsilon)
        self.sinks = nn.Parameter(torch.zeros(spec.head_count)) if Role.ATTN_SINKS in roles else None

    def heads(self, x: Tensor) -> Tensor:
        """(..., S, heads * d) -> (..., heads, S, d)"""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(-2, -3)

    def rope(self, x: Tensor, positions: Tensor, theta: float, factors: Tensor | None) -> Tensor:
        return rotate(x, positions, self.spec.rope, theta, self.spec.context_length, factors)

    def keys_values(self, x: Tensor, at: Tensor, theta: float, factors: Tensor | None) -> tuple[Tensor, Tensor]:
        """(..., S, H) -> keys and values (..., m, S, d); context features and block states share k_proj and v_proj."""
        keys = self.heads(self.k_proj(x))
        if self.v_proj is None:
            values = F.rms_norm(keys, keys.shape[-1:], eps=self.spec.norm_epsilon)
        else:
            values = self.heads(self.v_proj(x))
        return self.rope(self.k_norm(keys), at, theta, factors), values

    def inject(self, features: Tensor, at: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Context keys may have a base of their own (MiMo); features do not pass input_layernorm."""
        return self.keys_values(features, at, self.spec.context_theta or self.spec.rope.theta, factors)

    def forward(
        self,
        x: Tensor,
        at: Tensor,
        context: tuple[Tensor, Tensor],
        context_at: Tensor,
        visible: Tensor,
        factors: Tensor | None = None,
    ) -> Tensor:
        theta = self.spec.rope.theta
        q = self.rope(self.q_norm(self.heads(self.q_proj(x))), at, theta, factors)  # (..., n, Q, d)
        block_k, block_v = self.keys_values(x, at, theta, factors)
        k = torch.cat([context[0], block_k], dim=-2)  # (..., m, T + Q, d)
        v = torch.cat([context[1], block_v], dim=-2)
        if self.window is not None:
            visible = visible & (at[:, None] - torch.cat([context_at, at])[None, :] < self.window)
        if self.sinks is None:
            scale = self.spec.attention_scale
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True, scale=scale)
        else:
            o = attend_with_sinks(q, k, v, visible, self.sinks)
        o = self.o_proj(o.transpose(-2, -3).flatten(-2))  # (..., Q, H)
        value_scale = self.spec.attention_value_scale
        return o if value_scale is None else o * value_scale


def attend_with_sinks(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, sinks: Tensor) -> Tensor:
    """Attention with one more logit per head in the softmax: a key of zeros with the sink as bias, worth nothing."""
    k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))  # (..., m, S + 1, d)
    bias = torch.zeros(len(sinks), *visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, -torch.inf)
    sink = sinks[:, None, None].expand(-1, visible.shape[0], 1).to(q.dtype)  # (n, Q, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.cat([bias, sink], dim=-1), enable_gqa=True)


class FeedForward(nn.Module):
    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.feed_forward_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.feed_forward_size, bias=False)
        self.down_proj = nn.Linear(spec.feed_forward_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, spec: DrafterSpec, layer: int, roles: Collection[Role]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.self_attn = Attention(spec, layer, roles)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.mlp = FeedForward(spec)
        conv = spec.convolution
        self.attention_conv = None if conv is None else Convolution(conv, spec.hidden_size)
        self.mlp_conv = None if conv is None else Convolution(conv, spec.hidden_size)

    def forward(self, x: Tensor, *seen: Any) -> Tensor:
        """`seen` is what attention takes beside the states."""

        def attend(normed: Tensor) -> Tensor:
            out: Tensor = self.self_attn(normed, *seen)
            return out

        x = x + filtered(self.attention_conv, self.input_layernorm(x), attend)
        return x + filtered(self.mlp_conv, self.post_attention_layernorm(x), self.mlp)


def filtered(conv: Convolution | None, normed: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
    """DFlash2 filters what goes into a sublayer and what comes out, by kernels of its normed input."""
    if conv is None:
        return sublayer(normed)
    before, after = conv.kernels(normed)
    out: Tensor = conv(sublayer(conv(normed, before)), after)
    return out


class DFlash(nn.Module):
    """A DFlash drafter. `roles` are the tensors it has beside those every DFlash drafter has; `layer` makes a layer.

    Embedding and head are the target's, unless they are among `roles`.
    """

    def __init__(
        self,
        spec: DrafterSpec,
        roles: Collection[Role] = (),
        layer: Callable[[DrafterSpec, int, Collection[Role]], nn.Module] = Layer,
    ) -> None:
        super().__init__()
        self.spec = spec
        width, hidden = len(spec.capture_layers) * spec.target_hidden_size, spec.hidden_size
        self.fc = nn.Linear(width, hidden, bias=False)
        self.hidden_norm = RMSNorm(hidden, spec.norm_epsilon)
        self.layers = nn.ModuleList(layer(spec, i, roles) for i in range(spec.layer_count))
        self.norm = RMSNorm(hidden, spec.norm_epsilon)
        self.embed_tokens = nn.Embedding(spec.vocab_size, hidden) if Role.TOKEN_EMBEDDING in roles else None
        rows = spec.draft_vocab_size or spec.vocab_size
        self.lm_head = nn.Linear(hidden, rows, bias=False) if Role.OUTPUT in roles else None
        self.d2t = nn.Parameter(torch.zeros(rows)) if Role.DRAFT_TO_TARGET in roles else None
        pairs = spec.rope.dimensions // 2
        self.rope_factors = nn.Parameter(torch.ones(pairs)) if Role.ROPE_FACTORS in roles else None
        selector = spec.selector
        self.candidate_selector = None if selector is None else CandidateSelector(selector, hidden, spec.vocab_size)
        rank = spec.markov_rank
        self.markov_head = None if rank is None else MarkovHead(rank, spec.vocab_size, rows)
        if rank is not None and Role.CONFIDENCE in roles:  # whatever a key says of it: drafts do not depend on it
            self.confidence_head = ConfidenceHead(hidden + rank, Role.CONFIDENCE_BIAS in roles)
        self.depends = selector is not None or rank is not None

    def fuse(self, captured: Tensor) -> Tensor:
        """Captured states side by side in capture order -> context features: (..., T, K * H) -> (..., T, H)."""
        feature: Tensor = self.hidden_norm(self.fc(captured))
        return feature

    def inject(self, features: Tensor, at: Tensor) -> Context:
        """Fused features (..., T, H) at the positions `at` (T,) -> every layer's context keys and values."""
        return [layer.self_attn.inject(features, at, self.rope_factors) for layer in self.layers]

    def forward(self, x: Tensor, at: Tensor, context: Context, context_at: Tensor, visible: Tensor) -> Tensor:
        """Denoise block embeddings to final hidden states: x (..., Q, H) -> (..., Q, H).

        `at` (Q,) and `context_at` (T,) are positions; `visible` (Q, T + Q) bool, True where a query may look.
        """
        if self.spec.embedding_scale is not None:
            x = x * self.spec.embedding_scale
        for layer, injected in zip(self.layers, context, strict=True):
            x = layer(x, at, injected, context_at, visible, self.rope_factors)
        out: Tensor = self.norm(x)
        return out

    def tables(self, embedding: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding and head in use, (vocab, H): the target's, or the drafter's own; an own embedding serves for both.

        That is llama.cpp's order: head, else own embedding, else the target's head.
        """
        if self.embed_tokens is not None:
            embedding = head = self.embed_tokens.weight
        return embedding, head if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Final hidden states (..., Q, H) over `head` (rows, H) -> (..., Q, rows); scaled, then capped."""
        out = over_head(hidden, head)
        out = out if self.spec.logit_scale is None else out * self.spec.logit_scale
        cap = self.spec.logit_softcap
        return out if cap is None else torch.tanh(out / cap) * cap

    def spread(self, logits: Tensor) -> Tensor:
        """Logits over the drafter's own rows (..., rows) -> over the target's vocabulary (..., V)."""
        return spread_over(self.spec.vocab_size, self.d2t, logits)

    # --- ReferenceDrafter ---

    def read(self, context: Context | None, captured: Tensor, tokens: Sequence[int], tables: Tables) -> Context:
        start = 0 if context is None else context[0][0].shape[-2]
        at = torch.arange(start, start + len(captured), device=captured.device)
        new = self.inject(self.fuse(captured), at)
        if context is None:
            return new
        pairs = zip(context, new, strict=True)
        return [(torch.cat([a, k], dim=-2), torch.cat([b, v], dim=-2)) for (a, b), (k, v) in pairs]

    def until(self, context: Context, length: int) -> Context:
        return [(k[..., :length, :], v[..., :length, :]) for k, v in context]

    @torch.no_grad()
    def draft(
        self, context: Context, anchor: int, count: int, tables: Tables, follow: Sequence[int] | None = None
    ) -> Drafted:
        """The anchor and mask tokens in one block; `context` holds keys and values of positions 0..T-1."""
        start, device = context[0][0].shape[-2], tables.embedding.device
        embedding, head = self.tables(*tables)
        size = count if self.spec.sample_from_anchor else count + 1
        tokens = torch.tensor([anchor] + [self.spec.mask_token_id] * (size - 1), device=device)
        at, context_at = torch.arange(start, start + size, device=device), torch.arange(start, device=device)
        visible = block_visibility(size, start, self.spec.causal).to(device)
        x = embedding[tokens].to(self.fc.weight.dtype)
        hidden = self(x, at, context, context_at, visible)[size - count :]
        return self.choose(hidden, self.logits(hidden, head), anchor, follow)

    def choose(self, hidden: Tensor, logits: Tensor, anchor: int, follow: Sequence[int] | None) -> Drafted:
        """Drafts of final states (count, H) and their logits (count, rows), as the drafter's kind chooses them."""
        chosen: Drafted
        if self.markov_head is not None:
            chosen = self.markov_head(logits, anchor, follow, self.spread)
        elif self.candidate_selector is not None:
            chosen = self.candidate_selector(hidden, self.spread(logits), anchor, follow)
        else:
            logits = self.spread(logits)
            chosen = Drafted(logits.argmax(-1), logits)
        return chosen


def block_visibility(length: int, context: int, causal: bool) -> Tensor:
    """(length, context + length): the whole context; inside the block everything, or the past only when causal."""
    visible = torch.ones(length, context + length, dtype=torch.bool)
    return visible.tril(context) if causal else visible
