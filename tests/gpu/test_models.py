"""On a GPU: experts of every architecture and quantisation give the same bits from slots as all resident."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from exactness.conftest import Build, architectures, build, embedded, models, quantize
from exactness.test_architectures import ENGAGING
from exactness.test_quantisations import KINDS
from numpy.typing import NDArray

from fate_bind.errors import EngineError
from fate_bind.session import Session

__all__ = ["architectures", "build", "embedded", "models"]  # fixtures

pytestmark = [pytest.mark.gpu, pytest.mark.model]

RESIDENT = ["-ngl", "999", "-fit", "off"]


def run(session: Session, prompt: Sequence[int], n_decode: int) -> NDArray[np.float32]:
    """Prompt and greedy decode; all logits."""
    rows = [session.logits(prompt)]
    for _ in range(n_decode):
        rows.append(session.logits([int(np.argmax(rows[-1][-1]))]))
    return np.concatenate(rows)


def compare(
    model: Path, args: list[str], slots: int | str, prompt: Sequence[int], n_decode: int
) -> dict[str, int]:
    """Fail unless all logits are the resident run's; return the engine's totals."""
    with Session(model, [*args, *RESIDENT], fate=False, place=False) as session:
        expected = run(session, prompt, n_decode)
    with Session(model, args, slots=slots, policy="lru", mode="table", require=True) as session:
        got = run(session, prompt, n_decode)
        session.check()
        total = session.counters().totals()
        stats = session.stats()
    assert stats["layers_engaged"] == stats["layers"], stats["reason"]
    unequal = (got.view(np.uint32) != expected.view(np.uint32)).any(axis=1)
    assert not unequal.any(), f"{unequal.sum()} of {len(unequal)} rows differ, first {np.argmax(unequal)}"
    assert not np.isnan(got).all()
    assert total["bypassed"] == 0
    assert total["fills"] > 0
    assert total["hits"] + total["misses"] > 0
    return total


@pytest.mark.parametrize("name", ENGAGING)
def test_architecture(name: str, architectures: Path) -> None:
    # -ub 64: staged ahead; 24: one step, staged layer by layer; 8: several, on the edge of the pool
    for ubatch, n in (("64", 80), ("24", 24), ("8", 24)):
        compare(architectures / f"{name}-moe.gguf", ["-c", "128", "-ub", ubatch], 4, range(1, n + 1), 12)


@pytest.mark.parametrize("kind", KINDS)
def test_quantisation(kind: str, build: Build, embedded: Path, models: Path) -> None:
    model = quantize(build, embedded, models / f"{kind}.gguf", kind)
    for slots, n in (("25%", 48), (31, 80)):
        total = compare(model, ["-c", "256"], slots, range(100, 100 + n), 24)
        assert total["staged"] > 0
    model.unlink()


@pytest.mark.parametrize("flags", [["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"], ["-fa", "off"], ["-nkvo"]])
def test_flags(flags: list[str], embedded: Path) -> None:
    compare(embedded, ["-c", "512", *flags], 8, range(100, 140), 40)


def test_no_memory_is_told_and_leaves_the_process_whole(embedded: Path) -> None:
    """What the pool cannot have is said; the run goes on without it."""
    with Session(args=["-c", "256"], fate=False) as plain:
        expected = plain.logits([1, 2, 3])
        cuda = ctypes.CDLL(cudart())
        held = []
        size = 1 << 36
        while size >= 1 << 20:
            pointer = ctypes.c_void_p()
            if cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)):
                cuda.cudaGetLastError()
                size //= 2
            else:
                held.append(pointer)
        try:
            with pytest.raises(EngineError, match=r"no memory|reserve|cannot make a context"):
                plain.fork(slots=31, policy="lru", mode="table", require=True)
        finally:
            for pointer in held:
                cuda.cudaFree(pointer)
        plain.clear()
        assert np.array_equal(plain.logits([1, 2, 3]), expected)


def cudart() -> str:
    """Return the path of the CUDA runtime that this process has loaded."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libcudart" in line:
            return line.split()[-1]
    raise AssertionError("no CUDA runtime is loaded")
