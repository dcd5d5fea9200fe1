"""Flags of llama.cpp that put the weights where a pool can serve them, unless the user decided that."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fate_bind import library
from fate_bind.errors import UsageError

MODEL_FLAGS = ("-m", "--model", "-mu", "--model-url", "-hf", "-hfr", "--hf-repo")
HELP = ("-h", "--help", "--usage")
_BATCH = ("-b", "--batch-size")
_ENDS = (*HELP, "--version", "-cl", "--cache-list", "--list-devices", "--completion-bash")
_MODEL_VARIABLES = ("LLAMA_ARG_MODEL", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_HF_REPO")


@dataclass(frozen=True)
class _Rule:
    """Add `adds` unless one of the flags is there or one of the environment variables is set."""

    adds: tuple[str, ...]
    flags: tuple[str, ...]
    variables: tuple[str, ...] = ()
    needs_gpu: bool = False


_EXPERTS = ("-cmoe", "--cpu-moe", "-ncmoe", "--n-cpu-moe", "-ot", "--override-tensor")
_COMMON = (
    # repacked weights cannot be copied expert by expert
    _Rule(("--no-repack",), ("--repack", "-nr", "--no-repack"), ("LLAMA_ARG_REPACK", "LLAMA_ARG_NO_REPACK")),
    # it would lay the weights out as if there were no pool
    _Rule(("-fit", "off"), ("-fit", "--fit"), ("LLAMA_ARG_FIT",)),
    _Rule(("-ngl", "999"), ("-ngl", "--gpu-layers", "--n-gpu-layers"), ("LLAMA_ARG_N_GPU_LAYERS",), True),
    _Rule(
        ("--cpu-moe",),
        _EXPERTS,
        ("LLAMA_ARG_CPU_MOE", "LLAMA_ARG_N_CPU_MOE", "LLAMA_ARG_OVERRIDE_TENSOR"),
        True,
    ),
)
# a step of a prompt brings every expert that has no slot once, whatever its size: larger steps, fewer times
_LARGE_STEPS = _Rule(
    ("-ub", "1024"),
    ("-ub", "--ubatch-size", "-b", "--batch-size"),
    ("LLAMA_ARG_UBATCH", "LLAMA_ARG_BATCH"),
    needs_gpu=True,
)
_RULES = {
    "completion": (*_COMMON, _LARGE_STEPS),
    "cli": (*_COMMON, _LARGE_STEPS),
    "server": (*_COMMON, _LARGE_STEPS),
    "perplexity": _COMMON,
    "bench": (
        _Rule(("--repack", "0"), ("--repack",)),
        _Rule(("-ngl", "999"), ("-ngl", "--n-gpu-layers"), needs_gpu=True),
        _Rule(("-ncmoe", "999"), _EXPERTS, needs_gpu=True),
    ),
    "quantize": (),
}


def has_gpu() -> bool:
    ffi, lib = library.load()
    return "CUDA" in library.text(ffi, lib.fate_system_info())


def resident(args: Sequence[str]) -> list[str] | None:
    """Return the flags of the same run with all experts in VRAM, or None if the user placed the weights."""
    for rule in _COMMON:
        if rule.needs_gpu and (given(args, rule.flags) or any(name in os.environ for name in rule.variables)):
            return None
    return [*args, *(flag for flag in flags("completion", args, gpu=True) if flag != "--cpu-moe")]


def given(args: Sequence[str], flags: Sequence[str]) -> bool:
    """Say whether one of the flags is among the arguments, in any spelling that llama.cpp takes."""
    return any((arg.replace("_", "-") if arg.startswith("--") else arg) in flags for arg in args)


def refuse_ends(args: Sequence[str]) -> None:
    """Raise for what makes llama.cpp end the process: to print something, or for a batch of nothing."""
    refuse_no_batch(args)
    for arg in args:
        if given([arg], _ENDS):
            raise UsageError(f"{arg} makes llama.cpp print something and end the process; leave it out")


def refuse_no_batch(args: Sequence[str]) -> None:
    """Raise for a batch of 0 tokens, with which llama.cpp fails an assertion."""
    found = [(arg, value) for arg, value in pairwise(args) if given([arg], _BATCH)]
    if not found and "LLAMA_ARG_BATCH" in os.environ:
        found = [("LLAMA_ARG_BATCH", os.environ["LLAMA_ARG_BATCH"])]
    for arg, value in found:
        if any(re.fullmatch("[+-]?0+", one.strip()) for one in value.split(",")):
            raise UsageError(f"{arg} {value}: expected a number of tokens, 1 or more")


def names_model(args: Sequence[str]) -> bool:
    return given(args, MODEL_FLAGS) or any(os.environ.get(name) for name in _MODEL_VARIABLES)


def flags(program: str, args: Sequence[str], gpu: bool) -> list[str]:
    """Return what is to be added to a program's arguments."""
    return [
        flag
        for rule in _RULES[program]
        if (gpu or not rule.needs_gpu)
        and not given(args, rule.flags)
        and not any(name in os.environ for name in rule.variables)
        for flag in rule.adds
    ]
