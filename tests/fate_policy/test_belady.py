from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from policy_contract import SYNTHETIC, PolicyContract, golden, random_ids, real_trace, synthetic_trace, tiny

from fate_policy.base import Policy
from fate_policy.belady import Belady
from fate_policy.driver import Driver
from fate_policy.errors import PolicyConfigError
from fate_policy.replay import replay


class TestBelady(PolicyContract):
    name = "belady"
    test_real_model_fits_the_time_budget = None  # it never runs on a model

    def foresee(self, policy: Policy) -> None:
        assert isinstance(policy, Belady)
        policy.foresee(random_ids(60, SYNTHETIC, 5), np.arange(60) // 3)


def test_golden_counts() -> None:
    assert golden(replay(synthetic_trace(), "belady")) == (2377, 695, 736, 713, 389)
    assert golden(replay(real_trace(), "belady", n_slots=8)) == (30209, 8191, 8191, 7999, 4245)


def test_it_does_not_drive_a_model() -> None:
    with pytest.raises(PolicyConfigError, match="works in replay only"):
        Driver(Belady(), SYNTHETIC, "callback")


def test_ties_go_by_expert_id() -> None:
    """After 3 nothing is used again: 0 goes first."""
    trace = tiny([[2], [1], [0], [3], [4]], [0, 1, 2, 3, 4], 5, 3)
    moves = []

    class Spy(Belady):
        def drop(self, layer: int, experts: np.ndarray) -> None:
            moves.extend(experts.tolist())

    replay(trace, Spy())
    assert moves == [0, 1]


def fewest_fills(steps: list[set[int]], n_slots: int) -> int:
    """Try every eviction."""

    @cache
    def best(number: int, pool: frozenset[int]) -> int:
        if number == len(steps):
            return 0
        needed = steps[number]
        absent = needed - pool
        n_victims = max(0, len(pool) + len(absent) - n_slots)
        ways = combinations(sorted(pool - needed), n_victims)
        return len(absent) + min(best(number + 1, (pool - set(way)) | needed) for way in ways)

    return best(0, frozenset())


@pytest.mark.parametrize("seed", range(20))
def test_no_sequence_of_evictions_fills_less(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k, n_slots = int(rng.integers(1, 3)), int(rng.integers(3, 5))
    ids = [rng.permutation(6)[:k].tolist() for _ in range(14)]
    sizes = rng.integers(1, 3 if 2 * k <= n_slots else 2, 14)
    steps = np.repeat(np.arange(14), sizes)[:14].tolist()
    needs = [
        {e for row, s in zip(ids, steps, strict=True) if s == step for e in row}
        for step in sorted(set(steps))
    ]
    assert replay(tiny(ids, steps, 6, n_slots), "belady").fills.sum() == fewest_fills(needs, n_slots)


@pytest.mark.parametrize("seed", range(10))
def test_no_sequence_of_evictions_fills_less_with_seeding(seed: int) -> None:
    """A step past the pool needs the experts of its last rows only, as many of them as fit."""
    rng = np.random.default_rng(seed)
    ids = [rng.permutation(6)[:1].tolist() for _ in range(24)]
    sizes = rng.choice([1, 1, 1, 5], 24)
    steps = np.repeat(np.arange(24), sizes)[:24].tolist()
    rows = [[row[0] for row, s in zip(ids, steps, strict=True) if s == step] for step in sorted(set(steps))]
    needs = [next(last for i in range(len(step)) if len(last := set(step[i:])) <= 3) for step in rows]
    assert replay(tiny(ids, steps, 6, 3), "belady").fills.sum() == fewest_fills(needs, 3)
