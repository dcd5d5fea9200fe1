"""A model of time: how fast decoding runs, layer by layer, from what misses and what is prefetched.

The inputs are measured on a machine (see `Machine`). A missed expert stalls its layer while it crosses the
link. Prefetches cross it one after the other beside compute, which they slow; a layer waits for its own,
and a demanded expert goes before prefetches that wait, after the one under way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fate_policy.checks import bad_value
from fate_policy.loops import compiled


@dataclass(frozen=True, eq=False)
class Machine:
    """What was measured.

    layer_us : a layer with all experts resident, float64 (n_layers,)
    transfer_us : one expert over the link, float64 (n_layers,)
    resolve_us : what the pool adds to every layer
    miss_us : what it adds to a layer with a miss, beside the transfer
    slowdown : how much longer compute takes while the link works, 1 or more
    """

    layer_us: NDArray[np.float64]
    transfer_us: NDArray[np.float64]
    resolve_us: float = 0.0
    miss_us: float = 0.0
    slowdown: float = 1.0

    @classmethod
    def of_speed(
        cls,
        tokens_s: float,
        link_gb_s: float,
        expert_bytes: ArrayLike,
        *,
        resolve_us: float = 0.0,
        miss_us: float = 0.0,
        slowdown: float = 1.0,
    ) -> Machine:
        """Take the resident speed, spread evenly over the layers, and the link's.

        Parameters
        ----------
        expert_bytes
            Bytes of one expert in each layer, (n_layers,).
        """
        size = np.asarray(expert_bytes, np.float64)
        if size.ndim != 1 or not len(size):
            raise bad_value("expert_bytes", expert_bytes, "one number for each layer")
        for key, value in (("tokens_s", tokens_s), ("link_gb_s", link_gb_s)):
            if not value > 0:
                raise bad_value(key, value, "a number greater than 0")
        if slowdown < 1:
            raise bad_value("slowdown", slowdown, "1 or more")
        layer_us = np.full(len(size), 1e6 / tokens_s / len(size))
        return cls(layer_us, size / (link_gb_s * 1e3), resolve_us, miss_us, slowdown)


@dataclass(frozen=True)
class Timeline:
    """Where the time of all tokens went, in seconds.

    stalled_s : waiting for demanded experts;  late_s : waiting for prefetches that were not done
    slowed_s : compute lost to the link's work beside it
    """

    tokens: int
    total_s: float
    resident_s: float
    stalled_s: float
    late_s: float
    slowed_s: float

    @property
    def of_resident(self) -> float:
        """The share of the resident speed."""
        return self.resident_s / self.total_s if self.total_s else float("nan")

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.total_s if self.total_s else float("nan")


def timeline(
    missed: NDArray[np.integer],
    machine: Machine,
    prefetched: NDArray[np.integer] | None = None,
    ahead: int | None = None,
) -> Timeline:
    """Return the time that tokens take one after the other.

    Parameters
    ----------
    missed
        Experts demanded and absent, (n_tokens, n_layers).
    prefetched
        Experts fetched early for each layer, of the same shape; not among `missed`, wasted ones included.
    ahead
        Layers before its own at which a prefetch is issued. None: all at the token's start.
    """
    if missed.ndim != 2 or missed.shape[1] != len(machine.layer_us):
        raise bad_value("missed", missed.shape, f"the shape (tokens, {len(machine.layer_us)})")
    early: NDArray[Any] = np.zeros_like(missed) if prefetched is None else prefetched
    if early.shape != missed.shape:
        raise bad_value("prefetched", early.shape, f"the shape {missed.shape}")
    if ahead is not None and ahead < 1:
        raise bad_value("ahead", ahead, "1 or more, or None")
    n_tokens, n_layers = missed.shape
    total, stalled, late, slowed = _walk(
        missed.astype(np.int64),
        early.astype(np.int64),
        n_layers if ahead is None else ahead,
        machine.layer_us + machine.resolve_us,
        machine.transfer_us.astype(np.float64),
        float(machine.miss_us),
        float(machine.slowdown),
    )
    resident = n_tokens * float(machine.layer_us.sum())
    return Timeline(n_tokens, total / 1e6, resident / 1e6, stalled / 1e6, late / 1e6, slowed / 1e6)


def counted(totals: Mapping[str, float], tokens: int, machine: Machine, expert_bytes: float) -> Timeline:
    """Return the time that tokens of a run take, from what it counted instead of from every token.

    What came late is waited for as far as it was not there; whatever else prefetch brought slows compute. A
    layer whose only misses came late counts as one with a miss.

    Parameters
    ----------
    totals
        Counters of the run over all layers, by their names (see `Counters.totals`).
    expert_bytes
        Of an expert, the mean over layers; so is what a transfer takes.
    """
    names = ("misses", "rows", "rows_all_resident", "prefetches", "prefetch_useful", "prefetch_late")
    misses, rows, whole, prefetches, useful, late = (float(totals.get(name, 0)) for name in names)
    transfer_us = float(np.mean(machine.transfer_us))
    hidden = float(totals.get("prefetch_hidden", 0)) / expert_bytes - useful  # of those late
    waited = min(max(late - hidden, 0.0), late)  # by the mean, where layers differ in size, it may be more
    resident = tokens * float(machine.layer_us.sum())
    stalled = (misses - late) * transfer_us + (rows - whole) * machine.miss_us
    slowed = (prefetches - waited) * transfer_us * (1 - 1 / machine.slowdown)
    total = resident + rows * machine.resolve_us + stalled + waited * transfer_us + slowed
    return Timeline(
        tokens, total / 1e6, resident / 1e6, stalled / 1e6, waited * transfer_us / 1e6, slowed / 1e6
    )


@compiled
def _walk(
    missed: Any, early: Any, ahead: int, layer_us: Any, transfer_us: Any, miss_us: float, slowdown: float
) -> Any:
    n_tokens, n_layers = missed.shape
    total = stalled = late = slowed = 0.0
    queue = np.zeros(n_layers)  # link time still to be spent on each layer's prefetches, served in order
    for token in range(n_tokens):
        issued = 0
        for layer in range(n_layers):
            while issued < n_layers and issued <= layer + ahead:
                queue[issued] = early[token, issued] * transfer_us[issued]
                issued += 1
            late += queue[layer]
            total += queue[layer]
            queue[layer] = 0.0
            if missed[token, layer] > 0:
                under_way = 0.0
                for other in range(layer + 1, issued):
                    if queue[other] > 0:
                        under_way = queue[other] % transfer_us[other]
                        queue[other] -= under_way
                        break
                wait = under_way + miss_us + missed[token, layer] * transfer_us[layer]
                stalled += wait
                total += wait
            left = layer_us[layer]
            for other in range(layer + 1, issued):
                if queue[other] <= 0:
                    continue
                beside = min(queue[other], left * slowdown)
                queue[other] -= beside
                left -= beside / slowdown
                slowed += beside - beside / slowdown
                total += beside
                if left <= 0:
                    break
            total += max(left, 0.0)
    return total, stalled, late, slowed
