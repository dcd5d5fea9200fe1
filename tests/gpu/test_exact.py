"""On a GPU: the pool in VRAM gives the bits of the run with all experts resident there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fate_bind import library
from fate_bind.host import Host
from fate_bind.session import Session
from fate_policy.base import Policy
from fate_policy.config import load as load_config
from fate_policy.frequency import Frequency
from fate_policy.lru import LRU
from fate_policy.random import Random
from fate_policy.replay import replay
from fate_policy.trace import load

pytestmark = [pytest.mark.gpu, pytest.mark.model]

N_LAYERS, N_EXPERTS, K = 8, 32, 4
SLOTS = {"min": K, "25%": 8, "50%": 16, "all but one": N_EXPERTS - 1}
ARGS = ["-c", "32768", "-np", "32", "-ub", "512"]
RESIDENT = ["-ngl", "999", "-fit", "off"]
TEXT = "Once upon a time there was a fox who lived near a river. One day the fox wanted to cross it, but"
MMVQ = 8  # tokens that the pool path takes at most on Volta, Ada, Hopper and Blackwell

Logits = NDArray[np.float32]
POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": LRU,
    "frequency": Frequency,
    "lfru": lambda: Frequency(half_life_tokens=8, lfru=True),
    "random": lambda: Random(seed=7),
}


@pytest.fixture(scope="module")
def resident() -> Iterator[Session]:
    with Session(args=[*ARGS, *RESIDENT], fate=False, place=False) as session:
        yield session


@pytest.fixture(scope="module")
def pooled() -> Iterator[Session]:
    """A session whose model has its experts in host memory; tests fork it."""
    with Session(args=ARGS, fate=False) as session:
        yield session


@pytest.fixture(scope="module")
def tokens(resident: Session) -> list[int]:
    text = resident.tokenize(TEXT).tolist()
    resident.clear()
    last = resident.logits(text)[-1]
    while len(text) < 700:
        text.append(int(np.argmax(last)) if len(text) % 5 else (len(text) * 977) % resident.n_vocab)
        last = resident.logits([text[-1]])[-1]
    resident.clear()
    return text


def decode(session: Session, tokens: list[int]) -> Logits:
    return np.concatenate([session.logits(tokens[:8])] + [session.logits([t]) for t in tokens[8:72]])


def prompts(session: Session, tokens: list[int]) -> Logits:
    rows = []
    for n in (1, 2, 7, 9, 16, 31, 33, 130, 512, 600):
        session.clear()
        rows.append(session.logits(tokens[:n]))
    return np.concatenate(rows)


def batches(session: Session, tokens: list[int]) -> Logits:
    rows = []
    for n in (*range(1, 10), 12, 16, 24, 32):
        session.clear()
        for step in range(4):
            batch = [tokens[(sequence * 17 + step) % len(tokens)] for sequence in range(n)]
            rows.append(session.decode(batch, [step] * n, range(n)))
    return np.concatenate(rows)


def mixed(session: Session, tokens: list[int]) -> Logits:
    """Prompt, decode, prompt again: what one path leaves behind the next one finds."""
    rows = []
    for start, n_prompt in ((0, 40), (60, 130), (220, 40), (280, 200), (500, 64)):
        rows.append(session.logits(tokens[start : start + n_prompt]))
        rows += [session.logits([t]) for t in tokens[start + n_prompt : start + n_prompt + 20]]
    return np.concatenate(rows)


WORKLOADS = {"decode": decode, "prompts": prompts, "batches": batches, "mixed": mixed}


def run_all(session: Session, tokens: list[int]) -> dict[str, Logits]:
    """Return what every workload gives."""
    made = {}
    for name, run in WORKLOADS.items():
        session.clear()
        made[name] = run(session, tokens)
    return made


def assert_same_bits(got: Logits, expected: Logits) -> None:
    unequal = (got.view(np.uint32) != expected.view(np.uint32)).any(axis=1)
    assert not unequal.any(), f"{unequal.sum()} of {len(unequal)} rows differ, first {np.argmax(unequal)}"


@pytest.fixture(scope="module")
def expected(resident: Session, tokens: list[int]) -> dict[str, Logits]:
    return run_all(resident, tokens)


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("mode", ["table", "callback"])
@pytest.mark.parametrize("policy", POLICIES)
def test_same_bits_as_resident(
    policy: str,
    mode: str,
    slots: str,
    workload: str,
    pooled: Session,
    tokens: list[int],
    expected: dict[str, Logits],
) -> None:
    n_slots = SLOTS[slots]
    with pooled.fork(policy=POLICIES[policy](), slots=n_slots, mode=mode, require=True) as session:
        got = WORKLOADS[workload](session, tokens)
        session.check()
        total = session.counters().totals()
        stats = session.stats()
    assert_same_bits(got, expected[workload])
    assert stats["layers_engaged"] == N_LAYERS
    assert stats["policy_error"] is None
    assert (stats["asks"] > 0) == (mode == "callback")
    assert stats["timeouts"] == 0
    assert total["bypassed"] == 0
    assert total["routed"] == total["hits"] + total["misses"] + total["staged"]
    came = total["misses"] - total["prefetch_late"] + total["prefetches"] + total["seed_fills"]
    assert total["fills"] == came > 0
    if mode == "table" and slots in ("25%", "50%") and workload in ("decode", "mixed"):
        assert total["prefetches"] > 0
    if workload == "decode":
        assert total["hits"] + total["misses"] == (64 + (8 if n_slots >= 8 * K else 0)) * N_LAYERS * K


@pytest.mark.parametrize("n", range(1, 10))
def test_batch_takes_the_pool_up_to_the_limit(n: int, pooled: Session, tokens: list[int]) -> None:
    with pooled.fork(policy="lru", slots=31, mode="table") as session:
        session.decode(tokens[:n], [0] * n, range(n))
        total = session.counters().totals()
    is_pooled = n * K <= 31 and n <= MMVQ
    assert (total["staged"] == 0) == is_pooled
    assert total["routed"] == n * N_LAYERS * K


@pytest.mark.parametrize("slots", [4, 10, 31])
@pytest.mark.parametrize(
    ("mode", "sync"),
    [("table", True), ("table", False), ("callback", True)],
    ids=["sync", "late", "callback"],
)
@pytest.mark.parametrize("policy", POLICIES)
def test_replay_counts_what_the_device_counts(
    policy: str, mode: str, sync: bool, slots: int, pooled: Session, tokens: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "trace.npz"
    with pooled.fork(
        policy=POLICIES[policy](),
        slots=slots,
        mode=mode,
        sync=sync,
        prefetch="off",
        record=path,
        require=True,
    ) as session:
        session.logits(tokens[:40])
        for token in tokens[40:100]:
            session.logits([token])
        session.clear()
        for step in range(6):
            session.decode(tokens[step * 6 : step * 6 + 6], [step] * 6, range(6), [True, False] * 3)
        session.decode(tokens[:3], [6] * 3, range(3), [False] * 3)
        session.clear()
        session.logits(tokens[:150])
        session.logits(tokens[150:151])
        session.check()
    engine = session.counters()
    replayed = replay(load(path), POLICIES[policy](), mode=mode, sync=sync)
    assert engine == replayed, f"{engine.totals()}\n{replayed.totals()}"
    totals = engine.totals()
    assert totals["hits"] > 0
    assert totals["misses"] > 0
    assert totals["staged"] > 0
    assert totals["seed_fills"] > 0


def test_long_greedy_decode_gives_the_same_tokens(resident: Session, pooled: Session) -> None:
    resident.clear()
    expected = "".join(resident.generate("Once upon a time", 1000))
    with pooled.fork(policy="lru", slots=8, mode="table") as session:
        assert "".join(session.generate("Once upon a time", 1000)) == expected


def launches(session: Session) -> tuple[int, int]:
    """Return how often the host launched ops of ours, and how many of these went into a captured graph."""
    ffi, lib = library.load()
    info = ffi.new("fate_info *")
    library.check(lib.fate_engine_get_info(lib.fate_context_engine(session._context), info))
    return int(info.gpu_launches), int(info.gpu_captures)


@pytest.mark.parametrize("mode", ["table", "callback"])
def test_decode_is_one_captured_graph(mode: str, pooled: Session, tokens: list[int]) -> None:
    """Once captured, tokens run without the host: none of our launchers is called again."""
    with pooled.fork(policy="lru", slots=8, mode=mode) as session:
        for token in tokens[:4]:
            session.logits([token])
        before = launches(session)
        for token in tokens[4:100]:
            session.logits([token])
        assert launches(session) == before
        assert before[1] == N_LAYERS
        assert before[0] - before[1] <= 2 * N_LAYERS
        assert session.counters().totals()["steps"] == 100


def graph_nodes(session: Session) -> int:
    """Return the nodes of the newest captured graph up to the last op of ours in it."""
    ffi, lib = library.load()
    info = ffi.new("fate_info *")
    library.check(lib.fate_engine_get_info(lib.fate_context_engine(session._context), info))
    return int(info.gpu_nodes)


def test_one_node_a_layer_is_all_that_a_decoded_token_has_more(tokens: list[int]) -> None:
    """So upstream fuses what it does in the resident run. Routing is replayed, for an op of ours in both."""
    ffi, lib = library.load()
    ids = np.argsort(np.random.default_rng(1).random((64, N_LAYERS, N_EXPERTS)))[:, :, :K].astype(np.int32)
    ids = np.ascontiguousarray(ids)
    library.check(lib.fate_replay_routing(ffi.from_buffer("int32_t[]", ids), *ids.shape))
    nodes = {}
    try:
        for name, options in (
            ("resident", {"args": [*ARGS, *RESIDENT], "mode": "off", "place": False}),
            ("pool", {"args": ARGS, "slots": 8, "require": True, "prefetch": "off"}),
            ("ahead", {"args": ARGS, "slots": 8, "require": True}),
        ):
            with Session(policy="lru", **options) as session:
                for token in tokens[:6]:
                    session.logits([token])
                nodes[name] = graph_nodes(session)
    finally:
        library.check(lib.fate_replay_routing(ffi.NULL, 0, 0, 0))
    assert nodes["resident"] > 0
    assert nodes["pool"] == nodes["resident"] + N_LAYERS
    assert nodes["ahead"] == nodes["pool"] + 2 * (N_LAYERS - 1)  # beside them, behind each layer that tells


def test_large_prompts_are_never_captured(resident: Session, pooled: Session, tokens: list[int]) -> None:
    """What the copy engine brings depends on the slots at the time; a replay would bring others."""
    resident.clear()
    expected = resident.logits(tokens[:300])
    with pooled.fork(policy="lru", slots=8, mode="table") as session:
        for start in range(0, 300, 60):
            for token in tokens[start : start + 60]:
                session.logits([token])
            before = launches(session)
            session.clear()
            assert np.array_equal(session.logits(tokens[:300]), expected)
            session.clear()
            after = launches(session)
            assert after[0] - before[0] == N_LAYERS
            assert after[1] == before[1]


def test_a_last_layer_with_few_rows_after_split_ones_is_not_captured(tokens: list[int]) -> None:
    """With the KV cache on the host each layer is a graph of its own, which could be captured by itself."""
    args = [*ARGS, "-nkvo"]
    wanted = [False] * 580 + [True] * 20
    with Session(args=[*args, *RESIDENT], fate=False, place=False) as session:
        expected = session.decode(tokens[:600], outputs=wanted)
    with Session(args=args, policy="lru", slots=K, require=True) as session:
        for _ in range(4):
            session.clear()
            assert np.array_equal(session.decode(tokens[:600], outputs=wanted), expected)


def test_throttled_fills_take_their_time(tokens: list[int]) -> None:
    rate = 0.05  # 10^9 bytes a second
    with Session(args=ARGS, policy="lru", slots=K, require=True, throttle_gbps=rate) as session:
        session.logits(tokens[:1])
        before = session.counters().totals()["bytes"]
        began = time.perf_counter()
        for token in tokens[1:20]:
            session.logits([token])
        seconds = time.perf_counter() - began
        filled = session.counters().totals()["bytes"] - before
    assert filled > 0
    assert filled / (rate * 1e9) < seconds < 1.5 * filled / (rate * 1e9) + 0.2


def test_a_context_that_stages_every_step_gives_the_bits_of_resident(
    pooled: Session, tokens: list[int], expected: dict[str, Logits]
) -> None:
    """The reference of `verify` where the experts do not fit."""
    for name, workload in WORKLOADS.items():
        host = Host(load_config("lru", {"slots": K}), require=True, stage_all=True)
        with pooled.fork_with(host) as session:
            got = workload(session, tokens)
            total = session.counters().totals()
        assert np.array_equal(got, expected[name]), name
        assert total["hits"] == total["misses"] == 0
        assert total["staged"] == total["routed"]
