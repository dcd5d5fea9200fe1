"""Run one group: open its arms, let them alternate, keep every sample.

Opening costs more than a round, so an arm is opened once: as many arms as the device's memory holds at a time
make a leg, alternate until all rounds are done, and are closed. The resident arm takes part in every leg, and
fractions are of its rounds in the same leg.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from bench import provenance, worker
from bench.arms import UBATCH, Arm, job
from bench.groups import Group
from bench.models import Shape
from bench.worker import WARM_UP

MARGIN = 3 << 29
"""VRAM left free beside what an arm is expected to take: its CUDA context and what grows."""
POOL_WARM_UP = 200
FIRST_ROW, PROMPT_ROW = 256, 4096
SLOW_PROMPT_SECONDS = 2.5
"""Arms that take longer for the longest prompt get one sample of each length."""
OVER = {"error", "not_engaged", "left_out"}
OPEN_SECONDS, CALL_SECONDS = 240.0, 120.0


class ArmError(Exception):
    """An arm failed; the message says how."""


@dataclass
class Plan:
    """How much of each: rounds of so many tokens, and when to stop."""

    rounds: int = 5
    tokens: int = 256
    minutes: float = 8.0
    pool_warm_up: int = POOL_WARM_UP
    prompts: tuple[int, ...] | None = None
    """Lengths instead of the group's."""

    @property
    def n_rows(self) -> int:
        """Rows of the routing up to the last one that is decoded."""
        return FIRST_ROW + self.rounds * (self.tokens + WARM_UP)


class _Process:
    """A worker and the pipe to it."""

    def __init__(self, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=worker.serve, args=(theirs, log), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, name: str, seconds: float = CALL_SECONDS, **arguments: Any) -> Any:
        try:
            self.pipe.send((name, arguments))
            if not self.pipe.poll(seconds):
                raise ArmError(f"no answer to {name} in {seconds:.0f} s")
            state, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise ArmError(f"the process ended during {name} ({how})") from None
        if state != "done":
            raise ArmError(value)
        return value

    def close(self) -> None:
        try:
            self.call("close", 30.0)
        except ArmError:
            self.process.kill()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class Run:
    """One run of a group.

    An arm that fails, does not engage or finds no time left gets a row that says so.

    Parameters
    ----------
    settings
        See `arms.job`; what the command line and the tuning say, over the group's own.
    out
        Folder of the result, `GROUP.json`, and of the logs.
    """

    OPENING_SECONDS = 25.0

    def __init__(
        self,
        group: Group,
        shape: Shape,
        model: Path,
        routing: Path | None,
        source: dict[str, Any],
        settings: dict[str, Any],
        plan: Plan,
        out: Path,
        began: float,
    ) -> None:
        self.group, self.shape, self.plan = group, shape, plan
        self.model, self.routing = model, routing
        self.settings = {**settings, **group.settings}
        self.out = out
        self.began = began
        self.arms = group.arms()
        self.open: dict[str, _Process] = {}
        self.link: _Process | None = None
        self.leg = 0
        self.resident = next((arm for arm in self.arms if arm.kind == "resident"), None)
        self.result: dict[str, Any] = {
            "group": group.name,
            "model": {
                "name": group.model,
                "file": model.name,
                "bytes": model.stat().st_size,
                "n_layers": shape.n_layers,
                "n_experts": shape.n_experts,
                "k": shape.k,
            },
            "routing": source,
            "settings": self.settings,
            "plan": vars(plan),
            "link_bytes_per_second": [],
            "clocks": [],
            "arms": {arm.name: {"rounds": [], "prompts": {}} for arm in self.arms},
            "is_complete": False,
        }

    # ---------------------------------------------------------------------------------------------- the run

    def run(self) -> dict[str, Any]:
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        try:
            waiting = [arm for arm in self.arms if arm.kind != "resident"]
            while True:
                self._leg(waiting)
                if not waiting:
                    break
                self.leg += 1
            done = self.result["arms"].values()
            self.result["is_complete"] = all(self._is_done(arm) for arm in done)
            self._save()
        finally:
            for process in [*self.open.values(), *([self.link] if self.link else [])]:
                process.close()
            self.open.clear()
        return self.result

    def _leg(self, waiting: list[Arm]) -> None:
        """Take arms from the waiting ones, run all their rounds, and close them."""
        if self.resident and self.resident.name not in self.open and not self._is_over(self.resident):
            self._enter(self.resident)
        leg = [self.resident] if self.resident else []
        while waiting:
            arm = waiting[0]
            if not self._fits(arm):
                if leg and (leg != [self.resident] or self.leg == 0):
                    break
                if self.resident:  # nothing fits beside it, and it had its rounds
                    self._close(self.resident.name)
                    self.resident, leg = None, []
            is_late = self._left() < self.OPENING_SECONDS + self._n_rounds() * self._round_seconds(leg)
            if is_late and any(arm is not self.resident for arm in leg):
                break
            waiting.pop(0)
            if is_late:
                self.result["arms"][arm.name]["left_out"] = "no time was left"
                self._say(f"{arm.name}: no time left")
                continue
            self._enter(arm)
            if arm.name in self.open:
                leg.append(arm)
        for i in range(self._n_rounds()):
            if i > 0 and self._left() < self._round_seconds(leg):
                self._say(f"leg {self.leg}: no time for more than {i} rounds")
                break
            for arm in leg:
                self._round(arm, i)
            self._measure_link()
            self._save()
        for arm in leg:
            if arm is not self.resident:
                self._close(arm.name)

    def _n_rounds(self) -> int:
        return self.plan.rounds if self.group.decode else self.group.n_prompts

    def _round_seconds(self, leg: list[Arm]) -> float:
        running = (self.result["arms"][arm.name] for arm in leg if not self._is_over(arm))
        return float(sum(found.get("round_s", 0.0) for found in running))

    def _is_over(self, arm: Arm) -> bool:
        return bool(OVER & self.result["arms"][arm.name].keys())

    def _is_done(self, arm: dict[str, Any]) -> bool:
        if "error" in arm or "not_engaged" in arm:
            return True
        if self.group.decode:
            return len(arm["rounds"]) >= self.plan.rounds
        return any(len(samples) >= self.group.n_prompts for samples in arm["prompts"].values())

    def _enter(self, arm: Arm) -> None:
        """Open an arm and let it take all the memory it ever takes; leave the reason if it does not run."""
        found = self.result["arms"][arm.name]
        began = time.monotonic()
        try:
            self._open(arm, found)
            if "not_engaged" in found:
                self._say(f"{arm.name}: not engaged because {found['not_engaged']}")
                self._close(arm.name)
                return
            process = self.open[arm.name]
            lengths = self._lengths()
            longest = max(lengths, default=UBATCH)
            seconds = process.call("prompt", n=longest, row=PROMPT_ROW)  # not counted
            if self.group.decode:
                for _ in range(1 if seconds > SLOW_PROMPT_SECONDS else self.group.n_prompts):
                    self._prompts(found, process)
                n_warm_up = self.plan.pool_warm_up if arm.is_ours else WARM_UP
                start = time.monotonic()
                process.call("decode", row=FIRST_ROW - WARM_UP, n=1, warm_up=n_warm_up)
                a_token = (time.monotonic() - start) / (n_warm_up + 1)
                found["round_s"] = a_token * (self.plan.tokens + WARM_UP)
            else:
                found["round_s"] = seconds * (1 + min(lengths) / longest)
            found["vram_bytes"] = process.call("vram")
            found["entered_s"] = time.monotonic() - began
            vram = f", {found['vram_bytes'] / 2**30:.2f} GiB" if found["vram_bytes"] else ""
            speeds = (f", {n}: {int(n) / min(s):.0f} tok/s" for n, s in found["prompts"].items())
            self._say(f"{arm.name}: open after {found['entered_s']:.1f} s{vram}{''.join(speeds)}")
        except ArmError as error:
            self._fail(arm, error)

    def _round(self, arm: Arm, i: int) -> None:
        if self._is_over(arm):
            return
        found, process = self.result["arms"][arm.name], self.open[arm.name]
        try:
            if self.group.decode:
                self._decode(arm, found, process, i)
            else:
                self._prompts(found, process)
        except ArmError as error:
            self._fail(arm, error)

    def _fail(self, arm: Arm, error: ArmError) -> None:
        self.result["arms"][arm.name]["error"] = str(error)
        self._say(f"{arm.name}: failed: {error}")
        self._close(arm.name)

    def _lengths(self) -> Sequence[int]:
        return self.group.prompts if self.plan.prompts is None else self.plan.prompts

    def _prompts(self, found: dict[str, Any], process: _Process) -> None:
        """Take a sample of each length, each prompt from other rows than the ones before."""
        lengths = self._lengths()
        for n in lengths:
            samples = found["prompts"].setdefault(str(n), [])
            row = PROMPT_ROW + (len(samples) + 1) * max(lengths) + n
            samples.append(process.call("prompt", n=n, row=row))

    def _decode(self, arm: Arm, found: dict[str, Any], process: _Process, i: int) -> None:
        row = FIRST_ROW + i * (self.plan.tokens + WARM_UP)
        sample = process.call("decode", row=row, n=self.plan.tokens, warm_up=WARM_UP)
        at = time.monotonic() - self.began
        found["rounds"].append({"leg": self.leg, "round": i, "at_s": at, **sample})
        counters = sample["counters"]
        pairs = counters["hits"] + counters["misses"]
        hits = f", hits {counters['hits'] / pairs:.3f}" if pairs else ""
        speed = 1e3 * len(sample["ms"]) / sum(sample["ms"])
        self._say(f"{arm.name}: round {i}: {speed:.1f} tok/s{hits}")

    # ---------------------------------------------------------------------------------------- opening arms

    def _open(self, arm: Arm, found: dict[str, Any]) -> None:
        began = time.monotonic()
        if arm.needs_ahead and "ahead_fault" in self.settings:
            raise ArmError(f"no in-token predictions: {self.settings['ahead_fault']}")
        request = job(arm, self.shape, self.settings, self._place(arm))
        process = _Process(self.out / "logs" / f"{self.group.name}.{arm.name.replace('/', '_')}.log")
        self.open[arm.name] = process
        opened = process.call(
            "open",
            OPEN_SECONDS,
            model=str(self.model),
            routing=str(self.routing) if self.routing else None,
            job=request,
        )
        found["opened"] = opened
        found["open_s"] = time.monotonic() - began
        found["load"], found["threads"] = request.get("load"), request.get("threads")
        if arm.is_ours and not opened["engaged"]:
            found["not_engaged"] = opened["reason"]

    def _close(self, name: str) -> None:
        process = self.open.pop(name, None)
        if process:
            process.close()

    def _ours_at(self, at: str) -> dict[str, Any] | None:
        """Return the arm of ours, LRU first, whose VRAM the vanilla arms at `at` get."""
        for arm in sorted(self.arms, key=lambda arm: arm.kind != "lru"):
            found: dict[str, Any] = self.result["arms"][arm.name]
            if arm.is_ours and arm.at == at and "vram_bytes" in found:
                return found
        return None

    def _place(self, arm: Arm) -> dict[str, Any]:
        if arm.kind not in ("fit", "ncmoe"):
            return {}
        ours = self._ours_at(arm.at)
        if ours is None:
            raise ArmError(f"no arm of ours at {arm.at} % was measured, so its VRAM is unknown")
        wanted = ours["vram_bytes"] or ours["opened"]["pool_bytes"]
        if arm.kind == "fit":
            return {"vram_bytes": wanted}
        base = self.result["arms"].get("cpu-moe", {}).get("vram_bytes")
        layers = [
            n * size
            for n, size in zip(ours["opened"]["n_experts"], ours["opened"]["expert_bytes"], strict=True)
        ]
        return {"n_cpu_moe": n_cpu_moe(layers, wanted - (base or 0))}

    def _expected_vram(self, arm: Arm) -> int:
        whole = self.result["model"]["bytes"]
        if arm.at:
            ours = self._ours_at(arm.at)
            if ours and ours["vram_bytes"]:
                return int(ours["vram_bytes"])
            return int(whole * arm.slots(self.shape) / self.shape.n_experts + (3 << 30))
        return 4 << 30

    def _fits(self, arm: Arm) -> bool:
        free = provenance.free_vram()
        return free is None or free >= self._expected_vram(arm) + MARGIN

    # --------------------------------------------------------------------------------------- time and files

    def _measure_link(self) -> None:
        sizes = [
            size
            for found in self.result["arms"].values()
            for size in found.get("opened", {}).get("expert_bytes", [])
        ]
        sizes = [size for size in sizes if size > 0]
        if not sizes:
            return
        try:
            if self.link is None:
                piece = int(sum(sizes) / len(sizes))
                self.link = _Process(self.out / "logs" / f"{self.group.name}.link.log")
                self.link.call("link", OPEN_SECONDS, model=str(self.model), piece_bytes=piece)
                self.result["link_piece_bytes"] = piece
            speed = self.link.call("measure")
        except ArmError as error:
            self._say(f"link: {error}")
            return
        if speed is not None:
            self.result["link_bytes_per_second"].append(speed)
            self._say(f"link: {speed / 1e9:.2f} GB/s")
        clocks = provenance.gpu("sm_mhz", "memory_mhz")
        if clocks:
            self.result["clocks"].append(clocks)

    def _left(self) -> float:
        return self.plan.minutes * 60 - (time.monotonic() - self.began)

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:6.1f} s  {self.group.name}  {text}", flush=True)

    def _save(self) -> None:
        path = self.out / f"{self.group.name}.json"
        unfinished = path.with_name(path.name + ".new")
        unfinished.write_text(json.dumps(self.result), encoding="utf-8")
        unfinished.replace(path)


def n_cpu_moe(layer_bytes: list[int], vram_bytes: int) -> int:
    """Return -ncmoe N such that the experts of the last layers take `vram_bytes` on the GPU, rounded up.

    Rounded up, so that the comparison is kind to the other side; at least one layer stays on the CPU.
    """
    held = n_on_gpu = 0
    for size in reversed(layer_bytes[1:]):
        if held >= vram_bytes:
            break
        held += size
        n_on_gpu += 1
    return len(layer_bytes) - n_on_gpu
