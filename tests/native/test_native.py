"""The native unit tests, the engine and the fuzzer: as released, and under three sanitizers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fate_bind.modelfile import EMBEDDED

pytestmark = [pytest.mark.native, pytest.mark.model]

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = {"plain": "", "asan-ubsan": "address,undefined", "tsan": "thread"}
FUZZ_SECONDS = 5
STRICT = {
    "ASAN_OPTIONS": "detect_leaks=1:halt_on_error=1:abort_on_error=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


@dataclass(frozen=True)
class Programs:
    kind: str
    folder: Path

    def run(self, name: str, *args: object) -> str:
        done = subprocess.run(
            [self.folder / name, *map(str, args)],
            env={**os.environ, **STRICT},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
        return done.stdout


@pytest.fixture(scope="module", params=SANITIZERS)
def programs(request: pytest.FixtureRequest) -> Programs:
    kind = str(request.param)
    active = json.loads((ROOT / "build" / "active.json").read_text(encoding="utf-8"))
    folder = ROOT / "build" / "tests" / f"native-{kind}"
    tools = Path(sys.executable).parent
    configure = [tools / "cmake", "-S", ROOT / "fate_bind" / "native", "-B", folder, "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-DFATE_SANITIZE={SANITIZERS[kind]}"]
    configure += [f"-DFATE_LLAMA_SRC={active['source_dir']}", f"-DFATE_LLAMA_BUILD={active['llama_dir']}"]
    configure += ["-DFATE_BUILD_ID=test"]
    for command in (configure, [tools / "cmake", "--build", folder, "--target", "fate-tests"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return Programs(kind, folder)


@pytest.mark.parametrize(
    "name",
    [
        "test-layer",
        "test-capacity",
        "test-record",
        "test-service",
        "test-courier",
        "test-lookahead",
        "test-linear",
        "test-worth",
    ],
)
def test_unit(programs: Programs, name: str) -> None:
    assert re.search(r": [1-9]\d* checks, 0 failed", programs.run(name))


def test_fuzz(programs: Programs) -> None:
    n = re.search(r"fuzz-layer: (\d+) inputs", programs.run("fuzz-layer", 1, FUZZ_SECONDS))
    assert n
    assert int(n.group(1)) > 1000


@pytest.mark.parametrize("what", ["exact", "threads"])
def test_engine(programs: Programs, what: str) -> None:
    assert ", 0 failed" in programs.run("test-engine", EMBEDDED, what)


def test_open_and_close(programs: Programs) -> None:
    """As released 1,000 times; fewer under the sanitizers, which find leaks by themselves."""
    n = {"plain": 1000, "asan-ubsan": 20, "tsan": 10}[programs.kind]
    assert ", 0 failed" in programs.run("test-engine", EMBEDDED, "cycles", n)
