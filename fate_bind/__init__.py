"""Run llama.cpp with a pool of experts that a policy written in Python keeps filled."""

from fate_bind.errors import BuildError, EngineError, FateError, LibraryError, PolicyConfigError, PolicyError
from fate_bind.session import Session
from fate_bind.verify import VerifyResult, verify

__all__ = [
    "BuildError",
    "EngineError",
    "FateError",
    "LibraryError",
    "PolicyConfigError",
    "PolicyError",
    "Session",
    "VerifyResult",
    "verify",
]
