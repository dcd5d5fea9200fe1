from __future__ import annotations

import numpy as np
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
from fate_policy.random import Random
from fate_policy.replay import replay


class TestRandom(PolicyContract):
    name = "random"
    params = {"seed": 7}  # noqa: RUF012 - read only


def test_golden_counts() -> None:
    assert golden(replay(synthetic_trace(), "random")) == (1970, 1102, 1148, 1125, 196)
    assert golden(replay(real_trace(), "random", n_slots=8)) == (25252, 13148, 13148, 12956, 2316)


def test_every_publication_and_seed_draws_anew() -> None:
    drawn = []
    for seed in (0, 1):
        driver = Driver(Random(seed=seed), SYNTHETIC)
        for token in range(3):
            driver.observe(make_step(random_ids(3, SYNTHETIC, 1)[token : token + 1]))
            published = driver.publish()
            assert published is not None
            drawn.append(published[0].tobytes())
    assert len(set(drawn)) == 6


def test_a_batch_publishes_once() -> None:
    driver = Driver(Random(), SYNTHETIC)
    first = Random()
    first.start(SYNTHETIC)
    expected = first.scores(driver.history)
    driver.observe(make_step(random_ids(9, SYNTHETIC, 1)))
    published = driver.publish()
    assert published is not None
    assert np.array_equal(published[0], expected)
