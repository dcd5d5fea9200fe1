"""On a GPU: the kernels against the host's layer, without llama.cpp."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from exactness.conftest import Build, build
from gpu.test_late_fills import tool

__all__ = ["build"]  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.native]


def program(build: Build, name: str) -> Path:
    """Compile one of the test programs."""
    done = subprocess.run(
        [tool("cmake"), "--build", build.native, "--target", name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return build.native / name


@pytest.mark.parametrize(
    "name",
    ["test-cuda", "test-cuda-callback", "test-cuda-linear", "test-cuda-lookahead", "test-cuda-prefetch"],
)
def test_kernels_agree_with_the_host(build: Build, name: str) -> None:
    done = subprocess.run([program(build, name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " 0 failed" in done.stdout
