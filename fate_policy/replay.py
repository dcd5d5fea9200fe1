"""Drive a policy through a recorded trace; gives the engine's own counters."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy import registry
from fate_policy.base import BYPASS, NOT_RUN, POOL, STAGED, Geometry, OfflinePolicy, Policy, Step
from fate_policy.checks import bad_value, choice
from fate_policy.config import Slots
from fate_policy.counters import Counters
from fate_policy.driver import Driver
from fate_policy.errors import PolicyConfigError, TraceError
from fate_policy.prefetch_rule import Prefetch, plan, room
from fate_policy.rule import LayerTable, first_seed_row
from fate_policy.trace import Trace


def replay(
    trace: Trace,
    policy: Policy | str,
    *,
    n_slots: Any = None,
    mode: str | None = None,
    sync: bool = True,
    refresh_tokens: int = 1,
    prefetch: Prefetch | None = None,
) -> Counters:
    """Return what the engine would count on this trace.

    Parameters
    ----------
    policy
        A policy, or the name of one that needs no parameters.
    n_slots
        Slots per layer, as in a configuration (8, "25%", [4, 8], "4GiB"). None: those of the recording.
        With others a step goes past the pool where it no longer fits, and through it where it now does.
    mode
        "table" or "callback"; None: table. A policy that knows the future is always asked.
    sync
        True: scores act from the next step on, as with `sync: true`; False: one step later.
    prefetch
        What comes in before its layer, as with `prefetch` and `sync: true`, table mode only; without sync it
        depends on time, and cannot be replayed. What routers told of the layers ahead is in the trace.
    """
    if isinstance(policy, str):
        policy = registry.get(policy)()
    geometry = geometry_of(trace, n_slots)
    mode = choice("mode", "table" if mode is None else mode, ("table", "callback"))
    path = paths(trace, geometry)
    if isinstance(policy, OfflinePolicy):
        mode = "callback"
        policy.foresee(*_needs(trace, geometry, path))
    if prefetch is not None and (mode != "table" or not sync):
        raise PolicyConfigError(
            f"prefetch: can be replayed in table mode with sync, and not in {mode} mode "
            f"{'with' if sync else 'without'} it; leave one of them out"
        )
    asks_policy = prefetch is not None and prefetch.asks_policy
    driver = Driver(policy, geometry, mode, refresh_tokens, sync=sync, replay=True, prefetch=asks_policy)
    run = _Replay(geometry, driver, prefetch)
    never_runs = (path == NOT_RUN).all(axis=0)
    is_whole = ((path != NOT_RUN) | never_runs).all(axis=1)
    if prefetch is not None and prefetch.looks_ahead:
        _check_ahead(trace, never_runs, is_whole, prefetch.kind)
    behind: Step | None = None
    for start, stop in pairwise(trace.step_bounds().tolist()):
        if driver.acts_late:
            step = run.step(trace, start, stop, path[start:stop])
            if behind is not None:
                driver.observe(behind)
                driver.expect(*coming(trace, start, stop))
                run.publish()
            behind = step
        else:
            driver.expect(*coming(trace, start, stop))
            run.publish()
            if is_whole[start:stop].all():  # as the engine: not where the last layer does not run
                run.prefetch(trace, start, stop)
            driver.observe(run.step(trace, start, stop, path[start:stop]))
    if behind is not None:
        driver.observe(behind)
    return run.counters


def _check_ahead(trace: Trace, never_runs: NDArray[np.bool_], is_whole: NDArray[np.bool_], kind: str) -> None:
    """Raise `TraceError` if the trace does not hold what the routers told of the layers ahead."""
    bounds = trace.step_bounds()
    is_alone = np.diff(bounds) == 1
    if trace.ahead_ids is None or (is_alone.any() and not (trace.ahead_ids >= 0).any()):
        raise TraceError(
            f"prefetch: {kind} brings in what routers told of the layers ahead, and the trace holds none of "
            "that; record it with --fate-prefetch layer, and without a GPU with --fate-sync, or replay "
            "prefetch: token"
        )
    if never_runs.any() and not never_runs.all() and is_whole[bounds[:-1][is_alone]].any():
        raise TraceError(
            f"prefetch: {kind} is replayed where all layers run, and layer {int(np.argmax(never_runs))} of "
            "the trace never does: what it would have told is missing; record tokens whose output is wanted, "
            "with slots in every layer, or replay prefetch: token"
        )


def coming(trace: Trace, start: int, stop: int) -> tuple[NDArray[np.int32], ...]:
    """Return what `Driver.expect` is told of these tokens."""
    return trace.tokens[start:stop], trace.sequence[start:stop], trace.position[start:stop]


def geometry_of(trace: Trace, n_slots: Any = None) -> Geometry:
    """Return the layers of a trace with the slots asked for, by default those of the recording.

    Where the trace does not tell an expert's bytes they are 0.
    """
    meta = trace.meta
    expert_bytes = np.array(meta["expert_bytes"] or [0] * trace.n_layers, np.int64)
    if n_slots is None:
        if meta["n_slots"] is None:
            raise TraceError("the trace does not say how many slots it was recorded with; give n_slots")
        slots = np.array(meta["n_slots"], np.int32)
    else:
        parsed = Slots.parse(n_slots.tolist() if isinstance(n_slots, (np.ndarray, np.integer)) else n_slots)
        if parsed.kind == "bytes" and not expert_bytes.any():
            raise bad_value(
                "n_slots", n_slots, "a count or a share: the trace does not tell an expert's bytes"
            )
        slots = parsed.resolve(meta["n_experts"], meta["k"], expert_bytes)
    return Geometry(
        n_experts=np.array(meta["n_experts"], np.int32),
        k=np.array(meta["k"], np.int32),
        n_slots=slots,
        expert_bytes=expert_bytes,
        token_names=trace.token_names,
        tells_weights=trace.weights is not None,
    )


_NONE = np.empty(0, np.int32)


class _Replay:
    def __init__(self, geometry: Geometry, driver: Driver, prefetch: Prefetch | None) -> None:
        self.geometry = geometry
        self.driver = driver
        self.counters = Counters.zeros(geometry.n_layers)
        self.tables = [
            LayerTable(n_experts, n_slots)
            for n_experts, n_slots in zip(geometry.n_experts.tolist(), geometry.n_slots.tolist(), strict=True)
        ]
        self._prefetch = prefetch
        self._rooms = [
            0 if prefetch is None else room(prefetch.experts, n_slots, k)
            for n_slots, k in zip(geometry.n_slots.tolist(), geometry.k.tolist(), strict=True)
        ]
        shape = geometry.n_layers, geometry.max_experts
        self._chances = np.zeros(shape, np.float32)
        self._waiting = np.zeros(shape, np.bool_)  # prefetched and not used yet
        self._begin()

    def _begin(self) -> None:
        """Forget the last step's moves, and what came in for its token."""
        self._fills: list[tuple[int, int]] = []
        self._evictions: list[tuple[int, int]] = []
        self._ahead = [_NONE] * len(self.tables)

    def publish(self) -> None:
        if (published := self.driver.publish()) is None:
            return
        scores, bonus = published
        published_at = self.driver.history.published_at.tolist()
        for layer, table in enumerate(self.tables):
            table.publish(scores[layer, : len(table.slot_of)], bonus[layer], published_at[layer])

    def prefetch(self, trace: Trace, start: int, stop: int) -> None:
        """Bring in what the policy, then the routers of earlier layers predict for the step about to run.

        A layer's slots are moved by its own plans and op alone, so that its plans can be made at once.
        """
        if self._prefetch is None or stop - start != 1:
            return
        if self._prefetch.asks_policy:
            self._chances[:] = 0
            if self.driver.predict(trace.tokens[start:stop], self._chances):
                for layer, chances in enumerate(self._chances):
                    self._bring_ahead(layer, chances)
        if self._prefetch.looks_ahead and trace.ahead_ids is not None and trace.ahead_chances is not None:
            told = zip(trace.ahead_ids[start], trace.ahead_chances[start], strict=True)
            for layer, by_horizon in enumerate(told):
                for horizon, ids, found in zip(trace.horizons, *by_horizon, strict=True):
                    if horizon <= layer:  # else there is no layer so far before it
                        chances = np.zeros(self._chances.shape[1], np.float32)
                        chances[ids[ids >= 0]] = found[ids >= 0]
                        self._bring_ahead(layer, chances)

    def _bring_ahead(self, layer: int, chances: NDArray[np.float32]) -> None:
        """Bring in by one plan, after those made for the step before."""
        assert self._prefetch is not None
        table, before = self.tables[layer], self._ahead[layer]
        chance = chances[: len(table.slot_of)]
        come, go = plan(table, chance, self._prefetch.threshold, self._rooms[layer] - len(before), before)
        table.place(come, go)
        self._move(layer, come, go)
        self.counters.prefetches[layer] += len(come)
        self._waiting[layer, come] = True
        self._ahead[layer] = np.concatenate((before, come))

    def step(self, trace: Trace, start: int, stop: int, path: NDArray[np.uint8]) -> Step:
        ids = trace.experts(start, stop)
        ids[path == NOT_RUN] = -1
        by_use = ids.transpose(1, 0, 2)[:, :, ::-1].reshape(ids.shape[1], -1)
        ran = by_use >= 0
        routed = np.count_nonzero(ran, axis=1)
        wholly = (routed == ran.shape[1]).tolist()
        missed = np.zeros(ran.shape, np.bool_)
        most = path.max(axis=0)
        kinds = most.tolist()
        for layer, (table, kind) in enumerate(zip(self.tables, kinds, strict=True)):
            if kind == NOT_RUN:
                continue
            uses = by_use[layer] if wholly[layer] else by_use[layer][ran[layer]]
            if kind == POOL:
                missed[layer][ran[layer]] = self._bring(layer, uses, self._ahead[layer])
                self._find_useful(layer, uses)
            table.use(uses)
        counters, pooled = self.counters, most == POOL
        n_misses = np.count_nonzero(missed, axis=1)
        counters.routed += routed
        counters.misses += n_misses
        counters.hits += routed * pooled - n_misses
        counters.staged += routed * (most == STAGED)
        counters.bypassed += routed * (most == BYPASS)
        in_pool = path == POOL
        by_row = missed.reshape(len(kinds), len(ids), -1)
        n_rows = np.count_nonzero(in_pool, axis=0) * pooled
        counters.rows += n_rows
        counters.rows_all_resident += n_rows - np.count_nonzero(by_row.any(axis=2), axis=1)
        for layer, kind in enumerate(kinds):
            if kind > POOL:
                last = ids[_first_seed_row(ids, self.geometry, layer) :, layer, ::-1]
                seeded = self._bring(layer, last[last >= 0], _NONE)
                counters.seed_fills[layer] += int(seeded.sum())
        counters.tokens += stop - start
        counters.steps += 1
        hits = (ids >= 0) & in_pool[:, :, None]
        hits &= ~by_row.transpose(1, 0, 2)[:, :, ::-1]
        fills, evictions = self._fills, self._evictions
        self._begin()
        return Step(
            ids=ids,
            path=path,
            weights=None if trace.weights is None else trace.weights[start:stop].astype(np.float32),
            tokens=trace.tokens[start:stop],
            positions=trace.position[start:stop],
            sequences=trace.sequence[start:stop],
            hits=hits.view(np.uint8),
            fills=np.array(fills, np.int32).reshape(-1, 2),
            evictions=np.array(evictions, np.int32).reshape(-1, 2),
            **trace.ahead(start, stop),
        )

    def _bring(self, layer: int, uses: NDArray[np.int32], kept: NDArray[np.int32]) -> NDArray[np.bool_]:
        table, driver = self.tables[layer], self.driver
        asks = driver.mode == "callback"
        miss, evicted = table.bring(
            uses, (lambda n, pinned: driver.victims(layer, n, pinned, table.last_use)) if asks else None, kept
        )
        filled = uses[miss]
        if len(filled):
            self._move(layer, filled, evicted)
            if asks:
                if len(evicted):
                    driver.drop(layer, evicted)
                driver.admit(layer, filled)
        return miss

    def _move(self, layer: int, filled: NDArray[np.int32], evicted: NDArray[np.int32]) -> None:
        """Note and count what came and went."""
        counters = self.counters
        if len(evicted):
            self._evictions += [(layer, expert) for expert in evicted.tolist()]
            counters.evictions[layer] += len(evicted)
            counters.prefetch_wasted[layer] += np.count_nonzero(self._waiting[layer, evicted])
            self._waiting[layer, evicted] = False
        self._fills += [(layer, expert) for expert in filled.tolist()]
        counters.fills[layer] += len(filled)
        counters.bytes[layer] += len(filled) * self.geometry.expert_bytes[layer]

    def _find_useful(self, layer: int, uses: NDArray[np.int32]) -> None:
        if self._prefetch is not None:
            waiting = self._waiting[layer]
            n_before = np.count_nonzero(waiting)
            waiting[uses] = False
            n_useful = n_before - np.count_nonzero(waiting)
            self.counters.prefetch_useful[layer] += n_useful
            self.counters.prefetch_hidden[layer] += n_useful * int(self.geometry.expert_bytes[layer])


def _first_seed_row(ids: NDArray[np.int32], geometry: Geometry, layer: int) -> int:
    return first_seed_row(ids[:, layer], int(geometry.k[layer]), int(geometry.n_slots[layer]))


def paths(trace: Trace, geometry: Geometry) -> NDArray[np.uint8]:
    """Return the path of every token and layer with the slots of `geometry`.

    A step that fitted its recorded slots and still went past the pool met another limit, and keeps its path.
    """
    recorded = trace.path
    if not trace.n_tokens:
        return recorded
    bounds = trace.step_bounds()
    rows = np.add.reduceat(recorded != NOT_RUN, bounds[:-1], axis=0, dtype=np.int64)
    pairs = np.repeat(rows, np.diff(bounds), axis=0) * geometry.k
    fits = pairs <= geometry.n_slots
    recorded_slots = trace.meta["n_slots"]
    past = STAGED if (recorded == STAGED).any() else BYPASS
    path = np.where((recorded == POOL) & ~fits, past, recorded)
    if recorded_slots is not None:
        fitted = pairs <= np.array(recorded_slots)
        if ((recorded == POOL) & ~fitted).any():
            token, layer = np.argwhere((recorded == POOL) & ~fitted)[0]
            raise TraceError(
                f"the trace contradicts itself: the step of token {token} put {pairs[token, layer]} uses on "
                f"the pool path of layer {layer}, which had {recorded_slots[layer]} slots"
            )
        path = np.where((recorded > POOL) & fits & ~fitted, POOL, path)
    return path.astype(np.uint8)


def _needs(
    trace: Trace, geometry: Geometry, path: NDArray[np.uint8]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return what `OfflinePolicy.foresee` is told."""
    needs = trace.experts()
    needs[path == NOT_RUN] = -1
    bounds = trace.step_bounds()
    step = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    for start, stop in pairwise(bounds.tolist()):
        for layer in np.flatnonzero((path[start:stop] > POOL).any(axis=0)).tolist():
            first = _first_seed_row(needs[start:stop], geometry, layer)
            needs[start : start + first, layer] = -1
    return needs, step
