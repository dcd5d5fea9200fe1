"""How much of what is used is named inside the token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from policy_contract import (
    Predictions,
    decoded_trace,
    geometry,
    real_trace,
    synthetic_trace,
    telling,
    with_predictions,
)

from fate_policy.base import NOT_RUN, POOL, Policy, Step
from fate_policy.recall import COLUMNS, Named, Recall, measure
from fate_policy.replay import replay
from fate_policy.trace import Trace

SHAPE = geometry([6] * 3, [2] * 3, [3] * 3)


def told() -> Trace:
    """Return five tokens of three layers with k = 2 and 3 slots; the last layer does not run for the last."""
    ids = np.array(
        [
            [[0, 1], [0, 1], [0, 1]],
            [[0, 1], [1, 2], [2, 3]],  # absent: 2; 2 and 3
            [[0, 1], [0, 3], [4, 0]],  # absent: 3; 4, as 1 went for 2
            [[0, 1], [0, 3], [4, 0]],
            [[0, 1], [0, 3], [-1, -1]],
        ],
        np.int32,
    )
    named: Predictions = [
        (0, 1, 1, [2, 3, 4, 5, 0], [1, 1, 1, 1, 1]),  # 0 is the fifth: too late for 2 k
        (0, 2, 2, [0, 5], [0.5, 0.5]),
        (0, 2, 1, [5, 4, 0, 1], [0.5, 0.5, 0.5, 0.5]),
        (1, 1, 1, [1], [0.5]),  # of the next layer it names none, and that counts
        (2, 1, 1, [3, 1, 0], [0.5, 0.5, 0.5]),
        (2, 2, 2, [4, 1, 2, 3], [0.5, 0.5, 0.5, 0.5]),
        (2, 2, 1, [0, 3, 4], [0.5, 0.5, 0.5]),
        (3, 0, 1, [0, 1], [1, 1]),  # of the first layer nobody can tell: not counted, nor the token
        (3, 1, 2, [0, 3], [1, 1]),
        (4, 1, 1, [0, 3], [1, 1]),
    ]
    return telling(decoded_trace(ids, SHAPE), named)


def test_hand_counted() -> None:
    nearest = Recall(
        horizon=1,
        used=Named(
            n=3 * 4 + 2, at_k=0 + 0 + 1 + 0 + 1 + 1 + 2, at_2k=0 + 2 + 1 + 0 + 2 + 2 + 2, token_before=3
        ),
        absent=Named(n=2 + 2 + 1 + 2 + 1 + 1, at_k=1, at_2k=2 + 1 + 1, token_before=0),
    )
    farther = Recall(
        horizon=2,
        used=Named(n=2 * 2, at_k=1 + 1, at_2k=1 + 1, token_before=0),
        absent=Named(n=2 + 1, at_k=1 + 1, at_2k=1 + 1, token_before=0),
    )
    assert measure(told()) == [nearest, farther]


def test_rows_hold_counts_and_shares() -> None:
    rows = [one.as_dict() for one in measure(told())]
    assert [tuple(row) for row in rows] == [COLUMNS] * 2
    assert list(rows[1].values()) == [2, 4, 0.5, 0.5, 0, 3, 2 / 3, 2 / 3, 0]


def test_without_slots_nothing_is_known_of_absent_ones() -> None:
    routed = told()
    unknown = replace(routed, meta={**routed.meta, "n_slots": None})
    assert [one.used for one in measure(unknown)] == [one.used for one in measure(routed)]
    assert [one.absent for one in measure(unknown)] == [None, None]
    assert list(measure(unknown)[0].as_dict().values())[-4:] == [None] * 4


def test_what_was_not_recorded_is_not_measured() -> None:
    assert measure(real_trace()) == []
    routed = telling(decoded_trace(told().experts(), SHAPE), [])
    assert measure(routed) == []
    nothing = Recall(1, Named(0, 0, 0, 0), Named(0, 0, 0, 0))
    assert list(nothing.as_dict().values()) == [1, 0, None, None, None, 0, None, None, None]


@pytest.mark.parametrize("horizons", [(1,), (2, 1), (5, 2)])
def test_batches_prompts_and_unequal_layers_against_a_replay(horizons: tuple[int, ...]) -> None:
    """Single tokens have predictions, and miss what is absent: LRU's replay tells which uses these are."""
    routed = with_predictions(synthetic_trace(), horizons)
    hits: list[np.ndarray] = []

    class Spy(Policy):
        def observe(self, step: Step) -> None:
            hits.extend(step.hits)

    replay(routed, Spy())
    expected = []
    assert routed.ahead_ids is not None
    for at, horizon in reversed(list(enumerate(horizons))):
        counts = np.zeros((2, 4), int)
        for token in range(routed.n_tokens):
            rows = routed.ahead_ids[token, :, at].tolist()
            if max((e for row in rows[horizon:] for e in row), default=-1) < 0:
                continue
            for layer in range(horizon, routed.n_layers):
                k = routed.meta["k"][layer]
                assert routed.path[token, layer] == POOL
                before = (
                    [] if routed.path[token - 1, layer] == NOT_RUN else routed.experts()[token - 1, layer]
                )
                for rank, expert in enumerate(routed.experts()[token, layer].tolist()):
                    if expert >= 0:
                        named = expert in rows[layer][:k], expert in rows[layer][: 2 * k], expert in before
                        counts[0] += [1, *named]
                        counts[1] += np.array([1, *named]) * (1 - int(hits[token][layer, rank]))
        expected.append(Recall(horizon, *(Named(*row) for row in counts.tolist())))
    assert measure(routed) == expected
    if horizons == (2, 1):
        assert min(expected[0].absent.at_k, expected[1].absent.n) > 20  # type: ignore[union-attr]
