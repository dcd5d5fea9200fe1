from __future__ import annotations

import numpy as np
import pytest
from policy_contract import (
    SYNTHETIC,
    PolicyContract,
    golden,
    make_step,
    random_ids,
    real_trace,
    synthetic_trace,
)

from fate_policy.driver import Driver
from fate_policy.frequency import Frequency
from fate_policy.replay import replay


class TestFrequency(PolicyContract):
    name = "frequency"


class TestLFRU(PolicyContract):
    name = "frequency"
    params = {"lfru": True, "half_life_tokens": 64.5}  # noqa: RUF012 - read only


@pytest.mark.parametrize(
    ("params", "sync", "synthetic", "real"),
    [
        ({}, True, (1970, 1102, 1152, 1129, 190), (26893, 11507, 11507, 11315, 2816)),
        ({}, False, (1961, 1111, 1162, 1139, 188), (26882, 11518, 11518, 11326, 2810)),
        ({"half_life_tokens": 64}, True, (1927, 1145, 1197, 1174, 174), (26401, 11999, 11999, 11807, 2580)),
        ({"lfru": True}, True, (1999, 1073, 1124, 1101, 196), (27121, 11279, 11279, 11087, 3006)),
    ],
)
def test_golden_counts(params: dict, sync: bool, synthetic: tuple, real: tuple) -> None:
    assert golden(replay(synthetic_trace(), Frequency(**params), sync=sync)) == synthetic
    assert golden(replay(real_trace(), Frequency(**params), n_slots=8, sync=sync)) == real


@pytest.mark.parametrize("batch", [1, 3, 30])
@pytest.mark.parametrize("lfru", [False, True])
def test_counts_decay_by_token_whatever_the_batches(batch: int, lfru: bool) -> None:
    ids = random_ids(30, SYNTHETIC, 9)
    policy = Frequency(half_life_tokens=4, lfru=lfru)
    driver = Driver(policy, SYNTHETIC)
    for start in range(0, 30, batch):
        driver.observe(make_step(ids[start : start + batch]))
    expected = np.zeros((3, 16))
    age = np.full((3, 16), np.inf)
    for token in ids:
        expected *= 2 ** (-1 / 4)
        age += 1
        for layer, experts in enumerate(token):
            for expert in experts[experts >= 0]:
                expected[layer, expert] += 1
                age[layer, expert] = 0
    if lfru:
        expected /= age + 1
    np.testing.assert_allclose(policy.scores(driver.history), expected, rtol=1e-6)
    assert policy.bonus(driver.history).tolist() == [1, 1, 1]


def test_a_half_life_halves() -> None:
    policy = Frequency(half_life_tokens=16)
    driver = Driver(policy, SYNTHETIC)
    first = np.full((1, 3, 4), -1, np.int32)
    first[0, 1, 0] = 5
    driver.observe(make_step(first))
    for _ in range(16):
        driver.observe(make_step(np.full((1, 3, 4), -1, np.int32)))
    assert policy.scores(driver.history)[1, 5] == pytest.approx(0.5)
