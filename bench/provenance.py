"""Where a number comes from: machine, build, sources, command line."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GPU = {
    "name": "name",
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "max_sm_mhz": "clocks.max.sm",
    "power_limit_w": "power.limit",
    "pcie_generation": "pcie.link.gen.current",
    "pcie_width": "pcie.link.width.current",
    "memory_mib": "memory.total",
}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu(*fields: str) -> dict[str, str] | None:
    """Return what nvidia-smi says of the first device, None without one."""
    names = fields or tuple(GPU)
    query = ",".join(GPU.get(name, name) for name in names)
    line = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", "0")
    return dict(zip(names, (part.strip() for part in line.split(",")), strict=False)) if line else None


def free_vram() -> int | None:
    """Return free bytes of the first device without making a CUDA context; None if nobody tells."""
    found = gpu("memory.free")
    return int(found["memory.free"]) << 20 if found and found["memory.free"].isdigit() else None


def cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def commit() -> str:
    """Return the commit of this checkout, with "+" if files differ; "unknown" outside a repository."""
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def collect(known_commit: str | None = None) -> dict[str, Any]:
    from fate_bind import library

    ffi, lib = library.load()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": sys.argv,
        "commit": known_commit or commit(),
        "build_id": library.text(ffi, lib.fate_build_id()),
        "llama": library.text(ffi, lib.fate_system_info()),
        "gpu": gpu(),
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "ram_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
