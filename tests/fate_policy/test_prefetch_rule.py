from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import fate_bind
from fate_policy import prefetch_rule
from fate_policy.rule import LayerTable

PREFETCH_H = Path(fate_bind.__file__).parent / "native" / "prefetch.h"


def filled(n_experts: int, n_slots: int, resident: list[int]) -> LayerTable:
    table = LayerTable(n_experts, n_slots)
    table.place(np.array(resident, np.int32), np.empty(0, np.int32))
    table.use(np.array(resident, np.int32))
    return table


def one_by_one(
    table: LayerTable, chance: NDArray[np.float32], threshold: float, most: int, kept: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """Return the plan as the header makes it: the likeliest absent expert, then its slot, again and again."""
    staying = kept or []
    come: list[int] = []
    go: list[int] = []
    limit = np.float32(threshold)
    n_free = len(table.expert_of) - table.n_resident
    while len(come) < most:
        absent = [
            e for e in range(len(chance)) if table.slot_of[e] < 0 and e not in come and chance[e] >= limit
        ]
        leaving = [
            e
            for e in table.expert_of[: table.n_resident]
            if e not in go and e not in staying and chance[e] < limit
        ]
        if not absent or (len(come) >= n_free and not leaving):
            break
        if len(come) >= n_free:
            bonus = [table.bonus * (use > table.published_at) for use in table.last_use]
            go.append(min(leaving, key=lambda e: (table.score[e] + bonus[e], table.last_use[e], e)))
        come.append(min(absent, key=lambda e: (-chance[e], e)))
    return come, [int(e) for e in go]


def test_the_likeliest_come_into_free_slots_then_into_those_of_victims() -> None:
    table = filled(8, 4, [0, 1, 2])
    chance = np.array([0, 0.9, 0, 0.7, 0.8, 0.8, 0.4, 0], np.float32)
    come, go = prefetch_rule.plan(table, chance, 0.5, 8)
    assert come.tolist() == [4, 5, 3]
    assert go.tolist() == [0, 2]  # 1 is as likely: it stays
    come, go = prefetch_rule.plan(table, chance, 0.5, 1)
    assert (come.tolist(), go.tolist()) == ([4], [])


def test_what_an_earlier_plan_brought_in_stays_whatever_its_chance() -> None:
    table = filled(8, 4, [0, 1, 2, 3])
    come, go = prefetch_rule.plan(table, np.array([0, 0, 0, 0, 0.9, 0.8, 0, 0], np.float32), 0.5, 3)
    assert (come.tolist(), go.tolist()) == ([4, 5], [0, 1])
    table.place(come, go)
    chance = np.array([0.6, 0, 0.9, 0, 0, 0.1, 0.7, 0.8], np.float32)
    assert [part.tolist() for part in prefetch_rule.plan(table, chance, 0.5, 3)] == [[7, 6, 0], [4, 5, 3]]
    # 4 and 5 came for this token, 2 is likely: 3 alone may go
    assert [part.tolist() for part in prefetch_rule.plan(table, chance, 0.5, 3, come)] == [[7], [3]]
    assert [part.tolist() for part in prefetch_rule.plan(table, chance, 0.5, 0, come)] == [[], []]


def test_no_more_come_than_there_are_slots_for() -> None:
    table = filled(6, 2, [0, 1])
    come, go = prefetch_rule.plan(table, np.array([0, 1, 1, 1, 1, 1], np.float32), 0.5, 4)
    assert (come.tolist(), go.tolist()) == ([2], [0])
    come, go = prefetch_rule.plan(table, np.ones(6, np.float32), 0.5, 4)
    assert (len(come), len(go)) == (0, 0)


def test_chances_are_compared_in_single_precision() -> None:
    """As the engine does: 0.7 as a float32 is less than 0.7 as a double."""
    come, _ = prefetch_rule.plan(filled(2, 2, []), np.array([0.7, 0.6999], np.float32), np.float64(0.7), 2)
    assert come.tolist() == [0]


@pytest.mark.parametrize("seed", range(5))
def test_random_tables_agree_with_one_choice_after_another(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_moved = n_stayed = 0
    for _ in range(200):
        n_experts = int(rng.integers(2, 24))
        n_slots = int(rng.integers(1, n_experts + 1))
        resident = rng.permutation(n_experts)[: rng.integers(0, n_slots + 1)]
        table = filled(n_experts, n_slots, resident.tolist())
        table.publish(
            rng.integers(0, 3, n_experts).astype(np.float32),
            np.float32(rng.integers(0, 3)),
            int(rng.integers(0, table.clock + 1)),
        )
        chance = (rng.integers(0, 5, n_experts) / 4).astype(np.float32)
        threshold, most = float(rng.choice([0, 0.25, 0.3, 1])), int(rng.integers(0, 17))
        come, go = prefetch_rule.plan(table, chance, threshold, most)
        assert (come.tolist(), go.tolist()) == one_by_one(table, chance, threshold, most)
        n_moved += len(go)
        table.place(come, go)
        other = (rng.integers(0, 5, n_experts) / 4).astype(np.float32)
        again = prefetch_rule.plan(table, other, threshold, most - len(come), come)
        expected = one_by_one(table, other, threshold, most - len(come), come.tolist())
        assert (again[0].tolist(), again[1].tolist()) == expected
        n_stayed += expected != one_by_one(table, other, threshold, most - len(come))
    assert n_moved > 30
    assert n_stayed > 5


@pytest.mark.parametrize(
    ("wanted", "n_slots", "k", "room"),
    [(8, 4, 4, 0), (8, 5, 4, 1), (8, 64, 4, 8), (99, 64, 4, 16), (8, 3, 4, 0)],
)
def test_the_tokens_own_experts_find_room(wanted: int, n_slots: int, k: int, room: int) -> None:
    assert prefetch_rule.room(wanted, n_slots, k) == room


def test_the_header_has_the_same_limits() -> None:
    header = PREFETCH_H.read_text(encoding="utf-8")
    most = re.search(r"FATE_PREFETCH_MAX += (\d+);", header)
    threshold = re.search(r"FATE_PREFETCH_THRESHOLD += ([0-9.]+)f;", header)
    assert most is not None
    assert threshold is not None
    assert int(most[1]) == prefetch_rule.MOST
    assert float(threshold[1]) == prefetch_rule.Prefetch.threshold
