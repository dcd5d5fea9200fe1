"""The library's linear model of routing says what Python's classifier says.

Sums are made in another order and in single precision, logs are off by up to 1e-6, and the two matrices are
kept in 14 bits a number: log-odds differ by up to 1e-3, nearly all of it from the 14 bits. What is counted is
the same to the last bit, so nothing drifts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from policy_contract import SYNTHETIC, geometry, make_step, random_ids, real_trace

from fate_bind import library
from fate_bind.errors import EngineError
from fate_bind.linear import NativeLinear
from fate_policy import cost, data, features, model, trace, train
from fate_policy.base import Geometry, Step
from fate_policy.classifier import MOST_ROWS, Classifier
from fate_policy.errors import PolicyError
from fate_policy.linear import LinearModel
from fate_policy.model import Model

pytestmark = pytest.mark.model  # needs the built library, though it opens no model

LIMIT = 2e-3
TOLD = SimpleNamespace(acts_late=False)


@dataclass(frozen=True)
class Answer:
    """What was said of one token: log-odds of both heads, and chances."""

    now: NDArray[np.float32]
    keep: NDArray[np.float32]
    chances: NDArray[np.float32]


class Native:
    """The library's twin; another one whose scores are the log-odds of the chances goes with it."""

    def __init__(self, linear: LinearModel) -> None:
        self.twins = NativeLinear(linear), NativeLinear(replace(linear, keep=linear.now))

    def expect(self, token: int, sequence: int, position: int) -> None:
        for twin in self.twins:
            twin.expect(token, sequence, position)

    def observe(self, step: Step) -> None:
        for twin in self.twins:
            twin.step(step)

    def ask(self) -> Answer:
        chances, keep, _ = self.twins[0].get()
        return Answer(self.twins[1].get()[1], keep, chances)


def ask(policy: Classifier) -> Answer:
    now = policy._scorers["now"](*policy._inputs)
    keep = policy.scores(TOLD)  # type: ignore[arg-type]
    exists = np.arange(now.shape[1]) < policy._loaded.shape.n_experts[:, None]  # type: ignore[union-attr]
    assert keep is not None
    return Answer(now.copy(), keep.copy(), np.where(exists, model.chance(now), 0))


def follow(policy: Any, steps: list[Step]) -> Iterator[Answer]:
    """Tell of each token that is a step by itself, ask, and take in the steps."""
    for step in steps:
        if step.n_tokens == 1:
            policy.expect(int(step.tokens[0]), int(step.sequences[0]), int(step.positions[0]))
            yield ask(policy) if isinstance(policy, Classifier) else policy.ask()
        policy.observe(step)


def started(fitted: Model, **params: Any) -> Classifier:
    shape = fitted.shape
    policy = Classifier.of(fitted, **params)
    made = geometry(shape.n_experts.tolist(), shape.k.tolist(), (shape.n_experts // 4).tolist())
    policy.start(replace(made, token_names=fitted.meta.get("tokens", "id")))
    return policy


def steps_of(
    ids: NDArray[np.int32], tokens: Any, sequences: Any, positions: Any, prompts: tuple[int, ...] = ()
) -> list[Step]:
    """Return steps of one token, and of 100 that begin at `prompts`."""
    columns = {
        name: np.array(values, np.int32)
        for name, values in (("tokens", tokens), ("sequences", sequences), ("positions", positions))
    }
    steps, at = [], 0
    while at < len(ids):
        n = 100 if at in prompts else 1
        part = slice(at, at + n)
        steps.append(make_step(ids[part], **{name: values[part] for name, values in columns.items()}))
        at += n
    return steps


@pytest.fixture(scope="module")
def fitted() -> Model:
    options = train.Options(
        sample_every=2, max_rows=3000, n_folds=2, heads=((0.25, 4),), table_minimum=1, rank_basis=64, rank=48
    )
    return train.fit([real_trace()], options)


@pytest.fixture(scope="module")
def real_steps() -> list[Step]:
    routed = trace.load(data.find("gptoss20b_stem", None)).slice(0, 1500)
    position = np.arange(1500) % 700  # also past where earliness ends
    return steps_of(
        routed.experts(0, 1500).astype(np.int32), routed.token_id, np.arange(1500) // 700, position, (0, 700)
    )


def made_up() -> Model:
    """Return a model of layers that differ, whose answers are as large as those of fitted ones."""
    made = cost.untrained(SYNTHETIC.n_experts.tolist(), SYNTHETIC.k.tolist())
    return replace(made, heads=[replace(head, coef=3 * head.coef) for head in made.heads])


def hard_steps(n: int = 3000, shape: Geometry = SYNTHETIC) -> list[Step]:
    """Return routing of three sequences in turns, with repeats, holes and unknown tokens; if long, of 300."""
    rng = np.random.default_rng(0)
    ids = random_ids(n, shape, 3)
    ids[rng.random(ids.shape[:2]) < 0.05] = -1
    tokens = np.where(rng.random(n) < 0.45, 0, (90 * rng.random(n) ** 2).astype(int))
    for at in range(200, n - 60, 200):  # what was said before is said again, and routed alike
        tokens[at : at + 60], ids[at : at + 60] = tokens[at - 61 : at - 1], ids[at - 61 : at - 1]
    tokens[rng.random(n) < 0.03] = features.UNKNOWN
    sequences = np.where(np.arange(n) % 50 < 40, 0, rng.integers(0, 3, n))
    if n > 2000:
        sequences[-700:-100] = np.arange(600) % 300
    return steps_of(ids, tokens, sequences, np.arange(n) % 500, (60, 160))


def differences(one: list[Answer], other: list[Answer]) -> NDArray[np.float64]:
    """Return how far apart the log-odds of each token are at most."""
    return np.array(
        [
            max(np.abs(a.now - b.now).max(), np.abs(a.keep - b.keep).max())
            for a, b in zip(one, other, strict=True)
        ]
    )


def check(one: list[Answer], other: list[Answer], k: NDArray[np.int32]) -> None:
    """Compare the answers of Python and of the library."""
    apart = differences(one, other)
    assert len(apart) > 1000
    assert apart.max() < LIMIT
    assert apart[-200:].max() < 2 * apart[:200].max() + 1e-5  # no drift
    same, n = 0, 0
    for a, b in zip(one, other, strict=True):
        assert np.abs(a.chances - b.chances).max() < LIMIT / 4
        assert np.array_equal(a.chances == 0, b.chances == 0)
        for layer, n_used in enumerate(k.tolist()):
            order = np.argsort(-a.now[layer], kind="stable")
            if a.now[layer, order[n_used - 1]] - a.now[layer, order[n_used]] > 1e-3:
                best = np.argsort(-b.now[layer], kind="stable")[:n_used]
                same, n = same + len(np.intersect1d(order[:n_used], best)), n + n_used
    assert n > 1000
    assert same >= 0.999 * n


def test_a_fitted_model_on_real_routing(fitted: Model, real_steps: list[Step]) -> None:
    policy = started(fitted)
    native = Native(policy.linear())  # type: ignore[arg-type]
    check(list(follow(policy, real_steps)), list(follow(native, real_steps)), fitted.shape.k)


@pytest.mark.parametrize("learn", [True, False])
def test_rows_and_history_run_out_and_sequences_alternate(learn: bool) -> None:
    steps = hard_steps()
    policy = started(made_up(), table_mb=0.08, learn=learn)
    native = Native(policy.linear())  # type: ignore[arg-type]
    check(list(follow(policy, steps)), list(follow(native, steps)), SYNTHETIC.k)
    if learn:  # all of which was meant to happen did
        state = policy._state
        assert len(state.tokens) == len(state.tokens.sums) < 80
        assert len(state.pairs) == len(state.pairs.sums)
        assert state._n_seen > 20 * state.n_history
        assert len(state._sequences) == features.MAX_SEQUENCES
        assert state.tokens.n[state.tokens.get(0), 0] >= features.MAX_COUNT / 2
        assert sum(int(step.tokens[0] == 0) for step in steps) > features.MAX_COUNT


def test_what_python_learned_is_what_the_model_began_with(fitted: Model, real_steps: list[Step]) -> None:
    """The library begins where training ended, whatever Python saw since; so it does after a reset."""
    policy = started(fitted)
    for _ in follow(policy, real_steps[:300]):
        pass
    native = Native(policy.linear())  # type: ignore[arg-type]
    first = list(follow(native, real_steps[:300]))
    for twin in native.twins:
        twin.reset()
    again = list(follow(native, real_steps[:300]))
    assert differences(first, again).max() == 0
    assert differences(list(follow(started(fitted), real_steps[:300])), first).max() < LIMIT


def test_one_question_alone(fitted: Model, real_steps: list[Step]) -> None:
    policy = started(fitted, evict_by="lru")
    linear = policy.linear()
    assert linear is not None
    assert not linear.has_scores
    alone, both = NativeLinear(linear), NativeLinear(started(fitted).linear())  # type: ignore[arg-type]
    for step in real_steps[:50]:
        for native in (alone, both):
            native.step(step)
            native.expect(5, 0, 3)
        assert np.abs(alone.get()[0] - both.get()[0]).max() < LIMIT
    assert not alone.get()[1].any()
    assert both.get()[2].tolist() == policy._heads["keep"].bonus.tolist()


def test_tokens_one_by_one_are_a_step(fitted: Model, real_steps: list[Step]) -> None:
    linear = started(fitted).linear()
    assert linear is not None
    whole, parts = NativeLinear(linear), NativeLinear(linear)
    prompt = real_steps[0]
    assert prompt.n_tokens == 100
    whole.step(prompt)
    for t in range(100 - MOST_ROWS, 100):
        parts.observe(prompt.ids[t], int(prompt.tokens[t]), int(prompt.sequences[t]))
    assert all(np.array_equal(a, b) for a, b in zip(whole.get(), parts.get(), strict=True))


CHANGES: dict[str, Any] = {
    "basis": lambda linear: {"basis": 1.01 * linear.basis},
    "center": lambda linear: {"center": linear.center + 0.01},
    "squeeze": lambda linear: {"squeeze": linear.squeeze[::-1]},
    "n_history": lambda linear: {"n_history": linear.n_history - 5},
    "learn": lambda linear: {"learn": False},
    "token rows": lambda linear: {"tokens": replace(linear.tokens, capacity=linear.tokens.capacity - 1)},
    "pair rows": lambda linear: {"pairs": replace(linear.pairs, capacity=linear.pairs.capacity - 1)},
    **{
        name: lambda linear, name=name: {
            "constants": replace(linear.constants, **{name: 0.99 * getattr(linear.constants, name)})
        }
        for name in ("rate_keep", "context_keep", "soon", "later", "credit")
    },
    **{
        f"{head} {name}": lambda linear, head=head, name=name: {
            head: replace(getattr(linear, head), **{name: 1.01 * getattr(getattr(linear, head), name)})
        }
        for head in ("now", "keep")
        for name in ("weights", "fold", "constant")
    },
    **{
        f"{head} {name}": lambda linear, head=head, i=i: {
            head: replace(getattr(linear, head), weights=_moved(getattr(linear, head).weights, i))
        }
        for head in ("now", "keep")
        for i, name in enumerate(features.NAMES)
    },
}


def _moved(weights: NDArray[np.float32], i: int) -> NDArray[np.float32]:
    moved = weights.copy()
    moved[:, i] += 0.05
    return moved


@pytest.fixture(scope="module")
def hard_answers() -> tuple[Classifier, list[Step], list[Answer]]:
    steps = hard_steps(900)
    policy = started(made_up(), table_mb=0.08)
    return policy, steps, list(follow(policy, steps))


@pytest.mark.parametrize("what", CHANGES)
def test_no_part_of_the_model_could_be_another(
    hard_answers: tuple[Classifier, list[Step], list[Answer]], what: str
) -> None:
    """What the comparison is worth: anything that is a little off shows in it."""
    policy, steps, right = hard_answers
    linear = policy.linear()
    assert linear is not None
    changed = replace(linear, **CHANGES[what](linear))
    apart = differences(right, list(follow(Native(changed), steps))).max()
    assert apart > LIMIT


def test_the_sizes_are_those_of_the_features() -> None:
    lib = library.load().lib
    sizes = {
        name.removeprefix("FATE_LINEAR_"): getattr(lib, name)
        for name in dir(lib)
        if name.startswith("FATE_LINEAR_")
    }
    at = features.NAMES.index
    assert sizes == {
        "RATES": len(features.HALF_LIVES),
        "EARLY": len(features.EARLY_HALF_LIVES),
        "NGRAMS": len(features.NGRAMS),
        "MOST_GRAM": max(features.NGRAMS),
        "DECAYED": len(features.CONTEXT_HALF_LIVES),
        "CONTEXTS": features.N_CONTEXTS,
        "LATER": features.LATER,
        "FOLLOW": features.FOLLOW,
        "MAX_COUNT": features.MAX_COUNT,
        "MAX_AGE": features.MAX_AGE,
        "MAX_SEQUENCES": features.MAX_SEQUENCES,
        "MOST_ROWS": MOST_ROWS,
        "UNKNOWN": features.UNKNOWN,
        "RATE": at("rate_1"),
        "LOG_RATE": at("log_rate_1"),
        "LOG_AGE": at("log_age"),
        "TOKEN_NOW": at("token_now"),
        "PAIR_NOW": at("pair_now"),
        "TOKEN_LATER": at("token_later"),
        "PAIR_LATER": at("pair_later"),
        "REPEAT": at("repeat_2_now"),
        "EARLY_LOG": at("early_log_rate_4"),
        "FEATURES": len(features.NAMES),
    }


def test_what_cannot_be_is_refused() -> None:
    linear = started(made_up()).linear()
    assert linear is not None
    with pytest.raises(EngineError, match="n_history 32: expected more than FATE_LINEAR_FOLLOW"):
        NativeLinear(replace(linear, n_history=features.FOLLOW))
    with pytest.raises(PolicyError, match=r"linear\(\): weights has shape \(3, 33\); expected \(3, 34\)"):
        NativeLinear(replace(linear, now=replace(linear.now, weights=linear.now.weights[:, :-1])))
    for name in ("basis", "center", "squeeze"):
        with pytest.raises(PolicyError, match=rf"linear\(\): {name} has shape"):
            NativeLinear(replace(linear, **{name: getattr(linear, name)[:-1]}))  # read past its end otherwise
    with pytest.raises(PolicyError, match=r"linear\(\): sums has shape"):
        NativeLinear(replace(linear, pairs=replace(linear.pairs, sums=linear.pairs.sums[:, :, 1:])))
    ids = np.zeros((3, 4), np.int32)
    ids[0, 0] = 8
    with pytest.raises(EngineError, match="expert 8 of layer 0: expected -1 to 7"):
        NativeLinear(linear).observe(ids, 1, 0)
    with pytest.raises(EngineError, match="n_layers of a step 2: expected the model's"):
        NativeLinear(linear).step(make_step(np.zeros((1, 2, 4), np.int32)))
