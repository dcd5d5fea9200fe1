from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fate_bind import _build_ffi, library
from fate_bind.errors import BuildError, EngineError, LibraryError

HEADER = _build_ffi.HEADER.read_text(encoding="utf-8")


def test_cdef_declares_every_function_of_the_header() -> None:
    declared = _build_ffi.cdef(HEADER)
    functions = [line for line in HEADER.splitlines() if line.startswith("FATE_API")]
    assert len(functions) > 30
    assert all(line.removeprefix("FATE_API ") in declared for line in functions)
    assert "FATE_API" not in declared


def test_cdef_makes_a_python_callback_of_every_callback_type() -> None:
    python = _build_ffi.cdef(HEADER).partition('extern "Python"')[2]
    assert all(
        f"fate_py_{name}(" in python
        for name in ("open", "step", "expect", "miss", "wait", "close", "interrupt")
    )
    assert python.count("(") == HEADER.count("_fn)(") == 7


def test_cdef_without_marks_is_refused() -> None:
    with pytest.raises(BuildError, match="cdef begin"):
        _build_ffi.cdef("int x;")


def test_build_id_is_read_from_the_native_folder(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"build\.py build"):
        _build_ffi.read_build_id(tmp_path)
    (tmp_path / "fate_build_id.h").write_text('#define FATE_BUILD_ID "abc123"\n')
    assert _build_ffi.read_build_id(tmp_path) == "abc123"


def test_an_extension_and_library_of_one_build_load(fake: library.Library) -> None:
    assert fake.lib.fate_abi_version() == fake.lib.FATE_ABI_VERSION


@pytest.mark.parametrize(
    ("variable", "value", "what"), [("FAKE_ABI", "99", "ABI version"), ("FAKE_BUILD_ID", "older", "build id")]
)
def test_a_library_of_another_build_is_refused(
    fake: library.Library, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, what: str
) -> None:
    monkeypatch.setenv(variable, value)
    library.load.cache_clear()
    with pytest.raises(LibraryError, match=f"{what} .* {value}: .*python build.py build"):
        library.load()


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hide:
        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> None:
            if name == "fate_bind._fate":
                raise ModuleNotFoundError(name, name=name)

    monkeypatch.delitem(sys.modules, "fate_bind._fate", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Hide, *sys.meta_path])
    library.load.cache_clear()
    with pytest.raises(LibraryError, match=r"not built; run `python build.py build`"):
        library.load()


def test_check_raises_what_the_library_says(fake: library.Library) -> None:
    lib = fake.lib
    library.check(lib.FATE_STATUS_OK)
    status = lib.fate_context_shift(fake.ffi.NULL, 0, 5, 5)
    with pytest.raises(EngineError, match=r"shift \[5, 5\): expected 0 <= p0 < p1") as caught:
        library.check(status)
    assert caught.value.status == "FATE_STATUS_INVALID"
