"""Policies that decide which experts stay in fast memory; pure Python, no compiled code of ours."""

from fate_policy.base import BYPASS, NOT_RUN, POOL, STAGED, Geometry, History, OfflinePolicy, Policy, Step
from fate_policy.config import Config, Slots, make_policy
from fate_policy.counters import Counters
from fate_policy.driver import Driver
from fate_policy.errors import FateError, PolicyConfigError, PolicyError, TraceError
from fate_policy.trace import Trace, TraceWriter

__all__ = [
    "BYPASS",
    "NOT_RUN",
    "POOL",
    "STAGED",
    "Config",
    "Counters",
    "Driver",
    "FateError",
    "Geometry",
    "History",
    "OfflinePolicy",
    "Policy",
    "PolicyConfigError",
    "PolicyError",
    "Slots",
    "Step",
    "Trace",
    "TraceError",
    "TraceWriter",
    "make_policy",
]
