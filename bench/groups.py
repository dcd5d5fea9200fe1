"""The groups of a whole run; each has resident and vanilla arms of its own, so ratios come from one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.arms import ALL_BUT_ONE, Arm, parse
from bench.models import SHAPES

PERCENT = ("75", "50", "25", "12.5")


@dataclass(frozen=True)
class Group:
    """Arms that alternate.

    names : of the arms, in order
    prompts : lengths whose speed is measured
    n_prompts : samples of each
    decode : whether single tokens are measured
    settings : see `arms.job`
    spares_last : no token uses the last expert of a layer, so that all but one slot's worth never misses
    tunes : its best vanilla arm says which threads and which way to load the other groups take
    """

    name: str
    model: str
    names: Sequence[str]
    prompts: Sequence[int] = (512, 2048)
    n_prompts: int = 2
    decode: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    tunes: bool = False
    spares_last: bool = False

    def arms(self) -> list[Arm]:
        """Return the arms that make sense for the model: no pool below k slots, none twice."""
        shape = SHAPES[self.model]
        made: list[Arm] = []
        for name in self.names:
            arm = parse(name)
            if arm.at and arm.slots(shape) < shape.k:
                continue
            made.append(arm)
        return made


def _decode_arms(percents: Sequence[str], compared: Sequence[str]) -> list[str]:
    names = ["resident", "cpu-moe"]
    names += [f"lru@{at}" for at in percents]
    for at in compared:
        names += [f"ncmoe@{at}", f"fit@{at}", f"frequency@{at}", f"classifier@{at}", f"callback@{at}"]
    return [*names, "stream"]


def _groups() -> list[Group]:
    made = [Group("tiny", "tiny", [*_decode_arms(PERCENT, ("50", "25")), "off"])]
    for model in ("qwen3", "gptoss", "mixtral", "qwen235"):
        if model != "qwen235":
            threads = [f"cpu-moe:t={t}" for t in (8, 12, 16)]
            loads = [f"cpu-moe:load={load}" for load in ("pinned", "repack")]
            made.append(Group(f"{model}-tune", model, [*threads, *loads], n_prompts=1, tunes=True))
        made.append(Group(model, model, _decode_arms(PERCENT, ("50", "25"))))
        if model in ("qwen3", "gptoss"):
            edges = [name for at in ("75", "12.5") for name in _same_vram(at)]
            made.append(Group(f"{model}-edges", model, ["resident", "cpu-moe", "off", *edges], prompts=()))
            made.append(
                Group(
                    f"{model}-prompts",
                    model,
                    [
                        "resident",
                        "cpu-moe",
                        *(n for at in ("50", "25") for n in (f"lru@{at}", f"ncmoe@{at}")),
                    ],
                    n_prompts=5,
                    decode=False,
                    settings={"load": "pinned"},
                )
            )
    overhead = ["resident", f"lru@{ALL_BUT_ONE}", "lru@50", "python-lru@50"]
    made.append(Group("qwen3-overhead", "qwen3", overhead, prompts=()))
    kinds = ["lru", "lru+token", "lru+layer", "classifier", "classifier+token", "classifier+both"]
    kinds += ["oracle", "oracle2", "oracle4", "recall90"]
    for model in ("qwen3", "gptoss"):
        names = ["resident", *(f"{kind}@{at}" for at in ("50", "25", "75", "12.5") for kind in kinds)]
        made.append(Group(f"{model}-ahead", model, names, prompts=()))
        names = ["resident", f"lru@{ALL_BUT_ONE}"]
        made.append(Group(f"{model}-hits", model, names, prompts=(), spares_last=True))
    kv = ["resident", "cpu-moe", "lru@50", "ncmoe@50", "fit@50"]
    made.append(Group("qwen3-kv", "qwen3", kv, settings={"kv": "q8_0"}))
    return made


def _same_vram(at: str) -> list[str]:
    return [f"{kind}@{at}" for kind in ("lru", "ncmoe", "fit", "frequency", "classifier", "callback")]


GROUPS = {group.name: group for group in _groups()}
