"""Pairs -> one flat batch: a single row of tokens, `shared | chosen | rejected` for each pair, without padding.

`shared` is the longest token prefix that both sides of a pair have in common. The rejected branch follows the chosen
one in memory but continues the shared part: its positions restart after it and it never sees the chosen branch.
Everything downstream (attention, log-probs, loss) speaks in the segments of this table.

Shapes: T tokens, P pairs, M distinct predictions (a hidden row and the token it should predict), K uses of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from orpo_cli.data.tokenize import TokenizedPair


@dataclass(frozen=True)
class Segment:
    """Where one pair lies in the flat row: `shared` tokens from `start`, then `chosen`, then `rejected` ones."""

    start: int
    shared: int
    chosen: int
    rejected: int

    @property
    def stop(self) -> int:
        """One past the pair's last token."""
        return self.start + self.shared + self.chosen + self.rejected


@dataclass
class FlatBatch:
    """One micro-batch. Index tensors are int64."""

    input_ids: Tensor  # (T,)
    position_ids: Tensor  # (T,) restarting with every pair, and after `shared` for its rejected branch
    segments: list[Segment]  # P of them
    rows: Tensor  # (M,) the position in the flat row whose hidden state predicts `targets`
    targets: Tensor  # (M,) token ids
    chosen: Uses  # the chosen responses' predictions
    rejected: Uses  # the rejected responses' predictions
    nll: Uses  # the predictions whose negative log-likelihood is the SFT loss
    pairs: list[TokenizedPair] = field(repr=False)

    @property
    def tokens(self) -> int:
        """T, the tokens that go through the model."""
        return len(self.input_ids)

    def to(self, device: torch.device) -> FlatBatch:
        """The same batch with its tensors on `device`."""
        # MPS would not wait either, and read memory that has been given to something else by then.
        return self._each(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pinned(self) -> FlatBatch:
        """The same batch in page-locked memory, from which a copy to a GPU does not hold up the CPU."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> FlatBatch:
        return replace(
            self,
            input_ids=change(self.input_ids),
            position_ids=change(self.position_ids),
            rows=change(self.rows),
            targets=change(self.targets),
            chosen=self.chosen.each(change),
            rejected=self.rejected.each(change),
            nll=self.nll.each(change),
        )


@dataclass(frozen=True)
class Uses:
    """Which predictions belong to which pair: prediction `index[k]` counts for pair `pair[k]`."""

    index: Tensor  # (K,) into the M predictions
    pair: Tensor  # (K,) 0 .. P-1, ascending
    counts: Tensor  # (P,) float32, how many a pair has

    def each(self, change: Callable[[Tensor], Tensor]) -> Uses:
        """The same table with each of its tensors changed, say moved."""
        return Uses(change(self.index), change(self.pair), change(self.counts))

    def sums(self, values: Tensor) -> Tensor:
        """Sum of values (M,) over each pair's predictions -> (P,)."""
        return values.new_zeros(len(self.counts)).index_add(0, self.pair, values[self.index])

    def means(self, values: Tensor) -> Tensor:
        """Mean of values (M,) over each pair's predictions -> (P,): the length-averaged log P of eq. 3."""
        return self.sums(values) / self.counts


def shared_length(pair: TokenizedPair) -> int:
    """Length of the longest common token prefix, leaving each branch at least one token of its own."""
    limit = min(len(pair.chosen_ids), len(pair.rejected_ids)) - 1
    differs = np.flatnonzero(pair.chosen_ids[:limit] != pair.rejected_ids[:limit])
    return int(differs[0]) if len(differs) else limit


def flat_tokens(pair: TokenizedPair) -> int:
    """Tokens that the pair takes in a flat batch."""
    return len(pair.chosen_ids) + len(pair.rejected_ids) - shared_length(pair)


def nll_positions(pair: TokenizedPair, nll_tokens: str) -> np.ndarray:
    """Positions in `chosen_ids` of the tokens that the SFT loss is taken over (loss.nll_tokens)."""
    if nll_tokens == "all":  # the first token is predicted by nothing
        return np.arange(1, len(pair.chosen_ids))
    if nll_tokens == "assistant":
        assert pair.assistant_mask is not None, "the pair was tokenised without its assistant turns"
        return np.flatnonzero(pair.assistant_mask[1:]) + 1
    return np.arange(pair.chosen_start, len(pair.chosen_ids))


def flat_batch(pairs: Sequence[TokenizedPair], nll_tokens: str) -> FlatBatch:
    """Lay pairs one behind the other. `nll_tokens` is the recipe's `loss.nll_tokens`."""
    ids, positions, segments, rows, targets = [], [], [], [], []
    uses: dict[str, list[np.ndarray]] = {"chosen": [], "rejected": [], "nll": []}
    start = predictions = 0
    for pair in pairs:
        shared, chosen_length, rejected_length = shared_length(pair), len(pair.chosen_ids), len(pair.rejected_ids)
        segment = Segment(start, shared, chosen_length - shared, rejected_length - shared)
        ids += [pair.chosen_ids, pair.rejected_ids[shared:]]
        positions += [np.arange(chosen_length), np.arange(shared, rejected_length)]

        chosen_targets = np.arange(pair.chosen_start, chosen_length)
        nll_targets = nll_positions(pair, nll_tokens)
        rejected_targets = np.arange(pair.rejected_start, rejected_length)
        assert min(len(chosen_targets), len(rejected_targets)) > 0, f"row {pair.index} has a response without tokens"
        # A token inside the shared part is the same prediction for both branches; computed once, used twice.
        on_chosen = np.union1d(np.union1d(chosen_targets, nll_targets), rejected_targets[rejected_targets < shared])
        on_rejected = rejected_targets[rejected_targets >= shared]

        def used(wanted: np.ndarray, computed: np.ndarray = on_chosen, first: int = predictions) -> np.ndarray:
            return np.searchsorted(computed, wanted) + first

        uses["chosen"].append(used(chosen_targets))
        uses["nll"].append(used(nll_targets))
        in_shared = used(rejected_targets[rejected_targets < shared])
        beyond = predictions + len(on_chosen) + np.arange(len(on_rejected))
        uses["rejected"].append(np.concatenate([in_shared, beyond]))

        # Token t is predicted by the hidden state at t - 1; the rejected branch's first by the last shared one.
        branch = segment.start + chosen_length - shared
        rejected_rows = np.where(on_rejected == shared, start + shared - 1, branch + on_rejected - 1)
        rows += [start + on_chosen - 1, rejected_rows]
        targets += [pair.chosen_ids[on_chosen], pair.rejected_ids[on_rejected]]
        segments.append(segment)
        predictions += len(on_chosen) + len(on_rejected)
        start = segment.stop

    return FlatBatch(
        input_ids=_int64(ids),
        position_ids=_int64(positions),
        segments=segments,
        rows=_int64(rows),
        targets=_int64(targets),
        chosen=_uses(uses["chosen"]),
        rejected=_uses(uses["rejected"]),
        nll=_uses(uses["nll"]),
        pairs=list(pairs),
    )


def cut_by_tokens(pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[TokenizedPair]]:
    """Cut one optimizer step's pairs into micro-batches of at most `max_tokens` flat tokens each.

    Best-fit decreasing: the longest pair first, each into the fullest micro-batch that still has room. A pair longer
    than the budget is a micro-batch of its own. Deterministic; which pairs share a micro-batch changes only rounding.
    """
    bins: list[list[TokenizedPair]] = []
    room: list[int] = []
    for length, _, pair in sorted(((flat_tokens(p), i, p) for i, p in enumerate(pairs)), key=lambda x: (-x[0], x[1])):
        fitting = [b for b, free in enumerate(room) if free >= length]
        if fitting:
            best = min(fitting, key=lambda b: (room[b], b))
            bins[best].append(pair)
            room[best] -= length
        else:
            bins.append([pair])
            room.append(max_tokens - length)
    return bins


def cut_into_rounds(pairs: Sequence[TokenizedPair], max_tokens: int, lanes: int) -> list[list[list[TokenizedPair]]]:
    """Cut pairs into rounds of micro-batches that are computed side by side, `max_tokens` flat tokens a round at most.

    A round has up to `lanes` micro-batches, each with its even share of those tokens at most; wherever that can be,
    all have about the same, so that none waits long for another. Pairs longer than such a share come first, in rounds
    of a single micro-batch, and what fits into one share is left whole. Deterministic, as `cut_by_tokens`.
    """
    share = max_tokens // lanes
    rounds = [[part] for part in cut_by_tokens([pair for pair in pairs if flat_tokens(pair) > share], max_tokens)]
    parts = cut_by_tokens([pair for pair in pairs if flat_tokens(pair) <= share], share)
    if len(parts) > 1:
        count = -(-len(parts) // lanes) * lanes
        even = _spread([pair for part in parts for pair in part], count)
        if sum(map(flat_tokens, even[0])) <= share:
            parts = even
    return rounds + [parts[first : first + lanes] for first in range(0, len(parts), lanes)]


def _spread(pairs: Sequence[TokenizedPair], count: int) -> list[list[TokenizedPair]]:
    """Pairs in up to `count` parts of about as many flat tokens each, the largest part first.

    The longest pair first, each to the part that has least.
    """
    parts: list[list[TokenizedPair]] = [[] for _ in range(count)]
    tokens = [0] * count
    for length, pair in sorted(((flat_tokens(pair), pair) for pair in pairs), key=lambda x: -x[0]):
        least = tokens.index(min(tokens))
        parts[least].append(pair)
        tokens[least] += length
    return [parts[i] for i in sorted(range(count), key=lambda i: -tokens[i]) if parts[i]]


def cut_by_padded_tokens(pairs: Sequence[TokenizedPair], max_tokens: int) -> list[list[TokenizedPair]]:
    """The same for a batch in which both sides of a pair are sequences padded to the longest: near lengths together."""
    longest = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    batches: list[list[TokenizedPair]] = []
    width = 0
    for i in sorted(range(len(pairs)), key=lambda i: (-longest[i], i)):
        if not batches or 2 * (len(batches[-1]) + 1) * width > max_tokens:
            batches.append([])
            width = longest[i]
        batches[-1].append(pairs[i])
    return batches


def _int64(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _uses(parts: list[np.ndarray]) -> Uses:
    counts = [len(part) for part in parts]
    return Uses(
        index=_int64(parts),
        pair=torch.from_numpy(np.repeat(np.arange(len(parts)), counts)),
        counts=torch.tensor(counts, dtype=torch.float32),
    )
