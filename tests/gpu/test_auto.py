"""On a GPU: `slots: auto` takes what fits, says so, and never changes a bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest
from gpu.test_models import RESIDENT, cudart

from fate_bind.session import Session

pytestmark = [pytest.mark.gpu, pytest.mark.model]

ARGS = ["-c", "1024"]
MIB = 2**20
MARGIN = 2**30  # the default of vram_margin


@pytest.fixture(scope="module")
def plain() -> Iterator[Session]:
    with Session(args=ARGS, fate=False) as session:
        yield session


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    with Session(args=[*ARGS, *RESIDENT], fate=False, place=False) as session:
        return run(session)


def run(session: Session) -> list[np.ndarray]:
    rows = [session.logits(range(100, 100 + n)) for n in (1, 20, 300)]
    return [*rows, *(session.logits([token]) for token in range(40))]


def used_vram() -> int:
    cuda = ctypes.CDLL(cudart())
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    return total.value - free.value


def test_experts_that_all_fit_are_placed_in_vram(plain: Session, expected: list[np.ndarray]) -> None:
    for slots in ("auto", "100%"):
        with plain.fork(policy="lru", slots=slots) as session:
            got = run(session)
            stats = session.stats()
        assert not stats["engaged"]
        assert stats["reason"] == "all experts resident"
        assert stats["pool_bytes"] > 0
        assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_smaller_card_gets_fewer_slots(plain: Session, expected: list[np.ndarray]) -> None:
    outcomes = set()
    sizes: list[int] = []
    for room in range(0, 600 * MIB, MIB):
        limit = used_vram() + room
        with plain.fork(policy="lru", slots="auto", vram=limit + MARGIN) as session:
            stats = session.stats()
            slots = stats["slots"] // stats["layers"]
            if stats["engaged"] and slots not in sizes:
                sizes.append(slots)
                slot = int(sum(stats["per_layer"]["expert_bytes"]))
                assert limit - slot - 8 * MIB <= used_vram() <= limit + 2 * MIB  # what the driver rounds up
                assert all(np.array_equal(a, b) for a, b in zip(run(session), expected, strict=True))
        outcomes.add(stats["reason"].split(":")[0])
        if stats["reason"] == "all experts resident":
            break
    assert outcomes == {"slots", "", "all experts resident"}
    assert sizes == sorted(sizes)
    assert len(sizes) > 3
