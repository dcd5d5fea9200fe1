"""Formatters, linter and type checker have nothing to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "fate_bind" / "native"


def check(*command: str | Path) -> None:
    """Run a tool of this environment in the root and fail with what it printed."""
    tool = Path(sys.executable).with_name(str(command[0]))
    done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command[:3]))}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_finds_nothing() -> None:
    check("ruff", "check", ".")


def test_python_is_formatted() -> None:
    check("ruff", "format", "--check", ".")


def test_native_code_is_formatted() -> None:
    suffixes = {".h", ".c", ".cpp", ".cu", ".cuh"}
    files = sorted(path for path in NATIVE.rglob("*") if path.suffix in suffixes)
    assert files != []
    check("clang-format", "--dry-run", "--Werror", *files)


def test_kernels_are_launched_into_the_chain() -> None:
    plain = [path.name for path in NATIVE.glob("*.cu*") if "<<<" in path.read_text()]
    assert plain == [], "fate_cuda_launch says why"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["fate_policy", "fate_bind", "bench"])
def test_types_are_right(package: str) -> None:
    check("mypy", "--strict", "-p", package)


@pytest.mark.slow
def test_types_of_the_build_script_are_right() -> None:
    check("mypy", "--strict", "build.py")
