"""On two GPUs: layers on each have a pool there, and the bits are those of all experts resident on both."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu.test_auto import used_vram
from gpu.test_exact import (
    ARGS,
    N_LAYERS,
    POLICIES,
    RESIDENT,
    SLOTS,
    TEXT,
    WORKLOADS,
    Logits,
    assert_same_bits,
    graph_nodes,
    launches,
    run_all,
)
from gpu.test_models import cudart

from fate_bind.session import Session
from fate_policy.prefetch_rule import Prefetch
from fate_policy.replay import replay
from fate_policy.trace import load

SPLIT = ["-sm", "layer", "-ts", "1,1"]

pytestmark = [pytest.mark.gpu, pytest.mark.model]


def n_gpus() -> int:
    """Return how many this process sees, by the runtime that a session has loaded."""
    count = ctypes.c_int()
    assert ctypes.CDLL(cudart()).cudaGetDeviceCount(ctypes.byref(count)) == 0
    return count.value


def used_on_each() -> list[int]:
    cuda = ctypes.CDLL(cudart())
    used = []
    for gpu in (1, 0):
        assert cuda.cudaSetDevice(gpu) == 0
        used.append(used_vram())
    return used


@pytest.fixture(scope="module")
def pooled() -> Iterator[Session]:
    with Session(args=[*ARGS, *SPLIT], fate=False) as session:
        if n_gpus() < 2:
            pytest.skip("one GPU only")
        yield session


@pytest.fixture(scope="module")
def tokens(pooled: Session) -> list[int]:
    some = pooled.tokenize(TEXT).tolist()
    return [some[i % len(some)] if i % 3 else (i * 977) % pooled.n_vocab for i in range(700)]


@pytest.fixture(scope="module")
def expected(pooled: Session, tokens: list[int]) -> dict[str, Logits]:
    with Session(args=[*ARGS, *SPLIT, *RESIDENT], fate=False, place=False) as session:
        return run_all(session, tokens)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("mode", ["table", "callback"])
def test_same_bits_as_resident(
    mode: str, slots: str, workload: str, pooled: Session, tokens: list[int], expected: dict[str, Logits]
) -> None:
    policy = POLICIES["lru" if mode == "callback" else "lfru"]()
    with pooled.fork(policy=policy, slots=SLOTS[slots], mode=mode, require=True) as session:
        got = WORKLOADS[workload](session, tokens)
        session.check()
        total = session.counters().totals()
        stats = session.stats()
    assert_same_bits(got, expected[workload])
    assert stats["layers_engaged"] == N_LAYERS
    assert stats["policy_error"] is None
    assert stats["timeouts"] == 0
    assert total["bypassed"] == 0
    if mode == "table" and slots in ("25%", "50%") and workload in ("decode", "mixed"):
        assert total["prefetches"] > 0


def test_each_has_its_share(pooled: Session, tokens: list[int]) -> None:
    """Beyond what a context takes there without a pool."""
    used, share = [], 0
    for options in ({"fate": False}, {"policy": "lru", "slots": 31}):
        before = used_on_each()
        with pooled.fork(**options) as session:
            session.logits(tokens[:4])
            used.append(np.subtract(used_on_each(), before))
            share = int(session.stats()["pool_bytes"])
    assert (used[1] - used[0] > share / 4).all()


@pytest.mark.parametrize("sync", [True, False])
def test_replay_counts_what_the_devices_count(
    sync: bool, pooled: Session, tokens: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "trace.npz"
    prefetch = "layer" if sync else "off"
    with pooled.fork(
        policy="lru", slots=10, prefetch=prefetch, sync=sync, record=path, require=True
    ) as session:
        session.logits(tokens[:40])
        for token in tokens[40:100]:
            session.logits([token])
        session.check()
    engine = session.counters()
    trace = load(path)
    replayed = replay(trace, "lru", sync=sync, prefetch=Prefetch(kind="layer") if sync else None)
    assert engine == replayed, f"{engine.totals()}\n{replayed.totals()}"
    assert (engine.totals()["prefetches"] > 0) == sync


def test_decode_is_one_captured_graph_on_each(pooled: Session, tokens: list[int]) -> None:
    with pooled.fork(policy="lru", slots=8) as session:
        for token in tokens[:4]:
            session.logits([token])
        before = launches(session)
        for token in tokens[4:60]:
            session.logits([token])
        assert launches(session) == before
        assert before[1] == N_LAYERS
        assert graph_nodes(session) > 0
