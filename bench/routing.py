"""Routing for shapes that no recorded trace fits: gpt-oss-20b's, stretched to more layers and experts.

Each layer of the target joins streams of the recording, taken from other places of the same layer, until it
uses k experts a token. An expert of a stream stands for `n_experts / 32 / streams` experts of the target, of
which one is current; after each use it changes to the next with chance `turn`. With chance `stay` a pick is
one of the token before instead. For 48 layers, 128 experts, top 8 the two are calibrated so that LRU's hit
rates per layer are those published for Qwen3-30B-A3B: 0.647, 0.810 and 0.918 at 16, 32 and 64 slots.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TURN, STAY = 0.16, 0.48  # gives 0.634, 0.796, 0.933
SOURCE_EXPERTS, SOURCE_K = 32, 4


def stretch(
    source: NDArray[np.uint8],
    n_tokens: int,
    n_layers: int,
    n_experts: int,
    k: int,
    turn: float = TURN,
    stay: float = STAY,
    seed: int = 0,
) -> NDArray[np.int32]:
    """Return int32 (n_tokens, n_layers, k), distinct within a token, best first."""
    rng = np.random.default_rng(seed)
    n_streams = k // SOURCE_K
    copies = n_experts // SOURCE_EXPERTS // n_streams
    out = np.empty((n_tokens, n_layers, k), np.int32)
    for layer in range(n_layers):
        for stream in range(n_streams):
            from_layer = layer * source.shape[1] // n_layers
            start = (layer * 7 + stream * 13) % 16 * 997
            picks = source[start : start + n_tokens, from_layer]
            current = rng.integers(copies, size=SOURCE_EXPERTS)
            before: list[int] = []
            for token in range(n_tokens):
                base = stream * copies * SOURCE_EXPERTS
                chosen = [base + int(current[e]) * SOURCE_EXPERTS + int(e) for e in picks[token]]
                for i in range(SOURCE_K):
                    if before and rng.random() < stay:
                        other = before[int(rng.integers(SOURCE_K))]
                        if other not in chosen:
                            chosen[i] = other
                out[token, layer, stream::n_streams] = chosen
                before = chosen
                turned = picks[token][rng.random(SOURCE_K) < turn]
                current[turned] = (current[turned] + 1) % copies
    return out


def lru_hits(ids: NDArray[np.integer], capacities: list[int], skip: int = 32) -> list[float]:
    """Return LRU's hit rate at each capacity, over the tokens after the first `skip`."""
    hits = np.zeros(len(capacities))
    uses = 0
    for layer in range(ids.shape[1]):
        stack: list[int] = []
        for token in range(ids.shape[0]):
            for e in ids[token, layer, ::-1].tolist():
                depth = stack.index(e) if e in stack else 1 << 30
                if depth < 1 << 30:
                    stack.pop(depth)
                stack.insert(0, e)
                if token >= skip:
                    hits += [depth < capacity for capacity in capacities]
                    uses += 1
    return (hits / uses).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a gpt-oss-20b trace (.npz with `ids`)")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--turn", type=float, default=TURN)
    parser.add_argument("--stay", type=float, default=STAY)
    parser.add_argument("--every", type=int, default=6, help="check each n-th layer only")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with np.load(args.source) as file:
        source = file["ids"]
    ids = stretch(source, args.tokens, 48, 128, 8, args.turn, args.stay)
    rates = lru_hits(ids[:, :: args.every], [16, 32, 64, 96])
    print(args.turn, args.stay, " ".join(f"{rate:.3f}" for rate in rates))
    if args.out:
        np.save(args.out, ids)


if __name__ == "__main__":
    main()
