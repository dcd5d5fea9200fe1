"""Expert ids for the replay: a recorded trace where it fits the shape, else made from one in a stated way.

- *own*: the shape has the trace's experts and k (gpt-oss-20b; the embedded model takes its first layers).
- *stretched* (128 experts, top 8): a layer joins two streams of the recorded layer, that of the token itself
  and one of another place. A recorded expert stands for two experts of each stream, of which one is current;
  after each use it changes with chance `TURN`. With chance `STAY` a pick is one of the token before instead,
  with chance `STRAY` any expert. The three are calibrated so that LRU's hit rates per layer are those
  published for Qwen3-30B-A3B: 0.647, 0.810 and 0.918 at 16, 32 and 64 slots, within two points.
- *folded* (8 experts, top 2): recorded expert e is expert e modulo 8; the first two distinct ones count.

Tokens keep the recorded token's identity, hashed into the model's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.models import Shape
from fate_policy import data
from fate_policy.trace import Trace, load

TURN, STAY, STRAY = 0.13, 0.515, 0.022  # gives 0.655, 0.804, 0.930
PUBLISHED = {16: 0.647, 32: 0.810, 64: 0.918}
MOST_TOKENS = 8192
FIT_PROMPT = 512


@dataclass(frozen=True)
class Routing:
    """What is replayed.

    ids : int32 (n_tokens, n_layers, k), distinct within a token, best first
    tokens : int32 (n_tokens,), what is fed
    source : trace, way, part and hash, for the reader
    """

    ids: NDArray[np.int32]
    tokens: NDArray[np.int32]
    source: dict[str, Any]


def way(shape: Shape) -> str:
    if (shape.n_experts, shape.k) == (32, 4):
        return "own"
    if (shape.n_experts, shape.k) == (128, 8):
        return "stretched"
    if (shape.n_experts, shape.k) == (8, 2):
        return "folded"
    raise ValueError(f"no routing for {shape.n_experts} experts, top {shape.k}")


def routing(
    shape: Shape, name: str = "gptoss20b_stem", folder: Path | None = None, part: str = "test"
) -> Routing:
    """Return the replay of a shape.

    Parameters
    ----------
    part
        "test": from the second half of the trace's prompts, which classifiers were not fitted on; "fit": from
        the first.
    """
    path = data.find(name, folder)
    whole = load(path)
    cut = int(whole.prompt_start[len(whole.prompt_start) // 2])
    half = whole.slice(cut, whole.n_tokens) if part == "test" else whole.slice(0, cut)
    ids = half.experts(0, half.n_tokens).astype(np.int32)
    names = half.tokens.astype(np.int64)
    n = min(MOST_TOKENS, half.n_tokens)
    how = way(shape)
    layers = np.arange(shape.n_layers) * ids.shape[1] // shape.n_layers
    if how == "own":
        made = ids[:n, : shape.n_layers] if shape.n_layers <= ids.shape[1] else ids[:n, layers]
    elif how == "folded":
        made = _fold(ids[:n], shape.n_experts, shape.k)[:, layers]
    else:
        made = stretch(ids, n, layers)
    source = {"trace": path.stem, "sha256": whole.hash(), "way": how, "part": part, "n_tokens": n}
    tokens = (names[:n] * 2654435761 % (1 << 32) % shape.n_vocab).astype(np.int32)
    return Routing(np.ascontiguousarray(made, np.int32), tokens, source)


def without_last(made: Routing, shape: Shape) -> Routing:
    """Return the routing with uses of a layer's last expert given to the first one that the token leaves.

    All experts that are used then fit into one slot less than there are experts.
    """
    ids = made.ids.copy()
    last = shape.n_experts - 1
    used = np.zeros((*ids.shape[:2], shape.n_experts), np.bool_)
    np.put_along_axis(used, ids, True, axis=2)
    instead = np.broadcast_to(used.argmin(axis=2)[..., None], ids.shape)
    ids = np.where(ids == last, instead, ids).astype(np.int32)
    return replace(made, ids=ids, source={**made.source, "way": made.source["way"] + ", last expert spared"})


def as_trace(made: Routing, shape: Shape) -> Trace:
    """Return what is replayed as a recorded trace, for fitting and for the lab."""
    n = len(made.tokens)
    width = {"n_experts": shape.n_experts, "k": shape.k, "n_slots": shape.n_experts}
    meta = {name: [value] * shape.n_layers for name, value in width.items()}
    step = np.arange(n, dtype=np.int32)
    return Trace(
        ids=made.ids.astype(np.uint8),
        path=np.ones((n, shape.n_layers), np.uint8),
        step=step,
        sequence=np.zeros(n, np.int32),
        position=step % FIT_PROMPT,
        token_id=made.tokens,
        is_decode=np.ones(n, np.bool_),
        prompt_start=np.arange(0, n, FIT_PROMPT, dtype=np.int32),
        meta={**meta, "expert_bytes": [1] * shape.n_layers, "source": made.source},
    )


def _fold(ids: NDArray[np.int32], n_experts: int, k: int) -> NDArray[np.int32]:
    folded = ids % n_experts
    # the first k distinct: a repeated one goes behind
    for _ in range(ids.shape[2]):
        repeated = np.zeros(folded.shape, bool)
        for rank in range(1, ids.shape[2]):
            repeated[..., rank] = (folded[..., :rank] == folded[..., rank : rank + 1]).any(axis=-1)
        folded = np.where(repeated, (folded + 1) % n_experts, folded)
    return folded[..., :k]


def stretch(
    source: NDArray[np.int32],
    n_tokens: int,
    layers: NDArray[np.integer],
    turn: float = TURN,
    stay: float = STAY,
    stray: float = STRAY,
    seed: int = 0,
) -> NDArray[np.int32]:
    """Return int32 (n_tokens, len(layers), 8) of 128 experts; layer i comes from the source's `layers[i]`."""
    n_source, k = 32, 4
    rng = np.random.default_rng(seed)
    out = np.empty((n_tokens, len(layers), 2 * k), np.int32)
    for at, layer in enumerate(layers):
        for stream in range(2):
            start = stream * (len(source) // 2 + at * 97)
            rows = np.arange(start, start + n_tokens) % len(source)
            picks = source[rows, layer].tolist()
            turns = (rng.random((n_tokens, k)) < turn).tolist()
            chance = rng.random((n_tokens, k)).tolist()
            other = rng.integers(k, size=(n_tokens, k)).tolist()
            anything = rng.integers(2 * n_source, size=(n_tokens, k)).tolist()
            current = rng.integers(2, size=n_source).tolist()
            before: list[int] = []
            base = stream * 2 * n_source
            made = []
            for token in range(n_tokens):
                chosen = [base + current[e] * n_source + e for e in picks[token]]
                for i in range(k):
                    draw = chance[token][i]
                    if draw < stray:
                        instead = base + anything[token][i]
                    elif draw < stray + stay and before:
                        instead = before[other[token][i]]
                    else:
                        continue
                    if instead not in chosen:
                        chosen[i] = instead
                made.append(chosen)
                before = chosen
                for e, turned in zip(picks[token], turns[token], strict=True):
                    if turned:
                        current[e] = 1 - current[e]
            out[:, at, stream::2] = made
    return out


def lru_hits(ids: NDArray[np.integer], capacities: list[int], skip: int = 200) -> list[float]:
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
    return [float(rate) for rate in hits / uses]
