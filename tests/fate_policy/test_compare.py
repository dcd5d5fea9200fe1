"""The table of policies, capacities and traces."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from policy_contract import make_step, real_trace, synthetic_trace

from fate_policy.base import POOL, Geometry, History, Policy, Step
from fate_policy.compare import compare, make, replay_policy
from fate_policy.driver import Driver
from fate_policy.errors import PolicyConfigError, TraceError
from fate_policy.frequency import Frequency
from fate_policy.lru import LRU
from fate_policy.random import Random
from fate_policy.replay import geometry_of, replay
from fate_policy.rule import first_seed_row
from fate_policy.trace import Trace


class Sparse(Policy):
    """Publish every third token only, with a bonus; note what was told."""

    def start(self, geometry: Geometry) -> None:
        self.counts = np.zeros((geometry.n_layers, geometry.max_experts), np.float32)
        self.steps: list[Step] = []

    def observe(self, step: Step) -> None:
        self.steps.append(step)
        _, layer, _ = used = np.nonzero(step.ids >= 0)
        np.add.at(self.counts, (layer, step.ids[used]), 1)

    def scores(self, history: History) -> np.ndarray[Any, Any] | None:
        return self.counts.copy() if history.tokens_seen % 3 == 0 else None

    def bonus(self, history: History) -> np.ndarray[Any, Any]:
        return np.full(len(history.clock), 2.5, np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    real_trace().save(path := tmp_path / "real.npz")
    return path


@pytest.mark.parametrize(
    "trace", [synthetic_trace(500), real_trace().slice(0, 200)], ids=["synthetic", "real"]
)
@pytest.mark.parametrize("policy", [Random(seed=3), Sparse()], ids=["random", "sparse"])
def test_a_python_policy_counts_and_is_told_as_in_replay(trace: Trace, policy: Policy) -> None:
    """The order of fills and evictions within a step is the engine's there, by expert here."""
    n_slots = None if trace.meta["n_slots"] else "25%"
    expected = replay(trace, policy, n_slots=n_slots)
    told = getattr(policy, "steps", [])
    assert replay_policy(trace, policy, n_slots).counters == expected
    for here, there in zip(getattr(policy, "steps", []), told, strict=True):
        for name in ("ids", "path", "hits", "tokens", "positions", "sequences"):
            assert np.array_equal(getattr(here, name), getattr(there, name))
        assert sorted(map(tuple, here.fills.tolist())) == sorted(map(tuple, there.fills.tolist()))
        assert sorted(map(tuple, here.evictions.tolist())) == sorted(map(tuple, there.evictions.tolist()))


@pytest.mark.parametrize("form", [{"pool": "global"}, {"admission": "optional"}, {"cold": True}], ids=str)
def test_any_policy_can_be_replayed_in_every_form(form: dict[str, Any]) -> None:
    """A Python policy that decides as a built-in one does counts the same."""

    class Own(Frequency):
        pass

    own = replay_policy(real_trace(), Own(), 8, **form)
    built_in = replay_policy(real_trace(), Frequency(), 8, **form)
    assert (own.counters, own.admitted) == (built_in.counters, built_in.admitted)


@pytest.mark.parametrize(
    "when", [{"sync": False}, {"refresh_tokens": 5}, {"sync": False, "refresh_tokens": 5}]
)
@pytest.mark.parametrize("policy", [Random(seed=3), Frequency(), Frequency(lfru=True), LRU()])
def test_scores_act_when_the_engine_has_them_act(policy: Policy, when: dict[str, Any]) -> None:
    for trace, n_slots in ((synthetic_trace(150), None), (real_trace().slice(0, 60), 8)):
        assert replay_policy(trace, policy, n_slots, **when).counters == replay(
            trace, policy, n_slots=n_slots, **when
        )


class OnePool:
    """One pool for all layers, by the driver's scores, one clock and plain sorting."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        shape = driver.history.last_use.shape
        self.last_use = np.zeros(shape, np.int64)
        self.clock = self.published_at = 0
        self.resident: set[tuple[int, int]] = set()
        self.counts = {name: np.zeros(shape[0], np.int64) for name in ("misses", "seed_fills", "evictions")}

    def publish(self) -> None:
        if self.driver.publish() is not None:
            self.published_at = self.clock

    def worth(self, pair: tuple[int, int]) -> tuple[np.float32, int]:
        history, used = self.driver.history, int(self.last_use[pair])
        bonus = history.bonus[pair[0]] if used > self.published_at else np.float32(0)
        return history.scores[pair] + bonus, used

    def bring(self, layer: int, uses: list[int], count: str) -> None:
        needed = dict.fromkeys((layer, expert) for expert in uses)
        absent = needed.keys() - self.resident
        n_slots = int(self.driver.geometry.n_slots.sum())
        n_victims = max(0, len(self.resident) + len(absent) - n_slots)
        victims = sorted(self.resident - needed.keys(), key=self.worth)[:n_victims]
        for other, _ in victims:
            self.counts["evictions"][other] += 1
        self.counts[count][layer] += len(absent)
        self.resident = self.resident - set(victims) | absent

    def use(self, layer: int, uses: list[int]) -> None:
        for expert in uses:
            self.clock += 1
            self.last_use[layer, expert] = self.clock


def in_one_pool(trace: Trace, policy: Policy) -> dict[str, list[int]]:
    """Return misses, seeds and evictions of each layer."""

    def uses(ids: np.ndarray[Any, Any]) -> list[int]:
        flat = ids[:, ::-1].ravel()
        return flat[flat >= 0].tolist()

    geometry = geometry_of(trace)
    pool = OnePool(Driver(policy, geometry))
    for start, stop in pairwise(trace.step_bounds().tolist()):
        pool.publish()
        ids, path = trace.experts(start, stop), trace.path[start:stop]
        kinds = path.max(axis=0).tolist()
        for layer, kind in enumerate(kinds):
            if kind == POOL:
                pool.bring(layer, uses(ids[:, layer]), "misses")
            pool.use(layer, uses(ids[:, layer]))
        for layer, (k, n_slots) in enumerate(zip(geometry.k, geometry.n_slots, strict=True)):
            if kinds[layer] > POOL:
                seeding = ids[first_seed_row(ids[:, layer], int(k), int(n_slots)) :, layer]
                pool.bring(layer, uses(seeding), "seed_fills")
        pool.driver.observe(make_step(ids, path))
    return {name: column.tolist() for name, column in pool.counts.items()}


@pytest.mark.parametrize(
    "policy",
    [Frequency(), Frequency(lfru=True), Random(seed=3), Sparse()],
    ids=["count", "lfru", "random", "sparse"],
)
def test_in_one_pool_uses_of_the_step_at_hand_have_their_bonus(policy: Policy) -> None:
    """The least of a layer was once found without it, and kept so while other layers seeded."""
    routed = synthetic_trace(500)
    expected = in_one_pool(routed, policy)
    counters = replay_policy(routed, policy, None, pool="global").counters
    assert {name: getattr(counters, name).tolist() for name in expected} == expected


def test_a_bar_moves_within_a_row(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fate_policy.progress.SECONDS", 0)
    monkeypatch.setattr("fate_policy.compare.CHUNK_STEPS", 100)
    compare([file], ["lru", "random"], [8], progress=True)
    shown = [line.split("]")[1].strip() for line in capsys.readouterr().err.split("\r")[1:-2]]
    assert shown[:5] == ["0/2, 12 %", "0/2, 25 %", "0/2, 38 %", "1/2, 50 %", "1/2, 50 %"]
    assert shown[-1] == "2/2, 100 %"
    assert len(shown) == 4 + 400


def test_a_policy_without_scores_is_replayed_only_as_the_engine_runs_it() -> None:
    class Lowest(Policy):
        def victims(self, layer: int, n: int, pinned: Any, history: History) -> Any:
            return np.flatnonzero(history.resident[layer, : len(pinned)] & ~pinned)[:n]

    routed = real_trace().slice(0, 100)
    assert replay_policy(routed, Lowest(), 8).counters == replay(routed, Lowest(), n_slots=8, mode="callback")
    with pytest.raises(PolicyConfigError, match="has no scores, so it can be replayed only with pool layer"):
        replay_policy(real_trace(), Lowest(), 8, pool="global")


def test_a_row_says_what_was_asked_and_what_came_out(file: Path) -> None:
    (row,) = compare([file], ["lru"], ["25%"], expert_bytes=1000, link_gb_s=0.001, resident_tokens_s=100)
    counters = replay(real_trace(), "lru", n_slots=8)
    fills = int(counters.fills.sum()) / 400
    share = int(counters.rows_all_resident.sum()) / int(counters.rows.sum())
    assert row.pop("seconds") > 0
    assert row == {
        "trace": "real",
        "policy": "lru",
        "capacity": "25%",
        "pool": "layer",
        "admission": "forced",
        "hit_rate": counters.hit_rate,
        "all_resident": share,
        "fills_per_token": fills,
        "admitted_per_token": fills,
        "bytes_per_token": fills * 1000,
        "transfer_ms_per_token": pytest.approx(fills),
        "cold": False,
        "sync": True,
        "refresh_tokens": 1,
        "slots": [8] * 24,
        "share": 0.25,
        "tokens": 400,
        "link_gb_s": 0.001,
        "of_resident": pytest.approx(10 / (10 + fills)),
    }


def test_rows_come_in_the_order_asked_whoever_works(file: Path) -> None:
    """Workers of joblib, and of a Dask cluster through joblib's backend, give the rows of one process."""
    asked: Any = ([file, real_trace()], ["lfu", "lru"], ["25%", 16])
    plain = [{**row, "seconds": 0} for row in compare(*asked)]
    assert [(row["capacity"], row["policy"]) for row in plain[:4]] == [
        ("25%", "lfu"),
        ("25%", "lru"),
        ("16", "lfu"),
        ("16", "lru"),
    ]
    with joblib.parallel_config("threading", n_jobs=2):
        assert [{**row, "seconds": 0} for row in compare(*asked)] == plain


@pytest.mark.slow
def test_the_same_job_runs_on_processes_and_on_a_dask_cluster(file: Path) -> None:
    distributed = pytest.importorskip("distributed")
    asked: Any = ([file, real_trace()], ["lru", "random"], ["25%"])
    plain = [{**row, "seconds": 0} for row in compare(*asked)]
    assert [{**row, "seconds": 0} for row in compare(*asked, n_jobs=2)] == plain
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config("dask"),
    ):
        assert [{**row, "seconds": 0} for row in compare(*asked)] == plain


@pytest.mark.slow
def test_the_same_job_runs_on_a_ray_cluster(file: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    from ray.util.joblib import register_ray

    asked: Any = ([str(file)], ["lru", "random"], ["25%"])
    plain = [{**row, "seconds": 0} for row in compare(*asked)]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        register_ray()
        with joblib.parallel_config("ray", n_jobs=2):
            assert [{**row, "seconds": 0} for row in compare(*asked)] == plain
    finally:
        ray.shutdown()


@pytest.mark.parametrize(
    ("spec", "attributes"),
    [
        ("lfu", {"half_life_tokens": 1e30, "lfru": False}),
        ("lfru:half_life_tokens=32", {"half_life_tokens": 32, "lfru": True}),
        ("frequency:half_life_tokens=64+lfru=true", {"half_life_tokens": 64, "lfru": True}),
        ("fate_policy.random:Random:seed=7", {"seed": 7}),
        ("fate_policy.random:Random", {"seed": 0}),
    ],
)
def test_a_policy_is_named_with_its_parameters(spec: str, attributes: dict[str, Any]) -> None:
    assert {key: getattr(make(spec), key) for key in attributes} == attributes


def test_a_policy_file_and_a_file_with_slots_are_taken(file: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        f"policy: frequency\nfrequency: {{half_life_tokens: 4}}\nslots: [{', '.join(['7'] * 24)}]\n"
    )
    own = str(tmp_path / "own.yaml")
    (row,) = compare([file], [own], [own])
    assert (row["slots"], row["hit_rate"]) == (
        [7] * 24,
        replay(real_trace(), Frequency(half_life_tokens=4), n_slots=7).hit_rate,
    )


def unknown() -> Trace:
    return replace(real_trace(), meta={**real_trace().meta, "model": "unknown"})


def test_what_cannot_be_is_said_before_anything_runs(file: Path) -> None:
    with pytest.raises(PolicyConfigError, match="unknown parameter of policy frequency: 'half_life'"):
        compare([file], ["lru", "frequency:half_life=3"], ["25%"])
    with pytest.raises(TraceError, match="does not tell an expert's bytes"):
        compare([unknown()], ["lru"], ["1GiB"])


def test_the_bytes_of_an_expert_are_those_known_of_the_model_or_none(file: Path) -> None:
    known, nobody = compare([file, unknown()], ["lru"], ["25%"])
    assert known["bytes_per_token"] == pytest.approx(known["fills_per_token"] * 13253760)
    assert (nobody["bytes_per_token"], nobody["transfer_ms_per_token"]) == (None, None)
