from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from policy_contract import (
    SYNTHETIC,
    PolicyContract,
    geometry,
    golden,
    make_step,
    random_ids,
    real_trace,
    synthetic_trace,
)

from fate_policy import cost, features, model, train
from fate_policy.assess import serve
from fate_policy.base import Geometry, Policy
from fate_policy.classifier import Classifier, ranked
from fate_policy.driver import Driver
from fate_policy.errors import PolicyConfigError, TraceError
from fate_policy.kernels import Routing, simulate_scores
from fate_policy.model import Model
from fate_policy.prefetch_rule import Prefetch
from fate_policy.replay import geometry_of, replay
from fate_policy.trace import Trace

SMALL = train.Options(
    sample_every=2,
    max_rows=3000,
    rank_basis=16,
    rank=16,
    n_folds=2,
    heads=((0.25, 4), (0.5, 8)),
    table_minimum=1,
)


@pytest.fixture(scope="module")
def fitted() -> Model:
    return train.fit([real_trace()], SMALL)


@pytest.fixture(scope="module")
def fitted_synthetic() -> Model:
    return train.fit([synthetic_trace()], SMALL)


class TestClassifier(PolicyContract):
    name = "classifier"

    @pytest.fixture(autouse=True)
    def file(self, tmp_path: Path, fitted_synthetic: Model) -> None:
        self.path = tmp_path / "model.npz"
        fitted_synthetic.save(self.path)
        type(self).params = {"model": str(self.path)}

    def make_for(self, shape: Geometry) -> Policy:
        made = cost.untrained(shape.n_experts.tolist(), shape.k.tolist())
        made.save(self.path)
        return Classifier.of(made)

    def test_real_model_fits_the_time_budget(self) -> None:
        """48 x 128 experts, a table and a token's uses: 0.6 ms on an idle core; the bound has room."""
        spent = cost.table_seconds(cost.untrained([128] * 48, [8] * 48), of=min)
        assert spent["table"] + spent["observe"] < 2e-3


def test_golden_counts(fitted: Model, fitted_synthetic: Model) -> None:
    """A fit may differ in its last bits between machines, so these are near, not equal."""
    hits = [
        replay(real_trace(), Classifier.of(fitted), n_slots=8, sync=sync).hits.sum() for sync in (False, True)
    ]
    hits.append(replay(synthetic_trace(), Classifier.of(fitted_synthetic)).hits.sum())
    assert hits == pytest.approx([28371, 29065, 2064], rel=0.003)


def test_golden_counts_of_given_coefficients() -> None:
    """A model whose only input is the rate of 16 tokens decides as the policy `frequency` does."""
    made = cost.untrained([32] * 24, [4] * 24)
    heads = []
    for head in made.heads:
        coef = np.zeros_like(head.coef)
        coef[:, made.inputs.index("rate_16")] = 1
        heads.append(replace(head, coef=coef, intercept=head.intercept * 0, bonus=head.bonus * 0))
    counters = replay(real_trace(), Classifier.of(replace(made, heads=heads)), n_slots=8)
    assert golden(counters) == (26893, 11507, 11507, 11315, 2816)


class Untold(Classifier):
    """One that does not ask which token comes."""

    expect = Policy.expect


def test_replay_asks_what_the_lab_serves(fitted: Model) -> None:
    """Replay counts what the tables of `serve` give; without sync, what they give a token late, exactly."""
    routed = real_trace().slice(0, 200)
    tables = serve(fitted, routed)
    keep, late = fitted.head("keep", 0.25), fitted.head("late", 0.25)
    for table in tables.values():
        table[0] = 0  # nothing was seen, so nothing is asked; two tokens fit the slots
    routing = Routing.of_trace(routed)
    synced = replay(routed, Classifier.of(fitted), n_slots=8)
    assert synced == simulate_scores(routing, 8, tables[keep.name]).counters
    delayed = simulate_scores(routing, 8, tables[late.name], bonus=late.bonus, delay=1).counters
    assert replay(routed, Classifier.of(fitted), n_slots=8, sync=False) == delayed
    untold = replay(routed, Untold.of(fitted), n_slots=8)
    assert untold.hits.sum() == pytest.approx(delayed.hits.sum(), abs=3)


def test_the_position_is_served_as_it_was_recorded(fitted: Model) -> None:
    """And told to the policy, not counted by it: a sequence may be cleared, a prompt only half taken in."""
    routed = real_trace().slice(0, 120)
    late = replace(routed, position=routed.position + features.EARLY_END)
    tables = [serve(fitted, one)["keep 0.25/4"] for one in (routed, late)]
    assert not np.array_equal(*tables)
    for table, one in zip(tables, (routed, late), strict=True):
        table[0] = 0
        lab = simulate_scores(Routing.of_trace(one), 8, table).counters
        assert replay(one, Classifier.of(fitted), n_slots=8) == lab


def weighed(routed: Trace) -> Trace:
    """Return the trace with router weights, made up, best first."""
    weights = np.random.default_rng(0).random(routed.ids.shape)
    weights = np.sort(weights / weights.sum(axis=2, keepdims=True), axis=2)[:, :, ::-1]
    return replace(routed, weights=weights.astype(np.float16))


def test_weights_are_served_as_they_were_trained(fitted: Model, tmp_path: Path) -> None:
    routed = weighed(real_trace()).slice(0, 120)
    heavy = train.fit([routed], replace(SMALL, weights=True, heads=((0.25, 4),)))
    heavy.save(tmp_path / "heavy.npz")
    policy = Classifier(model=str(tmp_path / "heavy.npz"))
    assert policy.wants_weights
    assert not Classifier.of(fitted).wants_weights
    tables = serve(heavy, routed)
    other = serve(heavy, replace(routed, weights=routed.weights[::-1]))
    assert not np.array_equal(tables["now"], other["now"])
    for table in tables.values():
        table[0] = 0
    keep = heavy.head("keep", 0.25)
    lab = simulate_scores(Routing.of_trace(routed), 8, tables[keep.name]).counters
    assert replay(routed, Classifier.of(heavy), n_slots=8) == lab
    read = model.load(tmp_path / "heavy.npz")
    assert read.meta["inputs"][-3 - len(features.WEIGHT_NAMES) : -3] == list(features.WEIGHT_NAMES)
    assert (
        replay(routed, policy, n_slots=8).totals() == replay(routed, Classifier.of(read), n_slots=8).totals()
    )


def test_weights_that_are_not_known_are_an_error() -> None:
    routed = real_trace().slice(0, 200)
    heavy = cost.untrained([32] * 24, [4] * 24, weights=True)
    fault = "^model: it was fitted with router weights, and this trace holds none; record one with"
    with pytest.raises(PolicyConfigError, match=fault):
        replay(routed, Classifier.of(heavy), n_slots=8)
    with pytest.raises(PolicyConfigError, match=fault):
        serve(heavy, routed)
    with pytest.raises(TraceError, match=r"^weights: a trace to fit on holds no router weights; record one"):
        train.fit([weighed(routed), routed], replace(SMALL, weights=True))


def test_no_look_ahead(fitted: Model) -> None:
    """Another future changes nothing that was decided before it."""
    routed = real_trace().slice(0, 160)
    ids = routed.ids.copy()
    ids[120:] = ids[120:][::-1]
    other = replace(routed, ids=ids)
    tables = [serve(fitted, one) for one in (routed, other)]
    for name in tables[0]:
        assert np.array_equal(tables[0][name][:121], tables[1][name][:121])
    assert not np.array_equal(tables[0]["now"][121:], tables[1]["now"][121:])
    for sync in (False, True):
        counted = [
            replay(one.slice(0, 120), Classifier.of(fitted), n_slots=8, sync=sync) for one in (routed, other)
        ]
        assert counted[0] == counted[1]


def test_predict_ranks_and_changes_nothing(fitted: Model) -> None:
    routed = real_trace()
    policy = Classifier.of(fitted)
    driver = Driver(policy, geometry_of(routed, 8))
    step = make_step(routed.experts(0, 1))
    driver.observe(step)
    driver.expect(*np.array([[5], [0], [1]], np.int32))
    before = policy.scores(driver.history).copy()
    experts, chances = policy.predict(step, 7)
    assert experts.shape == chances.shape == (24, 32)
    assert (np.sort(experts, axis=1) == np.arange(32)).all()
    assert (np.diff(chances, axis=1) <= 0).all()
    assert ((chances > 0) & (chances < 1)).all()
    assert np.array_equal(policy.scores(driver.history), before)
    again = policy.predict(step, 7)
    assert np.array_equal(again[0], experts)


def test_the_file_gives_the_same_decisions(fitted: Model, tmp_path: Path) -> None:
    fitted.save(tmp_path / "m.npz")
    read = model.load(tmp_path / "m.npz")
    assert read.meta["traces"] == [real_trace().hash()]
    assert read.meta["inputs"] == list(model.inputs(weights=False))
    read.save(tmp_path / "again.npz")
    routed = real_trace().slice(0, 120)
    counted = [
        replay(routed, Classifier(model=str(tmp_path / name)), n_slots=8) for name in ("m.npz", "again.npz")
    ]
    assert counted[0] == counted[1]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"inputs": ["one"]}, "was fitted with features"),
        ({"version": 9}, "version 9, not 'fate-classifier' 1"),
    ],
)
def test_a_mismatch_is_an_error(fitted: Model, tmp_path: Path, change: dict, fault: str) -> None:
    path = tmp_path / "m.npz"
    replace(fitted, meta={**fitted.meta, **change}).save(path)
    with pytest.raises(PolicyConfigError, match=f"^model: .*{fault}"):
        model.load(path)


def test_coefficients_need_no_scikit_learn(fitted: Model, tmp_path: Path) -> None:
    path = tmp_path / "m.npz"
    replace(fitted, meta={**fitted.meta, "sklearn": "0.1"}).save(path)
    assert model.load(path).meta["sklearn"] == "0.1"


@pytest.mark.parametrize(
    "name",
    ["basis", "center", "squeeze", "spread", "mean", "head0_coef", "head1_bonus", "tokens_sums", "ahead"],
)
def test_a_file_that_was_cut_or_spoilt_is_refused(name: str, fitted: Model, tmp_path: Path) -> None:
    """What reads it in native code counts on its sizes."""
    path = tmp_path / "m.npz"
    fitted.save(path)
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    np.savez(path, **{**arrays, name: arrays[name][:-1]})
    with pytest.raises(PolicyConfigError, match=f"cannot be read: {name} has shape .*, which belongs to"):
        model.load(path)
    spoilt = arrays[name].copy()
    spoilt.flat[0] = np.nan
    np.savez(path, **{**arrays, name: spoilt})
    with pytest.raises(PolicyConfigError, match=f"cannot be read: {name} holds numbers that are not finite"):
        model.load(path)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("text", encoding="utf-8")
    np.savez(tmp_path / "other.npz", meta=np.array(json.dumps({})))
    for name, fault in (
        ("text.npz", "is not a fitted model"),
        ("other.npz", "cannot be read"),
        ("no", "not exist"),
    ):
        with pytest.raises(PolicyConfigError, match=fault):
            model.load(tmp_path / name)


def test_a_model_fitted_on_hashes_is_not_served_with_ids(fitted: Model) -> None:
    """Its tables would never be found, and nothing would tell but the hit rate."""
    ids = replace(real_trace(), token_id=np.arange(400, dtype=np.int32))
    fault = "tokens are named by id here, and it was fitted on tokens named by crc32; fit it on a trace of"
    with pytest.raises(PolicyConfigError, match=fault):
        replay(ids, Classifier.of(fitted), n_slots=8)
    with pytest.raises(PolicyConfigError, match=fault):
        Driver(Classifier.of(fitted), geometry([32] * 24, [4] * 24, [8] * 24))
    with pytest.raises(PolicyConfigError, match=fault):
        serve(fitted, ids)
    with pytest.raises(TraceError, match="name tokens differently: by crc32 and by id"):
        train.fit([real_trace(), ids], SMALL)


@pytest.mark.parametrize("shape", [(896, 160), (160, 48 * 128), (21, 5), (7, 33)])
def test_products_in_pieces_are_those_of_the_whole(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    matrix, vector = rng.standard_normal(shape, np.float32), rng.standard_normal(shape[0], np.float32)
    pieces = model.in_pieces(matrix)
    assert pieces[0].size <= max(model.UNTHREADED, model.WHOLE * shape[0])
    product = (vector @ pieces).ravel()
    assert np.allclose(product[: shape[1]], vector @ matrix, rtol=1e-5, atol=1e-5)
    assert not product[shape[1] :].any()


def test_another_geometry_is_an_error(fitted: Model) -> None:
    with pytest.raises(
        PolicyConfigError, match="was fitted for MoE layers: 24, and this model has 3; fit one"
    ):
        Driver(Classifier.of(fitted), SYNTHETIC)
    with pytest.raises(PolicyConfigError, match="was fitted for k"):
        Driver(Classifier.of(fitted), geometry([32] * 24, [2] * 24, [8] * 24))


def test_batches_and_prompts_are_taken_in(fitted_synthetic: Model) -> None:
    policy = Classifier.of(fitted_synthetic)
    driver = Driver(policy, SYNTHETIC)
    driver.observe(make_step(random_ids(100, SYNTHETIC, 1)))
    driver.observe(make_step(random_ids(4, SYNTHETIC, 2), sequences=np.array([0, 1, 2, 1], np.int32)))
    assert np.isfinite(policy.scores(driver.history)).all()


def test_ranks_are_those_of_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for odds in (
        rng.standard_normal((5, 200)).astype(np.float32),
        rng.integers(-2, 3, (5, 200)).astype(np.float32),
        np.array([[-0.0, 0.0, np.inf, -np.inf, 1e-45, -1e-45, 0.0]], np.float32),
    ):
        assert np.array_equal(ranked(odds), np.argsort(-odds, axis=1, kind="stable"))


@pytest.mark.parametrize("told", [True, False])
def test_a_told_token_is_predicted_from_the_features_of_its_scores(fitted: Model, told: bool) -> None:
    """As one that is only supposed is, whichever comes first, and whatever is asked after it."""
    routed = real_trace()
    policy = Classifier.of(fitted)
    driver = Driver(policy, geometry_of(routed, 8))
    step = make_step(routed.experts(0, 1))
    driver.observe(step)
    driver.expect(np.array([7 if told else 5], np.int32), np.array([0], np.int32), step.positions[-1:] + 1)
    scores = policy.scores(driver.history)
    experts, chances = policy.predict(step, 7)
    assert policy.scores(driver.history) is scores
    other = Classifier.of(fitted)
    driver = Driver(other, geometry_of(routed, 8))
    driver.observe(step)
    supposed = other.predict(step, 7)
    assert np.array_equal(supposed[0], experts)
    assert np.array_equal(supposed[1], chances)


def test_it_may_only_predict(fitted: Model) -> None:
    """Then eviction is that of LRU, to the last count."""
    routed = real_trace().slice(0, 100)
    policy = Classifier.of(fitted, evict_by="lru")
    assert replay(routed, policy, n_slots=8) == replay(routed, "lru", n_slots=8)
    totals = replay(routed, policy, n_slots=8, prefetch=Prefetch(0.3, 4)).totals()
    assert totals["prefetch_useful"] > 0
    assert totals["hits"] > replay(routed, "lru", n_slots=8).totals()["hits"]


def started(fitted: Model, policy: type[Classifier] = Classifier, **params: object) -> Classifier:
    made = policy.of(fitted, **params)
    made.start(geometry([8, 16, 16], [2, 4, 4], [2, 4, 4]))
    return made


def test_its_linear_model_is_the_scorers_and_the_tables_as_they_begin(fitted_synthetic: Model) -> None:
    policy = started(fitted_synthetic, table_mb=1)
    policy.observe(make_step(random_ids(80, SYNTHETIC, 3)))  # what is learned since is not in it
    linear = policy.linear()
    assert linear is not None
    assert linear.has_scores
    assert linear.keep is not None
    rng = np.random.default_rng(0)
    row = rng.standard_normal((3, len(features.NAMES), 16), np.float32)
    squeezed = rng.standard_normal(linear.squeeze.shape[1], np.float32)
    for kind, head in (("now", linear.now), ("keep", linear.keep)):
        odds = (
            np.einsum("lf,lfe->le", head.weights, row) + np.tensordot(squeezed, head.fold, 1) + head.constant
        )
        assert odds == pytest.approx(policy._scorers[kind](row, squeezed), abs=1e-4)
        assert head.bonus.tolist() == policy._heads[kind].bonus.tolist()
    fresh = fitted_synthetic.features(table_mb=1)
    for table, own in ((linear.tokens, fresh.tokens), (linear.pairs, fresh.pairs)):
        assert (table.capacity, len(table.keys)) == (len(own.sums), len(own))
        keys, n, sums = own.state(0)
        assert [tuple(np.atleast_1d(key)) for key in table.keys] == [
            tuple(np.atleast_1d(key)) for key in keys
        ]
        assert np.array_equal(table.n, n)
        assert np.array_equal(table.sums, sums)
    assert linear.learn
    assert not started(fitted_synthetic, learn=False).linear().learn  # type: ignore[union-attr]


def test_where_only_python_can_decide_there_is_no_linear_model(fitted_synthetic: Model) -> None:
    assert Policy().linear() is None
    assert started(fitted_synthetic, Untold).linear() is None
    assert started(cost.untrained([8, 16, 16], [2, 4, 4], weights=True)).linear() is None
    predictor = started(fitted_synthetic, evict_by="lru").linear()
    assert predictor is not None
    assert not predictor.has_scores
    for kind, is_served in (("now", False), ("keep", False), ("late", True)):
        heads = [
            replace(head, estimators=[]) if head.kind == kind else head for head in fitted_synthetic.heads
        ]
        assert (started(replace(fitted_synthetic, heads=heads)).linear() is not None) == is_served
