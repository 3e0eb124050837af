"""DFlash in torch, to be read from top to bottom: what a converted drafter has to compute.

The target's hidden states after the capture layers are fused into one feature per position; the features are the
keys and values of all positions already decided, and one block of mask tokens is denoised in a single pass.
Source of the algorithm: z-lab/dflash (arXiv 2602.06036) and llama.cpp's `src/models/dflash.cpp`.

Shapes: T context positions, Q block positions, H hidden, K capture layers, n/m heads and kv heads, d head_dim.
The modules carry the checkpoint's tensor names, so `load_state_dict` takes a published file as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.spec import DrafterSpec


class RMSNorm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def rotate(x: Tensor, positions: Tensor, theta: float, dimensions: int) -> Tensor:
    """Rotate-half RoPE on the first `dimensions` of each head. x (..., heads, S, d), positions (S,)."""
    half = dimensions // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (positions[:, None].double() * frequency).to(x.dtype)  # (S, half)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x[..., :half], x[..., half:dimensions], x[..., dimensions:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Attention(nn.Module):
    def __init__(self, spec: DrafterSpec, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.window = spec.window.size if spec.window and spec.window.layers[layer] else None
        hidden, d = spec.hidden_size, spec.head_dim
        self.q_proj = nn.Linear(hidden, spec.head_count * d, bias=False)
        self.k_proj = nn.Linear(hidden, spec.kv_head_count * d, bias=False)
        self.v_proj = nn.Linear(hidden, spec.kv_head_count * d, bias=False)
        self.o_proj = nn.Linear(spec.head_count * d, hidden, bias=False)
        self.q_norm = RMSNorm(d, spec.norm_epsilon)
        self.k_norm = RMSNorm(d, spec.norm_epsilon)

    def heads(self, x: Tensor) -> Tensor:
        """(..., S, heads * d) -> (..., heads, S, d)"""
        return x.unflatten(-1, (-1, self.spec.head_dim)).transpose(-2, -3)

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        return rotate(x, positions, self.spec.rope.theta, self.spec.rope.dimensions)

    def forward(self, x: Tensor, at: Tensor, context: Tensor, context_at: Tensor, visible: Tensor) -> Tensor:
        both = torch.cat(
            [context, x], dim=-2
        )  # (..., T + Q, H): context features and block states share k_proj, v_proj
        both_at = torch.cat([context_at, at])
        q = self.rope(self.q_norm(self.heads(self.q_proj(x))), at)  # (..., n, Q, d)
        k = self.rope(self.k_norm(self.heads(self.k_proj(both))), both_at)  # (..., m, T + Q, d)
        v = self.heads(self.v_proj(both))
        if self.window is not None:
            visible = visible & (at[:, None] - both_at[None, :] < self.window)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        o = self.o_proj(o.transpose(-2, -3).flatten(-2))  # (..., Q, H)
        scale = self.spec.attention_value_scale
        return o if scale is None else o * scale


class FeedForward(nn.Module):
    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.feed_forward_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.feed_forward_size, bias=False)
        self.down_proj = nn.Linear(spec.feed_forward_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, spec: DrafterSpec, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.self_attn = Attention(spec, layer)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.mlp = FeedForward(spec)

    def forward(self, x: Tensor, at: Tensor, context: Tensor, context_at: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), at, context, context_at, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class DFlash(nn.Module):
    """A DFlash drafter without embedding and head: both are the target's."""

    def __init__(self, spec: DrafterSpec) -> None:
        super().__init__()
        self.spec = spec
        width = len(spec.capture_layers) * spec.target_hidden_size
        self.fc = nn.Linear(width, spec.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.layers = nn.ModuleList(Layer(spec, i) for i in range(spec.layer_count))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_epsilon)

    def fuse(self, captured: Tensor) -> Tensor:
        """Captured states side by side in capture order -> context features: (..., T, K * H) -> (..., T, H)."""
        feature: Tensor = self.hidden_norm(self.fc(captured))
        return feature

    def forward(self, x: Tensor, at: Tensor, context: Tensor, context_at: Tensor, visible: Tensor) -> Tensor:
        """Denoise block embeddings to final hidden states: x (..., Q, H) -> (..., Q, H).

        `at` (Q,) and `context_at` (T,) are positions; `visible` (Q, T + Q) bool, True where a query may look.
        """
        if self.spec.embedding_scale is not None:
            x = x * self.spec.embedding_scale
        for layer in self.layers:
            x = layer(x, at, context, context_at, visible)
        out: Tensor = self.norm(x)
        return out


def block_visibility(length: int, context: int, causal: bool) -> Tensor:
    """(length, context + length): the whole context; inside the block everything, or the past only when causal."""
    visible = torch.ones(length, context + length, dtype=torch.bool)
    return visible.tril(context) if causal else visible


@torch.no_grad()
def draft(drafter: DFlash, embedding: Tensor, head: Tensor, context: Tensor, anchor: int, count: int) -> Tensor:
    """Logits of the `count` tokens after `anchor`: (count, vocab).

    `context` (T, H) are the fused features of positions 0..T-1, `anchor` is the token at position T, not yet seen by
    the target; `embedding` and `head` are the target's (vocab, H).
    """
    spec, start = drafter.spec, context.shape[0]
    tokens = torch.tensor([anchor] + [spec.mask_token_id] * count)
    at = torch.arange(start, start + count + 1)
    visible = block_visibility(count + 1, start, spec.causal)
    hidden = drafter(embedding[tokens], at, context, torch.arange(start), visible)
    return hidden[1:] @ head.T
