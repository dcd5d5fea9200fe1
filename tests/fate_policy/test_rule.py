"""The rule against a second, slow one, written from its description alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from policy_contract import SYNTHETIC, geometry, synthetic_trace

from fate_policy.base import NOT_RUN, POOL, STAGED, Geometry, History, Policy, Step
from fate_policy.replay import replay
from fate_policy.rule import SEED_PAIRS, LayerTable, first_seed_row, pick_victims
from fate_policy.trace import Trace

RULE_H = Path(__file__).parents[2] / "fate_bind" / "native" / "rule.h"


def seeding(rows: list[list[int]], k: int, n_slots: int) -> list[list[int]]:
    """Return the last rows of an op that seed: every number of them is tried."""
    return next(
        rows[len(rows) - n :]
        for n in range(len(rows), -1, -1)
        if len({expert for row in rows[len(rows) - n :] for expert in row}) <= n_slots
        and n * k <= max(SEED_PAIRS, n_slots)
    )


class NaiveLayer:
    """One use after the other, with dictionaries."""

    def __init__(self, n_experts: int, n_slots: int) -> None:
        self.slots: list[int | None] = [None] * n_slots
        self.last_use = dict.fromkeys(range(n_experts), 0)
        self.score = dict.fromkeys(range(n_experts), np.float32(0))
        self.bonus = np.float32(0)
        self.clock = self.published_at = 0
        self.fills: list[int] = []
        self.evictions: list[int] = []

    def key(self, expert: int) -> np.float32:
        used = self.last_use[expert] > self.published_at
        return self.score[expert] + self.bonus if used else self.score[expert]

    def fill(self, expert: int, needed: set[int]) -> None:
        if None in self.slots:
            slot = self.slots.index(None)
        else:
            residents = [e for e in self.slots if e is not None and e not in needed]
            victim = min(residents, key=lambda e: (self.key(e), self.last_use[e], e))
            self.evictions.append(victim)
            slot = self.slots.index(victim)
        self.slots[slot] = expert
        self.fills.append(expert)

    def use(self, expert: int) -> None:
        self.clock += 1
        self.last_use[expert] = self.clock


def naive_counts(
    trace: Trace,
    shape: Geometry,
    tables: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
    sync: bool,
) -> dict[str, list[int]]:
    """Count as the contract says; `tables[m]` is what the m-th publication puts in force."""
    layers = [NaiveLayer(n, s) for n, s in zip(shape.n_experts.tolist(), shape.n_slots.tolist(), strict=True)]
    names = ("routed", "hits", "misses", "staged", "bypassed", "seed_fills", "rows", "rows_all_resident")
    counts = {name: [0] * len(layers) for name in names}
    bounds = trace.step_bounds().tolist()
    published = 0
    for number, (start, stop) in enumerate(pairwise(bounds)):
        to_seed: list[tuple[int, list[list[int]]]] = []
        began = [layer.clock for layer in layers]
        for index, layer in enumerate(layers):
            rows, kind = [], NOT_RUN
            for token in range(start, stop):
                if trace.path[token, index] != NOT_RUN:
                    kind = int(trace.path[token, index])
                    rows.append([int(e) for e in trace.ids[token, index] if e != 255])
            needed = {e for row in rows for e in row}
            for row in rows:
                whole = True
                for expert in reversed(row):
                    counts["routed"][index] += 1
                    if kind == POOL:
                        if expert in layer.slots:
                            counts["hits"][index] += 1
                        else:
                            counts["misses"][index] += 1
                            whole = False
                            layer.fill(expert, needed)
                    else:
                        counts["staged" if kind == STAGED else "bypassed"][index] += 1
                    layer.use(expert)
                counts["rows"][index] += kind == POOL
                counts["rows_all_resident"][index] += kind == POOL and whole
            if kind > POOL:
                to_seed.append((index, seeding(rows, int(shape.k[index]), int(shape.n_slots[index]))))
        for index, rows in to_seed:
            for expert in [e for row in rows for e in reversed(row)]:
                if expert not in layers[index].slots:
                    layers[index].fill(expert, {e for row in rows for e in row})
                    counts["seed_fills"][index] += 1
        if sync or number:
            scores, bonus = tables[published]
            published += 1
            for index, layer in enumerate(layers):
                layer.score = {e: scores[index, e] for e in layer.score}
                layer.bonus = bonus[index]
                layer.published_at = layer.clock if sync else began[index]
    counts["fills"] = [len(layer.fills) for layer in layers]
    counts["evictions"] = [len(layer.evictions) for layer in layers]
    return counts


class Scripted(Policy):
    """Publish one prepared table after the other."""

    def __init__(self, tables: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> None:
        self.tables = tables
        self.fills: list[list[int]] = []

    def observe(self, step: Step) -> None:
        self.fills += step.fills.tolist()

    def scores(self, history: History) -> NDArray[np.float32]:
        return self.tables[history.publications][0]

    def bonus(self, history: History) -> NDArray[np.float32]:
        return self.tables[history.publications][1]


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_replay_counts_as_the_slow_rule(seed: int, sync: bool) -> None:
    rng = np.random.default_rng(seed)
    routed = synthetic_trace(200, seed)
    if seed % 2:
        routed.path[routed.path > POOL] = STAGED
    shape = (SYNTHETIC.n_layers, SYNTHETIC.max_experts)
    tables = []
    for _ in range(len(routed.step_bounds())):
        scores = rng.integers(0, 4, shape).astype(np.float32)  # few values: ties decide
        scores[rng.random(shape) < 0.1] = rng.choice([np.inf, -np.inf, -0.0, 0.1])
        tables.append((scores, rng.choice([0, 0.3, 1, 2], shape[0]).astype(np.float32)))
    expected = naive_counts(routed, SYNTHETIC, tables, sync)
    for mode in ("table", "callback") if sync else ("table",):
        counters = replay(routed, Scripted(tables), sync=sync, mode=mode)
        assert {name: getattr(counters, name).tolist() for name in expected} == expected


def test_as_many_rows_seed_as_fit() -> None:
    ids = np.array([[4, 5], [0, 1], [2, 1], [-1, -1], [1, 0]], np.int32)  # the fourth did not run
    assert [first_seed_row(ids, 2, n_slots) for n_slots in (2, 3, 4, 5)] == [4, 1, 1, 0]
    same = np.tile(np.array([[1, 0, 2]], np.int16), (500, 1))
    assert [500 - first_seed_row(same, 3, n_slots) for n_slots in (3, 1200)] == [1024 // 3, 400]


@pytest.mark.parametrize("seed", range(4))
def test_the_rows_that_seed_are_those_of_the_slow_rule(seed: int) -> None:
    """Some are ended by the slots, some by the limit on uses."""
    rng = np.random.default_rng(seed)
    ends = set()
    for _ in range(60):
        n_experts = int(rng.choice([4, 20, 300, 1500]))
        k = int(rng.integers(1, min(n_experts, 6) + 1))
        n_slots = int(rng.integers(k, n_experts + 1))
        some = int(rng.integers(1, n_experts + 1))  # few: rows repeat experts
        ids = rng.integers(0, some, (int(rng.choice([1, 20, 500])), k))
        rows = seeding(ids.tolist(), k, n_slots)
        assert ids[first_seed_row(ids, k, n_slots) :].tolist() == rows
        assert len(rows) >= min(len(ids), n_slots // k)
        if len(rows) < len(ids):
            ends.add("limit" if (len(rows) + 1) * k > max(SEED_PAIRS, n_slots) else "slots")
    assert ends == {"limit", "slots"}


def test_the_engine_has_the_same_limit() -> None:
    found = re.search(r"FATE_SEED_PAIRS = (\d+);", RULE_H.read_text(encoding="utf-8"))
    assert found is not None
    assert int(found[1]) == SEED_PAIRS


@pytest.mark.parametrize("n_slots", [4, 7, 15])
def test_layer_table_places_as_the_slow_rule(n_slots: int) -> None:
    rng = np.random.default_rng(n_slots)
    table, naive = LayerTable(16, n_slots), NaiveLayer(16, n_slots)
    for _ in range(300):
        uses = rng.integers(0, 16, rng.integers(1, 5)).astype(np.int32)
        _, evicted = table.bring(uses)
        table.use(uses)
        before = len(naive.evictions)
        for expert in uses.tolist():
            if expert not in naive.slots:
                naive.fill(expert, set(uses.tolist()))
            naive.use(expert)
        assert evicted.tolist() == naive.evictions[before:]
        assert table.expert_of.tolist() == [-1 if e is None else e for e in naive.slots]
        assert table.last_use.tolist() == list(naive.last_use.values())
        residents = np.flatnonzero(table.slot_of >= 0)
        assert table.expert_of[table.slot_of[residents]].tolist() == residents.tolist()
        if rng.random() < 0.3:
            scores = rng.integers(0, 3, 16).astype(np.float32)
            seen = naive.clock - int(rng.integers(0, 3))
            table.publish(scores, np.float32(1), seen)
            naive.score = dict(enumerate(scores))
            naive.bonus, naive.published_at = np.float32(1), seen


def test_equal_keys_go_by_last_use_then_id() -> None:
    last_use = np.array([5, 3, 3, 9], np.int64)
    victims = pick_victims(np.array([3, 2, 1, 0]), 4, np.zeros(4, np.float32), 0, last_use, 0)
    assert victims.tolist() == [1, 2, 0, 3]


def test_bonus_is_for_uses_after_the_publication() -> None:
    last_use = np.array([4, 5], np.int64)
    score = np.array([1.0, 0.5], np.float32)
    assert pick_victims(np.arange(2), 1, score, 1.0, last_use, 4).tolist() == [0]
    assert pick_victims(np.arange(2), 1, score, 1.0, last_use, 5).tolist() == [1]


def test_bonus_is_added_in_float32() -> None:
    """2^24 + 1 is 2^24 in float32: the tie is then decided by the last use, in the engine too."""
    score = np.array([2**24, 2**24], np.float32)
    assert pick_victims(np.arange(2), 1, score, 1.0, np.array([9, 1], np.int64), 5).tolist() == [1]


def test_a_later_use_in_a_step_is_a_hit() -> None:
    table = LayerTable(8, 4)
    assert table.misses(np.array([3, 2, 3, 2], np.int32)).tolist() == [True, True, False, False]


def test_layers_may_differ() -> None:
    shape = geometry([4, 300], [1, 3], [2, 5])
    assert (shape.n_layers, shape.max_experts, shape.max_k) == (2, 300, 3)
