"""Slots per layer for a budget."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from policy_contract import real_trace

from fate_policy import config
from fate_policy.compare import make, replay_policy
from fate_policy.errors import PolicyConfigError
from fate_policy.plan import allocate, curve, gain, plan


def test_a_plan_hits_more_than_equal_slots_for_no_more_bytes() -> None:
    solved = plan([real_trace()], "50%", 1000)
    assert solved.bytes <= solved.budget == 24 * 16 * 1000
    (row,) = gain(solved, [("real", real_trace())], ["lru"])
    assert row["planned"] > row["equal"] == replay_policy(real_trace(), make("lru"), 16).hit_rate
    hits = curve(real_trace())[np.arange(24), solved.slots].sum()
    assert row["planned"] == hits / (400 * 24 * 4)


def test_the_best_allocation_is_found_where_curves_are_concave() -> None:
    rng = np.random.default_rng(1)
    steps = -np.sort(-rng.integers(0, 100, (3, 6)), axis=1)
    hits = np.concatenate((np.zeros((3, 1), int), steps.cumsum(axis=1)), axis=1)
    least, most, size = np.ones(3, int), np.full(3, 6), np.ones(3, int)
    for budget in range(3, 19):
        best = max(
            sum(hits[layer, c] for layer, c in enumerate(slots))
            for slots in product(range(1, 7), repeat=3)
            if sum(slots) <= budget
        )
        found = allocate(hits, least, most, size, budget)
        assert (found.sum(), hits[np.arange(3), found].sum()) == (budget, best)


def test_a_jump_over_a_flat_stretch_is_taken() -> None:
    hits = np.array([[0, 0, 0, 0, 90], [0, 10, 20, 30, 40]])
    found = allocate(hits, np.zeros(2, int), np.full(2, 4), np.ones(2, int), 5)
    assert found.tolist() == [4, 1]


def test_bytes_of_layers_count() -> None:
    hits = np.array([[0, 10, 20], [0, 11, 22]])
    found = allocate(hits, np.zeros(2, int), np.full(2, 2), np.array([1, 3]), 4)
    assert found.tolist() == [2, 0]


def test_a_curve_of_another_policy_is_its_replays() -> None:
    part = real_trace().slice(0, 60)
    hits = curve(part, "frequency")
    assert np.array_equal(hits[:, 9], replay_policy(part, make("frequency"), 9).counters.hits)
    assert not hits[:, :4].any()


def test_the_yaml_is_what_the_engine_takes(tmp_path: Path) -> None:
    solved = plan([real_trace()], "50%", 1000)
    (tmp_path / "plan.yaml").write_text(solved.yaml("frequency", ["real"]), encoding="utf-8")
    chosen = config.load(tmp_path / "plan.yaml")
    slots = chosen.slots.resolve([32] * 24, [4] * 24, [1000] * 24)
    assert (chosen.policy, slots.tolist()) == ("frequency", solved.slots.tolist())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("8", "budget: '8' is not allowed; expected memory"),
        ("5%", "the minimum is 96000 bytes"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(budget: str, message: str) -> None:
    with pytest.raises(PolicyConfigError, match=message):
        plan([real_trace()], budget, 1000)
