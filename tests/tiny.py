"""Tiny models with random weights, scaled until attention, windows and caps matter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

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
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 4.0, 8.0, 16.0],
}


@dataclass(frozen=True)
class Family:
    """What is particular to a family."""

    settings: dict[str, Any] = field(default_factory=dict)
    not_shared: str | None = None
    """Words of the reason why it cannot share prefixes; None if it can."""
    full_logits: bool = False
    """Whether its head is more than Head computes."""
    without: dict[str, Any] = field(default_factory=dict)
    """What each particular setting would be if it were not there; each must change the log-probs."""
    kind: str | None = None
    """transformers' name of it, where that is not the family's own here."""


OWN_WAY = "0 of its 2 layers attend"
WINDOW: dict[str, Any] = {"sliding_window": 7}
WIDE: dict[str, Any] = {"sliding_window": 1000}
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "mistral": Family(WINDOW, without=WIDE),
    "gemma2": Family(
        {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, **WINDOW},
        not_shared="soft-capped",
        without={"attn_logit_softcapping": None, "final_logit_softcapping": None, **WIDE},
    ),
    "gemma3_text": Family(
        {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"], **WINDOW}, without=WIDE
    ),
    "phi": Family({"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": Family(),
    "phi3_longrope": Family(
        # Sequences of random_pairs are on both sides of the length at which the frequencies change.
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
        not_shared="depend on the longest sequence",
        without={"rope_parameters": {**LONGROPE, "long_factor": LONGROPE["short_factor"]}},
        kind="phi3",
    ),
    "olmo2": Family(),
    "granite": Family(
        {"logits_scaling": 3.0, "residual_multiplier": 0.5},
        without={"logits_scaling": 1.0, "residual_multiplier": 1.0},
    ),
    "smollm3": Family({"no_rope_layers": [1, 0]}, without={"no_rope_layers": [1, 1]}),
    "cohere": Family({"logit_scale": 0.3}, without={"logit_scale": 1.0}),
    "hyperclovax": Family(
        {"logits_scaling": 3.0}, not_shared="its head", full_logits=True, without={"logits_scaling": 1.0}
    ),
    "mixtral": Family(EXPERTS, without={"num_experts_per_tok": 1}),
    "qwen3_moe": Family({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "phimoe": Family({**EXPERTS, **WINDOW}, not_shared="windows are applied outside", without=WIDE),
    "gpt_oss": Family(
        {**EXPERTS, **WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        not_shared="sinks",
        without=WIDE,
    ),
    "gpt2": Family({**GPT, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "opt": Family({"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32}),
    "gpt_neox": Family({"hidden_dropout": 0.0}),
    "gpt_neo": Family(
        {
            "attention_types": [[["global", "local"], 1]],
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 7,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
        },
        not_shared=OWN_WAY,
        without={"window_size": 1000},
    ),
    "gptj": Family(
        {**GPT, "rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, not_shared=OWN_WAY
    ),
    "bloom": Family({"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0}, not_shared=OWN_WAY),
    "mpt": Family(
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2}, not_shared=OWN_WAY
    ),
    "mamba": Family({"state_size": 4}, not_shared="linear_attention"),
    "mamba2": Family(
        {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 4, "chunk_size": 8}, not_shared="linear_attention"
    ),
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the family, float32, in evaluation mode, its weights large enough for every feature to show.

    `changes` replace settings of its configuration; the weights stay the same as long as their shapes do.
    """
    torch.manual_seed(seed)
    particular = FAMILIES[family]
    config = CONFIG_MAPPING[particular.kind or family](**{**COMMON, **particular.settings, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.manual_seed(seed)
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
