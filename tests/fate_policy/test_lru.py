from __future__ import annotations

from itertools import pairwise

from policy_contract import PolicyContract, golden, real_trace, synthetic_trace

from fate_policy.replay import replay


class TestLRU(PolicyContract):
    name = "lru"


def test_golden_counts() -> None:
    assert golden(replay(synthetic_trace(), "lru")) == (1991, 1081, 1130, 1107, 202)
    assert golden(replay(real_trace(), "lru", n_slots=8)) == (26389, 12011, 12011, 11819, 2810)


def test_more_slots_never_hit_less() -> None:
    routed = real_trace().slice(0, 150)
    hits = [replay(routed, "lru", n_slots=slots).hits for slots in (4, 8, 12, 20, 31)]
    assert all((more >= fewer).all() for fewer, more in pairwise(hits))


def test_sync_does_not_matter() -> None:
    assert replay(synthetic_trace(), "lru", sync=True) == replay(synthetic_trace(), "lru", sync=False)
