"""Routing replay, for benchmarks: every token takes the experts of its row, in prompts and alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fate_bind import library
from fate_bind.session import Session
from fate_policy.trace import load

pytestmark = pytest.mark.model

ARGS = ["-c", "256", "-ub", "32"]
N_ROWS, N_LAYERS, N_EXPERTS, K = 50, 8, 32, 4


@pytest.fixture
def table() -> Iterator[NDArray[np.int32]]:
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((N_ROWS, N_LAYERS, N_EXPERTS)), axis=2)[..., :K].astype(np.int32)
    ids = np.ascontiguousarray(ids)
    ffi, lib = library.load()
    library.check(lib.fate_replay_routing(ffi.from_buffer("int32_t[]", ids), *ids.shape))
    yield ids
    library.check(lib.fate_replay_routing(ffi.NULL, 0, 0, 0))


def test_rows_follow_the_tokens(table: NDArray[np.int32], tmp_path: Path) -> None:
    """A prompt of which only the last token's logits are wanted moved the place in the table by one row."""
    path = tmp_path / "trace.npz"
    with Session(args=ARGS, slots=8, record=path) as session:
        session.decode(range(20), outputs=[False] * 19 + [True])
        session.decode([7])
        session.decode(range(31), outputs=[False] * 31)
        session.decode([8])
        lib = library.load().lib
        library.check(lib.fate_engine_seek_routing(lib.fate_context_engine(session._context), 5))
        session.decode([9])
    trace = load(path)
    rows = [*range(20), 20, *(np.arange(21, 52) % N_ROWS), 52 % N_ROWS, 5]
    got = trace.experts(0, trace.n_tokens)
    assert trace.n_tokens == len(rows)
    ran = got[:, :, 0] >= 0
    assert ran[:, :-1].all()
    assert np.array_equal(got[ran], table[rows][ran])


def test_a_session_that_does_not_engage_replays_too(table: NDArray[np.int32]) -> None:
    with Session(args=ARGS, slots="100%") as plain, plain.fork(slots=8) as pooled:
        assert not plain.stats()["engaged"]
        for _ in range(3):
            assert np.array_equal(plain.logits([1, 2, 3, 4]), pooled.logits([1, 2, 3, 4]))
