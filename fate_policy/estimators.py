"""Any classifier of scikit-learn in place of the linear one."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy.errors import FateError

_FORM = re.compile(r"([\w.]+):(\w+)(?:\((.+)\))?")


def make(name: str, seed: int) -> Any:
    """Return a new classifier of "module:Class" on inputs of one scale.

    "module:Class(module:Class)" is one around another, such as
    "sklearn.calibration:CalibratedClassifierCV(sklearn.linear_model:LogisticRegression)". Both have the seed,
    and stop early, if they take these arguments.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    made = _construct(name)
    if not hasattr(made, "predict_proba"):
        raise FateError(f"estimator {name!r} has no predict_proba, and chances are needed")
    wanted = {"random_state": seed, "early_stopping": True}
    known = {key: key.rpartition("__")[2] for key in made.get_params()}
    made.set_params(**{key: wanted[last] for key, last in known.items() if last in wanted})
    return make_pipeline(StandardScaler(), made)


def _construct(name: str) -> Any:
    form = _FORM.fullmatch(name)
    try:
        if form is None:
            raise ValueError("not a name of this form")
        module, cls, inner = form.groups()
        kind = getattr(importlib.import_module(module), cls)
        return kind(estimator=_construct(inner)) if inner else kind()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise FateError(
            f"estimator {name!r}: {error}; expected module:Class of scikit-learn, or one around another, "
            "module:Class(module:Class)"
        ) from error


def takes_weights(name: str) -> bool:
    """Tell whether samples can be weighed, which balancing needs."""
    from sklearn.utils.validation import has_fit_parameter

    return bool(has_fit_parameter(make(name, 0).steps[-1][1], "sample_weight"))


def fit(
    name: str,
    seed: int,
    inputs: NDArray[np.float32],
    wanted: NDArray[np.bool_],
    weight: NDArray[np.float64] | None = None,
) -> Any:
    """Return the classifier fitted; where all answers are the same, one that gives that answer.

    weight : of each sample; None: all alike
    """
    from sklearn.dummy import DummyClassifier

    if wanted.all() or not wanted.any():
        return DummyClassifier().fit(inputs, wanted)
    made = make(name, seed)
    weights = {} if weight is None else {f"{made.steps[-1][0]}__sample_weight": weight}
    try:
        return made.fit(inputs, wanted, **weights)
    except ValueError as error:
        raise FateError(f"estimator {name!r} cannot be fitted to {len(wanted)} samples: {error}") from error
