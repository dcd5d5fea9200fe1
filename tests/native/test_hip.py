"""The GPU code as a HIP compiler reads it, where one is at hand. It compiles; no AMD GPU has run it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.native, pytest.mark.model]

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "fate_bind" / "native"
ARCH = "gfx1030"
"""Of RDNA 2, whose waves have 32 threads; the oldest compiler tried, 5.2, knows it."""


@pytest.mark.skipif(
    shutil.which("hipcc") is None, reason="hipcc was not found; install it to compile the GPU code for HIP"
)
@pytest.mark.parametrize("name", [*sorted(path.name for path in NATIVE.glob("cuda_*.cu")), "pin.cpp"])
def test_a_hip_compiler_takes_it(name: str, tmp_path: Path) -> None:
    source = Path(json.loads((ROOT / "build" / "active.json").read_text(encoding="utf-8"))["source_dir"])
    (tmp_path / "fate_build_id.h").write_text('#define FATE_BUILD_ID "test"\n', encoding="utf-8")
    includes = [NATIVE, tmp_path, source / "include", source / "ggml" / "include", source / "src"]
    command = ["hipcc", "-x", "hip", f"--offload-arch={ARCH}", "-std=c++17", "-O1", "-Wno-unused-result"]
    command += [f"-I{folder}" for folder in includes]
    done = subprocess.run(
        [*command, "-Werror", "-c", NATIVE / name, "-o", tmp_path / "out.o"],
        env={**os.environ, "HIP_PLATFORM": "amd"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
