"""Models: loading, LoRA, shared-prefix attention, log-probs.

Reading order: `device`, `load`, `vocabulary`, `lora`, `fused_lora`, `fused_mlp`, `fused_norm`, `attention_cpu`,
`attention_ragged`, `attention`, `head`, `logprobs`, `lanes`, `probe`, `build`, `checkpointing`, `memory`, `budget`,
`outline`.
"""
