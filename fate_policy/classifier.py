"""The fitted classifier as a policy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy import checks, model
from fate_policy.base import Geometry, History, Policy, Step
from fate_policy.errors import PolicyConfigError
from fate_policy.model import Model, Scorer

MOST_ROWS = 64
"""Of a larger step only the last rows are taken in: prompts tell little about generated text."""


_NOTHING = np.empty(0, np.intp), np.empty(0, np.intp)


class Classifier(Policy):
    """Evict the resident expert that is least likely to be used soon, as a fitted model sees it.

    The model's head is that for the nearest share of slots. Where the token about to run is told, the scores
    are for it; else those of the last token, with the model's bonus for what it used. It goes on counting
    what each token uses, unless `learn` is false. `fate train` fits the model.
    """

    def __init__(
        self, *, model: str | None = None, learn: bool = True, table_mb: float = 256, late: bool = False
    ) -> None:
        if not isinstance(model, str) or not model:
            raise checks.bad_value("model", model, "the path of a file that `fate train` wrote")
        self.model = model
        self.learn = checks.flag("learn", learn)
        self.table_mb = checks.number("table_mb", table_mb, above=0)
        self.late = checks.flag("late", late)
        self._loaded: Model | None = None

    @classmethod
    def of(cls, fitted: Model, **params: Any) -> Classifier:
        """Return the policy of a model in memory."""
        policy = cls(model="(in memory)", **params)
        policy._loaded = fitted
        return policy

    def start(self, geometry: Geometry) -> None:
        if self._loaded is None:
            self._loaded = model.load(self.model)
        fitted = self._loaded
        for what in ("n_experts", "k"):
            own, asked = getattr(fitted.shape, what).tolist(), getattr(geometry, what).tolist()
            if own != asked:
                raise PolicyConfigError(
                    f"model: {self.model} was fitted for {what} {own}, and this model has {asked}"
                )
        share = float(geometry.n_slots.sum() / max(1, geometry.n_experts.sum()))
        self._heads = {kind: fitted.head(kind, share) for kind in ("now", "keep", "late")}
        self._scorers = {kind: Scorer(fitted, head) for kind, head in self._heads.items()}
        self._state = fitted.features(table_mb=self.table_mb)
        self._state.learning = self.learn
        self._table: NDArray[np.float32] | None = np.zeros(fitted.shape.table, np.float32)
        self._kind = "late"
        self._told = False

    def observe(self, step: Step) -> None:
        first = max(0, step.n_tokens - MOST_ROWS)
        for i in range(first, step.n_tokens):
            token, sequence = int(step.tokens[i]), int(step.sequences[i])
            ids = step.ids[i]
            if i == step.n_tokens - 1 and not self._told:
                self._state.expect(token, sequence)
                self._prepare("late")
                layer, rank = np.nonzero(ids >= 0)
                self._used = layer, ids[layer, rank]
            self._state.observe(ids, token, sequence)
        self._told = False

    def expect(self, token: int, sequence: int) -> None:
        self._told = True
        self._state.expect(token, sequence)
        self._prepare("late" if self.late else "keep")

    def scores(self, history: History) -> NDArray[np.float32]:
        if self._table is None:  # here and not in the events: with refresh_tokens most tables are never asked
            kind, row, squeezed, (layer, expert) = self._kind, *self._inputs, self._used
            self._table = self._scorers[kind](row, squeezed)
            self._table[layer, expert] += self._heads[kind].bonus[layer]
        return self._table

    def bonus(self, history: History) -> NDArray[np.float32]:
        return self._heads[self._kind].bonus

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        sequence = int(step.sequences[-1])
        with self._state.supposing(token_id, sequence):
            chance = model.chance(self._scorers["now"](*self._asked()))
        experts = np.argsort(-chance, axis=1, kind="stable").astype(np.int32)
        return experts, np.take_along_axis(chance, experts, axis=1)

    def _prepare(self, kind: str) -> None:
        row, squeezed = self._asked()
        self._kind, self._inputs, self._table = kind, (row.copy(), squeezed), None
        self._used = _NOTHING

    def _asked(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        assert self._loaded is not None
        row, context = self._state.now()
        return row, context @ self._loaded.squeeze
