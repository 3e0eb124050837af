"""What the parameters of an MTP head are called in its reference, whatever its family calls them."""

from __future__ import annotations

from convert_drafter.converters.roles import Role

_ATTENTION, _MLP = "layers.0.self_attn.", "layers.0.mlp."
# Parameters by what they are for: those of one head, and those the drafter has once.
NAMES = {
    Role.ATTN_NORM: "layers.0.input_layernorm.weight",
    Role.ATTN_Q: f"{_ATTENTION}q_proj.weight",
    Role.ATTN_K: f"{_ATTENTION}k_proj.weight",
    Role.ATTN_V: f"{_ATTENTION}v_proj.weight",
    Role.ATTN_OUTPUT: f"{_ATTENTION}o_proj.weight",
    Role.ATTN_Q_BIAS: f"{_ATTENTION}q_proj.bias",
    Role.ATTN_K_BIAS: f"{_ATTENTION}k_proj.bias",
    Role.ATTN_V_BIAS: f"{_ATTENTION}v_proj.bias",
    Role.ATTN_Q_NORM: f"{_ATTENTION}q_norm.weight",
    Role.ATTN_K_NORM: f"{_ATTENTION}k_norm.weight",
    Role.ATTN_Q_A: f"{_ATTENTION}q_a_proj.weight",
    Role.ATTN_Q_A_NORM: f"{_ATTENTION}q_a_layernorm.weight",
    Role.ATTN_Q_B: f"{_ATTENTION}q_b_proj.weight",
    Role.ATTN_KV_A: f"{_ATTENTION}kv_a_proj.weight",
    Role.ATTN_KV_A_NORM: f"{_ATTENTION}kv_a_layernorm.weight",
    Role.ATTN_K_B: f"{_ATTENTION}k_b",
    Role.ATTN_V_B: f"{_ATTENTION}v_b",
    Role.INDEXER_Q_B: f"{_ATTENTION}indexer.wq_b.weight",
    Role.INDEXER_K: f"{_ATTENTION}indexer.wk.weight",
    Role.INDEXER_K_NORM: f"{_ATTENTION}indexer.k_norm.weight",
    Role.INDEXER_K_NORM_BIAS: f"{_ATTENTION}indexer.k_norm.bias",
    Role.INDEXER_PROJ: f"{_ATTENTION}indexer.weights_proj.weight",
    Role.ATTN_QKV: f"{_ATTENTION}qkv_proj.weight",
    Role.ATTN_GATE: f"{_ATTENTION}g_proj.weight",
    Role.ATTN_SINKS: f"{_ATTENTION}sinks",
    Role.FFN_NORM: "layers.0.post_attention_layernorm.weight",
    Role.FFN_GATE: f"{_MLP}gate_proj.weight",
    Role.FFN_UP: f"{_MLP}up_proj.weight",
    Role.FFN_DOWN: f"{_MLP}down_proj.weight",
    Role.FFN_ROUTER: f"{_MLP}gate.weight",
    Role.FFN_ROUTER_BIAS: f"{_MLP}choice_bias",
    Role.FFN_GATE_EXPERTS: f"{_MLP}experts.gate_proj.weight",
    Role.FFN_UP_EXPERTS: f"{_MLP}experts.up_proj.weight",
    Role.FFN_DOWN_EXPERTS: f"{_MLP}experts.down_proj.weight",
    Role.FFN_LATENT_DOWN: f"{_MLP}latent_down.weight",
    Role.FFN_LATENT_UP: f"{_MLP}latent_up.weight",
    Role.FFN_SHARED_ROUTER: f"{_MLP}shared_expert_gate.weight",
    Role.FFN_GATE_SHARED: f"{_MLP}shared_expert.gate_proj.weight",
    Role.FFN_UP_SHARED: f"{_MLP}shared_expert.up_proj.weight",
    Role.FFN_DOWN_SHARED: f"{_MLP}shared_expert.down_proj.weight",
    Role.NEXTN_PROJ: "fc.weight",
    Role.NEXTN_EMBEDDING_NORM: "pre_fc_norm_embedding.weight",
    Role.NEXTN_STATE_NORM: "pre_fc_norm_hidden.weight",
    Role.NEXTN_OUTPUT_NORM: "norm.weight",
    Role.NEXTN_EMBEDDING: "embed_tokens.weight",
    Role.NEXTN_OUTPUT: "lm_head.weight",
}
SHARED_NAMES = {
    Role.TOKEN_EMBEDDING: "embed_tokens.weight",
    Role.OUTPUT_NORM: "norm.weight",
    Role.OUTPUT: "lm_head.weight",
    Role.ROPE_FACTORS: "rope_factors",
}
