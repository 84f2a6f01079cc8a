import numpy as np

from orpo_cli.data.order import block_order, permutation, quotas, turns


def test_a_permutation_is_one_and_depends_on_every_part_of_its_key():
    orders = [permutation(1000, *key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0), (-1, 0, 0)]]
    for order in orders:
        assert sorted(order) == list(range(1000))
    assert len({order.tobytes() for order in orders}) == len(orders)
    assert np.array_equal(permutation(1000, 1, 2, 3), permutation(1000, 1, 2, 3))


def test_the_order_is_frozen():
    """A run must go on in the same order under any later version: these numbers never change."""
    assert permutation(8, 42, 0, 0).tolist() == FROZEN


FROZEN = [2, 5, 7, 1, 4, 6, 3, 0]


def test_every_place_is_as_likely_as_another():
    places = np.array([permutation(10, seed) for seed in range(4000)])
    counts = np.stack([(places == row).sum(0) for row in range(10)])
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert chi2 < 81 + 4 * np.sqrt(2 * 81)  # 81 degrees of freedom, four standard deviations


def test_no_shuffle_keeps_the_source_order():
    assert block_order(5, seed=1, epoch=3, block=2, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_quotas_are_whole_numbers_as_near_to_the_weights_as_can_be():
    assert quotas([3, 40, 7], None) == [3, 40, 7]
    assert quotas([5, 5], [1, 1]) == [5, 5]
    assert quotas([4, 3], [1, 1]) == [4, 3]  # 3.5 each: the first source first
    assert quotas([10, 10, 10], [0.1, 0.2, 0.7]) == [3, 6, 21]
    generator = np.random.default_rng(0)
    for _ in range(200):
        sizes = generator.integers(1, 1000, 4).tolist()
        weights = generator.uniform(0.01, 10, 4).tolist()
        exact = [sum(sizes) * weight / sum(weights) for weight in weights]
        numbers = quotas(sizes, weights)
        assert sum(numbers) == sum(sizes)
        assert all(abs(number - share) < 1 for number, share in zip(numbers, exact, strict=True))


def test_turns_follow_one_another_without_gap_and_evenly():
    for quota, blocks in [(10, 3), (2, 5), (0, 2), (8192, 7)]:
        parts = [turns(quota, epoch=e, block=b, blocks=blocks) for e in range(3) for b in range(blocks)]
        assert [i for part in parts for i in part] == list(range(3 * quota))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
