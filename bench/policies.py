"""LRU with all of Python's cost: it takes in every step and publishes scores, all of them equal."""

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
