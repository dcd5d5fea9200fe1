"""What is measured against what: an arm's name, its flags, its place in the comparison."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from bench.models import Shape

VANILLA = ("cpu-moe", "stream", "fit", "ncmoe")
SAME_VRAM = ("fit", "ncmoe")
BY_TOKEN = "classifier, at the token's start"
BY_IDS = "ids of earlier layers (computed beforehand)"
PREFETCH = {
    "lru+token": ("token", BY_TOKEN),
    "lru+layer": ("layer", BY_IDS),
    "lru+both": ("both", f"{BY_TOKEN}; {BY_IDS}"),
    "classifier+token": ("token", BY_TOKEN),
    "classifier+layer": ("layer", BY_IDS),
    "classifier+both": ("both", f"{BY_TOKEN}; {BY_IDS}"),
    "oracle": ("token", "perfect, at the token's start"),
    "oracle2": ("layer", "perfect, two layers ahead"),
    "oracle4": ("layer", "perfect, four layers ahead"),
    "recall90": ("layer", "synthetic, recall 0.9, two layers ahead and one"),
}
"""By kind: when experts are brought in, and what predicts them, as the report says it."""
AHEAD: dict[str, dict[str, Any]] = {
    "lru+layer": {"kind": "ids"},
    "lru+both": {"kind": "ids"},
    "classifier+layer": {"kind": "ids"},
    "classifier+both": {"kind": "ids"},
    "oracle2": {"kind": "perfect", "horizon": 2},
    "oracle4": {"kind": "perfect", "horizon": 4},
    "recall90": {"kind": "synthetic"},
}
"""By kind: the predictions inside the token; see `ahead.of_job`."""
OURS = ("lru", "frequency", "classifier", "callback", "python-lru", *PREFETCH)
CONTEXT, UBATCH = 4096, 2048
LOADS = {
    "mmap": ["--load-mode", "mmap"],
    "pinned": ["--load-mode", "none"],  # experts in page-locked memory
    "repack": ["--load-mode", "mmap", "--no-host"],  # without it a GPU's host buffer goes before repacking
}
ALL_BUT_ONE = "all-but-one"


@dataclass(frozen=True)
class Arm:
    """One way to run the model.

    name : as in tables, such as "resident", "lru@50", "ncmoe@25", "cpu-moe:load=repack,t=8"
    at : share of the experts in slots, in percent, or "all-but-one"; "" where that says nothing
    options : of a vanilla arm "load" (see `LOADS`) and "t" (threads), of one with prefetch "chance"
        (the least worth a copy)
    """

    name: str
    kind: str
    at: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def is_vanilla(self) -> bool:
        return self.kind in VANILLA

    @property
    def is_ours(self) -> bool:
        return self.kind in OURS

    @property
    def prefetches(self) -> bool:
        return self.kind in PREFETCH

    @property
    def predictor(self) -> str | None:
        """What predicts, for the reader; None: nothing does."""
        return PREFETCH[self.kind][1] if self.prefetches else None

    @property
    def needs_ahead(self) -> bool:
        """Whether it takes predictions that `--prepare` computes."""
        return AHEAD.get(self.kind, {}).get("kind") == "ids"

    @property
    def evicts_by(self) -> str:
        """By what it chooses victims: "classifier" (its scores), or the name of a policy."""
        base = self.kind.partition("+")[0]
        return base if base in ("lru", "frequency", "classifier") else "lru"

    @property
    def is_learned(self) -> bool:
        """Whether the classifier runs."""
        return self.evicts_by == "classifier" or BY_TOKEN in (self.predictor or "")

    def slots(self, shape: Shape) -> int:
        if self.at == ALL_BUT_ONE:
            return shape.n_experts - 1
        return int(shape.n_experts * float(self.at) / 100)


def parse(name: str) -> Arm:
    head, _, options = name.partition(":")
    kind, _, at = head.partition("@")
    if kind not in ("resident", "off", *VANILLA, *OURS):
        raise ValueError(f"arm {name!r}: expected resident, off, {', '.join((*VANILLA, *OURS))}")
    if (at == "") == (kind in (*SAME_VRAM, *OURS)):
        raise ValueError(f"arm {name!r}: @PERCENT or @{ALL_BUT_ONE} belongs to {', '.join(SAME_VRAM + OURS)}")
    return Arm(name, kind, at, dict(pair.split("=", 1) for pair in options.split(",") if pair))


def job(arm: Arm, shape: Shape, settings: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
    """Return what a worker needs to open the arm.

    Parameters
    ----------
    settings
        "kv", "threads", "load", "throttle", "classifier", "ahead", "extra" of the group.
    place
        What equal VRAM asks for: "n_cpu_moe" of an ncmoe arm, "vram_bytes" of a fit arm.
    """
    flags = ["-c", str(CONTEXT), "-b", str(UBATCH), "-ub", str(UBATCH)]
    if settings.get("kv"):
        flags += ["-fa", "on", "-ctk", settings["kv"], "-ctv", settings["kv"]]
    flags += settings.get("extra", [])
    made: dict[str, Any] = {
        "env": {},
        "policy": "lru",
        "slots": None,
        "mode": "off",
        "place": False,
        "prefetch": "off",
    }
    threads = arm.options.get("t") or settings.get("threads") or (os.cpu_count() or 1)
    load = arm.options.get("load") or settings.get("load") or "mmap"
    if arm.is_vanilla:
        flags += ["-t", str(threads)]
        if arm.kind == "stream":
            made["env"] = {"GGML_OP_OFFLOAD_MIN_BATCH": "1"}
            load = "pinned"  # a copy from pageable memory is a third as fast
        flags += LOADS[load]
        made["load"], made["threads"] = load, int(threads)
    if arm.kind == "resident":
        flags += ["-ngl", "999", "-fit", "off"]
    elif arm.kind in ("cpu-moe", "stream"):
        flags += ["-ngl", "999", "-fit", "off", "--cpu-moe"]
    elif arm.kind == "ncmoe":
        flags += ["-ngl", "999", "-fit", "off", "-ncmoe", str(place["n_cpu_moe"])]
    elif arm.kind == "fit":
        made["fit_vram_bytes"] = place["vram_bytes"]
    else:  # ours, or our build with FATE off: our placement
        made["place"] = True
        made["args_for_cpu"] = ["-t", str(threads)]
    if arm.is_ours:
        made |= {"slots": arm.slots(shape), "throttle": settings.get("throttle")}
        made["mode"] = "callback" if arm.kind == "callback" else "table"
        own = {"python-lru": "bench.policies:PythonLRU", "oracle": "oracle"}
        made["policy"] = own.get(arm.kind, arm.evicts_by)
        if arm.is_learned:
            made["classifier"] = settings["classifier"]
            made["evict_by"] = "scores" if arm.evicts_by == "classifier" else "lru"
        if arm.prefetches:
            made["prefetch"] = PREFETCH[arm.kind][0]
            made["prefetch_threshold"] = float(arm.options["chance"]) if "chance" in arm.options else None
        if arm.kind in AHEAD:
            made["ahead"] = {**AHEAD[arm.kind], "n_experts": shape.n_experts}
            if arm.needs_ahead:
                made["ahead"]["path"] = settings["ahead"]
    made["flags"] = flags
    return made
