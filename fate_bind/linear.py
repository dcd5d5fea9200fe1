"""A policy's linear model of routing as the library takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_bind import library
from fate_policy import features
from fate_policy.base import Step
from fate_policy.linear import LinearHead, LinearModel, LinearTable

C_TYPES = {np.float32: "float", np.float16: "uint16_t", np.int32: "int32_t", np.int64: "int64_t"}


class CModel:
    """A `fate_linear_model` and the arrays that it points into, which live as long as this object.

    pointer : the struct
    """

    def __init__(self, model: LinearModel) -> None:
        self._ffi, lib = library.load()
        self._held: list[Any] = []
        shape = model.shape
        n_layers, max_experts = shape.table
        if model.now.weights.shape != (n_layers, lib.FATE_LINEAR_FEATURES):
            raise ValueError(
                f"weights of shape {model.now.weights.shape}: expected {n_layers} layers, "
                f"{lib.FATE_LINEAR_FEATURES} features"
            )
        constants = model.constants
        self.pointer = self._ffi.new(
            "fate_linear_model *",
            {
                "n_layers": n_layers,
                "max_experts": max_experts,
                "max_k": int(shape.k.max(initial=1)),
                "rank_basis": model.basis.shape[1],
                "rank": model.squeeze.shape[1],
                "n_experts": self._hold(shape.n_experts, np.int32),
                "even_rates": self._hold(shape.even_rates()),
                "basis": self._hold(model.basis),
                "center": self._hold(model.center),
                "squeeze": self._hold(model.squeeze),
                "rate_keep": self._hold(constants.rate_keep),
                "context_keep": self._hold(constants.context_keep),
                "soon": self._hold(constants.soon),
                "later": self._hold(constants.later),
                "credit": self._hold(constants.credit),
                "early_of": self._hold(np.array(features.EARLY_OF) - lib.FATE_LINEAR_LOG_RATE, np.int32),
                "early_tokens": features.EARLY_TOKENS,
                "early_end": features.EARLY_END,
                "ngrams": self._hold(features.NGRAMS, np.int32),
                "n_history": model.n_history,
                "learn": int(model.learn),
                "tokens": self._table(model.tokens),
                "pairs": self._table(model.pairs),
                "now": self._head(model.now),
                "keep": {} if model.keep is None else self._head(model.keep),
            },
        )

    def _hold(self, numbers: Any, dtype: Any = np.float32) -> Any:
        array = np.ascontiguousarray(numbers, dtype)
        if not array.size:
            return self._ffi.NULL
        self._held.append(self._ffi.from_buffer(f"{C_TYPES[dtype]}[]", array))
        return self._held[-1]

    def _head(self, head: LinearHead) -> dict[str, Any]:
        return {name: self._hold(getattr(head, name)) for name in ("weights", "fold", "constant", "bonus")}

    def _table(self, table: LinearTable) -> dict[str, Any]:
        return {
            "capacity": table.capacity,
            "n_rows": len(table.keys),
            "keys": self._hold(table.keys, np.int64),
            "n": self._hold(table.n),
            "sums": self._hold(table.sums, np.float16),
        }


class NativeLinear:
    """The library's evaluation of a linear model by itself, for tests and timing."""

    def __init__(self, model: LinearModel) -> None:
        self._ffi, self._lib = library.load()
        self._model = CModel(model)
        self._shape = model.shape.table
        self._has_scores = model.has_scores
        handle = self._ffi.new("fate_linear **")
        library.check(self._lib.fate_linear_open(self._model.pointer, handle))
        self._handle = self._ffi.gc(handle[0], self._lib.fate_linear_close)

    def reset(self) -> None:
        library.check(self._lib.fate_linear_reset(self._handle))

    def observe(self, ids: NDArray[np.int32], token: int, sequence: int) -> None:
        """Take in the routing of one token, as `Features.observe` does."""
        library.check(self._lib.fate_linear_observe(self._handle, self._ints(ids), token, sequence))

    def step(self, step: Step) -> None:
        """Take in a finished step, as `Classifier.observe` does."""
        c_step, _held = self._c_step(step)
        library.check(self._lib.fate_linear_step(self._handle, c_step))

    def turn(self, step: Step, token: int, sequence: int, position: int) -> Callable[[], None]:
        """Return, to time it, what takes the step in, tells the token after it, and makes all answers."""
        lib, handle, (c_step, held) = self._lib, self._handle, self._c_step(step)
        chances, scores = (self._ffi.new("float[]", self._shape[0] * self._shape[1]) for _ in range(2))
        bonus = self._ffi.new("float[]", self._shape[0])
        if not self._has_scores:
            scores = bonus = self._ffi.NULL

        def call(held: object = held) -> None:
            status = lib.fate_linear_step(handle, c_step)
            status |= lib.fate_linear_expect(handle, token, sequence, position)
            library.check(status | lib.fate_linear_get(handle, chances, scores, bonus))

        return call

    def expect(self, token: int, sequence: int, position: int) -> None:
        library.check(self._lib.fate_linear_expect(self._handle, token, sequence, position))

    def get(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return chances and scores (n_layers, max_experts) and bonus (n_layers,); without scores zeros."""
        ffi = self._ffi
        chances, scores = np.zeros(self._shape, np.float32), np.zeros(self._shape, np.float32)
        bonus = np.zeros(self._shape[0], np.float32)
        pointers = [ffi.from_buffer("float[]", array) for array in (chances, scores, bonus)]
        if not self._has_scores:
            pointers[1:] = ffi.NULL, ffi.NULL
        library.check(self._lib.fate_linear_get(self._handle, *pointers))
        return chances, scores, bonus

    def _c_step(self, step: Step) -> tuple[Any, list[Any]]:
        """Return the struct, and what must live as long as it is used."""
        c_step = self._ffi.new("fate_step *")
        c_step.n_tokens, c_step.n_layers, c_step.k = step.ids.shape
        held = [self._ints(getattr(step, name)) for name in ("ids", "tokens", "sequences")]
        c_step.ids, c_step.tokens, c_step.sequences = held
        return c_step, held

    def _ints(self, numbers: NDArray[np.int32]) -> Any:
        return self._ffi.from_buffer("int32_t[]", np.ascontiguousarray(numbers, np.int32))
