"""What Python is to the engines of one configuration; kept alive for as long as C may call."""

from __future__ import annotations

import contextlib
import copy
import glob
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fate_bind import callbacks, library
from fate_bind.engine import Engine
from fate_policy.base import Policy
from fate_policy.config import Config, make_policy
from fate_policy.driver import check_mode, check_prefetch, overrides
from fate_policy.errors import PolicyConfigError, TraceError
from fate_policy.trace import check_part

_MODES = {"off": "FATE_MODE_OFF", "table": "FATE_MODE_TABLE", "callback": "FATE_MODE_CALLBACK"}
_EVENTS_AND_QUESTIONS = ("start", "observe", "expect", "admit", "drop", "scores", "bonus", "victims")

_one_configuration = threading.RLock()
_alive: set[Host] = set()  # the library holds no reference, so this does


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
    times
        Keep the times of what a GPU does.
    throttle_gbps
        10^9 bytes a second at which a GPU's misses are filled at most; None: as many as come.
    stage_all
        On a GPU every step is staged, also a small one.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy | None = None,
        record: Path | None = None,
        require: bool = False,
        throttle_gbps: float | None = None,
        times: bool = False,
        stage_all: bool = False,
    ) -> None:
        config = config.settled()
        self.record = record
        self.require = require
        self.throttle_gbps = throttle_gbps
        self.times = times
        self.stage_all = stage_all
        self.engines: list[Engine] = []
        self.failure: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] | None = None
        self.n_records = 0
        if config.mode == "off" and (record is not None or require):
            raise PolicyConfigError("the mode is off, so there is nothing to record or to require")
        if record is not None:
            _check_record(record)
        self._given = policy
        first = make_policy(config) if policy is None else policy
        if config.prefetch == "token" and config.chose_prefetch and not getattr(first, "is_linear", True):
            config = replace(config, prefetch="layer")  # Python would predict, too late
        self.config = config
        check_mode(first, config.mode)
        self.prefetches = config.prefetches and config.mode == "table"
        self.asks_policy = config.asks_policy and self.prefetches
        self.looks_ahead = config.looks_ahead and self.prefetches
        if self.asks_policy:
            check_prefetch(first)
        self._first: Policy | None = first
        self.is_silent = (
            config.mode == "table"
            and not self.asks_policy
            and not any(overrides(first, name) for name in _EVENTS_AND_QUESTIONS)
        )
        self._expects = overrides(first, "expect") or self.asks_policy
        self._weighs = record is not None or first.wants_weights
        self._is_configured = False
        callbacks.install(library.load())
        self._handle = library.load().ffi.new_handle(self)

    @contextlib.contextmanager
    def configured(self) -> Iterator[None]:
        """Give every context that is opened within this block an engine of this host."""
        ffi, lib = library.load()
        slots = self.config.slots
        counts = [int(value) for value in slots.values] if slots.kind == "list" else []
        slots_list = ffi.new("int32_t[]", counts)
        config = ffi.new("fate_config *")
        config.mode = getattr(lib, _MODES[self.config.mode])
        config.sync = self.config.sync or (self.is_silent and not self.prefetches)
        config.scores = not self.is_silent
        config.expects = self._expects
        config.prefetch = (
            lib.FATE_PREFETCH_TOKEN * self.asks_policy + lib.FATE_PREFETCH_LAYER * self.looks_ahead
        )
        config.prefetch_experts = self.config.prefetch_experts
        config.prefetch_threshold = self.config.prefetch_threshold or 0.0
        config.record = self.record is not None
        config.weights = self._weighs
        config.miss_timeout_seconds = self.config.miss_timeout_seconds
        config.no_page_lock = not self.config.page_lock
        config.require = self.require
        config.slots_kind = getattr(lib, f"FATE_SLOTS_{slots.kind.upper()}")
        config.slots_value = float(slots.values[0]) if slots.values else 0.0
        config.slots_list, config.n_slots_list = slots_list, len(counts)
        config.vram_bytes, config.vram_margin = self.config.vram or 0, self.config.vram_margin
        config.stage_all = self.stage_all
        config.times = self.times
        config.throttle = (self.throttle_gbps or 0.0) * 1e9
        config.on_open, config.on_step = lib.fate_py_open, lib.fate_py_step
        config.on_expect, config.on_miss = lib.fate_py_expect, lib.fate_py_miss
        config.on_wait, config.on_close = lib.fate_py_wait, lib.fate_py_close
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
        if policy is None:
            policy = self.given_copy()
        return make_policy(self.config) if policy is None else policy

    def given_copy(self) -> Policy | None:
        return copy.deepcopy(self._given)  # `start` makes it forget

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
        for engine in self.engines:
            if engine.pointer == pointer:
                return engine
        raise LookupError(f"no engine at {pointer}")

    def close(self, pointer: Any) -> None:
        try:
            for engine in self.engines:
                if engine.pointer == pointer:  # an engine that failed to open is not among them
                    engine.close()
        finally:
            self._release()

    def _release(self) -> None:
        if not self._is_configured and all(engine.pointer is None for engine in self.engines):
            _alive.discard(self)


def _check_record(path: Path) -> None:
    """Raise now what the first step would meet, after a model was loaded."""
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise TraceError(f"trace {path} cannot be recorded: {error.strerror or error}") from error
    check_part(path)
    names = f"{glob.escape(path.stem)}-[0-9].npz.part"  # what further contexts are recorded to
    for further in path.parent.glob(names):
        check_part(further.with_suffix(""))
