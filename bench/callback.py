"""What a miss costs in callback mode on a GPU: how long the kernel waits for a Python policy's answer.

The same tokens run in table mode and in callback mode, with the same victims if the policy is the same, in
turns. Printed are what the GPU's own clock says it waited at a miss, the part of that in Python, and the
difference between the two modes' times by miss, which holds the step's end too.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from fate_bind.session import Session


def measure(session: Session, tokens: np.ndarray[Any, Any], warmup: int) -> dict[str, float]:
    """Decode the tokens one by one; count from `warmup` on."""
    before: dict[str, Any] = {}
    began = 0.0
    for i, token in enumerate(tokens):
        if i == warmup:
            before, began = session.stats(), time.perf_counter()
        session._decode(np.array([token], np.int32), None, None, None, None)
    seconds = time.perf_counter() - began
    after = session.stats()
    keys = ("asks", "timeouts", "ask_seconds", "policy_seconds", "misses", "evictions")
    return {"seconds": seconds, **{key: after[key] - before[key] for key in keys}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a .gguf file; default: the embedded model")
    parser.add_argument("--slots", default="25%")
    parser.add_argument("--policy", default="lru")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[])
    args = parser.parse_args()
    rng = np.random.default_rng(1)
    with Session(args.model, ["-c", "4608", *args.flags], fate=False) as plain:
        tokens = rng.integers(plain.n_vocab, size=args.warmup + args.tokens)
        arms: dict[str, list[dict[str, float]]] = {"table": [], "callback": []}
        for _ in range(args.rounds):
            for mode, results in arms.items():
                with plain.fork(
                    policy=args.policy, slots=args.slots, mode=mode, sync=True, require=True
                ) as session:
                    results.append(measure(session, tokens, args.warmup))
    asked = arms["callback"]
    if not all(result["asks"] for result in asked):
        raise SystemExit("no GPU asked: no miss, or the layers run on the CPU")
    for table, callback in zip(arms["table"], asked, strict=True):
        asks = callback["asks"]
        print(
            f"{asks:.0f} misses asked about: {1e6 * callback['ask_seconds'] / asks:6.1f} us each, of these "
            f"{1e6 * callback['policy_seconds'] / asks:5.1f} in Python (steps included); "
            f"{callback['timeouts']:.0f} too late; "
            f"{1e6 * (callback['seconds'] - table['seconds']) / asks:6.1f} us more than in table mode; "
            f"evictions {callback['evictions']:.0f}, in table mode {table['evictions']:.0f}"
        )
    costs = [1e6 * result["ask_seconds"] / result["asks"] for result in asked]
    print(f"median {np.median(costs):.1f} us a miss, {min(costs):.1f} to {max(costs):.1f}")


if __name__ == "__main__":
    main()
