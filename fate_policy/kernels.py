"""Replay in compiled loops: the decision rule over whole traces, millions of routed pairs a second.

The rule is that of `fate_policy.rule`, and so are the counts, exactly. Beside the engine's per-layer pools that
fill every miss there are one pool for the whole model and optional admission, which the engine does not have.

Optional admission: an expert that misses is used from a scratch slot. Then those residents and misses stay that
have the greatest keys, a use of this token counted as made: under plain LRU every miss is admitted, and a
resident that was just used may go for a miss that is worth more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fate_policy.base import BYPASS, NOT_RUN, POOL, STAGED
from fate_policy.checks import bad_value, choice, number
from fate_policy.counters import Counters
from fate_policy.errors import FateError

try:
    from numba import njit
except ImportError as error:
    raise FateError("replay in compiled loops needs numba: run `pip install 'fate[lab]'`") from error

Scores = NDArray[np.float32] | Callable[[int, int], NDArray[np.float32]]
"""Tables (n_steps, n_layers, n_experts), or a function of (start, stop) that gives those of these steps."""

TABLE_BYTES = 64 * 2**20
_RULES = ("lru", "frequency", "lfru", "table", "optimum")
_LRU, _FREQUENCY, _LFRU, _TABLE, _OPTIMUM = range(5)
_HITS, _MISSES, _STAGED, _BYPASSED, _ADMITTED, _SEEDED, _EVICTED, _ROWS, _ROWS_ALL = range(9)
_NOW = np.int64(2**62)


@dataclass(frozen=True, eq=False)
class Routing:
    """Routing as the loops take it; see `Trace` for what the arrays mean.

    ids : int16 (n_tokens, n_layers, k), -1 = not run
    bounds : int64 (n_steps + 1,): where each step starts
    path : uint8 (n_tokens, n_layers)
    starts : bool (n_steps,): a prompt starts here
    """

    ids: NDArray[np.int16]
    bounds: NDArray[np.int64]
    path: NDArray[np.uint8]
    starts: NDArray[np.bool_]
    n_experts: NDArray[np.int64]
    k: NDArray[np.int64]

    @property
    def n_steps(self) -> int:
        return len(self.bounds) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and the most experts of one."""
        return len(self.n_experts), int(self.n_experts.max(initial=1))

    @classmethod
    def of_ids(
        cls, ids: NDArray[np.integer], prompt_start: ArrayLike = (0,), n_experts: int | None = None
    ) -> Routing:
        """Take plain ids (n_tokens, n_layers, k), one step a token; negative or 255 as uint8 = not run."""
        plain = ids.astype(np.int16)
        if ids.dtype.kind == "u":
            plain[ids == np.iinfo(ids.dtype).max] = -1
        n_tokens, n_layers, k = ids.shape
        starts = np.zeros(n_tokens, np.bool_)
        starts[np.asarray(prompt_start, np.int64)] = True
        width = int(plain.max(initial=0)) + 1 if n_experts is None else n_experts
        return cls(
            ids=np.ascontiguousarray(plain),
            bounds=np.arange(n_tokens + 1),
            path=np.where((plain >= 0).any(axis=2), POOL, NOT_RUN).astype(np.uint8),
            starts=starts,
            n_experts=np.full(n_layers, width),
            k=np.full(n_layers, k),
        )


@dataclass(frozen=True, eq=False)
class Result:
    """What a replay counted.

    admitted : experts that came into a slot; fewer than `counters.fills`, those that crossed the link, only
        with optional admission
    missed : uint8 (n_tokens, n_layers): experts missed by each row; None if not asked for
    """

    counters: Counters
    admitted: int
    missed: NDArray[np.uint8] | None = None

    @property
    def hit_rate(self) -> float:
        return self.counters.hit_rate


@dataclass(eq=False)
class Simulation:
    """A pool, the rule, and what they counted so far; `run` goes on from where it stopped.

    Parameters
    ----------
    n_slots
        Slots of each layer: a number or an array; with pool "global" their sum is shared by all layers.
    rule
        "lru"; "frequency" and "lfru" with `half_life` in tokens (infinite: all-time counts); "table": scores
        given to `run`; "optimum": the offline optimum, forced or optional as `admission` says.
    bonus
        Of a table: what a use since the publication adds, one number or one for each layer.
    delay
        Of a table: the steps between a table's publication and the step it acts on; see `simulate_scores`.
    detail
        Keep the misses of every row.
    """

    routing: Routing
    n_slots: Any
    rule: str = "lru"
    half_life: float = 16
    pool: str = "layer"
    admission: str = "forced"
    cold: bool = False
    bonus: ArrayLike = 0.0
    delay: int = 0
    detail: bool = False
    at: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        routing = self.routing
        choice("rule", self.rule, _RULES)
        choice("pool", self.pool, ("layer", "global"))
        choice("admission", self.admission, ("forced", "optional"))
        if self.half_life != np.inf:
            number("half_life", self.half_life, above=0)
        shape = routing.shape
        self._slots = np.minimum(
            np.broadcast_to(np.asarray(self.n_slots, np.int64), shape[:1]), routing.n_experts
        )
        if (self._slots < routing.k).any():
            raise bad_value("n_slots", self.n_slots, f"at least the {routing.k.max()} experts of a token")
        self._bonus = np.ascontiguousarray(np.broadcast_to(np.asarray(self.bonus, np.float32), shape[:1]))
        longest = int(np.diff(routing.bounds).max(initial=1))
        decay = 2.0 ** (-1 / self.half_life)
        self._powers = decay ** np.arange(longest + 1)
        self._decays = np.array([decay**n for n in range(longest + 1)])
        self._next = np.zeros((1, 1, 1), np.int32)
        if self.rule == "optimum":
            self._next = _next_uses(routing.ids, routing.bounds, routing.path, self._slots // routing.k, *shape)
        self._position = np.full(shape, -1, np.int32)
        self._resident = np.zeros(shape, np.int32)
        self._n_resident = np.zeros(shape[0], np.int64)
        self._score = np.zeros(shape, np.float32)
        self._last_use = np.zeros(shape, np.int64)
        self._count = np.zeros(shape)
        self._last_token = np.zeros(shape, np.int64)
        self._clocks = np.zeros(self.delay + 2, np.int64)
        self._counts = np.zeros((shape[0], 9), np.int64)
        rows = len(routing.ids) if self.detail else 0
        self._missed = np.zeros((rows, shape[0]), np.uint8)

    def run(self, stop: int | None = None, tables: NDArray[np.float32] | None = None) -> None:
        """Go on up to the step `stop`; with rule "table", `tables` holds those of the steps until then."""
        stop = self.routing.n_steps if stop is None else stop
        shape = (stop - self.at if self.rule == "table" else 0, *self.routing.shape)
        if tables is None:
            tables = np.zeros((0, *shape[1:]), np.float32)
        if tables.shape != shape:
            raise FateError(f"score tables have shape {tables.shape}; expected {shape}")
        routing = self.routing
        _run(
            self.at,
            stop,
            routing.ids,
            routing.bounds,
            routing.path,
            routing.starts & self.cold,
            self._slots,
            routing.k,
            _RULES.index(self.rule),
            self.pool == "global",
            self.admission == "optional",
            np.ascontiguousarray(tables, np.float32),
            self._bonus,
            self._powers,
            self._decays,
            self._next,
            self._position,
            self._resident,
            self._n_resident,
            self._score,
            self._last_use,
            self._count,
            self._last_token,
            self._clocks,
            self._counts,
            self._missed,
        )
        self.at = stop

    def result(self, expert_bytes: ArrayLike = 0) -> Result:
        """Return the counts up to here."""
        routing, counts = self.routing, self._counts
        counters = Counters.zeros(len(counts))
        columns = (_HITS, _MISSES, _STAGED, _BYPASSED, _SEEDED, _EVICTED, _ROWS, _ROWS_ALL)
        names = ("hits", "misses", "staged", "bypassed", "seed_fills", "evictions", "rows", "rows_all_resident")
        for name, column in zip(names, columns, strict=True):
            getattr(counters, name)[:] = counts[:, column]
        counters.routed[:] = counts[:, [_HITS, _MISSES, _STAGED, _BYPASSED]].sum(axis=1)
        counters.fills[:] = counters.misses + counters.seed_fills
        counters.bytes[:] = counters.fills * np.asarray(expert_bytes, np.int64)
        counters.tokens = int(routing.bounds[self.at])
        counters.steps = self.at
        admitted = int(counts[:, [_ADMITTED, _SEEDED]].sum())
        return Result(counters, admitted, self._missed if self.detail else None)


def simulate(
    ids: NDArray[np.integer] | Routing,
    n_slots: Any,
    rule: str = "lru",
    *,
    prompt_start: ArrayLike = (0,),
    n_experts: int | None = None,
    half_life: float = 16,
    pool: str = "layer",
    admission: str = "forced",
    cold: bool = False,
    detail: bool = False,
) -> Result:
    """Replay ids (n_tokens, n_layers, k), or a `Routing`, under a built-in rule; see `Simulation`."""
    if not isinstance(ids, Routing):
        ids = Routing.of_ids(ids, prompt_start, n_experts)
    simulation = Simulation(
        ids, n_slots, rule, half_life=half_life, pool=pool, admission=admission, cold=cold, detail=detail
    )
    simulation.run()
    return simulation.result()


def simulate_scores(
    ids: NDArray[np.integer] | Routing,
    n_slots: Any,
    scores: Scores,
    *,
    prompt_start: ArrayLike = (0,),
    n_experts: int | None = None,
    bonus: ArrayLike = 0.0,
    delay: int = 0,
    pool: str = "layer",
    admission: str = "forced",
    cold: bool = False,
    detail: bool = False,
) -> Result:
    """Replay ids under score tables: table t decides what goes when token (or step) t runs.

    Parameters
    ----------
    scores
        float32 (n_steps, n_layers, n_experts), higher stays, or a function of (start, stop) that returns
        those of these steps; it is asked in order, `TABLE_BYTES` at a time.
    bonus
        What a use since the publication adds. Without delay only an expert at its admission has one.
    delay
        Steps by which tables act late: table t decides at step t + delay, and until the first one comes all
        scores are equal.
    """
    if not isinstance(ids, Routing):
        ids = Routing.of_ids(ids, prompt_start, n_experts)
    simulation = Simulation(
        ids, n_slots, "table", pool=pool, admission=admission, cold=cold, bonus=bonus, delay=delay, detail=detail
    )
    n_layers, width = ids.shape
    chunk = max(1, TABLE_BYTES // (4 * n_layers * width))
    held = np.zeros((delay, n_layers, width), np.float32)
    for start in range(0, ids.n_steps, chunk):
        stop = min(start + chunk, ids.n_steps)
        fresh = scores(start, stop) if callable(scores) else scores[start:stop]
        late = np.concatenate((held, fresh)) if delay else fresh
        simulation.run(stop, late[: stop - start])
        held = late[stop - start :]
    return simulation.result()


@njit(cache=True, nogil=True)  # type: ignore[misc]
def _next_uses(ids, bounds, path, seed_rows, n_layers, width):  # type: ignore[no-untyped-def]
    """Return the step of each use's next need of a slot, as `OfflinePolicy.foresee` defines needs."""
    n_steps = len(bounds) - 1
    following = np.full((n_layers, width), n_steps, np.int32)
    out = np.full(ids.shape, n_steps, np.int32)
    for step in range(n_steps - 1, -1, -1):
        for layer in range(n_layers):
            first = _first_need(bounds[step], bounds[step + 1], path, layer, seed_rows[layer])
            for row in range(first, bounds[step + 1]):
                for rank in range(ids.shape[2]):
                    expert = ids[row, layer, rank]
                    if expert >= 0:
                        out[row, layer, rank] = following[layer, expert]
            for row in range(first, bounds[step + 1]):
                for rank in range(ids.shape[2]):
                    expert = ids[row, layer, rank]
                    if expert >= 0:
                        following[layer, expert] = step
    return out


@njit(cache=True, nogil=True)  # type: ignore[misc]
def _first_need(start, stop, path, layer, seed_rows):  # type: ignore[no-untyped-def]
    """Return the first row of a step whose experts need slots: past the pool, the last `seed_rows`."""
    kind = NOT_RUN
    for row in range(start, stop):
        kind = max(kind, path[row, layer])
    if kind <= POOL:
        return start
    left = seed_rows
    for row in range(stop - 1, start - 1, -1):
        if path[row, layer] != NOT_RUN:
            left -= 1
            if left == 0:
                return row
    return start


@njit(cache=True, nogil=True)  # type: ignore[misc]
def _key(layer, expert, used_now, rule, token, bonus, published, score, last_use, count, last_token):  # type: ignore[no-untyped-def]
    """Return the first part of the key by which an expert stays."""
    if rule == _FREQUENCY:
        value = np.float32(count[layer, expert])
    elif rule == _LFRU:
        value = np.float32(count[layer, expert] / (token - last_token[layer, expert] + 1))
    else:
        value = score[layer, expert]
    if used_now or last_use[layer, expert] > published:
        value = np.float32(value + bonus[layer])
    return value


@njit(cache=True, nogil=True)  # type: ignore[misc]
def _worst(  # type: ignore[no-untyped-def]
    layer,
    pin,
    op,
    spare,
    rule,
    token,
    bonus,
    published,
    resident,
    n_resident,
    score,
    last_use,
    count,
    last_token,
):
    """Return where the least resident of a layer lies, or -1, with its key.

    What the op at hand needs is left out, or with `spare` taken as used already.
    """
    found, key, age, worst = -1, np.float32(np.inf), _NOW, -1
    for i in range(n_resident[layer]):
        expert = resident[layer, i]
        pinned = pin[layer, expert] == op
        if pinned and not spare:
            continue
        if rule == _LRU:
            value = np.float32(0)
        else:
            value = _key(
                layer, expert, pinned, rule, token, bonus, published, score, last_use, count, last_token
            )
            if value > key:
                continue
        used = np.int64(0) if rule == _OPTIMUM else _NOW if pinned else last_use[layer, expert]
        if found < 0 or value < key or used < age or (used == age and expert < worst):
            found, key, age, worst = i, value, used, expert
    return found, key, age


@njit(cache=True, nogil=True)  # type: ignore[misc]
def _run(  # type: ignore[no-untyped-def]
    begin,
    end,
    ids,
    bounds,
    path,
    cold,
    slots,
    k,
    rule,
    whole,
    optional,
    tables,
    bonus,
    powers,
    decays,
    next_use,
    position,
    resident,
    n_resident,
    score,
    last_use,
    count,
    last_token,
    clocks,
    counts,
    missed_rows,
):
    n_layers, width = position.shape
    capacity = slots.sum()
    total = n_resident.sum()
    clock = clocks[0]
    token = bounds[begin]
    if rule == _FREQUENCY or rule == _LFRU:
        bonus = np.ones(n_layers, np.float32)
    pin = np.full((n_layers, width), -1, np.int64)
    seen = np.full((n_layers, width), -1, np.int64)
    op = 0
    absent = np.empty(width, np.int64)
    keys = np.empty(width, np.float32)
    added = np.zeros(width)
    kinds = np.zeros(n_layers, np.int64)
    known = np.zeros(n_layers, np.bool_)  # of the whole-model pool: the least of each layer
    known_at = np.zeros(n_layers, np.int64)
    known_key = np.zeros(n_layers, np.float32)
    known_age = np.zeros(n_layers, np.int64)
    for step in range(begin, end):
        start, stop = bounds[step], bounds[step + 1]
        if cold[step]:
            position[:] = -1
            n_resident[:] = 0
            total = 0
        for i in range(len(clocks) - 1, 1, -1):
            clocks[i] = clocks[i - 1]
        clocks[1] = clock
        published = clocks[len(clocks) - 1]
        if rule == _TABLE:
            score[:] = tables[step - begin]
        if rule != _LRU:
            known[:] = False
        # The pool path of every layer, then the seeding of those that went past it.
        for phase in range(2):
            for layer in range(n_layers):
                if phase == 0:
                    kind = 0
                    for row in range(start, stop):
                        kind = max(kind, path[row, layer])
                    kinds[layer] = kind
                kind = kinds[layer]
                if kind == NOT_RUN or (phase == 1 and kind == POOL):
                    continue
                first = start
                if kind > POOL:
                    first = _first_need(start, stop, path, layer, slots[layer] // k[layer])
                op += 1
                if phase == 1 or kind == POOL:
                    n_absent = 0
                    n_hits = 0
                    for row in range(first, stop):
                        n_missed = 0
                        ran = False
                        for rank in range(ids.shape[2] - 1, -1, -1):
                            expert = ids[row, layer, rank]
                            if expert < 0:
                                continue
                            ran = True
                            if position[layer, expert] < 0 and seen[layer, expert] != op:
                                seen[layer, expert] = op
                                absent[n_absent] = expert
                                n_absent += 1
                                n_missed += 1
                            else:
                                n_hits += 1
                            pin[layer, expert] = op
                            if rule == _OPTIMUM:
                                score[layer, expert] = -next_use[row, layer, rank]
                        if phase == 0 and ran:
                            counts[layer, _ROWS] += 1
                            if n_missed == 0:
                                counts[layer, _ROWS_ALL] += 1
                            elif len(missed_rows):
                                missed_rows[row, layer] = n_missed
                    if phase == 0:
                        counts[layer, _HITS] += n_hits
                        counts[layer, _MISSES] += n_absent
                    else:
                        counts[layer, _SEEDED] += n_absent
                    choosy = optional and phase == 0
                    if choosy:  # the best first
                        for i in range(n_absent):
                            expert = absent[i]
                            value = _key(
                                layer, expert, True, rule, token, bonus, published, score, last_use, count, last_token
                            )
                            j = i
                            while j > 0 and keys[j - 1] < value:
                                keys[j], absent[j] = keys[j - 1], absent[j - 1]
                                j -= 1
                            keys[j], absent[j] = value, expert
                    for i in range(n_absent):
                        expert = absent[i]
                        full = total >= capacity if whole else n_resident[layer] >= slots[layer]
                        if full:
                            at, value, age = _worst(
                                layer, pin, op, choosy, rule, token, bonus, published,
                                resident, n_resident, score, last_use, count, last_token,
                            )
                            home = layer if at >= 0 else -1
                            if whole:
                                for other in range(n_layers):
                                    if other == layer or n_resident[other] == 0:
                                        continue
                                    if not known[other]:
                                        known_at[other], known_key[other], known_age[other] = _worst(
                                            other, pin, op, choosy, rule, token, bonus, published,
                                            resident, n_resident, score, last_use, count, last_token,
                                        )
                                        known[other] = True
                                    if (
                                        home < 0
                                        or known_key[other] < value
                                        or (known_key[other] == value and known_age[other] < age)
                                    ):
                                        home, at = other, known_at[other]
                                        value, age = known_key[other], known_age[other]
                            if home < 0 or (choosy and (keys[i] < value or (keys[i] == value and age == _NOW))):
                                break
                            position[home, resident[home, at]] = -1
                            n_resident[home] -= 1
                            last = resident[home, n_resident[home]]
                            if at < n_resident[home]:
                                resident[home, at] = last
                                position[home, last] = at
                            known[home] = False
                            total -= 1
                            counts[home, _EVICTED] += 1
                        position[layer, expert] = n_resident[layer]
                        resident[layer, n_resident[layer]] = expert
                        n_resident[layer] += 1
                        total += 1
                        if phase == 0:
                            counts[layer, _ADMITTED] += 1
                    known[layer] = False
                if phase == 0:
                    n_uses = 0
                    for row in range(start, stop):
                        for rank in range(ids.shape[2] - 1, -1, -1):
                            expert = ids[row, layer, rank]
                            if expert >= 0:
                                clock += 1
                                n_uses += 1
                                last_use[layer, expert] = clock
                    if kind == STAGED:
                        counts[layer, _STAGED] += n_uses
                    elif kind == BYPASS:
                        counts[layer, _BYPASSED] += n_uses
                    known[layer] = False
        if rule == _FREQUENCY or rule == _LFRU:
            n = stop - start
            for layer in range(n_layers):
                if decays[n] != 1.0:
                    for expert in range(width):
                        count[layer, expert] *= decays[n]
                if n == 1:
                    for rank in range(ids.shape[2]):
                        expert = ids[start, layer, rank]
                        if expert >= 0:
                            count[layer, expert] += 1.0
                            last_token[layer, expert] = token + 1
                    continue
                added[:] = 0.0
                for row in range(start, stop):
                    for rank in range(ids.shape[2]):
                        expert = ids[row, layer, rank]
                        if expert >= 0:
                            added[expert] += powers[stop - 1 - row]
                            last_token[layer, expert] = token + 1 + row - start
                for expert in range(width):
                    count[layer, expert] += added[expert]
        token += stop - start
    clocks[0] = clock
