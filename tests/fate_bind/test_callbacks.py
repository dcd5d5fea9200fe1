"""Policies that behave and policies that do not, driven through C."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fate_bind import host
from fate_bind.callbacks import read_step
from fate_bind.errors import EngineError, PolicyConfigError, PolicyError, TraceError
from fate_bind.library import Library
from fate_bind.session import Session
from fate_policy.base import Geometry, History, Policy, Step
from fate_policy.frequency import Frequency
from fate_policy.replay import replay
from fate_policy.trace import load

TOKENS = [0, 3, 5, 1, 7, 2, 2, 6]


class Watching(Policy):
    """Note everything that it is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def start(self, geometry: Geometry) -> None:
        self.events = ["start"]

    def observe(self, step: Step) -> None:
        self.events.append(step)

    def admit(self, layer: int, experts: NDArray[np.int32]) -> None:
        self.events.append(("admit", layer, experts.tolist()))

    def drop(self, layer: int, experts: NDArray[np.int32]) -> None:
        self.events.append(("drop", layer, experts.tolist()))


class Raising(Policy):
    """Fail in one method."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _maybe(self, method: str) -> None:
        if method == self.where:
            raise ZeroDivisionError(f"in {method}")

    def start(self, geometry: Geometry) -> None:
        self._maybe("start")

    def observe(self, step: Step) -> None:
        self._maybe("observe")

    def expect(self, token: int, sequence: int, position: int) -> None:
        self._maybe("expect")

    def scores(self, history: History) -> NDArray[np.float32]:
        self._maybe("scores")
        return np.zeros(history.last_use.shape, np.float32)

    def victims(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
        self._maybe("victims")
        return super().victims(layer, n, pinned, history)


class Lying(Policy):
    """Answer with what `answer` says."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def scores(self, history: History) -> Any:
        return self.answer

    def victims(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
        return [int(np.flatnonzero(pinned)[0])] * n if self.answer == "pinned" else self.answer


def test_a_plain_lru_in_table_mode_never_calls_python(fake: Library, model: Path) -> None:
    with Session(model) as session:
        assert session._host is not None
        assert session._host.is_silent
        session.logits(TOKENS)
        assert session._host.engines[0].driver is None
        assert session.stats()["policy_seconds"] == 0.0
        assert session.stats()["tokens"] == len(TOKENS)


def test_a_policy_sees_each_step_as_it_was(fake: Library, model: Path) -> None:
    policy = Watching()
    with Session(model, policy=policy, sync=True) as session:
        session.logits(TOKENS)
    steps = [event for event in policy.events if isinstance(event, Step)]
    assert [step.tokens.tolist() for step in steps] == [[token] for token in TOKENS]
    assert [step.positions.tolist() for step in steps] == [[i] for i in range(len(TOKENS))]
    assert steps[1].ids.tolist() == [[[3, 6], [4, 7]]]
    assert steps[0].fills.tolist() == [[0, 3], [0, 0], [1, 4], [1, 1]]
    assert not steps[0].ids.flags.writeable
    assert sum(len(step.fills) for step in steps) == session.counters().fills.sum()


def test_a_step_from_c_is_a_step_like_others(fake: Library) -> None:
    """Also without moves, whose pointers may be null."""
    ffi, _ = fake
    ids, path = ffi.new("int32_t[]", [1, 2, 3, 4]), ffi.new("uint8_t[]", [1, 1])
    token, hits = ffi.new("int32_t[]", [7]), ffi.new("uint8_t[]", [0, 1, 1, 0])
    fields = {"ids": ids, "path": path, "tokens": token, "positions": token, "sequences": token, "hits": hits}
    step = read_step(ffi.new("fate_step *", {"n_tokens": 1, "n_layers": 2, "k": 2, **fields}))
    ids[0] = 5
    for same in (copy.deepcopy(step), replace(step)):
        assert same.ids.tolist() == [[[1, 2], [3, 4]]]
        assert (same.path.dtype, same.tokens.tolist(), same.n_tokens) == (np.uint8, [7], 1)
        assert same.fills.shape == same.evictions.shape == (0, 2)
        assert same.weights is None
    assert "positions=array([7]" in repr(step)
    assert not step.hits.flags.writeable
    with pytest.raises(AttributeError, match="nothing"):
        step.nothing  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(FrozenInstanceError):
        step.ids = step.ids  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["table", "callback"])
def test_each_token_is_told_before_its_step_and_decides_in_it(fake: Library, model: Path, mode: str) -> None:
    """The token says what has to go in its own step: of those not needed the one with the least score."""

    class Telling(Policy):
        def start(self, geometry: Geometry) -> None:
            self.told: list[int] = []
            self.positions: list[int] = []
            self.seen: list[Step] = []

        def observe(self, step: Step) -> None:
            assert self.told[-1] == step.tokens[0]
            self.seen.append(step)

        def expect(self, token: int, sequence: int, position: int) -> None:
            assert len(self.told) == len(self.seen)
            self.told.append(token)
            self.positions.append(position)

        def scores(self, history: History) -> NDArray[np.float32]:
            table = np.ones(history.last_use.shape, np.float32)
            table[:, (self.told[-1] + 1) % 8] = 0
            return table

    policy = Telling()
    with Session(model, policy=policy, mode=mode, sync=True, record=True) as session:
        session.logits(TOKENS)
        counters = session.counters()
    assert policy.told == TOKENS
    assert policy.positions == list(range(len(TOKENS)))
    assert replay(session.record(), Telling(), mode=mode) == counters
    assert counters.evictions.sum() > 0
    decided = 0
    resident: set[int] = set()
    for step in policy.seen:
        favourite = (int(step.tokens[0]) + 1) % 8
        needed = set(step.ids[0, 0].tolist())
        gone = {expert for layer, expert in step.evictions.tolist() if layer == 0}
        if gone and favourite in resident - needed:
            assert favourite in gone
            decided += 1
        resident = resident - gone | needed
    assert decided > 0


@pytest.mark.parametrize("kind", ["off", "layer"])
def test_a_recording_holds_what_layers_told(kind: str, fake: Library, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with Session(model, slots=3, sync=True, prefetch=kind, record=path) as session:
        session.decode(TOKENS)
    trace = load(path)
    if kind == "off":
        assert trace.ahead_ids is None
        assert trace.horizons == ()
        return
    assert trace.horizons == (1,)
    assert trace.ahead_ids is not None
    assert trace.ahead_chances is not None
    assert trace.ahead_ids.shape == (len(TOKENS), 2, 1, 16)
    assert (trace.ahead_ids[:, 0] == -1).all()
    used = trace.experts(0, trace.n_tokens)
    assert np.array_equal(trace.ahead_ids[:, 1, 0, :2], used[:, 1])
    assert trace.ahead_chances[0, 1, 0, :3].tolist() == pytest.approx([0.9, 0.8, 0])


def test_the_times_of_what_a_gpu_does(fake: Library, model: Path) -> None:
    n = fake.lib.FATE_N_TIMES
    with Session(model, slots=3, times=True) as session:
        session.decode(TOKENS[:1])
        assert session.times().tolist() == np.arange(2 * n).reshape(2, n).tolist()
    with Session(model, fate=False) as plain, pytest.raises(EngineError, match="no engine"):
        plain.times()
    with Session(model, slots=3) as untimed, pytest.raises(EngineError, match="open it with times=True"):
        untimed.times()


def test_lru_that_only_looks_ahead_never_calls_python(fake: Library, model: Path) -> None:
    with Session(model, slots=3, prefetch="layer") as session:
        session.decode(TOKENS)
        assert session.stats()["policy_seconds"] == 0
        assert session._host is not None
        assert session._host.is_silent


def test_callback_mode_tells_drops_before_admissions(fake: Library, model: Path) -> None:
    policy = Watching()
    with Session(model, policy=policy, mode="callback") as session:
        session.logits(TOKENS)
    moves = [event for event in policy.events if isinstance(event, tuple) and event[1] == 0]
    assert moves[:3] == [("admit", 0, [3, 0]), ("admit", 0, [6]), ("admit", 0, [5])]
    assert moves[3:5] == [("drop", 0, [6, 3]), ("admit", 0, [4, 1])]
    assert sum(len(m[2]) for m in moves if m[0] == "drop") == session.counters().evictions[0] > 0


def test_lru_gives_the_same_counters_in_both_modes_and_in_replay(fake: Library, model: Path) -> None:
    counted = []
    for mode in ("table", "callback"):
        with Session(model, policy="lru", mode=mode, record=True) as session:
            session.logits(TOKENS * 3)
        assert replay(session.record(), "lru", mode=mode) == session.counters()
        counted.append(session.counters())
    assert counted[0] == counted[1]
    assert counted[0].evictions.sum() > 0


@pytest.mark.parametrize("mode", ["table", "callback"])
@pytest.mark.parametrize("where", ["observe", "expect", "scores"])
def test_an_exception_of_the_policy_reaches_the_caller_as_itself(
    fake: Library, model: Path, where: str, mode: str
) -> None:
    with Session(model, policy=Raising(where), mode=mode) as session:
        with pytest.raises(ZeroDivisionError, match=f"in {where}"):
            session.logits(TOKENS)
        session.logits(TOKENS)  # goes on as LRU
        assert session.stats()["policy_error"] == f"ZeroDivisionError: in {where}"
        assert session.stats()["tokens"] == 2 * len(TOKENS)


def test_an_exception_in_victims_reaches_the_caller_as_itself(fake: Library, model: Path) -> None:
    with Session(model, policy=Raising("victims"), mode="callback") as session:
        with pytest.raises(ZeroDivisionError, match="in victims"):
            session.logits(TOKENS)
        session.logits(TOKENS)


def test_an_exception_at_the_start_refuses_the_context(fake: Library, model: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="in start"):
        Session(model, policy=Raising("start"))
    assert not host._alive


@pytest.mark.parametrize(
    ("mode", "answer", "fault"),
    [
        ("table", np.zeros((1, 1), np.float32), "shape"),
        ("table", np.full((2, 8), np.nan, np.float32), "NaN"),
        ("table", "nonsense", "scores"),
        ("callback", "pinned", "pinned"),
        ("callback", [99, 98], "does not exist"),
        ("callback", [], "expected"),
        ("callback", None, "whole numbers"),
    ],
)
def test_a_wrong_answer_is_a_policy_error(
    fake: Library, model: Path, mode: str, answer: Any, fault: str
) -> None:
    class Careful(Lying):
        def scores(self, history: History) -> Any:
            return None if mode == "callback" else self.answer

    with Session(model, policy=Careful(answer), mode=mode) as session:
        with pytest.raises(PolicyError, match=fault):
            session.logits(TOKENS)
        session.logits(TOKENS)
        session.check()


def test_a_policy_without_scores_needs_callback_mode(fake: Library, model: Path) -> None:
    class OnlyVictims(Policy):
        def victims(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
            return super().victims(layer, n, pinned, history)

    with pytest.raises(PolicyConfigError, match="--fate-mode callback"):
        Session(model, policy=OnlyVictims(), mode="table")
    with Session(model, policy=OnlyVictims(), mode="callback") as session:
        session.logits(TOKENS)


def test_nothing_is_collected_while_the_library_may_call_it(fake: Library, model: Path) -> None:
    """The library holds a pointer that Python's garbage collector does not see."""
    policy = Watching()
    seen = weakref.ref(policy)
    session = Session(model, policy=policy, sync=True)
    hosted = weakref.ref(session._host)
    session._host = None
    del policy
    gc.collect()
    session.logits(TOKENS)
    held = seen()
    assert held is not None
    assert len([event for event in held.events if isinstance(event, Step)]) == len(TOKENS)
    del held
    session.close()
    del session
    gc.collect()
    assert seen() is None
    assert hosted() is None
    assert not host._alive


def test_a_session_that_is_forgotten_closes_its_context(fake: Library, model: Path) -> None:
    session = Session(model, policy=Watching())
    session.logits(TOKENS)
    del session
    gc.collect()
    assert not host._alive


def test_a_record_survives_a_policy_that_fails(fake: Library, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with (
        Session(model, policy=Raising("observe"), record=path, sync=True) as session,
        pytest.raises(ZeroDivisionError),
    ):
        session.logits(TOKENS)
    trace = load(path)
    assert trace.token_id.tolist() == TOKENS
    assert trace.meta["model"] == "fake"
    assert trace.meta["n_slots"] == [4, 4]
    assert not list(tmp_path.glob("*.part"))


def test_a_record_that_cannot_be_written_does_not_stop_the_policy(
    fake: Library, model: Path, tmp_path: Path
) -> None:
    policy = Watching()
    (tmp_path / "gone").mkdir()
    with Session(model, policy=policy, record=tmp_path / "gone" / "trace.npz", sync=True) as session:
        (tmp_path / "gone").rmdir()
        with pytest.raises(TraceError, match="cannot be recorded"):
            session.logits(TOKENS)
        assert session.stats()["record"] is None
        with pytest.raises(EngineError, match="nothing was recorded"):
            session.record()
    assert len([event for event in policy.events if isinstance(event, Step)]) == len(TOKENS)


def test_a_record_that_cannot_be_finished_is_not_called_recorded(
    fake: Library, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "trace.npz"
    with Session(model, record=path) as session:
        session.logits(TOKENS)
        path.mkdir()
        with pytest.raises(TraceError, match="what was recorded is kept in"):
            session.close()
    assert session.stats()["record"] is None
    assert session.record().token_id.tolist() == TOKENS


def test_a_fork_has_the_policy_that_was_given(fake: Library, model: Path) -> None:
    """It once got a new one of the same class, without the parameters."""
    policy = Frequency(half_life_tokens=3)
    with Session(model, policy=policy) as session, session.fork() as other:
        assert other._host is not None
        driver = other._host.engines[0].driver
        assert driver is not None
        assert isinstance(driver.policy, Frequency)
        assert driver.policy is not policy
        assert driver.policy.half_life_tokens == 3


def test_a_call_within_a_call_is_an_error(fake: Library, model: Path) -> None:
    """Four threads in one session once ended the process in llama.cpp."""
    refused: list[str] = []

    class Calls(Policy):
        def observe(self, step: Step) -> None:
            calls = [lambda: session.logits([1]), session.clear, session.state, session.close, session.record]
            for call in calls:
                thread = threading.Thread(target=self.attempt, args=(call,))
                thread.start()
                thread.join()
                self.attempt(call)

        def attempt(self, call: Any) -> None:
            try:
                call()
            except EngineError as error:
                refused.append(str(error))

    with Session(model, policy=Calls(), sync=True) as session:
        session.logits([1, 2])
        assert session.stats()["tokens"] == 2
    assert len(refused) == 2 * 2 * 5
    assert set(refused) == {refused[0]}
    assert refused[0].startswith("the session is in use")


def test_two_sessions_on_one_model_have_a_pool_and_a_policy_each(fake: Library, model: Path) -> None:
    policy = Watching()
    first = Session(model, policy=policy, sync=True)
    second = first.fork(slots=5)
    first.logits(TOKENS)
    first.close()
    second.logits(TOKENS[:2])
    assert second.stats()["slots"] == 10
    assert second.stats()["tokens"] == 2
    second.close()
    assert first.stats()["tokens"] == len(TOKENS)


def test_a_required_pool_that_does_not_engage_is_an_error(fake: Library, model: Path) -> None:
    with pytest.raises(EngineError, match="not engaged because all experts resident"):
        Session(model, slots=8, require=True)
    with Session(model, slots=8, policy=Frequency()) as session:
        session.logits(TOKENS)
        assert session.stats()["engaged"] is False
        assert session.stats()["reason"] == "all experts resident"
        with pytest.raises(EngineError, match="nothing was recorded"):
            session.record()


class Predicting(Policy):
    """Evict as LRU, and predict one expert a layer, the token's own number."""

    def __init__(self, likely: float = 1.0) -> None:
        self.likely = likely

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        experts = (token_id + np.arange(8, dtype=np.int32)) % 8
        chances = np.zeros((2, 8), np.float32)
        chances[:, 0] = self.likely
        return np.tile(experts, (2, 1)), chances


@pytest.mark.parametrize("likely", [1.0, 0.4])
def test_what_a_policy_predicts_reaches_the_engine(
    fake: Library, model: Path, likely: float, tmp_path: Path
) -> None:
    """One without scores, and without `expect`; of the first token nothing can be predicted."""
    path = tmp_path / "trace.npz"
    with Session(model, policy=Predicting(likely), sync=True, prefetch="token", record=path) as session:
        session.logits(TOKENS)
    stats = session.stats()
    assert stats["prefetches"] == (2 * (len(TOKENS) - 1) if likely == 1 else 0)
    assert stats["no_prefetch"] == ""
    meta = load(path).meta
    assert (meta["prefetch"], meta["prefetch_threshold"], meta["prefetch_experts"]) == ("token", "auto", 8)


def test_a_wrong_prediction_is_raised_as_itself(fake: Library, model: Path) -> None:
    with Session(model, policy=Predicting(2.0), sync=True, prefetch="token") as session:
        with pytest.raises(
            PolicyError, match=r"Predicting: predict\(\) returned chance 2.0 at layer 0, rank 0"
        ):
            session.logits(TOKENS)
        assert session.stats()["prefetches"] == 0
        assert session.stats()["tokens"] == len(TOKENS)


def test_prefetch_that_cannot_act_is_said(fake: Library, model: Path) -> None:
    with Session(model, policy=Predicting(), prefetch="token") as session:
        session.logits(TOKENS)
        assert session.stats()["no_prefetch"].endswith("set sync (--fate-sync)")
    with Session(model, policy=Predicting(), slots=2, prefetch="token", sync=True) as session:
        session.logits(TOKENS)
        assert (
            session.stats()["no_prefetch"] == "no layer has a slot more than a token needs: give more slots"
        )
    with Session(model, policy=Predicting()) as session:
        session.logits(TOKENS)
        assert session.stats()["no_prefetch"] == ""
        assert session.stats()["prefetches"] == 0
