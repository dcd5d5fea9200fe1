"""Random eviction, the baseline that knows nothing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fate_policy import checks
from fate_policy.base import Geometry, History, Policy


class Random(Policy):
    """Evict at random.

    Scores are drawn anew for every publication, from the seed and the number of publications so far.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = checks.integer("seed", seed, minimum=0)

    def start(self, geometry: Geometry) -> None:
        self._shape = (geometry.n_layers, geometry.max_experts)

    def scores(self, history: History) -> NDArray[np.float32]:
        return np.random.default_rng((self.seed, history.publications)).random(self._shape, np.float32)
