"""Decode speed of the pool against all experts resident, on one GPU.

Each arm opens the model, decodes warm-up tokens and then single tokens, each one timed. With --routing the
expert ids of every arm come from a table (see routing.py). Rounds repeat the arms; raw times go to --out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from fate_bind import library
from fate_bind.session import Session

ON_GPU = ["-ngl", "999", "-fit", "off"]


def placement(arm: str) -> list[str] | None:
    """Return an arm's flags, or None if it is a number of slots."""
    if arm == "resident":
        return ON_GPU
    if arm == "cpu-moe":
        return [*ON_GPU, "--cpu-moe"]
    if arm.startswith("ncmoe:"):
        return [*ON_GPU, "-ncmoe", arm.removeprefix("ncmoe:")]
    return None


def replay(ids: np.ndarray | None) -> None:
    ffi, lib = library.load()
    if ids is None:
        library.check(lib.fate_replay_routing(ffi.NULL, 0, 0, 0))
    else:
        library.check(lib.fate_replay_routing(ffi.from_buffer("int32_t[]", ids), *ids.shape))


def measure(model: str, arm: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one arm once: "resident", "cpu-moe", "ncmoe:N" or a number of slots."""
    flags = ["-c", "4608", *args.flags]
    began = time.monotonic()
    place = placement(arm)
    if place is not None:  # an engine that does not engage, for the replay's sake
        session = Session(model, [*flags, *place], slots="100%", place=False)
    else:
        session = Session(model, flags, slots=int(arm), policy=args.policy, require=True)
    opened = time.monotonic() - began
    rng = np.random.default_rng(1)
    with session:
        prompts = {}
        for n in args.prompts:
            seconds = []
            for _ in range(3):
                session.clear()
                prompt = rng.integers(session.n_vocab, size=n).astype(np.int32)
                start = time.perf_counter()
                session.decode(prompt, outputs=[0] * (n - 1) + [1])
                seconds.append(time.perf_counter() - start)
            prompts[n] = n / min(seconds[1:])
        session.clear()
        n = args.warmup + args.tokens
        tokens = rng.integers(session.n_vocab, size=n).astype(np.int32)
        times = np.empty(n)
        before = session.counters().totals()
        for i in range(n):
            if i == args.warmup:
                before = session.counters().totals()
            start = time.perf_counter()
            session._decode(tokens[i : i + 1], None, None, None, None)
            times[i] = time.perf_counter() - start
        after = session.counters().totals()
        stats = session.stats()
    count = {
        key: after[key] - before[key] for key in ("hits", "misses", "bytes", "rows", "rows_all_resident")
    }
    used = times[args.warmup :]
    pairs = max(count["hits"] + count["misses"], 1)
    return {
        "arm": arm,
        "ms": float(np.mean(used) * 1e3),
        "median_ms": float(np.median(used) * 1e3),
        "tokens_per_s": float(1 / np.mean(used)),
        "open_s": opened,
        "hit_rate": count["hits"] / pairs,
        "all_resident": count["rows_all_resident"] / max(count["rows"], 1),
        "mb_per_token": count["bytes"] / args.tokens / 1e6,
        "pool_bytes": stats["pool_bytes"],
        "engaged": stats["engaged"],
        "prompt_tokens_per_s": prompts,
        "times_ms": (used * 1e3).round(4).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("arms", nargs="+", help="resident, cpu-moe, ncmoe:N, or slots per layer")
    parser.add_argument("--routing", type=Path, help="int32 .npy (n_tokens, n_layers, k)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=48)
    parser.add_argument(
        "--prompts", type=int, nargs="*", default=[], help="lengths whose speed is measured too"
    )
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    replay(np.ascontiguousarray(np.load(args.routing), np.int32) if args.routing else None)
    results = []
    for _ in range(args.rounds):
        for arm in args.arms:
            try:
                result = measure(args.model, arm, args)
            except Exception as error:
                print(f"{arm:>9}: {type(error).__name__}: {error}", flush=True)
                continue
            results.append(result)
            base = [r["ms"] for r in results if r["arm"] == "resident"]
            share = f"{base[-1] / result['ms']:.3f} of resident" if base else ""
            print(
                f"{arm:>9}: {result['tokens_per_s']:7.1f} tok/s  {result['ms']:7.3f} ms "
                f"(median {result['median_ms']:.3f})  "
                f"hits {result['hit_rate']:.3f}  all resident {result['all_resident']:.3f}  "
                f"{result['mb_per_token']:7.1f} MB/token  pool {result['pool_bytes'] / 2**30:.2f} GiB  "
                f"open {result['open_s']:.1f} s  {share}  "
                + " ".join(
                    f"prompt {n}: {speed:.0f} tok/s" for n, speed in result["prompt_tokens_per_s"].items()
                ),
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
