"""One table (Markdown, CSV) and one plot of the results in a folder; README.md says what columns mean."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.arms import Arm, parse
from bench.models import TITLES
from fate_policy.timeline import Machine, counted

KERNEL_SHARE = 0.92
"""Of the copy engine's speed, what a kernel reads page-locked memory at: 50 of 54.4 GB/s (`fill.cu`)."""
SLOWDOWN = 1.15
"""Of a memory-bound graph while kernels copy beside it (`beside.cu`)."""

COLUMNS = {
    "group": "group",
    "arm": "arm",
    "n": "n",
    "tok_s": "tok/s",
    "range": "min-max",
    "of_resident": "of resident",
    "vs_vanilla": "x best vanilla",
    "hits": "hits",
    "all_resident": "all k",
    "ahead": "ahead/token",
    "useful": "useful",
    "predictor": "predictor",
    "mb_token": "MB/token",
    "link": "link use",
    "model": "x link model",
    "timeline": "x timeline",
    "policy_ms": "policy ms",
    "vram_gib": "VRAM GiB",
    "p512": "prompt 512",
    "p2048": "prompt 2048",
    "note": "note",
}
DECIMALS = {
    "tok_s": 1,
    "of_resident": 3,
    "vs_vanilla": 2,
    "hits": 3,
    "all_resident": 3,
    "ahead": 1,
    "useful": 3,
    "mb_token": 1,
    "link": 2,
    "model": 3,
    "timeline": 3,
    "policy_ms": 3,
    "vram_gib": 2,
    "p512": 0,
    "p2048": 0,
}


def speed(arm: dict[str, Any]) -> float | None:
    """Return the median over rounds of tokens a second."""
    return median(_speeds(arm)) if arm["rounds"] else None


def _speeds(arm: dict[str, Any]) -> list[float]:
    return [1e3 * len(sample["ms"]) / sum(sample["ms"]) for sample in arm["rounds"]]


def fraction(result: dict[str, Any], arm: dict[str, Any]) -> float | None:
    """Return the speed over the resident arm's in the same leg, in all legs if it had no round there."""
    legs = {sample["leg"] for sample in arm["rounds"]}
    resident = result["arms"].get("resident", {"rounds": []})["rounds"]
    same = [sample for sample in resident if sample["leg"] in legs] or resident
    if not same or not arm["rounds"]:
        return None
    return median(_speeds(arm)) / median(_speeds({"rounds": same}))


def _mean(arm: dict[str, Any], key: str, of: str | None = None) -> float | None:
    """Return a counter's median over rounds: for each token, or as a share of another counter."""
    values = []
    for sample in arm["rounds"]:
        counters = sample["counters"]
        per = len(sample["ms"]) if of is None else counters[of]
        if not per:
            return None
        values.append(counters[key] / per)
    return median(values) if values else None


def _hit_rate(arm: dict[str, Any]) -> float | None:
    rates = [
        c["hits"] / (c["hits"] + c["misses"])
        for c in (sample["counters"] for sample in arm["rounds"])
        if c["hits"] + c["misses"]
    ]
    return median(rates) if rates else None


def _over_vanilla(result: dict[str, Any], arm: Arm) -> float | None:
    """Return the speed over the best vanilla arm of no more VRAM, by fractions of resident if there are."""
    own, ratios = result["arms"][arm.name], []
    for name, found in result["arms"].items():
        other = parse(name)
        if other.is_vanilla and other.at in ("", arm.at):
            for of in (lambda one: fraction(result, one), speed):
                mine, theirs = of(own), of(found)
                if mine and theirs:
                    ratios.append(mine / theirs)
                    break
    return min(ratios, default=None)


def prompt_speed(arm: dict[str, Any], n: int) -> float | None:
    seconds = arm["prompts"].get(str(n))
    return n / median(seconds) if seconds else None


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one group's rows; None where a figure says nothing or was not measured."""
    made = []
    measured = median(result["link_bytes_per_second"]) if result["link_bytes_per_second"] else 0.0
    throttle = result["settings"].get("throttle")
    link, kernel = (
        min(rate, throttle * 1e9) if throttle else rate for rate in (measured, measured * KERNEL_SHARE)
    )
    for name, found in result["arms"].items():
        arm = parse(name)
        own, of_resident = speed(found), fraction(result, found)
        speeds = _speeds(found)
        bytes_token = _mean(found, "bytes") if arm.is_ours else None
        row: dict[str, Any] = {
            "group": result["group"],
            "arm": name,
            "n": len(speeds),
            "tok_s": own,
            "range": f"{min(speeds):.1f}-{max(speeds):.1f}" if speeds else None,
            "of_resident": of_resident,
            "hits": _hit_rate(found),
            "all_resident": _mean(found, "rows_all_resident", "rows") if arm.is_ours else None,
            "mb_token": None if bytes_token is None else bytes_token / 1e6,
            "vram_gib": found["vram_bytes"] / 2**30 if found.get("vram_bytes") else None,
            "p512": prompt_speed(found, 512),
            "p2048": prompt_speed(found, 2048),
            "note": _note(found),
        }
        if arm.is_ours:
            row["vs_vanilla"] = _over_vanilla(result, arm)
            row["policy_ms"] = (
                1e3 * median(s["policy_seconds"] / len(s["ms"]) for s in found["rounds"]) if speeds else None
            )
            row["predictor"] = arm.predictor
            if arm.prefetches and speeds:
                row["ahead"] = _mean(found, "prefetches")
                row["useful"] = _mean(found, "prefetch_useful", "prefetches")
            if link and own and bytes_token is not None:
                row["link"] = bytes_token * own / link
                if of_resident:
                    row["model"] = (1 / own) / (of_resident / own + bytes_token / link)
                    row["timeline"] = _over_timeline(result, found, own / of_resident, kernel)
        made.append({key: row.get(key) for key in COLUMNS})
    return made


def _over_timeline(result: dict[str, Any], found: dict[str, Any], resident: float, rate: float) -> float:
    """Return the token time over that of the lab's model, of what the arm counted; the median over rounds.

    resident : tokens a second with all experts in VRAM;  rate : bytes a second at which a kernel fills a slot
    """
    n_bytes = result["link_piece_bytes"]
    sizes = np.full(result["model"]["n_layers"], n_bytes)
    machine = Machine.of_speed(resident, rate / 1e9, sizes, slowdown=SLOWDOWN)
    return median(
        counted(sample["counters"], len(sample["ms"]), machine, n_bytes).tokens_s / own
        for sample, own in zip(found["rounds"], _speeds(found), strict=True)
    )


def _note(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"failed: {found['error']}"
    if "not_engaged" in found:
        return f"not engaged because {found['not_engaged']}"
    if "left_out" in found:
        return f"left out: {found['left_out']}"
    notes = [f"{found['threads']} threads, {found['load']}"] if found.get("load") else []
    notes += [s["policy_error"] for s in found["rounds"] if s.get("policy_error")][:1]
    return "; ".join(notes)


def _text(row: dict[str, Any], key: str) -> str:
    value = row[key]
    if value is None:
        return ""
    return f"{value:.{DECIMALS[key]}f}" if key in DECIMALS else str(value)


def _markdown(table: Sequence[dict[str, Any]]) -> str:
    cells = [list(COLUMNS.values()), *([_text(row, key) for key in COLUMNS] for row in table)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _head(result: dict[str, Any]) -> str:
    where = result["provenance"]
    gpu = where["gpu"]
    machine = (
        f"{gpu['name']}, driver {gpu['driver']}, PCIe {gpu['pcie_generation']} x{gpu['pcie_width']}"
        if gpu
        else "no GPU"
    )
    source, settings = result["routing"], result["settings"]
    link = result["link_bytes_per_second"]
    parts = [
        f"{TITLES[result['model']['name']]}, {result['model']['n_layers']} layers, "
        f"{result['model']['bytes'] / 1e9:.2f} GB",
        f"routing of {source['trace']}, {source['way']} ({source['sha256'][:12]})",
        machine,
        f"{where['cpu']}, {where['cores']} cores",
        f"commit {where['commit'][:12]}, build {where['build_id'][:12]}",
    ]
    if link:
        size = result["link_piece_bytes"] / 1e6
        parts.append(f"copies of {size:.2f} MB: {median(link) / 1e9:.2f} GB/s")
    parts += [f"{key} {settings[key]}" for key in ("kv", "throttle") if settings.get(key)]
    if told := result.get("predictions"):
        parts.append(_told(told))
    if not result["is_complete"]:
        parts.append("INCOMPLETE")
    return "; ".join(parts)


def _told(about: dict[str, Any]) -> str:
    """Return what the predictions inside the token are, and how well they name what is used."""
    recall = ", ".join(
        f"{horizon} ahead {found['at_k']:.3f} at k, {found['at_2k']:.3f} at 2k"
        for horizon, found in zip(about["horizons"], about["recall"], strict=True)
    )
    by, start = about["classifier"], about["recall_at_start"]
    return (
        f"predictor: {about['predictor']} (computed beforehand) with {by['file']} ({by['sha256'][:12]}), "
        f"recall {recall}, at the token's start {start['at_k']:.3f} and {start['at_2k']:.3f}"
    )


def load(out: Path) -> list[dict[str, Any]]:
    """Return the results in a folder, oldest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")]
    return sorted((r for r in found if "arms" in r), key=lambda r: r["provenance"]["time"])


def write(out: Path) -> str:
    """Write table.md, table.csv and, with matplotlib at hand, plot.png; return the table."""
    results = load(out)
    parts = [f"## {result['group']}\n\n{_head(result)}\n\n{_markdown(rows(result))}\n" for result in results]
    text = "\n".join(parts)
    (out / "table.md").write_text(text, encoding="utf-8")
    with (out / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for result in results:
            writer.writerows(rows(result))
    if results:
        _plot(results, out / "plot.png")
    return text


def _plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw, for each group with a resident arm, the fraction of resident speed against VRAM."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [(r, [row for row in rows(r) if row["of_resident"]]) for r in results]
    drawn = [(result, table) for result, table in drawn if len(table) > 1]
    if not drawn:
        return
    figure, axes = pyplot.subplots(1, len(drawn), figsize=(5.2 * len(drawn), 4.4), squeeze=False)
    for axis, (result, table) in zip(axes[0], drawn, strict=True):
        kinds: dict[str, list[tuple[float, float]]] = {}
        for i, row in enumerate(table):
            arm = parse(row["arm"])
            x = row["vram_gib"] if row["vram_gib"] is not None else float(i)
            kinds.setdefault(arm.kind, []).append((x, row["of_resident"]))
        for kind, points in kinds.items():
            is_vanilla = kind in ("cpu-moe", "stream", "fit", "ncmoe", "off")
            axis.plot(
                *zip(*sorted(points), strict=True), marker="o", ls=":" if is_vanilla else "-", label=kind
            )
        axis.set_title(result["group"])
        axis.set_xlabel("VRAM, GiB" if any(row["vram_gib"] for row in table) else "arm")
        axis.set_ylabel("fraction of resident speed")
        axis.set_ylim(0, 1.05)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
