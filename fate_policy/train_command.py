"""`fate train`: fit the classifier, hold it against the simple rules, write the model and a report."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fate_policy import assess, checks, cost, data, estimators, model, trace, train, tune
from fate_policy.errors import FateError, TraceError
from fate_policy.features import TABLE_MB, Features
from fate_policy.trace import Trace

QUICK_TOKENS, QUICK_TEST_TOKENS = 10_000, 4_000
LEAST_PROMPTS = 6
COMPARED = (
    "sklearn.ensemble:HistGradientBoostingClassifier",
    "sklearn.neural_network:MLPClassifier",
    "sklearn.calibration:CalibratedClassifierCV(sklearn.linear_model:LogisticRegression)",
)
_BALANCES = {False: "none", True: "balanced"}
REPETITIVE = 2
"""The bit of `seq_flags` by which the source marks a prompt whose answer repeats itself."""


_CONFIG = "policy: classifier\nclassifier:\n  model: "
_IS_CONFIG = re.compile(_CONFIG + r".+\n  table_mb: [\d.e+-]+\n")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "trace",
        nargs="+",
        metavar="TRACE",
        help="fitted on the first half of its prompts and tested on the second; one of fewer than "
        f"{LEAST_PROMPTS} prompts is fitted on whole",
    )
    parser.add_argument("--test", nargs="+", default=[], metavar="TRACE", help="also tested on, whole")
    parser.add_argument("--traces", metavar="DIR", help="folder in which names are looked for")
    parser.add_argument("-o", "--output", type=Path, default=Path("classifier.npz"), metavar="FILE")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="JSON; a plot beside it (default: by --output)"
    )
    parser.add_argument("--quick", action="store_true", help="few tokens, nothing tuned: under a minute")
    parser.add_argument(
        "--estimator", metavar="MODULE:CLASS", help="a scikit-learn classifier with predict_proba"
    )
    parser.add_argument(
        "--label",
        choices=("window", "optimum"),
        default="window",
        help="what scores answer: used again within so many tokens, or before the victim that the optimum "
        "would choose (default: window)",
    )
    parser.add_argument(
        "--balance",
        choices=("none", "balanced"),
        help="whether yes and no weigh alike in a layer's samples, chances put right after (default: what "
        "hits more inside the training prompts; none with --quick or --estimator)",
    )
    parser.add_argument(
        "--compare",
        nargs="*",
        metavar="MODULE:CLASS",
        help="score estimators on held-out tokens (default: gradient boosting, a small network, a calibrated "
        "logistic regression); MODULE:CLASS(MODULE:CLASS) is one around another",
    )
    parser.add_argument(
        "--weights",
        action="store_true",
        help="features of router weights too, which the traces must hold; a run with the model collects them",
    )
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="do without the inputs whose names begin so, such as early, token or repeat",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--table-mb",
        type=float,
        default=TABLE_MB,
        metavar="MIB",
        help=f"memory of counts and history in use, in the tests too (default: {TABLE_MB:g})",
    )


def run(args: argparse.Namespace) -> int:
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    shown = sys.stderr.isatty()
    target = args.report or args.output.with_suffix(".json")
    config = args.output.with_suffix(".yaml")
    read = [data.find(name, args.traces) for name in (*args.trace, *args.test)]
    if args.output.suffix != ".npz":
        raise FateError(f"--output {args.output}: expected a name that ends in .npz")
    made = {"model": args.output, "configuration": config, "report": target}
    for what, written in made.items():
        checks.target(what, written, read)
    plot = checks.target("plot", target.with_suffix(".png"), read)
    if len({path.absolute() for path in (*made.values(), plot)}) <= len(made):
        raise FateError(
            f"--report {target}: expected a name that no other file of the fit has, such as x.json"
        )
    if config.exists() and not _IS_CONFIG.fullmatch(config.read_text(encoding="utf-8", errors="replace")):
        raise FateError(
            f"configuration {config} would be overwritten, and is not one that `fate train` wrote; move it, "
            "or give another --output"
        )
    checks.number("table_mb", args.table_mb, above=0)
    fitting: dict[str, Trace] = {}
    fitted_on: set[str] = set()  # as their hashes tell
    tests: dict[str, tuple[Trace, Path]] = {}
    for name in args.trace:
        path, whole = _load(name, args.traces)
        fitting[path.stem] = whole
        fitted_on.add(whole.hash())
        if len(whole.prompt_start) >= LEAST_PROMPTS:
            fitting[path.stem], second = train.split(whole)
            tests[f"{path.stem} (second half)"] = second, path
    for name in args.test:
        path, whole = _load(name, args.traces)
        if whole.hash() in fitted_on:
            raise FateError(
                f"--test {name}: it is what the model is fitted on, which tells nothing; give another"
            )
        tests[path.stem] = whole, path
    if not tests:
        raise FateError(
            f"no trace holds {LEAST_PROMPTS} prompts, to fit on some and test on others; give one as --test"
        )
    options = train.Options(
        seed=args.seed,
        estimator=args.estimator,
        weights=args.weights,
        balanced=args.balance == "balanced",
        without=tuple(args.without),
    )
    _check(args, options, [*fitting.values(), *(test for test, _ in tests.values())])
    if args.label == "optimum":
        options = replace(options, heads=tuple((share, 0) for share, _ in options.heads))
    thresholds: dict[str, float] = {}
    balances: dict[bool, float] = {}
    if args.quick:
        fitting = {name: _first_prompts(part, QUICK_TOKENS) for name, part in fitting.items()}
        tests = {name: (_first_prompts(part, QUICK_TEST_TOKENS), at) for name, (part, at) in tests.items()}
        options = replace(options, sample_every=8, n_folds=2)
    first = max(fitting.values(), key=lambda part: len(part.prompt_start))
    if not args.quick and args.estimator is None and len(first.prompt_start) >= LEAST_PROMPTS:
        say("windows, balance and thresholds, inside the training prompts")
        asked = None if args.balance is None else options.balanced
        tuned = tune.tune(first, options, asked, progress=shown)
        options, thresholds, balances = tuned.options, tuned.thresholds, tuned.hit_rates
    prompts = sum(len(part.prompt_start) for part in fitting.values())
    n_tokens = sum(part.n_tokens for part in fitting.values())
    say(f"fit on {prompts} prompts, {n_tokens} tokens")
    fitted = train.fit(list(fitting.values()), options, say, shown)
    fitted = replace(fitted, meta={**fitted.meta, "prefetch": thresholds})
    half_lives = assess.best_half_lives(list(fitting.values()))
    report: dict[str, Any] = {
        "trained_on": {"trace": ", ".join(fitting), "prompts": prompts, "tokens": n_tokens},
        "heads": dict(options.heads),
        "prefetch_thresholds": thresholds,
        "balance": {
            "chosen": _BALANCES[options.balanced],
            "hit_rates": {_BALANCES[balanced]: rate for balanced, rate in balances.items()},
        },
        "half_lives": {f"{rule} {share:g}": best for (rule, share), best in half_lives.items()},
        "importance": fitted.meta["importance"],
        "milliseconds": _milliseconds(fitted),
        "tests": {},
    }
    shares = (0.25, 0.5) if args.quick else assess.SHARES
    form: dict[str, Any] = {"shares": shares, "table_mb": args.table_mb, "progress": shown}
    for name, (test, path) in tests.items():
        say(f"test on {name}")
        report["tests"][name] = assess.assess(fitted, test, half_lives, **form)
        if not args.quick:
            say(f"test on {name}, nothing learned")
            report["tests"][f"{name}, frozen"] = assess.assess(fitted, test, half_lives, learn=False, **form)
            plain = _without_repetitive(test, path)
            if plain is not None:
                say(f"test on {name}, without repetitive prompts")
                report["tests"][f"{name}, without repetitive prompts"] = assess.assess(
                    fitted, plain, half_lives, **form
                )
    if args.compare is not None:
        names = args.compare or COMPARED
        report["estimators"] = _compare(first, next(iter(tests.values()))[0], options, names, say, shown)
    held_out = {
        name: [
            {key: row[key] for key in ("share", "lru", "optimum", "sync", "delayed")}
            for row in test["evictions"]
        ]
        for name, test in report["tests"].items()
    }
    fitted = replace(fitted, meta={**fitted.meta, "held_out": held_out})
    fitted.save(args.output)
    config.write_text(f"{_CONFIG}{args.output.resolve()}\n  table_mb: {args.table_mb:g}\n", encoding="utf-8")
    target.write_text(json.dumps(report, indent=2), encoding="utf-8")
    _plot(report, plot)
    print(as_text(report))
    say(f"wrote {args.output}, {config}, {target} and {plot}")
    if model.is_worse_than_lru(args.output):
        say("it hits less than lru on these tests: a run takes it only with --fate-policy classifier")
    if fitted.meta["tokens"] != "id":
        say(f"for replay only: the trace names tokens by {fitted.meta['tokens']}, and a run names them by id")
    return 0


def _check(args: argparse.Namespace, options: train.Options, traces: list[Trace]) -> None:
    """Find out before the work what would fail after it."""
    for name in filter(None, (options.estimator, *(args.compare or ()))):
        estimators.make(name, options.seed)
    if options.balanced and options.estimator and not estimators.takes_weights(options.estimator):
        raise FateError(f"estimator {options.estimator!r} takes no sample_weight; fit without --balance")
    if options.without and options.estimator:
        raise FateError("--without is for the linear model, not for --estimator")
    known = model.inputs(options.weights)
    for start in options.without:
        if not any(name.startswith(start) for name in known):
            raise checks.unknown_name("input", start, known)
    if options.weights and any(one.weights is None for one in traces):
        raise TraceError(train.NO_WEIGHTS)
    shape = train.shape_of(traces[0])
    for other in traces[1:]:
        if train.shape_of(other).n_experts.tolist() != shape.n_experts.tolist():
            raise TraceError("the traces are of models with different layers or experts")
    n = shape.table[0] * shape.table[1]
    rank = min(options.rank_basis, n)
    Features(shape, np.zeros((n, rank), np.float32), np.zeros(rank, np.float32), table_mb=args.table_mb)


def _load(name: str, folder: str | None) -> tuple[Path, Trace]:
    path = data.find(name, folder)
    return path, assess.decode_only(trace.load(path))


def _milliseconds(fitted: Any) -> dict[str, dict[str, float]]:
    models = {"this model": fitted, "48 x 128": cost.untrained([128] * 48, [8] * 48)}
    if fitted.heads[0].estimators is not None:
        models.pop("this model")
    return {
        name: {what: 1000 * seconds for what, seconds in cost.table_seconds(model).items()}
        for name, model in models.items()
    }


def _first_prompts(whole: Trace, n_tokens: int) -> Trace:
    ends = [*whole.prompt_start[1:].tolist(), whole.n_tokens]
    return whole.slice(0, next((end for end in ends if end >= n_tokens), whole.n_tokens))


def _without_repetitive(test: Trace, path: Path) -> Trace | None:
    with np.load(path, allow_pickle=False) as file:
        if "seq_flags" not in file.files:
            return None
        flags = file["seq_flags"]
    first = int(test.sequence[0])
    return assess.of_prompts(test, (flags[first : first + len(test.prompt_start)] & REPETITIVE) == 0)


def _compare(
    first: Trace, second: Trace, options: train.Options, names: Sequence[str], say: Any, shown: bool
) -> Any:
    """Fit each estimator on few tokens and test it on few, all alike."""
    first, second = _first_prompts(first, QUICK_TOKENS), _first_prompts(second, QUICK_TEST_TOKENS // 4)
    rows = {}
    few = replace(options, sample_every=16, max_rows=20_000, heads=((0.25, 4),), without=())
    if not all(map(estimators.takes_weights, names)):
        few = replace(few, balanced=False)  # all alike
    half_lives = assess.best_half_lives([first])
    for name in ("linear", *names):
        say(f"estimator {name}")
        began = time.perf_counter()
        fitted = train.fit(
            [first], replace(few, estimator=None if name == "linear" else name), progress=shown
        )
        spent = time.perf_counter() - began
        tables = assess.serve(fitted, second, progress=shown)
        per_table = cost.table_seconds(fitted, 10)["table"]
        row = assess.evictions(fitted, second, tables, half_lives, (0.25,))[0]
        found = assess.predictions(fitted, second, tables)
        rows[name] = {
            "hit_rate": row["sync"],
            "closed": row["sync_closed"],
            "evicts_as_optimum": row["evicts_as_optimum"],
            "recall_at_k": found["boundary"]["at_k"],
            "brier": found["calibration"]["brier"],
            "fit_seconds": spent,
            "ms_per_table": 1000 * per_table,
        }
    return rows


def as_text(report: Mapping[str, Any]) -> str:
    """Return the report as lines to read."""
    lines = [
        "trained on {trace}: {prompts} prompts, {tokens} tokens".format(**report["trained_on"]),
        "one table: "
        + ", ".join(
            f"{cost['table']:.2f} ms (taking in a token {cost['observe']:.2f} ms) for {name}"
            for name, cost in report["milliseconds"].items()
        ),
    ]
    rates = ", ".join(f"{name} {rate:.4f}" for name, rate in report["balance"]["hit_rates"].items())
    inside = f" (hit rates inside the training prompts: {rates})" if rates else ""
    lines.append(f"balance of answers: {report['balance']['chosen']}{inside}")
    for name, test in report["tests"].items():
        lines += ["", f"{name}: {test['prompts']} prompts, {test['tokens']} tokens"]
        heads: tuple[str, ...] = ("share", "lru", "lfu", "frequency", "lfru", "sync", "delayed", "optimum")
        heads += ("sync_closed", "delayed_closed", "sync_optional", "optimum_optional")
        lines.append("  " + "  ".join(heads))
        for row in test["evictions"]:
            lines.append("  " + "  ".join(f"{_number(row[head]):>{len(head)}}" for head in heads))
        found = test["predictions"]
        for where in ("boundary", "ahead_1", "ahead_2"):
            recall = found[where]
            lines.append(f"  recall {where}: {recall['at_k']:.3f} at k, {recall['at_2k']:.3f} at 2k")
        lines.append(
            "  chances are off by {error:.4f} on average, Brier {brier:.4f}".format(**found["calibration"])
        )
        for row in test["evictions"]:
            if row.get("evicts_as_optimum") is not None:
                lines.append(
                    "  evictions at {share:g}: {evicts_as_optimum:.3f} as the optimum (LRU "
                    "{lru_evicts_as_optimum:.3f}), {used_again:.3f} used again too soon (LRU "
                    "{lru_used_again:.3f})".format(**row)
                )
        for row in test["prefetch"]:
            lines.append(
                "  prefetch at {share:g}: {per_token:.1f} a token of at most {budget:.1f}; {misses_gone:.3f} "
                "of the misses gone, {used:.3f} used, {bytes:.3f} x the bytes".format(**row)
            )
    for name, row in report.get("estimators", {}).items():
        lines.append(f"estimator {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw how chances hold on every test, and what each input weighs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="lightgrey")
    for name, test in report["tests"].items():
        found = test["predictions"]["calibration"]
        left.plot(found["expected"], found["happened"], marker="o", label=name)
    left.set(xlabel="chance of use, as predicted", ylabel="share used")
    left.legend(fontsize="small")
    heads = report["importance"]
    first = next(iter(heads.values()))
    names = sorted(first, key=lambda name: max(head[name] for head in heads.values()))
    for i, (head, weights) in enumerate(heads.items()):
        places = np.arange(len(names)) + (i - len(heads) / 2) * 0.15
        right.barh(places, [weights[name] for name in names], height=0.15, label=head)
    right.set_yticks(np.arange(len(names)), names, fontsize="small")
    right.set(xlabel="effect of one standard deviation on the log-odds")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=100)
