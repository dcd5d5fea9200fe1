"""What a policy costs, a token in table mode, a question in callback mode; no model, no GPU.

The functions that C calls are called through their C pointers, with the steps and the questions of LRU on
replayed routing, as an engine makes them (the way there and back, about 2 us, is in the figures). `native` is
the library's own evaluation of the classifier: a step taken in, the next token told, chances and scores made.

    python -m bench.policy_cost                 # all policies
    python -m bench.policy_cost classifier native --pause-ms 4
    python -m bench.policy_cost native --shape gptoss
    python -m bench.policy_cost classifier predictor --prefetch
    python -m bench.policy_cost lru --callback
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import models
from bench.policies import PythonLRU
from bench.routing import stretch, way
from fate_bind import library
from fate_bind.engine import Engine
from fate_bind.host import Host
from fate_bind.linear import NativeLinear
from fate_policy import cost, data, trace
from fate_policy.base import POOL, Geometry, Policy, Step
from fate_policy.classifier import Classifier
from fate_policy.config import load
from fate_policy.frequency import Frequency
from fate_policy.rule import LayerTable

N_TOKENS = 300
WARM_UP = 100


class Silent(Policy):
    """Takes in steps and publishes nothing."""

    def observe(self, step: Step) -> None:
        pass


def _classifier(shape: models.Shape, **params: Any) -> Classifier:
    made = cost.untrained([shape.n_experts] * shape.n_layers, [shape.k] * shape.n_layers)
    return Classifier.of(made, **params)


POLICIES: dict[str, Callable[[models.Shape], Policy | None]] = {
    "lru": lambda shape: None,
    "silent": lambda shape: Silent(),
    "python-lru": lambda shape: PythonLRU(),
    "frequency": lambda shape: Frequency(),
    "classifier": _classifier,
    "predictor": lambda shape: _classifier(shape, evict_by="lru"),
}
PREDICTS = ("classifier", "predictor")
NATIVE = "native"


@dataclass(frozen=True)
class Question:
    """The arguments of `fate_miss_fn`, arrays as in fate.h."""

    layer: int
    needed: NDArray[np.int32]
    missing: NDArray[np.int32]
    last_use: NDArray[np.int64]
    n_victims: int


class StandIn(Engine):
    """An engine of any geometry that nobody made: what the library would tell is told here."""

    def __init__(self, host: Host, pointer: Any, shape: models.Shape, n_slots: int) -> None:
        ffi, _ = library.load()
        n = shape.n_layers
        self._arrays = [ffi.new("int32_t[]", [value] * n) for value in (shape.n_experts, shape.k, n_slots)]
        self._arrays.append(ffi.new("int64_t[]", [1] * n))
        self._told = ffi.new("fate_info *", {"engaged": 1})
        geometry = self._told.geometry
        geometry.n_layers = geometry.n_layers_engaged = n
        geometry.n_experts, geometry.k, geometry.n_slots, geometry.expert_bytes = self._arrays
        super().__init__(host, pointer)

    def _info(self) -> Any:
        return self._told

    def _set_linear(self, policy: Policy) -> None:
        """Leave it to Python, whose time is what is measured."""


def walk(
    ids: NDArray[np.int32], tokens: NDArray[np.int32], n_experts: int, n_slots: int
) -> tuple[list[Step], list[list[Question]]]:
    """Return what LRU makes of the routing, int32 (n_tokens, n_layers, k): steps, and their questions."""
    tables = [LayerTable(n_experts, n_slots) for _ in range(ids.shape[1])]
    steps, asked = [], []
    for t, token in enumerate(tokens):
        questions, fills, evictions = [], [], []
        hits = np.ones((1, *ids.shape[1:]), np.uint8)
        for layer, table in enumerate(tables):
            uses = np.ascontiguousarray(ids[t, layer, ::-1])
            miss, evicted = table.bring(uses)
            hits[0, layer] = ~miss[::-1]
            if miss.any():
                questions.append(Question(layer, uses, uses[miss], table.last_use.copy(), len(evicted)))
                fills += [(layer, expert) for expert in uses[miss]]
                evictions += [(layer, expert) for expert in evicted]
            table.use(uses)
        asked.append(questions)
        steps.append(
            Step(
                ids=np.ascontiguousarray(ids[t, None]),
                path=np.full((1, ids.shape[1]), POOL, np.uint8),
                weights=np.full((1, *ids.shape[1:]), 1 / ids.shape[2], np.float32),
                tokens=np.array([token], np.int32),
                positions=np.array([t], np.int32),
                sequences=np.zeros(1, np.int32),
                hits=hits,
                fills=np.array(fills, np.int32).reshape(-1, 2),
                evictions=np.array(evictions, np.int32).reshape(-1, 2),
            )
        )
    return steps, asked


class Caller:
    """Call into Python as an engine does; `seconds` of every call."""

    def __init__(
        self,
        policy: Policy | None,
        mode: str,
        shape: models.Shape,
        n_slots: int,
        record: Path | None,
        prefetch: bool = False,
    ):
        self.ffi, self.lib = library.load()
        config = load("lru", {"mode": mode, "prefetch": "token" if prefetch else "off"})
        self.host = Host(config, policy, record)
        self.pointer = self.ffi.cast("fate_engine *", 1)
        self.engine = StandIn(self.host, self.pointer, shape, n_slots)
        self.host.engines.append(self.engine)
        self.engine.open()
        self.scores = self.ffi.new("float[]", shape.n_layers * shape.n_experts)
        self.bonus = self.ffi.new("float[]", shape.n_layers)
        self.published = self.ffi.new("int32_t *")
        self.chances = self.ffi.new("float[]", len(self.scores)) if prefetch else self.ffi.NULL
        self.predicted = self.ffi.new("int32_t *")
        self.victims = self.ffi.new("int32_t[]", shape.n_experts)
        self.on_step, self.on_expect, self.on_miss = (
            self.ffi.addressof(self.lib, f"fate_py_{name}") for name in ("step", "expect", "miss")
        )
        self.has_record = record is not None

    def pointer_to(self, kind: str, array: NDArray[Any]) -> Any:
        return self.ffi.from_buffer(f"{kind}[]", array) if array.size else self.ffi.NULL

    def step(self, step: Step, following: Step) -> Callable[[], None]:
        """Return what hands the step over and, if that is wanted, tells the token of the one after it."""
        c_step = self.ffi.new("fate_step *")
        c_step.n_tokens, c_step.n_layers, c_step.k = step.ids.shape
        c_step.n_fills, c_step.n_evictions = len(step.fills), len(step.evictions)
        assert step.weights is not None
        held = {name: self.pointer_to("int32_t", getattr(step, name)) for name in _INTS}
        held |= {name: self.pointer_to("uint8_t", getattr(step, name)) for name in ("path", "hits")}
        if self.has_record:
            held["weights"] = self.pointer_to("float", step.weights)
        for name, pointer in held.items():
            setattr(c_step, name, pointer)
        comes = [self.pointer_to("int32_t", getattr(following, name)) for name in _INTS[1:4]]
        user, expects = self.host._handle, self.host._expects

        def call() -> None:
            status = self.on_step(user, self.pointer, c_step, self.scores, self.bonus, self.published)
            if expects:
                status |= self.on_expect(
                    user,
                    self.pointer,
                    1,
                    *comes,
                    self.scores,
                    self.bonus,
                    self.published,
                    self.chances,
                    self.predicted,
                )
            self.check(status, held)

        return call

    def question(self, asked: Question) -> Callable[[], None]:
        """Return what asks it."""
        needed, missing = (self.pointer_to("int32_t", array) for array in (asked.needed, asked.missing))
        last_use = self.pointer_to("int64_t", asked.last_use)
        user, n_needed, n_missing = self.host._handle, len(asked.needed), len(asked.missing)

        def call() -> None:
            status = self.on_miss(
                user,
                self.pointer,
                asked.layer,
                n_needed,
                needed,
                n_missing,
                missing,
                last_use,
                asked.n_victims,
                self.victims,
            )
            self.check(status, asked)

        return call

    def check(self, status: int, held: object) -> None:
        """Raise what Python raised; `held` lived until here."""
        if status:
            self.host.reraise()


class NativeCaller:
    """Do for the library's evaluation what `Caller` does for a policy in Python."""

    def __init__(self, shape: models.Shape, n_slots: int) -> None:
        policy = _classifier(shape)
        n_experts, k, slots = (
            np.full(shape.n_layers, value, np.int32) for value in (shape.n_experts, shape.k, n_slots)
        )
        policy.start(Geometry(n_experts, k, slots, np.ones(shape.n_layers, np.int64)))
        linear = policy.linear()
        assert linear is not None
        self.native = NativeLinear(linear)

    def step(self, step: Step, following: Step) -> Callable[[], None]:
        """Return what takes the step in, tells the token of the one after it, and asks."""
        return self.native.turn(
            step, *(int(getattr(following, name)[0]) for name in ("tokens", "sequences", "positions"))
        )


_INTS = ("ids", "tokens", "positions", "sequences", "fills", "evictions")


_OTHER_WORK = np.zeros(1 << 24, np.uint8)


def seconds_of(call: Callable[[], None], pause_ms: float) -> float:
    began = time.perf_counter()
    while (time.perf_counter() - began) * 1e3 < pause_ms:
        _OTHER_WORK.sum()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("policy", nargs="*", help="of " + ", ".join((*POLICIES, NATIVE)))
    parser.add_argument("--shape", choices=("qwen3", "gptoss"), default="qwen3")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--callback", action="store_true", help="callback mode, questions and steps apart")
    parser.add_argument("--record", action="store_true")
    parser.add_argument(
        "--prefetch",
        action="store_true",
        help=f"ask for predictions too, of {' and '.join(PREDICTS)}; {NATIVE} makes them always",
    )
    parser.add_argument(
        "--pause-ms",
        type=float,
        default=0,
        help="do other work before each call, which leaves the caches cold, as waiting for a GPU does",
    )
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args(argv)
    args.policy = args.policy or [*(PREDICTS if args.prefetch else POLICIES), NATIVE]
    shape = models.SHAPES[args.shape]
    whole = trace.load(data.find("gptoss20b_stem", None))
    layers = np.arange(shape.n_layers) * whole.n_layers // shape.n_layers
    ids = whole.experts(0, 4 * N_TOKENS).astype(np.int32)
    ids = ids[: N_TOKENS + 1, layers] if way(shape) == "own" else stretch(ids, N_TOKENS + 1, layers)
    steps, asked = walk(ids, whole.tokens[: N_TOKENS + 1], shape.n_experts, args.slots)
    for name in args.policy:
        with tempfile.TemporaryDirectory() as folder:
            caller: Caller | NativeCaller
            if name == NATIVE:
                caller = NativeCaller(shape, args.slots)
            else:
                caller = Caller(
                    POLICIES[name](shape),
                    "callback" if args.callback else "table",
                    shape,
                    args.slots,
                    Path(folder) / "trace.npz" if args.record else None,
                    args.prefetch,
                )
            tokens: list[float] = []
            questions: list[float] = []
            profile = cProfile.Profile()
            for t in range(N_TOKENS):
                step_call = caller.step(steps[t], steps[t + 1])
                calls = []
                if args.callback and isinstance(caller, Caller):
                    calls = [caller.question(question) for question in asked[t]]
                if args.profile and t == WARM_UP:
                    profile.enable()
                for call in calls:
                    questions.append(seconds_of(call, args.pause_ms))
                tokens.append(seconds_of(step_call, args.pause_ms))
                if t < WARM_UP:
                    questions.clear()
                    tokens.clear()
            profile.disable()
            if isinstance(caller, Caller):
                caller.engine.keep_record(is_end=True)
        for what, seconds in (("token", tokens), ("question", questions)):
            if seconds:
                low, median = np.percentile(seconds, (10, 50)) * 1e6
                print(
                    f"{name:12s} {what:9s} median {median:7.1f} us, mean {1e6 * np.mean(seconds):7.1f}, "
                    f"best tenth {low:7.1f}, n {len(seconds)}"
                )
        if args.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
