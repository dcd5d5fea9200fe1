"""Replay with prefetch at the token boundary: what it saves, what it wastes, counted one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fate_policy.checks import bad_value, integer
from fate_policy.errors import FateError
from fate_policy.kernels import Routing
from fate_policy.loops import compiled


@dataclass(frozen=True)
class Prefetched:
    """What a replay with prefetch counted, over all layers.

    misses : uses of experts that were not there in time: demand misses
    prefetches : experts brought in before they were asked for = useful + evicted_unused + unused_at_end
    useful : those used before they lost their slot
    evicted_unused, unused_at_end : those that lost their slot before any use, and those still waiting
    bytes : (misses + prefetches) times the bytes of an expert
    """

    routed: int
    misses: int
    prefetches: int
    useful: int
    evicted_unused: int
    unused_at_end: int
    bytes: int

    @property
    def hit_rate(self) -> float:
        """Uses found in a slot over all uses; one that a prefetch brought counts if it came in time."""
        return 1 - self.misses / self.routed if self.routed else float("nan")

    @property
    def precision(self) -> float:
        """The share of prefetches used before eviction; nan without any."""
        return self.useful / self.prefetches if self.prefetches else float("nan")


def simulate_prefetch(
    routing: Routing,
    n_slots: Any,
    now: NDArray[np.float32],
    keep: NDArray[np.float32],
    *,
    threshold: float = 0.5,
    per_token: float | None = None,
    bytes_per_token: float | None = None,
    carry_tokens: int = 0,
    expert_bytes: ArrayLike = 1,
) -> Prefetched:
    """Replay single tokens with per-layer pools, forced admission, and prefetch before each token.

    Before a token the absent experts are taken in the order of their chance, while the budget lasts; each
    takes the slot of the least valued resident of its layer, if that is worth less. A resident's value is
    the chance that it is used by this token or soon after. All prefetches are taken to arrive in time.

    Parameters
    ----------
    now, keep
        Chances, float32 (n_tokens, n_layers, n_experts): used by this token; used soon after it. Victims of
        misses go by `keep` alone.
    threshold
        The least chance worth a prefetch.
    per_token, bytes_per_token
        At most so many experts, and bytes, of all layers together before each token; None = no limit.
    carry_tokens
        What a token leaves unspent may be spent later, the leavings of so many tokens at the most, so that
        the limits hold on average.
    """
    if (np.diff(routing.bounds) != 1).any():
        raise FateError("replay with prefetch takes single tokens, and this trace has larger steps")
    shape = (len(routing.ids), *routing.shape)
    if now.shape != shape or keep.shape != shape:
        raise FateError(f"chances have shapes {now.shape} and {keep.shape}; expected {shape}")
    size = np.ascontiguousarray(np.broadcast_to(np.asarray(expert_bytes, np.int64), shape[1:2]))
    slots = np.minimum(np.broadcast_to(np.asarray(n_slots, np.int64), shape[1:2]), routing.n_experts)
    limits = []
    for key, limit in (("per_token", per_token), ("bytes_per_token", bytes_per_token)):
        if limit is not None and not limit >= 0:
            raise bad_value(key, limit, "a number of 0 or more")
        limits.append(np.inf if limit is None else float(limit))
    integer("carry_tokens", carry_tokens, minimum=0)
    counts = np.zeros(7, np.int64)
    _run(routing.ids, slots, now, keep, threshold, limits[0], limits[1], carry_tokens, size, counts)
    return Prefetched(*counts.tolist())


_ROUTED, _MISSES, _PREFETCHES, _USEFUL, _EVICTED, _WAITING, _BYTES = range(7)


@compiled
def _run(
    ids: NDArray[np.int16],
    slots: NDArray[np.int64],
    now: NDArray[np.float32],
    keep: NDArray[np.float32],
    threshold: float,
    most: float,
    most_bytes: float,
    carry: int,
    size: NDArray[np.int64],
    counts: NDArray[np.int64],
) -> None:
    n_tokens, n_layers, k = ids.shape
    n_experts = now.shape[2]
    resident = np.zeros((n_layers, n_experts), np.bool_)
    n_resident = np.zeros(n_layers, np.int64)
    waiting = np.zeros((n_layers, n_experts), np.bool_)  # prefetched and not used yet
    last_use = np.zeros((n_layers, n_experts), np.int64)
    clock = np.zeros(n_layers, np.int64)
    pinned = np.full((n_layers, n_experts), -1, np.int64)
    chance = np.empty(n_layers * n_experts, np.float32)
    where = np.empty(n_layers * n_experts, np.int64)
    left = left_bytes = 0.0
    for t in range(n_tokens):
        left = min(left + most, most * (1 + carry))
        left_bytes = min(left_bytes + most_bytes, most_bytes * (1 + carry))
        n = 0
        for layer in range(n_layers):
            for expert in range(n_experts):
                if not resident[layer, expert] and now[t, layer, expert] >= threshold:
                    chance[n] = -now[t, layer, expert]
                    where[n] = layer * n_experts + expert
                    n += 1
        if n and left >= 1:
            for i in np.argsort(chance[:n], kind="mergesort"):
                layer, expert = where[i] // n_experts, where[i] % n_experts
                if left < 1:
                    break
                if size[layer] > left_bytes:
                    continue
                if n_resident[layer] < slots[layer]:
                    n_resident[layer] += 1
                else:
                    p = now[t, layer, expert]
                    worth = p + (1 - p) * keep[t, layer, expert]
                    victim = -1
                    least = 2.0
                    for e in range(n_experts):
                        if resident[layer, e]:
                            p = now[t, layer, e]
                            value = p + (1 - p) * keep[t, layer, e]
                            if value < least or (
                                value == least and last_use[layer, e] < last_use[layer, victim]
                            ):
                                victim, least = e, value
                    if least >= worth:
                        continue
                    resident[layer, victim] = False
                    if waiting[layer, victim]:
                        waiting[layer, victim] = False
                        counts[_EVICTED] += 1
                resident[layer, expert] = True
                waiting[layer, expert] = True
                counts[_PREFETCHES] += 1
                counts[_BYTES] += size[layer]
                left -= 1
                left_bytes -= size[layer]
        for layer in range(n_layers):
            for j in range(k):
                if ids[t, layer, j] >= 0:
                    pinned[layer, ids[t, layer, j]] = t
            for j in range(k - 1, -1, -1):
                expert = ids[t, layer, j]
                if expert < 0:
                    continue
                counts[_ROUTED] += 1
                if not resident[layer, expert]:
                    counts[_MISSES] += 1
                    counts[_BYTES] += size[layer]
                    if n_resident[layer] < slots[layer]:
                        n_resident[layer] += 1
                    else:
                        victim = -1
                        for e in range(n_experts):
                            if (
                                resident[layer, e]
                                and pinned[layer, e] != t
                                and (
                                    victim < 0
                                    or keep[t, layer, e] < keep[t, layer, victim]
                                    or (
                                        keep[t, layer, e] == keep[t, layer, victim]
                                        and last_use[layer, e] < last_use[layer, victim]
                                    )
                                )
                            ):
                                victim = e
                        resident[layer, victim] = False
                        if waiting[layer, victim]:
                            waiting[layer, victim] = False
                            counts[_EVICTED] += 1
                    resident[layer, expert] = True
                elif waiting[layer, expert]:
                    waiting[layer, expert] = False
                    counts[_USEFUL] += 1
            for j in range(k - 1, -1, -1):
                if ids[t, layer, j] >= 0:
                    clock[layer] += 1
                    last_use[layer, ids[t, layer, j]] = clock[layer]
    counts[_WAITING] = waiting.sum()
