"""The fitted classifier as a policy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy import checks, model
from fate_policy.base import Geometry, History, Policy, Step
from fate_policy.errors import PolicyConfigError
from fate_policy.linear import LinearModel
from fate_policy.model import Model, Scorer

MOST_ROWS = 64
"""Of a larger step only the last rows are taken in: prompts tell little about generated text."""


EVICT_BY = ("scores", "lru")


class Classifier(Policy):
    """Evict the resident expert that is least likely to be used soon, as a fitted model sees it.

    The model's head is that for the nearest share of slots. The scores are for the token about to run: with
    `sync: true` made here, else by the engine, which evaluates `linear`. Where there is none (estimators that
    are not linear, router weights, `refresh_tokens`), and where the token is not told, they are those of the
    token before it, with the model's bonus for what it used. It goes on counting what each token uses, unless
    `learn` is false. With `evict_by: lru` it only predicts, for `prefetch: token`. `fate train` fits the
    model.
    """

    def __init__(
        self,
        *,
        model: str | None = None,
        learn: bool = True,
        table_mb: float = 256,
        evict_by: str = "scores",
    ) -> None:
        if not isinstance(model, str) or not model:
            raise checks.bad_value("model", model, "the path of a file that `fate train` wrote")
        self.model = model
        self.learn = checks.flag("learn", learn)
        self.table_mb = checks.number("table_mb", table_mb, above=0)
        self.evict_by = checks.choice("evict_by", evict_by, EVICT_BY)
        self._loaded: Model | None = None

    @classmethod
    def of(cls, fitted: Model, **params: Any) -> Classifier:
        """Return the policy of a model in memory."""
        policy = cls(model="(in memory)", **params)
        policy._loaded = fitted
        return policy

    @property
    def wants_weights(self) -> bool:
        return self._fitted().weights

    @property
    def fitted_for(self) -> str:
        """The name of the model whose routing it was fitted to, "" if it is not known."""
        return str(self._fitted().meta.get("model") or "")

    def _fitted(self) -> Model:
        if self._loaded is None:
            self._loaded = model.load(self.model)
        return self._loaded

    def start(self, geometry: Geometry) -> None:
        fitted = self._fitted()
        for what in ("n_experts", "k"):
            own, asked = getattr(fitted.shape, what).tolist(), getattr(geometry, what).tolist()
            if len(own) != len(asked):
                what, own, asked = "MoE layers:", len(own), len(asked)
            if own != asked:
                raise PolicyConfigError(
                    f"model: {self.model} was fitted for {what} {own}, and this model has {asked}; fit one "
                    "on a trace of this model with `fate train`, or take another policy, such as lru"
                )
        fitted.check_names(geometry.token_names)
        fitted.check_weights(geometry.tells_weights)
        share = float(geometry.n_slots.sum() / max(1, geometry.n_experts.sum()))
        self._heads = {kind: fitted.head(kind, share) for kind in ("now", "keep", "late")}
        self._scorers = {kind: Scorer(fitted, head) for kind, head in self._heads.items()}
        self._state = fitted.features(table_mb=self.table_mb)
        self._state.learning = self.learn
        self._table: NDArray[np.float32] | None = np.zeros(fitted.shape.table, np.float32)
        self._inputs = self._asked()
        self._expected: tuple[int, int, int] | None = None  # what the inputs are for, as told
        self._is_over = True  # it was observed

    def observe(self, step: Step) -> None:
        first = max(0, step.n_tokens - MOST_ROWS)
        for i in range(first, step.n_tokens):
            token, sequence, position = (
                int(column[i]) for column in (step.tokens, step.sequences, step.positions)
            )
            ids = step.ids[i]
            if i == step.n_tokens - 1:
                if (token, sequence, position) != self._expected or step.n_tokens > 1:
                    self._prepare(token, sequence, position)
                self._last_ids = ids
            self._state.observe(ids, token, sequence, None if step.weights is None else step.weights[i])
        self._expected, self._is_over, self._table = None, True, None

    def expect(self, token: int, sequence: int, position: int) -> None:
        self._prepare(token, sequence, position)
        self._expected, self._is_over, self._table = (token, sequence, position), False, None

    def scores(self, history: History) -> NDArray[np.float32] | None:
        if self.evict_by == "lru":
            return None
        if self._table is None:  # here and not in the events: with refresh_tokens most tables are never asked
            kind = self._kind(history)
            self._table = self._scorers[kind](*self._inputs)
            if self._is_over:
                layer, rank = np.nonzero(self._last_ids >= 0)
                self._table[layer, self._last_ids[layer, rank]] += self._heads[kind].bonus[layer]
        return self._table

    def bonus(self, history: History) -> NDArray[np.float32]:
        return self._heads[self._kind(history)].bonus

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        inputs = self._inputs
        if self._is_over or self._expected is None or self._expected[0] != token_id:
            # the features are a buffer, which the supposed token's overwrite
            self._inputs = inputs[0].copy(), inputs[1]
            with self._state.supposing(token_id, int(step.sequences[-1]), int(step.positions[-1]) + 1):
                inputs = self._asked()
        odds = self._scorers["now"](*inputs)
        experts = ranked(odds)
        flat = experts + np.arange(0, odds.size, odds.shape[1], dtype=np.int32)[:, None]
        return experts, model.chance(odds.ravel()[flat])

    @property
    def is_linear(self) -> bool:
        """Whether the engine can evaluate it; else Python does, with scikit-learn slower than a token."""
        fitted = self._fitted()
        asked = [head for head in fitted.heads if head.kind in ("now", "keep")]
        return not fitted.weights and all(head.estimators is None for head in asked)

    def linear(self) -> LinearModel | None:
        if type(self) is not Classifier or not self.is_linear:  # what derives from it may decide otherwise
            return None
        assert self._loaded is not None
        now, keep = self._scorers["now"], None if self.evict_by == "lru" else self._scorers["keep"]
        return self._loaded.linear(self._state, now, keep)

    def _kind(self, history: History) -> str:
        return "late" if self._is_over or history.acts_late else "keep"

    def _prepare(self, token: int, sequence: int, position: int) -> None:
        self._state.expect(token, sequence, position)
        self._inputs = self._asked()

    def _asked(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        assert self._loaded is not None
        row, context = self._state.now()
        return row, self._loaded.squeezed(context)


def ranked(odds: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the columns of each row from the greatest value down, equals by column; (n, up to 65536).

    Numbers that hold value and column are sorted, which takes a quarter of the time of a stable argsort.
    """
    bits = (np.float32(0) - odds).view(np.int32)
    bits ^= (bits >> 31) & np.int32(0x7FFFFFFF)  # now ordered as the floats are
    keys = bits.astype(np.int64)
    keys <<= 16
    keys |= np.arange(odds.shape[1])
    keys.sort(axis=1)
    keys &= 0xFFFF
    return keys.astype(np.int32)
