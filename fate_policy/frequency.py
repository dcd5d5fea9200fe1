"""Least frequently used, with forgetting."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fate_policy import checks
from fate_policy.base import Geometry, History, Policy, Step


class Frequency(Policy):
    """Evict the resident expert with the least decayed count of uses.

    Every token halves all counts by 1 / `half_life_tokens` of a halving and adds 1 to the experts it uses.
    With `lfru` the count is divided by the age + 1, in tokens since the last use. The bonus is 1, which is
    what a use since the publication adds at the least.
    """

    def __init__(self, *, half_life_tokens: float = 16, lfru: bool = False) -> None:
        self.half_life_tokens = checks.number("half_life_tokens", half_life_tokens, above=0)
        self.lfru = checks.flag("lfru", lfru)

    def start(self, geometry: Geometry) -> None:
        shape = (geometry.n_layers, geometry.max_experts)
        self._counts = np.zeros(shape)
        self._last_token = np.zeros(shape, np.int64)
        self._n_tokens = 0
        self._row = np.arange(shape[0])[:, None] * shape[1]
        self._bonus = np.ones(shape[0], np.float32)

    def observe(self, step: Step) -> None:
        n = step.n_tokens
        decay = 2.0 ** (-1 / self.half_life_tokens)
        self._counts *= decay**n
        if n == 1 and step.ids.min(initial=0) >= 0:  # a token's experts are distinct
            used, age = (step.ids[0] + self._row).ravel(), np.zeros(1, np.int64)
            self._counts.reshape(-1)[used] += 1
        else:
            token, layer, rank = np.nonzero(step.ids >= 0)
            used = (self._row[layer, 0] + step.ids[token, layer, rank]).astype(np.intp)
            age = n - 1 - token
            added = np.bincount(used, decay**age, minlength=self._counts.size)
            self._counts += added.reshape(self._counts.shape)
        if self.lfru:
            self._last_token.reshape(-1)[used] = self._n_tokens + n - age
        self._n_tokens += n

    def scores(self, history: History) -> NDArray[np.float32]:
        if self.lfru:
            return (self._counts / (self._n_tokens - self._last_token + 1)).astype(np.float32)
        return self._counts.astype(np.float32)

    def bonus(self, history: History) -> NDArray[np.float32]:
        return self._bonus
