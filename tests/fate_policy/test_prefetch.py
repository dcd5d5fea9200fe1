from __future__ import annotations

import numpy as np
import pytest
from policy_contract import SYNTHETIC, real_trace

from fate_policy.errors import FateError, PolicyConfigError
from fate_policy.kernels import Routing, simulate_scores
from fate_policy.prefetch import simulate_prefetch


def routing(ids: list[list[int]], n_experts: int) -> Routing:
    return Routing.of_ids(np.array(ids, np.int16)[:, None], n_experts=n_experts)


def test_without_a_budget_it_is_the_plain_replay() -> None:
    routed = Routing.of_trace(real_trace())
    keep = np.random.default_rng(0).random((400, 24, 32), np.float32)
    none = simulate_prefetch(routed, 8, keep, keep, per_token=0)
    assert none.misses == simulate_scores(routed, 8, keep).counters.misses.sum()
    assert (none.prefetches, none.bytes) == (0, none.misses)


def test_useful_and_wasted_ones_are_told_apart() -> None:
    """Slots 2, one expert a token: 0 1 2 0. Expert 2 is prefetched in time, 3 and then 1 in vain."""
    now = np.zeros((4, 1, 4), np.float32)
    now[2, 0, 2] = 0.9
    now[3, 0, 3] = 0.8
    keep = np.zeros((4, 1, 4), np.float32)
    keep[:, 0, 0] = 0.95
    counted = simulate_prefetch(routing([[0], [1], [2], [0]], 4), 2, now, keep, threshold=0.5, expert_bytes=7)
    assert (counted.routed, counted.misses, counted.prefetches) == (4, 2, 2)
    assert (counted.useful, counted.evicted_unused, counted.unused_at_end) == (1, 0, 1)
    assert counted.bytes == 7 * 4
    assert counted.hit_rate == 0.5
    assert counted.precision == 0.5


def test_evicted_before_use_is_wasted() -> None:
    now = np.zeros((4, 1, 4), np.float32)
    now[2, 0, 3] = 0.9
    keep = np.zeros((4, 1, 4), np.float32)
    keep[:, 0, :2] = 0.5
    counted = simulate_prefetch(routing([[0], [1], [0], [2]], 4), 2, now, keep)
    assert (counted.prefetches, counted.useful, counted.evicted_unused) == (1, 0, 1)


def test_a_resident_worth_more_stays() -> None:
    now = np.zeros((3, 1, 4), np.float32)
    now[2, 0] = 0.9, 0.9, 0.8, 0
    keep = np.zeros((3, 1, 4), np.float32)
    assert simulate_prefetch(routing([[0], [1], [0]], 4), 2, now, keep).prefetches == 0


def test_budgets_hold() -> None:
    routed = Routing.of_trace(real_trace())
    now = np.random.default_rng(0).random((400, 24, 32), np.float32)
    keep = np.zeros_like(now)
    for limit in (1, 5, 12):
        spent = simulate_prefetch(routed, 8, now, keep, per_token=limit)
        assert 0 < spent.prefetches <= limit * 400
        assert (
            simulate_prefetch(routed, 8, now, keep, bytes_per_token=limit * 10, expert_bytes=10).prefetches
            == spent.prefetches
        )
        carried = simulate_prefetch(routed, 8, now, keep, threshold=0.97, per_token=limit, carry_tokens=50)
        assert carried.prefetches <= limit * 400


def test_every_prefetch_is_accounted_for() -> None:
    routed = Routing.of_trace(real_trace())
    now = np.random.default_rng(0).random((400, 24, 32), np.float32)
    spent = simulate_prefetch(routed, 8, now, now, threshold=0.8)
    assert spent.prefetches == spent.useful + spent.evicted_unused + spent.unused_at_end
    assert spent.bytes == spent.misses + spent.prefetches


def test_wrong_input() -> None:
    routed = Routing.of_trace(real_trace())
    table = np.zeros((400, 24, 32), np.float32)
    with pytest.raises(FateError, match="have shapes"):
        simulate_prefetch(routed, 8, table[:5], table)
    with pytest.raises(PolicyConfigError, match="per_token: -1"):
        simulate_prefetch(routed, 8, table, table, per_token=-1)
    assert SYNTHETIC.n_layers == 3
