"""Errors that a user of the engine can meet."""

from __future__ import annotations

from fate_policy.errors import FateError, PolicyConfigError, PolicyError, TraceError

__all__ = [
    "BuildError",
    "EngineError",
    "FateError",
    "LibraryError",
    "PolicyConfigError",
    "PolicyError",
    "TraceError",
    "UsageError",
]


class BuildError(FateError):
    """The Python extension cannot be compiled."""


class LibraryError(FateError):
    """The compiled library is missing, or is not the one that this Python code belongs to."""


class EngineError(FateError):
    """The engine or llama.cpp refused or failed; `status` is the name of the FATE_STATUS_*."""

    def __init__(self, message: str, status: str = "") -> None:
        super().__init__(message)
        self.status = status


class UsageError(FateError):
    """The command line makes no sense."""
