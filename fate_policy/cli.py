"""The lab's commands: `fate replay`, `fate report`, `fate plan`. None needs the native library."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fate_policy import checks, data
from fate_policy.config import AUTO, PREFETCHES, Slots
from fate_policy.errors import FateError, PolicyConfigError, TraceError
from fate_policy.prefetch_rule import Prefetch

COMMANDS = {
    "replay": "replay routing traces: policies x capacities x traces in one table",
    "report": "write one HTML page about a trace",
    "train": "fit the classifier on a trace and hold it against the simple rules",
    "plan": "share a memory budget out over the layers",
}

_Rows = Sequence[Mapping[str, Any]]


def main(command: str, argv: Sequence[str]) -> int:
    """Run one of COMMANDS and return its exit code; errors are `FateError`s."""
    parser = argparse.ArgumentParser(f"fate {command}", description=COMMANDS[command] + ".")
    arguments, run = _PARTS[command]
    arguments(parser)
    return run(parser.parse_args(list(argv)))


def memory(text: str) -> int:
    """Read bytes: 13253760, 2.7MB, 4GiB."""
    try:
        slots = Slots.parse(text if not text.isdecimal() else f"{text}B")
    except PolicyConfigError:
        slots = Slots("none")
    if slots.kind != "bytes":
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 13253760, 2.7MB or 4GiB")
    return int(slots.values[0])


def listed(text: str) -> list[str]:
    """Read "a,b,c"."""
    return [item.strip() for item in text.split(",") if item.strip()]


def add_traces(parser: argparse.ArgumentParser, *, several: bool = True) -> None:
    """Add TRACE and --traces to a command."""
    parser.add_argument(
        "trace",
        nargs="+" if several else None,
        metavar="TRACE",
        help="a recorded trace, or a name such as gptoss20b_stem",
    )
    parser.add_argument(
        "--traces",
        metavar="DIR",
        help=f"folder in which names are looked for (default: {data.FOLDER_VARIABLE})",
    )


def add_expert_bytes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expert-bytes",
        type=memory,
        metavar="SIZE",
        help="size of one expert (default: as the trace tells, or is known of its model)",
    )


def _replay_arguments(parser: argparse.ArgumentParser) -> None:
    add_traces(parser)
    parser.add_argument(
        "--policy",
        type=listed,
        default=["lru", "frequency", "optimum"],
        metavar="NAME,...",
        help="as `fate policies` lists them, with parameters as in frequency:half_life_tokens=64+lfru=true; "
        "lfu (all-time counts), lfru, optimum; the policy of a .yaml file; default: lru,frequency,optimum",
    )
    parser.add_argument(
        "--capacity",
        type=listed,
        default=["12.5%", "25%", "50%", "75%"],
        metavar="SLOTS,...",
        help="25%%, 8, 4GiB, auto, or a .yaml file with slots; default: 12.5%%,25%%,50%%,75%%",
    )
    parser.add_argument("--pool", choices=("layer", "global"), default="layer")
    parser.add_argument("--admission", choices=("forced", "optional"), default="forced")
    parser.add_argument("--cold", action="store_true", help="empty the cache at each prompt")
    parser.add_argument(
        "--no-sync",
        dest="sync",
        action="store_false",
        help="scores act a step later, as those of Python policies in a run do by default (sync: false), but "
        "not the classifier's, which the engine evaluates for the very token",
    )
    parser.add_argument(
        "--refresh-tokens", type=int, default=1, metavar="N", help="new scores every N tokens (default: 1)"
    )
    parser.add_argument(
        "--prefetch",
        choices=[kind for kind in PREFETCHES if kind != AUTO],
        default="off",
        help="bring in before its layer, as a run with sync does, what the policy predicts (token), what the "
        "routers of earlier layers told while the trace was recorded (layer), or both (default: off)",
    )
    parser.add_argument(
        "--prefetch-threshold",
        type=float,
        default=Prefetch.threshold,
        metavar="CHANCE",
        help=f"of experts at least so likely (default: {Prefetch.threshold})",
    )
    parser.add_argument(
        "--prefetch-experts",
        type=int,
        default=Prefetch.experts,
        metavar="N",
        help=f"at most N of a layer and token (default: {Prefetch.experts})",
    )
    add_expert_bytes(parser)
    parser.add_argument(
        "--link", type=float, default=50.0, metavar="GB/S", help="speed of the link (default: 50)"
    )
    parser.add_argument(
        "--resident",
        type=float,
        metavar="TOKENS/S",
        help="speed with all experts resident; adds the share of it that is left",
    )
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw hit rate against capacity, with the optimum's curves"
    )
    parser.add_argument("-j", "--jobs", type=int, default=1, metavar="N", help="workers; -1 = all cores")


def _replay(args: argparse.Namespace) -> int:
    from fate_policy.compare import compare

    if not args.link > 0:
        raise FateError(f"--link {args.link}: expected a number of GB/s greater than 0")
    if args.resident is not None and not args.resident > 0:
        raise FateError(f"--resident {args.resident}: expected a number of tokens/s greater than 0")
    if args.jobs == 0:
        raise FateError("--jobs 0: expected a number of workers, or -1 for all cores")
    if args.plot is not None:
        checks.target("plot", args.plot)
    kind = Prefetch.kind if args.prefetch == "off" else args.prefetch
    prefetch = Prefetch(args.prefetch_threshold, args.prefetch_experts, kind)
    common: dict[str, Any] = {
        "pool": args.pool,
        "cold": args.cold,
        "expert_bytes": args.expert_bytes,
        "link_gb_s": args.link,
        "resident_tokens_s": args.resident,
        "sync": args.sync,
        "refresh_tokens": args.refresh_tokens,
        "prefetch": prefetch if args.prefetch != "off" else None,
        "folder": args.traces,
        "n_jobs": args.jobs,
        "progress": sys.stderr.isatty(),
    }
    rows = compare(args.trace, args.policy, args.capacity, admission=args.admission, **common)
    print_rows(rows, args.format, _columns(rows))
    if args.plot is not None:
        from fate_policy.plots import save_rates

        bounds = [
            row
            for admission in ("forced", "optional")
            if (args.admission, "optimum" in args.policy) != (admission, True)
            for row in compare(args.trace, ["optimum"], args.capacity, admission=admission, **common)
        ]
        save_rates([*rows, *bounds], args.plot)
    return 0


def _columns(rows: _Rows) -> list[str]:
    from fate_policy.compare import COLUMNS

    return [
        *COLUMNS,
        *(name for name in ("prefetched_per_token", "useful", "of_resident") if rows and name in rows[0]),
    ]


def print_rows(rows: _Rows, form: str, columns: Sequence[str]) -> None:
    """Print rows as text or csv with these columns, or as json with all."""
    if form == "json":
        json.dump(list(rows), sys.stdout, indent=2)
        print()
    elif form == "csv":
        writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        cells = [list(columns), *([_cell(row[name]) for name in columns] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        words = [not rows or isinstance(rows[0][name], str) for name in columns]
        for row in cells:
            parts = zip(row, widths, words, strict=True)
            print("  ".join(f"{t:<{w}}" if left else f"{t:>{w}}" for t, w, left in parts).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}" if value < 1e6 else f"{value / 1e6:.2f}M"
        )
    return str(value)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    add_traces(parser, several=False)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME.html here")
    parser.add_argument(
        "--budget",
        default="50%",
        metavar="SIZE",
        help="for the recommended slots: 4GiB or 25%%; default: 50%%",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="of what is printed beside the page"
    )
    add_expert_bytes(parser)


def _report(args: argparse.Namespace) -> int:
    from fate_policy import recall, report, trace

    path = data.find(args.trace, args.traces)
    output = checks.target("report", args.output or Path(f"{path.stem}.html"), [path])
    told = report.write(trace.load(path), output, path.stem, args.budget, args.expert_bytes)
    rows = [one.as_dict() for one in told]
    if args.format == "json":
        json.dump({"page": str(output), **({"recall": rows} if rows else {})}, sys.stdout, indent=2)
        print()
    else:
        print(f"wrote {output}")
        if rows:
            print_rows(rows, "text", recall.COLUMNS)
    return 0


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from fate_policy import train_command

    train_command.arguments(parser)


def _train(args: argparse.Namespace) -> int:
    from fate_policy import train_command

    return train_command.run(args)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trace", nargs="+", required=True, metavar="TRACE", help="what it is solved on; a file or a name"
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="TRACE",
        help="what its gain is shown on (default: it is solved on the first half of the prompts of each "
        "trace, and shown on the second)",
    )
    parser.add_argument("--traces", metavar="DIR", help="folder in which names are looked for")
    parser.add_argument("--budget", required=True, metavar="SIZE", help="4GiB, or 25%% of all experts")
    parser.add_argument("--policy", default="lru", metavar="NAME", help="whose hits count; default: lru")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the YAML is printed")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text", help="of the gain")
    add_expert_bytes(parser)


def _plan(args: argparse.Namespace) -> int:
    from fate_policy import trace
    from fate_policy.plan import gain, plan

    paths, others = ([data.find(name, args.traces) for name in names] for names in (args.trace, args.test))
    if args.output is not None:
        checks.target("plan", args.output, [*paths, *others])
    solved_on = [(path.stem, trace.load(path)) for path in paths]
    shown_on = [(path.stem, trace.load(path)) for path in others]
    if not shown_on:
        halves = [(name, *halved(name, whole)) for name, whole in solved_on]
        solved_on = [(f"{name} (first half)", first) for name, first, _ in halves]
        shown_on = [(f"{name} (second half)", second) for name, _, second in halves]
    size = data.expert_bytes(solved_on[0][1], args.expert_bytes)
    if size is None:
        raise TraceError(f"trace {solved_on[0][0]} does not tell an expert's bytes; give --expert-bytes")
    solved = plan([routed for _, routed in solved_on], args.budget, size, args.policy)
    text = solved.yaml(args.policy.partition(":")[0], [name for name, _ in solved_on])
    rows = gain(solved, shown_on, [args.policy])
    if args.output is None:
        print(text, file=sys.stdout if args.format == "text" else sys.stderr)
    else:
        try:
            args.output.write_text(text, encoding="utf-8")
        except OSError as error:
            raise FateError(f"plan {args.output} cannot be written: {error}") from error
    print_rows(rows, args.format, ("trace", "policy", "equal", "planned"))
    return 0


def halved(name: str, routed: Any) -> tuple[Any, Any]:
    """Return the first and the second half of a trace's prompts."""
    starts = routed.prompt_start
    if len(starts) < 2:
        raise TraceError(f"trace {name} holds one prompt, which cannot be split; give another as --test")
    middle = int(starts[len(starts) // 2])
    return routed.slice(0, middle), routed.slice(middle, routed.n_tokens)


_Part = tuple[Callable[[argparse.ArgumentParser], Any], Callable[[argparse.Namespace], int]]
_PARTS: dict[str, _Part] = {
    "replay": (_replay_arguments, _replay),
    "report": (_report_arguments, _report),
    "plan": (_plan_arguments, _plan),
    "train": (_train_arguments, _train),
}
