"""In-token predictions that a run gives in place of routers: what layer l tells of l+1, l+2 or l+4.

Recorded traces hold no hidden states, so no router can look ahead in a replay. Beforehand are computed

- *by ids*: what the classifier expected at the token's start, and the surprises of the layers up to l
  (`Model.ahead_of`), which is what can be told from ids alone; in a file, as it needs the classifier;
- *perfect*: the experts that the token uses;
- *synthetic*: those, a part of them replaced at random.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.models import Shape
from bench.routing import Routing, as_trace
from fate_policy import model
from fate_policy.errors import TraceError
from fate_policy.model import AHEAD, Model, Scorer
from fate_policy.trace import Trace

FORMAT, VERSION = "fate-bench-ahead", 1
MOST = 16
"""Experts that a prediction names, at most."""
HORIZONS = tuple(range(AHEAD, 0, -1))
RECALL = 0.9
CHUNK = 256


@dataclass(frozen=True, eq=False)
class Predictions:
    """What is told of each token and layer, by each horizon.

    ids : (n_horizons, n_tokens, n_layers, MOST), likeliest first, -1 = none; so are all of the layers that no
        layer looks ahead to
    chances : alike, 0 where there is none
    horizons : from how many layers before, the farthest first
    """

    ids: NDArray[np.integer]
    chances: NDArray[np.floating]
    horizons: tuple[int, ...]

    def recall(self, ids: NDArray[np.integer]) -> list[dict[str, float]]:
        """Return, by horizon, the shares of what was used among the k and the 2k likeliest named.

        ids : (n_tokens, n_layers, k), what was used, of as many tokens as both have; layers that no layer
            looks ahead to do not count
        """
        n, k = min(len(ids), self.ids.shape[1]), ids.shape[2]
        found = []
        for named, horizon in zip(self.ids, self.horizons, strict=True):
            used = ids[:n, horizon:]
            hits = np.zeros(MOST, np.int64)
            for rank in range(MOST):
                hits[rank] = (used == named[:n, horizon:, rank, None]).sum()
            total = max(1, used.size)
            found.append({"at_k": float(hits[:k].sum() / total), "at_2k": float(hits[: 2 * k].sum() / total)})
        return found


def perfect(ids: NDArray[np.int32], horizon: int) -> Predictions:
    """Predict what the routing, (n_tokens, n_layers, k), uses; every chance is 1."""
    named = np.sort(ids, axis=2)[None]
    return _padded(named, np.float32(1), (horizon,))


def synthetic(
    ids: NDArray[np.int32],
    n_experts: int,
    recall: float = RECALL,
    horizons: tuple[int, ...] = HORIZONS,
    seed: int = 0,
) -> Predictions:
    """Predict k experts a layer: each one used, or with chance `1 - recall` another at random in its place.

    All horizons err alike, so that what they name together recalls no more. Every chance is `recall`. The
    first tokens' do not depend on how many there are.
    """
    n_tokens, n_layers, k = ids.shape
    if n_experts < 2 * k:
        raise ValueError(f"{n_experts} experts: at least {2 * k} are needed to replace {k} by others")
    named = np.empty_like(ids)
    for layer in range(n_layers):
        is_missed = np.random.default_rng((seed, layer, 0)).random((n_tokens, k)) >= recall
        draws = np.random.default_rng((seed, layer, 1)).random((n_tokens, n_experts), np.float32)
        np.put_along_axis(draws, ids[:, layer], np.float32(2), axis=1)  # what is used replaces nothing
        others = np.argpartition(draws, k - 1, axis=1)[:, :k]
        order = np.take_along_axis(draws, others, axis=1).argsort(axis=1, kind="stable")
        others = np.take_along_axis(others, order, axis=1)
        named[:, layer] = np.where(is_missed, others, ids[:, layer])
    named = np.repeat(np.sort(named, axis=2)[None], len(horizons), axis=0)
    return _padded(named, np.float32(recall), horizons)


def _padded(named: NDArray[np.int32], chance: np.float32, horizons: tuple[int, ...]) -> Predictions:
    k = named.shape[3]
    ids = np.full((*named.shape[:3], MOST), -1, np.int32)
    ids[..., :k] = named
    for at, horizon in enumerate(horizons):
        ids[at, :, :horizon] = -1
    return Predictions(ids, np.where(ids >= 0, chance, np.float32(0)), horizons)


def by_ids(fitted: Model, trace: Trace) -> tuple[Predictions, Predictions]:
    """Predict as `Model.ahead_of` does, on tokens that follow each other as in a run; chances are float16.

    Also return what was expected at the token's start, as if by horizon 1, to compare with. Ids are int8 or
    int16. Cost: 2 ms a token of 48 layers with 128 experts.
    """
    n_layers, n_experts = fitted.shape.table
    if trace.meta["n_experts"] != fitted.shape.n_experts.tolist():
        raise TraceError(
            f"the classifier was fitted for experts {fitted.shape.n_experts.tolist()}, and the routing is of "
            f"{trace.meta['n_experts']}; fit it again: python -m bench --prepare"
        )
    fitted.check_names(trace.token_names)
    ids = trace.experts()
    used = np.zeros((len(ids), n_layers, n_experts), np.bool_)
    np.put_along_axis(used, ids, True, axis=2)
    expected = _expected(fitted, trace)
    kind = np.int8 if n_experts <= 128 else np.int16
    ahead, start = (
        Predictions(
            np.full((len(horizons), *ids.shape[:2], MOST), -1, kind),
            np.zeros((len(horizons), *ids.shape[:2], MOST), np.float16),
            horizons,
        )
        for horizons in (HORIZONS, (1,))
    )
    for first in range(0, len(ids), CHUNK):
        rows = slice(first, first + CHUNK)
        for layer in range(1, n_layers):
            start.ids[0, rows, layer], start.chances[0, rows, layer] = _likeliest(expected[rows, layer])
            for at, horizon in enumerate(HORIZONS):
                if layer >= horizon:
                    scores = fitted.ahead_of(expected[rows], used[rows], layer, horizon)
                    ahead.ids[at, rows, layer], ahead.chances[at, rows, layer] = _likeliest(scores)
    return ahead, start


def _expected(fitted: Model, trace: Trace) -> NDArray[np.float32]:
    """Return each expert's chance before its token is routed, (n_tokens, n_layers, n_experts)."""
    state, scorer = fitted.features(), Scorer(fitted, fitted.head("now"))
    ids, tokens = trace.experts(), trace.tokens.tolist()
    sequences, positions = trace.sequence.tolist(), trace.position.tolist()
    odds = np.empty((trace.n_tokens, *fitted.shape.table), np.float32)
    for t, token in enumerate(tokens):
        state.expect(token, sequences[t], positions[t])
        row, context = state.now()
        odds[t] = scorer(row, fitted.squeezed(context))
        state.observe(ids[t], token, sequences[t])
    return model.chance(odds)


def _likeliest(scores: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the MOST likeliest of scores (n, n_experts), equals by id, as they are once they are float16."""
    rounded = np.clip(scores, 0, 1).astype(np.float16).astype(np.float32)
    order = np.argsort(-rounded, axis=1, kind="stable")[:, :MOST]
    chances = np.take_along_axis(rounded, order, axis=1)
    ids = np.where(chances > 0, order, -1)
    missing = ((0, 0), (0, MOST - ids.shape[1]))
    return np.pad(ids, missing, constant_values=-1), np.pad(chances, missing)


# ---------------------------------------------------------------------------------------------- the file


def prepare(path: Path, classifier: Path, made: Routing, shape: Shape, n_rows: int) -> dict[str, Any]:
    """Compute predictions by ids for the first rows of a routing unless the file has them; say what it holds.

    Raises
    ------
    PolicyConfigError
        If the classifier cannot be read.
    TraceError
        If it was fitted for another shape, or the file is another one.
    """
    n_rows = min(n_rows, len(made.ids))
    fitted = model.load(classifier)
    digest = hashlib.sha256(classifier.read_bytes()).hexdigest()
    if path.exists():
        about = _about(path)
        is_same = about.get("version") == VERSION and about["classifier"]["sha256"] == digest
        if is_same and about["n_rows"] >= n_rows and about["routing_sha256"] == _hash(made.ids, about):
            return about
    began = time.monotonic()
    found, at_start = by_ids(fitted, as_trace(made, shape).slice(0, n_rows))
    about = {
        "format": FORMAT,
        "version": VERSION,
        "predictor": "ids of earlier layers",
        "classifier": {
            "file": classifier.name,
            "sha256": digest,
            "fitted_on": list(fitted.meta.get("traces", [])),
        },
        "routing": made.source,
        "n_rows": n_rows,
        "horizons": list(found.horizons),
        "recall": found.recall(made.ids),
        "recall_at_start": at_start.recall(made.ids)[0],
    }
    about["routing_sha256"] = _hash(made.ids, about)
    about["seconds"] = round(time.monotonic() - began, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, ids=found.ids, chances=found.chances, about=np.array(json.dumps(about)))
    unfinished.replace(path)
    return about


def load(path: Path, ids: NDArray[np.int32]) -> Predictions:
    """Read a file of `prepare`, for the routing that is replayed; rows that it does not cover have none."""
    about = _about(path)
    if about["routing_sha256"] != _hash(ids, about):
        raise TraceError(f"{path} holds predictions of another routing; remove it and run this again")
    with np.load(path) as file:
        held = {name: file[name] for name in ("ids", "chances")}
    shape = (len(about["horizons"]), *ids.shape[:2], MOST)
    named, chances = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    named[:, : about["n_rows"]], chances[:, : about["n_rows"]] = held["ids"], held["chances"]
    return Predictions(named, chances, tuple(about["horizons"]))


def _about(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        about: dict[str, Any] = json.loads(str(file["about"])) if "about" in file else {}
    if about.get("format") != FORMAT:
        raise TraceError(f"{path} is no file of in-token predictions; remove it and run this again")
    return about


def _hash(ids: NDArray[np.int32], about: dict[str, Any]) -> str:
    rows = np.ascontiguousarray(ids[: about["n_rows"]], np.int32)
    return hashlib.sha256(repr(rows.shape).encode() + rows.tobytes()).hexdigest()


def of_job(wanted: dict[str, Any], ids: NDArray[np.int32]) -> Predictions:
    """Return the predictions that an arm asks for; see `arms.job`."""
    kind = wanted["kind"]
    if kind == "ids":
        return load(Path(wanted["path"]), ids)
    if kind == "perfect":
        return perfect(ids, wanted["horizon"])
    if kind == "synthetic":
        return synthetic(ids, wanted["n_experts"])
    raise ValueError(f"predictions of kind {kind!r}: expected ids, perfect, synthetic")
