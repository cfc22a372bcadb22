"""Any batch size from the captured ones."""

import itertools

import pytest

from msdd_fast.engine.batching import Chunk, assumed_cost, split_by_cost, split_evenly


def brute_force(count, cost):
    """Cheapest total of any multiset of sizes that holds ``count`` images."""
    sizes = sorted(cost)
    best = float("inf")
    for n in range(1, count // sizes[0] + 2):
        for combination in itertools.combinations_with_replacement(sizes, n):
            if sum(combination) >= count:
                best = min(best, sum(cost[s] for s in combination))
    return best


@pytest.mark.parametrize("cost", [{1: 1.0, 8: 3.0, 64: 12.0}, {2: 1.0, 3: 1.2}, {4: 1.0}])
@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_plan_is_the_cheapest_and_covers_everything(count, cost):
    chunks = split_by_cost(count, cost)
    assert sum(c.images for c in chunks) == count
    assert all(0 < c.images <= c.size for c in chunks)
    assert all(c.images == c.size for c in chunks[:-1])  # only the last is padded
    assert sum(cost[c.size] for c in chunks) == pytest.approx(brute_force(count, cost))


def test_the_assumed_cost_splits_as_one_would():
    cost = assumed_cost((1, 8, 64))
    assert split_by_cost(1, cost) == [Chunk(1, 1)]
    assert split_by_cost(9, cost) == [Chunk(8, 8), Chunk(1, 1)]
    assert split_by_cost(65, cost) == [Chunk(64, 64), Chunk(1, 1)]
    assert split_by_cost(6, cost) == [Chunk(8, 6)]
    assert split_by_cost(0, cost) == []


def test_even_chunks():
    assert split_evenly(9, 8) == [Chunk(4, 4), Chunk(5, 5)]
    assert split_evenly(8, 8) == [Chunk(8, 8)]
    assert split_evenly(0, 8) == []
