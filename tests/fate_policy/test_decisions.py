from __future__ import annotations

import numpy as np
from policy_contract import real_trace

from fate_policy.base import Step
from fate_policy.belady import Belady
from fate_policy.decisions import decisions, reaches
from fate_policy.kernels import Routing, simulate_scores
from fate_policy.replay import replay
from fate_policy.train import FAR, next_uses


def test_perfect_scores_decide_as_the_optimum() -> None:
    routed = Routing.of_trace(real_trace())
    following = np.full((400, 24, 32), 1000, np.float32)
    upcoming = np.full((24, 32), 1000, np.float32)
    for t in range(399, -1, -1):
        following[t] = upcoming
        for layer in range(24):
            upcoming[layer, routed.ids[t, layer]] = t
    judged = decisions(routed, 8, -following, 4)
    assert (judged.as_optimum, judged.used_again) == (1, 0)


def test_it_evicts_as_the_replay_does() -> None:
    routed = Routing.of_trace(real_trace())
    scores = np.random.default_rng(1).random((400, 24, 32), np.float32)
    assert decisions(routed, 8, scores, 4).n == simulate_scores(routed, 8, scores).counters.evictions.sum()
    lru = decisions(routed, 8, np.zeros_like(scores), 4)
    assert lru.n == simulate_scores(routed, 8, np.zeros_like(scores)).counters.evictions.sum()
    assert 0.2 < lru.as_optimum < 0.35


def test_what_the_optimum_evicts_is_used_again_where_reaches_says() -> None:
    routed = real_trace().slice(0, 200)
    gone: list[np.ndarray] = []

    class Spied(Belady):
        def observe(self, step: Step) -> None:
            super().observe(step)
            gone.append(step.evictions)

    replay(routed, Spied(), n_slots=8)
    ids = routed.experts()
    far = next_uses(ids, 32, np.arange(200))
    found = reaches(ids, 32, 8, FAR)
    n = 0
    for t, evicted in enumerate(gone[8:], start=8):  # all layers are full
        layers, first = np.unique(evicted[:, 0], return_index=True)
        assert found[t, layers].tolist() == far[t, layers, evicted[first, 1]].tolist()
        n += len(layers)
    assert n > 500
    assert (found[0] == FAR).all()
