"""Models: loading, LoRA, shared-prefix attention, log-probs.

Reading order: `device`, `load`, `lora`, `attention_cpu`, `attention_ragged`, `attention`, `head`, `logprobs`, `probe`,
`fused_lora`, `fused_mlp`, `fused_norm`, `build`, `memory`, `outline`.
"""
