"""What the classifier knows about each expert: the one way from routing to features, trained and served.

All features of a token come from the routing before it and from the tokens up to and with it. They are linear
pieces that a device can keep: decayed counts, one row of a table a token, sums of rows of a small basis.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy import checks

HALF_LIVES = (1, 2, 4, 8, 16, 32, 64, 256)
EARLY_HALF_LIVES = (4, 16, 64, 256)
EARLY_TOKENS, EARLY_END = 24, 384
NGRAMS = (2, 4, 8)
NAMES = (
    *(f"rate_{n}" for n in HALF_LIVES),
    *(f"log_rate_{n}" for n in HALF_LIVES),
    "log_age",
    "token_now",
    "pair_now",
    "token_later",
    "pair_later",
    *(f"repeat_{n}_{when}" for when in ("now", "soon", "later") for n in NGRAMS),
    *(f"early_log_rate_{n}" for n in EARLY_HALF_LIVES),
)
"""rate: decayed share of tokens that used the expert, by half-life in tokens.

token, pair: how often it was used at, or in the `LATER` tokens after, earlier occurrences of this token, or
of this token after the one before it; rare ones back off to the token and to the rates.
repeat: whether it was used at, or after, the last occurrence of the longest context that was seen before.
early: a log_rate by how early in its sequence the token is, halved every `EARLY_TOKENS`, 0 from `EARLY_END`:
there the rates tell of other text. The position alone would move all experts of a layer alike.
"""
EARLY_AT = [NAMES.index(f"early_log_rate_{n}") for n in EARLY_HALF_LIVES]
EARLY_OF = [NAMES.index(f"log_rate_{n}") for n in EARLY_HALF_LIVES]
"""Where in a row the early ones are, and what they are made of."""
WEIGHT_HALF_LIVES = (1, 4, 16, 64)
WEIGHT_NAMES = (
    *(f"weight_{n}" for n in WEIGHT_HALF_LIVES),
    *(f"log_weight_{n}" for n in WEIGHT_HALF_LIVES),
)
"""weight: decayed mean of the expert's router weight, 0 where not chosen, by half-life in tokens."""
CONTEXT_HALF_LIVES = (3.0, 12.0)
N_CONTEXTS = 5 + len(CONTEXT_HALF_LIVES)

LATER, LATER_DECAY = 5, 0.7
FOLLOW, FOLLOW_SOON, FOLLOW_LATER = 32, 0.7, 0.93
MAX_COUNT = 1024
MAX_AGE = 1024
MAX_SEQUENCES = 256
TABLE_MB = 256.0
MAX_HISTORY, HISTORY_SHARE = 65536, 0.25
KEY_BYTES = 256
"""What Python keeps for the key of a table's row, at most."""
UNKNOWN = -1


def names(weights: bool) -> tuple[str, ...]:
    """Return the features in their order, those of router weights last."""
    return (*NAMES, *WEIGHT_NAMES) if weights else NAMES


@dataclass(frozen=True, eq=False)
class Shape:
    """The layers of a model, int32 arrays (n_layers,)."""

    n_experts: NDArray[np.int32]
    k: NDArray[np.int32]

    @property
    def table(self) -> tuple[int, int]:
        return len(self.n_experts), int(self.n_experts.max(initial=1))

    def slots(self, share: float) -> NDArray[np.int64]:
        """Return the slots of each layer for a share of its experts, at least those of a token."""
        return np.maximum((self.n_experts * share).astype(np.int64), self.k)

    def even_rates(self) -> NDArray[np.float32]:
        """Return k / n_experts of each expert that exists, float32 (n_layers, max_experts)."""
        exists = np.arange(self.table[1]) < self.n_experts[:, None]
        return np.where(exists, (self.k / self.n_experts)[:, None], 0).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Constants:
    """The numbers by which `Features` weighs the tokens before, float32.

    rate_keep, context_keep : what a token leaves of each rate, of each decayed context
    soon, later, credit : what each of the tokens after a repeat, after a token counts
    """

    rate_keep: NDArray[np.float32]
    context_keep: NDArray[np.float32]
    soon: NDArray[np.float32]
    later: NDArray[np.float32]
    credit: NDArray[np.float32]


class Table:
    """Sums of rows of numbers for each key, at and after its occurrences; the least recent key makes room.

    Half precision, `row_bytes` a key. Sums are halved at `MAX_COUNT` occurrences, so that they stay exact.
    Rows are dense: of the likeliest experts alone more rows would fit, and evictions by them were worse at
    the same bytes (`bench/token_rows.py`).
    """

    def __init__(self, n_columns: int, n_rows: int) -> None:
        self.sums = np.zeros((n_rows, 2, n_columns), np.float16)
        self.n = np.zeros((n_rows, 2), np.float32)
        self._row: OrderedDict[Any, int] = OrderedDict()

    @staticmethod
    def row_bytes(n_columns: int) -> int:
        return 2 * n_columns * 2 + 8 + KEY_BYTES

    def __len__(self) -> int:
        return len(self._row)

    def get(self, key: Any) -> int:
        """Return the row of a key, -1 if there is none."""
        return self._row.get(key, -1)

    def add(
        self,
        key: Any,
        when: int,
        numbers: NDArray[np.float32] | float,
        weight: float = 1.0,
        columns: NDArray[np.integer] | slice = slice(None),
    ) -> None:
        """Add to columns of the sums at (`when` 0) or after (1) a key. Only the former makes a row.

        A column that is named twice must come with the same number, and is added to once.
        """
        row = self._row.get(key, -1)
        if row < 0:
            if when:
                return
            row = self._take()
            self._row[key] = row
        elif not when:
            self._row.move_to_end(key)
        sums = self.sums[row, when]
        sums[columns] += numbers
        self.n[row, when] += weight
        if self.n[row, when] >= MAX_COUNT:
            self.sums[row, when] *= np.float16(0.5)
            self.n[row, when] *= 0.5

    def _take(self) -> int:
        if len(self._row) < len(self.sums):
            return len(self._row)
        _, row = self._row.popitem(last=False)
        self.sums[row] = 0
        self.n[row] = 0
        return row

    def state(self, minimum: float) -> tuple[list[Any], NDArray[np.float32], NDArray[np.float16]]:
        """Return the keys seen at least `minimum` times, oldest first, with their counts and sums."""
        kept = [(key, row) for key, row in self._row.items() if self.n[row, 0] >= minimum]
        rows = np.array([row for _, row in kept], np.intp)
        return [key for key, _ in kept], self.n[rows], self.sums[rows]

    def restore(self, keys: list[Any], n: NDArray[np.float32], sums: NDArray[np.float16]) -> None:
        """Take in what `state` returned, the most recent rows if not all fit."""
        first = max(0, len(keys) - len(self.sums))
        for i in range(first, len(keys)):
            row = self._take()
            self._row[keys[i]] = row
            self.sums[row] = sums[i]
            self.n[row] = n[i]


class Contexts:
    """Where contexts of n tokens were last seen, by their hash; in a full bucket the oldest makes room."""

    WAYS = 4
    BYTES = 2 * 16  # a position: twice as many places as positions, so that few are lost

    def __init__(self, n_positions: int) -> None:
        n_buckets = max(1, 2 * n_positions // self.WAYS)
        self._hash = np.zeros((n_buckets, self.WAYS), np.int64)
        self._at = np.full((n_buckets, self.WAYS), -1, np.int64)

    def get(self, context: tuple[int, ...]) -> int:
        """Return the position, -1 if there is none."""
        value = hash(context)
        bucket = value % len(self._at)
        for way, known in enumerate(self._hash[bucket].tolist()):
            if known == value:
                return int(self._at[bucket, way])
        return -1

    def put(self, context: tuple[int, ...], position: int) -> None:
        value = hash(context)
        bucket = value % len(self._at)
        hashes, positions = self._hash[bucket].tolist(), self._at[bucket].tolist()
        way = hashes.index(value) if value in hashes else positions.index(min(positions))
        self._hash[bucket, way], self._at[bucket, way] = value, position


@dataclass(eq=False)
class _Sequence:
    tokens: deque[int] = field(default_factory=lambda: deque(maxlen=NGRAMS[-1]))
    last: int = -1
    pending: deque[tuple[int, tuple[int, int], int]] = field(default_factory=deque)


class Features:
    """Follow routing token by token and give the features of the token about to run.

    `expect` names that token; `now` is asked; `observe` tells what it routed.

    Parameters
    ----------
    basis
        float32 (n_layers * max_experts, rank): a token's routing is summed up by the sum of the rows used.
    center
        float32 (rank,): the mean of that sum, subtracted.
    table_mb
        Memory in MiB of all that grows: at most a quarter for the history, up to `MAX_HISTORY` tokens, in
        which repeated contexts are looked for; the rest in halves for the tables of tokens and of pairs.
    weights
        Have the features of router weights too; `observe` is then told them.
    """

    def __init__(
        self,
        shape: Shape,
        basis: NDArray[np.float32],
        center: NDArray[np.float32],
        *,
        table_mb: float = TABLE_MB,
        weights: bool = False,
    ) -> None:
        self.shape = shape
        self.weights = weights
        self.learning = True
        n_layers, n_experts = shape.table
        self._size = n_layers * n_experts
        self._basis = np.concatenate((basis, np.zeros((1, basis.shape[1]), np.float32)))
        self._center = center
        rank = basis.shape[1]
        self._tail = self._size + np.arange(rank)
        self._even = shape.even_rates()
        self._rates = np.repeat(self._even[None], len(HALF_LIVES), axis=0)
        self._keep = 2.0 ** (-1 / np.array(HALF_LIVES, np.float32))[:, None, None]
        self._gain = 1 - self._keep
        self._all = np.empty_like(self._rates)
        even_weights = self._even / shape.k[:, None]
        self._weights = np.repeat(even_weights[None], len(WEIGHT_HALF_LIVES) if weights else 0, axis=0)
        self._weight_keep = 2.0 ** (-1 / np.array(WEIGHT_HALF_LIVES, np.float32))[:, None, None]
        self._age = np.full((n_layers, n_experts), MAX_AGE, np.float32)
        width = n_layers * int(shape.k.max(initial=1))
        place = np.uint16 if self._size < 2**16 else np.int32
        position_bytes = width * np.dtype(place).itemsize + 4 * rank + 8 + len(NGRAMS) * Contexts.BYTES
        row_bytes = Table.row_bytes(self._size + rank)
        least = (2 * FOLLOW * position_bytes + 2 * row_bytes) / 2**20
        if table_mb < least:
            raise checks.bad_value("table_mb", table_mb, f"at least {least:.2f}, for one token and one pair")
        n_history = int(table_mb * 2**20 * HISTORY_SHARE / position_bytes)
        n_history = min(MAX_HISTORY, max(2 * FOLLOW, n_history))
        half = (table_mb * 2**20 - n_history * position_bytes) / 2
        self.tokens = Table(self._size + rank, int(half / row_bytes))
        self.pairs = Table(self._size, int(half / Table.row_bytes(self._size)))
        self._contexts = np.zeros((len(CONTEXT_HALF_LIVES), rank), np.float32)
        self._context_keep = 2.0 ** (-1 / np.array(CONTEXT_HALF_LIVES, np.float32))[:, None]
        self._last = np.zeros(rank, np.float32)
        self._n_history = n_history
        self._used = np.full((n_history, width), self._size, place)
        self._sums = np.zeros((n_history, rank), np.float32)
        self._next = np.full(n_history, -1, np.int64)
        self._n_seen = 0
        self._seen = [Contexts(n_history) for _ in NGRAMS]
        self._sequences: dict[int, _Sequence] = {}
        self._offset = (np.arange(n_layers) * n_experts)[:, None]
        self._row = np.zeros((n_layers, len(names(weights)), n_experts), np.float32)
        self._repeats = self._is_early = False  # the row's features of repeats, of early tokens are not 0
        steps = np.arange(FOLLOW)
        self._soon = ((1 - FOLLOW_SOON) * FOLLOW_SOON**steps).astype(np.float32)
        self._later = ((1 - FOLLOW_LATER) * FOLLOW_LATER**steps).astype(np.float32)
        self._credit = ((1 - LATER_DECAY) * LATER_DECAY ** np.arange(LATER)).astype(np.float32)
        self._soon_each, self._later_each, self._credit_each = (
            np.repeat(weights, width) for weights in (self._soon, self._later, self._credit)
        )
        self.expect(UNKNOWN, 0)

    @property
    def n_context(self) -> int:
        """Length of the context vector."""
        return N_CONTEXTS * len(self._last)

    @property
    def n_history(self) -> int:
        """Tokens in which repeated contexts are looked for."""
        return self._n_history

    @property
    def constants(self) -> Constants:
        return Constants(
            self._keep.ravel().astype(np.float32),
            self._context_keep.ravel().astype(np.float32),
            self._soon,
            self._later,
            self._credit,
        )

    def expect(self, token: int, sequence: int, position: int = UNKNOWN) -> None:
        """Take in which token runs next and where in its sequence; `UNKNOWN` if that is not known."""
        known = self._sequences.get(sequence)
        before = known.tokens if known else deque[int]()
        self._token, self._sequence = token, sequence
        self._early = 2.0 ** (-position / EARLY_TOKENS) if 0 <= position < EARLY_END else 0.0
        self._pair = (before[-1] if before else UNKNOWN, token)
        self._grams: list[tuple[int, ...] | None] = [None] * len(NGRAMS)
        self._match, self._match_level = -1, -1
        if token == UNKNOWN:
            return
        context = (*before, token)
        for level, n in enumerate(NGRAMS):
            if len(context) < n or UNKNOWN in context[-n:]:
                break
            self._grams[level] = context[-n:]
            found = self._seen[level].get(context[-n:])
            if found >= 0 and found > self._n_seen - self._n_history:
                self._match, self._match_level = found, level

    @contextlib.contextmanager
    def supposing(self, token: int, sequence: int, position: int = UNKNOWN) -> Iterator[None]:
        """Ask `now` as if this token ran next, and forget it again."""
        names = ("_token", "_sequence", "_early", "_pair", "_grams", "_match", "_match_level")
        held = {name: getattr(self, name) for name in names}
        self.expect(token, sequence, position)
        try:
            yield
        finally:
            vars(self).update(held)

    def now(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the features (n_layers, n_features, max_experts) and the context vector (n_context,).

        Both are buffers that the next call overwrites.
        """
        row, h = self._row, len(HALF_LIVES)
        row[:, :h] = self._rates.transpose(1, 0, 2)
        logs = np.add(self._rates, np.float32(0.02), out=self._all)
        row[:, h : 2 * h] = np.log(logs, out=logs).transpose(1, 0, 2)
        np.log(self._age, out=row[:, 2 * h])
        base = np.float32(0.5) * (self._rates[4] + self._rates[6])
        at = self.tokens.get(self._token)
        pair = self.pairs.get(self._pair)
        for when, column, strength in ((0, 2 * h + 1, (2.0, 1.0)), (1, 2 * h + 3, (4.0, 4.0))):
            share = self._share(self.tokens, at, when, base, strength[0])
            if self._token == UNKNOWN:
                pair = -1
            both = self._share(self.pairs, pair, when, share, strength[1])
            row[:, column] = self._logs(share, when)
            row[:, column + 1] = row[:, column] if both is share else self._logs(both, when)
        rank = len(self._last)
        context = np.zeros((N_CONTEXTS, rank), np.float32)
        if at >= 0:
            sums = self.tokens.sums[at, :, self._size :].astype(np.float32)
            context[:2] = sums / (self.tokens.n[at] + 2)[:, None]
        context[2] = self._last
        context[5:] = self._contexts
        early = row[:, len(NAMES) - len(EARLY_HALF_LIVES) : len(NAMES)]
        if self._early or self._is_early:
            np.multiply(row[:, EARLY_OF], np.float32(self._early), out=early)
        self._is_early = self._early > 0
        repeat = row[:, 2 * h + 5 : len(NAMES) - len(EARLY_HALF_LIVES)]
        if self._repeats:
            repeat[:] = 0
        self._repeats = self._match >= 0
        if self._repeats:
            self._repeat(repeat, context[3:5])
        if self.weights:
            w = len(WEIGHT_HALF_LIVES)
            by_weight = row[:, len(NAMES) :]
            by_weight[:, :w] = self._weights.transpose(1, 0, 2)
            np.log(by_weight[:, :w] + np.float32(0.01), out=by_weight[:, w:])
        return row, context.ravel()

    @staticmethod
    def _logs(share: NDArray[np.float32], when: int) -> NDArray[np.float32]:
        logs: NDArray[np.float32] = np.log(share + np.float32(0.01))
        if when == 0:
            logs -= np.log(np.float32(1.01) - share)
        return logs

    def _share(
        self, table: Table, at: int, when: int, base: NDArray[np.float32], strength: float
    ) -> NDArray[np.float32]:
        if at < 0 or table.n[at, when] == 0:
            return base
        sums = table.sums[at, when, : self._size].astype(np.float32).reshape(base.shape)
        sums += np.float32(strength) * base
        sums /= table.n[at, when] + np.float32(strength)
        return sums

    def _repeat(self, row: NDArray[np.float32], context: NDArray[np.float32]) -> None:
        match = self._match
        after = self._following(match)
        slot = match % self._n_history
        context[0] = self._sums[slot]
        found = [np.bincount(self._used[slot], minlength=self._size + 1)]
        if after:
            slots = np.array(after) % self._n_history
            used = self._used[slots]
            n = len(slots)
            for weights in (self._soon_each, self._later_each):
                found.append(np.bincount(used.ravel(), weights[: used.size], minlength=self._size + 1))
            context[1] = self._soon[:n] @ self._sums[slots]
        for i, values in enumerate(found):
            table = values[: self._size].reshape(row.shape[0], -1).astype(np.float32)
            first = i * len(NGRAMS)
            row[:, first : first + self._match_level + 1] = table[:, None]

    def _following(self, position: int, n: int = FOLLOW) -> list[int]:
        found: list[int] = []
        oldest = self._n_seen - self._n_history
        for _ in range(n):
            position = self._next.item(position % self._n_history)
            if position <= oldest or position < 0:
                break
            found.append(position)
        return found

    def observe(
        self,
        ids: NDArray[np.int32],
        token: int,
        sequence: int,
        weights: NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Take in the routing of one token, int32 (n_layers, k), -1 = not run.

        weights : the router's, like ids; needed by the features that were asked for. They count in half
            precision, which is how a trace keeps them, so that a run and its replay decide alike.
        """
        if self.weights:
            if weights is None:
                raise checks.bad_value(
                    "weights", None, "the router weights of the token, to make features of"
                )
            self._weigh(ids, weights)
        if (token, sequence) != (self._token, self._sequence):
            self.expect(token, sequence)
        flat = (ids + self._offset).ravel()
        used = flat
        if ids.min(initial=0) < 0:
            used = flat[ids.ravel() >= 0]
            flat = np.where(ids.ravel() >= 0, flat, self._size)
        use = np.zeros(self._even.shape, np.float32)
        use.reshape(-1)[used] = 1
        self._rates *= self._keep
        self._rates += np.multiply(self._gain, use, out=self._all)
        self._age += 1
        np.minimum(self._age, MAX_AGE, out=self._age)
        self._age.reshape(-1)[used] = 1
        total = self._basis.take(flat, axis=0).sum(axis=0) - self._center
        self._contexts *= self._context_keep
        self._contexts += (1 - self._context_keep) * total
        self._last = total
        here = self._sequences.pop(sequence, None) or _Sequence()
        self._sequences[sequence] = here
        if len(self._sequences) > MAX_SEQUENCES:
            del self._sequences[next(iter(self._sequences))]
        if self.learning:
            self._learn(here, flat, used, total)
        here.tokens.append(token)
        self.expect(UNKNOWN, sequence)

    def _weigh(self, ids: NDArray[np.int32], weights: NDArray[np.floating[Any]]) -> None:
        now = np.zeros(self._size + 1, np.float32)
        now[np.where(ids >= 0, ids + self._offset, self._size)] = weights.astype(np.float16)
        self._weights *= self._weight_keep
        self._weights += (1 - self._weight_keep) * now[:-1].reshape(self._even.shape)

    def _learn(
        self,
        here: _Sequence,
        flat: NDArray[np.integer],
        used: NDArray[np.integer],
        total: NDArray[np.float32],
    ) -> None:
        position = self._n_seen
        slot = position % self._n_history
        self._used[slot] = self._size
        self._used[slot, : flat.size] = flat
        self._sums[slot] = total
        self._next[slot] = -1
        if here.last > position - self._n_history and here.last >= 0:
            self._next[here.last % self._n_history] = position
        here.last = position
        self._n_seen += 1
        for level, gram in enumerate(self._grams):
            if gram is not None:
                self._seen[level].put(gram, position)
        if self._token != UNKNOWN:
            ones = np.ones(len(used), np.float32)
            self._count(self._token, self._pair, 0, used, ones, total, 1.0)
        here.pending.append((self._token, self._pair, position))
        if len(here.pending) > LATER:
            token, pair, at = here.pending.popleft()
            if token != UNKNOWN:
                self._learn_later(token, pair, at)

    def _learn_later(self, token: int, pair: tuple[int, int], at: int) -> None:
        after = self._following(at, LATER)
        if len(after) < LATER:
            return
        slots = np.array(after) % self._n_history
        used = self._used[slots].ravel()
        uses = np.bincount(used, self._credit_each, minlength=self._size + 1).astype(np.float32)
        if used.max(initial=0) == self._size:
            used = used[used < self._size]
        uses = uses[used]
        total = self._credit @ self._sums[slots]
        n = float(self._credit.sum())
        self._count(token, pair, 1, used, uses, total, n)

    def _count(
        self,
        token: int,
        pair: tuple[int, int],
        when: int,
        used: NDArray[np.integer],
        uses: NDArray[np.float32],
        total: NDArray[np.float32],
        weight: float,
    ) -> None:
        columns, numbers = np.concatenate((used, self._tail)), np.concatenate((uses, total))
        self.tokens.add(token, when, numbers, weight, columns)
        self.pairs.add(pair, when, uses, weight, used)
