"""Errors that a user of the policies can meet."""

from __future__ import annotations


class FateError(Exception):
    """Base of every error that this project raises on purpose."""


class PolicyError(FateError):
    """A policy answered what the contract of `fate_policy.base` does not allow."""


class PolicyConfigError(PolicyError):
    """A policy, or the file that chooses it, is configured wrongly; found before anything runs."""


class TraceError(FateError):
    """A routing trace cannot be written, read or replayed."""
