"""The model of time, against sums done by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fate_policy.errors import PolicyConfigError
from fate_policy.timeline import Machine, Timeline, counted, timeline


def machine(n_layers: int = 3, **options: Any) -> Machine:
    """10 us a layer, 4 us an expert."""
    return Machine(np.full(n_layers, 10.0), np.full(n_layers, 4.0), **options)


def run(missed: list[list[int]], *, early: Any = None, ahead: int | None = None, **options: Any) -> Timeline:
    rows = np.array(missed)
    return timeline(
        rows, machine(rows.shape[1], **options), None if early is None else np.array(early), ahead
    )


def microseconds(found: Timeline) -> tuple[float, ...]:
    times = (found.total_s, found.stalled_s, found.late_s, found.slowed_s)
    return tuple(round(1e6 * t, 6) for t in times)


def test_nothing_missed_is_the_resident_speed() -> None:
    found = run([[0, 0, 0]] * 5)
    assert (microseconds(found), found.of_resident) == ((150, 0, 0, 0), 1)
    assert found.tokens_s == pytest.approx(5 / 150e-6)


def test_a_miss_stalls_for_its_transfer() -> None:
    assert microseconds(run([[0, 2, 1]])) == (42, 12, 0, 0)
    assert microseconds(run([[0, 2, 1]], miss_us=3, resolve_us=1)) == (51, 18, 0, 0)


def test_a_prefetch_in_time_is_free_but_for_what_it_slows() -> None:
    assert microseconds(run([[0, 0, 0]], early=[[0, 2, 0]])) == (30, 0, 0, 0)
    assert microseconds(run([[0, 0, 0]], early=[[0, 2, 0]], slowdown=1.25)) == (31.6, 0, 0, 1.6)


def test_a_prefetch_that_is_late_is_waited_for() -> None:
    """Four experts take 16 us, of which 10 lie beside layer 0; the first layer's own lie beside nothing."""
    assert microseconds(run([[0, 0, 0]], early=[[0, 4, 0]])) == (36, 0, 6, 0)
    assert microseconds(run([[0, 0, 0]], early=[[1, 0, 0]])) == (34, 0, 4, 0)


def test_a_prefetch_is_issued_so_many_layers_ahead() -> None:
    assert microseconds(run([[0, 0, 0]], early=[[0, 0, 4]])) == (30, 0, 0, 0)
    assert microseconds(run([[0, 0, 0]], early=[[0, 0, 4]], ahead=2)) == (30, 0, 0, 0)
    assert microseconds(run([[0, 0, 0]], early=[[0, 0, 4]], ahead=1)) == (36, 0, 6, 0)


def test_a_demanded_expert_waits_for_the_transfer_under_way_only() -> None:
    """Layer 0 leaves 2 us of a third expert, layer 1's miss takes 2 + 4, layer 1 itself hides the rest."""
    assert microseconds(run([[0, 1, 0]], early=[[0, 0, 5]])) == (36, 6, 0, 0)


def test_the_designs_numbers() -> None:
    """LRU on gpt-oss-20b's misses, with the link and resident time measured: 0.33 and 0.61 (DESIGN 7)."""
    for rate, expected in ((0.6607, 0.33), (0.8933, 0.61)):
        uses = np.random.default_rng(0).random((2000, 48, 8)) >= rate
        found = timeline(uses.sum(axis=2), Machine.of_speed(297, 51, [2.7e6] * 48))
        assert found.of_resident == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Machine.of_speed(0, 50, [1]), "tokens_s: 0 is not allowed"),
        (lambda: Machine.of_speed(9, -1, [1]), "link_gb_s: -1 is not allowed"),
        (lambda: Machine.of_speed(9, 50, 7), "expert_bytes: 7 is not allowed; expected one number for each"),
        (lambda: Machine.of_speed(9, 50, [1], slowdown=0.5), "slowdown: 0.5 is not allowed"),
        (lambda: run([[0, 0]], ahead=0), "ahead: 0 is not allowed"),
        (lambda: run([[0, 0]], early=[[0]]), "prefetched: .* is not allowed"),
        (lambda: timeline(np.zeros((2, 4), int), machine(3)), "missed: .* is not allowed"),
    ],
)
def test_a_wrong_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(PolicyConfigError, match=message):
        call()


def test_what_a_run_counted_takes_as_long_as_its_tokens() -> None:
    """Without prefetch to the last digit, whatever the order."""
    missed = np.random.default_rng(3).integers(0, 3, (40, 3))
    options = {"miss_us": 3.0, "resolve_us": 1.0}
    totals = {"misses": missed.sum(), "rows": missed.size, "rows_all_resident": (missed == 0).sum()}
    found = counted(totals, 40, machine(**options), 100.0)
    assert microseconds(found) == microseconds(run(missed.tolist(), **options))
    assert found.of_resident == run(missed.tolist(), **options).of_resident


def test_of_what_came_late_only_what_was_not_there_is_waited_for() -> None:
    """Of four experts two were in time, one late by half, and one was never used."""
    totals = {"misses": 1, "rows": 3, "rows_all_resident": 2, "prefetches": 4}
    totals |= {"prefetch_useful": 2, "prefetch_late": 1, "prefetch_hidden": 250}
    found = counted(totals, 1, machine(slowdown=1.25), 100.0)
    # 2 of their 16 us are waited for; a fifth of the other 14 is lost to compute
    assert microseconds(found) == (30 + 2 + 2.8, 0, 2, 2.8)
    assert microseconds(counted({}, 2, machine(), 100.0)) == (60, 0, 0, 0)


def test_no_more_is_waited_for_than_came_late() -> None:
    """Ten useful experts of half the mean size: by the mean they hid less than themselves."""
    totals = {
        "misses": 1,
        "prefetches": 11,
        "prefetch_useful": 10,
        "prefetch_late": 1,
        "prefetch_hidden": 500,
    }
    assert microseconds(counted(totals, 1, machine(), 100.0)) == (34, 0, 4, 0)
