"""The numbers of a run: as JSON keys, and as the summary that a person reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fate_policy.base import Geometry
from fate_policy.counters import PER_LAYER, Counters
from fate_policy.errors import FateError

_MIB = 1024 * 1024


@dataclass(frozen=True, eq=False)
class Report:
    """What one engine did, or several of the same shape one after another."""

    engaged: bool
    reason: str
    model: str
    policy: str
    mode: str
    geometry: Geometry
    counters: Counters
    pool_bytes: int
    policy_seconds: float
    seconds: float
    record: str | None = None
    policy_error: str | None = None
    bounced: str = ""
    asks: int = 0
    timeouts: int = 0
    ask_seconds: float = 0.0
    no_prefetch: str = ""
    policy_file: str | None = None
    passed_over: str | None = None
    fitted_for: str = ""

    @property
    def n_layers_engaged(self) -> int:
        return int((self.geometry.n_slots > 0).sum())


def not_engaged(policy: str, mode: str, reason: str) -> Report:
    """Return the report of a run that made no engine."""
    none = np.zeros(0, np.int32)
    geometry = Geometry(none, none, none, none.astype(np.int64))
    return Report(False, reason, "", policy, mode, geometry, Counters.zeros(0), 0, 0.0, 0.0)


def merge(reports: Sequence[Report]) -> list[Report]:
    """Add up engines of the same model and slots; the engaged come first."""
    groups: dict[Any, Report] = {}
    for report in reports:
        shape = (
            report.model,
            report.reason,
            *(np.asarray(value).tobytes() for value in vars(report.geometry).values()),
        )
        groups[shape] = _add(groups[shape], report) if shape in groups else report
    return sorted(groups.values(), key=lambda report: not report.engaged)


def _add(one: Report, two: Report) -> Report:
    sums: dict[str, Any] = {
        name: getattr(one.counters, name) + getattr(two.counters, name)
        for name in (*PER_LAYER, "tokens", "steps")
    }
    return Report(
        engaged=one.engaged,
        reason=one.reason,
        model=one.model,
        policy=one.policy,
        mode=one.mode,
        geometry=one.geometry,
        counters=Counters(**sums),
        pool_bytes=one.pool_bytes,
        policy_seconds=one.policy_seconds + two.policy_seconds,
        seconds=one.seconds + two.seconds,
        record=one.record,
        policy_error=one.policy_error or two.policy_error,
        bounced=one.bounced,
        asks=one.asks + two.asks,
        timeouts=one.timeouts + two.timeouts,
        ask_seconds=one.ask_seconds + two.ask_seconds,
        no_prefetch=one.no_prefetch or two.no_prefetch,
        policy_file=one.policy_file,
        passed_over=one.passed_over,
        fitted_for=one.fitted_for,
    )


def as_dict(report: Report) -> dict[str, Any]:
    """Return the values of `--fate-stats json`; the keys are stable.

    engaged : whether any layer ran through a pool;  reason : why not, or not in all layers; "" otherwise
    policy, mode : as configured;  policy_error : why the policy was given up for LRU, or null
    policy_file : of the fitted model that decides, or null;  fitted_for : the name of the model whose routing
        it was fitted to, "" if not known;  passed_over : a file that `auto` found worse than LRU, or null
    bounced : why a GPU gets experts through a ring of pinned memory, which is slower; "" otherwise
    no_prefetch : why nothing can be prefetched although that was asked for; "" otherwise
    layers, layers_engaged : mixture-of-experts layers of the model, and those with a pool
    slots, pool_bytes : of all layers together
    routed ... evictions, rows, rows_all_resident, bytes, prefetch..., tokens, steps, all_resident : see
        `Counters`
    policy_seconds : time spent in Python;  seconds : inside steps, Python included
    asks, timeouts, ask_seconds : callback mode on a GPU: misses about which it asked, those not answered in
        time, which LRU decided, and how long it waited
    record : the trace written, or null
    per_layer : arrays, one number for each layer: slots, experts, k, expert_bytes and the counters
    """
    counters = report.counters.as_dict()
    geometry = report.geometry
    per_layer = {
        "slots": geometry.n_slots.tolist(),
        "experts": geometry.n_experts.tolist(),
        "k": geometry.k.tolist(),
        "expert_bytes": geometry.expert_bytes.tolist(),
        **counters.pop("per_layer"),
    }
    return {
        "engaged": report.engaged,
        "reason": report.reason,
        "model": report.model,
        "policy": report.policy,
        "policy_file": report.policy_file,
        "fitted_for": report.fitted_for,
        "passed_over": report.passed_over,
        "mode": report.mode,
        "policy_error": report.policy_error,
        "bounced": report.bounced,
        "no_prefetch": report.no_prefetch,
        "layers": geometry.n_layers,
        "layers_engaged": report.n_layers_engaged,
        "slots": int(geometry.n_slots.sum()),
        "pool_bytes": report.pool_bytes,
        **counters,
        "policy_seconds": report.policy_seconds,
        "asks": report.asks,
        "timeouts": report.timeouts,
        "ask_seconds": report.ask_seconds,
        "seconds": report.seconds,
        "record": report.record,
        "per_layer": per_layer,
    }


def write(document: dict[str, Any], path: Path | None) -> None:
    """Write one line of JSON to a file, None: to stdout."""
    text = json.dumps(document)
    if path is None:
        print(text, flush=True)
        return
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise FateError(f"--fate-stats: {path} cannot be written: {error}") from error


def summary(report: Report) -> str:
    """Return the lines that a person reads after a run."""
    layers = report.geometry.n_layers
    fitted = f" by {report.policy_file}" if report.policy_file else ""
    what = f"policy {report.policy}{fitted}, {report.mode} mode"
    if not report.engaged:
        return f"fate: not engaged because {report.reason}"
    totals = report.counters.totals()
    lines = [f"fate: engaged in {report.n_layers_engaged} of {layers} MoE layers, {what}"]
    if report.passed_over:
        lines.append(
            f"  passed over   {report.passed_over}: it hit less than lru on its tests; "
            "--fate-policy classifier takes it all the same"
        )
    if report.fitted_for and report.fitted_for != report.model:
        lines.append(
            f"  fitted for    {report.fitted_for}, and this is {report.model or 'a model without a name'}"
        )
    if report.reason:
        lines.append(f"  not in all    {report.reason}")
    if report.bounced:
        lines.append(f"  slower        experts go through a ring of pinned memory: {report.bounced}")
    if report.no_prefetch:
        lines.append(f"  no prefetch   {report.no_prefetch}")
    if report.policy_error:
        lines.append(f"  policy failed {report.policy_error}; the run went on as lru")
    pooled = totals["hits"] + totals["misses"]
    lines.append(f"  slots         {_slots(report.geometry)}, a pool of {report.pool_bytes / _MIB:.1f} MiB")
    lines.append(
        f"  routed pairs  {totals['routed']}: {totals['hits']} hits{_percent(totals['hits'], pooled)}, "
        f"{totals['misses']} misses, {totals['staged'] + totals['bypassed']} past the pool"
    )
    lines.append(
        f"  fills         {totals['fills']} ({totals['seed_fills']} of them seeds), "
        f"{totals['evictions']} evictions, {totals['bytes'] / _MIB:.1f} MiB copied"
    )
    if totals["prefetches"]:
        lines.append(_prefetch(totals))
    rows, all_resident = totals["rows"], totals["rows_all_resident"]
    lines.append(
        f"  all resident  {all_resident} of {rows} rows (token, layer){_percent(all_resident, rows)}"
    )
    speed = ""
    if report.seconds > 0:
        speed = f", {totals['tokens'] / report.seconds:.0f} tokens/s"
    lines.append(
        f"  time          {totals['tokens']} tokens in {report.seconds:.2f} s{speed}; "
        f"{report.policy_seconds:.3f} s in the policy"
    )
    if report.asks:
        late = f"; {report.timeouts} not answered in time, lru decided" if report.timeouts else ""
        lines.append(
            f"  asked         {report.asks} times, {1e6 * report.ask_seconds / report.asks:.1f} us each{late}"
        )
    if report.record:
        lines.append(f"  recorded      {report.record}")
    return "\n".join(lines)


def _prefetch(totals: dict[str, int]) -> str:
    n = totals["prefetches"]
    late = f"{totals['prefetch_late']} late"
    if totals["prefetch_late"]:
        late += f" (waited {totals['prefetch_waited_ns'] / 1e6:.1f} ms)"
    return (
        f"  prefetched    {n}: {totals['prefetch_useful']} useful{_percent(totals['prefetch_useful'], n)}, "
        f"{late}, {totals['prefetch_wasted']} wasted; {totals['prefetch_cancelled']} cancelled"
    )


def _percent(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.1f} %)" if whole else ""


def _slots(geometry: Geometry) -> str:
    served = geometry.n_slots > 0
    slots, experts = geometry.n_slots[served], geometry.n_experts[served]
    if len(set(zip(slots.tolist(), experts.tolist(), strict=True))) == 1:
        return f"{slots[0]} of {experts[0]} experts in each layer"
    return f"{slots.sum()} of {experts.sum()} experts over {len(slots)} layers"
