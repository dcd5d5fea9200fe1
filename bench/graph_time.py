"""How long a GPU works at a decoded token's captured graph, and how long the token takes in all.

    python -m bench.graph_time --model gptoss --arms lru@all-but-one classifier@all-but-one

Arms, models, routing and what `--prepare` made are those of `python -m bench`; with all but one expert in
slots hardly anything is copied, and what is left over is what an arm costs by itself. The rest of a token's
time is the host's, before the graph is launched and after it. Needs a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench import __main__ as command
from bench import arms
from bench.models import SHAPES, Models
from bench.runner import FIRST_ROW, POOL_WARM_UP

SOURCE = Path(__file__).with_name("graph_time.c")
ROUNDS = 4
IN_FLIGHT = 4
"""As in graph_time.c."""


def compile_timer(folder: Path) -> Path:
    """Return the library to preload."""
    library = folder / "graph_time.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", str(SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


def taken(most: int = 1 << 16) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the milliseconds of the launches since the last call, of a process that has it preloaded."""
    times = np.empty(most, np.float32)
    pointer = times.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return times[: ctypes.CDLL(None).graph_time_take(pointer, most)]


def sample(model: str, routing: str, job: dict[str, Any], n: int) -> dict[str, list[float]]:
    """Decode rounds of `n` tokens here; return milliseconds: "graph" of their launches, "token"."""
    from bench.worker import _Arm

    arm = _Arm(model, routing, job)
    arm.decode(FIRST_ROW, 1, POOL_WARM_UP)
    found: dict[str, list[float]] = {"graph": [], "token": []}
    for i in range(ROUNDS):
        found["token"] += arm.decode(FIRST_ROW + i * n, n)["ms"]
        for more in range(IN_FLIGHT):  # a launch is read some launches later
            arm.decode_one(FIRST_ROW + (i + 1) * n + more)
        found["graph"] += taken()[-n:].tolist()
    arm.close()
    if len(found["graph"]) != len(found["token"]):
        raise RuntimeError(
            f"{len(found['graph'])} launches of graphs in {len(found['token'])} tokens; expected one "
            "a token: the model on one GPU, and GGML_CUDA_DISABLE_GRAPHS unset"
        )
    return found


def line(name: str, found: dict[str, list[float]]) -> str:
    low, median = np.percentile(found["graph"], (10, 50)) * 1e3
    fast, token = np.percentile(found["token"], (10, 50)) * 1e3
    return (
        f"{name:28} graph p10 {low:7.0f} us, median {median:7.0f}; "
        f"token p10 {fast:7.0f}, median {token:7.0f}; n {len(found['graph'])}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="gptoss")
    parser.add_argument("--arms", nargs="+", default=["lru@all-but-one"], metavar="ARM")
    parser.add_argument("--tokens", type=int, default=64, help=f"of each of {ROUNDS} rounds")
    parser.add_argument("--models", type=Path, default=command.MODELS)
    parser.add_argument("--prepared", type=Path, default=Path("bench-prepared"))
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--sample", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.sample:
        print(json.dumps(sample(**json.loads(args.sample))))
        return
    shape, model = Models(args.models).get(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    routing, settings = command.prepared(args.model, args.arms, args.out, args.prepared, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LD_PRELOAD": str(compile_timer(Path(folder)))}
        for name in args.arms:
            job = arms.job(arms.parse(name), shape, settings, {})
            asked = {"model": str(model), "routing": str(routing), "job": job, "n": args.tokens}
            done = subprocess.run(
                [sys.executable, "-m", "bench.graph_time", "--sample", json.dumps(asked)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env=environment,
            )
            print(line(name, json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main()
