"""What every policy must do, as a mixin: `class TestLRU(PolicyContract): name = "lru"`.

Also the traces that policies are tested on: a synthetic one with every path, and a slice of a real one.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fate_policy import registry, trace
from fate_policy.base import BYPASS, NOT_RUN, POOL, Geometry, Policy, Step
from fate_policy.config import load, make_policy
from fate_policy.counters import Counters
from fate_policy.driver import Driver
from fate_policy.replay import replay
from fate_policy.trace import Trace

DATA = Path(__file__).parent / "data"


def geometry(n_experts: list[int], k: list[int], n_slots: list[int]) -> Geometry:
    return Geometry(
        n_experts=np.array(n_experts, np.int32),
        k=np.array(k, np.int32),
        n_slots=np.array(n_slots, np.int32),
        expert_bytes=np.arange(100, 100 + len(k), dtype=np.int64),
    )


SYNTHETIC = geometry([8, 16, 16], [2, 4, 4], [4, 8, 11])


def random_ids(n_tokens: int, shape: Geometry, seed: int) -> NDArray[np.int32]:
    """Return skewed, drifting routing without duplicates in a row; the same with every numpy."""
    return _random_ids(n_tokens, shape, seed).copy()


@functools.cache
def _random_ids(n_tokens: int, shape: Geometry, seed: int) -> NDArray[np.int32]:
    state = seed * 2 + 1
    ids = np.full((n_tokens, shape.n_layers, shape.max_k), -1, np.int32)
    for token in range(n_tokens):
        for layer, (n, k) in enumerate(zip(shape.n_experts.tolist(), shape.k.tolist(), strict=True)):
            chosen: list[int] = []
            while len(chosen) < k:
                state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
                uniform = (state >> 33) / 2**31
                expert = (int(n * uniform**2) + token // 16 + layer) % n
                if expert not in chosen:
                    chosen.append(expert)
            ids[token, layer, :k] = chosen
    return ids


def make_step(ids: NDArray[np.int32], path: NDArray[np.uint8] | None = None, **columns: Any) -> Step:
    n = len(ids)
    if path is None:
        path = np.where((ids >= 0).any(axis=2), POOL, NOT_RUN).astype(np.uint8)
    arrays: dict[str, Any] = {
        "weights": None,
        "tokens": np.arange(n, dtype=np.int32),
        "positions": np.arange(n, dtype=np.int32),
        "sequences": np.zeros(n, np.int32),
        "hits": np.zeros(ids.shape, np.uint8),
        "fills": np.empty((0, 2), np.int32),
        "evictions": np.empty((0, 2), np.int32),
    }
    return Step(ids=ids, path=path, **{**arrays, **columns})


def synthetic_trace(n_tokens: int = 400, seed: int = 1, shape: Geometry = SYNTHETIC) -> Trace:
    """Return prompts of 12 tokens, whose last layer runs for one token, batches of 2, and single tokens."""
    ids = random_ids(n_tokens, shape, seed)
    sizes: list[int] = []
    while sum(sizes) < n_tokens:
        sizes += [12] + [2] * 5 + [1] * 30
    step = np.repeat(np.arange(len(sizes)), sizes)[:n_tokens].astype(np.int32)
    rows = np.bincount(step)[step]
    path = np.where(rows[:, None] * shape.k <= shape.n_slots, POOL, BYPASS).astype(np.uint8)
    cut = (rows == 12) & (np.diff(step, append=n_tokens) == 0)
    path[cut, -1] = NOT_RUN
    path[(rows == 12) & ~cut, -1] = POOL
    ids[path == NOT_RUN] = -1
    position = (np.arange(n_tokens) % sum([12] + [2] * 5 + [1] * 30)).astype(np.int32)
    return Trace(
        ids=np.where(ids < 0, 255, ids).astype(np.uint8),
        path=path,
        step=step,
        sequence=np.cumsum(position == 0).astype(np.int32) - 1,
        position=position,
        token_id=np.arange(n_tokens, dtype=np.int32) % 50,
        is_decode=rows == 1,
        prompt_start=np.flatnonzero(position == 0).astype(np.int32),
        meta={"model": "synthetic", **trace.geometry_meta(shape)},
    )


def tiny(ids: list[list[int]], steps: list[int], n_experts: int, n_slots: int) -> Trace:
    """Return a trace of one layer; the path follows from the slots."""
    rows = np.array(ids, np.uint8)[:, None, :]
    step = np.array(steps, np.int32)
    n, k = len(rows), rows.shape[2]
    fits = np.bincount(step)[step] * k <= n_slots
    return Trace(
        ids=rows,
        path=np.where(fits, POOL, BYPASS).astype(np.uint8)[:, None],
        step=step,
        sequence=np.zeros(n, np.int32),
        position=np.arange(n, dtype=np.int32),
        token_id=np.full(n, -1, np.int32),
        is_decode=np.ones(n, np.bool_),
        prompt_start=np.zeros(1, np.int32),
        meta={"n_experts": [n_experts], "k": [k], "n_slots": [n_slots], "expert_bytes": [10]},
    )


def decoded_trace(ids: NDArray[np.int32], shape: Geometry, sizes: list[int] | None = None) -> Trace:
    """Return generated tokens in steps of these sizes, by default one a token, all on the pool path."""
    n = len(ids)
    return Trace(
        ids=np.where(ids < 0, 255, ids).astype(np.uint8),
        path=np.where((ids >= 0).any(axis=2), POOL, NOT_RUN).astype(np.uint8),
        step=np.repeat(np.arange(len(sizes or ids)), sizes or 1).astype(np.int32),
        sequence=np.zeros(n, np.int32),
        position=np.arange(n, dtype=np.int32),
        token_id=np.arange(n, dtype=np.int32),
        is_decode=np.ones(n, np.bool_),
        prompt_start=np.zeros(1, np.int32),
        meta={"model": "synthetic", **trace.geometry_meta(shape)},
    )


Predictions = list[tuple[int, int, int, list[int], list[float]]]


def telling(routed: Trace, told: Predictions, horizons: tuple[int, ...] = (2, 1)) -> Trace:
    """Return the trace with predictions (token, layer, horizon, experts, chances)."""
    ids = np.full((routed.n_tokens, routed.n_layers, len(horizons), 5), -1, np.int16)
    chances = np.zeros(ids.shape, np.float32)
    for token, layer, horizon, experts, likely in told:
        at = token, layer, horizons.index(horizon), slice(len(experts))
        ids[at], chances[at] = experts, likely
    meta = {**routed.meta, "horizons": list(horizons)}
    return replace(routed, ahead_ids=ids, ahead_chances=chances, meta=meta)


def with_predictions(
    routed: Trace, horizons: tuple[int, ...] = (2, 1), n_ahead: int = 6, seed: int = 0
) -> Trace:
    """Return the trace with predictions for steps of one token: some right, some not, many equally likely."""
    rng = np.random.default_rng(seed)
    ids = np.full((routed.n_tokens, routed.n_layers, len(horizons), n_ahead), -1, np.int16)
    chances = np.zeros(ids.shape, np.float32)
    experts = routed.experts()
    alone = np.bincount(routed.step)[routed.step] == 1
    for token, layer, at in np.argwhere(np.broadcast_to(alone[:, None, None], ids.shape[:3])):
        order = rng.permutation(routed.meta["n_experts"][layer])
        used = np.isin(order, experts[token, layer])
        named = order[np.argsort(~used & (rng.random(len(order)) < 0.6), kind="stable")]
        named = named[: rng.integers(0, min(n_ahead, len(order)) + 1)]
        ids[token, layer, at, : len(named)] = named
        chances[token, layer, at, : len(named)] = -np.sort(-rng.integers(1, 5, len(named))) / 4
    meta = {**routed.meta, "horizons": list(horizons)}
    return replace(routed, ahead_ids=ids, ahead_chances=chances, meta=meta)


def real_trace() -> Trace:
    """Return 400 tokens of gpt-oss-20b."""
    return trace.load(DATA / "gptoss20b_stem_400.npz")


@functools.cache
def least_fills(n_tokens: int, slots: int) -> NDArray[np.int64]:
    return replay(real_trace().slice(0, n_tokens), "belady", n_slots=slots).fills


def golden(counters: Counters) -> tuple[int, ...]:
    """Return the totals worth fixing: hits, misses, fills, evictions, rows without a miss."""
    totals = counters.totals()
    return tuple(totals[key] for key in ("hits", "misses", "fills", "evictions", "rows_all_resident"))


class PolicyContract:
    name: ClassVar[str]
    params: ClassVar[Mapping[str, Any]] = {}

    def make(self) -> Policy:
        return make_policy(load(self.name, {self.name: dict(self.params)}))

    def test_arguments_are_keys_and_attributes(self) -> None:
        signature = inspect.signature(registry.get(self.name))
        defaults = {key: value.default for key, value in signature.parameters.items()}
        assert all(value.kind is value.KEYWORD_ONLY for value in signature.parameters.values())
        assert defaults == load(self.name).params
        policy = self.make()
        assert {key: getattr(policy, key) for key in defaults} == {**defaults, **self.params}

    def test_describes_itself_in_one_line(self) -> None:
        line = (inspect.getdoc(type(self.make())) or "").partition("\n")[0]
        assert line.endswith(".")

    def test_counts_add_up(self) -> None:
        for mode, sync in (("table", True), ("table", False), ("callback", True)):
            counters = replay(synthetic_trace(160), self.make(), mode=mode, sync=sync)
            assert np.array_equal(
                counters.routed, counters.hits + counters.misses + counters.staged + counters.bypassed
            )
            assert np.array_equal(counters.fills - counters.seed_fills, counters.misses)
            assert np.array_equal(counters.bytes, counters.fills * SYNTHETIC.expert_bytes)
            assert np.array_equal(
                counters.fills - counters.evictions, np.minimum(counters.fills, SYNTHETIC.n_slots)
            )
            assert counters.seed_fills.sum() > 0
            assert counters.bypassed.sum() > 0

    def test_callback_mode_decides_as_table_mode_with_sync(self) -> None:
        for refresh in (1, 7):
            table = replay(synthetic_trace(160), self.make(), mode="table", refresh_tokens=refresh)
            asked = replay(synthetic_trace(160), self.make(), mode="callback", refresh_tokens=refresh)
            assert table == asked

    def test_start_forgets(self) -> None:
        policy = self.make()
        first = replay(synthetic_trace(160), policy)
        assert replay(synthetic_trace(160), policy) == first
        assert replay(synthetic_trace(160), self.make()) == first

    def test_questions_do_not_change_state(self) -> None:
        asked_often, asked_once = self.make(), self.make()
        for policy in (asked_often, asked_once):
            self.foresee(policy)
        often, once = (
            Driver(policy, SYNTHETIC, "callback", replay=True) for policy in (asked_often, asked_once)
        )
        pinned = np.zeros(16, np.bool_)
        pinned[:2] = True
        for start in range(0, 60, 3):
            ids = random_ids(60, SYNTHETIC, 5)[start : start + 3]
            used = np.unique(ids[:, 1]).astype(np.int32)
            step = make_step(ids, fills=np.stack([np.ones_like(used), used], axis=1))
            for driver in (often, once):
                driver.admit(1, used)
                driver.observe(step)
            answers = [often.victims(1, 2, pinned).tolist() for _ in range(3)]
            scores = [asked_often.scores(often.history) for _ in range(2)]
            if scores[0] is not None and scores[1] is not None:
                assert np.array_equal(scores[0], scores[1])
                assert scores[0].shape == (3, 16)
            assert answers == [once.victims(1, 2, pinned).tolist()] * 3

    def test_no_policy_fills_less_than_belady(self) -> None:
        routed = real_trace().slice(0, 40)
        for slots in (4, 10):
            counters = replay(routed, self.make_for_real(), n_slots=slots)
            assert (counters.fills >= least_fills(40, slots)).all()

    def test_real_model_fits_the_time_budget(self) -> None:
        """A token of a model of 48 layers of 128 experts costs less than 150 us."""
        shape = geometry([128] * 48, [8] * 48, [32] * 48)
        driver = Driver(self.make_for(shape), shape, "table")
        ids = random_ids(8, shape, 3)
        seconds = []
        for token in range(200):
            step = make_step(ids[token % 8, None])
            start = time.perf_counter()
            driver.observe(step)
            driver.publish()
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 150e-6

    def make_for(self, shape: Geometry) -> Policy:
        """Return the policy for a model of this shape."""
        return self.make()

    def make_for_real(self) -> Policy:
        routed = real_trace()
        return self.make_for(geometry(routed.meta["n_experts"], routed.meta["k"], routed.meta["k"]))

    def foresee(self, policy: Policy) -> None:
        """Tell a policy that needs it the future of `test_questions_do_not_change_state`."""


class Books:
    """Which experts have slots, from what steps say that came and went; each step is held against it.

    fills : how many came so far
    """

    def __init__(self, geometry: Geometry) -> None:
        self._n_slots = geometry.n_slots.tolist()
        self._held: list[set[int]] = [set() for _ in self._n_slots]
        self.fills = 0

    def note(self, step: Step) -> None:
        self.fills += len(step.fills)
        for layer, held in enumerate(self._held):
            came = set(step.fills[step.fills[:, 0] == layer, 1].tolist())
            went = set(step.evictions[step.evictions[:, 0] == layer, 1].tolist())
            assert went - came <= held, f"layer {layer}: {went - came - held} went and were not there"
            assert not (came - went) & held, f"layer {layer}: {(came - went) & held} came and were there"
            rows = step.path[:, layer] == POOL
            used, hits = step.ids[rows, layer], step.hits[rows, layer] > 0
            assert set(used[hits].tolist()) <= held | came, f"layer {layer}: a hit was not there"
            assert set(used[~hits].tolist()) <= came, f"layer {layer}: a miss did not come"
            held -= went - came  # what did both is where it was before
            held |= came - went
            assert set(used.ravel().tolist()) <= held, f"layer {layer}: what was used has no slot"
            assert len(held) <= self._n_slots[layer]
