"""What is read of a peer's trainer while it works; runs in the peer's environment, whose Trainer is transformers'."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator

from transformers import TrainerCallback


def tokens_digest(pairs: Iterable[tuple[list[int], int, list[int], int]]) -> str:
    """Stands for the token ids of all pairs, in order: chosen, where its answer starts, rejected, and the same."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair).encode())
    return digest.hexdigest()[:16]


def tokenised_pairs(rows: Iterable[dict[str, list[int]]]) -> Iterator[tuple[list[int], int, list[int], int]]:
    """A trainer's rows as `tokens_digest` takes them, in whichever columns it has them; rows without pairs are none."""
    for row in rows:
        if "chosen_labels" in row:
            chosen, rejected = row["chosen_input_ids"], row["rejected_input_ids"]
            yield chosen, answer_start(row["chosen_labels"]), rejected, answer_start(row["rejected_labels"])
        elif "prompt_ids" in row:
            prompt = row["prompt_ids"]
            yield prompt + row["chosen_ids"], len(prompt), prompt + row["rejected_ids"], len(prompt)


def answer_start(labels: list[int]) -> int:
    """How many labels at the beginning are masked."""
    return next(i for i, label in enumerate(labels) if label != -100)


class Watch(TrainerCallback):
    """Notes how long each step takes, the first loss, and the tokens that are trained on."""

    def __init__(self):
        self.begun, self.seconds, self.losses, self.digest = 0.0, [], [], ""

    def on_train_begin(self, *args, train_dataloader, **kwargs):
        self.digest = tokens_digest(tokenised_pairs(train_dataloader.dataset))

    def on_step_begin(self, *args, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.begun)

    def on_log(self, *args, logs, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def report(self) -> None:
        """Print what was noted as one line of JSON."""
        print(json.dumps({"seconds": self.seconds, "first_loss": self.losses[0], "tokens_digest": self.digest}))
