"""Checks of what was asked for: each error names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fate_policy.errors import FateError, PolicyConfigError

_MAX_SHOWN = 200


def bad_value(key: str, value: object, allowed: str) -> PolicyConfigError:
    shown = repr(value)
    if len(shown) > _MAX_SHOWN:
        shown = shown[:_MAX_SHOWN] + "..."
    return PolicyConfigError(f"{key}: {shown} is not allowed; expected {allowed}")


def unknown_name(what: str, name: object, known: Iterable[str]) -> PolicyConfigError:
    """Return the error for a name that is none of `known`, with the nearest one if one is near."""
    known = sorted(known)
    begun = [one for one in known if name and one.startswith(str(name))]
    near = begun if len(begun) == 1 else difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return PolicyConfigError(f"unknown {what} {name!r}{hint} (known: {', '.join(known) or 'none'})")


def number(key: str, value: Any, *, above: float) -> float:
    """Return `value` as a float if it is a finite number greater than `above`."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or value <= above:
        raise bad_value(key, value, f"a number greater than {above:g}")
    return float(value)


def share(key: str, value: Any, *, above_zero: bool = False) -> float:
    """Return `value` as a float if it is a number from 0 to 1."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not 0 <= value <= 1 or (above_zero and value == 0):
        raise bad_value(key, value, "a number above 0, up to 1" if above_zero else "a number from 0 to 1")
    return float(value)


def integer(key: str, value: Any, *, minimum: int, maximum: int | None = None) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < minimum or (maximum is not None and value > maximum):
        allowed = f"{minimum} or more" if maximum is None else f"{minimum} to {maximum}"
        raise bad_value(key, value, f"a whole number, {allowed}")
    return int(value)


def flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise bad_value(key, value, "true or false")
    return value


def choice(key: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise bad_value(key, value, "one of " + ", ".join(allowed) + hint)
    return str(value)


def target(what: str, path: Path, read: Iterable[Path] = ()) -> Path:
    """Return the path of a file that will be written after long work, if it can be.

    read : files that the work reads, which it must not be
    """
    folder = path.parent
    try:
        if not folder.is_dir():
            raise FateError(f"{what} {path} cannot be written: there is no folder {folder}")
        if path.is_dir():
            raise FateError(f"{what} {path} cannot be written: it is a folder")
        if path.exists() and any(one.exists() and path.samefile(one) for one in read):
            raise FateError(f"{what} {path} would overwrite what it is made of; give another name")
        if path.is_file() or not path.exists():
            is_new = not os.path.lexists(path)
            path.open("ab").close()
            if is_new:
                path.unlink()
    except OSError as error:
        raise FateError(f"{what} {path} cannot be written: {error.strerror}; give another name") from error
    return path
