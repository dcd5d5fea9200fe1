"""On a GPU: compute-sanitizer finds nothing in the kernels, by themselves and in a small model's run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from exactness.conftest import ROOT, Build, build
from gpu.test_late_fills import tool

__all__ = ["build"]  # a fixture

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.native,
    pytest.mark.model,
    pytest.mark.skipif(
        SANITIZER is None or "FATE_SANITIZERS" not in os.environ,
        reason="takes minutes: set FATE_SANITIZERS=1; needs compute-sanitizer of the CUDA toolkit",
    ),
]

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
"""racecheck sees shared memory alone; what blocks share is left to `test_late_fills.py`."""

PROGRAMS = [
    *((name, tool_name) for name in ("test-cuda", "test-cuda-linear") for tool_name in TOOLS),
    *((name, tool_name) for name in ("test-cuda-callback", "test-cuda-prefetch") for tool_name in TOOLS[:3]),
]
"""racecheck makes answers of `test-cuda-callback` late, and what looks and copies beside a step take minutes:
their kernels go through it in the runs below."""

RUNS = [
    *(("table", "lru", tool_name) for tool_name in ("memcheck", "synccheck", "racecheck")),
    *(("callback", "lru", tool_name) for tool_name in ("memcheck", "racecheck")),
    ("table", "frequency", "memcheck"),
]

SESSION = """
import sys
from fate_bind.session import Session

mode, policy = sys.argv[1:]
arguments = ["-c", "512", "-np", "4", "-ub", "64"]
with Session(args=arguments, policy=policy, slots=8, mode=mode, throttle_gbps=4, require=True) as session:
    session.logits(list(range(5, 45)))
    for token in range(60, 72):
        session.logits([token])
    session.clear()
    session.decode([7, 8], [0] * 2, range(2))
    session.check()
"""


def sanitized(tool_name: str, command: list[str]) -> str:
    """Run a command whose kernels of ours are watched; return what was printed."""
    assert SANITIZER
    done = subprocess.run(
        [SANITIZER, "--tool", tool_name, "--error-exitcode", "9", "--kernel-name", "kns=fate_", *command],
        env={**os.environ, "FATE_FEW_STEPS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[:2000] + said[-2000:]
    return said


@pytest.mark.parametrize(("name", "tool_name"), PROGRAMS)
def test_the_kernels_by_themselves(build: Build, name: str, tool_name: str) -> None:
    done = subprocess.run(
        [tool("cmake"), "--build", build.native, "--target", name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " 0 failed" in sanitized(tool_name, [str(build.native / name)])


@pytest.mark.parametrize(("mode", "policy", "tool_name"), RUNS)
def test_a_run(mode: str, policy: str, tool_name: str) -> None:
    said = sanitized(tool_name, [sys.executable, "-c", SESSION, mode, policy])
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said
