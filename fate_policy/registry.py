"""Policy names and the classes behind them, imported only when asked for."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from fate_policy.base import Policy
from fate_policy.checks import unknown_name
from fate_policy.errors import PolicyConfigError

ENTRY_POINTS = "fate.policies"

BUILT_IN = {
    "lru": "fate_policy.lru:LRU",
    "frequency": "fate_policy.frequency:Frequency",
    "static": "fate_policy.static:Static",
    "random": "fate_policy.random:Random",
    "belady": "fate_policy.belady:Belady",
}


@dataclass(frozen=True)
class Description:
    """One policy for a listing: its name, one line, and its parameters with their defaults."""

    name: str
    line: str
    params: Mapping[str, Any]


def names() -> list[str]:
    """Return the built-in names, then those of installed packages."""
    return [*BUILT_IN, *sorted(_installed())]


def get(name: str) -> type[Policy]:
    """Return the policy class of a name or of a dotted path "module:Class".

    A module is looked for as Python does, then in the current directory. An exception raised by the module
    while it is imported passes through unchanged.
    """
    if ":" in name:
        return _load(name)
    if name in BUILT_IN:
        return _load(BUILT_IN[name])
    installed = _installed()
    if name in installed:
        return _load(installed[name].value)
    error = unknown_name("policy", name, names())
    raise PolicyConfigError(f'{error}; an own policy is named by its path, "module:Class"')


def params_of(policy: type[Policy]) -> dict[str, Any]:
    """Return the constructor's arguments with their defaults."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(policy).parameters.values()
    return {
        parameter.name: None if parameter.default is parameter.empty else parameter.default
        for parameter in parameters
        if parameter.kind in named
    }


def describe() -> list[Description]:
    """Describe every known policy; an installed one that cannot be imported says so in its line."""
    rows = []
    for name in names():
        try:
            policy = get(name)
        except Exception as error:  # a listing must not fail because of one foreign package
            rows.append(Description(name, f"cannot be loaded: {error}", {}))
            continue
        line = (inspect.getdoc(policy) or "").partition("\n")[0]
        rows.append(Description(name, line, params_of(policy)))
    return rows


def _installed() -> dict[str, EntryPoint]:
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    return {name: point for name, point in found.items() if name not in BUILT_IN}


def _load(path: str) -> type[Policy]:
    module_name, _, class_name = path.partition(":")
    module = _import(module_name, path)
    policy = getattr(module, class_name, None)
    if policy is None:
        raise PolicyConfigError(
            f"policy {path}: module {module_name!r} ({getattr(module, '__file__', 'built in')}) "
            f"has no {class_name!r}"
        )
    if not (isinstance(policy, type) and issubclass(policy, Policy)):
        raise PolicyConfigError(f"policy {path}: {class_name!r} does not derive from fate_policy.Policy")
    return policy


def _import(module_name: str, path: str) -> Any:
    parts = module_name.split(".")
    if not all(part.isidentifier() for part in parts):
        raise PolicyConfigError(f'policy {path!r}: expected "module:Class"')
    parents = {".".join(parts[: i + 1]) for i in range(len(parts))}
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name not in parents:
            raise
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        importlib.invalidate_caches()
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name not in parents:
            raise
        raise PolicyConfigError(
            f"policy {path}: no module {error.name!r} on Python's path or in {here}"
        ) from None
    finally:
        sys.path.remove(here)
