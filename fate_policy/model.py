"""The fitted classifier: scores from features, and its file, which holds arrays and JSON only."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy import features
from fate_policy.errors import PolicyConfigError
from fate_policy.features import TABLE_MB, Features, Shape
from fate_policy.linear import LinearHead, LinearModel, LinearTable

FORMAT, VERSION = "fate-classifier", 1
TARGETS = ("context_now", "context_soon", "context_after")
"""What the context vector predicts for each expert: use at this token, soon after it, soon after the next."""
AHEAD = 2
AHEAD_LAYERS = 4
UNTHREADED, WHOLE = 9216, 16
"""OpenBLAS multiplies a vector by a matrix of fewer elements on the thread that asks; waking others takes
longer than the product. Pieces of a multiple of 16 columns give the bits of the whole."""


def inputs(weights: bool) -> tuple[str, ...]:
    """Return what a head takes, with or without the features of router weights."""
    return (*features.names(weights), *TARGETS)


@dataclass(frozen=True, eq=False)
class Head:
    """One question that the model answers, as log-odds.

    kind : "now": used by this token; "keep": used in the `window` tokens after it; "late": used in the
        `window` tokens after the next, the score then being one token old; window 0: used before the victim
        that the optimum would choose
    share : the share of experts with a slot that a keep or late head was fitted for
    coef, intercept, bonus : float32 (n_layers, n_inputs), (n_layers,), (n_layers,)
    estimators : fitted classifiers of scikit-learn, one a layer, in place of the coefficients
    """

    kind: str
    window: int
    share: float
    coef: NDArray[np.float32]
    intercept: NDArray[np.float32]
    bonus: NDArray[np.float32]
    estimators: list[Any] | None = None

    @property
    def name(self) -> str:
        return self.kind if self.kind == "now" else f"{self.kind} {self.share:g}/{self.window or 'optimum'}"


@dataclass(frozen=True, eq=False)
class Model:
    """Everything that was fitted.

    basis, center : see `Features`
    squeeze, spread, mean : the context's predictions are `(context @ squeeze) @ spread[:, i] + mean[i]`, of
        shapes (n_context, rank), (rank, n_targets, n_layers * n_experts), (n_targets, n_layers * n_experts)
    ahead : float32 (AHEAD, n_layers, AHEAD_LAYERS * n_experts, n_experts): what the experts chosen in layers
        before add to the chance of this layer's
    tables : keys, counts and sums of `Features.tokens` and of `Features.pairs`
    weights : it was fitted on router weights too, and needs them
    """

    shape: Shape
    basis: NDArray[np.float32]
    center: NDArray[np.float32]
    squeeze: NDArray[np.float32]
    spread: NDArray[np.float32]
    mean: NDArray[np.float32]
    heads: list[Head]
    ahead: NDArray[np.float32]
    tables: tuple[tuple[list[Any], NDArray[np.float32], NDArray[np.float16]], ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    weights: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return inputs(self.weights)

    def check_weights(self, known: bool) -> None:
        """Raise `PolicyConfigError` if it needs router weights and they are not known."""
        if self.weights and not known:
            raise PolicyConfigError(
                "model: it was fitted with router weights, and this trace holds none; record one with "
                "`fate run --fate-record`, or fit without --weights"
            )

    def check_names(self, token_names: str) -> None:
        """Raise `PolicyConfigError` if tokens are named by something else than in training."""
        own = self.meta.get("tokens", token_names)
        if own != token_names:
            raise PolicyConfigError(
                f"model: tokens are named by {token_names} here, and it was fitted on tokens named by {own}; "
                "fit it on a trace of the same kind (`fate run --fate-record` names them by id)"
            )

    def features(self, *, table_mb: float = TABLE_MB) -> Features:
        """Return the features' state as it was when training ended."""
        state = Features(self.shape, self.basis, self.center, table_mb=table_mb, weights=self.weights)
        for table, saved in zip((state.tokens, state.pairs), self.tables, strict=False):
            table.restore(*saved)
        return state

    def linear(self, state: Features, now: Scorer, keep: Scorer | None) -> LinearModel:
        """Return it with two linear heads, as it was when training ended, with the room that `state` has."""
        n_tables = ((state.tokens, 1), (state.pairs, 2))
        tables = []
        for i, (table, n_names) in enumerate(n_tables):
            keys, n, sums = self.tables[i] if self.tables else ([], table.n[:0], table.sums[:0])
            named = np.array(keys, np.int64).reshape((-1, n_names) if n_names > 1 else -1)
            tables.append(LinearTable(len(table.sums), named, n, sums))
        return LinearModel(
            shape=self.shape,
            basis=self.basis,
            center=self.center,
            squeeze=self.squeeze,
            constants=state.constants,
            n_history=state.n_history,
            learn=state.learning,
            tokens=tables[0],
            pairs=tables[1],
            now=now.linear(),
            keep=None if keep is None else keep.linear(),
        )

    def squeezed(self, context: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `context @ squeeze` (rank,) of one context (n_context,)."""
        product: NDArray[np.float32] = context @ self._squeeze
        return product.ravel()[: self.squeeze.shape[1]]

    @functools.cached_property
    def _squeeze(self) -> NDArray[np.float32]:
        return in_pieces(self.squeeze)

    def head(self, kind: str, share: float = 0) -> Head:
        """Return the head of this kind that was fitted for the nearest share of slots."""
        fitting = [head for head in self.heads if head.kind == kind]
        return min(fitting, key=lambda head: abs(np.log(max(share, 1e-3) / max(head.share, 1e-3))))

    def ahead_of(
        self, chance: NDArray[np.float32], used: NDArray[np.bool_], layer: int, distance: int
    ) -> NDArray[np.float32]:
        """Return a layer's scores (n, n_experts) once the layers `distance` before it are known.

        chance, used : (n, n_layers, n_experts): what was expected at the token boundary, and what was routed
        """
        surprise = np.where(used, 1 - chance, -chance)
        known = ahead_inputs(surprise, layer, distance)
        scores: NDArray[np.float32] = chance[:, layer] + known @ self.ahead[distance - 1, layer]
        return scores

    def save(self, path: str | Path) -> None:
        arrays: dict[str, Any] = {
            name: getattr(self, name).astype(np.float16) for name in ("basis", "spread", "ahead")
        }
        arrays |= {name: getattr(self, name) for name in ("center", "squeeze", "mean")}
        arrays |= {"n_experts": self.shape.n_experts, "k": self.shape.k}
        for i, head in enumerate(self.heads):
            arrays |= {f"head{i}_{name}": getattr(head, name) for name in ("coef", "intercept", "bonus")}
            if head.estimators is not None:
                arrays[f"head{i}_estimators"] = _pack(head.estimators)
        for name, (keys, n, sums) in zip(("tokens", "pairs"), self.tables, strict=False):
            arrays |= {f"{name}_keys": np.array(keys, np.int64), f"{name}_n": n, f"{name}_sums": sums}
        heads = [{"kind": head.kind, "window": head.window, "share": head.share} for head in self.heads]
        about = {"format": FORMAT, "version": VERSION, "weights": self.weights, "inputs": self.inputs}
        meta = {**about, **self.meta, "heads": heads}
        arrays["meta"] = np.array(json.dumps(meta))
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)


def _fail(path: str | Path, fault: str) -> PolicyConfigError:
    return PolicyConfigError(f"model: {path} {fault}; fit it with `fate train`")


def _open(path: str | Path) -> Any:
    """Open a file of `Model.save`; its arrays are read when they are asked for."""
    try:
        with Path(path).open("rb"):
            pass
    except FileNotFoundError:
        raise _fail(path, "does not exist") from None
    except OSError as error:
        raise PolicyConfigError(f"model: {path} cannot be read: {error.strerror}") from error
    if not zipfile.is_zipfile(path):
        raise _fail(path, "is not a fitted model")
    return np.load(path, allow_pickle=False)


def _meta(path: str | Path, file: Any) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads(str(file["meta"]))
    if meta["format"] != FORMAT or meta["version"] != VERSION:
        raise _fail(path, f"is {meta['format']!r} version {meta['version']!r}, not {FORMAT!r} {VERSION}")
    return meta


_UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile)


def _unreadable(path: str | Path, error: Exception) -> PolicyConfigError:
    lacks = "it lacks " if isinstance(error, KeyError) else ""
    return _fail(path, f"cannot be read: {lacks}{error}")


def load(path: str | Path) -> Model:
    """Read a fitted model; anything that does not fit this version, or itself, is an error."""
    try:
        with _open(path) as file:
            arrays = {name: file[name] for name in file.files}
            meta = _meta(path, file)
        weights = bool(meta.get("weights", False))
        checked: list[tuple[str, Any, Any]] = [("features", meta["inputs"], list(inputs(weights)))]
        if any(name.endswith("_estimators") for name in arrays):  # coefficients are read without it
            checked.append(("scikit-learn", meta["sklearn"], version("scikit-learn")))
        for what, found, expected in checked:
            if found != expected:
                raise _fail(path, f"was fitted with {what} {found}, and this is {expected}")
        heads = []
        for i, about in enumerate(meta["heads"]):
            fitted = arrays.get(f"head{i}_estimators")
            heads.append(
                Head(
                    **about,
                    **{name: arrays[f"head{i}_{name}"] for name in ("coef", "intercept", "bonus")},
                    estimators=None if fitted is None else _unpack(fitted),
                )
            )
        tables = tuple(
            (_keys(arrays[f"{name}_keys"]), arrays[f"{name}_n"], arrays[f"{name}_sums"])
            for name in ("tokens", "pairs")
        )
        made = Model(
            shape=Shape(arrays["n_experts"], arrays["k"]),
            **{name: arrays[name].astype(np.float32) for name in ("basis", "spread", "ahead")},
            **{name: arrays[name] for name in ("center", "squeeze", "mean")},
            heads=heads,
            tables=tables,
            meta=meta,
            weights=weights,
        )
        _check(made)
        return made
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _check(made: Model) -> None:
    """Raise `ValueError` unless all arrays are of the sizes that belong together, and finite."""
    n_experts, k = made.shape.n_experts, made.shape.k
    if n_experts.ndim != 1 or n_experts.shape != k.shape or not len(k):
        raise ValueError(f"n_experts and k have shapes {n_experts.shape} and {k.shape}")
    if not ((k >= 1) & (k <= n_experts)).all():
        raise ValueError(f"k {k.tolist()} of n_experts {n_experts.tolist()}")
    n_layers, width = made.shape.table
    size, n_inputs = n_layers * width, len(made.inputs)
    rank_basis, rank = made.basis.shape[-1], made.squeeze.shape[-1]
    found: dict[str, tuple[NDArray[Any], tuple[int, ...]]] = {
        "basis": (made.basis, (size, rank_basis)),
        "center": (made.center, (rank_basis,)),
        "squeeze": (made.squeeze, (features.N_CONTEXTS * rank_basis, rank)),
        "spread": (made.spread, (rank, len(TARGETS), size)),
        "mean": (made.mean, (len(TARGETS), size)),
    }
    if made.ahead.size:
        found["ahead"] = made.ahead, (AHEAD, n_layers, AHEAD_LAYERS * width, width)
    for i, head in enumerate(made.heads):
        found[f"head{i}_coef"] = head.coef, (n_layers, n_inputs)
        found[f"head{i}_intercept"] = head.intercept, (n_layers,)
        found[f"head{i}_bonus"] = head.bonus, (n_layers,)
    for name, columns, (keys, n, sums) in zip(
        ("tokens", "pairs"), (size + rank_basis, size), made.tables, strict=False
    ):
        if keys:
            found[f"{name}_n"] = n, (len(keys), 2)
            found[f"{name}_sums"] = sums, (len(keys), 2, columns)
    for name, (array, shape) in found.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, which belongs to {shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds numbers that are not finite")


def is_worse_than_lru(path: Path) -> bool:
    """Tell whether a fitted model is known to hit less than LRU on what `fate train` tested it on."""
    try:
        with _open(path) as file:
            tests = _meta(path, file).get("held_out", {})
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    rows = [row for test in tests.values() for row in test]
    return bool(sum(row["sync"] for row in rows) < sum(row["lru"] for row in rows))


def _keys(array: NDArray[np.int64]) -> list[Any]:
    return array.tolist() if array.ndim == 1 else [tuple(pair) for pair in array.tolist()]


def _pack(estimators: list[Any]) -> NDArray[np.uint8]:
    import skops.io

    return np.frombuffer(skops.io.dumps(estimators), np.uint8)


def _unpack(packed: NDArray[np.uint8]) -> list[Any]:
    try:
        import skops.io
    except ImportError:
        raise PolicyConfigError(
            "model: this one holds scikit-learn estimators; `pip install 'fate[lab]'` to read them"
        ) from None
    data = packed.tobytes()
    foreign = [
        name
        for name in skops.io.get_untrusted_types(data=data)
        if not name.startswith(("sklearn.", "numpy."))
    ]
    if foreign:
        raise PolicyConfigError(f"model: holds types that are not trusted: {', '.join(foreign)}")
    loaded: list[Any] = skops.io.loads(data, trusted=skops.io.get_untrusted_types(data=data))
    return loaded


class Scorer:
    """Answer one head's question for all experts at once, in a fraction of a millisecond if it is linear."""

    def __init__(self, model: Model, head: Head) -> None:
        n_layers, n_experts = model.shape.table
        self._model, self._head = model, head
        n = len(features.names(model.weights))
        self._weights = np.ascontiguousarray(head.coef[:, None, :n])
        per_target = np.repeat(head.coef[:, n:].T, n_experts, axis=1)  # (n_targets, n_layers * n_experts)
        self._fold = in_pieces(np.einsum("rtp,tp->rp", model.spread, per_target))
        constant = np.repeat(head.intercept, n_experts) + (per_target * model.mean).sum(axis=0)
        self._constant = constant.reshape(n_layers, n_experts).astype(np.float32)

    def __call__(self, row: NDArray[np.float32], squeezed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return log-odds (n_layers, n_experts) of `Features.now`, the context multiplied by `squeeze`."""
        if self._head.estimators is not None:
            alone: NDArray[np.float32] = self.many(row[None], squeezed[None])[0]
            return alone
        answer: NDArray[np.float32] = np.matmul(self._weights, row)[:, 0]
        answer += (squeezed @ self._fold).ravel()[: answer.size].reshape(answer.shape)
        answer += self._constant
        return answer

    @property
    def is_linear(self) -> bool:
        return self._head.estimators is None

    def linear(self) -> LinearHead:
        """Return what it multiplies and adds, of a linear head."""
        shape = self._constant.shape
        fold = self._fold.transpose(1, 0, 2).reshape(self._fold.shape[1], -1)[:, : self._constant.size]
        return LinearHead(
            weights=np.ascontiguousarray(self._weights[:, 0]),
            fold=np.ascontiguousarray(fold).reshape(-1, *shape),
            constant=self._constant,
            bonus=self._head.bonus,
        )

    def many(self, rows: NDArray[np.float32], squeezed: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return log-odds (n, n_layers, n_experts) of `n` tokens; estimators are slow one by one."""
        if self._head.estimators is None:
            return np.array([self(row, part) for row, part in zip(rows, squeezed, strict=True)])
        given = all_inputs(self._model, rows, squeezed)
        n, n_layers, n_inputs, n_experts = given.shape
        chances = np.empty((n, n_layers, n_experts), np.float32)
        for layer, fitted in enumerate(self._head.estimators):
            flat = given[:, layer].transpose(0, 2, 1).reshape(-1, n_inputs)
            chances[:, layer] = _chances(fitted, flat).reshape(n, n_experts)
        return log_odds(chances) + self._head.intercept[:, None]


def _chances(fitted: Any, inputs: NDArray[np.float32]) -> NDArray[np.floating[Any]]:
    """Return the chance of use (n,) by a scikit-learn classifier, which may have seen one answer only."""
    use = np.flatnonzero(fitted.classes_)
    chances: NDArray[np.floating[Any]] = fitted.predict_proba(inputs)
    return chances[:, use[0]] if len(use) else np.zeros(len(inputs), np.float32)


def all_inputs(
    model: Model, rows: NDArray[np.floating[Any]], squeezed: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return every input (n, n_layers, n_inputs, n_experts) of the heads."""
    n_layers, n_experts = model.shape.table
    context = np.tensordot(squeezed, model.spread, axes=1) + model.mean
    context = context.reshape(len(rows), len(TARGETS), n_layers, n_experts).transpose(0, 2, 1, 3)
    return np.concatenate((rows.astype(np.float32), context), axis=2)


def in_pieces(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a matrix (n, m) as (n_pieces, n, width), so that products are not threaded; zeros fill it up."""
    n, m = matrix.shape
    width = max(WHOLE, UNTHREADED // max(1, n) // WHOLE * WHOLE)
    filled = np.pad(matrix, ((0, 0), (0, -m % width)))
    return np.ascontiguousarray(filled.reshape(n, -1, width).transpose(1, 0, 2))


def ahead_inputs(surprise: NDArray[np.float32], layer: int, distance: int) -> NDArray[np.float32]:
    """Return the surprises (n, AHEAD_LAYERS * n_experts) of the layers known `distance` before `layer`."""
    n, _, n_experts = surprise.shape
    known = np.zeros((n, AHEAD_LAYERS, n_experts), np.float32)
    for i, source in enumerate(range(layer - distance, layer - distance - AHEAD_LAYERS, -1)):
        if source >= 0:
            known[:, i] = surprise[:, source]
    return known.reshape(n, -1)


def log_odds(chance: NDArray[np.float32]) -> NDArray[np.float32]:
    clipped = np.clip(chance, 1e-6, 1 - 1e-6)
    odds: NDArray[np.float32] = np.log(clipped / (np.float32(1) - clipped), dtype=np.float32)
    return odds


def chance(log_odds: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.reciprocal(np.exp(-log_odds) + np.float32(1), dtype=np.float32)
