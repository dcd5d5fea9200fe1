"""A policy's linear model of routing as the library takes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_bind import library
from fate_policy import features
from fate_policy.base import Step
from fate_policy.errors import PolicyError
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
        size, rank_basis, rank = n_layers * max_experts, model.basis.shape[-1], model.squeeze.shape[-1]
        weights, constants = (n_layers, int(lib.FATE_LINEAR_FEATURES)), model.constants
        n_contexts, n_follow = int(lib.FATE_LINEAR_CONTEXTS), (int(lib.FATE_LINEAR_FOLLOW),)
        self._shapes: dict[str, tuple[int, ...]] = {
            "weights": weights,
            "fold": (rank, n_layers, max_experts),
            "constant": (n_layers, max_experts),
            "bonus": (n_layers,),
        }
        self.pointer = self._ffi.new(
            "fate_linear_model *",
            {
                "n_layers": n_layers,
                "max_experts": max_experts,
                "max_k": int(shape.k.max(initial=1)),
                "rank_basis": rank_basis,
                "rank": rank,
                "n_experts": self._hold("n_experts", shape.n_experts, (n_layers,), np.int32),
                "even_rates": self._hold("even_rates", shape.even_rates(), (n_layers, max_experts)),
                "basis": self._hold("basis", model.basis, (size, rank_basis)),
                "center": self._hold("center", model.center, (rank_basis,)),
                "squeeze": self._hold("squeeze", model.squeeze, (n_contexts * rank_basis, rank)),
                "rate_keep": self._hold("rate_keep", constants.rate_keep, (int(lib.FATE_LINEAR_RATES),)),
                "context_keep": self._hold(
                    "context_keep", constants.context_keep, (int(lib.FATE_LINEAR_DECAYED),)
                ),
                "soon": self._hold("soon", constants.soon, n_follow),
                "later": self._hold("later", constants.later, n_follow),
                "credit": self._hold("credit", constants.credit, (int(lib.FATE_LINEAR_LATER),)),
                "early_of": self._hold(
                    "early_of",
                    np.array(features.EARLY_OF) - lib.FATE_LINEAR_LOG_RATE,
                    (int(lib.FATE_LINEAR_EARLY),),
                    np.int32,
                ),
                "early_tokens": features.EARLY_TOKENS,
                "early_end": features.EARLY_END,
                "ngrams": self._hold("ngrams", features.NGRAMS, (int(lib.FATE_LINEAR_NGRAMS),), np.int32),
                "n_history": model.n_history,
                "learn": int(model.learn),
                "tokens": self._table(model.tokens, 1, size + rank_basis),
                "pairs": self._table(model.pairs, 2, size),
                "now": self._head(model.now),
                "keep": {} if model.keep is None else self._head(model.keep),
            },
        )

    def _hold(self, name: str, numbers: Any, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
        """Return a pointer to the numbers; the library reads as many as `shape` says."""
        array = np.ascontiguousarray(numbers, dtype)
        if array.shape != shape:
            raise PolicyError(f"linear(): {name} has shape {array.shape}; expected {shape}")
        if not array.size:
            return self._ffi.NULL
        self._held.append(self._ffi.from_buffer(f"{C_TYPES[dtype]}[]", array))
        return self._held[-1]

    def _head(self, head: LinearHead) -> dict[str, Any]:
        return {name: self._hold(name, getattr(head, name), shape) for name, shape in self._shapes.items()}

    def _table(self, table: LinearTable, n_names: int, n_columns: int) -> dict[str, Any]:
        n = len(table.keys)
        keys = (n,) if n_names == 1 else (n, n_names)
        return {
            "capacity": table.capacity,
            "n_rows": n,
            "keys": self._hold("keys", table.keys, keys, np.int64),
            "n": self._hold("n", table.n, (n, 2)),
            "sums": self._hold("sums", table.sums, (n, 2, n_columns), np.float16),
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
