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
    if any(known is ffi for known in _installed):
        return
    _installed.append(ffi)

    def guarded(user: Any, call: Callable[[Host], object]) -> int:
        host: Host = ffi.from_handle(user)
        try:
            call(host)
        except BaseException as error:  # also an interrupt: it is raised again when the call ends
            host.store(error)
            return int(lib.FATE_STATUS_POLICY)
        return int(lib.FATE_STATUS_OK)

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
            known = array(tokens, (n_tokens,), np.int32)
            published[0] = host.find(engine).expect(
                known, array(sequences, (n_tokens,), np.int32), scores, bonus
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
        def call(host: Host) -> None:
            half = host.find(engine)
            n_experts = int(half.geometry.n_experts[layer])
            answer = half.miss(
                layer,
                array(needed, (n_needed,), np.int32),
                array(missing, (n_missing,), np.int32),
                n_victims,
                array(last_use, (n_experts,), np.int64),
            )
            ffi.memmove(victims, answer, answer.nbytes)

        return guarded(user, call)

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
        ffi.def_extern(error=int(lib.FATE_STATUS_POLICY), onerror=stray)(function)
    for event in (fate_py_close, fate_py_wait):
        ffi.def_extern(onerror=stray)(event)
    ffi.def_extern()(fate_py_interrupt)


def array(pointer: Any, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return a read-only copy of a C array."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not n_bytes:
        return np.zeros(shape, dtype)
    return np.frombuffer(library.load().ffi.buffer(pointer, n_bytes)[:], dtype).reshape(shape)


def read_step(step: Any) -> Step:
    rows = (step.n_tokens, step.n_layers)
    pairs = (*rows, step.k)
    return Step(
        ids=array(step.ids, pairs, np.int32),
        path=array(step.path, rows, np.uint8),
        weights=array(step.weights, pairs, np.float32) if step.weights else None,
        tokens=array(step.tokens, rows[:1], np.int32),
        positions=array(step.positions, rows[:1], np.int32),
        sequences=array(step.sequences, rows[:1], np.int32),
        hits=array(step.hits, pairs, np.uint8),
        fills=array(step.fills, (step.n_fills, 2), np.int32),
        evictions=array(step.evictions, (step.n_evictions, 2), np.int32),
    )
