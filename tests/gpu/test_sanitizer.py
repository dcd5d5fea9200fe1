"""On a GPU: compute-sanitizer finds nothing in the kernels, by themselves and in a small model's run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exactness.conftest import ROOT, Build, build
from gpu.test_native import program

from fate_bind.session import Session
from fate_policy import assess, train
from fate_policy.trace import load

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
"""racecheck makes answers of `test-cuda-callback` late; `test-cuda-prefetch` takes minutes under it, and
`test-cuda-lookahead` under each of them: their kernels go through it in the runs below."""

RUNS = [
    *(("table", "lru", tool_name) for tool_name in ("memcheck", "synccheck", "racecheck")),
    *(("callback", "lru", tool_name) for tool_name in ("memcheck", "racecheck")),
    ("table", "frequency", "memcheck"),
    *(("table", "classifier", tool_name) for tool_name in ("memcheck", "synccheck", "racecheck")),
]

SESSION = """
import sys
from fate_bind.session import Session
from fate_policy.classifier import Classifier

mode, policy, model = sys.argv[1:]
policy = Classifier(model=model) if policy == "classifier" else policy
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
    """Run a command; return what was printed."""
    assert SANITIZER
    done = subprocess.run(
        [SANITIZER, "--tool", tool_name, "--error-exitcode", "9", *command],
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
    assert " 0 failed" in sanitized(tool_name, [str(program(build, name))])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier for the embedded model, fitted to hardly anything."""
    folder = tmp_path_factory.mktemp("fitted")
    with Session(slots=16, record=folder / "trace.npz") as session:
        for token in range(60, 120):
            session.logits([token])
    small = train.Options(
        sample_every=1, rank_basis=16, rank=16, n_folds=2, heads=((0.25, 4), (0.5, 8)), table_minimum=1
    )
    train.fit([assess.decode_only(load(folder / "trace.npz"))], small).save(folder / "small.fate.npz")
    return folder / "small.fate.npz"


@pytest.mark.parametrize(("mode", "policy", "tool_name"), RUNS)
def test_a_run(mode: str, policy: str, tool_name: str, fitted: Path) -> None:
    """Upstream's kernels are left out: they take long, and are not ours to mend."""
    watched = ["--kernel-name", "kns=fate_"]
    said = sanitized(tool_name, [*watched, sys.executable, "-c", SESSION, mode, policy, str(fitted)])
    assert "ERROR SUMMARY: 0 errors" in said or "RACECHECK SUMMARY: 0 hazards" in said
