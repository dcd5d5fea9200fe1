"""How good single evictions are, beside the victim that the optimum would choose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fate_policy.kernels import Routing
from fate_policy.loops import compiled


@dataclass(frozen=True)
class Decisions:
    """What became of the victims of a replay.

    n : evictions
    as_optimum : share whose victim is among those with the farthest next use
    used_again : share whose victim was used again before that of the optimum, within `window` tokens
    """

    n: int
    as_optimum: float
    used_again: float


def decisions(
    routing: Routing, n_slots: int, scores: NDArray[np.float32], window: int, delay: int = 0
) -> Decisions:
    """Replay single tokens, forced admission, per-layer pools, and judge every eviction.

    scores : float32 (n_tokens, n_layers, n_experts); all equal is LRU
    """
    counts = np.zeros(3, np.int64)
    for layer in range(routing.shape[0]):
        ids = np.ascontiguousarray(routing.ids[:, layer])
        table = np.ascontiguousarray(scores[:, layer])
        _judge(ids, table, n_slots, window, delay, counts)
    n = max(1, int(counts[0]))
    return Decisions(int(counts[0]), counts[1] / n, counts[2] / n)


def reaches(ids: NDArray[np.integer], n_experts: int, n_slots: ArrayLike, most: int) -> NDArray[np.int64]:
    """Return, (n_tokens, n_layers), the tokens to the next use of the victim that the optimum would choose.

    Under forced admission with per-layer pools, of ids (n_tokens, n_layers, k), -1 = not run; at most `most`,
    which also stands for a victim that is never used again and for a layer that still has a free slot.
    """
    slots = np.broadcast_to(np.asarray(n_slots, np.int64), ids.shape[1:2])
    found = np.empty(ids.shape[:2], np.int64)
    for layer in range(ids.shape[1]):
        found[:, layer] = _reach(ids[:, layer].astype(np.int16), n_experts, slots[layer], most)
    return found


@compiled
def _following(ids: NDArray[np.int16], n_experts: int, never: int) -> NDArray[np.int32]:
    n_tokens, k = ids.shape
    following = np.empty((n_tokens, n_experts), np.int32)
    upcoming = np.full(n_experts, never)
    for t in range(n_tokens - 1, -1, -1):
        following[t] = upcoming
        for j in range(k):
            if ids[t, j] >= 0:
                upcoming[ids[t, j]] = t
    return following


@compiled
def _farthest(
    resident: NDArray[np.bool_], pinned: NDArray[np.int64], t: int, following: NDArray[np.int32]
) -> int:
    """Return the resident that token t does not need and that is used last, -1 if there is none."""
    victim = -1
    for expert in range(len(resident)):
        if resident[expert] and pinned[expert] != t and (victim < 0 or following[expert] > following[victim]):
            victim = expert
    return victim


@compiled
def _reach(ids: NDArray[np.int16], n_experts: int, n_slots: int, most: int) -> NDArray[np.int64]:
    n_tokens, k = ids.shape
    following = _following(ids, n_experts, n_tokens + most)
    found = np.full(n_tokens, most)
    resident = np.zeros(n_experts, np.bool_)
    pinned = np.full(n_experts, -1)
    n_resident = 0
    for t in range(n_tokens):
        for j in range(k):
            if ids[t, j] >= 0:
                pinned[ids[t, j]] = t
        if n_resident == n_slots:
            victim = _farthest(resident, pinned, t, following[t])
            if victim >= 0:
                found[t] = min(most, following[t, victim] - t)
        for j in range(k):
            expert = ids[t, j]
            if expert < 0 or resident[expert]:
                continue
            if n_resident == n_slots:
                resident[_farthest(resident, pinned, t, following[t])] = False
            else:
                n_resident += 1
            resident[expert] = True
    return found


@compiled
def _judge(
    ids: NDArray[np.int16],
    score: NDArray[np.float32],
    n_slots: int,
    window: int,
    delay: int,
    counts: NDArray[np.int64],
) -> None:
    n_tokens, k = ids.shape
    n_experts = score.shape[1]
    following = _following(ids, n_experts, n_tokens + window)
    resident = np.zeros(n_experts, np.bool_)
    pinned = np.full(n_experts, -1)
    last_use = np.zeros(n_experts, np.int64)
    n_resident = clock = 0
    for t in range(n_tokens):
        at = max(0, t - delay)
        for j in range(k):
            if ids[t, j] >= 0:
                pinned[ids[t, j]] = t
        for j in range(k - 1, -1, -1):
            expert = ids[t, j]
            if expert < 0 or resident[expert]:
                continue
            if n_resident < n_slots:
                n_resident += 1
            else:
                victim = -1
                farthest = -1
                for e in range(n_experts):
                    if resident[e] and pinned[e] != t:
                        farthest = max(farthest, following[t, e])
                        if (
                            victim < 0
                            or score[at, e] < score[at, victim]
                            or (score[at, e] == score[at, victim] and last_use[e] < last_use[victim])
                        ):
                            victim = e
                resident[victim] = False
                counts[0] += 1
                counts[1] += following[t, victim] == farthest
                counts[2] += following[t, victim] < farthest and following[t, victim] - t <= window
            resident[expert] = True
        for j in range(k - 1, -1, -1):
            if ids[t, j] >= 0:
                clock += 1
                last_use[ids[t, j]] = clock
