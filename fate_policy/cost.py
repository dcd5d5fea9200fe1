"""What the classifier costs while it serves, on a model of any size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fate_policy.features import N_CONTEXTS, Shape
from fate_policy.model import AHEAD, TARGETS, Head, Model, Scorer, inputs
from fate_policy.train import Options, served_rank


def untrained(n_experts: Sequence[int], k: Sequence[int], seed: int = 0, weights: bool = False) -> Model:
    """Return a model of this geometry with random coefficients and the default ranks, to time."""
    rng = np.random.default_rng(seed)
    shape = Shape(np.array(n_experts, np.int32), np.array(k, np.int32))
    n = shape.table[0] * shape.table[1]
    rank, served = min(Options.rank_basis, n), served_rank(shape, Options.rank)

    def numbers(*size: int) -> NDArray[np.float32]:
        return rng.standard_normal(size, np.float32) * np.float32(0.1)

    basis = numbers(n, rank)
    n_context = N_CONTEXTS * rank
    heads = [
        Head(
            kind,
            4,
            0.25,
            numbers(len(k), len(inputs(weights))),
            numbers(len(k)),
            np.abs(numbers(len(k))),
        )
        for kind in ("now", "keep", "late")
    ]
    return Model(
        shape=shape,
        basis=basis,
        center=numbers(rank),
        squeeze=numbers(n_context, served),
        spread=numbers(served, len(TARGETS), n),
        mean=numbers(len(TARGETS), n),
        heads=heads,
        ahead=np.zeros((AHEAD, 0, 0, 0), np.float32),
        weights=weights,
    )


def table_seconds(
    fitted: Model, n_tokens: int = 200, of: Callable[[list[float]], float] = statistics.median
) -> dict[str, float]:
    """Return the time of one score table, and of taking in one token, on made-up routing.

    `of` makes one number of many: the median, or min on a machine that does other work too.
    """
    rng = np.random.default_rng(0)
    state = fitted.features(table_mb=64)
    scorer = Scorer(fitted, fitted.head("keep", 0.25))
    n_layers, n_experts = fitted.shape.table
    k = int(fitted.shape.k.max())
    weights = np.full((n_layers, k), 1 / k, np.float32)
    tables, events = [], []
    for t in range(n_tokens):
        ids = np.argsort(rng.random((n_layers, n_experts)), axis=1)[:, :k].astype(np.int32)
        start = time.perf_counter()
        state.expect(t % 20, 0, 0)
        row, context = state.now()
        scorer(row, fitted.squeezed(context))
        middle = time.perf_counter()
        state.observe(ids, t % 20, 0, weights)
        tables.append(middle - start)
        events.append(time.perf_counter() - middle)
    return {"table": of(tables), "observe": of(events)}
