from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bench import report
from bench.__main__ import main
from bench.arms import Arm, job, parse
from bench.groups import GROUPS
from bench.models import SHAPES, Models, fitting, tensors, write
from bench.routing import PUBLISHED, lru_hits, routing, way, without_last
from bench.runner import n_cpu_moe


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "tiny"])
def test_generated_files_hold_the_shape(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.models.POOL_BYTES", 8 << 20)
    shape = replace(SHAPES[name], n_layers=1, n_vocab=256, n_ff=256)
    path = tmp_path / "m.gguf"
    assert write(path, shape) == path.stat().st_size == shape.n_bytes
    read = gguf.GGUFReader(path)
    held = {tensor.name: tensor for tensor in read.tensors}
    assert set(held) == {tensor.name for tensor in tensors(shape)}
    up = held["blk.0.ffn_up_exps.weight"]
    assert up.shape.tolist() == [shape.n_embd, shape.n_ff, shape.n_experts]
    experts = up.data.reshape(shape.n_experts, -1)
    assert len({row.tobytes() for row in experts}) == shape.n_experts


def test_sizes_are_those_of_the_real_models() -> None:
    """Within 2 % of the published files; within 8 % for Mixtral, an older file with other types."""
    sizes = {name: SHAPES[name].n_bytes / 1e9 for name in ("qwen3", "gptoss", "mixtral", "qwen235")}
    assert sizes["qwen3"] == pytest.approx(18.56, rel=0.02)
    assert sizes["gptoss"] == pytest.approx(12.11, rel=0.02)
    assert sizes["qwen235"] == pytest.approx(142.2, rel=0.02)
    assert sizes["mixtral"] == pytest.approx(26.44, rel=0.08)


def test_a_large_shape_loses_layers_until_it_fits() -> None:
    some = fitting(SHAPES["qwen235"], 40 << 30)
    assert some.n_bytes <= 40 << 30 < replace(some, n_layers=some.n_layers + 1).n_bytes


def test_models_make_room_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.models.POOL_BYTES", 8 << 20)
    small = {name: replace(SHAPES[name], n_layers=1, n_vocab=256, n_ff=256) for name in ("qwen3", "mixtral")}
    monkeypatch.setattr("bench.models.SHAPES", small)
    monkeypatch.setattr("bench.models.fitting", lambda shape, room: shape)
    models = Models(tmp_path)
    first = models.get("qwen3")[1]
    assert models.get("qwen3")[1] == first
    monkeypatch.setattr(models, "_free", lambda: 0 if first.exists() else 1 << 40)
    second = models.get("mixtral")[1]
    assert not first.exists()
    assert second.exists()


@pytest.mark.slow
def test_stretched_routing_hits_as_published() -> None:
    """Within two points of what LRU reaches on Qwen3-30B-A3B at 16, 32 and 64 of 128 slots."""
    made = routing(SHAPES["qwen3"])
    got = lru_hits(made.ids[:2000], list(PUBLISHED))
    assert got == pytest.approx(list(PUBLISHED.values()), abs=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_routing_is_distinct_and_fits_the_shape(name: str) -> None:
    shape = replace(SHAPES[name], n_layers=min(SHAPES[name].n_layers, 6))
    made = routing(shape)
    assert made.ids.shape[1:] == (6, shape.k)
    assert (np.diff(np.sort(made.ids, axis=2), axis=2) > 0).all()
    assert made.ids.min() == 0
    assert made.ids.max() == shape.n_experts - 1
    assert made.tokens.max() < shape.n_vocab
    assert made.source["way"] == way(shape)


def test_a_spared_expert_is_never_used() -> None:
    made = without_last(routing(SHAPES["gptoss"]), SHAPES["gptoss"])
    assert made.ids.max() == SHAPES["gptoss"].n_experts - 2
    ranked = np.sort(made.ids, axis=2)
    assert (ranked[..., 1:] > ranked[..., :-1]).all()


def test_fitting_and_replay_share_no_prompt() -> None:
    shape = replace(SHAPES["gptoss"], n_layers=2)
    fit, test = (routing(shape, part=part) for part in ("fit", "test"))
    assert not np.array_equal(fit.tokens, test.tokens)
    assert fit.source["sha256"] == test.source["sha256"]


def test_every_group_has_what_its_ratios_need() -> None:
    for group in GROUPS.values():
        names = [arm.name for arm in group.arms()]
        assert len(set(names)) == len(names)
        if not group.tunes:
            assert names[0] == "resident"
        for i, arm in enumerate(group.arms()):
            if arm.kind in ("fit", "ncmoe"):
                assert f"lru@{arm.at}" in names[:i]
                assert "cpu-moe" in names[:i]
    mixtral = [arm.name for arm in GROUPS["mixtral"].arms()]
    assert "lru@25" in mixtral
    assert "lru@12.5" not in mixtral  # one slot, and a token uses two


def test_arms_name_their_flags() -> None:
    shape = SHAPES["qwen3"]
    settings: dict[str, Any] = {"threads": 12, "load": "repack", "classifier": "c.npz", "throttle": 12.0}
    ours = job(parse("classifier@12.5"), shape, settings, {})
    assert (ours["slots"], ours["place"], ours["throttle"]) == (16, True, 12.0)
    vanilla = job(parse("ncmoe@50"), shape, settings, {"n_cpu_moe": 24})
    assert (
        vanilla["flags"][-8:]
        == [
            *("--load-mode", "mmap", "--no-host", "-ngl", "999", "-fit", "off"),
            *("-ncmoe", "24"),
        ][-8:]
    )
    assert "throttle" not in vanilla
    assert job(parse("stream"), shape, settings, {})["env"] == {"GGML_OP_OFFLOAD_MIN_BATCH": "1"}
    assert "-ngl" not in job(parse("fit@50"), shape, settings, {"vram_bytes": 1})["flags"]
    assert parse("cpu-moe:load=repack,t=8") == Arm(
        "cpu-moe:load=repack,t=8", "cpu-moe", "", {"load": "repack", "t": "8"}
    )
    for name in ("lru", "resident@50", "best"):
        with pytest.raises(ValueError, match="arm"):
            parse(name)


def test_arms_with_prefetch_name_when_and_what_predicts() -> None:
    """The policy chooses victims; the classifier predicts, or what is given inside the token, or both."""
    shape = SHAPES["qwen3"]
    settings: dict[str, Any] = {"classifier": "c.npz", "ahead": "a.npz"}
    by_ids = {"kind": "ids", "path": "a.npz", "n_experts": 128}
    wanted: dict[str, tuple[Any, ...]] = {
        "lru": ("lru", None, "off", None),
        "lru+token": ("lru", "lru", "token", None),
        "lru+layer": ("lru", None, "layer", by_ids),
        "lru+both": ("lru", "lru", "both", by_ids),
        "classifier": ("classifier", "scores", "off", None),
        "classifier+token": ("classifier", "scores", "token", None),
        "classifier+layer": ("classifier", "scores", "layer", by_ids),
        "classifier+both": ("classifier", "scores", "both", by_ids),
        "oracle": ("oracle", None, "token", None),
        "oracle2": ("lru", None, "layer", {"kind": "perfect", "horizon": 2, "n_experts": 128}),
        "oracle4": ("lru", None, "layer", {"kind": "perfect", "horizon": 4, "n_experts": 128}),
        "recall90": ("lru", None, "layer", {"kind": "synthetic", "n_experts": 128}),
        "frequency": ("frequency", None, "off", None),
        "callback": ("lru", None, "off", None),
        "python-lru": ("bench.policies:PythonLRU", None, "off", None),
    }
    for kind, expected in wanted.items():
        made = job(parse(f"{kind}@25"), shape, settings, {})
        assert (made["policy"], made.get("evict_by"), made.get("prefetch"), made.get("ahead")) == expected
        assert ("classifier" in made) == (expected[1] is not None)
        assert parse(f"{kind}@25").needs_ahead == (expected[3] == by_ids)
    assert job(parse("oracle2@25:chance=0.3"), shape, settings, {})["prefetch_threshold"] == 0.3
    assert job(parse("lru+both@25"), shape, settings, {})["prefetch_threshold"] is None
    with pytest.raises(ValueError, match="oracle2"):
        parse("oracle3@50")


def test_groups_with_prefetch_have_every_predictor_at_every_share() -> None:
    kinds = ["lru", "lru+token", "lru+layer", "classifier", "classifier+token", "classifier+both"]
    kinds += ["oracle", "oracle2", "oracle4", "recall90"]
    for name in ("qwen3-ahead", "gptoss-ahead"):
        arms = GROUPS[name].arms()
        assert [arm.name for arm in arms[:11]] == ["resident", *(f"{kind}@50" for kind in kinds)]
        assert {arm.at for arm in arms[1:]} == {"75", "50", "25", "12.5"}
        assert len(arms) == 1 + 4 * len(kinds)


def test_equal_vram_rounds_up_for_the_other_side() -> None:
    layers = [10, 20, 20, 30]
    assert [n_cpu_moe(layers, wanted) for wanted in (0, 1, 30, 31, 70, 1000)] == [4, 3, 3, 2, 1, 1]


def test_figures_of_a_row() -> None:
    """A resident token of 4 ms and 50 MB a token over 10 GB/s make 9 ms by the link model."""

    def found(ms: float, n_bytes: int = 0, leg: int = 0, **more: Any) -> dict[str, Any]:
        counters = {"hits": 60, "misses": 20, "bytes": n_bytes * 2, "rows": 20, "rows_all_resident": 5}
        sample = {
            "leg": leg,
            "ms": [ms, ms],
            "policy_seconds": 0.001,
            "policy_error": None,
            "counters": counters,
        }
        return {"rounds": [sample] * 5, "prompts": {"512": [0.5, 0.1, 0.4]}, **more}

    result = {
        "group": "g",
        "settings": {},
        "model": {"n_layers": 2},
        "link_bytes_per_second": [9e9, 10e9, 30e9],
        "link_piece_bytes": 5_000_000,
        "arms": {
            "resident": found(4),
            "cpu-moe": found(40),
            "fit@50": found(25),
            "fit@25": found(5, leg=1),
            "lru@50": found(10, 50_000_000, vram_bytes=1 << 30),
            "callback@50": {"rounds": [], "prompts": {}, "not_engaged": "of a reason"},
        },
    }
    table = {row["arm"]: row for row in report.rows(result)}
    assert table["fit@25"]["of_resident"] == pytest.approx(0.8)  # resident had no round in its leg
    row = table["lru@50"]
    assert row["tok_s"] == pytest.approx(100)
    assert row["of_resident"] == pytest.approx(0.4)
    assert row["vs_vanilla"] == pytest.approx(2.5)  # fit@25 has other VRAM
    assert row["hits"] == 0.75
    assert row["all_resident"] == 0.25
    assert row["mb_token"] == 50
    assert row["link"] == pytest.approx(0.5)
    assert row["model"] == pytest.approx(10 / 9)
    assert row["timeline"] == pytest.approx(10 / (4 + 10 * 5 / 10 / report.KERNEL_SHARE))
    held = report.rows({**result, "settings": {"throttle": 5}})
    of_throttle = {one["arm"]: one for one in held}["lru@50"]["timeline"]
    assert of_throttle == pytest.approx(10 / (4 + 10 * 5 / 5))  # slower than a kernel
    lru = result["arms"]["lru@50"]["rounds"][0]["counters"]
    lru |= {"prefetches": 40, "prefetch_useful": 40, "prefetch_hidden": 40 * 5_000_000}
    ahead = {one["arm"]: one for one in report.rows(result)}["lru@50"]["timeline"]
    beside = 20 * 0.5 / report.KERNEL_SHARE * (1 - 1 / 1.15)
    assert ahead == pytest.approx(10 / (4 + 10 * 0.5 / report.KERNEL_SHARE + beside))
    assert row["policy_ms"] == pytest.approx(0.5)
    assert row["p512"] == pytest.approx(1280)
    assert table["callback@50"]["note"] == "not engaged because of a reason"


def test_a_speed_names_its_predictor() -> None:
    counters = {"hits": 6, "misses": 2, "bytes": 0, "rows": 2, "rows_all_resident": 1}
    counters |= {"prefetches": 10, "prefetch_useful": 4}
    sample = {"leg": 0, "ms": [1.0, 1.0], "policy_seconds": 0.0, "policy_error": None, "counters": counters}
    names = ["resident", "lru@50", "lru+layer@50", "classifier+both@50", "oracle2@50", "recall90@50"]
    arms: dict[str, Any] = {name: {"rounds": [sample], "prompts": {}} for name in names}
    arms["lru+both@50"] = {"rounds": [], "prompts": {}, "error": "of a reason"}
    result: dict[str, Any] = {"group": "g", "settings": {}, "link_bytes_per_second": [], "arms": arms}
    table = {row["arm"]: row for row in report.rows(result)}
    assert {name: row["predictor"] for name, row in table.items()} == {
        "resident": None,
        "lru@50": None,
        "lru+layer@50": "ids of earlier layers (computed beforehand)",
        "classifier+both@50": (
            "classifier, at the token's start; ids of earlier layers (computed beforehand)"
        ),
        "oracle2@50": "perfect, two layers ahead",
        "recall90@50": "synthetic, recall 0.9, two layers ahead and one",
        "lru+both@50": "classifier, at the token's start; ids of earlier layers (computed beforehand)",
    }
    assert table["lru+layer@50"]["ahead"] == 5
    assert table["lru+layer@50"]["useful"] == 0.4
    assert table["lru@50"]["ahead"] is None
    result |= {
        "model": {"name": "qwen3", "n_layers": 48, "bytes": 1},
        "provenance": {"gpu": None, "cpu": "a cpu", "cores": 2, "commit": "c", "build_id": "b"},
        "routing": {"trace": "t", "way": "own", "sha256": "s"},
        "is_complete": True,
        "predictions": {
            "predictor": "ids of earlier layers",
            "classifier": {"file": "c.npz", "sha256": "0123456789abcdef"},
            "horizons": [2, 1],
            "recall": [{"at_k": 0.5, "at_2k": 0.625}, {"at_k": 0.75, "at_2k": 0.875}],
            "recall_at_start": {"at_k": 0.25, "at_2k": 0.375},
        },
    }
    told = (
        "predictor: ids of earlier layers (computed beforehand) with c.npz (0123456789ab), recall 2 ahead "
        "0.500 at k, 0.625 at 2k, 1 ahead 0.750 at k, 0.875 at 2k, at the token's start 0.250 and 0.375"
    )
    assert told in report._head(result)
    assert "predictor" not in report._head({**result, "predictions": None})


@pytest.mark.model
def test_dry_run_measures_reports_and_resumes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arms = ["resident", "cpu-moe", "lru@25", "ncmoe@25", "fit@25", "classifier@25", "callback@25"]
    arms += ["lru+layer@25"]
    unfitted = {"classifier@25": "", "lru+layer@25": "no in-token predictions: "}
    command = ["--dry-run", "--out", str(tmp_path), "--arms", *arms, "--prepared", str(tmp_path)]
    assert main(command) == 0
    result = json.loads((tmp_path / "tiny.json").read_text(encoding="utf-8"))
    assert result["is_complete"]
    assert result["provenance"]["build_id"]
    for name in arms:
        found = result["arms"][name]
        if name in unfitted:
            assert unfitted[name] in found["error"]
            assert "does not exist" in found["error"]  # and the other arms went on
        else:
            assert [len(sample["ms"]) for sample in found["rounds"]] == [8, 8]
            assert set(found["prompts"]) == {"16", "32"}
    lru, callback = (result["arms"][name]["rounds"][1]["counters"] for name in ("lru@25", "callback@25"))
    assert lru == callback  # the same rows were replayed
    assert lru["hits"] + lru["misses"] == 8 * 8 * 4
    with (tmp_path / "table.csv").open(encoding="utf-8") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == arms
    assert "| lru@25" in (tmp_path / "table.md").read_text(encoding="utf-8")
    capfd.readouterr()
    assert main(command) == 0
    assert "complete in" in capfd.readouterr().out
