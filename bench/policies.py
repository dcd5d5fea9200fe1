"""Policies that only a benchmark wants: LRU with all of Python's cost, and one that is told the future."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fate_policy.base import Geometry, History, Policy, Step


class PythonLRU(Policy):
    """Decide as LRU does, through the same door as a learned policy."""

    def start(self, geometry: Geometry) -> None:
        self._scores = np.zeros((geometry.n_layers, int(geometry.n_experts.max())), np.float32)
        self._seen = 0

    def observe(self, step: Step) -> None:
        self._seen += step.n_tokens

    def scores(self, history: History) -> NDArray[np.float32]:
        return self._scores


class Oracle(Policy):
    """LRU that predicts what is replayed: the most that prediction at the token's start can bring.

    ids : int32 (n_tokens, n_layers, k), the routing that is replayed
    row : of it, that the step at hand takes
    """

    def __init__(self, ids: NDArray[np.int32]) -> None:
        self.ids = ids
        self.row = 0

    def start(self, geometry: Geometry) -> None:
        n = geometry.max_experts
        self._chances = np.zeros((geometry.n_layers, n), np.float32)
        self._chances[:, : self.ids.shape[2]] = 1

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        used = self.ids[self.row % len(self.ids)]
        is_used = np.zeros(self._chances.shape, np.bool_)
        np.put_along_axis(is_used, used, True, axis=1)
        return np.argsort(~is_used, axis=1, kind="stable").astype(np.int32), self._chances
