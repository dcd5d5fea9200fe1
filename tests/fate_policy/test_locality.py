"""What is counted about a trace."""

from __future__ import annotations

import numpy as np
import pytest
from policy_contract import real_trace, tiny

from fate_policy.kernels import simulate
from fate_policy.locality import measure


def test_a_hand_counted_trace() -> None:
    found = measure(tiny([[0, 1], [1, 2], [3, 0]], [0, 1, 2], 4, 3), n_gaps=4)
    assert found.uses.tolist() == [[2, 2, 1, 1]]
    assert found.gap.tolist() == [[4, 1, 1, 0, 0]]
    assert found.depth.tolist() == [[0, 1, 1, 0, 4]]  # 1 had 0 used after it; 0 had 1 and 2, in one op
    assert found.repeated.tolist() == [0.25]


def test_lru_hits_of_every_capacity_are_those_of_a_replay() -> None:
    hits = measure(real_trace()).lru_hits()
    for n_slots in range(4, 33):
        assert np.array_equal(
            hits[:, n_slots], simulate(real_trace().ids, n_slots, n_experts=32).counters.hits
        )


def test_gini_is_zero_for_equal_uses_and_high_for_few() -> None:
    assert measure(tiny([[0], [1], [2], [3]], [0, 1, 2, 3], 4, 1)).gini() == pytest.approx([0])
    assert measure(tiny([[0], [0], [0], [0]], [0, 1, 2, 3], 4, 1)).gini() == pytest.approx([0.75])
