"""One arm in a process of its own: what crashes there is lost alone."""

from __future__ import annotations

import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.ahead import Predictions, of_job
from fate_bind.errors import LibraryError

if TYPE_CHECKING:
    from bench.policies import Oracle

WARM_UP = 16
"""Decoded before each round: the graph is captured again after a prompt or a clear."""


def serve(pipe: Connection, log: Path) -> None:
    """Answer requests `(name, arguments)` with a value, or with the text of what went wrong."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    server: Any = None
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            if name == "close":
                if server is not None:
                    server.close()
                pipe.send(("done", None))
                return
            if name in ("open", "link"):
                server = (_Arm if name == "open" else _Link)(**arguments)
                pipe.send(("done", server.opened))
            else:
                pipe.send(("done", getattr(server, name)(**arguments)))
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            pipe.send(("failed", f"{type(error).__name__}: {error}"))


class _Link:
    def __init__(self, model: str, piece_bytes: int) -> None:
        from bench import cuda
        from fate_bind import library

        library.load()
        self.link = cuda.Link(Path(model), piece_bytes) if cuda.memory() else None
        self.opened = {"has_device": self.link is not None}

    def measure(self) -> float | None:
        return self.link.bytes_per_second() if self.link else None

    def close(self) -> None:
        pass


def give(ffi: Any, lib: Any, predictions: Predictions) -> int:
    """Tell the library what to predict inside tokens, by row of the replayed routing; return its status."""
    call = getattr(lib, "fate_replay_predictions", None)
    if call is None:
        raise LibraryError(
            "the built library takes no in-token predictions (fate_replay_predictions); "
            "run `python build.py build` on sources that have it, or leave out arms that prefetch by layer"
        )
    ids = np.ascontiguousarray(predictions.ids, np.int32)
    chances = np.ascontiguousarray(predictions.chances, np.float32)
    horizons = np.array(predictions.horizons, np.int32)
    n_horizons, n_tokens, n_layers, most = ids.shape
    status: int = call(
        ffi.from_buffer("int32_t[]", ids),
        ffi.from_buffer("float[]", chances),
        n_horizons,
        ffi.from_buffer("int32_t[]", horizons),
        n_tokens,
        n_layers,
        most,
    )
    return status


class _Arm:
    """An open session and the place in the replayed routing."""

    def __init__(self, model: str, routing: str | None, job: dict[str, Any]) -> None:
        os.environ.update(job["env"])
        from bench import cuda
        from fate_bind import library
        from fate_bind.session import Session

        began = time.perf_counter()
        ffi, self.lib = library.load()
        self.cuda = cuda
        before = cuda.memory()
        flags = list(job["flags"])
        if before is None:
            flags += job.get("args_for_cpu", [])
        if "fit_vram_bytes" in job:
            wanted = job["fit_vram_bytes"]
            margin = max(0, before[0] - wanted) >> 20 if before else 1024
            flags += ["-fit", "on", "-fitt", str(margin)]
        self.tokens: NDArray[np.int32] | None = None
        self.oracle: Oracle | None = None
        if routing is not None:
            with np.load(routing) as file:
                self.ids = np.ascontiguousarray(file["ids"], np.int32)
                self.tokens = file["tokens"]
            pointer = ffi.from_buffer("int32_t[]", self.ids)
            library.check(self.lib.fate_replay_routing(pointer, *self.ids.shape))
        if "ahead" in job:
            if self.tokens is None:
                raise ValueError("in-token predictions are given by row of a replayed routing; name one")
            library.check(give(ffi, self.lib, of_job(job["ahead"], self.ids)))
        more: dict[str, Any] = {"times": job.get("times", False)}
        if job.get("throttle"):
            more["throttle_gbps"] = job["throttle"]
        self.session = Session(
            model,
            flags,
            policy=self._policy(job),
            slots=job["slots"],
            mode=job["mode"],
            place=job["place"],
            prefetch=job.get("prefetch"),
            prefetch_threshold=job.get("prefetch_threshold"),
            **more,
        )
        self.before = before
        stats = self.session.stats()
        self.opened = {
            "open_s": time.perf_counter() - began,
            "engaged": stats["engaged"],
            "reason": stats["reason"],
            "flags": flags,
            "n_slots": stats["per_layer"]["slots"],
            "n_experts": stats["per_layer"]["experts"],
            "expert_bytes": stats["per_layer"]["expert_bytes"],
            "pool_bytes": stats["pool_bytes"],
        }

    def _policy(self, job: dict[str, Any]) -> Any:
        if job["policy"] == "oracle":
            from bench.policies import Oracle

            self.oracle = Oracle(self.ids)
            return self.oracle
        if "classifier" not in job:
            return job["policy"]
        from fate_policy.classifier import Classifier

        return Classifier(model=job["classifier"], evict_by=job["evict_by"])

    def vram(self) -> int | None:
        """Return what the device lost since before the model was opened, CUDA's context not counted."""
        now = self.cuda.memory()
        if now is None or self.before is None:
            return None
        return self.before[0] - now[0]

    def prompt(self, n: int, row: int) -> float:
        """Return the seconds that a prompt of `n` tokens takes, in one ubatch."""
        self.session.clear()
        self._seek(row)
        tokens = self._rows(row, n)
        outputs = [False] * (n - 1) + [True]
        began = time.perf_counter()
        self.session.decode(tokens, outputs=outputs)
        return time.perf_counter() - began

    def decode(self, row: int, n: int, warm_up: int = WARM_UP) -> dict[str, Any]:
        """Decode single tokens up to `row + n`, the last `n` of them timed; `warm_up` come before `row`."""
        session = self.session
        session.clear()
        first = max(0, row - warm_up)
        self._seek(first)
        tokens = self._rows(first, row - first + n)
        for i in range(row - first):
            self._step(tokens, i, first + i)
        before, policy = session.counters().totals(), session.stats()["policy_seconds"]
        seconds = np.empty(n)
        for i in range(n):
            began = time.perf_counter()
            self._step(tokens, row - first + i, row + i)
            seconds[i] = time.perf_counter() - began
        after, stats = session.counters().totals(), session.stats()
        return {
            "ms": (seconds * 1e3).round(4).tolist(),
            "policy_seconds": stats["policy_seconds"] - policy,
            "policy_error": stats["policy_error"],
            "counters": {key: int(after[key] - before[key]) for key in after},
        }

    def decode_one(self, row: int) -> None:
        """Decode the token of a row that follows the one before."""
        self._step(self._rows(row, 1), 0, row)

    def close(self) -> None:
        self.session.close()

    def _step(self, tokens: NDArray[np.int32], at: int, row: int) -> None:
        if self.oracle is not None:
            self.oracle.row = row
        self.session._decode(tokens[at : at + 1], None, None, None, None)

    def _seek(self, row: int) -> None:
        if self.tokens is not None:
            from fate_bind import library

            engine = self.lib.fate_context_engine(self.session._context)
            library.check(self.lib.fate_engine_seek_routing(engine, row % len(self.tokens)))

    def _rows(self, first: int, n: int) -> NDArray[np.int32]:
        if self.tokens is None:
            rng = np.random.default_rng(first)
            return rng.integers(self.session.n_vocab, size=n).astype(np.int32)
        return self.tokens[np.arange(first, first + n) % len(self.tokens)]
