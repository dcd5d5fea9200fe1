"""Prefetch on the host: the same bits whatever is predicted, and the counters of replay."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from policy_contract import Books

from fate_bind.modelfile import EMBEDDED
from fate_bind.session import Session
from fate_bind.verify import verify
from fate_policy import assess, train
from fate_policy.base import NOT_RUN, POOL, Geometry, History, Policy, Step
from fate_policy.classifier import Classifier
from fate_policy.counters import Counters
from fate_policy.errors import PolicyConfigError
from fate_policy.model import Model
from fate_policy.prefetch_rule import Prefetch
from fate_policy.replay import replay
from fate_policy.trace import Trace, load

pytestmark = pytest.mark.model

N_LAYERS, N_EXPERTS, K = 8, 32, 4
ARGS = ["-c", "1024", "-np", "4", "-ub", "32", "-t", "2"]
TEXT = "def mean(values):\n    return sum(values) / len(values)\n\nOnce there was a boy who counted stars."


def drive(session: Session) -> NDArray[np.float32]:
    """Return the logits of prompts, single tokens of one and of four sequences, and batches."""
    tokens = session.tokenize(TEXT)
    found = [session.logits(tokens)]
    for _ in range(30):
        found.append(session.logits([int(np.argmax(found[-1][-1]))]))
    session.clear()
    for sequence in range(4):
        part = tokens[sequence * 4 : sequence * 4 + 6]
        found.append(session.decode(part, range(6), [sequence] * 6, [False] * 5 + [True]))
    for position in range(6, 12):
        four = tokens[position : position + 4]
        found.append(session.decode(four, [position] * 4, range(4), [True, False, True, True]))
    for i in range(12):
        found.append(session.decode(tokens[i : i + 1], [12 + i // 4], [i % 4], [i % 3 > 0]))
    return np.concatenate(found)


@pytest.fixture(scope="module")
def plain() -> Iterator[tuple[Session, NDArray[np.float32]]]:
    with Session(args=ARGS, fate=False) as session:
        yield session, drive(session)


@pytest.fixture(scope="module")
def recorded(plain: tuple[Session, NDArray[np.float32]], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    path = tmp_path_factory.mktemp("prefetch") / "trace.npz"
    with plain[0].fork(record=path) as session:
        drive(session)
    return load(path)


@pytest.fixture(scope="module")
def fitted(recorded: Trace) -> Model:
    small = train.Options(
        sample_every=1, rank_basis=16, rank=16, n_folds=2, heads=((0.25, 4), (0.5, 8)), table_minimum=1
    )
    return train.fit([assess.decode_only(recorded)], small)


class Forged(Policy):
    """Predict by `kind`, with the routing of the very run at hand: it knows what is right."""

    def __init__(self, kind: str, trace: Trace) -> None:
        self.kind, self._trace = kind, trace

    def start(self, geometry: Geometry) -> None:
        self._shape = geometry.n_layers, geometry.max_experts
        self._n_steps = 0

    def observe(self, step: Step) -> None:
        self._n_steps += 1

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
        chance = np.zeros(self._shape, np.float32)
        if self.kind == "none":
            return None
        if self.kind == "all":
            chance[:] = 1
        elif self.kind == "random":
            chance = np.random.default_rng([self._n_steps, token_id]).random(self._shape, np.float32)
        else:
            row = int(self._trace.step_bounds()[self._n_steps])
            layer, rank = np.nonzero(self._trace.path[row][:, None] > np.zeros(K))
            chance[layer, self._trace.experts(row, row + 1)[0][layer, rank]] = 1
            chance = chance if self.kind == "right" else 1 - chance
        ranked = np.argsort(-chance, axis=1, kind="stable").astype(np.int32)
        return ranked, np.take_along_axis(chance, ranked, axis=1)


class Scoring(Forged):
    """The same with scores, which nobody would give, but which count."""

    def scores(self, history: History) -> NDArray[np.float32]:
        return np.random.default_rng(self._n_steps).random(self._shape, np.float32)


POLICIES: dict[str, Callable[[Trace, Model], Policy]] = {
    **{kind: lambda trace, _, kind=kind: Forged(kind, trace) for kind in ("none", "all", "right", "wrong")},  # type: ignore[misc]
    "random": lambda trace, _: Forged("random", trace),
    "random, scores": lambda trace, _: Scoring("random", trace),
    "classifier": lambda _, fitted: Classifier.of(fitted),
    "classifier, lru": lambda _, fitted: Classifier.of(fitted, evict_by="lru"),
}


def ran(
    plain: tuple[Session, NDArray[np.float32]], policy: Policy, slots: int, prefetch: Prefetch, record: Path
) -> Counters:
    """Run, hold the logits against those without the pool, and return the engine's counters."""
    session, expected = plain
    with session.fork(
        policy=policy,
        slots=slots,
        sync=True,
        prefetch="token",
        prefetch_threshold=prefetch.threshold,
        prefetch_experts=prefetch.experts,
        record=record,
    ) as pooled:
        got = drive(pooled)
        pooled.check()
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    return pooled.counters()


@pytest.mark.parametrize("slots", [K, K + 1, 10, 16, N_EXPERTS - 1])
@pytest.mark.parametrize("name", POLICIES)
def test_the_bits_are_those_without_and_the_counters_those_of_replay(
    name: str,
    slots: int,
    plain: tuple[Session, NDArray[np.float32]],
    recorded: Trace,
    fitted: Model,
    tmp_path: Path,
) -> None:
    prefetch = Prefetch(0.3, 6)
    path = tmp_path / "trace.npz"
    policies = [POLICIES[name](recorded, fitted) for _ in range(2)]
    engine = ran(plain, policies[0], slots, prefetch, path)
    replayed = replay(load(path), policies[1], prefetch=prefetch)
    assert engine == replayed, f"{engine.totals()}\n{replayed.totals()}"

    total = engine.totals()
    assert total["fills"] == total["misses"] + total["seed_fills"] + total["prefetches"]
    done = total["prefetch_useful"] + total["prefetch_wasted"]
    assert done <= total["prefetches"] <= done + slots * N_LAYERS
    assert total["prefetch_late"] == total["prefetch_cancelled"] == 0
    assert (total["prefetches"] > 0) == (name != "none" and slots > K)
    if name in ("right", "wrong", "random") and K < slots < N_EXPERTS - 1:
        if name != "wrong" or slots >= 10:
            assert total["prefetch_useful"] > 0
        assert (total["prefetch_wasted"] > 0) == (name != "right")


class Booked(Forged):
    """Holds what came and went against the slots."""

    def start(self, geometry: Geometry) -> None:
        super().start(geometry)
        self.books = Books(geometry)

    def observe(self, step: Step) -> None:
        super().observe(step)
        self.books.note(step)


@pytest.mark.parametrize("kind", ["right", "random", "wrong"])
@pytest.mark.parametrize("slots", [K + 1, 10, N_EXPERTS - 1])
def test_what_came_and_went_adds_up(
    slots: int, kind: str, plain: tuple[Session, NDArray[np.float32]], recorded: Trace, tmp_path: Path
) -> None:
    policy = Booked(kind, recorded)
    engine = ran(plain, policy, slots, Prefetch(0.3, 6), tmp_path / "trace.npz")
    assert policy.books.fills == engine.fills.sum() > 0


def test_what_is_predicted_rightly_is_there_when_it_is_needed(
    plain: tuple[Session, NDArray[np.float32]], recorded: Trace, tmp_path: Path
) -> None:
    """What is not predicted is all that misses: prompts, batches, tokens without output, the first step."""
    path = tmp_path / "trace.npz"
    engine = ran(plain, Forged("right", recorded), 10, Prefetch(0.5, 8), path)
    steps = np.diff(load(path).step_bounds())
    paths = load(path).path
    alone = np.repeat(steps == 1, steps) & (paths != NOT_RUN).all(axis=1)
    hits = paths[alone] == POOL
    assert hits.any()
    assert engine.totals()["prefetch_useful"] == engine.totals()["prefetches"] > 0
    without = replay(load(path), "lru")
    assert engine.totals()["misses"] < without.totals()["misses"]
    assert engine.totals()["rows_all_resident"] >= hits.sum()


def test_nothing_comes_in_early_on_the_host_without_sync(
    plain: tuple[Session, NDArray[np.float32]], recorded: Trace
) -> None:
    session, expected = plain
    with session.fork(policy=Forged("right", recorded), slots=10, prefetch="token") as pooled:
        got = drive(pooled)
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    assert pooled.counters().totals()["prefetches"] == 0
    assert pooled.stats()["no_prefetch"].startswith("the layers run on the CPU")


def test_a_token_without_output_is_not_predicted(
    plain: tuple[Session, NDArray[np.float32]], recorded: Trace, tmp_path: Path
) -> None:
    """Its last layer does not run: what came in for that would be taken over by no op."""
    path = tmp_path / "trace.npz"
    tokens = [(i * 977 + 31) % 4000 for i in range(60)]
    with plain[0].fork(
        policy=Forged("random", recorded), slots=10, sync=True, prefetch="token", record=path
    ) as session:
        session.decode(tokens[:4])
        before = int(session.counters().prefetches.sum())
        for token in tokens[4:20]:
            session.decode([token], outputs=[False])
            session.check()
        assert int(session.counters().prefetches.sum()) == before
        for i, token in enumerate(tokens[20:]):
            session.decode([token], outputs=[i % 3 > 0])
            session.check()
    assert int(session.counters().prefetches.sum()) > before
    assert session.counters() == replay(load(path), Forged("random", recorded), prefetch=Prefetch(0.5, 8))


def test_a_fitted_file_beside_the_model_is_found(fitted: Model, tmp_path: Path) -> None:
    model = tmp_path / "own.gguf"
    shutil.copyfile(EMBEDDED, model)
    args = [*ARGS, "-m", str(model)]
    with pytest.raises(PolicyConfigError, match=r"no file is named, and .*own\.fate\.npz does not exist"):
        Session(args=args, policy="classifier", slots=10)
    fitted.save(tmp_path / "own.fate.npz")
    options = {"policy": "classifier", "slots": 10, "sync": True, "prefetch": "both"}
    with Session(args=args, **options) as session, session.fork(fate=False) as without:  # type: ignore[arg-type]
        assert np.array_equal(drive(session).view(np.uint32), drive(without).view(np.uint32))
        assert session.stats()["policy"] == "classifier"
        assert session.stats()["prefetches"] > 0
        with without.fork(policy="classifier", slots=10) as another:
            another.logits([1])
            assert another.stats()["engaged"]
    found = verify(model, prompt=range(1, 20), n_tokens=4, policy="classifier", slots=10)
    assert found.exit_code == 0, found.message


def test_a_fitted_file_beside_the_model_decides_by_itself(
    plain: tuple[Session, NDArray[np.float32]], fitted: Model, tmp_path: Path
) -> None:
    model = tmp_path / "own.gguf"
    shutil.copyfile(EMBEDDED, model)
    args = [*ARGS, "-m", str(model)]

    def stats(**options: Any) -> dict[str, Any]:
        with Session(args=args, slots=10, **options) as session:
            assert np.array_equal(drive(session).view(np.uint32), plain[1].view(np.uint32))
            session.check()
            return session.stats()

    alone = stats()
    assert (alone["policy"], alone["policy_file"]) == ("lru", None)
    file = tmp_path / "own.fate.npz"
    fitted.save(file)
    chosen = stats()
    assert (chosen["policy"], chosen["policy_file"]) == ("classifier", str(file))
    assert chosen["no_prefetch"] == ""  # it was not asked for, and on the CPU it comes before a step only
    assert chosen["hits"] != alone["hits"]
    assert stats(policy="lru")["policy"] == "lru"
    row = {"share": 0.25, "lru": 0.6, "optimum": 0.8, "sync": 0.5, "delayed": 0.5}
    replace(fitted, meta={**fitted.meta, "held_out": {"test": [row]}}).save(file)
    assert stats()["policy"] == "lru"
