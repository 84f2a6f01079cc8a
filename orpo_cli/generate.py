"""Answers by stock greedy generation, as whoever uses the model will get them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from orpo_cli.data.formats import Message
from orpo_cli.data.templates import render
from orpo_cli.model.build import TextSide
from orpo_cli.model.logprobs import inference, stock_attention


def prompt_ids(text: TextSide, prompt: str) -> list[int]:
    """Token ids of a prompt as in training: one user turn under the template, or as it is under `none`."""
    if text.template.source is None:
        ids = text.tokenizer(prompt, add_special_tokens=False).input_ids
        return [text.tokenizer.bos_token_id, *ids] if text.starts_with_bos else ids
    rendered = render(text.tokenizer, text.template, [Message("user", prompt)], add_generation_prompt=True)
    return text.tokenizer(rendered, add_special_tokens=False).input_ids


def answers(
    model: PreTrainedModel, text: TextSide, prompts: Sequence[str], max_new_tokens: int = 128
) -> list[tuple[str, bool]]:
    """The model's greedy answer to each prompt, and whether it ended its turn by itself."""
    found = []
    with inference(model), stock_attention(model), torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([prompt_ids(text, prompt)], device=model.device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=text.stop_id,
                pad_token_id=text.tokenizer.pad_token_id,
                use_cache=True,
            )[0, ids.shape[1] :]
            ended = bool((out == text.stop_id).any())
            found.append((text.tokenizer.decode(out, skip_special_tokens=True).strip(), ended))
    return found
