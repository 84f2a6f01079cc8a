"""Tiny models with random weights, scaled until attention, windows and caps matter."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from orpo_cli.data.tokenize import TokenizedPair

COMMON = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
GPT = {"vocab_size": 101, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
# What is particular to each family: (its own settings, whether it can share prefixes).
FAMILIES: dict[str, tuple[dict, bool]] = {
    "llama": ({}, True),
    "qwen2": ({}, True),
    "qwen3": ({}, True),
    "mistral": ({"sliding_window": 7}, True),
    "gemma2": ({"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}, False),
    "gemma3_text": ({"sliding_window": 7, "query_pre_attn_scalar": 8}, True),
    "phi": ({"resid_pdrop": 0.0, "embd_pdrop": 0.0}, True),
    "phi3": ({}, True),
    "olmo2": ({}, True),
    "granite": ({"logits_scaling": 3.0, "residual_multiplier": 0.5}, True),
    "cohere": ({"logit_scale": 0.3}, True),
    "qwen3_moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, True),
    "gpt2": ({**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, True),
    "opt": ({"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32}, True),
    "gpt_neox": ({"attention_dropout": 0.0, "hidden_dropout": 0.0}, True),
    "gpt_neo": (
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 7}
        | {"resid_dropout": 0.0, "embed_dropout": 0.0},
        False,
    ),
    "mamba": ({"state_size": 4}, False),
}


def tiny_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A model of the family, float32, in evaluation mode, its weights large enough for every feature to show."""
    torch.manual_seed(seed)
    settings, _ = FAMILIES[family]
    config = CONFIG_MAPPING[family](**{**COMMON, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    return model


def random_pairs(count: int, seed: int = 0, vocabulary: int = 101, longest: int = 20) -> list[TokenizedPair]:
    """Pairs of random tokens with unequal lengths; some answers begin alike, some prompts tokenise differently."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def tokens(n: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (n,), generator=generator, dtype=torch.int32)

    pairs = []
    for index in range(count):
        prompt, alike = tokens(draw(2, longest)), tokens(draw(0, 3))
        sides = [torch.cat([prompt, alike, tokens(draw(1, longest)), torch.tensor([2])]).int() for _ in range(2)]
        starts = [len(prompt), len(prompt) - (index % 3 == 2)]  # as when a merge reaches across the boundary
        mask = torch.arange(len(sides[0])) >= starts[0]
        pairs.append(TokenizedPair(index, sides[0].numpy(), sides[1].numpy(), starts[0], starts[1], mask.numpy()))
    return pairs
