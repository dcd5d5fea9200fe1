"""What the exactness tests share: the active build, reference sessions, models made from the embedded one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fate_bind.modelfile import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Build:
    """The active build's folders."""

    llama: Path
    native: Path
    source: Path
    build_id: str

    def program(self, name: str) -> Path:
        return self.llama / "bin" / name


@pytest.fixture(scope="session")
def build() -> Build:
    active = json.loads((ROOT / "build" / "active.json").read_text(encoding="utf-8"))
    return Build(
        Path(active["llama_dir"]),
        Path(active["native_dir"]),
        Path(active["source_dir"]),
        active["build_id"],
    )


@pytest.fixture(scope="session")
def embedded() -> Path:
    return EMBEDDED


@pytest.fixture(scope="session")
def architectures(build: Build) -> Iterator[Path]:
    """The folder with a tiny random model of every architecture, made by upstream's own test."""
    program = build.program("test-llama-archs")
    folder = ROOT / "build" / "tests" / "archs"
    stamp = folder / "made"
    if not stamp.exists() or stamp.stat().st_mtime < program.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.gguf"):
            old.unlink()
        done = subprocess.run(
            [program, "-s", "1234", "-o", folder], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        stamp.touch()
    return folder


@pytest.fixture(scope="session")
def models(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for models made by the tests, removed at the end."""
    folder = tmp_path_factory.mktemp("models")
    yield folder
    for model in folder.glob("*.gguf"):
        model.unlink()


def quantize(build: Build, source: Path, target: Path, kind: str) -> Path:
    if not target.exists():
        done = subprocess.run(
            [build.program("llama-quantize"), "--allow-requantize", source, target, kind],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    return target
