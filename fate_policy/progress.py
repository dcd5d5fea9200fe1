"""A bar for work that takes a while."""

from __future__ import annotations

import sys
import time

WIDTH = 30
SECONDS = 0.1


class Bar:
    """Show on standard error how much of `total` is done; a bar that is not `shown` does nothing."""

    def __init__(self, total: int, shown: bool) -> None:
        self.total, self.shown = total, shown
        self.done = 0.0
        self._drawn_at = 0.0

    def show(self, done: float) -> None:
        """Draw, but not more often than an eye follows."""
        self.done = done
        now = time.monotonic()
        if not self.shown or now - self._drawn_at < SECONDS:
            return
        self._drawn_at = now
        full = int(WIDTH * done / self.total)
        share = f"{int(done)}/{self.total}, {100 * done / self.total:.0f} %"
        print(f"\r[{'#' * full:<{WIDTH}}] {share} ", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.shown:
            print("\r" + " " * (WIDTH + 30) + "\r", end="", file=sys.stderr, flush=True)
