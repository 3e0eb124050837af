"""Canonical tensor names: what a tensor is for, whatever a checkpoint or a runtime calls it.

A role's value is the GGUF name most runtimes use (llama.cpp's); a dialect lists only the names where it differs.
`{i}` is the drafter's layer. A head that is one more layer of its target counts on where the target's layers end.
"""

from __future__ import annotations

from enum import Enum


class Role(Enum):
    FUSION = "fc.weight"  # captured hidden states -> one context feature
    FUSION_NORM = "enc.output_norm.weight"
    OUTPUT_NORM = "output_norm.weight"
    ROPE_FACTORS = "rope_freqs.weight"  # what each rotated pair's frequency is divided by
    TOKEN_EMBEDDING = "token_embd.weight"
    OUTPUT = "output.weight"
    STREAMS_OUT = "output_hc_fn.weight"  # hyper-connections: what makes one state of all streams, in three parts
    STREAMS_OUT_BASE = "output_hc_base.weight"
    STREAMS_OUT_SCALE = "output_hc_scale.weight"
    ATTN_NORM = "blk.{i}.attn_norm.weight"
    ATTN_NORM_2 = "blk.{i}.attn_norm_2.weight"  # of the feature, where ATTN_NORM is of the token's embedding
    ATTN_Q = "blk.{i}.attn_q.weight"
    ATTN_K = "blk.{i}.attn_k.weight"
    ATTN_V = "blk.{i}.attn_v.weight"
    ATTN_OUTPUT = "blk.{i}.attn_output.weight"
    ATTN_Q_BIAS = "blk.{i}.attn_q.bias"
    ATTN_K_BIAS = "blk.{i}.attn_k.bias"
    ATTN_V_BIAS = "blk.{i}.attn_v.bias"
    ATTN_OUTPUT_BIAS = "blk.{i}.attn_output.bias"
    ATTN_POST_NORM = "blk.{i}.post_attention_norm.weight"  # of what goes into the residual
    ATTN_Q_NORM = "blk.{i}.attn_q_norm.weight"
    ATTN_K_NORM = "blk.{i}.attn_k_norm.weight"
    ATTN_CONV_BASE = "blk.{i}.attn_conv_base"
    ATTN_CONV_PROJ = "blk.{i}.attn_conv_proj.weight"
    ATTN_SINKS = "blk.{i}.attn_sinks.weight"
    ATTN_Q_A = "blk.{i}.attn_q_a.weight"  # latent attention: into the queries' narrow state, and out of it
    ATTN_Q_A_NORM = "blk.{i}.attn_q_a_norm.weight"
    ATTN_Q_B = "blk.{i}.attn_q_b.weight"
    ATTN_KV_A = "blk.{i}.attn_kv_a_mqa.weight"  # into the state of keys and values, with the part of keys that rotates
    ATTN_KV_A_NORM = "blk.{i}.attn_kv_a_norm.weight"
    ATTN_KV = "blk.{i}.attn_kv.weight"  # one key for all heads, which is its own value
    ATTN_OUTPUT_A = "blk.{i}.attn_output_a.weight"  # out of the heads of each group, and out of all groups
    ATTN_OUTPUT_B = "blk.{i}.attn_output_b.weight"
    ATTN_STREAMS = "blk.{i}.hc_attn_fn.weight"  # how streams are mixed around the attention, in three parts
    ATTN_STREAMS_BASE = "blk.{i}.hc_attn_base.weight"
    ATTN_STREAMS_SCALE = "blk.{i}.hc_attn_scale.weight"
    ATTN_K_B = "blk.{i}.attn_k_b.weight"  # out of it into each head's keys, transposed: queries go through it
    ATTN_V_B = "blk.{i}.attn_v_b.weight"
    INDEXER_Q_B = "blk.{i}.indexer.attn_q_b.weight"  # what chooses the positions of sparse attention
    INDEXER_K = "blk.{i}.indexer.attn_k.weight"
    INDEXER_K_NORM = "blk.{i}.indexer.k_norm.weight"
    INDEXER_K_NORM_BIAS = "blk.{i}.indexer.k_norm.bias"
    INDEXER_PROJ = "blk.{i}.indexer.proj.weight"
    INDEXER_Q_PROJ = "blk.{i}.indexer.q_proj.weight"  # out of the hidden state, where INDEXER_Q_B is not
    INDEXER_K_PROJ = "blk.{i}.indexer.k_proj.weight"
    INDEXER_Q_NORM = "blk.{i}.indexer.q_norm.weight"
    ATTN_MIX_NORM = "blk.{i}.hc_attn_norm.weight"  # several streams: how they are mixed for attention,
    ATTN_MIX_DOWN = "blk.{i}.hc_attn_down.weight"
    ATTN_MIX_UP = "blk.{i}.hc_attn_up.weight"
    ATTN_SHARES = "blk.{i}.hc_attn_inject.weight"  # and how much of its output each of them gets
    ATTN_QKV = "blk.{i}.attn_qkv.weight"  # queries, keys and values in one
    ATTN_GATE = "blk.{i}.attn_gate.weight"  # a number for each head, which weighs its output
    FFN_NORM = "blk.{i}.ffn_norm.weight"
    FFN_STREAMS = "blk.{i}.hc_ffn_fn.weight"  # and around the feed-forward
    FFN_STREAMS_BASE = "blk.{i}.hc_ffn_base.weight"
    FFN_STREAMS_SCALE = "blk.{i}.hc_ffn_scale.weight"
    FFN_POST_NORM = "blk.{i}.post_ffw_norm.weight"
    LAYER_SCALE = "blk.{i}.layer_output_scale.weight"  # one number
    FFN_GATE = "blk.{i}.ffn_gate.weight"
    FFN_UP = "blk.{i}.ffn_up.weight"
    FFN_DOWN = "blk.{i}.ffn_down.weight"
    FFN_ROUTER = "blk.{i}.ffn_gate_inp.weight"
    FFN_ROUTER_BIAS = "blk.{i}.exp_probs_b.bias"  # added where experts are chosen, not where they are weighed
    FFN_GATE_EXPERTS = "blk.{i}.ffn_gate_exps.weight"
    FFN_UP_EXPERTS = "blk.{i}.ffn_up_exps.weight"
    FFN_DOWN_EXPERTS = "blk.{i}.ffn_down_exps.weight"
    FFN_LATENT_DOWN = "blk.{i}.ffn_latent_down.weight"  # into the width that experts work in, where it is their own
    FFN_LATENT_UP = "blk.{i}.ffn_latent_up.weight"
    FFN_SHARED_ROUTER = "blk.{i}.ffn_gate_inp_shexp.weight"
    FFN_GATE_SHARED = "blk.{i}.ffn_gate_shexp.weight"
    FFN_UP_SHARED = "blk.{i}.ffn_up_shexp.weight"
    FFN_DOWN_SHARED = "blk.{i}.ffn_down_shexp.weight"
    FFN_MIX_NORM = "blk.{i}.hc_ffn_norm.weight"
    FFN_MIX_DOWN = "blk.{i}.hc_ffn_down.weight"
    FFN_MIX_UP = "blk.{i}.hc_ffn_up.weight"
    FFN_SHARES = "blk.{i}.hc_ffn_inject.weight"
    FFN_CONV_BASE = "blk.{i}.ffn_conv_base"
    FFN_CONV_PROJ = "blk.{i}.ffn_conv_proj.weight"
    NEXTN_PROJ = "blk.{i}.nextn.eh_proj.weight"  # token embedding beside the target's state -> what the layer reads
    NEXTN_EMBEDDING_NORM = "blk.{i}.nextn.enorm.weight"
    NEXTN_STATE_NORM = "blk.{i}.nextn.hnorm.weight"
    NEXTN_OUTPUT_NORM = "blk.{i}.nextn.shared_head_norm.weight"
    NEXTN_MIX_NORM = "blk.{i}.nextn.hc_head_norm.weight"  # several streams: into the one that the output head reads
    NEXTN_MIX_DOWN = "blk.{i}.nextn.hc_head_down.weight"
    NEXTN_MIX_UP = "blk.{i}.nextn.hc_head_up.weight"
    NEXTN_EMBEDDING = "blk.{i}.nextn.embed_tokens.weight"  # in place of the target's
    NEXTN_OUTPUT = "blk.{i}.nextn.shared_head_head.weight"  # in place of the target's output head
    NEXTN_PRE_PROJ = "nextn.pre_projection.weight"  # the target's embedding beside its state -> what the layers read
    NEXTN_POST_PROJ = "nextn.post_projection.weight"  # the drafter's own state -> one of the target's width
    MARKOV_IN = "markov_w1.weight"  # a row for each token that may go before
    MARKOV_OUT = "markov_w2.weight"
    CONFIDENCE = "conf_proj.weight"
    CONFIDENCE_BIAS = "conf_proj.bias"
    DRAFT_TO_TARGET = "d2t"  # the target's token of each row of a reduced vocabulary
    SELECTOR_HIDDEN = "selector_hidden.weight"
    SELECTOR_PREDECESSOR = "selector_predecessor.weight"  # a row for each token that may go before
    SELECTOR_SUCCESSOR = "selector_successor.weight"

    @property
    def per_layer(self) -> bool:
        return "{i}" in self.value


TensorKey = tuple[Role, int | None]  # the layer is None for a tensor the drafter has once


def role_name(key: TensorKey) -> str:
    """llama.cpp's name of a tensor, whatever another runtime calls it."""
    role, layer = key
    return role.value.replace("{i}", str(layer))


def describe(key: TensorKey) -> str:
    """A role for a message: "FFN_DOWN of layer 2"."""
    role, layer = key
    return role.name if layer is None else f"{role.name} of layer {layer}"
