"""`python -m bench`: models, routing, groups of arms, one table, one plot. See README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import ahead, models, provenance, report
from bench.groups import GROUPS, Group
from bench.models import SHAPES, Models, Shape
from bench.routing import Routing, as_trace, routing, without_last
from bench.runner import Plan, Run
from fate_policy.errors import FateError

FIT_TOKENS = 6000
MODELS = Path(tempfile.gettempdir()) / "fate-bench"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="results of all groups")
    parser.add_argument("--group", nargs="+", choices=sorted(GROUPS), metavar="NAME", help="only these")
    parser.add_argument("--list", action="store_true", help="print groups and arms, run nothing")
    parser.add_argument(
        "--report", action="store_true", help="table and plot of what is in --out, run nothing"
    )
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="fit the classifiers into --prepared, and predict with them; needs scikit-learn",
    )
    parser.add_argument("--write", action="store_true", help="write the models of the groups, run nothing")
    parser.add_argument("--prepared", type=Path, default=Path("bench-prepared"), help="what --prepare made")
    parser.add_argument("--models", type=Path, default=MODELS, help="generated models")
    parser.add_argument("--traces", type=Path, help="folder of traces; by default those shipped")
    parser.add_argument("--trace", default="gptoss20b_stem", help="whose routing is replayed")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each group, opening included")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="timed in each round")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="instead of the group's")
    parser.add_argument("--prompts", type=int, nargs="*", help="lengths instead of the group's")
    parser.add_argument("--kv", help="KV cache type of all arms, such as q8_0")
    parser.add_argument(
        "--throttle", type=float, metavar="GB/s", help="fills of our arms, as on a slower link"
    )
    parser.add_argument("--threads", type=int, help="of vanilla arms; default: what the tuning group found")
    parser.add_argument("--load", choices=["mmap", "pinned", "repack"], help="of vanilla arms, likewise")
    parser.add_argument("--commit", help="of this checkout, where git cannot tell")
    parser.add_argument("--again", action="store_true", help="run groups that are complete, too")
    parser.add_argument("--dry-run", action="store_true", help="embedded model, a few tokens; needs no GPU")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.list:
        for group in GROUPS.values():
            print(f"{group.name}: {' '.join(arm.name for arm in group.arms())}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(args.rounds, args.tokens, args.minutes, prompts=args.prompts)
    if args.prepare:
        _prepare(plan, args)
        return 0
    if args.write:
        for name in dict.fromkeys(GROUPS[group].model for group in args.group or GROUPS):
            began = time.monotonic()
            path = Models(args.models).get(name)[1]
            print(
                f"{path}: {path.stat().st_size / 1e9:.2f} GB in {time.monotonic() - began:.0f} s", flush=True
            )
        return 0
    failed = False
    if not args.report:
        names = args.group or list(GROUPS)
        if args.dry_run:
            plan = replace(plan, rounds=2, tokens=8, pool_warm_up=16, prompts=(16, 32))
            names = args.group or ["tiny"]
        for name in names:
            failed = not _run(_group(name, args), plan, args) or failed
    print(report.write(args.out))
    return int(failed)


def _prepare(plan: Plan, args: argparse.Namespace) -> None:
    """Fit a classifier for each shape on the first half of the trace, routed as the bench routes.

    Also compute what groups with in-token predictions by ids take, on the second half.
    """
    from fate_policy import train

    args.prepared.mkdir(parents=True, exist_ok=True)
    for name in sorted({GROUPS[group].model for group in args.group or GROUPS}):
        began = time.monotonic()
        shape = SHAPES[name]
        made = routing(shape, args.trace, args.traces, part="fit")
        fitted = train.fit(
            [as_trace(made, shape).slice(0, FIT_TOKENS)], train.Options(sample_every=8, n_folds=2)
        )
        path = _classifier(args, name, shape)
        fitted.save(path)
        print(f"{path}: fitted in {time.monotonic() - began:.0f} s", flush=True)
    for group in (_group(name, args) for name in args.group or GROUPS):
        if any(arm.needs_ahead for arm in group.arms()):
            shape = SHAPES[group.model]
            _predict(group, shape, _routing(group, shape, args), plan, args)


def _group(name: str, args: argparse.Namespace) -> Group:
    group = GROUPS[name]
    return replace(group, names=args.arms) if args.arms else group


def _routing(group: Group, shape: Shape, args: argparse.Namespace) -> Routing:
    made = routing(shape, args.trace, args.traces)
    return without_last(made, shape) if group.spares_last else made


def _saved_routing(group: Group, shape: Shape, args: argparse.Namespace) -> tuple[Routing, Path]:
    made = _routing(group, shape, args)
    table: Path = args.out / f"routing-{group.name}.npz"
    np.savez(table, ids=made.ids, tokens=made.tokens)
    return made, table


def _classifier(args: argparse.Namespace, name: str, shape: Shape) -> Path:
    path: Path = args.prepared / f"classifier-{name}-{shape.n_layers}.npz"
    return path


def _ahead(args: argparse.Namespace, group: Group, shape: Shape) -> Path:
    replayed = Path(args.trace).stem + ("-spared" if group.spares_last else "")
    path: Path = args.prepared / f"ahead-{group.model}-{shape.n_layers}-{replayed}.npz"
    return path


def _predict(
    group: Group, shape: Shape, made: Routing, plan: Plan, args: argparse.Namespace
) -> dict[str, Any]:
    """Have the in-token predictions by ids of what is replayed in their file; return what it holds."""
    began = time.monotonic()
    path = _ahead(args, group, shape)
    told = ahead.prepare(path, _classifier(args, group.model, shape), made, shape, plan.n_rows)
    ahead_of = zip(told["horizons"], told["recall"], strict=True)
    at_k = ", ".join(f"{found['at_k']:.3f} {horizon} ahead" for horizon, found in ahead_of)
    print(
        f"{path}: {told['n_rows']} tokens in {time.monotonic() - began:.0f} s, recall at k {at_k}, "
        f"{told['recall_at_start']['at_k']:.3f} at the token's start",
        flush=True,
    )
    return told


def _run(group: Group, plan: Plan, args: argparse.Namespace) -> bool:
    """Run one group unless its result is there already; say whether it is complete."""
    began = time.monotonic()
    done = args.out / f"{group.name}.json"
    if done.exists() and not args.again and json.loads(done.read_text(encoding="utf-8"))["is_complete"]:
        print(f"{group.name}: complete in {done}", flush=True)
        return True
    shape, model = Models(args.models).get(group.model)
    print(f"{time.monotonic() - began:6.1f} s  {group.name}  model {model}", flush=True)
    made, table = _saved_routing(group, shape, args)
    print(f"{time.monotonic() - began:6.1f} s  {group.name}  routing {made.source['way']}", flush=True)
    settings: dict[str, Any] = _tuned(args.out, group)
    given = {"kv": args.kv, "throttle": args.throttle, "threads": args.threads, "load": args.load}
    settings |= {key: value for key, value in given.items() if value is not None}
    settings["classifier"] = str(_classifier(args, group.model, shape).resolve())
    told = None
    if any(arm.needs_ahead for arm in group.arms()):
        settings["ahead"] = str(_ahead(args, group, shape).resolve())
        try:
            told = _predict(group, shape, made, plan, args)
        except FateError as error:  # the arms that need it have rows that say so
            settings["ahead_fault"] = str(error)
    run = Run(group, shape, model, table, made.source, settings, plan, args.out, began)
    run.result["predictions"] = told
    run.result["provenance"] = provenance.collect(args.commit)
    run.result["model"]["sha256_of_samples"] = models.fingerprint(model)
    return bool(run.run()["is_complete"])


def prepared(
    model: str, names: list[str], out: Path, folder: Path, n_tokens: int
) -> tuple[Path, dict[str, Any]]:
    """Return the routing and the settings that arms of a model take, for a tool beside the groups.

    out : folder of the routing's file
    folder : what `--prepare` made
    """
    args = arguments().parse_args(["--out", str(out), "--prepared", str(folder)])
    group, shape = Group(f"{model}-tool", model, names), SHAPES[model]
    made, table = _saved_routing(group, shape, args)
    settings: dict[str, Any] = {"classifier": str(_classifier(args, model, shape).resolve())}
    if any(arm.needs_ahead for arm in group.arms()):
        settings["ahead"] = str(_ahead(args, group, shape).resolve())
        _predict(group, shape, made, Plan(rounds=1, tokens=n_tokens), args)
    return table, settings


def _tuned(out: Path, group: Group) -> dict[str, Any]:
    """Return threads and way to load of the fastest vanilla arm of the model's tuning group, if it ran."""
    path = out / f"{group.model}-tune.json"
    if group.tunes or not path.exists():
        return {}
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    ran = [arm for arm in arms.values() if arm["rounds"]]
    # another way to load takes long; it must pay
    best = max(
        ran,
        key=lambda arm: (report.speed(arm) or 0.0) * (1.0 if arm["load"] == "mmap" else 0.97),
        default=None,
    )
    return {} if best is None else {"threads": best["threads"], "load": best["load"], "is_tuned": True}


if __name__ == "__main__":
    sys.exit(main())
