"""The CUDA runtime that the library has loaded: free memory, and how fast it copies."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np

REGISTER_MAPPED, REGISTER_READ_ONLY = 2, 8
HOST_TO_DEVICE = 1


def runtime() -> Any | None:
    """Return the runtime of this process, None if it has none."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if "libcudart" in line:
            return ctypes.CDLL(line.split(maxsplit=5)[-1])
    return None


def memory() -> tuple[int, int] | None:
    """Return free and total bytes of the device, None without one. Makes this process's CUDA context."""
    cuda = runtime()
    if cuda is None:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) != 0:
        return None
    return free.value, total.value


class Link:
    """Copies from a page-locked model file to the device, in pieces of one expert."""

    MOST_BYTES = 2 << 30

    def __init__(self, path: Path, piece_bytes: int) -> None:
        found = runtime()
        if found is None:
            raise RuntimeError("this process has no CUDA runtime to measure the link with")
        self.cuda: Any = found
        self.piece = piece_bytes
        with path.open("rb") as file:
            self.n_bytes = min(path.stat().st_size, self.MOST_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
            self.map = mmap.mmap(file.fileno(), self.n_bytes, prot=mmap.PROT_READ)
        self.array = np.frombuffer(self.map, np.uint8)
        self.source = self.array.ctypes.data
        self._check(
            self.cuda.cudaHostRegister(
                ctypes.c_void_p(self.source),
                ctypes.c_size_t(self.n_bytes),
                REGISTER_MAPPED | REGISTER_READ_ONLY,
            )
        )
        self.target = ctypes.c_void_p()
        self._check(self.cuda.cudaMalloc(ctypes.byref(self.target), ctypes.c_size_t(piece_bytes)))
        self.events = [ctypes.c_void_p() for _ in range(2)]
        for event in self.events:
            self._check(self.cuda.cudaEventCreate(ctypes.byref(event)))

    def bytes_per_second(self, n: int = 200) -> float:
        """Return the speed of `n` copies in a row, each from another place."""
        places = (np.arange(n, dtype=np.int64) * 2654435761 % (self.n_bytes - self.piece)) // 4096 * 4096
        for start in range(2):  # once to warm up
            if start:
                self._check(self.cuda.cudaEventRecord(self.events[0], None))
            for place in places.tolist():
                self._check(
                    self.cuda.cudaMemcpyAsync(
                        self.target,
                        ctypes.c_void_p(self.source + place),
                        ctypes.c_size_t(self.piece),
                        HOST_TO_DEVICE,
                        None,
                    )
                )
        self._check(self.cuda.cudaEventRecord(self.events[1], None))
        self._check(self.cuda.cudaEventSynchronize(self.events[1]))
        ms = ctypes.c_float()
        self._check(self.cuda.cudaEventElapsedTime(ctypes.byref(ms), *self.events))
        return self.piece * n / (ms.value / 1e3)

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"CUDA error {status} while measuring the link")
