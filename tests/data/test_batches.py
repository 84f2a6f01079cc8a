"""The flat batch against a loop over single tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from orpo_cli.data.batches import (
    cut_by_padded_tokens,
    cut_by_tokens,
    cut_into_rounds,
    flat_batch,
    flat_tokens,
    nll_positions,
    shared_length,
)
from orpo_cli.data.tokenize import TokenizedPair
from tests.tiny import random_pairs

NLL_TOKENS = ["response", "assistant", "all"]


def pair_of(chosen: list[int], rejected: list[int], chosen_start: int = 1, rejected_start: int = 1) -> TokenizedPair:
    ids = [np.array(side, dtype=np.int32) for side in (chosen, rejected)]
    return TokenizedPair(0, *ids, chosen_start, rejected_start, None)


def with_earlier_turns(pairs: list[TokenizedPair], seed: int) -> list[TokenizedPair]:
    """The pairs with some prompt tokens, the first one too, marked as an assistant's."""
    rng = np.random.default_rng(seed)
    return [
        replace(p, assistant_mask=p.assistant_mask | (rng.random(len(p.chosen_ids)) < 0.4)) if rng.random() < 0.7 else p
        for p in pairs
    ]


def naive_shared(pair: TokenizedPair) -> int:
    n = 0
    while n < min(len(pair.chosen_ids), len(pair.rejected_ids)) - 1 and pair.chosen_ids[n] == pair.rejected_ids[n]:
        n += 1
    return n


def naive_nll(pair: TokenizedPair, nll_tokens: str) -> list[int]:
    """Places in `chosen_ids` that the NLL is over; nothing predicts the first token."""
    wanted = {
        "response": lambda t: t >= pair.chosen_start,
        "assistant": lambda t: bool(pair.assistant_mask[t]),
        "all": lambda t: True,
    }[nll_tokens]
    return [t for t in range(1, len(pair.chosen_ids)) if wanted(t)]


@pytest.mark.parametrize("nll_tokens", NLL_TOKENS)
@pytest.mark.parametrize("seed", range(5))
def test_the_flat_batch_against_a_loop_over_tokens(nll_tokens, seed):
    pairs = with_earlier_turns(random_pairs(7, seed=seed), seed)
    batch = flat_batch(pairs, nll_tokens)

    ids: list[int] = []
    positions: list[int] = []
    # For each pair and side, where in the flat row each of the side's tokens stands.
    places: list[dict[str, list[int]]] = []
    for pair, segment in zip(pairs, batch.segments, strict=True):
        shared = naive_shared(pair)
        assert (segment.start, segment.shared) == (len(ids), shared)
        assert segment.chosen == len(pair.chosen_ids) - shared
        assert segment.rejected == len(pair.rejected_ids) - shared
        place: dict[str, list[int]] = {"chosen": [], "rejected": []}
        for t, token in enumerate(pair.chosen_ids.tolist()):
            place["chosen"].append(len(ids))
            ids.append(token)
            positions.append(t)
        for t, token in enumerate(pair.rejected_ids.tolist()):
            if t < shared:
                place["rejected"].append(place["chosen"][t])
                continue
            place["rejected"].append(len(ids))
            ids.append(token)
            positions.append(t)
        assert segment.stop == len(ids)
        places.append(place)
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.tokens == len(ids) == sum(map(flat_tokens, pairs))

    uses = {"chosen": batch.chosen, "rejected": batch.rejected, "nll": batch.nll}
    for name, use in uses.items():
        expected = []  # (pair, where it is predicted, what is predicted)
        for i, (pair, place) in enumerate(zip(pairs, places, strict=True)):
            side = "rejected" if name == "rejected" else "chosen"
            side_ids = getattr(pair, f"{side}_ids")
            wanted = (
                naive_nll(pair, nll_tokens) if name == "nll" else range(getattr(pair, f"{side}_start"), len(side_ids))
            )
            expected += [(i, place[side][t - 1], int(side_ids[t])) for t in wanted]
        found = list(
            zip(use.pair.tolist(), batch.rows[use.index].tolist(), batch.targets[use.index].tolist(), strict=True)
        )
        assert found == expected
        assert use.counts.tolist() == [sum(i == p for p, *_ in expected) for i in range(len(pairs))]

    # Each prediction is computed once, and none that nobody uses.
    predictions = list(zip(batch.rows.tolist(), batch.targets.tolist(), strict=True))
    assert len(set(predictions)) == len(predictions)
    used = torch.cat([use.index for use in uses.values()])
    assert sorted(set(used.tolist())) == list(range(len(predictions)))


@pytest.mark.parametrize("nll_tokens", NLL_TOKENS)
def test_nll_positions(nll_tokens):
    for pair in with_earlier_turns(random_pairs(12, seed=9), 9):
        assert nll_positions(pair, nll_tokens).tolist() == naive_nll(pair, nll_tokens)


def test_sums_and_means_over_a_pairs_predictions():
    pairs = random_pairs(5, seed=3)
    batch = flat_batch(pairs, "response")
    values = torch.randn(len(batch.rows), generator=torch.Generator().manual_seed(0))
    for use in (batch.chosen, batch.rejected, batch.nll):
        by_pair = [[values[m] for m, p in zip(use.index, use.pair, strict=True) if p == i] for i in range(5)]
        torch.testing.assert_close(use.sums(values), torch.stack([torch.stack(v).sum() for v in by_pair]))
        torch.testing.assert_close(use.means(values), torch.stack([torch.stack(v).mean() for v in by_pair]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ([5, 6, 7, 2], [5, 6, 8, 2], 2),
        ([5, 6, 2], [5, 6, 7, 8, 2], 2),
        ([5, 6, 7], [5, 6, 7, 8, 9], 2),  # chosen is a prefix of rejected: one token stays its own
        ([5, 6, 7, 8, 9], [5, 6, 7], 2),
        ([5, 6], [9, 6], 0),  # nothing in common
        ([5, 2], [5, 3], 1),
    ],
)
def test_shared_length(chosen, rejected, shared):
    pair = pair_of(chosen, rejected)
    assert shared_length(pair) == naive_shared(pair) == shared
    assert flat_tokens(pair) == len(chosen) + len(rejected) - shared


def test_a_side_that_begins_the_other_predicts_all_its_tokens():
    batch = flat_batch([pair_of([5, 6, 7], [5, 6, 7, 8, 9])], "response")
    assert batch.input_ids.tolist() == [5, 6, 7, 7, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3, 4]
    rejected = [(int(batch.rows[m]), int(batch.targets[m])) for m in batch.rejected.index]
    assert rejected == [(0, 6), (1, 7), (3, 8), (4, 9)]


def test_sides_with_nothing_in_common_stand_apart():
    batch = flat_batch([pair_of([5, 6], [9, 6])], "response")
    assert batch.position_ids.tolist() == [0, 1, 0, 1]
    assert [(int(batch.rows[m]), int(batch.targets[m])) for m in batch.rejected.index] == [(2, 6)]


@pytest.mark.parametrize("budget", [1, 40, 64, 100, 10_000])
def test_micro_batches_hold_every_pair_once_within_the_budget(budget):
    pairs = random_pairs(60, seed=2)
    bins = cut_by_tokens(pairs, budget)
    assert sorted(p.index for micro in bins for p in micro) == list(range(60))
    for micro in bins:
        assert len(micro) == 1 or sum(map(flat_tokens, micro)) <= budget
    again = cut_by_tokens(pairs, budget)
    assert [[p.index for p in micro] for micro in again] == [[p.index for p in micro] for micro in bins]
    # No two micro-batches could have been one.
    totals = sorted(sum(map(flat_tokens, micro)) for micro in bins)
    assert len(bins) == 1 or totals[0] + totals[1] > budget


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("budget", [6, 100, 200, 400, 100_000])
def test_rounds_hold_every_pair_once_within_the_budget_and_are_even(budget, lanes):
    pairs = random_pairs(60, seed=2)
    rounds = cut_into_rounds(pairs, budget, lanes)
    assert sorted(p.index for parts in rounds for part in parts for p in part) == list(range(60))
    sizes = [[sum(map(flat_tokens, part)) for part in parts] for parts in rounds]
    alone = [parts for parts in rounds if max(map(flat_tokens, parts[0])) > budget // lanes]
    assert rounds[: len(alone)] == alone  # they come first
    for parts, of_parts in zip(rounds, sizes, strict=True):
        if parts in alone:
            assert len(parts) == 1
            assert len(parts[0]) == 1 or of_parts[0] <= budget
        else:
            assert len(parts) <= lanes
            assert max(of_parts) <= budget // lanes
    shared = sizes[len(alone) :]
    if budget >= 400:
        assert not alone
        assert all(len(parts) == lanes for parts in shared) or [len(parts) for parts in shared] == [1]
        assert max(max(parts) - min(parts) for parts in shared) <= max(map(flat_tokens, pairs)) / 2
    if budget == 100_000:
        assert len(rounds) == len(rounds[0]) == 1  # left whole
    again = cut_into_rounds(pairs, budget, lanes)
    indices = [[[p.index for p in part] for part in parts] for parts in rounds]
    assert [[[p.index for p in part] for part in parts] for parts in again] == indices


def test_no_pairs_make_no_micro_batch():
    assert cut_by_tokens([], 100) == []
    assert cut_into_rounds([], 100, 2) == []


def test_what_a_batch_means_does_not_depend_on_its_neighbours():
    pairs = random_pairs(4, seed=6)
    together = flat_batch(pairs, "all")
    for i, pair in enumerate(pairs):
        alone, segment = flat_batch([pair], "all"), together.segments[i]
        assert together.input_ids[segment.start : segment.stop].tolist() == alone.input_ids.tolist()
        mine = together.rejected.index[together.rejected.pair == i]
        assert (together.rows[mine] - segment.start).tolist() == alone.rows[alone.rejected.index].tolist()


def test_padded_batches_keep_to_the_budget_with_their_padding():
    pairs = random_pairs(40, seed=4)
    batches = cut_by_padded_tokens(pairs, 150)
    assert sorted(pair.index for batch in batches for pair in batch) == list(range(40))
    for batch in batches:
        longest = max(max(len(p.chosen_ids), len(p.rejected_ids)) for p in batch)
        assert len(batch) == 1 or 2 * len(batch) * longest <= 150
    assert len(batches) < 40
