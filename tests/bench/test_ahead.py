"""Predictions inside the token, against what is counted one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cffi
import numpy as np
import pytest
from numpy.typing import NDArray

from bench import ahead, worker
from bench.__main__ import main
from bench.ahead import MOST, Predictions
from bench.models import SHAPES
from bench.routing import Routing, as_trace, routing
from fate_bind.errors import LibraryError
from fate_policy import model, train
from fate_policy.assess import serve
from fate_policy.errors import PolicyConfigError, TraceError
from fate_policy.model import Model

SHAPE = replace(SHAPES["gptoss"], n_layers=7)
SMALL = train.Options(
    sample_every=2, max_rows=3000, rank_basis=16, rank=16, n_folds=2, heads=((0.25, 4),), table_minimum=1
)


@pytest.fixture(scope="module")
def made() -> Routing:
    return routing(SHAPE)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of the first half's first tokens, as `--prepare` fits one."""
    path = tmp_path_factory.mktemp("fitted") / "classifier.npz"
    train.fit([as_trace(routing(SHAPE, part="fit"), SHAPE).slice(0, 500)], SMALL).save(path)
    return path


@pytest.fixture(scope="module")
def fitted(file: Path) -> Model:
    return model.load(file)


def named(told: Predictions, at: int, token: int, layer: int) -> dict[int, float]:
    """Return one prediction by expert; those behind the first that is none are none, too."""
    ids, chances = told.ids[at, token, layer].tolist(), told.chances[at, token, layer].tolist()
    n = ids.index(-1) if -1 in ids else MOST
    assert ids[n:] == [-1] * (MOST - n)
    assert chances[n:] == [0] * (MOST - n)
    assert chances == sorted(chances, reverse=True)
    assert len(set(ids[:n])) == n
    assert min(chances[:n], default=1) > 0
    return dict(zip(ids[:n], chances[:n], strict=True))


@pytest.mark.parametrize("horizon", [2, 4])
def test_a_perfect_prediction_names_what_is_used(made: Routing, horizon: int) -> None:
    ids = made.ids[:50]
    told = ahead.perfect(ids, horizon)
    assert told.ids.shape == (1, 50, 7, MOST)
    assert told.horizons == (horizon,)
    for token in range(50):
        for layer in range(7):
            wanted = dict.fromkeys(ids[token, layer].tolist(), 1.0) if layer >= horizon else {}
            assert named(told, 0, token, layer) == wanted
    assert told.recall(ids) == [{"at_k": 1.0, "at_2k": 1.0}]


def test_a_synthetic_prediction_misses_a_tenth(made: Routing) -> None:
    ids = made.ids[:1000]
    told = ahead.synthetic(ids, SHAPE.n_experts)
    assert told.horizons == (2, 1)
    assert told.recall(ids)[1]["at_k"] == pytest.approx(0.9, abs=0.01)  # 24,000 of them: 5 deviations
    found = 0
    for token in range(1000):
        for layer in range(7):
            far, near = (named(told, at, token, layer) for at in (0, 1))
            assert far == (near if layer >= 2 else {})
            if layer >= 1:
                assert len(near) == SHAPE.k
                assert near.keys() <= set(range(SHAPE.n_experts))
                assert set(near.values()) == {float(np.float32(0.9))}
                found += len(near.keys() & set(ids[token, layer].tolist()))
    assert found / (1000 * 6 * SHAPE.k) == told.recall(ids)[1]["at_k"]


def test_a_synthetic_prediction_is_the_same_again(made: Routing) -> None:
    ids = made.ids[:200]
    told = ahead.synthetic(ids, SHAPE.n_experts)
    again = ahead.synthetic(ids.copy(), SHAPE.n_experts)
    fewer = ahead.synthetic(ids[:70], SHAPE.n_experts)
    other = ahead.synthetic(ids, SHAPE.n_experts, seed=1)
    assert np.array_equal(told.ids, again.ids)
    assert np.array_equal(told.ids[:, :70], fewer.ids)
    assert not np.array_equal(told.ids, other.ids)
    assert ahead.synthetic(ids, SHAPE.n_experts, recall=1.0).recall(ids)[0]["at_k"] == 1
    assert ahead.synthetic(ids, SHAPE.n_experts, recall=0.0).recall(ids)[0]["at_k"] == 0
    with pytest.raises(ValueError, match="7 experts: at least 8"):
        ahead.synthetic(ids % 7, 7)


def test_what_replaces_is_any_other_expert_alike(made: Routing) -> None:
    """Of always wrong predictions each expert has its share of where it was not used."""
    ids = made.ids[:2000]
    told = ahead.synthetic(ids, SHAPE.n_experts, recall=0.0, horizons=(1,))
    layer = 3
    count = np.bincount(told.ids[0, :, layer, : SHAPE.k].ravel(), minlength=SHAPE.n_experts)
    unused = 2000 - np.bincount(ids[:, layer].ravel(), minlength=SHAPE.n_experts)
    expected = unused * SHAPE.k / (SHAPE.n_experts - SHAPE.k)
    assert count == pytest.approx(expected, abs=6 * np.sqrt(expected.max()))


def test_by_ids_is_what_the_model_tells_ahead(
    made: Routing, fitted: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, at whatever cut; chances as they are in half precision."""
    monkeypatch.setattr(ahead, "CHUNK", 16)
    trace = as_trace(made, SHAPE).slice(0, 60)
    told, start = ahead.by_ids(fitted, trace)
    assert told.ids.dtype == np.int8
    assert told.chances.dtype == np.float16
    assert told.ids.shape == told.chances.shape == (2, 60, 7, MOST)
    expected = model.chance(serve(fitted, trace)["now"])
    used = np.zeros(expected.shape, np.bool_)
    for token in range(60):
        for layer in range(7):
            used[token, layer, made.ids[token, layer]] = True
    moved = 0
    for token in range(60):
        for layer in range(7):
            for at, horizon in enumerate((2, 1)):
                one = slice(token, token + 1)
                if layer < horizon:
                    assert named(told, at, token, layer) == {}
                    continue
                scores = fitted.ahead_of(expected[one], used[one], layer, horizon)[0]
                check(named(told, at, token, layer), scores)
                moved += np.argmax(scores) != np.argmax(expected[token, layer])
            check(named(start, 0, token, layer), expected[token, layer] if layer else np.zeros(32))
    assert moved > 20  # the layers before did tell


def check(told: dict[int, float], scores: NDArray[np.float32]) -> None:
    """Hold a prediction against the scores: each expert's own chance, and none left out that is likelier."""
    chances = np.clip(scores, 0, 1)
    for expert, chance in told.items():
        assert chance == pytest.approx(chances[expert], rel=1e-3, abs=1e-6)
    left_out = [chances[expert] for expert in range(len(scores)) if expert not in told]
    assert max(left_out) <= min(told.values(), default=0) * 1.001 + 1e-6 or len(told) < MOST
    if len(told) < MOST:
        assert max(left_out) < 1e-6


def test_scores_beyond_a_chance_are_cut() -> None:
    scores = np.linspace(1.2, -0.3, 31, dtype=np.float32)[None]
    ids, chances = ahead._likeliest(scores)
    assert ids[0].tolist() == [*range(16)]
    assert chances[0, :5].tolist() == [1.0] * 5
    ids, chances = ahead._likeliest(-scores)
    assert ids[0].tolist() == [30, 29, 28, 27, 26, 25, *[-1] * 10]
    ids, chances = ahead._likeliest(np.array([[0.5, 0.25, 0.5, 1e-9]], np.float32))
    assert ids[0].tolist() == [0, 2, 1, *[-1] * 13]
    assert chances[0].tolist() == [0.5, 0.5, 0.25, *[0] * 13]


def test_recall_counts_what_was_used_where_a_layer_looks_ahead() -> None:
    """Two experts of each of three layers: by two layers ahead 1 of 2, by one 1 of 4 at k, 3 of 4 at 2k."""
    used = np.array([[[0, 1], [2, 3], [4, 5]]], np.int32)
    ids = np.full((2, 1, 3, MOST), -1, np.int32)
    ids[0, 0, 2, :3] = 4, 9, 8
    ids[1, 0, 1, :4] = 8, 2, 7, 3
    ids[1, 0, 2, :5] = 7, 8, 9, 4, 5
    ids[:, :, 0] = 0  # no layer tells of the first
    told = Predictions(ids, np.where(ids >= 0, 1.0, 0.0), (2, 1))
    assert told.recall(used) == [{"at_k": 0.5, "at_2k": 0.5}, {"at_k": 0.25, "at_2k": 0.75}]


def test_the_file_holds_what_was_computed(
    made: Routing, file: Path, fitted: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "ahead.npz"
    about = ahead.prepare(path, file, made, SHAPE, 60)
    expected, start = ahead.by_ids(fitted, as_trace(made, SHAPE).slice(0, 60))
    told = ahead.load(path, made.ids)
    assert told.horizons == (2, 1)
    assert (told.ids.dtype, told.chances.dtype) == (np.int32, np.float32)
    assert told.ids.shape[1] == len(made.ids)
    assert np.array_equal(told.ids[:, :60], expected.ids)
    assert np.array_equal(told.chances[:, :60], expected.chances)
    assert (told.ids[:, 60:] == -1).all()
    assert (told.chances[:, 60:] == 0).all()
    assert about["recall"] == told.recall(made.ids[:60])
    assert about["recall_at_start"] == start.recall(made.ids)[0]
    assert about["classifier"]["fitted_on"] == fitted.meta["traces"]
    assert about["routing"]["trace"] == "gptoss20b_stem"

    # nothing is computed again for fewer rows of the same
    with monkeypatch.context() as patched:
        patched.setattr(ahead, "by_ids", None)
        assert ahead.prepare(path, file, made, SHAPE, 40) == about
    assert ahead.prepare(path, file, made, SHAPE, 61)["n_rows"] == 61
    other = replace(made, ids=made.ids[:, ::-1].copy())
    with pytest.raises(TraceError, match="another routing"):
        ahead.load(path, other.ids)
    turned = ahead.prepare(path, file, other, SHAPE, 30)
    assert turned["routing_sha256"] != about["routing_sha256"]
    changed = tmp_path / "other.npz"
    replace(fitted, ahead=fitted.ahead * 0).save(changed)
    assert ahead.prepare(path, changed, other, SHAPE, 30)["recall"] != turned["recall"]


def test_what_cannot_be_predicted_says_why(made: Routing, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "ahead.npz"
    with pytest.raises(PolicyConfigError, match="does not exist"):
        ahead.prepare(path, tmp_path / "none.npz", made, SHAPE, 10)
    shape = replace(SHAPE, n_layers=3)
    with pytest.raises(TraceError, match="fit it again"):
        ahead.prepare(path, file, routing(shape), shape, 10)
    assert not path.exists()
    np.savez(path, ids=made.ids)
    with pytest.raises(TraceError, match="is no file of in-token predictions"):
        ahead.load(path, made.ids)


def test_jobs_get_the_predictions_they_name(made: Routing, file: Path, tmp_path: Path) -> None:
    ids, path = made.ids, tmp_path / "ahead.npz"
    ahead.prepare(path, file, made, SHAPE, 10)
    assert ahead.of_job({"kind": "perfect", "horizon": 4}, ids).horizons == (4,)
    synthetic = ahead.of_job({"kind": "synthetic", "n_experts": 32}, ids)
    assert np.array_equal(synthetic.ids, ahead.synthetic(ids, 32).ids)
    by_ids = ahead.of_job({"kind": "ids", "path": str(path)}, ids)
    assert np.array_equal(by_ids.ids, ahead.load(path, ids).ids)
    with pytest.raises(ValueError, match="expected ids, perfect, synthetic"):
        ahead.of_job({"kind": "best"}, ids)


def test_the_library_reads_them_by_horizon_token_layer_and_rank() -> None:
    ffi = cffi.FFI()
    shape = (2, 3, 4, MOST)
    ids = np.arange(np.prod(shape)).reshape(shape).astype(np.int8)
    told = Predictions(ids, (ids / 2).astype(np.float16), (2, 1))
    got: dict[str, Any] = {}

    def call(*arguments: Any) -> int:
        at = ((1 * 3 + 2) * 4 + 3) * MOST + 5
        for name, pointer in zip(("id", "chance"), arguments[:2], strict=True):
            got[name] = pointer[at]
        got["horizons"], got["shape"] = list(arguments[3]), (arguments[2], *arguments[4:])
        got["types"] = [ffi.typeof(arguments[i]).cname for i in (0, 1, 3)]
        return 7

    assert worker.give(ffi, SimpleNamespace(fate_replay_predictions=call), told) == 7
    assert got["id"] == ids[1, 2, 3, 5]
    assert got["chance"] == ids[1, 2, 3, 5] / 2
    assert got["horizons"] == [2, 1]
    assert got["shape"] == shape
    assert got["types"] == ["int32_t[]", "float[]", "int32_t[]"]
    with pytest.raises(LibraryError, match="build"):
        worker.give(ffi, SimpleNamespace(), told)


@pytest.mark.slow
def test_prepare_fits_and_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a command, for as many rows as the run that is asked for; only for arms that take them."""
    command = ["--prepare", "--group", "tiny", "--prepared", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*command, "--rounds", "2", "--tokens", "8", "--arms", "lru+layer@50"]) == 0
    path = tmp_path / "ahead-tiny-8-gptoss20b_stem.npz"
    made = routing(SHAPES["tiny"])
    told = ahead.load(path, made.ids)
    n_rows = 256 + 2 * (8 + 16)
    assert (told.ids[1, n_rows - 1, 1:] >= 0).any(axis=1).all()
    assert (told.ids[:, n_rows:] == -1).all()
    with np.load(path) as file:
        about = json.loads(str(file["about"]))
    assert about["recall"][1]["at_k"] > about["recall_at_start"]["at_k"] > 0.5
    assert f"{path}: {n_rows} tokens" in capsys.readouterr().out
