"""Windows, balance and thresholds are chosen by hits on prompts that were not fitted on."""

from __future__ import annotations

from dataclasses import replace

import pytest
from policy_contract import synthetic_trace

from fate_policy import tune
from fate_policy.assess import decode_only
from fate_policy.train import Options

SMALL = Options(sample_every=2, max_rows=1000, rank_basis=8, rank=8, n_folds=2, table_minimum=1)
WINDOWS = {0.25: (2, 4), 0.5: (4, 8)}


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "WINDOWS", WINDOWS)


def test_balance_is_chosen_by_hits_unless_it_is_given() -> None:
    trace = decode_only(synthetic_trace(600))
    chosen = tune.tune(trace, SMALL)
    rates = chosen.hit_rates
    assert rates.keys() == {False, True}
    assert chosen.options.balanced == (rates[True] > rates[False] + tune.BALANCE_GAIN)
    for balanced in (False, True):
        given = tune.tune(trace, SMALL, balanced)
        assert given.options.balanced is balanced
        assert given.hit_rates.keys() == {balanced}
    assert all(window in WINDOWS[share] for share, window in chosen.options.heads)
    assert chosen.thresholds.keys() == {"0.25", "0.5"}


@pytest.mark.parametrize(("gain", "balanced"), [(0.1, True), (0.0005, False)])
def test_balance_must_gain_what_is_not_noise(
    gain: float, balanced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = decode_only(synthetic_trace(600))
    asked: list[bool] = []

    def hits(fitted: tune.Model, *_: object) -> tune.Hits:
        asked.append(fitted.meta["balanced"])
        rate = 0.5 + gain * fitted.meta["balanced"]
        return {(head.share, head.window): rate + 0.01 * head.window for head in fitted.heads[1:]}

    monkeypatch.setattr(tune, "_hits", hits)
    chosen = tune.tune(trace, SMALL)
    assert asked == [False, True]
    assert chosen.options == replace(SMALL, heads=((0.25, 4), (0.5, 8)), balanced=balanced)
    assert chosen.hit_rates == {False: pytest.approx(0.56), True: pytest.approx(0.56 + gain)}
