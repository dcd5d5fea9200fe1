"""The --fate-* flags: taken out of a command line, explained, checked."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fate_bind.errors import UsageError
from fate_policy.config import AUTO

_Number = TypeVar("_Number", int, float)

_FLAGS = {
    "policy": (
        "NAME|FILE.yaml|module:Class",
        "who decides which experts stay (default: auto: lru, or what was fitted)",
    ),
    "slots": (
        "N|N%|SIZE|N,N,...|auto",
        "slots per layer: 8, 25%, 4GiB in all, a list (default: auto, what fits)",
    ),
    "vram": ("SIZE", "with slots auto: count on a card of this size"),
    "vram-margin": ("SIZE", "with slots auto: leave so much free (default: 1GiB)"),
    "mode": ("table|callback|off", "scores between tokens, Python at every miss, no pool (default: table)"),
    "sync": (None, "scores act from the very next step; the model waits for the policy"),
    "prefetch": (
        "off|token|layer|both|auto",
        "bring in what the policy predicts, what the next layers' routers tell, or both (default: auto: "
        "token for a classifier, else layer)",
    ),
    "prefetch-threshold": (
        "CHANCE",
        "of experts at least so likely, above 0, up to 1 (default: auto: 0.5, or less)",
    ),
    "prefetch-experts": ("N", "at most N of a layer and token, 1 to 16 (default: 8)"),
    "record": ("FILE.npz", "write every token's routing to FILE.npz"),
    "stats": ("text|json[:FILE]", "numbers at the end: text on stderr, JSON on stdout or in FILE"),
    "require": (None, "end with an error instead of running without the pool"),
}


@dataclass(frozen=True)
class Options:
    """What the flags said; None where they said nothing, so that a YAML file decides."""

    policy: str = AUTO
    slots: str | None = None
    vram: str | None = None
    vram_margin: str | None = None
    mode: str | None = None
    sync: bool | None = None
    prefetch: str | None = None
    prefetch_threshold: float | str | None = None
    prefetch_experts: int | None = None
    record: Path | None = None
    stats_format: str = "text"
    stats_file: Path | None = None
    require: bool = False


def take(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """Split a command line into our options and everything else, which stays in order."""
    given: dict[str, str] = {}
    rest: list[str] = []
    left = list(argv)
    while left:
        arg = left.pop(0)
        if not arg.startswith("--fate-"):
            rest.append(arg)
            continue
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--fate-")
        if name not in _FLAGS:
            near = difflib.get_close_matches(name, _FLAGS, n=1)
            known = ", ".join(f"--fate-{one}" for one in _FLAGS)
            hint = f"did you mean --fate-{near[0]}?" if near else f"known: {known}"
            raise UsageError(f"unknown flag {flag}; {hint}")
        metavar = _FLAGS[name][0]
        if metavar is None:
            value = value if equals else "true"
            if value not in ("true", "false"):
                raise UsageError(f"{flag}={value}: expected {flag}, {flag}=true or {flag}=false")
        elif not equals:
            if not left:
                raise UsageError(f"{flag} needs a value: {metavar}")
            value = left.pop(0)
        if not value:
            raise UsageError(f"{flag} is empty; expected {metavar}")
        given[name] = value
    return _checked(given), rest


def _checked(given: dict[str, str]) -> Options:
    stats_format, colon, stats_file = given.get("stats", "text").partition(":")
    if stats_format not in ("text", "json") or (colon and (stats_format == "text" or not stats_file)):
        raise UsageError(f"--fate-stats {given['stats']}: expected {_FLAGS['stats'][0]}")
    record = _writable("record", given.get("record"))
    if record is not None and record.suffix != ".npz":
        raise UsageError(f"--fate-record {record}: expected a name that ends in .npz")
    return Options(
        policy=given.get("policy", AUTO),
        slots=given.get("slots"),
        vram=given.get("vram"),
        vram_margin=given.get("vram-margin"),
        mode=given.get("mode"),
        sync=given["sync"] == "true" if "sync" in given else None,
        prefetch=given.get("prefetch"),
        prefetch_threshold=AUTO
        if given.get("prefetch-threshold") == AUTO
        else _number("prefetch-threshold", given, float, f"{AUTO}, or a number above 0, up to 1"),
        prefetch_experts=_number("prefetch-experts", given, int, "a whole number, 1 to 16"),
        record=record,
        stats_format=stats_format,
        stats_file=_writable("stats", stats_file or None),
        require=given.get("require") == "true",
    )


def _number(name: str, given: dict[str, str], kind: type[_Number], expected: str) -> _Number | None:
    """Return the flag's value; its range is the configuration's to check."""
    if name not in given:
        return None
    try:
        return kind(given[name])
    except ValueError:
        raise UsageError(f"--fate-{name} {given[name]}: expected {expected}") from None


def _writable(name: str, text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if path.is_dir():
        raise UsageError(f"--fate-{name}: {path} is a directory; expected a file")
    if not path.parent.is_dir():
        raise UsageError(f"--fate-{name}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"--fate-{name}: {path} cannot be written")
    return path


def spare(chosen: Options, read: Collection[Path]) -> None:
    """Refuse to write one of the files that the run reads, or two things to one file."""
    written = {"record": chosen.record, "stats": chosen.stats_file}
    for name, path in written.items():
        if path is not None and path.exists() and any(path.samefile(one) for one in read):
            raise UsageError(f"--fate-{name} {path} would overwrite what the run reads; give another name")
    record, stats = written.values()
    if record is not None and stats is not None and record.resolve() == stats.resolve():
        raise UsageError(f"--fate-record and --fate-stats both name {record}; give another name")


def help_text() -> str:
    lines = []
    for name, (metavar, text) in _FLAGS.items():
        flag = f"--fate-{name}" + (f" {metavar}" if metavar else "")
        lines.append(f"  {flag:<46} {text}" if len(flag) <= 46 else f"  {flag}\n  {'':<46} {text}")
    return "\n".join(lines)
