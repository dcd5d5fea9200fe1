"""What is read from the times of a token, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import timeline
from fate_bind import library


def times() -> np.ndarray:
    """Two layers: a hit at 1 ms, then one that waits 300 us, planned and brought beside."""
    found = np.zeros((2, library.load().lib.FATE_N_TIMES), np.int64)
    base = 5_000_000
    found[0, timeline.OP_BEGAN] = base
    found[1, [timeline.OP_BEGAN, timeline.OP_COPIES, timeline.OP_DONE]] = (
        base + np.array([100, 110, 400]) * 1000
    )
    found[1, timeline.PLANNED] = base + 20_000
    found[1, [timeline.BEGUN + 1, timeline.COMPLETE + 1]] = base + 30_000, base + 390_000
    found[1, timeline.BEGUN + 2] = base + 50_000  # never complete
    found[0, [timeline.WATCHED, timeline.LEFT]] = base - 10_000, base + 420_000
    return found


def test_the_columns_are_those_of_the_library() -> None:
    lib = library.load().lib
    for name in ("OP_BEGAN", "OP_COPIES", "OP_DONE", "PLANNED", "WATCHED", "LEFT", "BEGUN", "COMPLETE"):
        assert getattr(timeline, name) == getattr(lib, f"FATE_TIME_{name}")
    assert timeline.COMPLETE + timeline.ENTRIES == lib.FATE_N_TIMES


def test_a_token_is_read() -> None:
    token = timeline.token_of(times())
    assert token.span == 400
    assert token.waiting.tolist() == [0, 300]
    assert np.isnan(token.planned[0])
    assert token.planned[1] == 20
    assert token.copies.tolist() == [[1, 30, 390]]
    assert token.watched.tolist() == [-10, 420]


def test_means_and_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tokens = [timeline.token_of(times())] * 3
    found = timeline.summary(tokens)
    assert found["span"] == 400
    assert found["waiting"] == 300
    assert found["layers that wait"] == 1
    assert found["lead"] == 80
    assert found["a copy"] == 360
    assert found["copies"] == 1
    timeline.plot({"lru@50": tokens, "oracle2@50": tokens}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_an_arm_without_prefetch_has_nothing_to_tell_of_it() -> None:
    bare = times()
    bare[:, timeline.PLANNED :] = 0
    found = timeline.summary([timeline.token_of(bare)])
    assert found["copies"] == 0
    assert np.isnan(found["lead"])
    assert np.isnan(found["watched from"])
