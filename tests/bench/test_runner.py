"""Legs, time and failures of a group, on a device that is only counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from bench import provenance, runner
from bench.groups import Group
from bench.models import SHAPES
from bench.runner import ArmError, Plan, Run

GIB = 1 << 30
TAKES = {
    "resident": 20,
    "cpu-moe": 3,
    "lru@75": 16,
    "lru@50": 11,
    "fit@50": 11,
    "callback@50": 11,
    "lru+layer@50": 11,
}


class Device:
    """What the processes below hold and have been asked."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.held: dict[str, int] = {}
        self.calls: list[tuple[str, str]] = []
        self.opened: list[str] = []
        self.wanted: dict[str, Any] = {}
        self.fails: dict[tuple[str, str], str] = {}
        self.rows: list[tuple[int, int]] = []

    def free(self) -> int:
        return (self.total - sum(self.held.values())) * GIB


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    counted = Device(52)

    class Process:
        def __init__(self, log: Path) -> None:
            self.name = log.name.removeprefix("g.").removesuffix(".log")

        def call(self, name: str, seconds: float = 0, **arguments: Any) -> Any:
            counted.calls.append((self.name, name))
            if (self.name, name) in counted.fails:
                raise ArmError(counted.fails[self.name, name])
            if name == "open":
                assert counted.free() >= TAKES[self.name] * GIB
                counted.held[self.name] = TAKES[self.name]
                counted.opened.append(self.name)
                counted.wanted[self.name] = arguments["job"]
                is_engaged = "@" in self.name and not self.name.startswith("callback")
                return {
                    "engaged": is_engaged,
                    "reason": "of a reason",
                    "n_experts": [128] * 48,
                    "expert_bytes": [2_700_000] * 48,
                    "pool_bytes": 0,
                }
            if name == "vram":
                return TAKES[self.name] * GIB
            if name == "decode":
                counted.rows.append((arguments["row"], arguments["n"]))
                counters = {"hits": 1, "misses": 1, "bytes": 0, "rows": 1, "rows_all_resident": 0}
                return {"ms": [1.0], "policy_seconds": 0.0, "policy_error": None, "counters": counters}
            return 1.0 if name in ("prompt", "measure") else None

        def close(self) -> None:
            counted.held.pop(self.name, None)

    monkeypatch.setattr(runner, "_Process", Process)
    monkeypatch.setattr(provenance, "free_vram", counted.free)
    return counted


def make(out: Path, names: list[str], plan: Plan | None = None, **of_group: Any) -> Run:
    model = out / "m.gguf"
    with model.open("wb") as file:
        file.truncate(18 * GIB)
    group = Group("g", "qwen3", names, **of_group)
    plan = plan or Plan(rounds=3, tokens=4)
    return Run(group, SHAPES["qwen3"], model, None, {}, {}, plan, out, time.monotonic())


NAMES = ["resident", "cpu-moe", "lru@75", "lru@50", "fit@50"]


def test_arms_are_opened_once_and_legs_share_the_resident_one(device: Device, tmp_path: Path) -> None:
    result = make(tmp_path, NAMES).run()
    assert result["is_complete"]
    assert device.opened == NAMES
    legs = {name: {s["leg"] for s in found["rounds"]} for name, found in result["arms"].items()}
    assert legs == {"resident": {0, 1}, "cpu-moe": {0}, "lru@75": {0}, "lru@50": {1}, "fit@50": {1}}
    assert len(result["arms"]["resident"]["rounds"]) == 6
    turns = [name for name, call in device.calls if call == "decode" and name != "cpu-moe"]
    assert turns[-6:] == ["resident", "lru@50", "fit@50"] * 2  # they alternate
    assert device.held == {}


def test_fit_gets_the_vram_that_ours_took(device: Device, tmp_path: Path) -> None:
    make(tmp_path, NAMES).run()
    assert device.wanted["fit@50"]["fit_vram_bytes"] == 11 * GIB


def test_what_does_not_fit_beside_the_resident_arm_runs_without_it(device: Device, tmp_path: Path) -> None:
    device.total = 22
    result = make(tmp_path, ["resident", "lru@75"]).run()
    assert result["is_complete"]
    assert len(result["arms"]["lru@75"]["rounds"]) == 3


def test_what_fails_or_does_not_engage_has_a_row_and_the_rest_goes_on(device: Device, tmp_path: Path) -> None:
    device.fails = {("cpu-moe", "open"): "the process ended", ("lru@75", "decode"): "lost"}
    result = make(tmp_path, [*NAMES, "callback@50"]).run()
    assert result["arms"]["cpu-moe"]["error"] == "the process ended"
    assert result["arms"]["lru@75"]["error"] == "lost"
    assert result["arms"]["callback@50"]["not_engaged"] == "of a reason"
    assert len(result["arms"]["fit@50"]["rounds"]) == 3
    assert result["is_complete"]
    assert device.held == {}


def test_arms_without_their_predictions_have_rows_and_the_rest_goes_on(
    device: Device, tmp_path: Path
) -> None:
    run = make(tmp_path, ["resident", "lru@50", "lru+layer@50"])
    run.settings["ahead_fault"] = "a file does not exist"
    result = run.run()
    assert result["arms"]["lru+layer@50"]["error"] == "no in-token predictions: a file does not exist"
    assert len(result["arms"]["lru@50"]["rounds"]) == 3
    assert device.opened == ["resident", "lru@50"]


def test_rows_of_a_plan_reach_the_last_token_decoded(device: Device, tmp_path: Path) -> None:
    plan = Plan(rounds=3, tokens=4)
    make(tmp_path, ["resident"], plan).run()
    assert max(row + n for row, n in device.rows) == plan.n_rows - runner.WARM_UP


def test_without_time_nothing_more_is_opened(device: Device, tmp_path: Path) -> None:
    result = make(tmp_path, NAMES, Plan(rounds=3, tokens=4, minutes=0.01)).run()
    assert not result["is_complete"]
    assert device.opened == ["resident"]
    assert result["arms"]["fit@50"]["left_out"] == "no time was left"


def test_prompts_alone_alternate(device: Device, tmp_path: Path) -> None:
    result = make(tmp_path, NAMES[:3], decode=False, n_prompts=4).run()
    assert result["is_complete"]
    for name in NAMES[:3]:
        assert [len(samples) for samples in result["arms"][name]["prompts"].values()] == [4, 4]
        assert result["arms"][name]["rounds"] == []


def test_a_killed_process_is_an_arm_error(tmp_path: Path) -> None:
    process = runner._Process(tmp_path / "log")
    process.process.kill()
    with pytest.raises(ArmError, match="the process ended during vram \\(signal 9\\)"):
        process.call("vram")
    process.close()
