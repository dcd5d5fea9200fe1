"""Slots per layer, unequal where that pays: the most hits for the bytes of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fate_policy.checks import bad_value
from fate_policy.compare import make, replay_policy
from fate_policy.config import Slots
from fate_policy.errors import TraceError
from fate_policy.locality import measure
from fate_policy.lru import LRU
from fate_policy.trace import Trace


@dataclass(frozen=True, eq=False)
class Plan:
    """Slots of each layer and the equal ones that cost as much. Arrays int64 (n_layers,)."""

    slots: NDArray[np.int64]
    equal: NDArray[np.int64]
    expert_bytes: NDArray[np.int64]
    budget: int

    @property
    def bytes(self) -> int:
        return int((self.slots * self.expert_bytes).sum())

    def yaml(self, policy: str = "lru", solved_on: Sequence[str] = ()) -> str:
        """Return a configuration that `fate run --fate-policy` takes."""
        where = f" Solved on {', '.join(solved_on)}." if solved_on else ""
        return (
            f"# Slots per layer by marginal hits per byte: {self.bytes} of {self.budget} bytes.{where}\n"
            f"policy: {policy}\nslots: [{', '.join(map(str, self.slots.tolist()))}]\n"
        )


def plan(traces: Sequence[Trace], budget: str | int, expert_bytes: ArrayLike, policy: str = "lru") -> Plan:
    """Share a budget out over the layers.

    Parameters
    ----------
    traces
        Of one model; their hits are added up.
    budget
        "4GiB", or "25%" of all experts' bytes.
    expert_bytes
        Bytes of one expert: a number, or one for each layer.
    policy
        Whose hits count. LRU takes one pass over a trace, others a replay for each capacity.
    """
    size = np.array(np.broadcast_to(np.asarray(expert_bytes, np.int64), traces[0].n_layers))
    n_experts, k = (np.array(traces[0].meta[key], np.int64) for key in ("n_experts", "k"))
    if any(trace.meta["n_experts"] != traces[0].meta["n_experts"] for trace in traces):
        raise TraceError("the traces are of different models; a plan is for one")
    if (size <= 0).any():
        raise bad_value("expert_bytes", size.tolist(), "numbers greater than 0")
    asked = Slots.parse(budget)
    if asked.kind == "percent":
        total = int(asked.values[0] * Fraction(int((n_experts * size).sum()), 100))
    elif asked.kind == "bytes":
        total = int(asked.values[0])
    else:
        raise bad_value("budget", budget, "memory (4GiB, 512MiB) or a share of all experts (25%)")
    pool = Slots.parse(f"{total}B")
    equal = pool.resolve(n_experts, k, size).astype(np.int64)  # raises if the budget is too small
    hits = sum(curve(trace, policy) for trace in traces)
    return Plan(allocate(np.asarray(hits), k, n_experts, size, total), equal, size, total)


def curve(trace: Trace, policy: str = "lru") -> NDArray[np.int64]:
    """Return each layer's hits with c slots in column c, (n_layers, max_experts + 1); 0 where c < k."""
    k = np.array(trace.meta["k"])[:, None]
    n_experts = np.array(trace.meta["n_experts"])
    columns = np.arange(int(n_experts.max()) + 1)
    if type(make(policy)) is LRU:
        hits = measure(trace).lru_hits()
    else:
        hits = np.zeros((trace.n_layers, len(columns)), np.int64)
        for c in range(int(k.max()), len(columns)):
            slots = np.clip(c, k[:, 0], n_experts)
            hits[:, c] = replay_policy(trace, make(policy), slots).counters.hits
    return np.where(columns >= k, hits, 0)


def allocate(
    hits: NDArray[np.integer],
    least: NDArray[np.integer],
    most: NDArray[np.integer],
    size: NDArray[np.integer],
    budget: int,
) -> NDArray[np.int64]:
    """Return slots of each layer, from `least` to `most`, that cost at most `budget`.

    Takes the jump with the most hits per byte again and again (the concave hull of each layer's curve), and
    when none fits any more fills up slot by slot; within one jump of the best for any curve.

    Parameters
    ----------
    hits
        Hits with c slots in column c, (n_layers, more than max(most)).
    """
    slots = least.astype(np.int64)
    left = budget - int((slots * size).sum())
    while True:
        best: tuple[float, int, int] | None = None
        for layer in range(len(slots)):
            room = min(int(most[layer] - slots[layer]), left // int(size[layer]))
            if room <= 0:
                continue
            here = hits[layer, slots[layer]]
            gains = (hits[layer, slots[layer] + 1 : slots[layer] + room + 1] - here) / np.arange(1, room + 1)
            jump = int(np.argmax(gains))
            rate = float(gains[jump]) / int(size[layer])
            if best is None or rate > best[0]:
                best = (rate, layer, jump + 1)
        if best is None:
            return slots
        _, layer, jump = best
        slots[layer] += jump
        left -= jump * int(size[layer])


def gain(plan: Plan, traces: Sequence[tuple[str, Trace]], policies: Sequence[str]) -> list[dict[str, Any]]:
    """Return, for every trace and policy, the hit rate with equal slots and with those of the plan."""
    rows: list[dict[str, Any]] = []
    for name, trace in traces:
        for policy in policies:
            rates = [replay_policy(trace, make(policy), slots).hit_rate for slots in (plan.equal, plan.slots)]
            rows.append({"trace": name, "policy": policy, "equal": rates[0], "planned": rates[1]})
    return rows
