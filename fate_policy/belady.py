"""The offline optimum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fate_policy.base import Geometry, History, OfflinePolicy, Step


class Belady(OfflinePolicy):
    """Evict the expert whose next use is farthest in the future, ties by expert id; in replay only.

    No policy that fills every miss brings in fewer experts. A use counts where it needs a slot: a use that
    goes past the pool does not.

    Source: Belady, IBM Systems Journal 5(2), 1966 (MIN).
    """

    def foresee(self, needs: NDArray[np.int32], step: NDArray[np.int64]) -> None:
        n_tokens, n_layers, _ = needs.shape
        self._never = int(step[-1]) + 1 if n_tokens else 0
        following = np.full((n_layers, int(needs.max(initial=0)) + 1), self._never, np.int64)
        self._needs = needs
        self._following = np.empty(needs.shape, np.int64)
        layers = np.arange(n_layers)[:, None]
        ends = np.flatnonzero(np.diff(step, append=self._never))
        starts = np.concatenate(([0], ends[:-1] + 1)) if n_tokens else ends
        for start, end in zip(starts[::-1].tolist(), (ends[::-1] + 1).tolist(), strict=True):
            block = needs[start:end]
            self._following[start:end] = following[layers, block]
            _, layer, _ = used = np.nonzero(block >= 0)
            following[layer, block[used]] = step[start]

    def start(self, geometry: Geometry) -> None:
        self._next = np.full((geometry.n_layers, geometry.max_experts), self._never, np.int64)
        self._n_tokens = 0

    def observe(self, step: Step) -> None:
        block = slice(self._n_tokens, self._n_tokens + step.n_tokens)
        needs = self._needs[block]
        _, layer, _ = used = np.nonzero(needs >= 0)
        self._next[layer, needs[used]] = self._following[block][used]
        self._n_tokens += step.n_tokens

    def victims(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> NDArray[np.integer]:
        candidates = np.flatnonzero(history.resident[layer, : len(pinned)] & ~pinned)
        return candidates[np.lexsort((candidates, -self._next[layer, candidates]))[:n]]
