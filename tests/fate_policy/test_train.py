from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from policy_contract import DATA, geometry, real_trace, synthetic_trace

from fate_policy import assess, cli, config, cost, data, features, model, trace, train, train_command
from fate_policy.errors import FateError, TraceError
from fate_policy.features import EARLY_AT, EARLY_OF, NAMES
from fate_policy.kernels import Routing, simulate
from fate_policy.replay import replay
from fate_policy.train import FAR, Options, _fit_linear, _ridge, next_uses, uses

SMALL = train.Options(
    sample_every=4,
    max_rows=2000,
    rank_basis=16,
    rank=16,
    n_folds=2,
    heads=((0.25, 4),),
    table_minimum=1,
)


def test_next_uses() -> None:
    ids = np.array([[[0, 1]], [[1, 2]], [[0, 2]]], np.int32)
    assert next_uses(ids, 4, np.array([0, 1, 2]))[:, 0].tolist() == [
        [2, 1, 1, FAR],
        [1, FAR, 1, FAR],
        [FAR, FAR, FAR, FAR],
    ]


def test_uses_leave_out_what_did_not_run() -> None:
    assert uses(np.array([[[1, -1]]], np.int32), 3).tolist() == [[[False, True, False]]]


def test_the_split_is_at_a_prompt() -> None:
    first, second = train.split(synthetic_trace())
    assert first.n_tokens + second.n_tokens == 400
    assert second.position[0] == 0


def test_fitting_twice_gives_the_same() -> None:
    one, two = (train.fit([synthetic_trace()], SMALL) for _ in range(2))
    for head, same in zip(one.heads, two.heads, strict=True):
        assert np.array_equal(head.coef, same.coef)
    assert [head.name for head in one.heads] == ["now", "keep 0.25/4", "late 0.25/4"]


def test_bars_move_over_tokens_and_layers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_policy.progress.SECONDS", 0)
    fitted = train.fit([synthetic_trace()], SMALL, progress=True)
    assess.serve(fitted, synthetic_trace(52), progress=True)
    shown = [
        part.split("]")[1].split(",")[0].strip()
        for part in capsys.readouterr().err.split("\r")
        if "]" in part
    ]
    layers = [f"{layer}/3" for layer in range(3)]
    assert shown == [f"{t}/400" for t in range(400)] + layers * 3 + [f"{t}/52" for t in range(52)]


def test_the_label_may_be_the_optimums_choice() -> None:
    fitted = train.fit([synthetic_trace()], replace(SMALL, heads=((0.25, 0),)))
    assert [head.name for head in fitted.heads] == ["now", "keep 0.25/optimum", "late 0.25/optimum"]
    window = train.fit([synthetic_trace()], SMALL)
    assert np.array_equal(fitted.head("now").coef, window.head("now").coef)
    assert not np.array_equal(fitted.head("keep").coef, window.head("keep").coef)


def test_balanced_answers_weigh_alike() -> None:
    wanted = np.array([True, False, False, False])
    weight, excess = train.balance(wanted)
    assert weight.tolist() == [2, 2 / 3, 2 / 3, 2 / 3]
    assert excess == pytest.approx(np.log(3))
    assert train.balance(wanted[1:]) == (None, 0)


@pytest.mark.parametrize(
    "estimator", [None, "sklearn.linear_model:LogisticRegression", "sklearn.naive_bayes:GaussianNB"]
)
def test_balancing_leaves_chances_as_often_right(estimator: str | None) -> None:
    """Weighed samples alone would have a quarter of the experts look like a half."""
    plain, balanced = (
        train.fit([synthetic_trace()], replace(SMALL, estimator=estimator, balanced=balanced))
        for balanced in (False, True)
    )
    assert (plain.meta["balanced"], balanced.meta["balanced"]) == (False, True)
    assert (balanced.head("now").intercept < plain.head("now").intercept).all() or estimator is None
    tables = [assess.serve(one, synthetic_trace(100))["now"] for one in (plain, balanced)]
    assert not np.array_equal(*tables)
    expected = [model.chance(table).mean() for table in tables]
    assert expected[1] == pytest.approx(expected[0], rel=0.1)


def test_foreign_traces_are_refused() -> None:
    with pytest.raises(TraceError, match="different layers or experts"):
        train.fit([synthetic_trace(), real_trace()], SMALL)
    with pytest.raises(TraceError, match="other layers or experts"):
        assess.serve(cost.untrained([16, 16], [4, 4]), real_trace())


def test_only_some_prompts() -> None:
    whole = synthetic_trace()
    wanted = np.array([False, True, False, True, False, True, False, False])[: len(whole.prompt_start)]
    part = assess.of_prompts(whole, wanted)
    assert len(part.prompt_start) == wanted.sum()
    assert np.array_equal(part.ids[0], whole.ids[whole.prompt_start[1]])
    assert np.diff(part.step).min() >= 0


@pytest.fixture(scope="module")
def halves() -> tuple[train.Trace, train.Trace]:
    first, second = train.split(trace.load(data.find("gptoss20b_stem")))
    return first.slice(0, 2500), second.slice(0, 600)


@pytest.mark.slow
def test_it_beats_the_simple_rules_on_prompts_it_has_not_seen(halves: tuple) -> None:
    """Even fitted on 2,500 tokens, and asked at real decisions."""
    first, second = halves
    fitted = train.fit([first], train.Options(n_folds=2, sample_every=8))
    half_lives = assess.best_half_lives([first])
    found = assess.assess(fitted, second, half_lives, shares=(0.25, 0.5))
    for row in found["evictions"]:
        assert row["lru"] < max(row["frequency"], row["lfru"]) < row["delayed"] < row["sync"] < row["optimum"]
        assert row["evicts_as_optimum"] > 1.3 * row["lru_evicts_as_optimum"]
        assert row["used_again"] < 0.85 * row["lru_used_again"]
    recall = found["predictions"]
    assert recall["boundary"]["at_k"] > 0.65
    assert recall["boundary"]["at_2k"] > 0.85
    assert recall["ahead_1"]["at_k"] > recall["ahead_2"]["at_k"] > recall["boundary"]["at_k"]
    assert recall["calibration"]["error"] < 0.02
    for row in found["prefetch"]:
        assert row["misses_gone"] > 0.2
        assert row["per_token"] <= row["budget"]
    routing = Routing.of_trace(second)
    assert found["evictions"][0]["lru"] == simulate(routing, 8).hit_rate


@pytest.mark.slow
def test_quick_training_from_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_policy.train_command.QUICK_TOKENS", 1500)
    monkeypatch.setattr("fate_policy.train_command.QUICK_TEST_TOKENS", 300)
    out = tmp_path / "m.npz"
    monkeypatch.setattr("fate_policy.train_command.COMPARED", train_command.COMPARED[-1:])
    assert cli.main("train", ["gptoss20b_stem", "--quick", "--compare", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "recall boundary" in printed
    report = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert set(report["importance"]) == {"now", "keep 0.25/4", "late 0.25/4", "keep 0.5/12", "late 0.5/12"}
    calibrated = "sklearn.calibration:CalibratedClassifierCV(sklearn.linear_model:LogisticRegression)"
    assert report["estimators"].keys() == {"linear", calibrated}
    assert report["estimators"][calibrated]["closed"] > 0.2
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert model.load(out).meta["held_out"]


def test_an_estimator_without_weights_cannot_be_balanced(tmp_path: Path) -> None:
    real_trace().save(tmp_path / "t.npz")
    args = [str(tmp_path / "t.npz"), "--test", "gptoss20b_stem", "-o", str(tmp_path / "m.npz")]
    args += ["--balance", "balanced", "--estimator", "sklearn.neighbors:KNeighborsClassifier"]
    with pytest.raises(
        FateError, match="KNeighborsClassifier' takes no sample_weight; fit without --balance"
    ):
        cli.main("train", args)


def test_inputs_can_be_done_without() -> None:
    fitted = train.fit([synthetic_trace()], replace(SMALL, without=("early", "context_soon")))
    gone = [name.startswith(("early", "context_soon")) for name in fitted.inputs]
    assert sum(gone) == len(features.EARLY_HALF_LIVES) + 1
    for head in fitted.heads:
        assert not head.coef[:, gone].any()
        assert head.coef[:, np.logical_not(gone)].any(axis=0).all()


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        (["--without", "late"], "unknown input 'late'"),
        (["--without", "early", "--estimator", "sklearn.naive_bayes:GaussianNB"], "is for the linear model"),
    ],
)
def test_what_cannot_be_done_without(args: list[str], fault: str, tmp_path: Path) -> None:
    real_trace().save(tmp_path / "t.npz")
    given = [str(tmp_path / "t.npz"), "--test", "gptoss20b_stem", "-o", str(tmp_path / "m.npz"), *args]
    with pytest.raises(FateError, match=fault):
        cli.main("train", given)


def test_few_prompts_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(FateError, match="no trace holds 6 prompts"):
        cli.main("train", [str(DATA / "gptoss20b_stem_400.npz"), "-o", str(tmp_path / "m.npz")])


def test_prompt_tokens_are_left_out() -> None:
    part = assess.decode_only(synthetic_trace())
    assert part.n_tokens == int(synthetic_trace().is_decode.sum())
    assert part.step.tolist() == list(range(part.n_tokens))
    assert len(part.prompt_start) == len(synthetic_trace().prompt_start)


@pytest.mark.slow
def test_a_trace_of_one_prompt_is_fitted_on_whole(tmp_path: Path) -> None:
    real_trace().slice(0, 150).save(tmp_path / "tale.npz")
    real_trace().slice(150, 300).save(tmp_path / "code.npz")
    out = tmp_path / "mine.npz"
    args = [str(tmp_path / "tale.npz"), "--test", str(tmp_path / "code.npz"), "--quick", "-o", str(out)]
    assert cli.main("train", args) == 0
    policy = config.make_policy(config.load(out.with_suffix(".yaml")))
    assert replay(real_trace(), policy, n_slots=8).hits.sum() > 0


def test_few_early_tokens_make_no_wild_coefficients() -> None:
    """A model of one long sequence, served from a start, once ranked by next to nothing else."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((4000, len(NAMES))).astype(np.float32)
    inputs[:, EARLY_AT] = 0
    inputs[:8, EARLY_AT] = inputs[:8][:, EARLY_OF]
    wanted = inputs[:, 0] + rng.standard_normal(4000) > 1
    wanted[:8] = inputs[:8, EARLY_OF[0]] > 0
    coef = _fit_linear(inputs, wanted, None, Options())
    assert np.abs(coef[EARLY_AT]).max() < 2 * abs(coef[0])


SKEWED = geometry([16] * 6, [4] * 6, [8] * 6)


def skewed_trace(n_tokens: int, seed: int, *, is_copied: bool = False) -> train.Trace:
    """Return layers that like some experts more, independent of one another or copies of the first."""
    rng = np.random.default_rng(seed)
    liked = np.stack([np.roll(np.linspace(3, 0, 16), 5 * layer) for layer in range(6)])
    drawn = liked + rng.gumbel(size=(n_tokens, 6, 16))
    ids = np.argsort(-drawn, axis=2)[:, :, :4].astype(np.uint8)
    if is_copied:
        ids[:] = ids[:, :1]
    whole = synthetic_trace(n_tokens, shape=SKEWED)
    tokens = rng.integers(50, size=n_tokens).astype(np.int32)
    return replace(whole, ids=np.where(whole.ids == 255, 255, ids).astype(np.uint8), token_id=tokens)


def recall_ahead(fitted: model.Model, test: train.Trace) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Return recall at the start of the token and ahead, by distance, of the same layers."""
    tables = assess.serve(fitted, test)
    found = assess.predictions(fitted, test, tables)
    used, expected = uses(test.experts(), 16), model.chance(tables["now"])
    return [
        (assess._recall(fitted, expected, used, distance), found[f"ahead_{distance}"])
        for distance in range(1, model.AHEAD + 1)
    ]


@pytest.mark.parametrize("n_tokens", [100, 400, 1600])
def test_layers_that_tell_nothing_do_no_harm(n_tokens: int) -> None:
    """A penalty too weak for so few samples once took up to a fifth of the start's recall."""
    fitted = train.fit([skewed_trace(n_tokens, 1)], SMALL)
    for start, ahead in recall_ahead(fitted, skewed_trace(1000, 2)):
        assert start["at_k"] > 0.35
        assert ahead["at_k"] > start["at_k"] - 0.01
        assert ahead["at_2k"] > start["at_2k"] - 0.01


@pytest.mark.parametrize("is_one_prompt", [False, True])
def test_a_layer_that_copies_is_foreseen(is_one_prompt: bool) -> None:
    first = skewed_trace(1600, 1, is_copied=True)
    if is_one_prompt:
        first = replace(first, sequence=np.zeros_like(first.sequence))
    fitted = train.fit([first], SMALL)
    for start, ahead in recall_ahead(fitted, skewed_trace(400, 2, is_copied=True)):
        assert start["at_k"] < 0.6
        assert ahead["at_k"] > 0.98


def test_each_layer_ahead_has_its_own_penalty() -> None:
    """One that the halves of the samples contradict has none that is weak enough: its weights are zero."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((200, 8)).astype(np.float32)
    is_second = np.arange(200) >= 100
    sure, noisy = inputs[:, :2], inputs[:, :2] + rng.standard_normal((200, 2)) * 4
    wanted = np.stack((sure, np.where(is_second[:, None], sure, -sure), noisy), axis=1).astype(np.float32)
    weights = _ridge(inputs, wanted, is_second)
    assert weights.shape == (8, 3, 2)
    assert np.abs(weights[:, 0] - np.eye(8, 2)).max() < 0.01
    assert not weights[:, 1].any()
    assert (np.diag(weights[:, 2]) < 0.9).all()
    assert weights[:, :1] == pytest.approx(_ridge(inputs, wanted[:, :1], is_second), abs=1e-5)


def test_experts_that_a_layer_lacks_tell_nothing() -> None:
    fitted = train.fit([synthetic_trace()], SMALL)
    of_first = fitted.ahead[0, 1].reshape(model.AHEAD_LAYERS, 16, 16)[0]
    assert fitted.shape.n_experts.tolist() == [8, 16, 16]
    assert of_first[:8].any(axis=1).all()
    assert not of_first[8:].any()
