"""C -> Python: translate, catch, store, return a status."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fate_bind import library
from fate_policy.base import Step

if TYPE_CHECKING:
    from fate_bind.host import Host

_installed: list[Any] = []


def install(loaded: library.Library) -> None:
    """Define the functions that C calls; no exception leaves them."""
    ffi, lib = loaded
    ok, failed = int(lib.FATE_STATUS_OK), int(lib.FATE_STATUS_POLICY)
    if any(known is ffi for known in _installed):
        return
    _installed.append(ffi)

    def guarded(user: Any, call: Callable[[Host], object]) -> int:
        host: Host = ffi.from_handle(user)
        try:
            call(host)
        except BaseException as error:  # also an interrupt: it is raised again when the call ends
            host.store(error)
            return failed
        return ok

    def fate_py_open(user: Any, engine: Any) -> int:
        return guarded(user, lambda host: host.open(engine))

    def fate_py_step(user: Any, engine: Any, step: Any, scores: Any, bonus: Any, published: Any) -> int:
        def call(host: Host) -> None:
            published[0] = host.find(engine).step(step, scores, bonus)

        return guarded(user, call)

    def fate_py_expect(
        user: Any,
        engine: Any,
        n_tokens: int,
        tokens: Any,
        positions: Any,
        sequences: Any,
        scores: Any,
        bonus: Any,
        published: Any,
        chances: Any,
        predicted: Any,
    ) -> int:
        def call(host: Host) -> None:
            half = host.find(engine)
            coming = tuple(array(column, (n_tokens,), INT32) for column in (tokens, sequences, positions))
            half.expect(coming, asks_scores=bool(scores))
            if chances:
                predicted[0] = half.predict(coming[0], chances)
            if scores:
                published[0] = half.publish(scores, bonus)

        return guarded(user, call)

    def fate_py_miss(
        user: Any,
        engine: Any,
        layer: int,
        n_needed: int,
        needed: Any,
        n_missing: int,
        missing: Any,
        last_use: Any,
        n_victims: int,
        victims: Any,
    ) -> int:
        host: Host = ffi.from_handle(user)
        try:  # as `guarded`, without its call: this is asked in the midst of a token
            half = host.find(engine)
            answer = half.miss(
                layer,
                ffi.unpack(needed, n_needed),
                np.array(ffi.unpack(missing, n_missing), INT32),
                n_victims,
                np.frombuffer(
                    ffi.buffer(last_use, 8 * half.n_experts[layer]), INT64
                ),  # no copy: read at once
            )
            ffi.memmove(victims, answer, answer.nbytes)
        except BaseException as error:
            host.store(error)
            return failed
        return ok

    def fate_py_wait(user: Any) -> None:
        """Let Python run the handlers of signals, which it does between two instructions of its own."""

    def fate_py_close(user: Any, engine: Any) -> None:
        guarded(user, lambda host: host.close(engine))

    def fate_py_interrupt(user: Any) -> None:
        ffi.from_handle(user)()

    def stray(kind: Any, error: BaseException, trace: Any) -> None:
        """Store what a signal handler raised before the guard began or after it ended."""
        ffi.from_handle(trace.tb_frame.f_locals["user"]).store(error)

    for function in (fate_py_open, fate_py_step, fate_py_expect, fate_py_miss):
        ffi.def_extern(error=failed, onerror=stray)(function)
    for event in (fate_py_close, fate_py_wait):
        ffi.def_extern(onerror=stray)(event)
    ffi.def_extern()(fate_py_interrupt)


INT32, INT64, UINT8, FLOAT32 = (np.dtype(name) for name in ("int32", "int64", "uint8", "float32"))


def array(pointer: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return a read-only copy of a C array."""
    n_bytes = math.prod(shape) * dtype.itemsize
    # bytes own what they hold and cannot be written to
    return np.ndarray(shape, dtype, library.load().ffi.buffer(pointer, n_bytes)[:] if n_bytes else b"")


class CopiedStep(Step):
    """A step copied from C as bytes; of those an array is made when it is first asked for."""

    @classmethod
    def of(cls, copied: dict[str, tuple[tuple[int, ...], np.dtype[Any], bytes]]) -> CopiedStep:
        """Return a step of the shape, the dtype and the bytes of each array."""
        made = cls.__new__(cls)
        made.__dict__["_copied"] = copied
        return made

    def __getattr__(self, name: str) -> NDArray[Any]:
        try:
            made: NDArray[Any] = np.ndarray(*self.__dict__["_copied"][name])
        except KeyError:
            raise AttributeError(name) from None
        self.__dict__[name] = made
        return made


def read_step(step: Any) -> Step:
    buffer = library.load().ffi.buffer
    n_tokens, n_layers, k = step.n_tokens, step.n_layers, step.k
    n_fills, n_evictions = step.n_fills, step.n_evictions
    n_rows = n_tokens * n_layers
    rows, pairs = (n_tokens, n_layers), (n_tokens, n_layers, k)
    copied: dict[str, Any] = {
        "ids": (pairs, INT32, buffer(step.ids, 4 * n_rows * k)[:]),
        "path": (rows, UINT8, buffer(step.path, n_rows)[:]),
        "tokens": ((n_tokens,), INT32, buffer(step.tokens, 4 * n_tokens)[:]),
        "positions": ((n_tokens,), INT32, buffer(step.positions, 4 * n_tokens)[:]),
        "sequences": ((n_tokens,), INT32, buffer(step.sequences, 4 * n_tokens)[:]),
        "hits": (pairs, UINT8, buffer(step.hits, n_rows * k)[:]),
        "fills": ((n_fills, 2), INT32, buffer(step.fills, 8 * n_fills)[:]),
        "evictions": ((n_evictions, 2), INT32, buffer(step.evictions, 8 * n_evictions)[:]),
    }
    made = CopiedStep.of(copied)
    if step.weights:
        copied["weights"] = (pairs, FLOAT32, buffer(step.weights, 4 * n_rows * k)[:])
    else:
        made.__dict__["weights"] = None
    if step.n_horizons:  # `Step` has defaults for these, which a copy made when asked for would not replace
        ahead = (*rows, step.n_horizons, step.n_ahead)
        made.__dict__["ahead_ids"] = array(step.ahead_ids, ahead, INT32)
        made.__dict__["ahead_chances"] = array(step.ahead_chances, ahead, FLOAT32)
        made.__dict__["horizons"] = tuple(library.load().ffi.unpack(step.horizons, step.n_horizons))
    return made
