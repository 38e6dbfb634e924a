"""Which sample is the k-th. Run: pytest tests/data/samples/test_mixture.py"""

from collections import Counter

import numpy as np
import pytest

from agent.data.samples.mixture import Mixture, permute


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 16, 17, 63, 64, 65, 100, 1000, 4096, 4097])
def test_permute_is_a_bijection(length):
    for key in (0, 1, 2**64 - 1):
        assert sorted(permute(index, length, key) for index in range(length)) == list(range(length))


def test_permute_looks_random():
    length = 5000
    order = np.array([permute(index, length, 7) for index in range(length)])
    other = np.array([permute(index, length, 8) for index in range(length)])
    assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.05
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
    assert (order == np.arange(length)).sum() < 10  # a random permutation has one fixed point on average
    # neighbours are as far apart as those of a random order: a third of the range
    assert abs(np.abs(np.diff(order)).mean() / length - 1 / 3) < 0.02


def test_all_orders_of_a_small_range_occur():
    orders = Counter(tuple(permute(index, 3, key) for index in range(3)) for key in range(6000))
    assert len(orders) == 6
    assert max(orders.values()) < 1.25 * min(orders.values())


def test_permute_is_constant_cost_and_bounded():
    assert 0 <= permute(10**12, 10**12 + 1, 3) <= 10**12
    with pytest.raises(IndexError, match="range"):
        permute(5, 5, 0)


def test_a_pass_visits_every_frame_once():
    mixture = Mixture([5, 1, 31], None, seed=3)
    everything = {(dataset, place) for dataset, length in enumerate([5, 1, 31]) for place in range(length)}
    passes = [[mixture[k] for k in range(start, start + 37)] for start in (0, 37, 37 * 10**9)]
    assert all(set(visited) == everything for visited in passes)
    assert passes[0] != passes[1]
    assert mixture.frames == 37


def test_order_depends_on_the_seed_alone():
    assert [Mixture([50], None, 1)[k] for k in range(50)] == [Mixture([50], None, 1)[k] for k in range(50)]
    assert [Mixture([50], None, 1)[k] for k in range(50)] != [Mixture([50], None, 2)[k] for k in range(50)]


def test_weights_give_exact_shares_and_complete_passes():
    weights = [0.5, 0.2, 0.3, 1.0]
    mixture = Mixture([100, 7, 1, 3000], weights, seed=0)
    blocks = 2
    visited = [mixture[k] for k in range(4096 * blocks)]
    counts = Counter(dataset for dataset, _ in visited)
    for dataset, weight in enumerate(weights):
        # a quota, not a draw: off by less than one per level of the tree
        assert abs(counts[dataset] - 4096 * blocks * weight / 2.0) <= 2
    seen = Counter(place for dataset, place in visited if dataset == 0)
    assert set(seen) == set(range(100))
    assert max(seen.values()) - min(seen.values()) <= 2  # complete passes, up to the blocks' permutation
    runs = np.diff(np.flatnonzero(np.diff([dataset for dataset, _ in visited])))
    assert len(set(runs.tolist())) > 3  # no fixed rhythm


def test_weighted_streams_are_whole_permutations():
    """Within a data set, the samples of whole blocks are exactly its first passes."""
    mixture = Mixture([64, 64], [1, 1], seed=5)
    places = [place for dataset, place in (mixture[k] for k in range(4096)) if dataset == 1]
    assert len(places) == 2048
    assert set(Counter(places).values()) == {2048 // 64}


def test_far_along_the_stream():
    mixture = Mixture([1000, 10**6], [3, 1], seed=0)
    start = 10**12
    datasets = [mixture[k][0] for k in range(start, start + 2000)]
    assert 0.70 < np.mean(np.equal(datasets, 0)) < 0.80
    with pytest.raises(IndexError):
        mixture[-1]


def test_bad_weights():
    with pytest.raises(ValueError, match="every data set a `weight`, or none"):
        Mixture([1, 2], [1.0, None], 0)
    with pytest.raises(ValueError, match="positive"):
        Mixture([1, 2], [1.0, 0.0], 0)
    with pytest.raises(ValueError, match="too far apart"):
        Mixture([1, 2], [1.0, 1e-12], 0)
    with pytest.raises(ValueError, match="at least one frame"):
        Mixture([1, 0], None, 0)
    assert Mixture([1, 3], [None, None], 0).shares == [0.25, 0.75]


def test_the_stream_of_a_config_stays_what_it_was():
    """Recorded: a run that is resumed with newer code goes on with the same samples."""
    numbers = [*range(6), 10**9, 10**9 + 1]
    pool, weighted = (Mixture([50, 10, 31], weights, seed=3) for weights in (None, [3, 1, 0.5]))
    assert [pool[k] for k in numbers] == [(2, 26), (1, 8), (0, 29), (0, 14), (0, 46), (2, 11), (0, 23), (2, 1)]
    assert [weighted[k] for k in numbers] == [(0, 37), (0, 49), (1, 1), (0, 5), (0, 21), (0, 7), (1, 0), (0, 1)]


@pytest.mark.parametrize("weights", [None, [3, 1, 0.2]], ids=str)
@pytest.mark.parametrize("start", [0, 4000, 10**12 - 5])
def test_counts_are_of_the_very_samples(weights, start):
    mixture = Mixture([1000, 50, 7], weights, seed=3)
    found = Counter(mixture[k][0] for k in range(start, start + 5000))
    assert mixture.counts(start, start + 5000) == [found[dataset] for dataset in range(3)]
    assert mixture.counts(start, start) == [0, 0, 0]
