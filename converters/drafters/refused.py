"""Drafters that are known and not converted, each with its reason: by their tensors, or by their architecture."""

from __future__ import annotations

# By the name of their signature in `drafters/__init__.py`.
OTHER_KINDS = {
    "Domino": "a recurrent net corrects each draft; of the supported runtimes only Lucebox computes it",
    "Laguna DFlash": "its attention is gated and its context normed by each layer; llama.cpp has no graph for it",
    "EAGLE-3 with multi-head latent attention": "no runtime's EAGLE-3 has such an attention",
    "P-EAGLE": "it drafts in parallel from a state of its own; no supported runtime has a graph for it",
    "DSpark inside DeepSeek-V4": "its layers are DeepSeek-V4's, with hyper-connections and experts",
}
# By the class in the config, on tensors of a kind that is converted.
OTHER_BUILDS = {
    "Gemma4DSparkModel": "its layers are Gemma-4's, which have four norms, and a Markov head belongs to it",
    "LagunaDSparkModel": "its attention is gated and its context normed by each layer",
    "Qwen35DSparkModel": "its queries are gated and its norms centred on zero",
    "KimiK3DSpark5MLADraftModel": "its attention is multi-head latent",
    "Qwen3DSparkForCausalLM": "TorchSpec counts capture layers under that key from zero, others from one",
    "Eagle3DeepseekV2ForCausalLM": "its attention is multi-head latent, which no runtime's EAGLE-3 has",
    "LlamaForCausalLMEagle": "EAGLE-1 and 2 fuse no states and have another layer",
    "PEagleDraftModel": "it drafts in parallel from a state of its own",
    "DFlareDraftModel": "it fuses captured states another way",
    "DominoDraftModel": "a recurrent net corrects each draft",
    "DFlashLagunaForCausalLM": "its attention is gated and its context normed by each layer",
}
