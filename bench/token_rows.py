"""Rows of the classifier's token tables, dense or of the likeliest experts only, at the same memory.

Fits on the first half of a trace's prompts and tests on the start of the second, each kind of row in both.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy import assess, data, features, trace, train
from fate_policy.features import KEY_BYTES, Table
from fate_policy.kernels import Routing, simulate, simulate_scores


def likeliest(n_layers: int, n_experts: int, kept: int) -> type[Table]:
    """Return tables that keep `kept` experts of each layer, a byte and a half-precision number each.

    Their sums are held densely here, with zeros for what is dropped; only their size is that of short rows.
    """
    n = n_layers * n_experts

    class Likeliest(Table):
        @staticmethod
        def row_bytes(n_columns: int) -> int:
            return 2 * (n_layers * kept * 3 + (n_columns - n) * 2) + 8 + KEY_BYTES

        def add(
            self,
            key: Any,
            when: int,
            numbers: NDArray[np.float32] | float,
            weight: float = 1.0,
            columns: NDArray[np.integer[Any]] | slice = slice(None),
        ) -> None:
            super().add(key, when, numbers, weight, columns)
            if (row := self.get(key)) < 0:
                return
            is_new = np.zeros(self.sums.shape[2], np.bool_)
            is_new[columns] = np.asarray(numbers) > 0
            sums = self.sums[row, when, :n].reshape(n_layers, n_experts)
            worth = sums + 0.5 * is_new[:n].reshape(n_layers, n_experts)  # of equals the newest
            dropped = np.argpartition(-worth, kept - 1, axis=1)[:, kept:]
            np.put_along_axis(sums, dropped, np.float16(0), axis=1)

    return Likeliest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", nargs="?", default="gptoss20b_stem")
    parser.add_argument("--kept", type=int, nargs="*", default=[8, 12], help="experts of a short row")
    parser.add_argument("--mb", type=float, nargs="*", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, nargs=2, default=[10_000, 8_000], help="to fit on, to test on")
    args = parser.parse_args()

    whole = assess.decode_only(trace.load(data.find(args.trace)))
    first, second = (half.slice(0, n) for half, n in zip(train.split(whole), args.tokens, strict=True))
    routing = Routing.of_trace(second)
    shape = train.shape_of(whole).table
    kinds: dict[str, type[Table]] = {"dense": Table}
    kinds |= {f"{kept} of {shape[1]}": likeliest(*shape, kept) for kept in args.kept}
    print("rows        MiB  tokens   pairs  of the gap closed at 25 %, late; 50 %, late")
    for name, kind in kinds.items():
        features.Table = kind  # type: ignore[misc]
        fitted = train.fit([first], train.Options(sample_every=8, n_folds=2))
        for mb in args.mb:
            state = fitted.features(table_mb=mb)
            tables = assess.serve(fitted, second, table_mb=mb)
            closed = []
            for share in (0.25, 0.5):
                slots = assess.slots_of(second, share)
                lru = simulate(routing, slots).hit_rate
                gap = simulate(routing, slots, "optimum").hit_rate - lru
                keep, late = fitted.head("keep", share), fitted.head("late", share)
                sync = simulate_scores(routing, slots, tables[keep.name])
                delayed = simulate_scores(routing, slots, tables[late.name], bonus=late.bonus, delay=1)
                closed += [(found.hit_rate - lru) / gap for found in (sync, delayed)]
            sizes = f"{len(state.tokens.sums):7} {len(state.pairs.sums):7}"
            print(f"{name:10} {mb:4g} {sizes}  " + " ".join(f"{part:.3f}" for part in closed), flush=True)


if __name__ == "__main__":
    main()
