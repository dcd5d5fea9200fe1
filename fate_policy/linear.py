"""A linear model of routing as arrays: all that an engine needs to evaluate it without Python."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fate_policy.features import Constants, Shape


@dataclass(frozen=True, eq=False)
class LinearHead:
    """One question of the model; its answer is log-odds.

    weights : float32 (n_layers, n_features), in the order of `features.NAMES`
    fold : float32 (rank, n_layers, max_experts), what the squeezed context is multiplied by
    constant, bonus : float32 (n_layers, max_experts), (n_layers,)
    """

    weights: NDArray[np.float32]
    fold: NDArray[np.float32]
    constant: NDArray[np.float32]
    bonus: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class LinearTable:
    """A table of `features.Table` as it begins: room for `capacity` rows, the oldest row first.

    keys : int64 (n_rows,), of pairs (n_rows, 2)
    n, sums : float32 (n_rows, 2), float16 (n_rows, 2, n_columns)
    """

    capacity: int
    keys: NDArray[np.int64]
    n: NDArray[np.float32]
    sums: NDArray[np.float16]


@dataclass(frozen=True, eq=False)
class LinearModel:
    """What a policy knows when it starts; what it means is said in `features.Features` and `model.Model`.

    basis, center, squeeze : float32 (n_layers * max_experts, rank_basis), (rank_basis,), (n_context, rank)
    n_history : tokens in which repeated contexts are looked for
    learn : go on counting what each token uses
    now : its chances, of the token told, are what `Policy.predict` gives
    keep : its values are what `Policy.scores` gives once the token is told; None = it gives none, as LRU
    """

    shape: Shape
    basis: NDArray[np.float32]
    center: NDArray[np.float32]
    squeeze: NDArray[np.float32]
    constants: Constants
    n_history: int
    learn: bool
    tokens: LinearTable
    pairs: LinearTable
    now: LinearHead
    keep: LinearHead | None

    @property
    def has_scores(self) -> bool:
        return self.keep is not None
