from __future__ import annotations

import numpy as np
from policy_contract import real_trace

from fate_policy.decisions import decisions
from fate_policy.kernels import Routing, simulate_scores


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
