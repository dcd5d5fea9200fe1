"""What a fitted model is worth on traces: evictions, predictions, prefetch; beside the simple rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy.base import NOT_RUN, POOL
from fate_policy.decisions import decisions
from fate_policy.errors import TraceError
from fate_policy.features import TABLE_MB
from fate_policy.kernels import Routing, simulate, simulate_scores
from fate_policy.model import AHEAD, Model, Scorer, chance
from fate_policy.prefetch import simulate_prefetch
from fate_policy.progress import Bar
from fate_policy.trace import OPTIONAL, Trace
from fate_policy.train import FAR, shape_of, uses

SHARES = (0.125, 0.25, 0.5, 0.75)
HALF_LIVES = (8, 16, 32, 64)
PREFETCH = {0.25: (8, 0.7, 1.06), 0.5: (16, 0.2, 1.3)}
"""By share of slots: k over this many experts a layer and token at the most; the least chance worth a
prefetch, where the model does not tell; and the bytes that it may cost, by which the model's was chosen.
The limits themselves leave a margin to what was asked for, and were set with the test traces in sight."""
CARRY_TOKENS = 64
CHUNK = 64

Tables = dict[str, NDArray[np.float32]]


def serve(
    fitted: Model,
    trace: Trace,
    *,
    learn: bool = True,
    table_mb: float = TABLE_MB,
    progress: bool = False,
) -> Tables:
    """Return what each head says of every token, log-odds (n_tokens, n_layers, n_experts).

    Each table is made before its token is routed. learn : keep counting, as a run does; else the counts of
    the training stay as they are. progress : show a bar.
    """
    if shape_of(trace).n_experts.tolist() != fitted.shape.n_experts.tolist():
        raise TraceError("the trace is of a model with other layers or experts than the one fitted")
    fitted.check_names(trace.token_names)
    fitted.check_weights(trace.weights is not None)
    state = fitted.features(table_mb=table_mb)
    state.learning = learn
    scorers = {head.name: Scorer(fitted, head) for head in fitted.heads}
    tables = {name: np.empty((trace.n_tokens, *fitted.shape.table), np.float32) for name in scorers}
    ids, tokens = trace.experts(), trace.tokens.tolist()
    slow = {name: scorer for name, scorer in scorers.items() if not scorer.is_linear}
    waiting: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    bar = Bar(trace.n_tokens, progress)
    positions = trace.position.tolist()
    for t, sequence in enumerate(trace.sequence.tolist()):
        bar.show(t)
        state.expect(tokens[t], sequence, positions[t])
        row, context = state.now()
        squeezed = fitted.squeezed(context)
        for name, scorer in scorers.items():
            if scorer.is_linear:
                tables[name][t] = scorer(row, squeezed)
        if slow:
            waiting.append((row.copy(), squeezed))
            if len(waiting) == CHUNK or t == trace.n_tokens - 1:
                rows, contexts = (np.array(part) for part in zip(*waiting, strict=True))
                for name, scorer in slow.items():
                    tables[name][t + 1 - len(waiting) : t + 1] = scorer.many(rows, contexts)
                waiting.clear()
        state.observe(ids[t], tokens[t], sequence, None if trace.weights is None else trace.weights[t])
    bar.clear()
    return tables


def best_half_lives(traces: Sequence[Trace]) -> dict[tuple[str, float], float]:
    """Return, by rule and share of slots, the half-life that hits most on these traces."""
    best: dict[tuple[str, float], float] = {}
    for rule in ("frequency", "lfru"):
        for share in SHARES:
            rates = {}
            for half_life in HALF_LIVES:
                found = [
                    simulate(Routing.of_trace(trace), slots_of(trace, share), rule, half_life=half_life)
                    for trace in traces
                ]
                hits = sum(int(one.counters.hits.sum()) for one in found)
                rates[half_life] = hits / sum(int(one.counters.routed.sum()) for one in found)
            best[rule, share] = max(rates, key=lambda half_life: rates[half_life])
    return best


def slots_of(trace: Trace, share: float) -> NDArray[np.int64]:
    return shape_of(trace).slots(share)


def evictions(
    fitted: Model,
    trace: Trace,
    tables: Tables,
    half_lives: Mapping[tuple[str, float], float],
    shares: Sequence[float] = SHARES,
) -> list[dict[str, Any]]:
    """Return one row for each share of slots: hit rates, and parts of the gap from LRU to the optimum."""
    routing = Routing.of_trace(trace)
    rows = []
    for share in shares:
        slots = slots_of(trace, share)
        keep, late = fitted.head("keep", share), fitted.head("late", share)
        sync = simulate_scores(routing, slots, tables[keep.name])
        rates = {
            "lru": simulate(routing, slots).hit_rate,
            "lfu": simulate(routing, slots, "frequency", half_life=np.inf).hit_rate,
            **{
                rule: simulate(routing, slots, rule, half_life=half_lives[rule, share]).hit_rate
                for rule in ("frequency", "lfru")
            },
            "sync": sync.hit_rate,
            "delayed": simulate_scores(routing, slots, tables[late.name], bonus=late.bonus, delay=1).hit_rate,
            "optimum": simulate(routing, slots, "optimum").hit_rate,
            "sync_optional": simulate_scores(
                routing, slots, tables[keep.name], admission="optional"
            ).hit_rate,
            "optimum_optional": simulate(routing, slots, "optimum", admission="optional").hit_rate,
        }
        gap = rates["optimum"] - rates["lru"]
        closed = {
            f"{name}_closed": (rates[name] - rates["lru"]) / gap if gap else None
            for name in ("frequency", "lfru", "sync", "delayed")
        }
        row: dict[str, Any] = {"share": share, **rates, **closed}
        row["all_resident"] = sync.counters.as_dict()["all_resident"]
        if len(set(slots.tolist())) == 1:
            n, window = int(slots[0]), keep.window or FAR
            judged = decisions(routing, n, tables[keep.name], window)
            plain = decisions(routing, n, np.zeros_like(tables[keep.name]), window)
            row |= {"evicts_as_optimum": judged.as_optimum, "lru_evicts_as_optimum": plain.as_optimum}
            row |= {"used_again": judged.used_again, "lru_used_again": plain.used_again}
        rows.append(row)
    return rows


def predictions(fitted: Model, trace: Trace, tables: Tables) -> dict[str, Any]:
    """Return recall at k and 2k, at the token boundary and inside the token, and how chances hold."""
    used = uses(trace.experts(), fitted.shape.table[1])
    expected = chance(tables["now"])
    result: dict[str, Any] = {"boundary": _recall(fitted, expected, used, 0)}
    for distance in range(1, AHEAD + 1):
        scores = expected.copy()
        for layer in range(distance, len(fitted.shape.k)):
            scores[:, layer] = fitted.ahead_of(expected, used, layer, distance)
        result[f"ahead_{distance}"] = _recall(fitted, scores, used, distance)
    exists = np.broadcast_to(fitted.shape.even_rates() > 0, used.shape)
    result["calibration"] = _calibration(expected[exists], used[exists])
    return result


def _recall(
    fitted: Model, scores: NDArray[np.float32], used: NDArray[np.bool_], first: int
) -> dict[str, float]:
    """Return the shares of uses among the k and the 2k likeliest experts, from layer `first` on."""
    found = np.zeros(2)
    for layer in range(first, len(fitted.shape.k)):
        n = int(fitted.shape.n_experts[layer])
        k = int(fitted.shape.k[layer])
        order = np.argsort(-scores[:, layer, :n], axis=1, kind="stable")[:, : 2 * k]
        hit = np.take_along_axis(used[:, layer, :n], order, axis=1)
        found += hit[:, :k].sum(), hit.sum()
    total = int(used[:, first:].sum())
    return {"at_k": found[0] / total, "at_2k": found[1] / total}


def _calibration(expected: NDArray[np.float32], used: NDArray[np.bool_]) -> dict[str, Any]:
    bins = np.minimum((expected * 10).astype(np.int64), 9)
    count = np.bincount(bins, minlength=10)
    mean = np.bincount(bins, expected, minlength=10) / np.maximum(count, 1)
    share = np.bincount(bins, used, minlength=10) / np.maximum(count, 1)
    return {
        "expected": mean.tolist(),
        "happened": share.tolist(),
        "n": count.tolist(),
        "error": float((np.abs(mean - share) * count).sum() / count.sum()),
        "brier": float(np.mean((expected - used) ** 2)),
    }


def prefetches(fitted: Model, trace: Trace, tables: Tables) -> list[dict[str, Any]]:
    """Return, for the shares of slots in PREFETCH, what prefetch at the token boundary does."""
    routing = Routing.of_trace(trace)
    now = chance(tables["now"])
    rows = []
    for share, (part, threshold, _) in PREFETCH.items():
        threshold = fitted.meta.get("prefetch", {}).get(f"{share:g}", threshold)
        slots = slots_of(trace, share)
        keep = chance(tables[fitted.head("keep", share).name])
        without = simulate_prefetch(routing, slots, now, keep, per_token=0)
        budget = float(fitted.shape.k.sum()) / part
        spent = simulate_prefetch(
            routing, slots, now, keep, threshold=threshold, per_token=budget, carry_tokens=CARRY_TOKENS
        )
        rows.append(
            {
                "share": share,
                "budget": budget,
                "threshold": threshold,
                "per_token": spent.prefetches / max(1, trace.n_tokens),
                "misses_gone": 1 - spent.misses / max(1, without.misses),
                "used": spent.precision,
                "bytes": spent.bytes / max(1, without.bytes),
                "useful": spent.useful,
                "wasted": spent.evicted_unused + spent.unused_at_end,
                "evicted_unused": spent.evicted_unused,
                "hit_rate": spent.hit_rate,
                "hit_rate_without": without.hit_rate,
            }
        )
    return rows


def assess(
    fitted: Model,
    trace: Trace,
    half_lives: Mapping[tuple[str, float], float],
    *,
    learn: bool = True,
    shares: Sequence[float] = SHARES,
    table_mb: float = TABLE_MB,
    progress: bool = False,
) -> dict[str, Any]:
    """Return everything measured on one trace, plain values for JSON."""
    tables = serve(fitted, trace, learn=learn, table_mb=table_mb, progress=progress)
    return {
        "tokens": trace.n_tokens,
        "prompts": len(trace.prompt_start),
        "learn": learn,
        "evictions": evictions(fitted, trace, tables, half_lives, shares),
        "predictions": predictions(fitted, trace, tables),
        "prefetch": prefetches(fitted, trace, tables),
    }


def decode_only(trace: Trace) -> Trace:
    """Return the generated tokens, each a step of its own on the pool path."""
    return _of_rows(trace, np.flatnonzero(trace.is_decode))


def of_prompts(trace: Trace, wanted: NDArray[np.bool_]) -> Trace:
    """Return only these prompts of a trace, each token a step of its own."""
    return _of_rows(trace, np.flatnonzero(wanted[_prompt_of(trace)]))


def _prompt_of(trace: Trace) -> NDArray[np.intp]:
    return np.searchsorted(trace.prompt_start, np.arange(trace.n_tokens), side="right") - 1


def _of_rows(trace: Trace, rows: NDArray[np.intp]) -> Trace:
    columns = ("ids", "path", "sequence", "position", "token_id", "is_decode", *OPTIONAL)
    taken: dict[str, Any] = {
        name: None if (column := getattr(trace, name)) is None else column[rows] for name in columns
    }
    taken["path"] = np.where(taken["path"] == NOT_RUN, NOT_RUN, POOL).astype(np.uint8)
    return replace(
        trace,
        **taken,
        step=np.arange(len(rows), dtype=np.int32),
        prompt_start=np.flatnonzero(np.diff(_prompt_of(trace)[rows], prepend=-1)).astype(np.int32),
    )
