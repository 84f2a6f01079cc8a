"""What an evaluation looks at besides the pairs' log-probs: whether answers are learnt to end, and what is forgotten.

Forgetting is how unlikely the held-out prompts have become, texts that the loss over answers does not train on, against
what the base thinks of them: the same model with its adapters off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from peft import PeftModel

from orpo_cli.data.batches import flat_batch
from orpo_cli.data.tokenize import TokenizedPair
from orpo_cli.model.logprobs import inference
from orpo_cli.train.state import Run

# So many held-out pairs, evenly spaced: the figures are compared with themselves, so that few will do.
PAIRS = 16


def drift(run: Run) -> dict[str, float]:
    """`eval_end_logps`, `eval_prompt_logps` and, where there are adapters to turn off, `eval_base_prompt_logps`."""
    pairs = run.held_out[:: -(-len(run.held_out) // PAIRS)]
    prompts, ends = prompt_and_end_logps(run, pairs)
    found = {"eval_end_logps": ends, "eval_prompt_logps": prompts}
    if isinstance(run.built.model, PeftModel):
        with run.built.model.disable_adapter():
            found["eval_base_prompt_logps"], _ = prompt_and_end_logps(run, pairs)
    return found


def prompt_and_end_logps(run: Run, pairs: Sequence[TokenizedPair]) -> tuple[float, float]:
    """The mean log-prob of the prompts' tokens, and the median one of the token that ends a chosen answer.

    The median, since a few answers may have been truncated. A prompt's first token is predicted by nothing; NaN where
    no prompt has a second one.
    """
    of_prompts: list[np.ndarray] = []
    ends: list[np.ndarray] = []
    with inference(run.logprobs), torch.no_grad():
        for part in run.logprobs.micro_batches(pairs, run.max_tokens):
            batch = flat_batch(part, "all").to(run.processes.device)
            logps = run.logprobs(batch)
            rows = logps[batch.nll.index].double().cpu().numpy()  # all but the first token of prompt and chosen answer
            for pair in part:
                own, rows = np.split(rows, [len(pair.chosen_ids) - 1])
                of_prompts.append(own[: pair.chosen_start - 1])
                ends.append(own[-1:])
    told = np.concatenate(of_prompts)
    return float(told.mean()) if len(told) else float("nan"), float(np.median(np.concatenate(ends)))
