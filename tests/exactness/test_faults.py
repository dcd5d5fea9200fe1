"""Faults built in on purpose: each must be caught by `fate verify`, and the same run without it must pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Build

pytestmark = [pytest.mark.model, pytest.mark.native]

RUNS = {
    "VICTIM_IN_USE": [
        "--fate-policy",
        "tests.exactness.in_use_lowest:InUseLowest",
        "--fate-sync",
        "--fate-slots",
        "5",
    ],
    "COPY_SKIPPED": ["--fate-slots", "25%"],
    "WRONG_SLOT": ["--fate-slots", "25%"],
    "BIAS_NOT_POOLED": ["--fate-slots", "4", "-m", "gpt-oss"],
}


def faulty_library(build: Build, fault: str) -> Path:
    """Compile libfate with one fault; llama.cpp is not recompiled."""
    folder = ROOT / "build" / "tests" / f"fault-{fault.lower()}"
    cmake = Path(sys.executable).with_name("cmake")
    configure = [cmake, "-S", ROOT / "fate_bind" / "native", "-B", folder, "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={Path(sys.executable).with_name('ninja')}", f"-DFATE_FAULT={fault}"]
    configure += [f"-DFATE_LLAMA_SRC={build.source}", f"-DFATE_LLAMA_BUILD={build.llama}"]
    configure += [f"-DFATE_BUILD_ID={build.build_id}"]
    for command in (configure, [cmake, "--build", folder, "--target", "fate"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def run_verify(run: list[str], architectures: Path, library: Path) -> subprocess.CompletedProcess[str]:
    model = [str(architectures / "gpt-oss-moe.gguf") if word == "gpt-oss" else word for word in run]
    return subprocess.run(
        [sys.executable, "-m", "fate_bind", "verify", "-c", "256", "-n", "40", *model],
        env={**os.environ, "LD_LIBRARY_PATH": str(library)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("fault", RUNS)
def test_fault_is_caught(fault: str, build: Build, architectures: Path) -> None:
    healthy = run_verify(RUNS[fault], architectures, build.native)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert healthy.stdout.startswith("identical")
    faulty = run_verify(RUNS[fault], architectures, faulty_library(build, fault))
    assert faulty.returncode == 1, faulty.stdout + faulty.stderr
    assert "token position" in faulty.stdout
