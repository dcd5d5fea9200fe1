"""The compiled loops behind `fate_policy.kernels`; numba takes only plain arrays and numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fate_policy.base import BYPASS, NOT_RUN, POOL, STAGED
from fate_policy.errors import FateError
from fate_policy.rule import first_seed_row

try:
    from numba import njit
except ImportError as error:
    raise FateError("replay in compiled loops needs numba: run `pip install 'fate[lab]'`") from error

compiled = njit(cache=True, nogil=True)
inlined = njit(cache=True, nogil=True, forceinline=True)  # half of a loop is in passing so many arrays
_first_seed_row = compiled(first_seed_row)  # numba's cache goes by this file's date, not by that of rule.py

RULES = ("lru", "frequency", "lfru", "table", "optimum")
LRU, FREQUENCY, LFRU, TABLE, OPTIMUM = range(5)
COUNTS = (
    "hits",
    "misses",
    "staged",
    "bypassed",
    "seed_fills",
    "evictions",
    "rows",
    "rows_all_resident",
    "admitted",
)
HITS, MISSES, STAGED_USES, BYPASSED, SEEDED, EVICTED, ROWS, ROWS_ALL, ADMITTED = range(9)
_NOW = np.int64(2**62)
_MOST = np.int32(2**31 - 1)
"""Above every key, as `_ordered` gives them."""


class Flow(NamedTuple):
    """What was routed; `next_use` only for the optimum."""

    ids: NDArray[np.int16]
    bounds: NDArray[np.int64]
    path: NDArray[np.uint8]
    cold: NDArray[np.bool_]
    next_use: NDArray[np.int32]


class Rule(NamedTuple):
    """How is decided; `bonus` float32 (n_layers,), `powers` and `decays` by number of tokens."""

    kind: int
    whole: bool
    optional: bool
    slots: NDArray[np.int64]
    k: NDArray[np.int64]
    bonus: NDArray[np.float32]
    powers: NDArray[np.float64]
    decays: NDArray[np.float64]


class State(NamedTuple):
    """The pool and what the rule remembers, (n_layers, n_experts) unless said otherwise.

    resident, n_resident : bool, and int64 (n_layers,): which experts are in slots, and how many
    score : of the step at hand
    uses, last_token : float64: decayed count, and the token of the last use, counted from 1
    pin : int64: the last op that needed the expert
    clocks : int64 (3 + delay,): uses so far, then those that the scores' maker had seen, then those at the
        start of this step and the steps before
    """

    resident: NDArray[np.bool_]
    n_resident: NDArray[np.int64]
    score: NDArray[np.float32]
    last_use: NDArray[np.int64]
    uses: NDArray[np.float64]
    last_token: NDArray[np.float64]
    pin: NDArray[np.int64]
    clocks: NDArray[np.int64]

    @classmethod
    def empty(cls, n_layers: int, n_experts: int, delay: int) -> State:
        shape = (n_layers, n_experts)
        return cls(
            resident=np.zeros(shape, np.bool_),
            n_resident=np.zeros(n_layers, np.int64),
            score=np.zeros(shape, np.float32),
            last_use=np.zeros(shape, np.int64),
            uses=np.zeros(shape),
            last_token=np.zeros(shape),
            pin=np.full(shape, -1, np.int64),
            clocks=np.zeros(3 + delay, np.int64),
        )


@compiled
def next_uses(ids: Any, bounds: Any, path: Any, slots: Any, k: Any, n_layers: int, width: int) -> Any:
    """Return the step of each use's next need of a slot, as `OfflinePolicy.foresee` defines needs."""
    n_steps = len(bounds) - 1
    following = np.full((n_layers, width), n_steps, np.int32)
    out = np.full(ids.shape, n_steps, np.int32)
    for step in range(n_steps - 1, -1, -1):
        for layer in range(n_layers):
            first = _first_need(bounds[step], bounds[step + 1], ids, path, layer, slots[layer], k[layer])
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


@compiled
def _path_of(start: int, stop: int, path: Any, layer: int) -> Any:
    kind = NOT_RUN
    for row in range(start, stop):
        kind = max(kind, path[row, layer])
    return kind


@compiled
def _first_need(start: int, stop: int, ids: Any, path: Any, layer: int, n_slots: int, k: int) -> Any:
    """Return the first row of a step whose experts need slots: past the pool, the first that seeds."""
    if _path_of(start, stop, path, layer) <= POOL:
        return start
    return start + _first_seed_row(ids[start:stop, layer], k, n_slots)


@inlined
def _ordered(value: Any) -> Any:
    """Return a whole number that orders as the float32 does: least numbers are found many at a time."""
    bits = np.float32(value + np.float32(0)).view(np.int32)  # -0 is 0
    return bits ^ ((bits >> 31) & _MOST)


@inlined
def _least(
    layer: int,
    op: int,
    spare: bool,
    published: Any,
    kind: int,
    bonus: Any,
    resident: Any,
    pin: Any,
    score: Any,
    last_use: Any,
    keys: Any,
) -> Any:
    """Return the least resident of a layer, or -1, with its key and its age.

    What the op at hand needs is left out, or with `spare` taken as used already. Passes without a branch over
    all experts take less time than one over the residents that guesses at every comparison.
    """
    width = len(keys)
    key = _MOST
    for expert in range(width):
        pinned = pin[layer, expert] == op
        own = np.int32(0)
        if kind != LRU:
            value = score[layer, expert]
            if pinned or last_use[layer, expert] > published:
                value += bonus[layer]
            own = _ordered(value)
        if not resident[layer, expert] or (pinned and not spare):
            own = _MOST
        keys[expert] = own
        key = min(key, own)
    if key == _MOST:
        return -1, key, _NOW
    age = np.int64(0)
    if kind != OPTIMUM:
        age = _NOW
        for expert in range(width):
            used = _NOW if pin[layer, expert] == op else last_use[layer, expert]
            age = min(age, used if keys[expert] == key else _NOW)
    for expert in range(width):
        used = _NOW if pin[layer, expert] == op else last_use[layer, expert]
        if keys[expert] == key and (kind == OPTIMUM or used == age):
            return expert, key, age
    return -1, key, age


@compiled
def _score(token: int, kind: int, score: Any, uses: Any, last_token: Any) -> None:
    """Turn counts into the scores of the step that starts with `token`."""
    n_layers, width = score.shape
    for layer in range(n_layers):
        for expert in range(width):
            if kind == FREQUENCY:
                score[layer, expert] = uses[layer, expert]
            else:
                score[layer, expert] = uses[layer, expert] / (token - last_token[layer, expert] + 1)


@compiled
def _count_frequencies(start: int, stop: int, flow: Flow, rule: Rule, state: State) -> None:
    n_layers, width = state.score.shape
    n = stop - start
    added = np.zeros(width)
    for layer in range(n_layers):
        if rule.decays[n] != 1:
            for expert in range(width):
                state.uses[layer, expert] *= rule.decays[n]
        if n > 1:
            added[:] = 0
        for row in range(start, stop):
            for rank in range(flow.ids.shape[2]):
                expert = flow.ids[row, layer, rank]
                if expert >= 0:
                    state.last_token[layer, expert] = row + 1
                    if n == 1:
                        state.uses[layer, expert] += 1
                    else:
                        added[expert] += rule.powers[stop - 1 - row]
        if n > 1:
            for expert in range(width):
                state.uses[layer, expert] += added[expert]


@inlined
def _stamp(start: int, stop: int, layer: int, clock: int, ids: Any, last_use: Any) -> Any:
    """Give every use its time and return how many there are."""
    n_uses = 0
    for row in range(start, stop):
        for rank in range(ids.shape[2] - 1, -1, -1):
            expert = ids[row, layer, rank]
            if expert >= 0:
                n_uses += 1
                last_use[layer, expert] = clock + n_uses
    return n_uses


@compiled
def run(
    begin: int,
    end: int,
    fresh: bool,
    flow: Flow,
    rule: Rule,
    state: State,
    tables: Any,
    counts: Any,
    missed_rows: Any,
) -> None:
    """Take the steps from `begin` up to `end`; `tables[i]` is in force in step begin + i.

    `fresh`: scores were published between these steps; otherwise the last publication stays the last.
    """
    # Taken apart once: a helper that is given a whole tuple costs more than its work.
    ids, bounds, path, cold, next_use = flow
    decides, whole, optional, slots, k, bonus, _, _ = rule
    resident, n_resident, score, last_use, uses, last_token, pin, clocks = state
    n_layers, width = resident.shape
    capacity = slots.sum()
    total = n_resident.sum()
    changing = decides in (FREQUENCY, LFRU, TABLE)
    pin[:] = -1
    kinds = np.zeros(n_layers, np.int64)
    seen = np.full((n_layers, width), -1, np.int64)
    op = 0
    absent = np.empty(width, np.int64)
    worth = np.empty(width, np.int32)
    keys = np.empty(width, np.int32)
    # The least resident of each layer, where known: a pool of the whole model has many layers to look at.
    known = np.zeros(n_layers, np.bool_)
    known_expert = np.zeros(n_layers, np.int64)
    known_key = np.zeros(n_layers, np.int32)
    known_age = np.zeros(n_layers, np.int64)
    for step in range(begin, end):
        start, stop = bounds[step], bounds[step + 1]
        if cold[step]:
            resident[:] = False
            n_resident[:] = 0
            total = 0
            known[:] = False
        clocks[3:] = clocks[2:-1].copy()
        clocks[2] = clocks[0]
        if fresh:
            clocks[1] = clocks[-1]
        if decides == TABLE:
            score[:] = tables[step - begin]
        elif changing:
            _score(start, decides, score, uses, last_token)
        if changing:
            known[:] = False
        for layer in range(n_layers):
            kinds[layer] = _path_of(start, stop, path, layer)
        published = clocks[1]
        for seeding in (False, True):
            for layer in range(n_layers):
                kind = kinds[layer]
                if kind == NOT_RUN or (seeding and kind == POOL):
                    continue
                if seeding or kind == POOL:
                    first = start
                    if seeding:
                        first = _first_need(start, stop, ids, path, layer, slots[layer], k[layer])
                    op += 1
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
                            if not resident[layer, expert] and seen[layer, expert] != op:
                                seen[layer, expert] = op
                                absent[n_absent] = expert
                                n_absent += 1
                                n_missed += 1
                            else:
                                n_hits += 1
                            pin[layer, expert] = op
                            if decides == OPTIMUM:
                                score[layer, expert] = -next_use[row, layer, rank]
                        if ran and not seeding:
                            counts[layer, ROWS] += 1
                            if n_missed == 0:
                                counts[layer, ROWS_ALL] += 1
                            elif len(missed_rows):
                                missed_rows[row, layer] = n_missed
                    if seeding:
                        counts[layer, SEEDED] += n_absent
                    else:
                        counts[layer, HITS] += n_hits
                        counts[layer, MISSES] += n_absent
                    choosy = optional and not seeding and decides != LRU  # which takes in every miss
                    # What the op needs is no longer free to go, or worth more.
                    if choosy or seeding or known_expert[layer] < 0 or pin[layer, known_expert[layer]] == op:
                        known[layer] = False
                    if choosy:  # the best first
                        for i in range(n_absent):
                            expert = absent[i]
                            value = _ordered(score[layer, expert] + bonus[layer])
                            j = i
                            while j > 0 and worth[j - 1] < value:
                                worth[j], absent[j] = worth[j - 1], absent[j - 1]
                                j -= 1
                            worth[j], absent[j] = value, expert
                    shares_from, shares_to = (0, n_layers) if whole else (layer, layer + 1)
                    for i in range(n_absent):
                        full = total >= capacity if whole else n_resident[layer] >= slots[layer]
                        if full:
                            for other in range(shares_from, shares_to):
                                if not known[other]:
                                    known_expert[other], known_key[other], known_age[other] = _least(
                                        other,
                                        op,
                                        choosy,
                                        published,
                                        decides,
                                        bonus,
                                        resident,
                                        pin,
                                        score,
                                        last_use,
                                        keys,
                                    )
                                    known[other] = True
                            key, age = _MOST, _NOW
                            for other in range(shares_from, shares_to):
                                key = min(key, known_key[other])
                            for other in range(shares_from, shares_to):
                                age = min(age, known_age[other] if known_key[other] == key else _NOW)
                            home = layer  # its own residents go first where the optimum sees no difference
                            if known_key[home] != key or known_age[home] != age:
                                home = shares_from
                            while known_key[home] != key or known_age[home] != age:
                                home += 1
                            if choosy and (worth[i] < key or (worth[i] == key and age == _NOW)):
                                break
                            resident[home, known_expert[home]] = False
                            n_resident[home] -= 1
                            known[home] = False
                            total -= 1
                            counts[home, EVICTED] += 1
                        resident[layer, absent[i]] = True
                        n_resident[layer] += 1
                        if choosy:
                            known[layer] = False
                        total += 1
                        if not seeding:
                            counts[layer, ADMITTED] += 1
                if not seeding:
                    n_uses = _stamp(start, stop, layer, clocks[0], ids, last_use)
                    clocks[0] += n_uses
                    if kind == STAGED:
                        counts[layer, STAGED_USES] += n_uses
                    elif kind == BYPASS:
                        counts[layer, BYPASSED] += n_uses
                known[layer] = False
        if decides in (FREQUENCY, LFRU):
            _count_frequencies(start, stop, flow, rule, state)
