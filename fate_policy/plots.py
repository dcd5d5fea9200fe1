"""Figures of the lab, drawn with matplotlib without a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fate_policy.errors import FateError

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise FateError("plots need matplotlib: run `pip install 'fate[lab]'`") from error


def figure(width: float = 7.0, height: float = 3.6) -> tuple[Figure, Any]:
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots()


def inline(drawn: Figure, title: str) -> str:
    """Return an <img> with the figure in it."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=96)
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{title}" src="data:image/png;base64,{text}">'


def _style(name: str) -> str:
    if not name.startswith(("optimum", "belady")):
        return "-"
    return "k:" if name.endswith("optional") else "k--"


def lines(curves: Mapping[str, tuple[ArrayLike, ArrayLike]], x: str, y: str, **axes: Any) -> Figure:
    """Draw curves of (x, y); those whose name starts with "optimum" are bounds."""
    drawn, axis = figure()
    for name, (at, value) in curves.items():
        axis.plot(at, value, _style(name), marker=".", lw=1, label=name)
    axis.set(xlabel=x, ylabel=y, **axes)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return drawn


def heat(values: ArrayLike, x: str, y: str, label: str) -> Figure:
    drawn, axis = figure()
    shown = axis.imshow(np.asarray(values), aspect="auto", interpolation="nearest")
    axis.set(xlabel=x, ylabel=y)
    drawn.colorbar(shown, label=label)
    return drawn


def bars(values: ArrayLike, x: str, y: str) -> Figure:
    drawn, axis = figure()
    heights = np.asarray(values)
    axis.bar(np.arange(len(heights)), heights)
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3, axis="y")
    return drawn


def save_rates(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the hit rates of `fate_policy.compare` rows against capacity, one picture for each trace."""
    names = list(dict.fromkeys(row["trace"] for row in rows))
    drawn = Figure(figsize=(7.0, 4.0 * len(names)), layout="constrained")
    grid = drawn.subplots(len(names), squeeze=False)
    for axis, name in zip(grid[:, 0], names, strict=True):
        chosen = [row for row in rows if row["trace"] == name]
        for policy, admission in dict.fromkeys((row["policy"], row["admission"]) for row in chosen):
            curve = sorted(
                (100 * row["share"], row["hit_rate"])
                for row in chosen
                if (row["policy"], row["admission"]) == (policy, admission)
            )
            label = f"{policy}, {admission}"
            axis.plot(*zip(*curve, strict=True), _style(label), marker=".", lw=1, label=label)
        axis.set(xlabel="slots, % of experts", ylabel="hit rate", title=name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    try:
        drawn.savefig(path)
    except (OSError, ValueError) as error:
        raise FateError(f"plot {path} cannot be written: {error}") from error
