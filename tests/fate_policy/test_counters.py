from __future__ import annotations

import json
import math

import numpy as np

from fate_policy.counters import PER_LAYER, TIMING, Counters


def counted() -> Counters:
    counters = Counters.zeros(2)
    for number, name in enumerate(PER_LAYER):
        getattr(counters, name)[:] = [number, 10 * number]
    counters.tokens, counters.steps = 7, 3
    return counters


def test_equal_only_if_every_number_is() -> None:
    assert counted() == counted()
    for name in PER_LAYER:
        other = counted()
        getattr(other, name)[1] += 1
        assert (other == counted()) == (name in TIMING)
    other = counted()
    other.steps += 1
    assert other != counted()
    assert counted() != Counters.zeros(3)
    assert counted() != 3


def test_totals_sum_over_layers() -> None:
    assert counted().totals() == {
        **{name: 11 * number for number, name in enumerate(PER_LAYER)},
        "tokens": 7,
        "steps": 3,
    }


def test_as_dict_is_json() -> None:
    values = json.loads(json.dumps(counted().as_dict()))
    assert values["all_resident"] == 110 / 99
    assert values["per_layer"]["misses"] == [2, 20]
    assert set(values) == {*PER_LAYER, "tokens", "steps", "all_resident", "per_layer"}


def test_shares_of_nothing() -> None:
    assert Counters.zeros(2).as_dict()["all_resident"] is None
    assert math.isnan(Counters.zeros(2).hit_rate)


def test_hit_rate_is_of_the_pool_path() -> None:
    counters = Counters.zeros(1)
    counters.hits, counters.misses, counters.bypassed = (np.array([n]) for n in (3, 1, 96))
    assert counters.hit_rate == 0.75
