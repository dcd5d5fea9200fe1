"""Replay in compiled loops: the decision rule over whole traces, millions of routed pairs a second.

The rule is that of `fate_policy.rule`, and so are the counts, exactly. The engine has pools per layer and
fills every miss; here are also one pool for the whole model and optional admission.

Optional admission: an expert that misses is used from a scratch slot. Then those residents and misses stay
that have the greatest keys, a use of this token counted as made: under plain LRU every miss is admitted, and
a resident that was just used may go for a miss that is worth more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fate_policy import loops
from fate_policy.base import NOT_RUN, POOL
from fate_policy.checks import bad_value, choice, number
from fate_policy.counters import Counters
from fate_policy.errors import FateError
from fate_policy.trace import Trace

Scores = NDArray[np.float32] | Callable[[int, int], NDArray[np.float32]]
"""Tables (n_steps, n_layers, n_experts), or a function of (start, stop) that gives those of these steps."""

TABLE_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class Routing:
    """Routing as the loops take it; see `Trace` for what the arrays mean.

    ids : int16 (n_tokens, n_layers, k), -1 = not run
    bounds : int64 (n_steps + 1,): where each step starts
    path : uint8 (n_tokens, n_layers)
    starts : bool (n_steps,): a prompt starts here
    """

    ids: NDArray[np.int16]
    bounds: NDArray[np.int64]
    path: NDArray[np.uint8]
    starts: NDArray[np.bool_]
    n_experts: NDArray[np.int64]
    k: NDArray[np.int64]

    @property
    def n_steps(self) -> int:
        return len(self.bounds) - 1

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and the most experts of one."""
        return len(self.n_experts), int(self.n_experts.max(initial=1))

    @classmethod
    def of_trace(cls, trace: Trace, path: NDArray[np.uint8] | None = None) -> Routing:
        """Take a trace, with the paths it was recorded with or others."""
        path = trace.path if path is None else path
        ids = trace.ids.astype(np.int16)
        ids[trace.ids == np.iinfo(trace.ids.dtype).max] = -1
        ids[path == NOT_RUN] = -1
        bounds = trace.step_bounds()
        starts = np.zeros(len(bounds) - 1, np.bool_)
        starts[np.searchsorted(bounds, trace.prompt_start, side="right") - 1] = True
        return cls(
            ids=np.ascontiguousarray(ids),
            bounds=bounds,
            path=path,
            starts=starts,
            n_experts=np.array(trace.meta["n_experts"], np.int64),
            k=np.array(trace.meta["k"], np.int64),
        )

    @classmethod
    def of_ids(
        cls, ids: NDArray[np.integer], prompt_start: ArrayLike = (0,), n_experts: int | None = None
    ) -> Routing:
        """Take plain ids (n_tokens, n_layers, k), one step a token; negative or 255 as uint8 = not run."""
        plain = ids.astype(np.int16)
        if ids.dtype.kind == "u":
            plain[ids == np.iinfo(ids.dtype).max] = -1
        n_tokens, n_layers, k = ids.shape
        starts = np.zeros(n_tokens, np.bool_)
        starts[np.asarray(prompt_start, np.int64)] = True
        width = int(plain.max(initial=0)) + 1 if n_experts is None else n_experts
        return cls(
            ids=np.ascontiguousarray(plain),
            bounds=np.arange(n_tokens + 1),
            path=np.where((plain >= 0).any(axis=2), POOL, NOT_RUN).astype(np.uint8),
            starts=starts,
            n_experts=np.full(n_layers, width),
            k=np.full(n_layers, k),
        )


@dataclass(frozen=True, eq=False)
class Result:
    """What a replay counted.

    admitted : experts that came into a slot; fewer than `counters.fills`, those that crossed the link, only
        with optional admission
    missed : uint8 (n_tokens, n_layers): experts missed by each row; None if not asked for
    """

    counters: Counters
    admitted: int
    missed: NDArray[np.uint8] | None = None

    @property
    def hit_rate(self) -> float:
        return self.counters.hit_rate


@dataclass(eq=False)
class Simulation:
    """A pool, the rule, and what they counted so far; `run` goes on from where it stopped.

    Parameters
    ----------
    n_slots
        Slots of each layer: a number or an array; with pool "global" their sum is shared by all layers.
    rule
        "lru"; "frequency" and "lfru" with `half_life` in tokens (infinite: all-time counts); "table": scores
        given to `run`; "optimum": the offline optimum, forced or optional as `admission` says.
    bonus
        Of a table: what a use since the publication adds, one number or one for each layer.
    delay
        Of a table: the steps between a table's publication and the step it acts on; see `simulate_scores`.
    detail
        Keep the misses of every row.
    """

    routing: Routing
    n_slots: Any
    rule: str = "lru"
    half_life: float = 16
    pool: str = "layer"
    admission: str = "forced"
    cold: bool = False
    bonus: ArrayLike = 0.0
    delay: int = 0
    detail: bool = False
    at: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        routing = self.routing
        choice("rule", self.rule, loops.RULES)
        choice("pool", self.pool, ("layer", "global"))
        choice("admission", self.admission, ("forced", "optional"))
        if self.half_life != np.inf:
            number("half_life", self.half_life, above=0)
        shape = routing.shape
        slots = np.minimum(np.broadcast_to(np.asarray(self.n_slots, np.int64), shape[:1]), routing.n_experts)
        if (slots < routing.k).any():
            raise bad_value("n_slots", self.n_slots, f"at least the {routing.k.max()} experts of a token")
        longest = int(np.diff(routing.bounds).max(initial=1))
        decay = 2.0 ** (-1 / self.half_life)
        counts_uses = self.rule in ("frequency", "lfru")
        self._rule = loops.Rule(
            kind=loops.RULES.index(self.rule),
            whole=self.pool == "global",
            optional=self.admission == "optional",
            slots=slots,
            k=routing.k,
            bonus=np.array(np.broadcast_to(1 if counts_uses else self.bonus, shape[:1]), np.float32),
            powers=decay ** np.arange(longest + 1),
            decays=np.array([decay**n for n in range(longest + 1)]),
        )
        next_use = np.zeros((1, 1, 1), np.int32)
        if self.rule == "optimum":
            if routing.n_steps > 2**24:
                raise FateError(
                    f"the optimum takes at most {2**24} steps, not {routing.n_steps}; cut the trace"
                )
            next_use = loops.next_uses(routing.ids, routing.bounds, routing.path, slots, routing.k, *shape)
        self._flow = loops.Flow(
            ids=routing.ids,
            bounds=routing.bounds,
            path=routing.path,
            cold=routing.starts & self.cold,
            next_use=next_use,
        )
        self._state = loops.State.empty(*shape, self.delay)
        self._counts = np.zeros((shape[0], len(loops.COUNTS)), np.int64)
        self._missed = np.zeros((len(routing.ids) if self.detail else 0, shape[0]), np.uint8)

    def run(
        self,
        stop: int | None = None,
        tables: NDArray[np.float32] | None = None,
        bonus: NDArray[np.float32] | None = None,
        fresh: bool = True,
    ) -> None:
        """Go on up to the step `stop`.

        Parameters
        ----------
        tables, bonus
            With rule "table": the scores of each of these steps, and a new bonus for all that follow.
        fresh
            False: the tables were published before an earlier step, and so is what their maker had seen.
        """
        stop = self.routing.n_steps if stop is None else stop
        shape = (stop - self.at if self.rule == "table" else 0, *self.routing.shape)
        if tables is None:
            tables = np.zeros((0, *shape[1:]), np.float32)
        if tables.shape != shape:
            raise FateError(f"score tables have shape {tables.shape}; expected {shape}")
        tables = np.ascontiguousarray(tables, np.float32)
        if bonus is not None:
            self._rule.bonus[:] = bonus
        loops.run(
            self.at, stop, fresh, self._flow, self._rule, self._state, tables, self._counts, self._missed
        )
        self.at = stop

    @property
    def resident(self) -> NDArray[np.bool_]:
        """Which experts have a slot now, (n_layers, n_experts)."""
        return self._state.resident.copy()

    def result(self, expert_bytes: ArrayLike = 0) -> Result:
        """Return the counts up to here."""
        counters = Counters.zeros(len(self._counts))
        counts = dict(zip(loops.COUNTS, self._counts.T, strict=True))
        admitted = int(counts.pop("admitted").sum() + counts["seed_fills"].sum())
        for name, column in counts.items():
            getattr(counters, name)[:] = column
        counters.routed[:] = counters.hits + counters.misses + counters.staged + counters.bypassed
        counters.fills[:] = counters.misses + counters.seed_fills
        counters.bytes[:] = counters.fills * np.asarray(expert_bytes, np.int64)
        counters.tokens = int(self.routing.bounds[self.at])
        counters.steps = self.at
        return Result(counters, admitted, self._missed if self.detail else None)


def simulate(
    ids: NDArray[np.integer] | Routing,
    n_slots: Any,
    rule: str = "lru",
    *,
    prompt_start: ArrayLike = (0,),
    n_experts: int | None = None,
    half_life: float = 16,
    pool: str = "layer",
    admission: str = "forced",
    cold: bool = False,
    detail: bool = False,
) -> Result:
    """Replay ids (n_tokens, n_layers, k), or a `Routing`, under a built-in rule; see `Simulation`."""
    if not isinstance(ids, Routing):
        ids = Routing.of_ids(ids, prompt_start, n_experts)
    simulation = Simulation(
        ids, n_slots, rule, half_life=half_life, pool=pool, admission=admission, cold=cold, detail=detail
    )
    simulation.run()
    return simulation.result()


def simulate_scores(
    ids: NDArray[np.integer] | Routing,
    n_slots: Any,
    scores: Scores,
    *,
    prompt_start: ArrayLike = (0,),
    n_experts: int | None = None,
    bonus: ArrayLike = 0.0,
    delay: int = 0,
    pool: str = "layer",
    admission: str = "forced",
    cold: bool = False,
    detail: bool = False,
) -> Result:
    """Replay ids under score tables: table t decides what goes when token (or step) t runs.

    Parameters
    ----------
    scores
        float32 (n_steps, n_layers, n_experts), higher stays, or a function of (start, stop) that returns
        those of these steps; it is asked in order, `TABLE_BYTES` at a time.
    bonus
        What a use adds that the table's maker had not seen: one in the step at hand, which tells on seeding,
        on admission and in a pool of the whole model, and with a delay one in the `delay` steps before, as in
        the engine with `sync: false`.
    delay
        Steps by which tables act late: table t decides at step t + delay, and until the first one comes all
        scores are equal.
    """
    if not isinstance(ids, Routing):
        ids = Routing.of_ids(ids, prompt_start, n_experts)
    simulation = Simulation(
        ids,
        n_slots,
        "table",
        pool=pool,
        admission=admission,
        cold=cold,
        bonus=bonus,
        delay=delay,
        detail=detail,
    )
    n_layers, width = ids.shape
    chunk = max(1, TABLE_BYTES // (4 * n_layers * width))
    held = np.zeros((delay, n_layers, width), np.float32)
    for start in range(0, ids.n_steps, chunk):
        stop = min(start + chunk, ids.n_steps)
        fresh = scores(start, stop) if callable(scores) else scores[start:stop]
        late = np.concatenate((held, fresh)) if delay else fresh
        simulation.run(stop, late[: stop - start])
        held = late[stop - start :]
    return simulation.result()
