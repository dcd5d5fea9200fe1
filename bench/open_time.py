"""How long a model takes to open, and to its first token, each sample in a process of its own.

    python -m bench.open_time MODEL [--slots 50%] [-n 5]

`llama.cpp` is the same build and placement without a pool, memory-mapped. The file is read once before, so
that it lies in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ARMS = ("llama.cpp", "fate")
_READ = 64 << 20


def sample(arm: str, model: Path, slots: str) -> dict[str, float]:
    """Open the model here; return seconds: "open", "first_token" (since the start)."""
    from fate_bind import library
    from fate_bind.session import Session

    library.load()
    began = time.perf_counter()
    with Session(model, ["-c", "4096"], fate=arm != "llama.cpp", slots=slots) as session:
        opened = time.perf_counter()
        session.logits([1])
        first = time.perf_counter()
    return {"open": opened - began, "first_token": first - began}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--slots", default="50%")
    parser.add_argument("-n", type=int, default=5, help="samples of each arm, which take turns")
    parser.add_argument("--sample", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.sample:
        print(json.dumps(sample(args.sample, args.model, args.slots)))
        return
    with args.model.open("rb", buffering=0) as file:
        while file.read(_READ):
            pass
    samples: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for _ in range(args.n):
        for arm in ARMS:
            command = [sys.executable, "-m", "bench.open_time", str(args.model), "--slots", args.slots]
            done = subprocess.run([*command, "--sample", arm], stdout=subprocess.PIPE, text=True, check=True)
            samples[arm].append(json.loads(done.stdout.splitlines()[-1]))
    for what in ("open", "first_token"):
        base = statistics.median(one[what] for one in samples[ARMS[0]])
        for arm in ARMS:
            seconds = [one[what] for one in samples[arm]]
            median = statistics.median(seconds)
            print(
                f"{what:12s} {arm:10s} median {median:6.3f} s, {min(seconds):.3f} to {max(seconds):.3f}, "
                f"{median / base:.2f} of {ARMS[0]}"
            )


if __name__ == "__main__":
    main()
