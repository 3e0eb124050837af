"""An MTP head with hyper-connections in torch (DeepSeek-V4): a position has several states, its streams.

The head reads all streams of its target's last layer, each beside the same token, and hands all of its own on. A part
of a layer reads one mixture of the streams; what it gives is added to them in shares, while they are mixed among each
other by a matrix whose rows and columns add up to one. Sources: mHC (arXiv 2512.24880), transformers' `deepseek_v4`,
llama.cpp's `src/models/deepseek4.cpp` (graph_mtp, build_hc_pre, build_hc_post, build_hc_sinkhorn).

Shapes: T positions read, S positions in one pass, c streams, H hidden, n heads, d head_dim, t of them turned, g groups
of heads; `...` are leading batch dimensions. States are c * H wide outside of a head.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters.roles import Role, TensorKey
from convert_drafter.converters.spec import DrafterSpec, Experts, SharedKey, Streams
from convert_drafter.converters.verify.in_torch.reference.dflash import RMSNorm
from convert_drafter.converters.verify.in_torch.reference.drafter import over_head
from convert_drafter.converters.verify.in_torch.reference.mixture import Mixture
from convert_drafter.converters.verify.in_torch.reference.mtp import Head, KeysValues, Mtp, extended
from convert_drafter.converters.verify.in_torch.reference.mtp_chain import shares
from convert_drafter.converters.verify.in_torch.reference.rope import rotate

_LAYER, _ATTENTION = "layers.0.", "layers.0.self_attn."
# Parameters by what they are for, beside those of other heads.
NAMES = {
    Role.ATTN_KV: f"{_ATTENTION}kv_proj.weight",
    Role.ATTN_OUTPUT_A: f"{_ATTENTION}o_a_proj.weight",
    Role.ATTN_OUTPUT_B: f"{_ATTENTION}o_b_proj.weight",
    Role.ATTN_STREAMS: f"{_LAYER}attn_streams.fn.weight",
    Role.ATTN_STREAMS_BASE: f"{_LAYER}attn_streams.base",
    Role.ATTN_STREAMS_SCALE: f"{_LAYER}attn_streams.scale",
    Role.FFN_STREAMS: f"{_LAYER}mlp_streams.fn.weight",
    Role.FFN_STREAMS_BASE: f"{_LAYER}mlp_streams.base",
    Role.FFN_STREAMS_SCALE: f"{_LAYER}mlp_streams.scale",
}
SHARED_NAMES = {
    Role.STREAMS_OUT: "collapse.fn.weight",
    Role.STREAMS_OUT_BASE: "collapse.base",
    Role.STREAMS_OUT_SCALE: "collapse.scale",
}


def normed(x: Tensor, epsilon: float) -> Tensor:
    """A root mean square of one over the last dimension."""
    return F.rms_norm(x, x.shape[-1:], eps=epsilon)


class SharedKeyAttention(nn.Module):
    """Attention whose heads share one key, which is its own value. So values are turned by their positions too, and
    what a head gives is turned back by the query's."""

    def __init__(self, spec: DrafterSpec, facts: SharedKey) -> None:
        super().__init__()
        self.spec, self.groups = spec, facts.output_groups
        hidden, width = spec.hidden_size, spec.head_count * spec.head_dim
        self.q_a_proj = nn.Linear(hidden, facts.query_rank, bias=False)
        self.q_a_layernorm = RMSNorm(facts.query_rank, spec.norm_epsilon)
        self.q_b_proj = nn.Linear(facts.query_rank, width, bias=False)
        self.kv_proj = nn.Linear(hidden, spec.head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(spec.head_dim, spec.norm_epsilon)
        self.o_a_proj = nn.Linear(width // self.groups, self.groups * facts.output_rank, bias=False)
        self.o_b_proj = nn.Linear(self.groups * facts.output_rank, hidden, bias=False)
        self.sinks = nn.Parameter(torch.zeros(spec.head_count))

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """(..., S, d): the last t dimensions, in pairs of neighbours, turned by positions (S,)."""
        plain, turned = x.split([x.shape[-1] - self.spec.rope.dimensions, self.spec.rope.dimensions], dim=-1)
        halves = torch.cat([turned[..., ::2], turned[..., 1::2]], dim=-1)
        both = rotate(halves, at, self.spec.rope, self.spec.rope.theta, self.spec.context_length).chunk(2, dim=-1)
        return torch.cat([plain, torch.stack(both, dim=-1).flatten(-2)], dim=-1)

    def keys_values(self, x: Tensor, at: Tensor) -> KeysValues:
        """(..., S, H) -> twice the same (..., 1, S, d)."""
        key = self.turn(self.kv_a_layernorm(self.kv_proj(x)), at).unsqueeze(-3)
        return key, key

    def forward(self, x: Tensor, at: Tensor, every: KeysValues, visible: Tensor) -> Tensor:
        """`every` holds the keys and values of all T + S positions, `visible` (S, T + S) where a query may look."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.spec.head_count, -1))
        q = self.turn(normed(q, self.spec.norm_epsilon).transpose(-2, -3), at)  # (..., n, S, d)
        keys, values = every
        scores = q @ keys.transpose(-2, -1) * self.spec.head_dim**-0.5  # (..., n, S, T + S)
        o = self.turn(shares(scores.masked_fill(~visible, -torch.inf), self.sinks) @ values, -at)
        grouped = o.transpose(-2, -3).flatten(-2).unflatten(-1, (self.groups, -1))  # (..., S, g, n / g * d)
        each = self.o_a_proj.weight.unflatten(0, (self.groups, -1))  # (g, rank, n / g * d)
        out: Tensor = self.o_b_proj(torch.einsum("...gi,gri->...gr", grouped, each).flatten(-2))
        return out


class Collapse(nn.Module):
    """One state out of all streams, each with a share of its own: (..., S, c, H) -> (..., S, H)."""

    def __init__(self, spec: DrafterSpec, facts: Streams) -> None:
        super().__init__()
        self.spec, self.facts = spec, facts
        self.fn = nn.Linear(facts.count * spec.hidden_size, facts.count, bias=False)
        self.base, self.scale = nn.Parameter(torch.zeros(facts.count)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        mixes = self.fn(normed(x.flatten(-2), self.spec.norm_epsilon))
        return collapsed(x, (mixes * self.scale + self.base).sigmoid() + self.facts.epsilon)


def collapsed(x: Tensor, into: Tensor) -> Tensor:
    """Streams (..., c, H) in shares (..., c) -> (..., H)"""
    return (x * into.unsqueeze(-1)).sum(-2)


class Mixing(nn.Module):
    """How streams go into a part of a layer, how its output goes into them, and how they are mixed meanwhile."""

    def __init__(self, spec: DrafterSpec, facts: Streams) -> None:
        super().__init__()
        assert facts.iterations is not None  # no spec of the kind is without
        self.spec, self.facts, self.iterations = spec, facts, facts.iterations
        mixes = facts.count * (facts.count + 2)
        self.fn = nn.Linear(facts.count * spec.hidden_size, mixes, bias=False)
        self.base, self.scale = nn.Parameter(torch.zeros(mixes)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., S, c, H) -> what the part reads (..., S, H), its output's shares (..., S, c), and the matrix that mixes
        the streams (..., S, c from, c to)."""
        c = self.facts.count
        parts = self.fn(normed(x.flatten(-2), self.spec.norm_epsilon)).split([c, c, c * c], dim=-1)
        into, out, among = (
            part * scale + base
            for part, scale, base in zip(parts, self.scale, self.base.split([c, c, c * c]), strict=True)
        )
        read = collapsed(x, into.sigmoid() + self.facts.epsilon)
        return read, 2 * out.sigmoid(), self.doubly_stochastic(among.unflatten(-1, (c, c)))

    def doubly_stochastic(self, among: Tensor) -> Tensor:
        """Rows and columns brought to a sum of one in turn, columns last (Sinkhorn and Knopp)."""
        epsilon = self.facts.epsilon
        among = among.softmax(-1) + epsilon
        among = among / (among.sum(-2, keepdim=True) + epsilon)
        for _ in range(self.iterations - 1):
            among = among / (among.sum(-1, keepdim=True) + epsilon)
            among = among / (among.sum(-2, keepdim=True) + epsilon)
        return among


def mixed(x: Tensor, given: Tensor, out: Tensor, among: Tensor) -> Tensor:
    """Streams (..., c, H) mixed, and a part's output (..., H) added in its shares."""
    return out.unsqueeze(-1) * given.unsqueeze(-2) + among.transpose(-1, -2) @ x


class StreamLayer(nn.Module):
    """Attention, then a mixture of experts, over streams (..., S, c, H)."""

    def __init__(
        self, spec: DrafterSpec, key: SharedKey, streams: Streams, experts: Experts, roles: Collection[Role]
    ) -> None:
        super().__init__()
        self.attn_streams, self.mlp_streams = Mixing(spec, streams), Mixing(spec, streams)
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.self_attn = SharedKeyAttention(spec, key)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_epsilon)
        self.mlp = Mixture(spec, experts, roles)

    def keys_values(self, x: Tensor, at: Tensor) -> KeysValues:
        found: KeysValues = self.self_attn.keys_values(self.input_layernorm(self.attn_streams(x)[0]), at)
        return found

    def forward(self, x: Tensor, at: Tensor, every: KeysValues, visible: Tensor) -> Tensor:
        read, out, among = self.attn_streams(x)
        x = mixed(x, self.self_attn(self.input_layernorm(read), at, every, visible), out, among)
        read, out, among = self.mlp_streams(x)
        return mixed(x, self.mlp(self.post_attention_layernorm(read)), out, among)


class StreamHead(Head):
    """A head that reads and hands on all streams."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role]) -> None:
        super().__init__(spec, roles)
        key, streams, experts = spec.shared_key, spec.streams, spec.experts
        assert key is not None and streams is not None and experts is not None  # no spec of the kind is without
        self.count = streams.count
        self.layers = nn.ModuleList([StreamLayer(spec, key, streams, experts, roles)])

    def join(self, embedded: Tensor, states: Tensor) -> Tensor:
        """(..., S, H) beside each stream of (..., S, c * H) -> (..., S, c, H)."""
        streams = states.unflatten(-1, (self.count, -1))
        token = self.pre_fc_norm_embedding(embedded).unsqueeze(-2).expand_as(streams)
        out: Tensor = self.fc(torch.cat([token, self.pre_fc_norm_hidden(streams)], dim=-1))
        return out

    def forward(
        self, embedded: Tensor, states: Tensor, at: Tensor, before: KeysValues, visible: Tensor
    ) -> tuple[Tensor, KeysValues]:
        """All streams (..., S, c * H), not normed."""
        x = self.join(embedded, states)
        every = extended(before, self.layers[0].keys_values(x, at))
        out: Tensor = self.layers[0](x, at, every, visible)
        return out.flatten(-2), every


class MtpDeepseek4(Mtp):
    """A head as a drafter; states are all streams, and become one where logits are made of them."""

    def __init__(self, spec: DrafterSpec, roles: Collection[Role] = ()) -> None:
        super().__init__(spec, roles)
        assert spec.streams is not None  # no spec of the kind is without
        self.heads = nn.ModuleList([StreamHead(spec, roles) for _ in spec.layers])
        self.collapse = Collapse(spec, spec.streams)

    @staticmethod
    def parameter_names(spec: DrafterSpec) -> dict[TensorKey, str]:
        own = {(role, i): f"heads.{n}.{name}" for n, i in enumerate(spec.layers) for role, name in NAMES.items()}
        return Mtp.parameter_names(spec) | own | {(role, None): name for role, name in SHARED_NAMES.items()}

    def forward(
        self, embedded: Tensor, states: Tensor, at: Tensor, before: KeysValues, visible: Tensor
    ) -> tuple[Tensor, KeysValues]:
        found: tuple[Tensor, KeysValues] = self.head(embedded, states, at, before, visible)
        return found

    def logits(self, state: Tensor, head: Tensor) -> Tensor:
        """All streams (..., c * H) over `head` (vocab, H) -> (..., vocab)."""
        one = self.collapse(state.unflatten(-1, (self.collapse.facts.count, -1)))
        norm = self.norm if self.head.norm is None else self.head.norm
        return over_head(one if norm is None else norm(one), head)
