"""What a trace's routing is like: skew, overlap, reuse; and LRU's hits at every capacity at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy.base import NOT_RUN
from fate_policy.kernels import Routing
from fate_policy.loops import compiled
from fate_policy.trace import Trace


@dataclass(frozen=True, eq=False)
class Locality:
    """Counts of a trace, token by token, whatever its steps.

    uses : int64 (n_layers, n_experts)
    depth : int64 (n_layers, n_experts + 1): uses by the number of other experts used since, so that LRU with
        c slots hits sum(depth[:c]); the last column counts first uses
    gap : int64 (n_layers, n_gaps + 1): uses by the tokens since the last one, from 1; [0] counts first uses,
        the last column all longer gaps
    repeated : float64 (n_layers,): share of a token's experts that the token before it used too
    """

    uses: NDArray[np.int64]
    depth: NDArray[np.int64]
    gap: NDArray[np.int64]
    repeated: NDArray[np.float64]

    def lru_hits(self) -> NDArray[np.int64]:
        """Return LRU's hits with c slots in column c, (n_layers, n_experts + 1); valid from c = k on."""
        hits: NDArray[np.int64] = np.zeros_like(self.depth)
        hits[:, 1:] = self.depth[:, :-1].cumsum(axis=1)
        return hits

    def gini(self) -> NDArray[np.float64]:
        """Return each layer's Gini coefficient of uses: 0 = all alike, near 1 = few experts do all."""
        ranked = np.sort(self.uses, axis=1).astype(np.float64)
        n = ranked.shape[1]
        total = np.maximum(ranked.sum(axis=1), 1)
        gini: NDArray[np.float64] = 2 * (ranked * np.arange(1, n + 1)).sum(axis=1) / (n * total) - (n + 1) / n
        return gini


def measure(trace: Trace, n_gaps: int = 256) -> Locality:
    """Measure a trace in one pass."""
    routing = Routing.of_trace(trace, np.where(trace.path == NOT_RUN, NOT_RUN, 1).astype(np.uint8))
    n_layers, width = routing.shape
    uses = np.zeros((n_layers, width), np.int64)
    depth = np.zeros((n_layers, width + 1), np.int64)
    gap = np.zeros((n_layers, n_gaps + 1), np.int64)
    repeated = np.zeros((n_layers, 2), np.int64)
    _count(routing.ids, uses, depth, gap, repeated)
    return Locality(uses, depth, gap, repeated[:, 0] / np.maximum(repeated[:, 1], 1))


@compiled
def _count(ids: Any, uses: Any, depth: Any, gap: Any, repeated: Any) -> None:
    n_tokens, n_layers, k = ids.shape
    width = uses.shape[1]
    recent = np.empty(width, np.int64)  # the experts used so far, last used first
    last = np.empty(width, np.int64)
    for layer in range(n_layers):
        last[:] = -1
        n_recent = 0
        for token in range(n_tokens):
            for rank in range(k):
                expert = ids[token, layer, rank]
                if expert < 0:
                    continue
                uses[layer, expert] += 1
                if token > 0 and ids[token - 1, layer, 0] >= 0:
                    repeated[layer, 1] += 1
                    if last[expert] == token - 1:
                        repeated[layer, 0] += 1
                if last[expert] < 0:
                    depth[layer, width] += 1
                    gap[layer, 0] += 1
                else:
                    at = 0
                    while recent[at] != expert:
                        at += 1
                    depth[layer, at] += 1
                    gap[layer, min(token - last[expert], gap.shape[1] - 1)] += 1
            for rank in range(k - 1, -1, -1):
                expert = ids[token, layer, rank]
                if expert < 0:
                    continue
                at = n_recent
                if last[expert] >= 0:
                    at = 0
                    while recent[at] != expert:
                        at += 1
                else:
                    n_recent += 1
                for i in range(at, 0, -1):
                    recent[i] = recent[i - 1]
                recent[0] = expert
                last[expert] = token
