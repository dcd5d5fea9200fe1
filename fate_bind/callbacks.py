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
    ) -> int:
        def call(host: Host) -> None:
            known = array(tokens, (n_tokens,), INT32)
            published[0] = host.find(engine).expect(
                known, array(sequences, (n_tokens,), INT32), scores, bonus
            )

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


def read_step(step: Any) -> Step:
    rows = (step.n_tokens, step.n_layers)
    pairs = (*rows, step.k)
    tokens = rows[:1]
    return Step(
        ids=array(step.ids, pairs, INT32),
        path=array(step.path, rows, UINT8),
        weights=array(step.weights, pairs, FLOAT32) if step.weights else None,
        tokens=array(step.tokens, tokens, INT32),
        positions=array(step.positions, tokens, INT32),
        sequences=array(step.sequences, tokens, INT32),
        hits=array(step.hits, pairs, UINT8),
        fills=array(step.fills, (step.n_fills, 2), INT32),
        evictions=array(step.evictions, (step.n_evictions, 2), INT32),
    )
