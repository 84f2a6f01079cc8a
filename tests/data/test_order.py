import numpy as np

from orpo_cli.data.order import block_order, permutation


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
