"""A policy that scores what was just used lowest: it would evict slots in use if it were let."""

import numpy as np
from numpy.typing import NDArray

from fate_policy.base import History, Policy


class InUseLowest(Policy):
    """Evict the expert used last; bad for hits, good for finding victims in use."""

    def scores(self, history: History) -> NDArray[np.float32]:
        return -history.last_use.astype(np.float32)
