"""Choose windows, the balance of answers and thresholds inside the training prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fate_policy import assess, train
from fate_policy.kernels import Routing, simulate_scores
from fate_policy.model import Model, chance
from fate_policy.prefetch import simulate_prefetch
from fate_policy.trace import Trace

WINDOWS = {0.25: (3, 4, 6, 8), 0.5: (6, 8, 12, 16)}
THRESHOLDS = {0.25: (0.5, 0.6, 0.65, 0.7, 0.75, 0.8), 0.5: (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)}
HELD_OUT = 1 / 3
BALANCE_GAIN = 0.001
"""What balancing must add to the hit rate: its chances are somewhat worse, and a smaller gain is noise."""

Hits = dict[tuple[float, int], float]


@dataclass(frozen=True)
class Tuned:
    """What was chosen.

    options : with the windows that hit most, balanced if that hits more by `BALANCE_GAIN`
    thresholds : of prefetch by share of slots: the one that removes most misses at no more bytes than
        `assess.PREFETCH` allows
    hit_rates : of the chosen windows by whether answers were balanced: the mean over shares of slots, and
        over scores for the token about to run and of the token before
    """

    options: train.Options
    thresholds: dict[str, float]
    hit_rates: dict[bool, float]


def tune(
    trace: Trace,
    options: train.Options,
    balanced: bool | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> Tuned:
    """Fit on the first two thirds of the prompts, choose on the last third, by hits.

    balanced : whether to balance answers; None: chosen too, at the windows that are best without
    """
    fitting, judging = train.split(trace, 1 - HELD_OUT)

    def judged(tried: train.Options) -> tuple[Model, assess.Tables, Hits]:
        fitted = train.fit([fitting], replace(tried, estimator=None), say, progress)
        tables = assess.serve(fitted, judging, progress=progress)
        return fitted, tables, _hits(fitted, judging, tables)

    given = {share: (0,) for share, window in options.heads if window == 0}
    choices = {**WINDOWS, **given}
    grid = tuple((share, window) for share, windows in choices.items() for window in windows)
    options = replace(options, heads=grid, balanced=bool(balanced))
    fitted, tables, hits = judged(options)
    heads = tuple(
        (share, max(windows, key=lambda window: hits[share, window])) for share, windows in choices.items()
    )
    options = replace(options, heads=heads)
    rates = {options.balanced: sum(hits[head] for head in heads) / len(heads)}
    if balanced is None:
        other = replace(options, balanced=True)
        other_fitted, other_tables, hits = judged(other)
        rates[True] = sum(hits.values()) / len(heads)
        if rates[True] > rates[False] + BALANCE_GAIN:
            options, fitted, tables = other, other_fitted, other_tables
    return Tuned(options, _thresholds(fitted, judging, tables, dict(heads)), rates)


def _hits(fitted: Model, judging: Trace, tables: assess.Tables) -> Hits:
    """Return the hit rate by share and window, the mean of the keep and the late head's."""
    routing = Routing.of_trace(judging)
    hits: Hits = {}
    for head in fitted.heads[1:]:
        delayed = head.kind == "late"
        result = simulate_scores(
            routing,
            assess.slots_of(judging, head.share),
            tables[head.name],
            bonus=head.bonus if delayed else 0,
            delay=int(delayed),
        )
        key = head.share, head.window
        hits[key] = hits.get(key, 0) + result.hit_rate / 2
    return hits


def _thresholds(
    fitted: Model, judging: Trace, tables: assess.Tables, windows: dict[float, int]
) -> dict[str, float]:
    routing = Routing.of_trace(judging)
    now = chance(tables["now"])
    chosen = {}
    for share, (part, default, most_bytes) in assess.PREFETCH.items():
        keep = chance(tables[f"keep {share:g}/{windows[share] or 'optimum'}"])
        slots = assess.slots_of(judging, share)
        without = simulate_prefetch(routing, slots, now, keep, per_token=0)
        best = (without.misses, default)
        for threshold in THRESHOLDS[share]:
            spent = simulate_prefetch(
                routing,
                slots,
                now,
                keep,
                threshold=threshold,
                per_token=float(fitted.shape.k.sum()) / part,
                carry_tokens=assess.CARRY_TOKENS,
            )
            if spent.bytes <= most_bytes * without.bytes:
                best = min(best, (spent.misses, threshold))
        chosen[f"{share:g}"] = best[1]
    return chosen
