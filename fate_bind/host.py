"""What Python is to the engines of one configuration; kept alive for as long as C may call."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fate_bind import callbacks, library
from fate_bind.engine import Engine
from fate_policy.base import Policy
from fate_policy.config import Config, make_policy

_MODES = {"off": "FATE_MODE_OFF", "table": "FATE_MODE_TABLE", "callback": "FATE_MODE_CALLBACK"}
_EVENTS_AND_QUESTIONS = ("start", "observe", "admit", "drop", "scores", "bonus", "victims")

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
        callbacks.install(library.load())
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
