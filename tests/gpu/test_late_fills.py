"""On a GPU: whoever reads what is copied before it is there reads NaNs, in a build that copies late."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from exactness.conftest import ROOT, Build, build

__all__ = ["build"]  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.model, pytest.mark.native]

CELLS = "test_same_bits_as_resident and lru and (min or 50) and (decode or prompts or mixed)"
N_CELLS = 12  # with both modes
AHEAD = "(test_predictions_change_no_bit or test_what_routers_tell and lru) and beside or slow_link"
N_AHEAD = 16


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is needed"
    return found


def compiled(build: Build, fault: str) -> Path:
    """Compile libfate as the active one is, with a fault."""
    folder = ROOT / "build" / "tests" / f"gpu-{fault.lower()}"
    kept = ("CMAKE_CUDA_", "FATE_CUDA_ARCH", "CMAKE_CXX_COMPILER:", "CMAKE_SHARED_LINKER_FLAGS:")
    cache = (build.native / "CMakeCache.txt").read_text(encoding="utf-8").splitlines()
    same = [f"-D{line}" for line in cache if line.startswith(kept) and ":STATIC=" not in line]
    configure = [tool("cmake"), "-S", ROOT / "fate_bind" / "native", "-B", folder, "-G", "Ninja", *same]
    configure += ["-DFATE_BACKEND=cuda", f"-DFATE_FAULT={fault}", f"-DFATE_BUILD_ID={build.build_id}"]
    configure += [f"-DFATE_LLAMA_SRC={build.source}", f"-DFATE_LLAMA_BUILD={build.llama}"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    for command in (configure, [tool("cmake"), "--build", folder, "--target", "fate"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def run(library: Path, file: str, cells: str) -> subprocess.CompletedProcess[str]:
    path = f"{library}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "pytest", f"tests/gpu/{file}", "--all", "-q", "--tb=short", "-k", cells],
        env={**os.environ, "LD_LIBRARY_PATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_late_copies_change_nothing(build: Build) -> None:
    library = compiled(build, "LATE_FILLS")
    done = run(library, "test_exact.py", CELLS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{N_CELLS} passed" in done.stdout
    done = run(library, "test_prefetch.py", AHEAD)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{N_AHEAD} passed" in done.stdout


def test_a_prefetch_that_is_not_awaited_is_found_out(build: Build) -> None:
    done = run(compiled(build, "NOT_AWAITED"), "test_prefetch.py", AHEAD)
    assert re.search(r"\b[1-9]\d* failed", done.stdout), done.stdout[-3000:]
    assert re.search("array_equal|does not hold the bytes", done.stdout)


def test_a_victim_that_is_still_being_filled_is_found_out(build: Build) -> None:
    done = run(compiled(build, "VICTIM_IN_FLIGHT"), "test_prefetch.py", AHEAD)
    assert re.search(r"\b[1-9]\d* failed", done.stdout), done.stdout[-3000:]
    assert re.search("array_equal|does not hold the bytes", done.stdout)


def test_a_product_that_does_not_wait_is_caught(build: Build) -> None:
    done = run(compiled(build, "NOT_AWAITED"), "test_exact.py", CELLS)
    assert done.returncode == 1, done.stdout[-3000:]
    # prompts, and what mixes them with decoding, wait for the copy engine; decoding where experts come ahead
    failed = set(re.findall(r"^FAILED \S*\[(lru-\S+)\]", done.stdout, re.MULTILINE))
    modes, slots = ("table", "callback"), ("min", "50%")
    awaited = {f"lru-{m}-{n}-{w}" for m in modes for n in slots for w in ("prompts", "mixed")}
    assert awaited <= failed <= awaited | {"lru-table-50%-decode"}, done.stdout[-3000:]
    assert re.search("rows differ|does not hold the bytes", done.stdout)
