"""C -> Python: keep alive, catch, store, return a status."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_bind import library
from fate_bind.stats import Report
from fate_policy.base import Geometry, Policy, Step
from fate_policy.config import Config, make_policy
from fate_policy.counters import PER_LAYER, Counters
from fate_policy.driver import Driver
from fate_policy.trace import Trace, TraceWriter, geometry_meta, load

_MODES = {"off": "FATE_MODE_OFF", "table": "FATE_MODE_TABLE", "callback": "FATE_MODE_CALLBACK"}
_EVENTS_AND_QUESTIONS = ("start", "observe", "admit", "drop", "scores", "bonus", "victims")

_one_configuration = threading.RLock()
_alive: set[Host] = set()  # the library holds no reference, so this does
_installed: list[Any] = []


class Host:
    """What Python is to the engines of one configuration: their policies, recordings and errors.

    Parameters
    ----------
    policy
        An instance for the first engine instead of the one that `config` names; further engines get copies.
    record
        Where the first engaged engine's routing goes; the second's goes to NAME-2.npz and so on.
    require
        Engines that do not engage refuse their context.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy | None = None,
        record: Path | None = None,
        require: bool = False,
    ) -> None:
        self.config = config
        self.record = record
        self.require = require
        self.engines: list[Engine] = []
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] | None = None
        self.n_records = 0
        self._given = policy
        self._first: Policy | None = policy or make_policy(config)
        kind = type(self._first)
        self.is_silent = config.mode == "table" and all(
            getattr(kind, name) is getattr(Policy, name) for name in _EVENTS_AND_QUESTIONS
        )
        self._is_configured = False
        _install(library.load())
        self._handle = library.load().ffi.new_handle(self)

    @contextlib.contextmanager
    def configured(self) -> Iterator[None]:
        """Give every context that is opened within this block an engine of this host."""
        ffi, lib = library.load()
        slots = self.config.slots
        values = [float(value) for value in slots.values]
        slots_list = ffi.new("int32_t[]", [int(value) for value in values])
        config = ffi.new("fate_config *")
        config.mode = getattr(lib, _MODES[self.config.mode])
        config.sync = self.config.sync or self.is_silent
        config.scores = not self.is_silent
        config.record = self.record is not None
        config.require = self.require
        config.slots_kind = getattr(lib, f"FATE_SLOTS_{slots.kind.upper()}")
        config.slots_value = values[0] if values else 0.0
        config.slots_list, config.n_slots_list = slots_list, len(values)
        config.on_open, config.on_step = lib.fate_py_open, lib.fate_py_step
        config.on_miss, config.on_close = lib.fate_py_miss, lib.fate_py_close
        config.user = self._handle
        with _one_configuration:
            library.check(lib.fate_configure(config))
            self._is_configured = True
            _alive.add(self)
            try:
                yield
            finally:
                self._is_configured = False
                lib.fate_configure(ffi.NULL)
                self._release()

    def reraise(self) -> None:
        """Raise the first exception that a callback met, as itself and once."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def store(self, failure: BaseException) -> None:
        """Keep the first exception; tell `on_failure` at once if a run goes on in spite of it."""
        if self.failure is None:
            self.failure = failure
            if self.on_failure is not None and self.engines:
                self.on_failure(failure)

    def next_policy(self) -> Policy:
        policy, self._first = self._first, None
        if policy is not None:
            return policy
        if self._given is not None:
            return copy.deepcopy(self._given)  # `start` makes it forget
        return make_policy(self.config)

    def next_record(self) -> Path:
        assert self.record is not None
        self.n_records += 1
        if self.n_records == 1:
            return self.record
        return self.record.with_name(f"{self.record.stem}-{self.n_records}{self.record.suffix}")

    def open(self, pointer: Any) -> Engine:
        for engine in self.engines:
            if engine.pointer == pointer:
                engine.open()
                return engine
        engine = Engine(self, pointer)
        engine.open()
        self.engines.append(engine)
        return engine

    def find(self, pointer: Any) -> Engine:
        return next(engine for engine in self.engines if engine.pointer == pointer)

    def close(self, pointer: Any) -> None:
        try:
            self.find(pointer).close()
        finally:
            self._release()

    def _release(self) -> None:
        if not self._is_configured and all(engine.pointer is None for engine in self.engines):
            _alive.discard(self)


class Engine:
    """Python's half of one engine: its driver, its recording, its numbers."""

    def __init__(self, host: Host, pointer: Any) -> None:
        self.host = host
        self.pointer = pointer  # None once the engine is gone
        self.driver: Driver | None = None
        self.record_path: Path | None = None
        self._lock = threading.RLock()  # numbers and records are also asked for on other threads
        self._writer: TraceWriter | None = None
        self._policy_error: str | None = None
        self._record_failed = False
        self._seconds = 0.0
        self._opened_at = 0.0
        self._last: Report | None = None
        self.geometry = self._read_geometry()
        self.is_engaged = bool(self._info().engaged)

    def open(self) -> None:
        """Start, or start over after a reset."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer.path.unlink()
                self._writer = None
            self._seconds = 0.0
            self._opened_at = time.monotonic()
            info = self._info()
            if not info.engaged or self.host.is_silent:
                return
            if self.driver is None:
                config = self.host.config
                self.driver = Driver(
                    self.host.next_policy(), self.geometry, config.mode, config.refresh_tokens
                )
            else:
                self.driver.reset()

    def step(self, c_step: Any, scores: Any, bonus: Any) -> bool:
        """Take in a finished step; return whether new scores were written."""
        began = time.perf_counter()
        step = _read_step(c_step)
        if self.host.record is not None:
            self._append(step)
            began = time.perf_counter()
        if self.driver is None or self._policy_error is not None:
            return False
        try:
            self.driver.observe(step)
            published = self.driver.publish()
            if published is not None:
                ffi = library.load().ffi
                for target, array in zip((scores, bonus), published, strict=True):
                    ffi.memmove(target, np.ascontiguousarray(array, np.float32), array.nbytes)
            return published is not None
        except BaseException as error:
            self._policy_error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._seconds += time.perf_counter() - began

    def miss(
        self,
        layer: int,
        needed: NDArray[np.int32],
        missing: NDArray[np.int32],
        n_victims: int,
        last_use: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Return the victims that the policy names, and tell it what then happens."""
        began = time.perf_counter()
        assert self.driver is not None
        try:
            victims = np.empty(0, np.int32)
            if n_victims:
                pinned = np.zeros(int(self.geometry.n_experts[layer]), np.bool_)
                pinned[needed] = True
                victims = self.driver.victims(layer, n_victims, pinned, last_use)
                self.driver.drop(layer, victims)
            self.driver.admit(layer, missing)
            return victims
        except BaseException as error:
            self._policy_error = f"{type(error).__name__}: {error}"
            raise
        finally:
            self._seconds += time.perf_counter() - began

    def close(self) -> None:
        with self._lock:
            self._last = self.report()
            self.pointer = None
            if self._writer is not None:
                self._writer.close()

    def report(self) -> Report:
        """Return the numbers as of the last finished step; after the end the last ones."""
        with self._lock:
            if self._last is not None:
                return self._last
            ffi, lib = library.load()
            info = self._info()
            n_layers = self.geometry.n_layers
            table = np.zeros((n_layers, lib.FATE_N_COUNTERS), np.int64)
            pointer = ffi.from_buffer("int64_t[]", table)
            library.check(lib.fate_engine_get_counters(self.pointer, pointer, table.size))
            columns: dict[str, Any] = {
                name: table[:, getattr(lib, f"FATE_COUNTER_{name.upper()}")].copy() for name in PER_LAYER
            }
            config = self.host.config
            return Report(
                engaged=bool(info.engaged),
                reason=library.text(ffi, info.reason),
                model=library.text(ffi, info.geometry.model),
                policy=config.policy,
                mode=config.mode,
                geometry=self.geometry,
                counters=Counters(**columns, tokens=int(info.tokens), steps=int(info.steps)),
                pool_bytes=int(info.pool_bytes),
                policy_seconds=self._seconds,
                seconds=time.monotonic() - self._opened_at,
                record=None if self.record_path is None else str(self.record_path),
                policy_error=self._policy_error or ("wrong victims" if info.policy_failed else None),
            )

    def recorded(self) -> Trace | None:
        """Return what was recorded so far, or None if nothing was."""
        with self._lock:
            if self.record_path is None:
                return None
            if self._writer is None or self.pointer is None:
                return load(self.record_path)
            self._writer.flush()
            return load(self._writer.part)

    def keep_record(self, is_end: bool) -> None:
        """Make the .npz file now, whatever happens later; `is_end`: nothing more is to be recorded."""
        with self._lock:
            if self._writer is None:
                return
            if is_end:
                self._writer.close()
                self._writer, self._record_failed = None, True
            elif (trace := self.recorded()) is not None:
                trace.save(self._writer.path)

    def _append(self, step: Step) -> None:
        with self._lock:
            if self._record_failed:
                return
            try:
                if self._writer is None:
                    self.record_path = self.record_path or self.host.next_record()
                    self._writer = TraceWriter(self.record_path, self._meta())
                self._writer.append(step)
            except BaseException as error:  # the policy goes on; the error is raised when the call ends
                self._record_failed = True
                self.host.store(error)

    def _meta(self) -> dict[str, Any]:
        info = self._info()
        resolved = self.host.config.as_dict()
        return {
            "model": library.text(library.load().ffi, info.geometry.model),
            **geometry_meta(self.geometry),
            **{key: resolved[key] for key in ("policy", "mode", "sync", "refresh_tokens")},
        }

    def _info(self) -> Any:
        ffi, lib = library.load()
        info = ffi.new("fate_info *")
        library.check(lib.fate_engine_get_info(self.pointer, info))
        return info

    def _read_geometry(self) -> Geometry:
        info = self._info()  # owns the geometry
        geometry, n = info.geometry, info.geometry.n_layers
        return Geometry(
            n_experts=_array(geometry.n_experts, (n,), np.int32),
            k=_array(geometry.k, (n,), np.int32),
            n_slots=_array(geometry.n_slots, (n,), np.int32),
            expert_bytes=_array(geometry.expert_bytes, (n,), np.int64),
        )


def _array(pointer: Any, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """Return a read-only copy of a C array."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not n_bytes:
        return np.zeros(shape, dtype)
    return np.frombuffer(library.load().ffi.buffer(pointer, n_bytes)[:], dtype).reshape(shape)


def _read_step(step: Any) -> Step:
    rows = (step.n_tokens, step.n_layers)
    pairs = (*rows, step.k)
    return Step(
        ids=_array(step.ids, pairs, np.int32),
        path=_array(step.path, rows, np.uint8),
        weights=_array(step.weights, pairs, np.float32) if step.weights else None,
        tokens=_array(step.tokens, rows[:1], np.int32),
        positions=_array(step.positions, rows[:1], np.int32),
        sequences=_array(step.sequences, rows[:1], np.int32),
        hits=_array(step.hits, pairs, np.uint8),
        fills=_array(step.fills, (step.n_fills, 2), np.int32),
        evictions=_array(step.evictions, (step.n_evictions, 2), np.int32),
    )


def _install(loaded: library.Library) -> None:
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
                _array(needed, (n_needed,), np.int32),
                _array(missing, (n_missing,), np.int32),
                n_victims,
                _array(last_use, (n_experts,), np.int64),
            )
            ffi.memmove(victims, answer, answer.nbytes)

        return guarded(user, call)

    def fate_py_close(user: Any, engine: Any) -> None:
        guarded(user, lambda host: host.close(engine))

    def fate_py_interrupt(user: Any) -> None:
        ffi.from_handle(user)()

    for function in (fate_py_open, fate_py_step, fate_py_miss, fate_py_close, fate_py_interrupt):
        ffi.def_extern()(function)
