"""On a GPU, callback mode: whatever a policy answers, and when, the bits are those of the resident run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.test_exact import ARGS, N_LAYERS, RESIDENT, K, Logits
from numpy.typing import NDArray

from fate_bind.host import Host
from fate_bind.session import Session
from fate_policy.base import History, Policy, Step
from fate_policy.config import load as load_config
from fate_policy.counters import Counters
from fate_policy.driver import policy_name
from fate_policy.errors import PolicyError
from fate_policy.lru import LRU
from fate_policy.replay import replay
from fate_policy.trace import load

pytestmark = [pytest.mark.gpu, pytest.mark.model]

TOKENS = [(i * 977 + 31) % 4000 for i in range(90)]
N_PROMPT = 40  # staged, so that seeding asks too
TIMEOUT = 0.2


@pytest.fixture(scope="module")
def pooled() -> Iterator[Session]:
    with Session(args=ARGS, fate=False) as session:
        yield session


@pytest.fixture(scope="module")
def expected() -> Logits:
    with Session(args=[*ARGS, *RESIDENT], fate=False, place=False) as session:
        return run(session)


def run(session: Session, tokens: list[int] = TOKENS) -> Logits:
    """A prompt, then single tokens; rows of a call that raised the policy's error are NaN."""
    rows = []
    for start, stop in [(0, N_PROMPT), *((i, i + 1) for i in range(N_PROMPT, len(tokens)))]:
        try:
            rows.append(session.logits(tokens[start:stop]))
        except (PolicyError, BrokenError):
            rows.append(np.full((stop - start, session.n_vocab), np.nan, np.float32))
    return np.concatenate(rows)


def fork(pooled: Session, policy: Policy, slots: int = 8, record: Path | None = None) -> Session:
    keys = {"slots": slots, "mode": "callback", "miss_timeout_seconds": TIMEOUT}
    config = replace(load_config("lru", keys), policy=policy_name(policy))
    return pooled.fork_with(Host(config, policy, record, require=True))


def same_bits(got: Logits, expected: Logits, n_raised: int = 0) -> None:
    lost = np.isnan(got).all(axis=1)
    unequal = (got.view(np.uint32) != expected.view(np.uint32)).any(axis=1) & ~lost
    assert not unequal.any(), f"{unequal.sum()} of {len(unequal)} rows differ, first {np.argmax(unequal)}"
    assert (np.diff(np.flatnonzero(lost), prepend=-2) > 1).sum() == n_raised


class BrokenError(Exception):
    pass


class Asked(Policy):
    """LRU; counts questions, and fails if two calls overlap. `at`: when its children misbehave."""

    def __init__(self, at: int = 60) -> None:
        self.at = at
        self.n_asked = 0
        self.threads: set[int] = set()
        self._busy = threading.Lock()

    def observe(self, step: Step) -> None:
        assert self._busy.acquire(blocking=False), "observe() while victims() runs"
        time.sleep(0.0005)
        self._busy.release()

    def victims(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
        assert self._busy.acquire(blocking=False), "victims() while another call runs"
        try:
            self.threads.add(threading.get_ident())
            self.n_asked += 1
            return self.answer(layer, n, pinned, history)
        finally:
            self._busy.release()

    def answer(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
        return super().victims(layer, n, pinned, history)


class Raises(Asked):
    def answer(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
        if self.n_asked >= self.at:
            raise BrokenError("on purpose")
        return super().answer(layer, n, pinned, history)


class Lies(Asked):
    def answer(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
        if self.n_asked >= self.at:
            return np.flatnonzero(pinned)[:n]
        return super().answer(layer, n, pinned, history)


class Sleeps(Asked):
    """Now and then too late: with the other victims that it names, what went meanwhile must be told to it."""

    def answer(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
        if self.n_asked % self.at == 0:
            time.sleep(2.2 * TIMEOUT)
        candidates = np.flatnonzero(history.resident[layer, : len(pinned)] & ~pinned)
        return candidates[::-1][:n]


def totals(session: Session) -> dict[str, int]:
    total = session.counters().totals()
    assert total["fills"] == total["misses"] + total["seed_fills"] > 0
    assert total["staged"] == N_PROMPT * N_LAYERS * K
    return total


def replayed(path: Path, policy: Policy) -> Counters:
    return replay(load(path), policy, mode="callback")


@pytest.mark.parametrize("slots", [4, 8, 31])
def test_one_thread_at_a_time_asks_and_the_counters_are_those_of_replay(
    slots: int, pooled: Session, expected: Logits, tmp_path: Path
) -> None:
    policy = Asked()
    with fork(pooled, policy, slots, tmp_path / "trace.npz") as session:
        same_bits(run(session), expected)
        session.check()
        stats = session.stats()
        total = totals(session)
    assert stats["policy_error"] is None
    assert stats["timeouts"] == 0
    assert len(policy.threads) == 1
    assert threading.get_ident() not in policy.threads
    assert policy.n_asked <= stats["asks"] <= total["rows"] - total["rows_all_resident"] + N_LAYERS
    assert session.counters() == replayed(tmp_path / "trace.npz", LRU())


@pytest.mark.parametrize("kind", [Raises, Lies])
def test_a_policy_that_fails_is_left_for_lru(
    kind: type[Asked], pooled: Session, expected: Logits, tmp_path: Path
) -> None:
    policy = kind()
    with fork(pooled, policy, record=tmp_path / "trace.npz") as session:
        same_bits(run(session), expected, n_raised=1)
        session.check()
        stats = session.stats()
        totals(session)
        assert stats["policy_error"] is not None
    assert stats["timeouts"] == 0
    assert policy.n_asked == policy.at
    # it was LRU up to there, and LRU from there on
    assert session.counters() == replayed(tmp_path / "trace.npz", LRU())


def test_a_policy_that_is_late_is_passed_over_told_and_asked_again(pooled: Session, expected: Logits) -> None:
    policy = Sleeps()
    with fork(pooled, policy) as session:
        same_bits(run(session), expected)
        session.check()
        stats = session.stats()
        totals(session)
        assert stats["policy_error"] is None, "what LRU decided meanwhile was not told to the policy"
    n_late = policy.n_asked // policy.at
    assert n_late > 0
    assert n_late <= stats["timeouts"] <= n_late * N_LAYERS  # the rest of the token's misses do not wait
    assert TIMEOUT * n_late <= stats["ask_seconds"] < TIMEOUT * n_late + 1


def test_a_second_ctrl_c_breaks_off_a_policy_that_never_returns(pooled: Session) -> None:
    class Stuck(Asked):
        def answer(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
            while True:
                pass

    def press() -> None:
        for _ in range(2):
            time.sleep(4 * TIMEOUT)
            os.kill(os.getpid(), signal.SIGINT)

    with fork(pooled, Stuck()) as session:
        thread = threading.Thread(target=press)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run(session)
        thread.join()
        session.check()
        assert "KeyboardInterrupt" in session.stats()["policy_error"]
        session.logits(TOKENS[:1])


def test_sessions_on_two_threads_ask_at_once(pooled: Session, expected: Logits) -> None:
    got: list[Logits] = [np.empty(0, np.float32)] * 2

    def go(i: int) -> None:
        got[i] = run(sessions[i])

    sessions = [fork(pooled, Asked()), fork(pooled, Sleeps(), 12)]
    threads = [threading.Thread(target=go, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, session in enumerate(sessions):
        with session:
            same_bits(got[i], expected)
            session.check()
            assert session.stats()["policy_error"] is None
    assert sessions[0].stats()["timeouts"] == 0


def test_closing_right_after_a_late_answer_is_clean(pooled: Session) -> None:
    for _ in range(3):
        with fork(pooled, Sleeps(at=5)) as session:
            session.logits(TOKENS[:1])
            session.logits(TOKENS[1:2])
            session.logits(TOKENS[2:3])


def test_a_miss_costs_what_was_promised(pooled: Session) -> None:
    with fork(pooled, LRU()) as session:
        run(session)
        before = session.stats()
        for token in TOKENS:
            session.logits([token])
        stats = session.stats()
    asks = stats["asks"] - before["asks"]
    cost_us = 1e6 * (stats["ask_seconds"] - before["ask_seconds"]) / asks
    print(f"{cost_us:.1f} us a miss, {asks} misses")
    assert cost_us < 60
