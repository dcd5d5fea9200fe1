"""Hits, misses and bytes of every layer; the same class for replay and engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PER_LAYER = (
    "routed",
    "hits",
    "misses",
    "staged",
    "bypassed",
    "fills",
    "seed_fills",
    "evictions",
    "bytes",
    "rows",
    "rows_all_resident",
    "prefetches",
    "prefetch_useful",
    "prefetch_late",
    "prefetch_wasted",
    "prefetch_cancelled",
    "prefetch_waited_ns",
    "prefetch_hidden",
)
TIMING = ("prefetch_waited_ns",)
"""Of these, times: they differ from run to run and are not compared."""


@dataclass(eq=False)
class Counters:
    """What happened in the pool. Arrays are int64 (n_layers,); equal only if all but `TIMING` are.

    routed : routed pairs (token, expert) = hits + misses + staged + bypassed
    misses : first uses within a step of an expert that is absent or still on its way; later uses are hits
    fills : experts brought in = misses - prefetch_late + seed_fills + prefetches
    seed_fills : those brought in after a staged or bypassed step
    evictions : experts that lost their slot
    bytes : fills times the bytes of an expert of the layer
    rows, rows_all_resident : tokens on the pool path, and those of them without a miss
    prefetches : experts brought in before they were asked for = useful + late + wasted + not used yet
    prefetch_useful : of these, complete at their first use, which is a hit
    prefetch_late : of these, still on their way at their first use
    prefetch_wasted : of these, evicted before any use
    prefetch_cancelled : planned, and not begun when no longer told of or when their layer ran
    prefetch_waited_ns : nanoseconds that layers waited for late ones
    prefetch_hidden : bytes of those useful, and of those late what was there already at their first use
    tokens, steps : over all layers
    """

    routed: NDArray[np.int64]
    hits: NDArray[np.int64]
    misses: NDArray[np.int64]
    staged: NDArray[np.int64]
    bypassed: NDArray[np.int64]
    fills: NDArray[np.int64]
    seed_fills: NDArray[np.int64]
    evictions: NDArray[np.int64]
    bytes: NDArray[np.int64]
    rows: NDArray[np.int64]
    rows_all_resident: NDArray[np.int64]
    prefetches: NDArray[np.int64]
    prefetch_useful: NDArray[np.int64]
    prefetch_late: NDArray[np.int64]
    prefetch_wasted: NDArray[np.int64]
    prefetch_cancelled: NDArray[np.int64]
    prefetch_waited_ns: NDArray[np.int64]
    prefetch_hidden: NDArray[np.int64]
    tokens: int = 0
    steps: int = 0

    @classmethod
    def zeros(cls, n_layers: int) -> Counters:
        arrays: dict[str, Any] = {name: np.zeros(n_layers, np.int64) for name in PER_LAYER}
        return cls(**arrays)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Counters):
            return NotImplemented
        return (self.tokens, self.steps) == (other.tokens, other.steps) and all(
            np.array_equal(getattr(self, name), getattr(other, name))
            for name in PER_LAYER
            if name not in TIMING
        )

    @property
    def hit_rate(self) -> float:
        """Hits over pairs on the pool path; nan if there were none."""
        pooled = int(self.hits.sum() + self.misses.sum())
        return int(self.hits.sum()) / pooled if pooled else float("nan")

    def totals(self) -> dict[str, int]:
        """Return every counter summed over layers, with tokens and steps."""
        sums = {name: int(getattr(self, name).sum()) for name in PER_LAYER}
        return {**sums, "tokens": self.tokens, "steps": self.steps}

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: totals, `all_resident`, and the arrays under `per_layer`.

        all_resident: the share of pooled (token, layer) rows without a miss; None if no row was pooled.
        """
        totals = self.totals()
        share = totals["rows_all_resident"] / totals["rows"] if totals["rows"] else None
        per_layer = {name: getattr(self, name).tolist() for name in PER_LAYER}
        return {**totals, "all_resident": share, "per_layer": per_layer}
