"""Python's half of one engine: its driver, its recording, its numbers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fate_bind import interrupts, library
from fate_bind.callbacks import FLOAT32, INT32, INT64, array, read_step
from fate_bind.linear import CModel
from fate_bind.stats import Report
from fate_policy.base import Geometry, Policy, Step
from fate_policy.counters import PER_LAYER, Counters
from fate_policy.driver import Driver
from fate_policy.trace import Trace, TraceWriter, geometry_meta, load

if TYPE_CHECKING:
    from fate_bind.host import Host


_NONE = np.empty(0, np.int32)
_RECORDED = (
    *("policy", "mode", "sync", "refresh_tokens"),
    *("prefetch", "prefetch_threshold", "prefetch_experts"),
)
"""Of the configuration, what a trace tells beside the routing."""


class _Asking:
    """Count the time since `began` as the policy's; note its failure, but let it pass.

    A class, for a context manager made of a generator takes longer than some policies.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._began = 0.0

    def __call__(self, began: float) -> _Asking:
        self._began = began
        return self

    def __enter__(self) -> None:
        interrupts.policy_thread = threading.get_ident()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        interrupts.policy_thread = None
        self._engine.note(time.perf_counter() - self._began, error)


class Engine:
    """What Python keeps for one engine, from its opening on; after its end the last numbers."""

    def __init__(self, host: Host, pointer: Any) -> None:
        self.host = host
        self.pointer = pointer  # None once the engine is gone
        self.driver: Driver | None = None
        self.record_path: Path | None = None
        self._lock = threading.RLock()  # numbers and records are also asked for on other threads
        self._writer: TraceWriter | None = None
        self._policy_error: str | None = None
        self._is_record_over = False
        self._record_failed = False
        self._seconds = 0.0
        self._last: Report | None = None
        self._asking = _Asking(self)
        self._is_foretold = False  # what comes next was told already
        self._fitted_for = ""
        self._linear: CModel | None = None  # by which the engine decides itself
        self.geometry = self._read_geometry()
        self.n_experts: list[int] = self.geometry.n_experts.tolist()
        self.is_engaged = bool(self._info().engaged)

    def open(self) -> None:
        """Start, or start over after a reset."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer.path.unlink()
                self._writer = None
            self._seconds = 0.0
            info = self._info()
            if not info.engaged or self.host.is_silent:
                return
            with self._asking(time.perf_counter()):
                if self.driver is None:
                    config = self.host.config
                    policy = self.host.next_policy()
                    self.driver = Driver(
                        policy,
                        self.geometry,
                        config.mode,
                        config.refresh_tokens,
                        sync=config.sync,
                        prefetch=self.host.asks_policy,
                    )
                else:
                    self.driver.reset()
                self._fitted_for = str(getattr(self.driver.policy, "fitted_for", ""))
                self._set_linear(self.driver.policy)

    def _set_linear(self, policy: Policy) -> None:
        """Have the engine decide by itself where the policy has a linear model and waits for nothing."""
        config = self.host.config
        if config.mode != "table" or config.sync or config.refresh_tokens > 1:
            return
        model = policy.linear()
        self._linear = None if model is None else CModel(model)
        if self._linear is not None:
            library.check(library.load().lib.fate_engine_set_linear(self.pointer, self._linear.pointer))

    @property
    def is_linear(self) -> bool:
        """Whether the engine decides by the policy's linear model, without asking Python; traces tell it."""
        return self._linear is not None

    def step(self, c_step: Any, scores: Any, bonus: Any) -> bool:
        """Take in a finished step; return whether new scores were written."""
        began = time.perf_counter()
        step = read_step(c_step)
        if self.host.record is not None:
            self._append(step)
            began = time.perf_counter()
        if self.driver is None or self._policy_error is not None or self._linear is not None:
            return False
        with self._asking(began):
            self.driver.observe(step)
            return not self.driver.expects and self._publish(scores, bonus)

    def expect(self, coming: tuple[NDArray[np.int32], ...], asks_scores: bool) -> None:
        """Take in what comes next, as `Driver.expect` does; a call without scores is followed by one with."""
        is_told, self._is_foretold = self._is_foretold, not asks_scores
        if is_told or self.driver is None or self._policy_error is not None:
            return
        with self._asking(time.perf_counter()):
            self.driver.expect(*coming)

    def publish(self, scores: Any, bonus: Any) -> bool:
        """Return whether new scores were written."""
        if self.driver is None or self._policy_error is not None:
            return False
        with self._asking(time.perf_counter()):
            return self._publish(scores, bonus)

    def predict(self, tokens: NDArray[np.int32], chances: Any) -> bool:
        """Return whether the chances of what comes were written into the zeros of C."""
        if self.driver is None or self._policy_error is not None:
            return False
        began = time.perf_counter()
        shape = self.geometry.n_layers, self.geometry.max_experts
        table = np.ndarray(shape, FLOAT32, library.load().ffi.buffer(chances, 4 * shape[0] * shape[1]))
        with self._asking(began):
            return self.driver.predict(tokens, table)

    def _publish(self, scores: Any, bonus: Any) -> bool:
        assert self.driver is not None
        if not self.driver.refresh():
            return False
        ffi, history = library.load().ffi, self.driver.history
        ffi.memmove(scores, history.scores, history.scores.nbytes)
        ffi.memmove(bonus, history.bonus, history.bonus.nbytes)
        return True

    def miss(
        self,
        layer: int,
        needed: list[int],
        missing: NDArray[np.int32],
        n_victims: int,
        last_use: NDArray[np.int64],
    ) -> NDArray[np.int32]:
        """Return the victims that the policy names, and tell it what then happens."""
        began = time.perf_counter()
        assert self.driver is not None
        with self._asking(began):
            victims = _NONE
            if n_victims:
                flags = bytearray(self.n_experts[layer])
                for expert in needed:
                    flags[expert] = 1
                pinned = np.frombuffer(flags, np.bool_)
                victims = self.driver.victims(layer, n_victims, pinned, last_use)
                self.driver.drop(layer, victims)
            self.driver.admit(layer, missing)
            return victims

    def note(self, seconds: float, error: BaseException | None) -> None:
        """Count the policy's time, and keep what it failed of."""
        self._seconds += seconds
        if error is not None:
            self._policy_error = f"{type(error).__name__}: {error}"

    def close(self) -> None:
        with self._lock:
            last = self.report()
            try:
                with self._recording():
                    if self._writer is not None:
                        self._writer.close()
            finally:
                self._last = replace(last, record=self._record_name())
                self.pointer = None

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
                bounced=library.text(ffi, info.bounced) if info.bounced else "",
                no_prefetch=self._no_prefetch(info),
                asks=int(info.gpu_asks),
                timeouts=int(info.gpu_timeouts),
                ask_seconds=int(info.gpu_ask_us) / 1e6,
                policy_seconds=self._seconds,
                seconds=int(info.busy_us) / 1e6,
                record=self._record_name(),
                policy_file=config.params.get("model"),
                passed_over=config.passed_over or None,
                fitted_for=self._fitted_for,
                policy_error=self._policy_error or ("wrong victims" if info.policy_failed else None),
            )

    def _no_prefetch(self, info: Any) -> str:
        """Say why nothing was prefetched although that was asked for; "" if it could be."""
        if not (self.host.prefetches and info.engaged and info.steps) or self.host.config.chose_prefetch:
            return ""
        if info.bounced and library.text(library.load().ffi, info.bounced):
            return "experts come through the ring of pinned memory, which has no part in it: see bounced"
        blind = library.text(library.load().ffi, info.blind)
        if blind and not self.host.asks_policy:
            return f"{blind}: no router tells of the next layers; with prefetch: token a policy can"
        if not self.host.config.sync and not info.gpu_launches:
            return (
                "the layers run on the CPU, where experts come in before a step only: set sync (--fate-sync)"
            )
        if (self.geometry.n_slots <= self.geometry.k).all():
            return "no layer has a slot more than a token needs: give more slots"
        return ""

    def recorded(self) -> Trace | None:
        """Return what was recorded so far, or None if nothing was."""
        with self._lock:
            if self.record_path is None:
                return None
            if self._record_failed:
                return None if self._writer is None else load(self._writer.part)
            if self._writer is None or self.pointer is None or self._is_record_over:
                return load(self.record_path)
            self._writer.flush()
            return load(self._writer.part)

    def keep_record(self, is_end: bool) -> None:
        """Make the .npz file now, whatever happens later; `is_end`: nothing more is to be recorded."""
        with self._lock:
            if self._writer is None:
                return
            with self._recording():
                if is_end:
                    self._is_record_over = True
                    self._writer.close()
                elif (trace := self.recorded()) is not None:
                    trace.save(self._writer.path)

    def _append(self, step: Step) -> None:
        with self._lock:
            if self._is_record_over or self._record_failed:
                return
            try:
                with self._recording():
                    if self._writer is None:
                        self.record_path = self.record_path or self.host.next_record()
                        self._writer = TraceWriter(self.record_path, self._meta())
                    self._writer.append(step)
            except BaseException as error:  # the policy goes on; the error is raised when the call ends
                self.host.store(error)

    @contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._record_failed = True
            raise

    def _record_name(self) -> str | None:
        return None if self.record_path is None or self._record_failed else str(self.record_path)

    def _meta(self) -> dict[str, Any]:
        info = self._info()
        resolved = self.host.config.as_dict()
        return {
            "model": library.text(library.load().ffi, info.geometry.model),
            **geometry_meta(self.geometry),
            **{key: resolved[key] for key in _RECORDED},
            "linear": self.is_linear,
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
            n_experts=array(geometry.n_experts, (n,), INT32),
            k=array(geometry.k, (n,), INT32),
            n_slots=array(geometry.n_slots, (n,), INT32),
            expert_bytes=array(geometry.expert_bytes, (n,), INT64),
        )
