"""The binding against a stand-in for the library: no llama.cpp, no model."""

from __future__ import annotations

import gc
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fate_bind import _build_ffi, library

FAKE = Path(__file__).resolve().parents[1] / "fake_fate.c"


@pytest.fixture(scope="session")
def fake_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the stand-in and the extension compiled against it."""
    folder = tmp_path_factory.mktemp("fake")
    compiler = shlex.split(os.environ.get("CC") or shutil.which("cc") or "gcc")
    command = [
        *compiler,
        "-std=c99",
        "-D_GNU_SOURCE",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
    ]
    command += [f"-I{_build_ffi.HEADER.parent}", str(FAKE), "-o", str(folder / "libfate_fake.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    _build_ffi.build(folder, folder, build_id="fake", library="fate_fake")
    return folder


def load_extension(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fate_bind._fate", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake(fake_dir: Path) -> Iterator[library.Library]:
    """`fate_bind.library` gives the stand-in, and the real library again afterwards."""
    real = sys.modules.pop("fate_bind._fate", None)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FAKE_ABI", "FAKE_BUILD_ID", "FAKE_WRONG_LOGIT", "FAKE_REFUSE"):
            patch.delenv(name, raising=False)
        sys.modules["fate_bind._fate"] = load_extension(fake_dir / _build_ffi.FILE_NAME)
        library.load.cache_clear()
        yield library.load()
        gc.collect()  # sessions left behind close themselves with the stand-in
    del sys.modules["fate_bind._fate"]
    if real is not None:
        sys.modules["fate_bind._fate"] = real
    library.load.cache_clear()


@pytest.fixture
def script(fake_dir: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run Python code with the stand-in in a process of its own."""
    extension = str(fake_dir / _build_ffi.FILE_NAME)
    begin = (
        "import sys, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('fate_bind._fate', {extension!r})\n"
        "sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules[spec.name])\n"
    )

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", begin + textwrap.dedent(code)],
            env={**os.environ, "PYTHONPATH": str(Path(_build_ffi.PACKAGE).parent)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that passes for a GGUF model without tensors."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return path
