"""The decision rule: who is evicted, and what a step does to a layer's slots.

`fate_bind/native/rule.h` is the same rule for the engine; replay of a recorded trace must give the engine's
counters, so a change here is a change there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Ask = Callable[[int, NDArray[np.bool_]], NDArray[np.int32]]
"""Question `(n, pinned bool (n_experts,)) -> n experts to evict`."""

SEED_PAIRS = 1024
"""At most so many uses seed, or as many as there are slots."""

_NONE = np.empty(0, np.int32)


def first_seed_row(ids: NDArray[np.integer], k: int, n_slots: int) -> int:
    """Return the first of an op's last rows whose experts seed the slots after it went past the pool.

    These are as many rows as together use at most `n_slots` experts and are at most `SEED_PAIRS` uses.
    `ids` has shape (n_rows, at least k), -1 = none; a row without an expert did not run. Written so that it
    also compiles.
    """
    used = np.zeros(ids.max() + 1, np.bool_)
    n_used = 0
    n_left = max(SEED_PAIRS, n_slots) // k
    first = len(ids)
    for row in range(len(ids) - 1, -1, -1):
        ran = False
        for rank in range(ids.shape[1]):
            expert = ids[row, rank]
            if expert >= 0:
                ran = True
                if not used[expert]:
                    used[expert] = True
                    n_used += 1
        if ran:
            if n_left == 0 or n_used > n_slots:
                break
            n_left -= 1
            first = row
    return first


def pick_victims(
    candidates: NDArray[np.integer],
    n: int,
    score: NDArray[np.float32],
    bonus: float | np.float32,
    last_use: NDArray[np.int64],
    published_at: int,
) -> NDArray[np.int32]:
    """Return the `n` candidates with the least (score + bonus if used after `published_at`, last use, id).

    `score` and `last_use` are indexed by expert; fewer than `n` are returned if there are fewer candidates.
    """
    used = last_use[candidates]
    key = score[candidates]
    if bonus:
        key = np.where(used > published_at, key + np.float32(bonus), key)
    return candidates[np.lexsort((candidates, used, key))[:n]].astype(np.int32)


class LayerTable:
    """The slots of one layer, its clock, and the scores in force.

    `uses` everywhere: experts in order of use, that is by row, then from the worst to the best router rank.
    """

    def __init__(self, n_experts: int, n_slots: int) -> None:
        self.slot_of = np.full(n_experts, -1, np.int32)
        self.expert_of = np.full(n_slots, -1, np.int32)  # filled from the first on, and never emptied
        self.n_resident = 0
        self.last_use = np.zeros(n_experts, np.int64)
        self.clock = 0
        self.score = np.zeros(n_experts, np.float32)
        self.bonus = np.float32(0)
        self.published_at = 0

    def publish(self, score: NDArray[np.float32], bonus: np.float32, published_at: int) -> None:
        """Put scores in force; `published_at` is the clock up to which their maker had seen the uses."""
        self.score[:] = score
        self.bonus = bonus
        self.published_at = published_at

    def use(self, uses: NDArray[np.integer]) -> None:
        """Stamp the uses with the clock; the last stamp of an expert stays."""
        self.last_use[uses] = np.arange(self.clock + 1, self.clock + 1 + len(uses))
        self.clock += len(uses)

    def misses(self, uses: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Say for each use whether it is the first use of an absent expert."""
        miss: NDArray[np.bool_] = self.slot_of[uses] < 0
        absent = uses[miss].tolist()
        if len(set(absent)) < len(absent):
            seen: set[int] = set()
            for i in miss.nonzero()[0].tolist():
                expert = int(uses[i])
                miss[i] = expert not in seen
                seen.add(expert)
        return miss

    def bring(
        self, uses: NDArray[np.int32], ask: Ask | None = None, kept: NDArray[np.int32] = _NONE
    ) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """Make all experts of `uses` resident; return which uses missed, and the evicted in order.

        A miss takes the lowest free slot, then those of the victims that `ask` names, by default the rule's;
        neither uses nor `kept` experts are victims. The uses are not stamped: `use` does that.
        """
        miss = self.misses(uses)
        absent = uses[miss]
        evicted = _NONE
        if len(absent):
            n_victims = len(absent) - (len(self.expert_of) - self.n_resident)
            if n_victims > 0:
                pinned = np.zeros(len(self.slot_of), np.bool_)
                pinned[uses] = pinned[kept] = True
                evicted = (ask or self.victims)(n_victims, pinned)
            self.place(absent, evicted)
        return miss, evicted

    def place(self, experts: NDArray[np.int32], evicted: NDArray[np.int32]) -> None:
        """Put absent experts into the lowest free slots, in order, then into those of `evicted`."""
        n_free = len(experts) - len(evicted)
        slots = np.concatenate((np.arange(self.n_resident, self.n_resident + n_free), self.slot_of[evicted]))
        self.slot_of[evicted] = -1
        self.n_resident += n_free
        self.expert_of[slots] = experts
        self.slot_of[experts] = slots

    def victims(self, n: int, pinned: NDArray[np.bool_]) -> NDArray[np.int32]:
        resident = self.expert_of[: self.n_resident]
        return pick_victims(
            resident[~pinned[resident]], n, self.score, self.bonus, self.last_use, self.published_at
        )
