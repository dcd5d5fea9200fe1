"""Classifiers of scikit-learn: made by name, fitted, written without pickle, read again."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from policy_contract import synthetic_trace

from fate_policy import assess, estimators, model, train
from fate_policy.errors import FateError, PolicyConfigError

SMALL = train.Options(
    sample_every=4,
    max_rows=1000,
    rank_basis=16,
    rank=16,
    n_folds=2,
    heads=((0.25, 4),),
    table_minimum=1,
)
CALIBRATED = "sklearn.calibration:CalibratedClassifierCV"


@pytest.mark.parametrize(
    "name",
    [
        "sklearn.naive_bayes:GaussianNB",
        "sklearn.neighbors:KNeighborsClassifier",
        "sklearn.ensemble:HistGradientBoostingClassifier",
        "sklearn.neural_network:MLPClassifier",
        CALIBRATED,
        f"{CALIBRATED}(sklearn.linear_model:LogisticRegression)",
    ],
)
def test_any_classifier_of_sklearn_fits_and_comes_back(name: str, tmp_path: Path) -> None:
    fitted = train.fit([synthetic_trace()], replace(SMALL, estimator=name))
    fitted.save(tmp_path / "m.npz")
    read = model.load(tmp_path / "m.npz")
    short = synthetic_trace().slice(0, 20)
    first, second = (model.chance(assess.serve(one, short)["now"]) for one in (fitted, read))
    assert np.median(np.abs(first - second)) < 0.02  # the basis is kept in half precision
    assert np.ptp(first) > 0.2
    assert read.meta["estimator"] == name


def test_the_file_holds_no_pickle_and_foreign_types_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = train.fit([synthetic_trace()], replace(SMALL, estimator=CALIBRATED))
    fitted.save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as file:
        packed = {name: file[name] for name in file.files if name.endswith("_estimators")}
    assert len(packed) == 3
    for array in packed.values():
        (tmp_path / "skops.zip").write_bytes(array.tobytes())
        with ZipFile(tmp_path / "skops.zip") as archive:
            assert {Path(name).suffix for name in archive.namelist()} == {".json", ".npy"}
    monkeypatch.setattr("skops.io.get_untrusted_types", lambda data: ["sklearn.svm.SVC", "os.system"])
    with pytest.raises(PolicyConfigError, match=r"holds types that are not trusted: os\.system"):
        model.load(tmp_path / "m.npz")


def test_estimators_of_another_scikit_learn_are_refused(tmp_path: Path) -> None:
    fitted = train.fit([synthetic_trace()], replace(SMALL, estimator="sklearn.naive_bayes:GaussianNB"))
    replace(fitted, meta={**fitted.meta, "sklearn": "0.1"}).save(tmp_path / "m.npz")
    with pytest.raises(PolicyConfigError, match=r"was fitted with scikit-learn 0\.1, and this is"):
        model.load(tmp_path / "m.npz")


@pytest.mark.parametrize("answer", [True, False])
def test_where_all_answers_are_the_same_that_is_the_answer(answer: bool) -> None:
    inputs = np.zeros((4, 2), np.float32)
    fitted = estimators.fit(CALIBRATED, 0, inputs, np.full(4, answer))
    assert model._chances(fitted, inputs).tolist() == [answer] * 4


def test_too_few_samples_are_named() -> None:
    wanted = np.array([True, False, False, False])
    with pytest.raises(
        FateError, match=f"estimator '{CALIBRATED}' cannot be fitted to 4 samples: .*n_splits=5"
    ):
        estimators.fit(CALIBRATED, 0, np.zeros((4, 2), np.float32), wanted)


def test_both_of_one_around_another_have_the_seed() -> None:
    made = estimators.make(f"{CALIBRATED}(sklearn.ensemble:HistGradientBoostingClassifier)", 5).steps[-1][1]
    assert (made.estimator.random_state, made.estimator.early_stopping) == (5, True)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("sklearn.svm:LinearSVC", "has no predict_proba"),
        ("sklearn.svm:No", "has no attribute 'No'"),
        ("no_such_module:C", "No module named"),
        ("sklearn.svm", "not a name of this form"),
        ("sklearn.naive_bayes:GaussianNB(sklearn.svm:LinearSVC)", "unexpected keyword argument 'estimator'"),
    ],
)
def test_what_is_no_estimator(name: str, fault: str) -> None:
    with pytest.raises(FateError, match=f"estimator {re.escape(repr(name))}.*{fault}"):
        estimators.make(name, 0)
