"""Policy names and the classes behind them, imported only when asked for."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Any

from fate_policy.base import Policy
from fate_policy.checks import bad_value, unknown_name
from fate_policy.errors import PolicyConfigError

ENTRY_POINTS = "fate.policies"

BUILT_IN = {
    "lru": "fate_policy.lru:LRU",
    "frequency": "fate_policy.frequency:Frequency",
    "static": "fate_policy.static:Static",
    "random": "fate_policy.random:Random",
    "classifier": "fate_policy.classifier:Classifier",
    "belady": "fate_policy.belady:Belady",
}

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


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


def check_params(policy: type[Policy], params: Mapping[str, Any]) -> None:
    """Raise `PolicyConfigError` for a value whose type is not the one of a simple annotation.

    Simple are int, float, bool, str and unions of these with None; all else is the policy's to check.
    """
    annotations = {name: p.annotation for name, p in inspect.signature(policy).parameters.items()}
    scope = getattr(policy.__init__, "__globals__", {})
    for name, value in params.items():
        allowed = _simple_types(annotations[name], scope)
        is_default = value is None and params_of(policy)[name] is None
        if allowed and not is_default and not any(_is_a(kind, value) for kind in allowed):
            raise bad_value(f"params: {name}", value, " or ".join(_KINDS[kind] for kind in allowed))


def _simple_types(annotation: Any, scope: Mapping[str, Any]) -> tuple[type, ...]:
    """Return the types that an annotation, or the text of one, allows; nothing if it is not a simple one."""
    if isinstance(annotation, str):
        try:
            hints = typing.get_type_hints(SimpleNamespace(__annotations__={"value": annotation}), dict(scope))
        except Exception:  # it names what exists for type checkers only
            return ()
        annotation = hints["value"]
    is_union = typing.get_origin(annotation) in (typing.Union, UnionType)
    kinds = typing.get_args(annotation) if is_union else (annotation,)
    return kinds if all(isinstance(kind, type) and kind in _KINDS for kind in kinds) else ()


def _is_a(kind: type, value: object) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


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
        hint = ""
        if module_name in BUILT_IN:
            hint = f"; parameters of {module_name} go into a .yaml file, under `{module_name}:`"
        raise PolicyConfigError(
            f"policy {path}: no module {error.name!r} on Python's path or in {here}{hint}"
        ) from None
    finally:
        sys.path.remove(here)
