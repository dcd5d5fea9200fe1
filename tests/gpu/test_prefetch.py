"""On a GPU, experts brought in beside the running step: whatever is predicted, the bits stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from exactness.test_replay_agrees import NativeClassifier
from gpu.test_exact import ARGS, N_EXPERTS, N_LAYERS, RESIDENT, K, Logits
from numpy.typing import NDArray
from policy_contract import Books

from fate_bind.session import Session
from fate_policy import assess, train
from fate_policy.base import Geometry, Policy, Step
from fate_policy.classifier import Classifier
from fate_policy.counters import Counters
from fate_policy.errors import PolicyError
from fate_policy.model import Model
from fate_policy.prefetch_rule import Prefetch
from fate_policy.recall import measure
from fate_policy.replay import replay
from fate_policy.trace import load

pytestmark = [pytest.mark.gpu, pytest.mark.model]

TOKENS = [(i * 977 + 31) % 4000 for i in range(120)]
N_PROMPT = 20  # staged
SLOWER = 4.0
"""GB/s: on a faster link this small model's experts come so fast that prefetch, rightly, rests."""
PLANNED = 3
"""Column of `Session.times`, FATE_TIME_PLANNED."""
Chances = NDArray[np.float32]


class Forged(Policy):
    """LRU with predictions of a kind: of the experts that the token before used, and of others."""

    def __init__(
        self, *, make: Callable[[NDArray[np.int32], np.random.Generator], Chances], seed: int = 0
    ) -> None:
        self.make = make
        self.seed = seed

    def start(self, geometry: object) -> None:
        self._rng = np.random.default_rng(self.seed)

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], Chances]:
        chances = self.make(step.ids[-1], self._rng)
        order = np.argsort(-chances, axis=1, kind="stable").astype(np.int32)
        return order, np.take_along_axis(chances, order, axis=1)


def _none(ids: NDArray[np.int32], rng: np.random.Generator) -> Chances:
    return np.zeros((N_LAYERS, N_EXPERTS), np.float32)


def _all(ids: NDArray[np.int32], rng: np.random.Generator) -> Chances:
    return np.ones((N_LAYERS, N_EXPERTS), np.float32)


def _random(ids: NDArray[np.int32], rng: np.random.Generator) -> Chances:
    return rng.random((N_LAYERS, N_EXPERTS), np.float32)


def _before(ids: NDArray[np.int32], rng: np.random.Generator) -> Chances:
    chances = 0.3 * _random(ids, rng)
    np.put_along_axis(chances, ids[:, :K], 0.9, axis=1)
    other = rng.integers(N_EXPERTS, size=(N_LAYERS, 3))
    np.put_along_axis(chances, other, 0.6, axis=1)
    return chances


def _not_before(ids: NDArray[np.int32], rng: np.random.Generator) -> Chances:
    chances = _random(ids, rng)
    np.put_along_axis(chances, ids[:, :K], 0.0, axis=1)
    return chances


KINDS = {"none": _none, "all": _all, "random": _random, "before": _before, "not before": _not_before}


def run(session: Session) -> Logits:
    """A prompt, single tokens, a batch that the pool takes, and single tokens again."""
    rows = [session.logits(TOKENS[:N_PROMPT])]
    rows += [session.logits([token]) for token in TOKENS[N_PROMPT:90]]
    rows += [session.logits(TOKENS[90:92])]
    rows += [session.logits([token]) for token in TOKENS[92:]]
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def expected() -> Logits:
    with Session(args=[*ARGS, *RESIDENT], fate=False, place=False) as session:
        return run(session)


@pytest.fixture(scope="module")
def pooled() -> Iterator[Session]:
    with Session(args=ARGS, fate=False) as session:
        yield session


def check(counters: Counters) -> None:
    """The counters' own arithmetic, layer by layer."""
    c = counters
    assert (c.routed == c.hits + c.misses + c.staged + c.bypassed).all()
    assert (c.fills == c.misses - c.prefetch_late + c.seed_fills + c.prefetches).all()
    assert (c.prefetches >= c.prefetch_useful + c.prefetch_late + c.prefetch_wasted).all()


@pytest.mark.parametrize("prefetch", ["token", "both"])
@pytest.mark.parametrize("slots", [K, K + 1, 8, 16, N_EXPERTS - 1])
@pytest.mark.parametrize("sync", [False, True], ids=["beside", "sync"])
def test_predictions_change_no_bit(
    slots: int, sync: bool, prefetch: str, pooled: Session, expected: Logits
) -> None:
    total = dict.fromkeys(("prefetches", "prefetch_useful", "prefetch_late", "prefetch_wasted"), 0)
    for kind, make in KINDS.items():
        with pooled.fork(
            policy=Forged(make=make),
            slots=slots,
            prefetch=prefetch,
            sync=sync,
            require=True,
            throttle_gbps=SLOWER,
        ) as session:
            assert np.array_equal(run(session), expected), kind
            session.check()
            counters = session.counters()
        check(counters)
        totals = counters.totals()
        if (kind == "none" and prefetch == "token") or slots == K:
            assert totals["prefetches"] == 0
        for name in total:
            total[name] += totals[name]
    if K + 1 < slots < N_EXPERTS - 1:
        assert total["prefetches"] > (100 if sync else 20)  # fewer come in time on a busy machine
        assert total["prefetch_useful"] > 0
        assert total["prefetch_wasted"] > 0
    if sync:
        assert total["prefetch_late"] == 0


@pytest.mark.parametrize("slots", [K, K + 1, 8, 16, N_EXPERTS - 1])
@pytest.mark.parametrize("policy", ["lru", "frequency"])
@pytest.mark.parametrize("sync", [False, True], ids=["beside", "sync"])
def test_what_routers_tell_changes_no_bit(
    slots: int, policy: str, sync: bool, pooled: Session, expected: Logits, tmp_path: Path
) -> None:
    path = tmp_path / "trace.npz"
    with pooled.fork(
        policy=policy,
        slots=slots,
        prefetch="layer",
        sync=sync,
        require=True,
        record=path,
        throttle_gbps=SLOWER,
    ) as session:
        assert np.array_equal(run(session), expected)
        session.check()
        counters, stats = session.counters(), session.stats()
    check(counters)
    assert not stats["no_prefetch"] or slots == K
    totals = counters.totals()
    assert (totals["prefetches"] > 0) == (slots > K)
    trace = load(path)
    assert trace.horizons == (2, 1)
    near = [found for found in measure(trace) if found.horizon == 1]
    assert near[0].used.at_k > 0.6 * near[0].used.n
    if sync:
        assert totals["prefetch_late"] == totals["prefetch_cancelled"] == 0
        assert replay(trace, policy, prefetch=Prefetch(kind="layer")) == counters


def test_where_hardly_anything_is_copied_prefetch_rests(pooled: Session, expected: Logits) -> None:
    with pooled.fork(policy="lru", slots=N_EXPERTS - 1, prefetch="layer", require=True) as session:
        assert np.array_equal(run(session), expected)
        before = session.counters().totals()
        for token in TOKENS:
            session.logits([token])
        after = session.counters().totals()
    assert after["misses"] > before["misses"]
    assert after["prefetches"] == before["prefetches"]


@pytest.fixture(scope="module")
def fitted(pooled: Session, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("fitted") / "trace.npz"
    with pooled.fork(slots=16, record=path) as session:
        run(session)
    small = train.Options(
        sample_every=1, rank_basis=16, rank=16, n_folds=2, heads=((0.25, 4), (0.5, 8)), table_minimum=1
    )
    return train.fit([assess.decode_only(load(path))], small)


@pytest.mark.parametrize("prefetch", ["off", "token", "layer", "both"])
@pytest.mark.parametrize("slots", [8, 16, N_EXPERTS - 1])
@pytest.mark.parametrize("evict_by", ["scores", "lru"])
def test_the_classifier_needs_no_python(
    evict_by: str,
    slots: int,
    prefetch: str,
    fitted: Model,
    pooled: Session,
    expected: Logits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("Python is asked")

    for name in ("observe", "expect", "scores", "predict"):
        monkeypatch.setattr(Classifier, name, asked)
    with pooled.fork(
        policy=Classifier.of(fitted, evict_by=evict_by),
        slots=slots,
        prefetch=prefetch,
        require=True,
        throttle_gbps=SLOWER,
    ) as session:
        assert np.array_equal(run(session), expected)
        session.check()
        totals = session.counters().totals()
    check(session.counters())
    assert (totals["prefetches"] > 0) == (prefetch != "off")
    if prefetch != "off" and slots < N_EXPERTS - 1:
        assert totals["prefetch_useful"] > 0


@pytest.mark.parametrize("evict_by", ["scores", "lru"])
def test_where_layers_predict_the_classifier_does_not(evict_by: str, fitted: Model) -> None:
    """Of the first layer no layer tells: it is planned for only where the policy predicts."""
    first_planned = {}
    for prefetch in ("layer", "both"):
        with Session(
            args=ARGS,
            policy=Classifier.of(fitted, evict_by=evict_by),
            slots=8,
            prefetch=prefetch,
            throttle_gbps=SLOWER,
            times=True,
            require=True,
        ) as session:
            session.logits(TOKENS[:N_PROMPT])
            found = []
            for token in TOKENS[N_PROMPT : N_PROMPT + 10]:
                session.logits([token])
                found.append(int(session.times()[0, PLANNED]))
            session.check()
        first_planned[prefetch] = sum(found)
    assert first_planned["layer"] == 0
    assert first_planned["both"] > 0


@pytest.mark.parametrize("slots", [6, 10, 16])
def test_the_device_evaluates_the_classifier_as_the_host_does(
    slots: int, fitted: Model, pooled: Session, tmp_path: Path
) -> None:
    """To the last bit, whatever comes between single tokens: replay's answers are the host's."""
    path = tmp_path / "trace.npz"
    with pooled.fork(
        policy=Classifier.of(fitted), slots=slots, prefetch="off", record=path, require=True
    ) as session:
        for start in (0, 60):
            session.logits(TOKENS[start : start + 20])
            for token in TOKENS[start + 20 : start + 50]:
                session.logits([token])
        session.record()  # hands over the step that is held back
        for token in TOKENS[:30]:
            session.logits([token])
        session.check()
    engine, trace = session.counters(), load(path)
    replayed = replay(trace, NativeClassifier(fitted), sync=True)
    assert engine == replayed, f"{engine.totals()}\n{replayed.totals()}"
    assert replay(trace, NativeClassifier(fitted), sync=False) != engine
    assert replay(trace, "lru") != engine


class Booked(Forged):
    """Holds what came and went against the slots."""

    def start(self, geometry: Geometry) -> None:
        super().start(geometry)
        self.books = Books(geometry)

    def observe(self, step: Step) -> None:
        self.books.note(step)


@pytest.mark.parametrize("prefetch", ["token", "layer", "both"])
@pytest.mark.parametrize("slots", [K + 1, 12, N_EXPERTS - 1])
def test_what_came_beside_the_step_and_went_adds_up(slots: int, prefetch: str, pooled: Session) -> None:
    policy = Booked(make=_before)
    with pooled.fork(
        policy=policy, slots=slots, prefetch=prefetch, sync=False, require=True, throttle_gbps=SLOWER
    ) as session:
        run(session)
        session.check()
    counters = session.counters()
    assert policy.books.fills == counters.fills.sum()
    assert counters.totals()["prefetches"] > 0 or slots == N_EXPERTS - 1


def test_on_a_slow_link_some_are_late_and_some_cancelled(expected: Logits) -> None:
    with Session(
        args=ARGS, policy=Forged(make=_before), slots=12, prefetch="token", sync=False, throttle_gbps=0.2
    ) as session:
        assert np.array_equal(run(session), expected)
        session.check()
        totals = session.counters().totals()
    check(session.counters())
    assert totals["prefetches"] > 0
    assert totals["prefetch_late"] > 0
    assert totals["prefetch_cancelled"] > 0


def test_prefetch_that_is_always_wrong_rests(pooled: Session) -> None:
    found = []
    with pooled.fork(
        policy=Forged(make=_not_before), slots=16, prefetch="token", require=True, throttle_gbps=SLOWER
    ) as session:
        for _ in range(4):
            for token in TOKENS:
                session.logits([token])
            found.append(session.counters().totals()["prefetches"])
            session.clear()
    assert found[0] > 0
    assert found[3] - found[2] < found[0] / 2, found


def test_a_policy_that_fails_is_left_for_lru(pooled: Session, expected: Logits) -> None:
    asked = []

    def fail(ids: NDArray[np.int32], rng: np.random.Generator) -> Chances:
        asked.append(1)
        if len(asked) == 30:
            raise PolicyError("forged")
        return _before(ids, rng)

    n_raised = 0
    with pooled.fork(policy=Forged(make=fail), slots=8, prefetch="token", sync=False) as session:
        session.logits(TOKENS[:N_PROMPT])
        for at in range(N_PROMPT, 90):
            try:
                assert np.array_equal(session.logits([TOKENS[at]])[0], expected[at])
            except PolicyError:
                n_raised += 1
        session.check()
    assert n_raised == 1
    assert len(asked) == 30
