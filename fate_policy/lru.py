"""Least recently used."""

from __future__ import annotations

from fate_policy.base import Policy


class LRU(Policy):
    """Evict the resident expert whose last use is oldest.

    The rule with equal scores is LRU already, so this costs no Python at all.
    """
