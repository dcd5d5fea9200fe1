"""Where the time of a token goes on a GPU, layer by layer: compute, copies waited for, prefetch beside them.

    python -m bench.timeline --model qwen3 --arms lru@50 classifier+both@50

Arms, models, routing and what `--prepare` made are those of `python -m bench`. Printed are means over the
tokens; the plot shows the token whose time is the median. Reading the clock at every token waits for the GPU,
so tokens do not follow each other as fast as in a run: only what happens within one is told.
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import __main__ as command
from bench import arms
from bench.models import SHAPES, Models
from bench.runner import FIRST_ROW, POOL_WARM_UP
from bench.worker import _Arm

OP_BEGAN, OP_COPIES, OP_DONE, PLANNED, WATCHED, LEFT, BEGUN, COMPLETE = 0, 1, 2, 3, 4, 5, 6, 22
ENTRIES = 16
"""Columns of `Session.times`, by FATE_TIME_* of fate.h."""

_A_WAIT = 20.0
"""Microseconds from which a layer is said to wait for copies."""


@dataclass(frozen=True, eq=False)
class Token:
    """What happened in one token, in microseconds since its first layer's op.

    op : (n_layers, 2), from when a layer knows its experts until it has them
    planned : (n_layers,), when the layer was first planned for, NaN: not at all
    copies : (n, 3): layer, begun, complete, of experts that were brought in beside the step
    watched : when the first of those that copy came and the last left, NaN: nobody did
    """

    op: NDArray[np.float64]
    planned: NDArray[np.float64]
    copies: NDArray[np.float64]
    watched: NDArray[np.float64]

    @property
    def span(self) -> float:
        return float(self.op[-1, 1])

    @property
    def waiting(self) -> NDArray[np.float64]:
        return self.op[:, 1] - self.op[:, 0]


def token_of(times: NDArray[np.int64]) -> Token:
    """Read `Session.times`."""
    since = times[0, OP_BEGAN]

    def told(column: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.where(column > 0, (column - since) / 1e3, np.nan)

    began = told(times[:, OP_BEGAN])
    done = np.where(times[:, OP_DONE] > 0, told(times[:, OP_DONE]), began)  # a hit is done when it begins
    begun = told(times[:, BEGUN : BEGUN + ENTRIES])
    complete = told(times[:, COMPLETE : COMPLETE + ENTRIES])
    layer, entry = np.nonzero(~np.isnan(begun) & ~np.isnan(complete))
    copies = np.column_stack((layer.astype(np.float64), begun[layer, entry], complete[layer, entry]))
    return Token(
        np.column_stack((began, done)),
        told(times[:, PLANNED]),
        copies,
        told(times[0, [WATCHED, LEFT]]),
    )


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def summary(tokens: list[Token]) -> dict[str, float]:
    """Return means over tokens, in microseconds; "lead": from a layer's first plan to its op."""
    leads = np.concatenate([token.op[:, 0] - token.planned for token in tokens])
    copies = np.concatenate([token.copies for token in tokens])
    watched = np.array([token.watched for token in tokens])
    return {
        "span": float(np.mean([token.span for token in tokens])),
        "waiting": float(np.mean([token.waiting.sum() for token in tokens])),
        "layers that wait": float(np.mean([(token.waiting > _A_WAIT).sum() for token in tokens])),
        "watched from": _mean(watched[:, 0]),
        "watched to": _mean(watched[:, 1]),
        "planned layers": float(np.mean([(~np.isnan(token.planned)).sum() for token in tokens])),
        "lead": _mean(leads),
        "copies": len(copies) / len(tokens),
        "a copy": _mean(copies[:, 2] - copies[:, 1]),
    }


def plot(found: dict[str, list[Token]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(found), 1, figsize=(12, 2.6 * len(found)), squeeze=False, sharex=True)
    for axis, (name, tokens) in zip(axes[:, 0], found.items(), strict=True):
        token = sorted(tokens, key=lambda one: one.span)[len(tokens) // 2]
        for layer, (began, done) in enumerate(token.op):
            before = token.op[layer - 1, 1] if layer else began
            axis.broken_barh([(before, began - before)], (0, 1), color="tab:blue")
            axis.broken_barh([(began, done - began)], (1, 1), color="tab:red")
        for layer, begun, complete in token.copies:
            axis.broken_barh([(begun, complete - begun)], (2 + layer % 4 / 4, 0.25), color="tab:green")
        axis.plot(token.planned, np.full(len(token.planned), 3.2), "k|", markersize=5)
        axis.set_yticks([0.5, 1.5, 2.5, 3.2], ["compute", "waiting", "prefetch", "planned"])
        axis.set_title(f"{name}: {token.span:.0f} us from the first layer's experts to the last's")
    axes[-1, 0].set_xlabel("microseconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _measure(pipe: Any, model: str, routing: str, job: dict[str, Any], n: int) -> None:
    arm = _Arm(model, routing, {**job, "times": True})
    arm.decode(FIRST_ROW, 1, POOL_WARM_UP)
    found = []
    for i in range(n):
        arm.decode_one(FIRST_ROW + 1 + i)
        found.append(arm.session.times())
    arm.close()
    pipe.send(np.array(found))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen3")
    parser.add_argument("--arms", nargs="+", default=["lru@50", "oracle2@50"], metavar="ARM")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--models", type=Path, default=command.MODELS)
    parser.add_argument("--prepared", type=Path, default=Path("bench-prepared"))
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    args = parser.parse_args(argv)
    shape, model = Models(args.models).get(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    routing, settings = command.prepared(args.model, args.arms, args.out, args.prepared, args.tokens)
    found: dict[str, list[Token]] = {}
    context = multiprocessing.get_context("spawn")
    for name in args.arms:
        job = arms.job(arms.parse(name), shape, settings, {})
        ours, theirs = context.Pipe()
        process = context.Process(target=_measure, args=(theirs, str(model), str(routing), job, args.tokens))
        process.start()
        theirs.close()
        found[name] = [token_of(times) for times in ours.recv()]
        process.join()
        told = ", ".join(f"{what} {value:.1f}" for what, value in summary(found[name]).items())
        print(f"{name}: {told}", flush=True)
    plot(found, args.out / f"timeline-{args.model}.png")


if __name__ == "__main__":
    main()
