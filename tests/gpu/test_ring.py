"""On a GPU that may not read the model's memory: experts come through the ring, and the bits stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu.test_exact import (
    N_LAYERS,
    POLICIES,
    SLOTS,
    WORKLOADS,
    Logits,
    assert_same_bits,
    expected,
    launches,
    pooled,
    resident,
    tokens,
)

from fate_bind.host import Host
from fate_bind.session import Session
from fate_bind.stats import summary
from fate_policy.config import load as load_config
from fate_policy.replay import replay
from fate_policy.trace import load

__all__ = ["expected", "pooled", "resident", "tokens"]  # fixtures

pytestmark = [pytest.mark.gpu, pytest.mark.model]


def fork(pooled: Session, policy: str, mode: str, slots: int, record: Path | None = None) -> Session:
    config = load_config("lru", {"slots": slots, "mode": mode, "sync": True, "page_lock": False})
    return pooled.fork_with(Host(config, POLICIES[policy](), record, require=True))


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("mode", ["table", "callback"])
def test_same_bits_as_resident(
    mode: str, slots: str, workload: str, pooled: Session, tokens: list[int], expected: dict[str, Logits]
) -> None:
    with fork(pooled, "lru", mode, SLOTS[slots]) as session:
        got = WORKLOADS[workload](session, tokens)
        session.check()
        stats = session.stats()
    assert_same_bits(got, expected[workload])
    assert stats["layers_engaged"] == N_LAYERS
    assert stats["bounced"] == "page_lock is false"
    assert stats["timeouts"] == 0
    assert stats["fills"] > 0


def test_it_is_said(pooled: Session, tokens: list[int]) -> None:
    with fork(pooled, "lru", "table", 8) as session:
        session.logits(tokens[:8])
        assert "experts go through a ring" in summary(session.report())
    with pooled.fork(policy="lru", slots=8, mode="table", require=True) as session:
        session.logits(tokens[:8])
        assert session.stats()["bounced"] == ""
        assert "ring" not in summary(session.report())


@pytest.mark.parametrize("policy", ["lru", "frequency"])
@pytest.mark.parametrize("mode", ["table", "callback"])
def test_the_counters_are_those_of_replay(
    mode: str, policy: str, pooled: Session, tokens: list[int], tmp_path: Path
) -> None:
    with fork(pooled, policy, mode, 10, tmp_path / "trace.npz") as session:
        session.logits(tokens[:40])
        for token in tokens[40:100]:
            session.logits([token])
    assert session.counters() == replay(load(tmp_path / "trace.npz"), POLICIES[policy](), mode=mode)


def test_decode_is_one_captured_graph(pooled: Session, tokens: list[int]) -> None:
    with fork(pooled, "lru", "table", 8) as session:
        for token in tokens[:4]:
            session.logits([token])
        before = launches(session)
        for token in tokens[4:60]:
            session.logits([token])
        assert launches(session) == before
