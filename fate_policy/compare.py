"""Policies x capacities x traces in one table: what `fate replay` prints."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from fate_policy import checks, config, data, registry
from fate_policy import trace as traces
from fate_policy.base import POOL, OfflinePolicy, Policy, Step
from fate_policy.belady import Belady
from fate_policy.config import Slots
from fate_policy.driver import Driver, policy_name
from fate_policy.errors import PolicyConfigError, TraceError
from fate_policy.frequency import Frequency
from fate_policy.kernels import Result, Routing, Simulation
from fate_policy.lru import LRU
from fate_policy.prefetch_rule import Prefetch
from fate_policy.progress import Bar
from fate_policy.replay import coming, geometry_of, paths, replay
from fate_policy.timeline import Machine, timeline
from fate_policy.trace import Trace

ALIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfu": ("frequency", {"half_life_tokens": 1e30}),
    "lfru": ("frequency", {"lfru": True}),
    "optimum": ("belady", {}),
}
"""Names of `fate replay` beside those of the registry: all-time counts, decayed count / age, the optimum."""

LINK_GB_S = 50.0
CHUNK_STEPS = 20_000

Say = Callable[[float], None]

COLUMNS = (
    "trace",
    "policy",
    "capacity",
    "pool",
    "admission",
    "hit_rate",
    "all_resident",
    "fills_per_token",
    "admitted_per_token",
    "bytes_per_token",
    "transfer_ms_per_token",
)


@dataclass(frozen=True)
class Job:
    """One row to be: plain values, so that it travels to any worker."""

    trace: str | Trace
    name: str
    policy: str
    capacity: str
    pool: str = "layer"
    admission: str = "forced"
    cold: bool = False
    expert_bytes: int | None = None
    link_gb_s: float = LINK_GB_S
    resident_tokens_s: float | None = None
    sync: bool = True
    refresh_tokens: int = 1
    prefetch: Prefetch | None = None


def compare(
    routed: Iterable[str | Path | Trace],
    policies: Sequence[str] = ("lru", "frequency", "optimum"),
    capacities: Sequence[str | int] = ("25%", "50%"),
    *,
    pool: str = "layer",
    admission: str = "forced",
    cold: bool = False,
    expert_bytes: int | None = None,
    link_gb_s: float = LINK_GB_S,
    resident_tokens_s: float | None = None,
    sync: bool = True,
    refresh_tokens: int = 1,
    prefetch: Prefetch | None = None,
    folder: str | Path | None = None,
    n_jobs: int | None = None,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Replay every policy at every capacity on every trace; return a row for each, in that order.

    Parameters
    ----------
    routed
        Traces, or their paths or names (see `fate_policy.data.find`; `folder` is where names are looked for).
    policies
        As `make` reads them: "lru", "frequency:half_life_tokens=64", "lfu", "optimum", "mine.yaml" ...
    capacities
        Slots as in a configuration ("25%", 8, "4GiB"), or a .yaml file whose `slots` are taken.
    cold
        Empty the cache at each prompt.
    expert_bytes
        Bytes of one expert. None: what the trace says, or is known of its model.
    resident_tokens_s
        Speed with all experts resident; rows then tell `of_resident`, the share of it that
        `fate_policy.timeline` expects.
    sync, refresh_tokens
        When scores come into force, as in a configuration. LRU and the optimum have none.
    prefetch
        What comes in before its layer, as `fate_policy.replay` does it; rows then tell `prefetched_per_token`
        and `useful`, the share of these that were used. Policies that know the future go without.
    n_jobs
        Workers, as joblib takes them. None: one, or those of a `joblib.parallel_config` around the call,
        which may be a Dask or Ray cluster; its workers open traces given by path themselves.
    """
    checks.integer("refresh_tokens", refresh_tokens, minimum=1)
    named = [_named(item, folder) for item in routed]
    is_offline = {policy: isinstance(make(policy), OfflinePolicy) for policy in policies}
    jobs = [
        Job(
            where,
            name,
            policy,
            str(capacity),
            pool,
            admission,
            cold,
            expert_bytes,
            link_gb_s,
            resident_tokens_s,
            sync,
            refresh_tokens,
            None if is_offline[policy] else prefetch,
        )
        for where, name in named
        for capacity in capacities
        for policy in policies
    ]
    bar = Bar(len(jobs), progress)
    try:
        rows = list(_run(jobs, n_jobs, bar))
        if prefetch is not None:
            rows = [{"prefetched_per_token": None, "useful": None, **row} for row in rows]
        return rows
    finally:
        bar.clear()


def make(spec: str) -> Policy:
    """Construct the policy that a name means, with parameters after a colon: "NAME:KEY=VALUE+KEY=VALUE".

    A .yaml file is read as `fate run` does; beside the registry's names there are those of `ALIASES`.
    """
    if spec.endswith((".yaml", ".yml")):
        loaded = config.load(spec)
        if loaded.policy == config.AUTO:
            raise PolicyConfigError(
                f"{spec}: policy auto is decided at a run, by the file beside the model; name one, such as "
                "lru or classifier:model=NAME.fate.npz"
            )
        return config.make_policy(loaded)
    name, _, tail = spec.rpartition(":")
    if "=" not in tail:
        name, tail = spec, ""
    params: dict[str, Any] = {}
    if name in ALIASES:
        name, params = ALIASES[name][0], dict(ALIASES[name][1])
    known = registry.params_of(registry.get(name)) if tail else {}
    for item in filter(None, tail.split("+")):
        key, _, value = item.partition("=")
        if key not in known:
            raise checks.unknown_name(f"parameter of policy {name}:", key, known)
        params[key] = yaml.safe_load(value)
    return registry.get(name)(**params)


def replay_policy(
    trace: Trace,
    policy: Policy,
    n_slots: Any,
    *,
    pool: str = "layer",
    admission: str = "forced",
    cold: bool = False,
    detail: bool = False,
    sync: bool = True,
    refresh_tokens: int = 1,
    prefetch: Prefetch | None = None,
    say: Say = lambda share: None,
) -> Result:
    """Replay any policy: the built-in rules in compiled loops, others by asking them after every step.

    What the engine has too (pool "layer", admission "forced", warm) counts as `replay` does.
    A policy that names victims but has no scores works only there, and so does `prefetch`. `say` is told the
    share that is done.
    """
    geometry = geometry_of(trace, n_slots)
    if prefetch is not None:
        if (pool, admission, cold, detail) != ("layer", "forced", False, False):
            raise PolicyConfigError(
                "prefetch: is replayed as the engine runs only: with pool layer, admission forced, warm, and "
                "without --resident, whose model does not know it"
            )
        counters = replay(
            trace,
            policy,
            n_slots=geometry.n_slots,
            sync=sync,
            refresh_tokens=refresh_tokens,
            prefetch=prefetch,
        )
        return Result(counters, int(counters.fills.sum()))
    routing = Routing.of_trace(trace, paths(trace, geometry))
    rule = _rule(policy)
    if isinstance(policy, Frequency) and not (sync and refresh_tokens == 1):
        rule = None  # its loop counts up to the step at hand
    asks = rule is None and _only_names_victims(policy)
    if asks:
        if (pool, admission, cold, detail) != ("layer", "forced", False, False):
            raise PolicyConfigError(
                f"policy {policy_name(policy)} has no scores, so it can be replayed only with pool layer, "
                "admission forced and warm"
            )
        counters = replay(
            trace, policy, n_slots=geometry.n_slots, mode="callback", refresh_tokens=refresh_tokens
        )
        return Result(counters, int(counters.fills.sum()))
    options: dict[str, Any] = {"pool": pool, "admission": admission, "cold": cold, "detail": detail}
    if rule is None:
        driver = Driver(policy, geometry, "table", refresh_tokens, sync=sync, replay=True)
        options |= {"rule": "table", "delay": int(driver.acts_late)}
    simulation = Simulation(routing, geometry.n_slots, **(rule or {}), **options)
    if rule is None:
        _drive(trace, driver, simulation, say)
    else:
        for stop in (*range(CHUNK_STEPS, routing.n_steps, CHUNK_STEPS), routing.n_steps):
            simulation.run(stop)
            say(stop / max(1, routing.n_steps))
    return simulation.result(geometry.expert_bytes)


def run_job(job: Job, say: Say = lambda share: None) -> dict[str, Any]:
    """Return the row of a job; `say` is told the share that is done."""
    trace = _load(job.trace) if isinstance(job.trace, str) else job.trace
    size = data.expert_bytes(trace, job.expert_bytes)
    slots = _slots(trace, job.capacity, size)
    started = time.perf_counter()
    result = replay_policy(
        trace,
        make(job.policy),
        slots,
        pool=job.pool,
        admission=job.admission,
        cold=job.cold,
        detail=job.resident_tokens_s is not None,
        sync=job.sync,
        refresh_tokens=job.refresh_tokens,
        prefetch=job.prefetch,
        say=say,
    )
    seconds = time.perf_counter() - started
    counters = result.counters
    n_tokens = max(counters.tokens, 1)
    rows = int(counters.rows.sum())
    moved = None if size is None else int((counters.fills * size).sum()) / n_tokens
    row: dict[str, Any] = {
        "trace": job.name,
        "policy": job.policy,
        "capacity": job.capacity,
        "pool": job.pool,
        "admission": job.admission,
        "hit_rate": counters.hit_rate,
        "all_resident": int(counters.rows_all_resident.sum()) / rows if rows else float("nan"),
        "fills_per_token": int(counters.fills.sum()) / n_tokens,
        "admitted_per_token": result.admitted / n_tokens,
        "bytes_per_token": moved,
        "transfer_ms_per_token": None if moved is None else moved / job.link_gb_s / 1e6,
        "cold": job.cold,
        "sync": job.sync,
        "refresh_tokens": job.refresh_tokens,
        "slots": slots.tolist(),
        "share": int(slots.sum()) / sum(trace.meta["n_experts"]),
        "tokens": counters.tokens,
        "link_gb_s": job.link_gb_s,
        "seconds": seconds,
    }
    if job.prefetch is not None:
        n, useful = int(counters.prefetches.sum()), int(counters.prefetch_useful.sum())
        row |= {"prefetched_per_token": n / n_tokens, "useful": useful / n if n else None}
    if job.resident_tokens_s is not None:
        if size is None or result.missed is None:
            raise TraceError(f"trace {job.name} does not tell an expert's bytes; give them")
        machine = Machine.of_speed(job.resident_tokens_s, job.link_gb_s, size)
        row["of_resident"] = timeline(result.missed, machine).of_resident
    return row


def _named(item: str | Path | Trace, folder: str | Path | None) -> tuple[str | Trace, str]:
    if isinstance(item, Trace):
        return item, str(item.meta.get("name", item.meta.get("model", "trace")))
    path = data.find(item, folder)
    return str(path.resolve()), path.stem


@functools.lru_cache(maxsize=2)
def _load(path: str) -> Trace:
    return traces.load(path)


def _slots(trace: Trace, capacity: str, size: NDArray[np.int64] | None) -> NDArray[np.int32]:
    if capacity.endswith((".yaml", ".yml")):
        slots = config.load(capacity).slots
    else:
        slots = Slots.parse(int(capacity) if capacity.isdecimal() else capacity)
    if slots.kind == "bytes" and size is None:
        raise TraceError(f"capacity {capacity}: the trace does not tell an expert's bytes; give them")
    meta = trace.meta
    return slots.resolve(meta["n_experts"], meta["k"], np.zeros(trace.n_layers) if size is None else size)


def _rule(policy: Policy) -> dict[str, Any] | None:
    """Return the loops' own form of a built-in policy, or None."""
    kind = type(policy)
    if kind is LRU or kind is Policy:
        return {"rule": "lru"}
    if kind is Belady:
        return {"rule": "optimum"}
    if isinstance(policy, Frequency) and kind is Frequency:
        return {"rule": "lfru" if policy.lfru else "frequency", "half_life": policy.half_life_tokens}
    return None


def _only_names_victims(policy: Policy) -> bool:
    kind = type(policy)
    names = kind.victims is not Policy.victims
    return isinstance(policy, OfflinePolicy) or (names and kind.scores is Policy.scores)


def _drive(trace: Trace, driver: Driver, simulation: Simulation, say: Say) -> None:
    """Take the steps one by one and ask the policy in between, as the engine's binding does."""
    shape = (1, *simulation.routing.shape)
    scores, bonus, fresh = np.zeros(shape, np.float32), np.zeros(shape[1], np.float32), True
    bounds = trace.step_bounds().tolist()
    path = simulation.routing.path
    resident = simulation.resident
    waiting: deque[Step] = deque()
    lag = 2 if driver.acts_late else 1  # steps from what was observed last to the one that the scores act on
    for step, (start, stop) in enumerate(pairwise(bounds)):
        if step >= lag:
            driver.observe(waiting.popleft())
        if step >= lag or lag == 1:
            first, last = bounds[step + 1 - lag : step + 3 - lag]
            driver.expect(*coming(trace, first, last))
            if (published := driver.publish()) is not None:
                scores, bonus, fresh = published[0][None], published[1], True
        if simulation.cold and simulation.routing.starts[step]:
            resident = np.zeros_like(resident)
        simulation.run(step + 1, scores, bonus, fresh)
        now, fresh = simulation.resident, False
        waiting.append(_step(trace, start, stop, path[start:stop], resident, now))
        resident = now
        say((step + 1) / simulation.routing.n_steps)
    for finished in waiting:
        driver.observe(finished)


def _step(
    trace: Trace,
    start: int,
    stop: int,
    path: NDArray[np.uint8],
    before: NDArray[np.bool_],
    after: NDArray[np.bool_],
) -> Step:
    ids = trace.experts(start, stop)
    ids[path == 0] = -1
    hits = np.zeros(ids.shape, np.uint8)
    token, layer, rank = np.nonzero((ids >= 0) & (path == POOL)[:, :, None])
    expert = ids[token, layer, rank]
    hits[token, layer, rank] = before[layer, expert]
    if stop - start > 1:  # within a step an absent expert's first use is a miss, its later uses are hits
        order = np.lexsort((-rank, token))
        token, layer, rank, expert = token[order], layer[order], rank[order], expert[order]
        _, first = np.unique(layer * before.shape[1] + expert, return_index=True)
        later = np.ones(len(token), np.bool_)
        later[first] = False
        hits[token[later], layer[later], rank[later]] = 1
    weights = None if trace.weights is None else trace.weights[start:stop].astype(np.float32)
    return Step(
        ids=ids,
        path=path,
        weights=weights,
        tokens=trace.tokens[start:stop],
        positions=trace.position[start:stop],
        sequences=trace.sequence[start:stop],
        hits=hits,
        fills=np.argwhere(after & ~before).astype(np.int32),
        evictions=np.argwhere(before & ~after).astype(np.int32),
        **trace.ahead(start, stop),
    )


def _run(jobs: list[Job], n_jobs: int | None, bar: Bar) -> Iterator[dict[str, Any]]:
    """Yield the rows in order: here, or as soon as they are there from joblib's workers."""
    import joblib

    parallel = joblib.Parallel(n_jobs=n_jobs)
    if n_jobs == 1 or (n_jobs is None and parallel.n_jobs in (None, 1)):
        for done, job in enumerate(jobs):
            yield run_job(job, lambda share, done=done: bar.show(done + share))  # type: ignore[misc]
        return
    if getattr(parallel._backend, "supports_return_generator", False):
        parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator")
    rows = cast("Iterable[dict[str, Any]]", parallel(joblib.delayed(run_job)(job) for job in jobs))
    for done, row in enumerate(rows, start=1):
        bar.show(done)
        yield row
