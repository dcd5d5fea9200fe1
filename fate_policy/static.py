"""A fixed ranking of experts, from a profile."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy import checks, trace
from fate_policy.base import Geometry, History, Policy
from fate_policy.errors import PolicyConfigError, TraceError

_NPY = b"\x93NUMPY"


class Static(Policy):
    """Keep the experts that a profile ranks highest.

    The profile is an .npy file of scores (n_layers, n_experts), an .npz file with such an array named
    `scores`, or a routing trace, whose counts of uses are the scores. Read when a context opens.
    """

    def __init__(self, *, profile: str | None = None) -> None:
        if not isinstance(profile, str) or not profile:
            raise checks.bad_value(
                "profile",
                profile,
                "the path of an .npz or .npy file with scores (layers, experts) or a trace; it goes into "
                "a YAML file with `static: {profile: FILE}`, which --fate-policy takes",
            )
        self.profile = profile

    def start(self, geometry: Geometry) -> None:
        self._scores = self._load(geometry)

    def scores(self, history: History) -> NDArray[np.float32]:
        return self._scores

    def _load(self, geometry: Geometry) -> NDArray[np.float32]:
        found = self._read(Path(self.profile), geometry)
        shape = (geometry.n_layers, geometry.max_experts)
        if found.shape != shape or found.dtype.kind not in "fiu":
            raise self._error(
                f"holds {found.dtype} of shape {found.shape}; this model needs numbers of {shape}"
            )
        scores = found.astype(np.float32)
        if np.isnan(scores).any():
            raise self._error("holds NaN")
        return scores

    def _read(self, path: Path, geometry: Geometry) -> NDArray[Any]:
        try:
            if not zipfile.is_zipfile(path):
                with path.open("rb") as head:
                    if head.read(len(_NPY)) != _NPY:
                        raise self._error("is no .npy or .npz file")
                array: NDArray[Any] = np.load(path, allow_pickle=False)
                return array
            with np.load(path, allow_pickle=False) as file:
                if "scores" in file.files:
                    scores: NDArray[Any] = file["scores"]
                    return scores
            return self._counts(trace.load(path), geometry)
        except FileNotFoundError:
            raise self._error("does not exist") from None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, TraceError) as error:
            raise self._error(f"cannot be read: {trace.why_unreadable(error)}") from error

    def _counts(self, routed: trace.Trace, geometry: Geometry) -> NDArray[np.int64]:
        if routed.meta["n_experts"] != geometry.n_experts.tolist():
            raise self._error(
                f"is a trace of {_layers(routed.meta['n_experts'])}; this model has "
                f"{_layers(geometry.n_experts.tolist())}"
            )
        counts = np.zeros((geometry.n_layers, geometry.max_experts), np.int64)
        for start in range(0, routed.n_tokens, 4096):
            token, layer, rank = np.nonzero((ids := routed.experts(start, start + 4096)) >= 0)
            np.add.at(counts, (layer, ids[token, layer, rank]), 1)
        return counts

    def _error(self, fault: str) -> PolicyConfigError:
        return PolicyConfigError(f"profile: {self.profile} {fault}")


def _layers(n_experts: list[int]) -> str:
    kinds = "/".join(str(n) for n in sorted(set(n_experts)))
    return f"{len(n_experts)} layers of {kinds} experts"
