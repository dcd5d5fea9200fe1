"""What in-token predictions are worth: how many of the experts used, and of the absent ones, they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy.base import NOT_RUN
from fate_policy.kernels import Routing, Simulation
from fate_policy.trace import Trace

COLUMNS = (
    "horizon",
    "used",
    "at_k",
    "at_2k",
    "token_before",
    "absent",
    "absent_at_k",
    "absent_at_2k",
    "absent_token_before",
)
_CHUNK = 512

_Found = NDArray[np.bool_]


@dataclass(frozen=True)
class Named:
    """Of so many uses, those whose expert was among the first k named, the first 2k, the token before's."""

    n: int
    at_k: int
    at_2k: int
    token_before: int

    def shares(self) -> list[float | None]:
        """Return the three as shares of `n`; None where that is 0."""
        return [count / self.n if self.n else None for count in (self.at_k, self.at_2k, self.token_before)]


@dataclass(frozen=True)
class Recall:
    """What the routers named so many layers before.

    Counted are the tokens for which a horizon names anything, in all layers that have one so far before them.

    used : of all uses
    absent : of those of experts that plain LRU, with the slots of the recording, does not hold just before
        the step; None if the trace does not tell its slots
    """

    horizon: int
    used: Named
    absent: Named | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, `COLUMNS`: counts, and the recall as shares of them."""
        absent = [None] * 4 if self.absent is None else [self.absent.n, *self.absent.shares()]
        return dict(zip(COLUMNS, [self.horizon, self.used.n, *self.used.shares(), *absent], strict=True))


def measure(trace: Trace) -> list[Recall]:
    """Measure each horizon of a trace, the nearest first; [] where nothing was told."""
    if trace.ahead_ids is None or not (trace.ahead_ids >= 0).any():
        return []
    told = [
        (trace.ahead_ids[:, horizon:, at] >= 0).any(axis=(1, 2)) for at, horizon in enumerate(trace.horizons)
    ]
    ids = trace.experts()
    ids[trace.path == NOT_RUN] = -1
    absent = _absent(trace, ids, np.logical_or.reduce(told))
    k = np.array(trace.meta["k"])
    rank = np.arange(trace.ahead_ids.shape[3])
    before = np.full_like(ids, -1)
    before[1:] = ids[:-1]
    found = []
    for at, horizon in reversed(list(enumerate(trace.horizons))):
        counts = np.zeros((2, 4), np.int64)
        tokens = np.flatnonzero(told[at])
        layers = np.s_[horizon:]
        for start in range(0, len(tokens), _CHUNK):
            rows = tokens[start : start + _CHUNK]
            used, named = ids[rows, layers], trace.ahead_ids[rows][:, layers, at].astype(np.int32)
            by_width = [
                _among(used, np.where(rank < n, named, -1)) for n in (k[layers, None], 2 * k[layers, None])
            ]
            which = [used >= 0, *by_width, _among(used, before[rows, layers])]
            counts[0] += [np.count_nonzero(one) for one in which]
            if absent is not None:
                counts[1] += [np.count_nonzero(one & absent[rows, layers]) for one in which]
        of_used, of_absent = (Named(*row) for row in counts.tolist())
        found.append(Recall(horizon, of_used, None if absent is None else of_absent))
    return found


def _among(used: NDArray[np.int32], named: NDArray[np.int32]) -> _Found:
    """Say which of `used` (n, n_layers, k) are named in their row and layer; -1 is none."""
    among: _Found = (used[..., None] == named[..., None, :]).any(axis=3) & (used >= 0)
    return among


def _absent(trace: Trace, ids: NDArray[np.int32], wanted: _Found) -> _Found | None:
    """Say which uses of the wanted tokens are of experts that LRU does not hold before their step."""
    if trace.meta["n_slots"] is None:
        return None
    absent = np.zeros(ids.shape, np.bool_)
    # a layer with fewer slots than its k does not run
    lru = Simulation(Routing.of_trace(trace), np.maximum(trace.meta["n_slots"], trace.meta["k"]))
    layer = np.arange(trace.n_layers)[:, None]
    bounds = trace.step_bounds()
    for step in np.unique(np.searchsorted(bounds, np.flatnonzero(wanted), side="right") - 1).tolist():
        lru.run(step)
        rows = slice(bounds[step], bounds[step + 1])
        absent[rows] = (ids[rows] >= 0) & ~lru.resident[layer, ids[rows]]
    return absent
