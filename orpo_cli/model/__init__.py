"""Models: loading, LoRA, shared-prefix attention, log-probs."""
