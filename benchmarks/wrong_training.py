"""`orpo train` with a wrong loss of `wrong_losses.py` in the place of ours, in this process alone.

python benchmarks/wrong_training.py LOSS train RECIPE [options of `orpo train`]
"""

import sys
from dataclasses import replace

from wrong_losses import TRAINED, loss_of

from orpo_cli import cli
from orpo_cli.data.batches import FlatBatch, Uses
from orpo_cli.train import loop


class Summed(Uses):
    """Sums where means are asked for."""

    def each(self, change):
        return Summed(**vars(super().each(change)))

    def means(self, values):
        return self.sums(values)


right_batch = loop.flat_batch


def summed_batch(pairs, nll_tokens) -> FlatBatch:
    """As `flat_batch`, the answers' log-probs summed; the NLL is as it was."""
    batch = right_batch(pairs, nll_tokens)
    return replace(batch, chosen=Summed(**vars(batch.chosen)), rejected=Summed(**vars(batch.rejected)))


if __name__ == "__main__":
    wrong = TRAINED[sys.argv.pop(1)]
    loop.orpo_loss = loss_of(wrong)
    if wrong.summed:
        loop.flat_batch = summed_batch
    cli.main()
