"""What a layer brings in before the token that needs it: `fate_bind/native/prefetch.h` again, for replay.

Absent experts whose chance to be used by the coming token reaches the threshold come in, the likeliest first.
They take free slots, then those of the first victims by the decision rule, but never that of an expert whose
chance reaches it too. Replay must give the engine's counters, so a change here is a change there.

A layer plans several times for one token: from what the policy predicts at the token's start, then from what
the routers of earlier layers tell, the farthest first. What came in for the token stays until it is over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fate_policy import checks
from fate_policy.rule import LayerTable

MOST = 16
"""Experts that come in, at most, of a layer and token."""

ASK_POLICY = ("token", "both")
"""Kinds of prefetch for which the policy predicts, at the token's start."""

LOOK_AHEAD = ("layer", "both")
"""Kinds of prefetch for which a layer's router input is given to the routers of the next layers too."""

KINDS = ("token", "layer", "both")

_NONE = np.empty(0, np.int32)


@dataclass(frozen=True)
class Prefetch:
    """What comes in: at most `experts` of a layer and token, of those at least as likely as `threshold`.

    kind : who tells how likely they are: "token", "layer" or "both", as in a configuration
    """

    threshold: float = 0.5
    experts: int = 8
    kind: str = "token"

    def __post_init__(self) -> None:
        checks.share("prefetch_threshold", self.threshold, above_zero=True)
        checks.integer("prefetch_experts", self.experts, minimum=1, maximum=MOST)
        checks.choice("prefetch", self.kind, KINDS)

    @property
    def asks_policy(self) -> bool:
        return self.kind in ASK_POLICY

    @property
    def looks_ahead(self) -> bool:
        return self.kind in LOOK_AHEAD


def room(wanted: int, n_slots: int, k: int) -> int:
    """Return how many may come in, so that the token's own experts find slots beside them."""
    return max(0, min(wanted, MOST, n_slots - k))


def plan(
    table: LayerTable,
    chance: NDArray[np.float32],
    threshold: float | np.float32,
    most: int,
    kept: NDArray[np.int32] = _NONE,
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the experts that come in, in order, and the residents that go for the last of them, in order.

    `chance` is float32 (n_experts,), compared as such with `threshold`. Those before take the free slots.
    `kept` are the residents that earlier plans for the token brought in, which do not go; `most` is the room
    that they left. Changes no table.
    """
    likely = chance >= np.float32(threshold)
    absent = (likely & (table.slot_of < 0)).nonzero()[0]
    come = absent[np.argsort(-chance[absent], kind="stable")][:most].astype(np.int32)
    n_victims = len(come) - (len(table.expert_of) - table.n_resident)
    if n_victims <= 0:
        return come, np.empty(0, np.int32)
    stays = likely.copy()
    stays[kept] = True
    go = table.victims(n_victims, stays)
    return come[: len(come) - n_victims + len(go)], go
