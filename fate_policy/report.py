"""One page about a trace: skew, overlap, reuse, locality by layer, capacity curves, slots for a budget.

Where routers told of the layers ahead, also how much of what was used they named.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fate_policy import data, plots, recall
from fate_policy.compare import make, replay_policy
from fate_policy.errors import FateError, TraceError
from fate_policy.locality import Locality, measure
from fate_policy.plan import plan
from fate_policy.recall import Recall
from fate_policy.trace import Trace

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)
_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_CURVES = (
    ("lru", "lru", "forced"),
    ("frequency", "frequency", "forced"),
    ("optimum, forced", "optimum", "forced"),
    ("optimum, optional", "optimum", "optional"),
)


def write(
    trace: Trace, path: Path, name: str, budget: str = "50%", expert_bytes: int | None = None
) -> list[Recall]:
    """Write the page, self-contained; return what it says of in-token predictions."""
    told = recall.measure(trace)
    text = page(trace, name, budget, expert_bytes, told)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FateError(f"report {path} cannot be written: {error}") from error
    return told


def page(
    trace: Trace,
    name: str,
    budget: str = "50%",
    expert_bytes: int | None = None,
    told: Sequence[Recall] | None = None,
) -> str:
    """Return the page as HTML.

    Parameters
    ----------
    budget
        Memory or a share of all experts, as `fate_policy.plan.plan` takes it, for the recommended slots.
    expert_bytes
        Where neither the trace nor `fate_policy.data` tells; without it only a share works.
    told
        What `fate_policy.recall.measure` says of the trace. None: it is asked.
    """
    if not trace.n_tokens:
        raise FateError(f"trace {name} holds no tokens; there is nothing to report")
    found = measure(trace)
    sections = [_summary(trace, found), _skew(found), _overlap(found), _reuse(found), _layers(trace)]
    if told := recall.measure(trace) if told is None else told:
        sections.append(_ahead(told))
    sections += [_capacity(trace), _slots(trace, budget, expert_bytes)]
    title = f"Routing of {html.escape(name)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _section(title: str, text: str, *figures: str) -> str:
    return f"<h2>{title}</h2>\n<p>{text}</p>\n" + "\n".join(figures)


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _range(values: list[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"


def _summary(trace: Trace, found: Locality) -> str:
    meta = trace.meta
    rows = [
        ["model", str(meta.get("model", "unknown"))],
        ["tokens", f"{trace.n_tokens:,} in {len(trace.prompt_start):,} sequences"],
        ["generated", f"{int(trace.is_decode.sum()):,}"],
        ["layers", str(trace.n_layers)],
        ["experts, used for a token", f"{_range(meta['n_experts'])}, {_range(meta['k'])}"],
        ["uses", f"{int(found.uses.sum()):,}"],
        ["source, licence", f"{meta.get('repo', 'own recording')}, {meta.get('licence', 'unknown')}"],
        ["SHA-256 of the routing", trace.hash()],
    ]
    return _table(["", ""], rows)


def _skew(found: Locality) -> str:
    share = -np.sort(-found.uses, axis=1) / np.maximum(found.uses.sum(axis=1, keepdims=True), 1)
    gini = found.gini()
    text = (
        "Each layer's experts by their share of its uses. Gini coefficient: 0 = all alike, near 1 = a few do "
        f"all; here {gini.min():.2f} to {gini.max():.2f}. Skew favours frequency over recency."
    )
    return _section(
        "Skew",
        text,
        plots.inline(plots.heat(share, "experts, most used first", "layer", "share of uses"), "skew"),
        plots.inline(plots.bars(gini, "layer", "Gini coefficient"), "Gini coefficient by layer"),
    )


def _overlap(found: Locality) -> str:
    mean = found.repeated.mean()
    text = f"Share of a token's experts that the token before it used too: {mean:.2f} on average."
    drawn = plots.bars(found.repeated, "layer", "repeated at the next token")
    return _section("Overlap", text, plots.inline(drawn, "overlap by layer"))


def _reuse(found: Locality) -> str:
    gap = found.gap[:, 1:].sum(axis=0)
    depth = found.depth[:, :-1].sum(axis=0)
    total = max(int(found.uses.sum()), 1)
    median = int(np.searchsorted(gap.cumsum(), gap.sum() / 2)) + 1
    text = (
        f"The median use comes {median} tokens after the last use of the same expert. Left of a number of "
        "other experts in the second picture lies what LRU with so many slots would hit."
    )
    shown = slice(0, len(gap) - 1)  # the last bin holds all longer gaps
    by_token = plots.lines(
        {"all layers": (np.arange(1, len(gap)), (gap.cumsum() / total)[shown])},
        "tokens since the last use",
        "share of uses",
        xscale="log",
    )
    by_depth = plots.lines(
        {"all layers": (np.arange(len(depth)), depth.cumsum() / total)},
        "other experts used since",
        "share of uses",
    )
    return _section(
        "Reuse distance",
        text,
        plots.inline(by_token, "reuse distance in tokens"),
        plots.inline(by_depth, "reuse distance in experts"),
    )


def _slots_at(trace: Trace, share: float) -> NDArray[np.int64]:
    n_experts = np.array(trace.meta["n_experts"])
    slots: NDArray[np.int64] = np.maximum((n_experts * share).astype(np.int64), trace.meta["k"])
    return slots


def _layers(trace: Trace) -> str:
    slots = _slots_at(trace, 0.25)
    curves = {}
    for name, policy, admission in _CURVES[:3]:
        counters = replay_policy(trace, make(policy), slots, admission=admission).counters
        rate = counters.hits / np.maximum(counters.hits + counters.misses, 1)
        curves[name] = (np.arange(trace.n_layers), rate)
    text = "Hit rate of each layer with slots for a quarter of its experts."
    drawn = plots.lines(curves, "layer", "hit rate")
    return _section("Locality by layer", text, plots.inline(drawn, "hit rate by layer"))


def _ahead(told: Sequence[Recall]) -> str:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    head = ["layers before", "of", "uses", "first k", "first 2k", "token before"]
    rows = []
    for one in told:
        for name, named in (("all", one.used), ("absent", one.absent)):
            if named is not None:
                rows.append([str(one.horizon), name, f"{named.n:,}", *map(share, named.shares())])
    text = (
        "Recall of what the routers named of the layers ahead: the share of uses whose expert was among the "
        "first k or 2k named, k being the experts of a token; last, what naming the experts of the token "
        "before would have recalled. Absent are experts that plain LRU, with the slots of the recording, "
        "does not hold before the token: only there can bringing in ahead help."
    )
    return _section("Predictions inside the token", text, _table(head, rows))


def _capacity(trace: Trace) -> str:
    rates: dict[str, list[float]] = {}
    for name, policy, admission in _CURVES:
        for share in _SHARES:
            counted = replay_policy(trace, make(policy), _slots_at(trace, share), admission=admission)
            rates.setdefault(name, []).append(counted.hit_rate)
    percent = [100 * share for share in _SHARES]
    drawn = plots.lines(
        {name: (percent, values) for name, values in rates.items()}, "slots, % of experts", "hit rate"
    )
    head = ["", *(f"{value:g} %" for value in percent)]
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in rates.items()]
    text = (
        "No policy that must admit what it misses is above the forced optimum; none that may use a missed "
        "expert once from a scratch slot is above the optional one."
    )
    return _section("Hit rate by capacity", text, plots.inline(drawn, "capacity curves"), _table(head, rows))


def _slots(trace: Trace, budget: str, expert_bytes: int | None) -> str:
    size = data.expert_bytes(trace, expert_bytes)
    if size is None:
        if not budget.endswith("%"):
            raise TraceError(
                f"budget {budget}: the trace does not tell an expert's bytes; give them, or a share"
            )
        size = np.ones(trace.n_layers, np.int64)
    solved = plan([trace], budget, size)
    layers = np.arange(trace.n_layers)
    drawn = plots.lines(
        {"recommended": (layers, solved.slots), "equal": (layers, solved.equal)}, "layer", "slots"
    )
    rates = [replay_policy(trace, make("lru"), slots).hit_rate for slots in (solved.equal, solved.slots)]
    text = (
        f"For {html.escape(budget)}, under LRU: equal slots hit {rates[0]:.3f}, these {rates[1]:.3f} of the "
        "uses of this very trace. `fate plan` shows what they gain on others and writes the configuration."
    )
    slots = f"<pre>slots: [{', '.join(map(str, solved.slots.tolist()))}]</pre>"
    return _section("Slots per layer", text, plots.inline(drawn, "slots per layer"), slots)
