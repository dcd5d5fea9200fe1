from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from bench import cuda

HERE = Path(__file__).resolve().parent


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libcudart.so.13"
    subprocess.run(["cc", "-shared", "-fPIC", HERE / "fake_cudart.c", "-o", library], check=True)
    monkeypatch.setattr(cuda, "runtime", lambda: ctypes.CDLL(str(library)))


def test_memory(fake: None) -> None:
    assert cuda.memory() == (70_000_000_000, 80_000_000_000)


def test_the_link_is_timed_over_copies_of_one_expert(fake: None, tmp_path: Path) -> None:
    """The sizes are those of a large model: more than 2^31 bytes are page-locked, which no int holds."""
    model = tmp_path / "m.gguf"
    with model.open("wb") as file:
        file.truncate(3 << 30)
    link = cuda.Link(model, 2_700_000)
    assert link.bytes_per_second(50) == pytest.approx(2_700_000 * 1e3)


def test_a_refusal_is_an_error(fake: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(cuda, "REGISTER_READ_ONLY", 0)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        cuda.Link(model, 4096)


def test_without_a_runtime_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "runtime", lambda: None)
    assert cuda.memory() is None
