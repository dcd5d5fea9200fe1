from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from policy_contract import SYNTHETIC, make_step, random_ids

from fate_policy.base import Geometry, History, OfflinePolicy, Policy, Step
from fate_policy.belady import Belady
from fate_policy.driver import Driver
from fate_policy.errors import PolicyConfigError, PolicyError
from fate_policy.lru import LRU

STEP = make_step(random_ids(3, SYNTHETIC, 1))
PINNED = np.zeros(16, np.bool_)


class Answers(Policy):
    """Answer whatever it was made with."""

    def __init__(self, *, scores: Any = None, bonus: Any = None, victims: Any = None) -> None:
        self.answer, self.extra, self.named = scores, bonus, victims
        self.events: list[Any] = []

    def start(self, geometry: Geometry) -> None:
        self.events.append("start")

    def observe(self, step: Step) -> None:
        self.events.append("observe")

    def admit(self, layer: int, experts: NDArray[np.int32]) -> None:
        self.events.append(("admit", layer, experts.tolist()))

    def drop(self, layer: int, experts: NDArray[np.int32]) -> None:
        self.events.append(("drop", layer, experts.tolist()))

    def scores(self, history: History) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def bonus(self, history: History) -> Any:
        return super().bonus(history) if self.extra is None else self.extra

    def victims(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> Any:
        if isinstance(self.named, Exception):
            raise self.named
        return self.named


def test_scores_are_published_after_a_step() -> None:
    scores = np.arange(48, dtype=np.float64).reshape(3, 16)
    driver = Driver(Answers(scores=scores, bonus=[1, 2, 3]), SYNTHETIC)
    assert driver.publish() is None
    driver.observe(STEP)
    published = driver.publish()
    assert published is not None
    assert [array.dtype for array in published] == [np.float32, np.float32]
    assert published[0].flags.c_contiguous
    assert published[0].tolist() == scores.tolist()
    assert published[1].tolist() == [1, 2, 3]
    assert driver.publish() is None
    published[0][:] = 7
    assert driver.history.scores.tolist() == scores.tolist()


def test_publication_waits_for_refresh_tokens() -> None:
    driver = Driver(Answers(scores=np.zeros((3, 16))), SYNTHETIC, refresh_tokens=7)
    due = []
    for _ in range(6):
        driver.observe(STEP)
        due.append(driver.publish() is not None)
    assert due == [False, False, True, False, False, True]
    assert driver.history.publications == 2
    assert driver.policy.events == ["start"] + ["observe"] * 6  # type: ignore[attr-defined]


def test_a_policy_without_scores_never_publishes() -> None:
    driver = Driver(Policy(), SYNTHETIC)
    driver.observe(STEP)
    assert driver.publish() is None


def test_callback_mode_has_nothing_to_publish() -> None:
    driver = Driver(Answers(scores=np.ones((3, 16))), SYNTHETIC, "callback")
    driver.observe(STEP)
    assert driver.publish() is None
    assert driver.history.scores.tolist() == np.ones((3, 16)).tolist()
    assert driver.history.published_at.tolist() == driver.history.clock.tolist()


class Expects(Answers):
    """Ask which token comes."""

    def expect(self, token: int, sequence: int, position: int) -> None:
        self.events.append((token, sequence, position))


def columns(*rows: tuple[int, int, int]) -> tuple[NDArray[np.int32], ...]:
    return tuple(np.array(rows, np.int32).T)


def test_a_token_alone_in_its_step_is_told_before_scores_are_asked() -> None:
    driver = Driver(Expects(scores=np.ones((3, 16))), SYNTHETIC)
    driver.observe(STEP)
    driver.expect(*columns((7, 2, 0)))
    assert driver.publish() is not None
    driver.observe(STEP)
    driver.expect(*columns((7, 2, 1), (8, 3, 0)))
    assert driver.policy.events == ["start", "observe", (7, 2, 0), "observe"]  # type: ignore[attr-defined]


def test_in_callback_mode_scores_come_into_force_once_the_token_is_told() -> None:
    driver = Driver(Expects(scores=np.ones((3, 16))), SYNTHETIC, "callback")
    driver.observe(STEP)
    assert driver.history.publications == 0
    driver.expect(*columns((7, 2, 0)))
    assert driver.history.publications == 1


def test_a_policy_that_does_not_expect_is_told_nothing() -> None:
    driver = Driver(Answers(scores=np.ones((3, 16))), SYNTHETIC)
    assert not driver.expects
    driver.expect(*columns((7, 2, 0)))
    assert driver.policy.events == ["start"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("mode", "sync", "late"), [("table", False, True), ("table", True, False), ("callback", False, False)]
)
def test_policies_know_when_their_scores_act(mode: str, sync: bool, late: bool) -> None:
    assert Driver(Policy(), SYNTHETIC, mode, sync=sync).history.acts_late is late


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        (np.zeros((16, 3)), r"float64 of shape \(16, 3\); expected float32 of shape \(3, 16\)"),
        (np.zeros(16), r"shape \(16,\)"),
        (np.full((3, 16), "x"), "<U1 of shape"),
        (np.zeros((3, 16), complex), "complex128 of shape"),
        ([[1], [2, 3]], "returned list; expected"),
        ("high", "<U4 of shape"),
        (np.where(np.arange(48).reshape(3, 16) == 20, np.nan, 0), "NaN at layer 1, expert 4"),
    ],
)
def test_wrong_scores_name_policy_and_fault(scores: Any, fault: str) -> None:
    driver = Driver(Answers(scores=scores), SYNTHETIC)
    driver.observe(STEP)
    with pytest.raises(PolicyError, match=f"Answers: scores\\(\\).*{fault}"):
        driver.publish()
    assert driver.history.publications == 0


def test_infinite_scores_are_allowed() -> None:
    scores = np.full((3, 16), 1e300)
    scores[0, 0] = -np.inf
    driver = Driver(Answers(scores=scores), SYNTHETIC)
    driver.observe(STEP)
    published = driver.publish()
    assert published is not None
    assert published[0][0, :2].tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize("bonus", [[1, 2], [1, 2, np.nan], [1, 2, np.inf], "x"])
def test_wrong_bonus_is_an_error(bonus: Any) -> None:
    driver = Driver(Answers(scores=np.zeros((3, 16)), bonus=bonus), SYNTHETIC)
    driver.observe(STEP)
    with pytest.raises(PolicyError, match="bonus"):
        driver.publish()


@pytest.mark.parametrize(
    ("victims", "fault"),
    [
        ([3], "expected 2 of them"),
        ([3, 4, 5], "expected 2 of them"),
        ([3, 3], "expert 3 is named twice"),
        ([3, 1], "expert 1 is pinned"),
        ([3, 12], "expert 12 is not resident"),
        ([3, 16], "expert 16 does not exist; expected 0 to 15"),
        ([-1, 3], "expert -1 does not exist"),
        ([3.5, 4], "expected 2 whole numbers"),
        ([float("nan"), 4], "expected 2 whole numbers"),
        (["3", "4"], "expected 2 whole numbers"),
        (None, "expected 2 whole numbers"),
        (np.zeros((2, 2)), "expected 2 whole numbers"),
    ],
)
def test_wrong_victims_name_the_fault(victims: Any, fault: str) -> None:
    driver = Driver(Answers(victims=victims), SYNTHETIC, "callback")
    driver.admit(1, np.arange(8, dtype=np.int32))
    pinned = PINNED.copy()
    pinned[:2] = True
    with pytest.raises(PolicyError, match=f"Answers: victims\\(\\) for layer 1.*{fault}"):
        driver.victims(1, 2, pinned)


@pytest.mark.parametrize("victims", [[4, 3], (4, 3), np.array([4, 3], np.uint8), iter([4, 3])])
def test_right_victims_keep_their_order(victims: Any) -> None:
    driver = Driver(Answers(victims=victims), SYNTHETIC, "callback")
    driver.admit(1, np.arange(8, dtype=np.int32))
    answer = driver.victims(1, 2, PINNED)
    assert answer.dtype == np.int32
    assert answer.tolist() == [4, 3]


@pytest.mark.parametrize("method", ["scores", "victims", "start", "observe", "admit", "drop"])
def test_an_exception_of_the_policy_stays_itself(method: str) -> None:
    class OwnError(Exception):
        pass

    def fail(*_: Any) -> None:
        raise OwnError

    with pytest.raises(OwnError):  # noqa: PT012 - where it is raised depends on the method
        driver = Driver(type("Fails", (Policy,), {method: fail, "scores": fail})(), SYNTHETIC, "callback")
        driver.admit(1, np.arange(8, dtype=np.int32))
        driver.victims(1, 1, PINNED)
        driver.drop(1, np.arange(1, dtype=np.int32))
        driver.observe(STEP)


def test_victims_without_scores_need_callback_mode() -> None:
    named = type("Named", (Policy,), {"victims": lambda *_: []})()
    with pytest.raises(
        PolicyConfigError, match=r"Named names victims but has no scores.*--fate-mode callback"
    ):
        Driver(named, SYNTHETIC, "table")
    Driver(named, SYNTHETIC, "callback")


def test_a_built_in_policy_is_called_by_its_name() -> None:
    with pytest.raises(PolicyConfigError, match=r"^policy belady knows the future: it works in replay only"):
        Driver(Belady(), SYNTHETIC, "table")


def test_a_policy_that_knows_the_future_is_for_replay() -> None:
    with pytest.raises(PolicyConfigError, match="works in replay only"):
        Driver(OfflinePolicy(), SYNTHETIC, "table")
    with pytest.raises(PolicyConfigError, match="works in replay only"):
        Driver(OfflinePolicy(), SYNTHETIC, "callback")
    Driver(OfflinePolicy(), SYNTHETIC, "callback", replay=True)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (
            {"mode": "tables"},
            "mode: 'tables' is not allowed; expected one of table, callback; did you mean 'table'",
        ),
        ({"refresh_tokens": 0}, "refresh_tokens: 0 is not allowed"),
        ({"policy": "lru"}, "'lru' is not a policy"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], fault: str) -> None:
    with pytest.raises(PolicyConfigError, match=fault):
        Driver(**{"policy": Policy(), "geometry": SYNTHETIC, **arguments})


def test_history_stamps_uses_by_row_then_worst_to_best() -> None:
    driver = Driver(Policy(), SYNTHETIC)
    ids = np.full((2, 3, 4), -1, np.int32)
    ids[0, 0, :2] = [5, 6]
    ids[1, 0, :2] = [6, 7]
    ids[1, 2] = [0, 1, 2, 3]
    driver.observe(make_step(ids))
    assert driver.history.clock.tolist() == [4, 0, 4]
    assert driver.history.last_use[0].tolist() == [0, 0, 0, 0, 0, 2, 4, 3] + [0] * 8
    assert driver.history.last_use[1].tolist() == [0] * 16
    assert driver.history.last_use[2].tolist() == [4, 3, 2, 1] + [0] * 12
    driver.observe(make_step(ids[1:]))
    assert driver.history.last_use[0].tolist() == [0, 0, 0, 0, 0, 2, 6, 5] + [0] * 8
    assert (driver.history.tokens_seen, driver.history.steps_seen) == (3, 2)


def test_history_is_read_only() -> None:
    history = Driver(Policy(), SYNTHETIC).history
    for array in (history.last_use, history.clock, history.resident, history.scores):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_table_mode_follows_the_moves_of_a_step_and_tells_them() -> None:
    policy = Answers(scores=np.zeros((3, 16)))
    driver = Driver(policy, SYNTHETIC)
    fills = np.array([[0, 3], [0, 1], [2, 9]], np.int32)
    driver.observe(make_step(STEP.ids, fills=fills))
    driver.observe(make_step(STEP.ids, fills=fills[:0], evictions=np.array([[0, 3]], np.int32)))
    assert np.argwhere(driver.history.resident).tolist() == [[0, 1], [2, 9]]
    first = ["start", ("admit", 0, [3, 1]), ("admit", 2, [9]), "observe"]
    assert policy.events == [*first, ("drop", 0, [3]), "observe"]


def test_callback_mode_puts_right_what_the_engine_decided_alone() -> None:
    """A GPU that waited no longer told nobody; victims() was then asked about experts long gone."""
    policy = Answers(victims=[1])
    driver = Driver(policy, SYNTHETIC, "callback")
    driver.admit(0, np.array([1, 2], np.int32))
    driver.observe(make_step(STEP.ids, fills=np.array([[0, 1], [0, 2]], np.int32)))
    driver.drop(0, driver.victims(0, 1, PINNED))  # the answer came late: 2 went
    driver.admit(0, np.array([3], np.int32))
    moves = {"fills": np.array([[0, 3], [2, 5]], np.int32), "evictions": np.array([[0, 2]], np.int32)}
    driver.observe(make_step(STEP.ids, **moves))
    assert np.argwhere(driver.history.resident).tolist() == [[0, 1], [0, 3], [2, 5]]
    told = [("drop", 0, [1]), ("admit", 0, [3])]
    corrected = [("drop", 0, [2]), ("admit", 0, [1]), ("admit", 2, [5])]
    assert policy.events == ["start", ("admit", 0, [1, 2]), "observe", *told, *corrected, "observe"]
    driver.observe(STEP)
    assert policy.events[-2:] == ["observe", "observe"]


def test_the_engines_last_uses_win_when_given() -> None:
    """Seeding comes before the step is observed: without them LRU would evict what was just used."""
    driver = Driver(Policy(), SYNTHETIC, "callback")
    driver.admit(1, np.arange(3, dtype=np.int32))
    last_use = np.zeros(16, np.int64)
    last_use[:3] = [9, 7, 8]
    assert driver.victims(1, 1, PINNED).tolist() == [0]
    assert driver.victims(1, 1, PINNED, last_use).tolist() == [1]


def test_reset_starts_over() -> None:
    policy = Answers(scores=np.ones((3, 16)))
    driver = Driver(policy, SYNTHETIC, "callback")
    driver.admit(0, np.arange(2, dtype=np.int32))
    driver.observe(STEP)
    driver.reset()
    assert policy.events[-1] == "start"
    assert not driver.history.resident.any()
    assert not driver.history.clock.any()
    assert not driver.history.scores.any()
    assert (driver.history.tokens_seen, driver.history.publications) == (0, 0)


def test_policy_seconds_count_the_policys_code_only() -> None:
    driver = Driver(Answers(scores=np.ones((3, 16))), SYNTHETIC)
    before = driver.policy_seconds
    driver.observe(STEP)
    assert driver.policy_seconds > before


def test_a_method_given_to_the_instance_alone_is_called_too() -> None:
    policy = Policy()
    told: list[Step] = []
    policy.observe = told.append  # type: ignore[method-assign]
    Driver(policy, SYNTHETIC).observe(STEP)
    assert told == [STEP]


class Predicts(Answers):
    """Predict whatever it was made with, and note what it is asked."""

    def __init__(self, predicted: Any, **answers: Any) -> None:
        super().__init__(**answers)
        self.predicted = predicted

    def predict(self, step: Step, token_id: int) -> Any:
        self.events.append(("predict", int(step.tokens[-1]), token_id))
        return self.predicted


RANKED = np.tile(np.arange(15, -1, -1, dtype=np.int32), (3, 1))
CHANCES = np.linspace(1, 0, 48, dtype=np.float32).reshape(3, 16)


def changed(array: NDArray[Any], value: Any) -> NDArray[Any]:
    array = array.copy()
    array[1, 4] = value
    return array


def test_a_prediction_becomes_a_table_of_chances() -> None:
    driver = Driver(Predicts((RANKED, CHANCES)), SYNTHETIC, prefetch=True)
    table = np.zeros((3, 16), np.float32)
    one, two = np.array([7], np.int32), np.array([7, 8], np.int32)
    assert not driver.predict(one, table)  # no step was observed
    driver.observe(STEP)
    assert not driver.predict(two, table)
    assert not table.any()
    assert driver.predict(one, table)
    assert table.tolist() == CHANCES[:, ::-1].tolist()
    assert driver.policy.events[-1] == ("predict", 2, 7)  # type: ignore[attr-defined]
    driver.reset()
    assert not driver.predict(one, table)


def test_a_policy_may_predict_nothing() -> None:
    driver = Driver(Predicts(None), SYNTHETIC, prefetch=True)
    driver.observe(STEP)
    assert not driver.predict(np.array([7], np.int32), np.zeros((3, 16), np.float32))


def test_prefetch_needs_a_policy_that_predicts() -> None:
    fault = (
        r"^prefetch: policy lru has no predict\(\); use the classifier or another policy that predicts, or "
        r"prefetch: layer, for which the model's own routers tell what comes$"
    )
    with pytest.raises(PolicyConfigError, match=fault):
        Driver(LRU(), SYNTHETIC, prefetch=True)


@pytest.mark.parametrize(
    ("predicted", "fault"),
    [
        (RANKED, "ndarray; expected experts and their chances"),
        (
            (RANKED[:2], CHANCES),
            r"experts int32 of shape \(2, 16\); expected whole numbers of shape \(3, 16\)",
        ),
        ((RANKED.astype(np.float32), CHANCES), "experts float32 of shape"),
        ((RANKED, CHANCES.T), r"float32 of shape \(16, 3\); expected float32 of shape \(3, 16\)"),
        ((RANKED, changed(CHANCES, 1.5)), "chance 1.5 at layer 1, rank 4; expected 0 to 1"),
        ((RANKED, changed(CHANCES, -0.5)), "chance -0.5 at layer 1, rank 4"),
        ((RANKED, changed(CHANCES, np.nan)), "chance nan at layer 1, rank 4"),
        ((changed(RANKED, 16), CHANCES), "expert 16 at layer 1, rank 4; expected 0 to 15"),
        ((changed(RANKED, -1), CHANCES), "expert -1 at layer 1, rank 4"),
        ((changed(RANKED, 3), CHANCES), "expert 3 of layer 1 more than once; expected each one once"),
    ],
)
def test_wrong_predictions_name_the_fault(predicted: Any, fault: str) -> None:
    driver = Driver(Predicts(predicted), SYNTHETIC, prefetch=True)
    driver.observe(STEP)
    table = np.zeros((3, 16), np.float32)
    with pytest.raises(PolicyError, match=f"Predicts: predict\\(\\) returned {fault}"):
        driver.predict(np.array([7], np.int32), table)
    assert not table.any()


@pytest.mark.parametrize("mode", ["table", "callback"])
def test_what_was_moved_to_and_fro_in_a_step_is_where_it_was(mode: str) -> None:
    """Prefetch may evict what the token then needs; the lists do not tell which came first."""
    driver = Driver(Answers(), SYNTHETIC, mode)
    ids = random_ids(1, SYNTHETIC, 1)
    driver.observe(make_step(ids, fills=np.array([(0, 3), (1, 3), (2, 5)], np.int32)))
    driver.policy.events.clear()  # type: ignore[attr-defined]
    driver.observe(
        make_step(
            ids,
            fills=np.array([(0, 3), (1, 9), (1, 8)], np.int32),
            evictions=np.array([(1, 9), (0, 3), (2, 5)], np.int32),
        )
    )
    assert np.argwhere(driver.history.resident).tolist() == [[0, 3], [1, 3], [1, 8]]
    told = [event for event in driver.policy.events if event != "observe"]  # type: ignore[attr-defined]
    assert told == [("drop", 2, [5]), ("admit", 1, [8])]
