"""The embedded model gives the bits of the run without the pool: any policy, capacity, mode and batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fate_bind.session import Session
from fate_policy.base import Policy
from fate_policy.frequency import Frequency
from fate_policy.lru import LRU
from fate_policy.random import Random
from fate_policy.static import Static

pytestmark = pytest.mark.model

N_LAYERS, N_EXPERTS, K = 8, 32, 4
SLOTS = {"min": K, "25%": 8, "50%": 16, "all but one": N_EXPERTS - 1}
ARGS = ["-c", "512", "-np", "4", "-ub", "64", "-t", "2"]
TEXT = "Once upon a time there was a fox who lived near a river. One day the fox wanted to cross it, but"

Run = Callable[[Session], NDArray[np.float32]]


@dataclass(frozen=True)
class Workload:
    """Something to decode, and how many of its pairs go through a pool of so many slots."""

    run: Run
    pooled: Callable[[int], int]
    routed: int
    args: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    """Real text, and what the model says next: the same for all runs."""
    with Session(args=ARGS, fate=False) as session:
        prompt = session.tokenize(TEXT).tolist()
        text = list(prompt)
        last = session.logits(prompt)[-1]
        while len(text) < 96:
            text.append(int(np.argmax(last)))
            last = session.logits([text[-1]])[-1]
    return text


@pytest.fixture(scope="module")
def workloads(tokens: list[int]) -> dict[str, Workload]:
    n = 40
    pairs = N_LAYERS * K

    def prompt(session: Session) -> NDArray[np.float32]:
        return session.logits(tokens[:n])

    def decode(session: Session) -> NDArray[np.float32]:
        rows = [session.logits(tokens[:8])] + [session.logits([token]) for token in tokens[8:n]]
        return np.concatenate(rows)

    def sequences(session: Session) -> NDArray[np.float32]:
        parts = [tokens[i * 20 : i * 20 + 5] for i in range(4)]
        flat = [token for part in parts for token in part]
        at = list(range(5)) * 4
        of = [sequence for sequence in range(4) for _ in range(5)]
        rows = [session.decode(flat, at, of)]
        for step in range(5, 17):
            rows.append(session.decode([tokens[i * 20 + step] for i in range(4)], [step] * 4, range(4)))
        return np.concatenate(rows)

    return {
        "prompt": Workload(prompt, lambda slots: n * pairs if n * K <= slots else 0, n * pairs),
        "prompt, -ub 1": Workload(prompt, lambda slots: n * pairs, n * pairs, ("-ub", "1")),
        "prompt, -ub 2": Workload(
            prompt, lambda slots: n * pairs if slots >= 2 * K else 0, n * pairs, ("-ub", "2")
        ),
        "decode": Workload(decode, lambda slots: ((n - 8) + (8 if slots >= 8 * K else 0)) * pairs, n * pairs),
        "4 sequences": Workload(
            sequences,
            lambda slots: (12 * 4 if slots >= 4 * K else 0) * pairs + (20 * pairs if slots >= 20 * K else 0),
            (20 + 12 * 4) * pairs,
        ),
    }


@pytest.fixture(scope="module")
def references(
    workloads: dict[str, Workload],
) -> Iterator[dict[str, tuple[Session, NDArray[np.float32]]]]:
    """For each workload the plain session and its logits."""
    made = {}
    for name, workload in workloads.items():
        session = Session(args=[*ARGS, *workload.args], fate=False)
        made[name] = (session, workload.run(session))
    yield made
    for session, _ in made.values():
        session.close()


@pytest.fixture(scope="module")
def profile(tokens: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "trace.npz"
    with Session(args=ARGS, record=path) as session:
        session.logits(tokens)
    return path


def make(name: str, profile: Path) -> Policy:
    return {
        "lru": LRU,
        "frequency": Frequency,
        "lfru": lambda: Frequency(half_life_tokens=8, lfru=True),
        "static": lambda: Static(profile=str(profile)),
        "random": lambda: Random(seed=7),
    }[name]()


@pytest.mark.parametrize("workload", ["prompt", "prompt, -ub 1", "prompt, -ub 2", "decode", "4 sequences"])
@pytest.mark.parametrize("mode", ["table", "callback"])
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("policy", ["lru", "frequency", "lfru", "static", "random"])
def test_same_bits(
    policy: str,
    slots: str,
    mode: str,
    workload: str,
    workloads: dict[str, Workload],
    references: dict[str, tuple[Session, NDArray[np.float32]]],
    profile: Path,
) -> None:
    plain, expected = references[workload]
    n_slots = SLOTS[slots]
    with plain.fork(policy=make(policy, profile), slots=n_slots, mode=mode) as session:
        got = workloads[workload].run(session)
        session.check()
    stats = session.stats()
    total = session.counters().totals()
    assert got.shape == expected.shape
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))

    assert stats["engaged"]
    assert stats["layers_engaged"] == N_LAYERS
    assert stats["mode"] == mode
    assert stats["slots"] == n_slots * N_LAYERS
    pooled = workloads[workload].pooled(n_slots)
    assert total["hits"] + total["misses"] == pooled
    assert total["bypassed"] == workloads[workload].routed - pooled
    assert total["routed"] == workloads[workload].routed
    assert total["staged"] == 0
    assert total["fills"] == total["misses"] + total["seed_fills"] > 0
    assert (total["seed_fills"] > 0) == (total["bypassed"] > 0)
    if pooled:
        assert total["hits"] > 0
        assert total["misses"] > 0
    if mode == "callback" or policy != "lru":
        assert stats["policy_seconds"] > 0


@pytest.mark.parametrize("slots", [N_EXPERTS, "100%", "1GiB"])
def test_all_slots_is_not_engaged_and_costs_nothing(slots: int | str, tokens: list[int]) -> None:
    with Session(args=ARGS, fate=False) as plain, plain.fork(slots=slots) as session:
        expected, got = plain.logits(tokens[:30]), session.logits(tokens[:30])
        stats = session.stats()
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert not stats["engaged"]
    assert stats["reason"] == "all experts resident"
    assert stats["pool_bytes"] == 0
    assert stats["routed"] == 0
    assert stats["fills"] == 0


def test_slots_may_differ_by_layer(tokens: list[int]) -> None:
    slots = [4, 8, 12, 16, 20, 24, 28, 31]
    with Session(args=ARGS, fate=False) as plain, plain.fork(slots=slots) as session:
        for token in tokens[:40]:
            expected, got = plain.logits([token]), session.logits([token])
            assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
        assert session.stats()["per_layer"]["slots"] == slots
        hits = session.counters().hits
    assert hits[-1] > hits[0]


def test_some_layers_whole_are_left_alone(tokens: list[int]) -> None:
    slots = [4] * 7 + [32]
    with Session(args=ARGS, fate=False) as plain, plain.fork(slots=slots) as session:
        expected, got = plain.logits(tokens[:1]), session.logits(tokens[:1])
        stats = session.stats()
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert stats["engaged"]
    assert stats["layers_engaged"] == 7
    assert stats["reason"] == "all experts resident"


def test_long_greedy_decode_gives_the_same_text() -> None:
    with Session(args=["-c", "512"], fate=False) as plain, plain.fork(slots="12.5%") as session:
        expected = "".join(plain.generate("Once upon a time", 200))
        assert "".join(session.generate("Once upon a time", 200)) == expected
    assert len(expected) > 200


def test_sampled_text_depends_on_the_seed_only() -> None:
    texts = []
    for fate, seed in ((False, 1), (True, 1), (True, 2)):
        with Session(args=["-c", "256"], fate=fate) as session:
            texts.append("".join(session.generate("The sun", 60, temperature=0.9, seed=seed)))
    assert texts[0] == texts[1] != texts[2]
