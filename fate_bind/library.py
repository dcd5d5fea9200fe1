"""The compiled library: found, checked, and asked."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from fate_bind.errors import EngineError, LibraryError

_BUILD = "run `python build.py build`"


class Library(NamedTuple):
    """What cffi made of fate.h."""

    ffi: Any
    lib: Any


@functools.cache
def load() -> Library:
    """Import the extension and check that it and the library were built from the same sources."""
    try:
        module = importlib.import_module("fate_bind._fate")
    except ModuleNotFoundError as error:
        if error.name != "fate_bind._fate":
            raise
        raise LibraryError(f"the native library is not built; {_BUILD}") from None
    except ImportError as error:
        raise LibraryError(f"the native library cannot be loaded: {error}; {_BUILD}") from None
    ffi, lib = module.ffi, module.lib
    for what, ours, theirs in (
        ("ABI version", lib.fate_extension_abi_version(), lib.fate_abi_version()),
        ("build id", text(ffi, lib.fate_extension_build_id()), text(ffi, lib.fate_build_id())),
    ):
        if ours != theirs:
            raise LibraryError(
                f"{what} of the Python extension is {ours}, of the native library {theirs}: "
                f"they were not built together; {_BUILD}"
            )
    return Library(ffi, lib)


def text(ffi: Any, pointer: Any) -> str:
    """Return a zero-terminated C string, "" for null."""
    return ffi.string(pointer).decode("utf-8", "replace") if pointer else ""


def check(status: int) -> None:
    """Raise `EngineError` with what the library says happened unless `status` is FATE_STATUS_OK."""
    ffi, lib = load()
    if status == lib.FATE_STATUS_OK:
        return
    raise EngineError(text(ffi, lib.fate_last_error()) or f"status {status}", _status_name(lib, status))


def _status_name(lib: Any, status: int) -> str:
    names = {getattr(lib, name): name for name in dir(lib) if name.startswith("FATE_STATUS_")}
    return names.get(status, str(status))


def has_https() -> bool:
    """Say whether llama.cpp was built with OpenSSL, which -hf and --model-url need; True if unknown."""
    return not _is_off("LLAMA_OPENSSL")


def has_page() -> bool:
    """Say whether llama.cpp was built with the server's web page; True if unknown."""
    return not _is_off("LLAMA_BUILD_UI")


def _is_off(option: str) -> bool:
    active = Path(__file__).resolve().parent.parent / "build" / "active.json"
    try:
        llama_dir = json.loads(active.read_text(encoding="utf-8"))["llama_dir"]
        cache = (Path(llama_dir) / "CMakeCache.txt").read_text(encoding="utf-8")
    except (OSError, ValueError, KeyError):
        return False
    return f"{option}:BOOL=OFF" in cache
