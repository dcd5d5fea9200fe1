"""Replaying a recorded trace gives the engine's own counters exactly (invariant 5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fate_bind.linear import NativeLinear
from fate_bind.session import Session
from fate_policy import assess, train
from fate_policy.base import Geometry, History, Policy, Step
from fate_policy.classifier import Classifier
from fate_policy.frequency import Frequency
from fate_policy.kernels import Routing, simulate_scores
from fate_policy.lru import LRU
from fate_policy.model import Model
from fate_policy.random import Random
from fate_policy.replay import replay
from fate_policy.static import Static
from fate_policy.trace import load
from fate_policy.train import Options

pytestmark = pytest.mark.model

ARGS = ["-c", "1024", "-np", "4", "-ub", "32"]
TEXT = "def mean(values):\n    return sum(values) / len(values)\n\nOnce there was a boy who counted stars."


def drive(session: Session) -> None:
    """Prompts and decode, several sequences, batches that only partly ask for logits."""
    tokens = session.tokenize(TEXT)
    session.logits(tokens)
    "".join(session.generate(" He", 30))
    session.clear()
    for sequence in range(4):
        part = tokens[sequence * 4 : sequence * 4 + 6]
        session.decode(part, range(6), [sequence] * 6, [False] * 5 + [True])
    for position in range(6, 18):
        session.decode(tokens[position : position + 4], [position] * 4, range(4), [True, False, True, True])
    session.decode(tokens[:3], [18] * 3, range(3), [False, False, False])


def static_of(path: Path) -> Static:
    return Static(profile=str(path))


class Telling(Policy):
    """Evict by what the coming token says, and by a bonus that outweighs it: nobody would, but all count."""

    def start(self, geometry: Geometry) -> None:
        self.shape = geometry.n_layers, geometry.max_experts
        self.told = [0, 0]

    def observe(self, step: Step) -> None:
        self.told[1] = int(step.tokens[-1])

    def expect(self, token: int, sequence: int, position: int) -> None:
        self.told[0] = 7 * token + sequence + 1000 * position

    def scores(self, history: History) -> NDArray[np.float32]:
        return np.random.default_rng(self.told).random(self.shape, np.float32)

    def bonus(self, history: History) -> NDArray[np.float32]:
        return np.linspace(0, 1.5, self.shape[0], dtype=np.float32)


class PythonClassifier(Classifier):
    """The classifier, always asked in Python: what derives from it may decide otherwise."""


class NativeClassifier(Policy):
    """In replay, the classifier as the library evaluates it; zeros until it is told a token."""

    def __init__(self, fitted: Model) -> None:
        self._classifier = Classifier.of(fitted)

    def start(self, geometry: Geometry) -> None:
        self._classifier.start(geometry)
        model = self._classifier.linear()
        assert model is not None
        self._native = NativeLinear(model)
        self._answer: tuple[NDArray[np.float32], ...] | None = None
        self._shape = geometry.n_layers, geometry.max_experts

    def observe(self, step: Step) -> None:
        self._native.step(step)

    def expect(self, token: int, sequence: int, position: int) -> None:
        self._native.expect(token, sequence, position)
        self._answer = self._native.get()

    def scores(self, history: History) -> NDArray[np.float32]:
        return np.zeros(self._shape, np.float32) if self._answer is None else self._answer[1]

    def bonus(self, history: History) -> NDArray[np.float32]:
        return np.zeros(self._shape[0], np.float32) if self._answer is None else self._answer[2]


POLICIES: dict[str, Callable[[Path], Policy]] = {
    "lru": lambda _: LRU(),
    "frequency": lambda _: Frequency(),
    "lfru": lambda _: Frequency(half_life_tokens=8, lfru=True),
    "random": lambda _: Random(seed=3),
    "static": static_of,
    "telling": lambda _: Telling(),
    "classifier, in Python": lambda path: PythonClassifier(model=str(path.with_name("model.npz"))),
    "weighing classifier": lambda path: Classifier(model=str(path.with_name("weighing.npz"))),
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "trace.npz"
    with Session(args=ARGS, record=path) as session:
        drive(session)
    fitted_on(path).save(path.with_name("model.npz"))
    fitted_on(path, weights=True).save(path.with_name("weighing.npz"))
    return path


def fitted_on(path: Path, weights: bool = False) -> Model:
    small = Options(
        sample_every=1,
        rank_basis=16,
        rank=16,
        n_folds=2,
        heads=((0.25, 4), (0.5, 8)),
        table_minimum=1,
        weights=weights,
    )
    return train.fit([assess.decode_only(load(path))], small)


@pytest.mark.parametrize("slots", [4, 10, 16, 31])
@pytest.mark.parametrize(("mode", "sync"), [("table", True), ("table", False), ("callback", True)])
@pytest.mark.parametrize("name", POLICIES)
def test_counters_agree(name: str, mode: str, sync: bool, slots: int, profile: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with Session(
        args=ARGS, policy=POLICIES[name](profile), slots=slots, mode=mode, sync=sync, record=path
    ) as session:
        drive(session)
        session.check()
    engine = session.counters()
    trace = load(path)
    replayed = replay(trace, POLICIES[name](profile), mode=mode, sync=sync)

    assert engine == replayed, f"{engine.totals()}\n{replayed.totals()}"
    totals = engine.totals()
    assert totals["hits"] > 0
    assert totals["misses"] > 0
    assert totals["bypassed"] > 0
    assert totals["seed_fills"] > 0
    assert totals["tokens"] == trace.n_tokens
    # the trace's last layer has rows only where logits were asked for
    assert (np.asarray(trace.path)[:, -1] == 0).any()
    assert (np.asarray(trace.path)[:, 0] != 0).all()


def test_lru_in_callback_mode_counts_like_table_mode(tmp_path: Path) -> None:
    counters = []
    for mode in ("table", "callback"):
        with Session(args=ARGS, policy="lru", slots=10, mode=mode) as session:
            drive(session)
        counters.append(session.counters())
    assert counters[0] == counters[1]


def test_recorded_weights_are_the_routers(tmp_path: Path) -> None:
    with Session(args=ARGS, record=tmp_path / "trace.npz") as session:
        drive(session)
    trace = load(tmp_path / "trace.npz")
    assert trace.weights is not None
    ran = np.asarray(trace.path) != 0
    weights = np.asarray(trace.weights, np.float32)[ran]
    assert np.allclose(weights.sum(axis=-1), 1.0, atol=4e-3)  # this model normalises over its k
    assert (np.diff(weights, axis=-1) <= 0).all()


class Weighing(Policy):
    """Keeps the weights that it is told."""

    def __init__(self, wants: bool) -> None:
        self._wants = wants
        self.told: list[NDArray[np.float32] | None] = []

    @property
    def wants_weights(self) -> bool:
        return self._wants

    def observe(self, step: Step) -> None:
        self.told.append(None if step.weights is None else step.weights[step.path != 0])


@pytest.mark.parametrize("mode", ["table", "callback"])
def test_a_policy_is_told_the_weights_that_it_wants(mode: str) -> None:
    """Without a recording too, and not otherwise."""
    for wants in (True, False):
        policy = Weighing(wants)
        with Session(args=ARGS, policy=policy, slots=10, mode=mode) as session:
            drive(session)
        assert len(policy.told) > 10
        assert all((weights is not None) == wants for weights in policy.told)
        for weights in filter(lambda told: told is not None, policy.told):
            assert np.allclose(weights.sum(axis=-1), 1.0, atol=1e-5)


def test_a_model_of_weights_decides_alike_unrecorded(profile: Path, tmp_path: Path) -> None:
    counters = []
    for record in (tmp_path / "trace.npz", None):
        policy = POLICIES["weighing classifier"](profile)
        with Session(args=ARGS, policy=policy, slots=10, record=record) as session:
            drive(session)
        counters.append(session.counters())
    assert counters[0] == counters[1]


@pytest.mark.parametrize("slots", [6, 10, 16])
def test_without_sync_the_engine_evaluates_the_classifier_itself(
    slots: int, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the very token, so that it counts as it does with `sync`, and Python is not asked."""
    fitted, path = fitted_on(profile), tmp_path / "trace.npz"
    with monkeypatch.context() as patched:

        def asked(*_: object) -> None:
            raise AssertionError("Python is asked")

        for name in ("observe", "expect", "scores"):
            patched.setattr(Classifier, name, asked)
        with Session(args=ARGS, policy=Classifier.of(fitted), slots=slots, record=path) as session:
            tokens = session.tokenize(TEXT)
            session.logits(tokens[:20])
            for token in tokens[20:]:
                session.logits([token])
            "".join(session.generate(" He", 60))
            session.check()
    engine, trace = session.counters(), load(path)
    native = replay(trace, NativeClassifier(fitted), sync=True)
    assert engine == native, f"{engine.totals()}\n{native.totals()}"
    assert trace.meta["linear"]
    near = replay(trace, Classifier.of(fitted), sync=True)
    late = replay(trace, Classifier.of(fitted), sync=False)
    assert abs(engine.hits.sum() - near.hits.sum()) < 0.01 * near.hits.sum()  # sums in another order
    assert near != late
    assert replay(trace, "lru") != engine


def test_what_python_would_evaluate_is_not_asked_for_the_token_by_itself(profile: Path) -> None:
    for weights, prefetch in ((False, "token"), (True, "layer")):
        policy = Classifier.of(fitted_on(profile, weights))
        with Session(args=ARGS, policy=policy, slots=10) as session:
            session.logits(session.tokenize(TEXT))
            assert session._host is not None
            assert session._host.config.prefetch == prefetch
        policy = Classifier.of(fitted_on(profile, weights))
        with Session(args=ARGS, policy=policy, slots=10, prefetch="both") as session:
            assert session._host is not None
            assert session._host.config.prefetch == "both"


def test_a_look_at_the_record_changes_nothing(profile: Path, tmp_path: Path) -> None:
    """It hands over the last step early; of steps of several tokens scores are published behind them."""
    fitted, found = fitted_on(profile), []
    for looks in (False, True):
        path = tmp_path / f"{looks}.npz"
        with Session(args=ARGS, policy=Classifier.of(fitted), slots=16, record=path) as session:
            tokens = session.tokenize(TEXT * 4)
            for at in range(0, len(tokens) - 3, 3):
                session.logits(tokens[at : at + 3])
                if looks and at % 2:
                    session.record()
        found.append(session.counters())
    assert found[0] == found[1]
    assert found[0].misses.sum() > 0
    assert replay(load(path), "lru") != found[0]


@pytest.mark.parametrize(
    ("kind", "sync"), [(Classifier, True), (Classifier, False), (PythonClassifier, False)]
)
def test_the_classifier_runs_as_the_lab_judges_it(
    kind: type[Classifier], sync: bool, profile: Path, tmp_path: Path
) -> None:
    """Its scores are those of the token about to run; in Python without `sync` those of the one before.

    The engine once told no policy which token comes, so both were a token later than the lab's figures.
    """
    fitted, path = fitted_on(profile), tmp_path / "trace.npz"
    with Session(args=ARGS, policy=kind.of(fitted), slots=8, sync=sync, record=path) as session:
        tokens = session.tokenize(TEXT)
        for token in tokens:
            session.logits([token])
        "".join(session.generate(" He", 60))
    engine, trace = session.counters(), load(path)
    acts_late = kind is PythonClassifier
    head = fitted.head("late" if acts_late else "keep", 0.25)
    tables = assess.serve(fitted, trace)[head.name]
    tables[0] = 0  # no token's scores are asked for before one was seen; two tokens fit the slots
    bonus, delay = (head.bonus, 1) if acts_late else (0, 0)
    lab = simulate_scores(Routing.of_trace(trace), 8, tables, bonus=bonus, delay=delay)
    assert engine.hits.sum() > 0
    if kind is Classifier and not sync:  # evaluated by the engine, whose sums are in another order
        assert abs(engine.hits - lab.counters.hits).sum() < 0.01 * engine.hits.sum()
        return
    assert engine.hits.tolist() == lab.counters.hits.tolist()
    assert engine.evictions.tolist() == lab.counters.evictions.tolist()
