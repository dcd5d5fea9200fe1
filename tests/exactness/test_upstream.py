"""With no engine installed the patched llama.cpp gives the bits of the untouched one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT, Build

pytestmark = [pytest.mark.model, pytest.mark.native]


@pytest.fixture(scope="module")
def unpatched(build: Build) -> Path:
    """The build of the untouched source; made once, found again by its stamps."""
    done = subprocess.run(
        [sys.executable, "build.py", "build", "--unpatched"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return ROOT / "build" / "unpatched" / build.llama.name / "bin"


@pytest.fixture(scope="module")
def dump(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("dump") / "dump_logits"
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    lib = build.llama / "bin"
    command = [compiler, "-O1", "-o", str(program), str(Path(__file__).with_name("dump_logits.c"))]
    command += [f"-I{build.source}/include", f"-I{build.source}/ggml/include"]
    command += [f"-L{lib}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath-link,{lib}"]
    subprocess.run(command, check=True)
    return program


@pytest.mark.parametrize("name", ["embedded", "gpt-oss-moe", "grovemoe-moe", "deepseek2-moe", "llama-dense"])
def test_same_bits_without_an_engine(
    name: str, build: Build, unpatched: Path, dump: Path, embedded: Path, architectures: Path, tmp_path: Path
) -> None:
    model = embedded if name == "embedded" else architectures / f"{name}.gguf"
    outputs = []
    for folder in (unpatched, build.llama / "bin"):
        out = tmp_path / f"{len(outputs)}.bin"
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
        loaded = subprocess.run(
            ["ldd", dump], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert str(folder / "libllama.so") in loaded
        subprocess.run([dump, model, out], env=environment, check=True)
        outputs.append(out.read_bytes())
    assert len(outputs[0]) >= 25 * 4 * 64
    assert outputs[0] == outputs[1]


def test_the_untouched_library_has_no_doors(build: Build, unpatched: Path) -> None:
    """The comparison above compares two libraries, not one with itself."""
    symbol = b"llama_set_engine_factory"
    assert symbol in (build.llama / "bin" / "libllama.so").read_bytes()
    assert symbol not in (unpatched / "libllama.so").read_bytes()
