from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from policy_contract import (
    SYNTHETIC,
    Predictions,
    decoded_trace,
    geometry,
    golden,
    random_ids,
    real_trace,
    synthetic_trace,
    telling,
    tiny,
    with_predictions,
)

from fate_policy import trace
from fate_policy.base import NOT_RUN, POOL, STAGED, Geometry, History, Policy, Step
from fate_policy.errors import PolicyConfigError, TraceError
from fate_policy.frequency import Frequency
from fate_policy.kernels import Routing, simulate_scores
from fate_policy.prefetch_rule import Prefetch
from fate_policy.replay import geometry_of, replay
from fate_policy.trace import Trace


class Spy(Policy):
    """Note what it is told."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def observe(self, step: Step) -> None:
        self.steps.append(step)


def test_a_hand_counted_pool() -> None:
    totals = replay(tiny([[0, 1], [1, 2], [3, 0]], [0, 1, 2], 4, 3), "lru").totals()
    assert {k: v for k, v in totals.items() if v} == {
        "routed": 6,
        "hits": 2,
        "misses": 4,
        "fills": 4,
        "evictions": 1,
        "bytes": 40,
        "rows": 3,
        "tokens": 3,
        "steps": 3,
    }


def test_a_hand_counted_victim() -> None:
    """Worst rank first: in the step [1, 2] expert 2 is used before 1, so 2 is the older one."""
    spy = Spy()
    replay(tiny([[0, 1], [1, 2], [3, 0]], [0, 1, 2], 4, 3), spy)
    assert [step.evictions.tolist() for step in spy.steps] == [[], [], [[0, 2]]]
    assert [step.fills.tolist() for step in spy.steps] == [[[0, 1], [0, 0]], [[0, 2]], [[0, 3]]]
    assert [step.hits[0, 0].tolist() for step in spy.steps] == [[0, 0], [1, 0], [0, 1]]


def test_a_batch_counts_later_uses_as_hits_and_whole_rows() -> None:
    counters = replay(tiny([[0], [0], [1]], [0, 0, 0], 4, 3), "lru")
    totals = counters.totals()
    assert (totals["hits"], totals["misses"], totals["rows"], totals["rows_all_resident"]) == (1, 2, 3, 1)


def test_a_bypass_seeds_from_its_last_rows() -> None:
    spy = Spy()
    counters = replay(tiny([[0], [1], [2], [3], [1]], [0, 0, 0, 1, 2], 4, 2), spy)
    assert spy.steps[0].fills.tolist() == [[0, 1], [0, 2]]
    assert spy.steps[1].evictions.tolist() == [[0, 1]]
    totals = counters.totals()
    assert (totals["bypassed"], totals["seed_fills"], totals["fills"], totals["misses"]) == (3, 2, 4, 2)


def test_a_bypass_seeds_from_all_last_rows_whose_experts_fit() -> None:
    """Rows are counted by their distinct experts: 2 alone would leave a slot empty."""
    spy = Spy()
    replay(tiny([[0], [3], [2], [2], [2], [3]], [0] * 5 + [1], 4, 2), spy)
    assert spy.steps[0].fills.tolist() == [[0, 3], [0, 2]]
    assert spy.steps[1].hits.tolist() == [[[1]]]


@pytest.mark.parametrize("mode", ["table", "callback"])
def test_seeding_knows_the_uses_of_its_own_step(mode: str) -> None:
    """The batch used 0 before the rows it seeds from, so 1 and 2 go; no policy has observed that yet."""
    moves: list[int] = []

    class Drops(Policy):
        def drop(self, layer: int, experts: np.ndarray[Any, np.dtype[np.int32]]) -> None:
            moves.extend(experts.tolist())

    replay(tiny([[0], [1], [2], [0], [3], [4], [3]], [0, 1, 2, 3, 3, 3, 3], 5, 3), Drops(), mode=mode)
    assert moves == [1, 2]


def test_staged_pairs_are_counted_apart() -> None:
    routed = tiny([[0], [1], [2]], [0, 0, 0], 4, 2)
    staged = replace(routed, path=np.full_like(routed.path, STAGED))
    counters = replay(staged, "lru").totals()
    assert (counters["staged"], counters["bypassed"], counters["seed_fills"]) == (3, 0, 2)


class Late(Policy):
    """Score expert 1 lowest from its first publication on."""

    def scores(self, history: History) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.array([[1, 0, 1, 1, 1]], np.float32)


@pytest.mark.parametrize(("sync", "evicted"), [(True, [[0, 1]]), (False, [[0, 0]])])
def test_scores_act_one_step_later_without_sync(sync: bool, evicted: list[list[int]]) -> None:
    spied: list[list[list[int]]] = []

    class Both(Late):
        def observe(self, step: Step) -> None:
            spied.append(step.evictions.tolist())

    # the batch brings 0 and 1 in, the next step needs a slot: with sync the scores of the first step decide
    replay(tiny([[0], [1], [2], [3], [4]], [0, 0, 1, 2, 3], 5, 2), Both(), sync=sync)
    assert spied[1] == evicted


class Told(Policy):
    """Score by the token told, with a bonus."""

    def __init__(self, tables: NDArray[np.float32], bonus: NDArray[np.float32]) -> None:
        self.tables, self.extra, self.token = tables, bonus, 0

    def expect(self, token: int, sequence: int, position: int) -> None:
        self.token = token

    def scores(self, history: History) -> NDArray[np.float32]:
        return self.tables[self.token]

    def bonus(self, history: History) -> NDArray[np.float32]:
        return self.extra


@pytest.mark.parametrize("sync", [True, False])
def test_the_bonus_is_for_uses_that_the_scores_had_not_seen(sync: bool) -> None:
    """Without sync those of the token at hand; this once counted from after it, so that none had a bonus."""
    routed = real_trace().slice(0, 200)
    routed = replace(routed, token_id=np.arange(routed.n_tokens, dtype=np.int32))
    rng = np.random.default_rng(0)
    tables = rng.random((routed.n_tokens, 24, 32), np.float32)
    tables[0] = 0  # the first token's are not asked for; two tokens fit the slots
    bonus = rng.random(24, np.float32)
    got = replay(routed, Told(tables, bonus), n_slots=8, sync=sync)
    late = {} if sync else {"bonus": bonus, "delay": 1}
    assert got == simulate_scores(Routing.of_trace(routed), 8, tables, **late).counters
    assert got != replay(routed, Told(tables, 0 * bonus), n_slots=8, sync=sync) or sync


def test_fewer_slots_bypass_what_no_longer_fits() -> None:
    routed = synthetic_trace()
    assert (replay(routed, "lru", n_slots=[4, 8, 11]), replay(routed, "lru")) == (replay(routed, "lru"),) * 2
    fewer, more = replay(routed, "lru", n_slots=[2, 4, 4]), replay(routed, "lru", n_slots=[8, 16, 16])
    assert fewer.bypassed[2] > replay(routed, "lru").bypassed[2] == 0
    assert more.bypassed.tolist() == [24 * 8, 48 * 8, 0]
    assert more.evictions.sum() == 0


def test_a_step_that_fitted_and_was_staged_all_the_same_stays_staged() -> None:
    routed = tiny([[0], [1], [2]], [0, 0, 1], 4, 2)
    path = np.array([[STAGED], [STAGED], [POOL]], np.uint8)
    counters = replay(replace(routed, path=path), "lru", n_slots=4)
    assert counters.staged.tolist() == [2]


def test_a_contradicting_trace_is_refused() -> None:
    routed = tiny([[0], [1], [2]], [0, 0, 0], 4, 2)
    with pytest.raises(TraceError, match="put 3 uses on the pool path of layer 0, which had 2 slots"):
        replay(replace(routed, path=np.ones_like(routed.path)), "lru")


def test_layers_without_slots_did_not_engage() -> None:
    routed = synthetic_trace(60)
    meta = {**routed.meta, "n_slots": [4, 0, 11]}
    routed.path[:, 1] = 0
    counters = replay(replace(routed, meta=meta), "lru")
    assert counters.routed[1] == 0
    assert counters.hits[0] > 0


def test_unknown_slots_and_bytes() -> None:
    with pytest.raises(TraceError, match="give n_slots"):
        replay(real_trace(), "lru")
    with pytest.raises(PolicyConfigError, match="does not tell an expert's bytes"):
        replay(real_trace(), "lru", n_slots="1GiB")
    with pytest.raises(PolicyConfigError, match="the minimum is 4"):
        replay(real_trace(), "lru", n_slots=3)
    with pytest.raises(PolicyConfigError, match="mode: 'off'"):
        replay(real_trace(), "lru", n_slots=8, mode="off")
    assert replay(real_trace(), "lru", n_slots=8).bytes.sum() == 0
    assert geometry_of(real_trace(), np.full(24, 9)).n_slots.tolist() == [9] * 24
    assert geometry_of(real_trace(), "25%").n_slots.tolist() == [8] * 24


def test_an_empty_trace_counts_nothing() -> None:
    for policy in ("lru", "belady"):
        assert replay(synthetic_trace().slice(0, 0), policy).totals()["steps"] == 0


def test_refresh_tokens_change_when_scores_act() -> None:
    seldom = replay(synthetic_trace(), Frequency(), refresh_tokens=50)
    assert golden(seldom) != golden(replay(synthetic_trace(), Frequency()))


def test_a_recorded_replay_replays(tmp_path: Path) -> None:
    """What replay does to a trace is what a recording of it would hold."""
    spy = Spy()
    routed = synthetic_trace()
    counters = replay(routed, spy)
    with trace.TraceWriter(tmp_path / "t.npz", trace.geometry_meta(SYNTHETIC)) as writer:
        for step in spy.steps:
            writer.append(step)
    assert replay(trace.load(tmp_path / "t.npz"), "lru") == counters


FOLDER = os.environ.get("FATE_TRACES")


@pytest.mark.slow
@pytest.mark.skipif(FOLDER is None, reason="FATE_TRACES, the folder of real traces, is not set")
@pytest.mark.parametrize(("policy", "rate"), [("lru", 0.661), (Frequency(half_life_tokens=64), 0.680)])
def test_known_hit_rates_at_a_quarter_of_the_experts(policy: Policy | str, rate: float) -> None:
    """Found before by others' code on the whole trace, caches never emptied."""
    assert FOLDER is not None
    counters = replay(trace.load(Path(FOLDER) / "gptoss20b_stem.npz"), policy, n_slots="25%")
    assert round(counters.hit_rate, 3) == rate


class Following(Policy):
    """Predict that a token uses what the token before it used, and one expert more."""

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        ids = step.ids[-1]
        chance = np.zeros((len(ids), 16), np.float32)
        layer, rank = np.nonzero(ids >= 0)
        chance[layer, ids[layer, rank]] = 0.9
        chance[:, 7] = np.maximum(chance[:, 7], 0.5)
        ranked = np.argsort(-chance, axis=1, kind="stable").astype(np.int32)
        return ranked, np.take_along_axis(chance, ranked, axis=1)


def test_a_hand_counted_prefetch() -> None:
    """3 slots, one expert a token: 7 comes in before token 1, goes for 2, comes again before 3, is used."""
    routed = tiny([[0], [1], [2], [3], [7]], [0, 1, 2, 3, 4], 16, 3)
    totals = replay(routed, Following(), prefetch=Prefetch(0.5, 1)).totals()
    assert {name: value for name, value in totals.items() if value} == {
        "routed": 5,
        "hits": 1,  # 7
        "misses": 4,
        "fills": 6,
        "evictions": 3,  # 7 for 2, 0 for 7, 1 for 3
        "bytes": 60,
        "rows": 5,
        "rows_all_resident": 1,
        "prefetches": 2,
        "prefetch_useful": 1,
        "prefetch_wasted": 1,
        "prefetch_hidden": 10,
        "tokens": 5,
        "steps": 5,
    }


def test_what_is_not_likely_enough_does_not_come() -> None:
    routed = tiny([[0], [1], [2], [3], [7]], [0, 1, 2, 3, 4], 16, 3)
    assert replay(routed, Following(), prefetch=Prefetch(0.95, 1)) == replay(routed, "lru")


def test_steps_of_a_replay_with_prefetch_tell_what_is_resident() -> None:
    class Resident(Following):
        def observe(self, step: Step) -> None:
            self.last = step

        def scores(self, history: History) -> None:
            self.resident = history.resident.copy()

    policy = Resident()
    routed = synthetic_trace(300)
    counters = replay(routed, policy, prefetch=Prefetch(0.5, 4))
    assert counters.prefetches.all()
    assert counters.prefetch_wasted.any()
    counted = counters.fills - counters.evictions
    assert policy.resident.sum(axis=1).tolist() == counted.tolist()


@pytest.mark.parametrize(("mode", "sync"), [("table", False), ("callback", True)])
def test_prefetch_is_replayed_only_where_time_does_not_count(mode: str, sync: bool) -> None:
    with pytest.raises(
        PolicyConfigError, match=r"^prefetch: can be replayed in table mode with sync, and not in"
    ):
        replay(synthetic_trace(), Following(), mode=mode, sync=sync, prefetch=Prefetch())
    with pytest.raises(PolicyConfigError, match=r"^prefetch: policy lru has no predict\(\)"):
        replay(synthetic_trace(), "lru", prefetch=Prefetch())
    with pytest.raises(PolicyConfigError, match=r"^prefetch_experts: 17 is not allowed; expected a whole"):
        Prefetch(experts=17)


def test_a_hand_counted_prefetch_of_layers_ahead() -> None:
    """3 layers of 2 slots, one expert a token, room for one: the farthest layer that tells comes first."""
    shape = geometry([8] * 3, [1] * 3, [2] * 3)
    ids = np.repeat(np.arange(3, dtype=np.int32)[:, None, None], 3, axis=1)
    told: Predictions = [
        (0, 0, 1, [5], [1]),  # of the first layers nobody tells so early: these come to nothing
        (0, 1, 2, [5], [1]),
        (0, 1, 1, [3], [0.9]),
        (0, 2, 2, [4], [0.9]),
        (0, 2, 1, [0], [0.9]),  # no room is left
        (1, 1, 1, [1], [0.9]),  # for 3, which was never used
        (1, 2, 2, [0], [0.9]),  # is there
        (1, 2, 1, [1, 0], [0.6, 0.4]),  # for 4, which was never used
        (2, 1, 1, [0], [0.9]),  # is there, and goes for 2 all the same
        (2, 2, 2, [3], [0.9]),  # for 0
        (2, 2, 1, [2], [0.9]),  # no room is left; 2 then takes the slot of 1, which was used after 3
    ]
    counters = replay(telling(decoded_trace(ids, shape), told), "lru", prefetch=Prefetch(0.5, 8, "layer"))
    by_layer = {
        "hits": [0, 1, 1],
        "misses": [3, 2, 2],
        "fills": [3, 4, 5],
        "evictions": [1, 2, 3],
        "prefetches": [0, 2, 3],
        "prefetch_useful": [0, 1, 1],
        "prefetch_wasted": [0, 1, 1],
    }
    assert {name: getattr(counters, name).tolist() for name in by_layer} == by_layer


def test_what_one_plan_drops_a_later_one_brings_back() -> None:
    """Both moves count; for the policy nothing has happened."""

    class Moved(Spy):
        def drop(self, layer: int, experts: NDArray[np.int32]) -> None:
            self.moved.append((layer, experts.tolist()))

        admit = drop
        moved: list[tuple[int, list[int]]]

    shape = geometry([8] * 3, [1] * 3, [3] * 3)
    ids = np.array([[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 0]], np.int32)[:, :, None]
    told: Predictions = [(3, 2, 2, [5], [0.9]), (3, 2, 1, [0], [0.5])]
    policy = Moved()
    policy.moved = []
    routed = telling(decoded_trace(ids, shape), told)
    counters = replay(routed, policy, prefetch=Prefetch(0.5, 8, "layer"))
    assert policy.steps[-1].evictions.tolist() == [[2, 0], [2, 1]]
    assert policy.steps[-1].fills.tolist() == [[2, 5], [2, 0]]
    assert policy.moved[-2:] == [(2, [1]), (2, [5])]
    assert (counters.hits[2], counters.prefetches[2], counters.prefetch_useful[2]) == (1, 2, 1)


class Repeating(Policy):
    """Predict what the token before used, and one expert more; score by a rule of thumb, or not at all."""

    def __init__(self, is_scored: bool) -> None:
        self._is_scored = is_scored

    def start(self, geometry: Geometry) -> None:
        self._shape = geometry.n_layers, geometry.max_experts

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        chance = np.zeros(self._shape, np.float32)
        for layer, expert, likely in repeated(step.ids[-1].tolist()):
            chance[layer, expert] = likely
        ranked = np.argsort(-chance, axis=1, kind="stable").astype(np.int32)
        return ranked, np.take_along_axis(chance, ranked, axis=1)

    def scores(self, history: History) -> NDArray[np.float32] | None:
        if not self._is_scored:
            return None
        layer, expert = np.indices(self._shape)
        return thumb(layer, expert, history.tokens_seen).astype(np.float32)


def repeated(rows: list[list[int]]) -> list[tuple[int, int, float]]:
    extra = [(layer, 7, 0.5) for layer, row in enumerate(rows) if 7 not in row]
    return extra + [
        (layer, e, 0.75 - 0.25 * (e % 3)) for layer, row in enumerate(rows) for e in row if e >= 0
    ]


def thumb(layer: Any, expert: Any, n_tokens: int) -> Any:
    return (expert * 7 + layer + n_tokens) % 5


def by_hand(routed: Trace, n_slots: int, prefetch: Prefetch, is_scored: bool) -> dict[str, list[int]]:
    """Count what the words of the documentation say, expert by expert, for `Repeating`."""
    names = ("hits", "misses", "fills", "evictions", "prefetches", "prefetch_useful", "prefetch_wasted")
    counts = {name: [0] * routed.n_layers for name in names}
    k = routed.meta["k"][0]
    asks, looks = prefetch.kind != "layer", prefetch.kind != "token"
    resident: list[list[int]] = [[] for _ in range(routed.n_layers)]
    waiting: list[set[int]] = [set() for _ in range(routed.n_layers)]
    used: list[dict[int, int]] = [{} for _ in range(routed.n_layers)]
    clock = [0] * routed.n_layers
    rows = routed.experts().tolist()
    assert routed.ahead_ids is not None
    assert routed.ahead_chances is not None

    def bring(layer: int, expert: int, stays: set[int], n_seen: int) -> bool:
        """Make room for one and put it there; False: nobody may go."""
        here = resident[layer]
        if len(here) == n_slots:
            worth = {e: thumb(layer, e, n_seen) if is_scored and n_seen else 0 for e in here}
            order = sorted(set(here) - stays, key=lambda e: (worth[e], used[layer].get(e, 0), e))
            if not order:
                return False
            here.remove(order[0])
            counts["evictions"][layer] += 1
            counts["prefetch_wasted"][layer] += order[0] in waiting[layer]
            waiting[layer].discard(order[0])
        here.append(expert)
        counts["fills"][layer] += 1
        return True

    n_seen = 0
    for number in range(int(routed.step[-1]) + 1):
        tokens = np.flatnonzero(routed.step == number).tolist()
        alone = len(tokens) == 1 and min(min(row) for row in rows[tokens[0]]) >= 0
        for layer in range(routed.n_layers):
            plans: list[dict[int, float]] = []
            if alone and asks and n_seen:
                before = repeated(rows[tokens[0] - 1])
                plans.append({e: likely for at, e, likely in before if at == layer})
            for at, horizon in enumerate(routed.horizons if alone and looks else ()):
                if layer - horizon >= 0:
                    named = routed.ahead_ids[tokens[0], layer, at].tolist()
                    likely = routed.ahead_chances[tokens[0], layer, at].tolist()
                    plans.append({e: chance for e, chance in zip(named, likely, strict=True) if e >= 0})
            came: set[int] = set()
            for plan in plans:
                worthy = {e for e, chance in plan.items() if chance >= prefetch.threshold}
                for expert in sorted(worthy - set(resident[layer]), key=lambda e: (-plan[e], e)):
                    if len(came) == min(prefetch.experts, n_slots - k):
                        break
                    if not bring(layer, expert, worthy | came, n_seen):
                        break
                    came.add(expert)
                    waiting[layer].add(expert)
                    counts["prefetches"][layer] += 1
            uses = [e for token in tokens for e in reversed(rows[token][layer]) if e >= 0]
            for expert in uses:
                if expert in resident[layer]:
                    counts["hits"][layer] += 1
                    counts["prefetch_useful"][layer] += expert in waiting[layer]
                    waiting[layer].discard(expert)
                else:
                    counts["misses"][layer] += 1
                    assert bring(layer, expert, set(uses) | came, n_seen)
            for expert in uses:
                clock[layer] += 1
                used[layer][expert] = clock[layer]
        n_seen += len(tokens)
    return counts


@pytest.mark.parametrize("is_scored", [False, True])
@pytest.mark.parametrize("horizons", [(1,), (2, 1), (4, 2, 1), (8, 3)])
@pytest.mark.parametrize("slots", [2, 3, 6])
def test_prefetch_counts_as_told_by_hand(slots: int, horizons: tuple[int, ...], is_scored: bool) -> None:
    """Steps of one token, of one whose last layer does not run, of several that fit; many equal chances."""
    shape = geometry([12] * 5, [2] * 5, [slots] * 5)
    ids = random_ids(80, shape, 4)
    ids[30:36, -1] = -1
    sizes = [1] * 40 + ([3] * 5 if slots == 6 else [1] * 15) + [1] * 25
    routed = with_predictions(decoded_trace(ids, shape, sizes), horizons)
    for most in (1, 2, 16):
        counted = []
        for kind in ("token", "layer", "both"):
            prefetch = Prefetch(0.5, most, kind)
            expected = by_hand(routed, slots, prefetch, is_scored)
            got = replay(routed, Repeating(is_scored), prefetch=prefetch)
            assert {name: getattr(got, name).tolist() for name in expected} == expected
            counted.append(expected)
        token, layer, both = counted
        has_room = [slots > 2 and n >= min(horizons) for n in range(5)]
        assert [n > 0 for n in layer["prefetches"]] == has_room
        assert [n > 0 for n in token["prefetches"]] == [slots > 2] * 5
        assert [both["fills"][n] != token["fills"][n] for n in range(5)] == has_room


def test_layers_ahead_need_no_policy_that_predicts(tmp_path: Path) -> None:
    """And what a recording of such a replay holds replays alike."""
    spy = Spy()
    routed = with_predictions(synthetic_trace())
    prefetch = Prefetch(0.5, 8, "layer")
    counters = replay(routed, spy, prefetch=prefetch)
    assert counters == replay(routed, "lru", prefetch=prefetch) != replay(routed, "lru")
    with trace.TraceWriter(tmp_path / "t.npz", trace.geometry_meta(SYNTHETIC)) as writer:
        for step in spy.steps:
            writer.append(step)
    again = trace.load(tmp_path / "t.npz")
    assert again.hash() == routed.hash()
    assert replay(again, "lru", prefetch=prefetch) == counters
    with pytest.raises(PolicyConfigError, match=r"^prefetch: policy lru has no predict\(\)"):
        replay(routed, "lru", prefetch=Prefetch(kind="both"))


def test_a_trace_must_tell_of_the_layers_ahead() -> None:
    for kind in ("layer", "both"):
        fault = f"^prefetch: {kind} brings in what routers told .*; record it with --fate-prefetch layer, and"
        with pytest.raises(TraceError, match=fault):
            replay(synthetic_trace(), Repeating(False), prefetch=Prefetch(kind=kind))


def test_layers_that_never_run_tell_nothing() -> None:
    routed = with_predictions(synthetic_trace(60))
    path = routed.path.copy()
    path[:, 1] = NOT_RUN
    missing = replace(routed, path=path)
    with pytest.raises(
        TraceError, match=r"all layers run, and layer 1 of the trace never does: .*; record tok"
    ):
        replay(missing, "lru", prefetch=Prefetch(kind="layer"))
    assert replay(missing.slice(0, 20), "lru", prefetch=Prefetch(kind="layer")).prefetches.sum() == 0
