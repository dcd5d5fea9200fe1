from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_contract import (
    SYNTHETIC,
    geometry,
    make_step,
    random_ids,
    real_trace,
    synthetic_trace,
    with_predictions,
)

from fate_policy import assess, trace
from fate_policy.base import NOT_RUN, Step
from fate_policy.errors import TraceError
from fate_policy.trace import Trace, TraceWriter

META = {"model": "synthetic", "policy": "lru", **trace.geometry_meta(SYNTHETIC)}
COLUMNS = ("ids", "path", "step", "sequence", "position", "token_id", "is_decode", "prompt_start")


def steps_of(routed: Trace, weights: bool = False) -> list[Step]:
    steps = []
    for start, stop in pairwise(routed.step_bounds().tolist()):
        ids = routed.experts(start, stop)
        steps.append(
            make_step(
                ids,
                routed.path[start:stop],
                weights=np.where(ids < 0, 0, 1 / (ids + 2)).astype(np.float32) if weights else None,
                tokens=routed.token_id[start:stop],
                positions=routed.position[start:stop],
                sequences=routed.sequence[start:stop],
                **routed.ahead(start, stop),
            )
        )
    return steps


def same(a: Trace, b: Trace) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


def test_a_recording_comes_back(tmp_path: Path) -> None:
    routed = synthetic_trace()
    path = tmp_path / "t.npz"
    with TraceWriter(path, META) as writer:
        for step in steps_of(routed, weights=True):
            writer.append(step)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]
    back = trace.load(path)
    assert same(back, routed)
    assert back.weights is not None
    assert back.weights.dtype == np.float16
    assert back.ids.dtype == np.uint8
    assert back.meta == {"format": "fate-trace", "version": 1, **META}
    assert back.hash() == routed.hash()


def test_any_numpy_reads_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with TraceWriter(path, META) as writer:
        for step in steps_of(synthetic_trace(50)):
            writer.append(step)
    with np.load(path) as file:
        assert set(file.files) == {*COLUMNS, "meta"}
        assert file["ids"].shape == (50, 3, 4)
        assert json.loads(str(file["meta"]))["n_slots"] == [4, 8, 11]


def test_recorded_predictions_come_back(tmp_path: Path) -> None:
    routed = with_predictions(synthetic_trace(), (2, 1))
    assert routed.ahead_ids is not None
    assert routed.ahead_chances is not None
    with TraceWriter(tmp_path / "t.npz", META) as writer:
        for step in steps_of(routed, weights=True):
            writer.append(step)
        writer.flush()
        killed = trace.load(writer.part)
    routed.save(tmp_path / "saved.npz")
    for back in (trace.load(tmp_path / "t.npz"), killed, trace.load(tmp_path / "saved.npz")):
        assert same(back, routed)
        assert back.ahead_ids is not None
        assert back.ahead_chances is not None
        assert (back.ahead_ids.dtype, back.ahead_chances.dtype) == (np.int16, np.float32)
        assert back.ahead_ids.tolist() == routed.ahead_ids.tolist()
        assert back.ahead_chances.tolist() == routed.ahead_chances.tolist()
        assert back.horizons == (2, 1)
        assert back.meta["horizons"] == [2, 1]
        assert back.hash() == routed.hash() != synthetic_trace().hash()
    part = routed.slice(90, 200)
    assert part.ahead_ids is not None
    assert part.ahead_ids.tolist() == routed.ahead_ids[90:200].tolist()
    told = part.ahead(3, 5)
    assert told["ahead_ids"].dtype == np.int32
    assert told["ahead_ids"].tolist() == routed.ahead_ids[93:95].tolist()
    assert told["ahead_chances"].tolist() == routed.ahead_chances[93:95].tolist()


def test_the_hash_tells_predictions_apart() -> None:
    routed = with_predictions(synthetic_trace(60))
    assert routed.ahead_chances is not None
    other = routed.ahead_chances.copy()
    other[other > 0] /= 2
    hashes = {
        trace_.hash()
        for trace_ in (
            synthetic_trace(60),
            routed,
            replace(routed, ahead_chances=other),
            replace(routed, meta={**routed.meta, "horizons": [3, 1]}),
            with_predictions(synthetic_trace(60), seed=1),
        )
    }
    assert len(hashes) == 5


def test_without_predictions_a_trace_says_nothing_of_them(tmp_path: Path) -> None:
    routed = synthetic_trace(50)
    with TraceWriter(tmp_path / "t.npz", META) as writer:
        for step in steps_of(routed):
            assert (step.ahead_ids, step.ahead_chances, step.horizons) == (None, None, ())
            writer.append(step)
    routed.save(tmp_path / "saved.npz")
    for name in ("t.npz", "saved.npz"):
        with np.load(tmp_path / name) as file:
            assert set(file.files) == {*COLUMNS, "meta"}
            assert "horizons" not in json.loads(str(file["meta"]))
        back = trace.load(tmp_path / name)
        assert (back.ahead_ids, back.ahead_chances, back.horizons) == (None, None, ())
        assert back.ahead(0, 50) == {}


def test_only_rows_that_are_taken_keep_their_predictions() -> None:
    routed = with_predictions(synthetic_trace(60))
    taken = assess.decode_only(routed)
    assert taken.ahead_ids is not None
    assert routed.ahead_ids is not None
    assert taken.n_tokens == routed.is_decode.sum() < 60
    assert taken.ahead_ids.tolist() == routed.ahead_ids[routed.is_decode].tolist()


def ahead_step(**changed: Any) -> Step:
    told = {
        "ahead_ids": np.full((1, 3, 2, 5), -1, np.int32),
        "ahead_chances": np.zeros((1, 3, 2, 5), np.float32),
        "horizons": (2, 1),
    }
    return make_step(random_ids(1, SYNTHETIC, 1), **{**told, **changed})


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"ahead_ids": None}, r"a step tells horizons \(2, 1\) or ahead_chances, and no ahead_ids; expected"),
        ({"ahead_chances": None}, r"ahead_chances of a step: none; expected shape \(1, 3, 2, 5\)"),
        ({"horizons": (1,)}, r"ahead_ids of a step: shape \(1, 3, 2, 5\); expected shape \(1, 3, 1, 5\)"),
        (
            {"ahead_chances": np.zeros((1, 3, 2, 4), np.float32)},
            r"ahead_chances of a step: shape \(1, 3, 2, 4\); expected shape \(1, 3, 2, 5\), for horizons \(2",
        ),
    ],
)
def test_a_steps_predictions_must_fit_together(tmp_path: Path, changed: dict[str, Any], fault: str) -> None:
    with (
        TraceWriter(tmp_path / "t.npz", META) as writer,
        pytest.raises(TraceError, match=fault),
    ):
        writer.append(ahead_step(**changed))


@pytest.mark.parametrize(
    "other",
    [
        {"horizons": (3, 1)},
        {"ahead_ids": None, "ahead_chances": None, "horizons": ()},
        {
            "ahead_ids": np.full((1, 3, 2, 4), -1, np.int32),
            "ahead_chances": np.zeros((1, 3, 2, 4), np.float32),
        },
    ],
)
def test_steps_must_agree_on_predictions(tmp_path: Path, other: dict[str, Any]) -> None:
    with TraceWriter(tmp_path / "t.npz", META) as writer:
        writer.append(ahead_step())
        with pytest.raises(TraceError, match=r"a step holds .*; record them apart"):
            writer.append(ahead_step(**other))
    assert trace.load(tmp_path / "t.npz").n_tokens == 1


def test_predictions_among_too_many_experts_are_refused(tmp_path: Path) -> None:
    shape = geometry([40000], [1], [8])
    told = {"ahead_ids": np.full((1, 1, 1, 1), 39999, np.int32), "horizons": (1,)}
    step = make_step(np.zeros((1, 1, 1), np.int32), ahead_chances=np.ones((1, 1, 1, 1), np.float32), **told)
    with (
        TraceWriter(tmp_path / "t.npz", trace.geometry_meta(shape)) as writer,
        pytest.raises(TraceError, match="predictions among 40000 experts do not fit the format's int16"),
    ):
        writer.append(step)


def test_saved_in_one_go_comes_back(tmp_path: Path) -> None:
    routed = synthetic_trace()
    routed.save(tmp_path / "any.name")
    assert same(trace.load(tmp_path / "any.name"), routed)
    assert [p.name for p in tmp_path.iterdir()] == ["any.name"]
    with pytest.raises(TraceError, match="cannot be written"):
        routed.save(tmp_path / "none" / "t.npz")


def test_more_than_255_experts_are_uint16(tmp_path: Path) -> None:
    shape = geometry([256, 300], [2, 4], [8, 8])
    ids = random_ids(20, shape, 2)
    ids[0, 0, 0], ids[1, 1, 0] = 255, 299
    path = tmp_path / "t.npz"
    with TraceWriter(path, trace.geometry_meta(shape)) as writer:
        writer.append(make_step(ids))
    back = trace.load(path)
    assert back.ids.dtype == np.uint16
    assert back.experts().tolist() == ids.tolist()


def test_what_did_not_run_is_not_recorded_as_routed(tmp_path: Path) -> None:
    ids = random_ids(2, SYNTHETIC, 2)
    paths = np.array([[1, NOT_RUN, 1], [1, 1, 1]], np.uint8)
    with TraceWriter(tmp_path / "t.npz", META) as writer:
        writer.append(make_step(ids, paths))
    assert trace.load(tmp_path / "t.npz").experts()[0, 1].tolist() == [-1] * 4


def test_decode_is_told_or_guessed(tmp_path: Path) -> None:
    ids = random_ids(3, SYNTHETIC, 2)
    with TraceWriter(tmp_path / "t.npz", META) as writer:
        writer.append(make_step(ids))
        writer.append(
            make_step(ids, sequences=np.array([0, 1, 1], np.int32), positions=np.array([7, 0, 1], np.int32))
        )
        writer.append(make_step(ids, sequences=np.arange(3, dtype=np.int32)))
        writer.append(make_step(ids), is_decode=np.array([False, False, True]))
    decoded = trace.load(tmp_path / "t.npz").is_decode.astype(int).reshape(4, 3)
    assert decoded.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]


def test_an_empty_recording_is_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    TraceWriter(path, META).close()
    assert trace.load(path).ids.shape == (0, 3, 4)
    assert trace.load(path).step_bounds().tolist() == [0]


def test_close_twice_and_append_after(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.npz", META)
    writer.close()
    writer.close()
    with pytest.raises(TraceError, match="is closed"):
        writer.append(make_step(random_ids(1, SYNTHETIC, 1)))


def test_steps_must_agree_on_weights(tmp_path: Path) -> None:
    routed = synthetic_trace(30)
    with TraceWriter(tmp_path / "t.npz", META) as writer:
        writer.append(steps_of(routed)[0])
        with pytest.raises(TraceError, match="a step holds"):
            writer.append(steps_of(routed, weights=True)[1])


def test_recording_and_closing_hold_one_block_in_memory(tmp_path: Path) -> None:
    shape = geometry([128] * 48, [8] * 48, [32] * 48)
    step = make_step(random_ids(16, shape, 1), weights=np.ones((16, 48, 8), np.float32))
    writer = TraceWriter(tmp_path / "t.npz", trace.geometry_meta(shape))
    tracemalloc.start()
    for _ in range(400):
        writer.append(step)
    written = writer.part.stat().st_size
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert written > 7_000_000
    assert peak < 1_500_000
    assert trace.load(tmp_path / "t.npz").n_tokens == 6400


def test_a_block_is_written_after_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(trace.time, "monotonic", lambda: now[0])
    writer = TraceWriter(tmp_path / "t.npz", META)
    for number, step in enumerate(steps_of(synthetic_trace(40))):
        now[0] = number * 0.3
        writer.append(step)
    assert trace.load(tmp_path / "t.npz").n_tokens > 30
    writer.close()


KILLED = """
import os, sys
sys.path[:0] = {paths}
from policy_contract import synthetic_trace
from test_trace import META, steps_of
from fate_policy.trace import TraceWriter
writer = TraceWriter(sys.argv[1], META)
for _ in range(10):
    for step in steps_of(synthetic_trace()):
        writer.append(step)
os._exit(9)
"""


def test_a_killed_recording_keeps_what_was_flushed(tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = KILLED.format(paths=[str(here), str(here.parent), str(here.parent.parent)])
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.npz")], check=False)
    assert run.returncode == 9
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz.part"]
    back = trace.load(tmp_path / "t.npz")
    assert 2000 < back.n_tokens <= 4000
    assert np.array_equal(back.experts(0, 400), synthetic_trace().experts())
    assert np.array_equal(back.experts(400, 800), synthetic_trace().experts())
    assert trace.load(tmp_path / "t.npz.part").hash() == back.hash()
    with pytest.raises(TraceError, match=r"t.npz.part holds \d+ bytes of another recording.*move it or"):
        trace.TraceWriter(tmp_path / "t.npz", synthetic_trace().meta)
    assert trace.load(tmp_path / "t.npz.part").hash() == back.hash()


def test_what_an_interrupted_recording_left_may_go_once_its_trace_holds_it(tmp_path: Path) -> None:
    path, steps = tmp_path / "t.npz", list(steps_of(synthetic_trace()))
    writer = trace.TraceWriter(path, synthetic_trace().meta)
    with pytest.raises(TraceError, match=r"another recording to .*t.npz.part is under way"):
        trace.TraceWriter(path, synthetic_trace().meta)  # which has nothing to lose yet
    for step in steps:
        writer.append(step)
    writer.flush()
    kept = trace.load(writer.part)
    kept.save(path)
    with pytest.raises(TraceError, match=r"another recording to .*t.npz.part is under way"):
        trace.check_part(path)
    content = writer.part.read_bytes()
    writer.close()
    writer.part.write_bytes(content)  # as if it had been killed
    trace.check_part(path)
    kept.slice(0, kept.n_tokens - 1).save(path)
    with pytest.raises(
        TraceError, match=r"t.npz.part holds \d+ bytes of another recording, which was killed"
    ):
        trace.check_part(path)


def recorded_part(folder: Path) -> tuple[bytes, list[int]]:
    """Return a .part of five blocks, and how long it was after each."""
    writer = TraceWriter(folder / "whole.npz", META)
    sizes = []
    for step in steps_of(synthetic_trace(60))[:5]:
        writer.append(step)
        writer.flush()
        sizes.append(writer.part.stat().st_size)
    content = writer.part.read_bytes()
    writer.close()
    return content, sizes


def test_a_torn_last_block_is_left_out(tmp_path: Path) -> None:
    content, sizes = recorded_part(tmp_path)
    tokens = np.cumsum([12, 2, 2, 2, 2])
    torn = tmp_path / "torn.npz.part"
    for size in range(sizes[2], sizes[4] + 1):
        torn.write_bytes(content[:size])
        assert trace.load(torn).n_tokens == tokens[sum(size >= s for s in sizes) - 1]
    torn.write_bytes(content[:-7] + bytes(7))
    assert trace.load(torn).n_tokens == tokens[3]


def test_damage_before_the_end_is_an_error(tmp_path: Path) -> None:
    content, sizes = recorded_part(tmp_path)
    damaged = tmp_path / "damaged.npz.part"
    damaged.write_bytes(content[: sizes[1] + 20] + b"x" + content[sizes[1] + 21 :])
    with pytest.raises(TraceError, match=f"damaged at byte {sizes[1]}"):
        trace.load(damaged)


def test_a_recording_that_never_began_says_so(tmp_path: Path) -> None:
    TraceWriter(tmp_path / "t.npz", META)
    with pytest.raises(TraceError, match="holds nothing"):
        trace.load(tmp_path / "t.npz")


def test_a_full_disk_is_one_error_and_keeps_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "t.npz"
    writer = TraceWriter(path, META)
    for step in steps_of(synthetic_trace(60)):
        writer.append(step)
    monkeypatch.setattr(trace, "_finish", full)
    with pytest.raises(TraceError, match=r"No space left on device.*is kept in .*t.npz.part"):
        writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz.part"]
    assert trace.load(path).n_tokens == 60


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_while_recording(tmp_path: Path) -> None:
    (tmp_path / "t.npz.part").symlink_to("/dev/full")
    with pytest.raises(TraceError, match="No space left on device"):
        TraceWriter(tmp_path / "t.npz", META)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be recorded"):
        TraceWriter(tmp_path / "none" / "t.npz", META)


@pytest.mark.parametrize(
    ("meta", "fault"),
    [({}, "meta lacks n_experts, k, n_slots, expert_bytes"), ({**META, "n_experts": [70000] * 3}, "uint16")],
)
def test_wrong_meta(tmp_path: Path, meta: dict[str, Any], fault: str) -> None:
    with pytest.raises(TraceError, match=fault):
        TraceWriter(tmp_path / "t.npz", meta)


IDS = np.zeros((5, 2, 1), np.uint8)
PLAIN = {"ids": IDS, "meta": '{"n_experts": 8, "k": 1}'}


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"scores": IDS}, "has no array 'ids' .it holds scores"),
        ({**PLAIN, "ids": IDS.astype(np.int64)}, "ids is int64"),
        ({**PLAIN, "ids": IDS[0]}, r"ids is uint8 of shape \(2, 1\)"),
        ({"ids": IDS}, "meta must give n_experts and k"),
        ({**PLAIN, "meta": '{"n_experts": 8, "k": 2}'}, "meta must give n_experts and k, at most 1"),
        ({**PLAIN, "meta": "{"}, "meta is not JSON"),
        ({**PLAIN, "meta": "[]"}, "meta is not a JSON object"),
        ({**PLAIN, "meta": '{"format": "fate-trace", "version": 2}'}, "version 2; this reads 'fate-trace' 1"),
        ({**PLAIN, "ids": IDS + 9}, "token 0 routes to expert 9 in layer 0, which has 8"),
        ({**PLAIN, "path": np.full((5, 2), 4)}, "path holds 4"),
        ({**PLAIN, "path": np.ones(5)}, r"path is float64 of shape \(5,\)"),
        ({**PLAIN, "step": np.array([0, 1, 1, 0, 2])}, "step goes backwards"),
        ({**PLAIN, "weights": np.ones((5, 2))}, r"weights have shape \(5, 2\)"),
        ({"ids": np.array([{}], object)}, "cannot be read"),
    ],
)
def test_files_that_are_not_traces(tmp_path: Path, arrays: dict[str, Any], fault: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    with pytest.raises(TraceError, match=fault):
        trace.load(tmp_path / "t.npz")


AHEAD_IDS = np.full((5, 2, 2, 3), -1, np.int16)
AHEAD_IDS[2, 1, 0] = 5, 4, -1
AHEAD_CHANCES = np.zeros(AHEAD_IDS.shape, np.float32)
AHEAD_CHANCES[2, 1, 0] = 0.5, 0.25, 0
AHEAD = {
    **PLAIN,
    "ahead_ids": AHEAD_IDS,
    "ahead_chances": AHEAD_CHANCES,
    "meta": '{"n_experts": 8, "k": 1, "horizons": [2, 1]}',
}


def ahead_row(ids: list[int], chances: list[float]) -> dict[str, Any]:
    changed = {"ahead_ids": AHEAD_IDS.copy(), "ahead_chances": AHEAD_CHANCES.copy()}
    changed["ahead_ids"][2, 1, 0], changed["ahead_chances"][2, 1, 0] = ids, chances
    return changed


def meta_with(horizons: str) -> dict[str, Any]:
    return {"meta": f'{{"n_experts": 8, "k": 1, "horizons": {horizons}}}'}


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        (ahead_row([5, 4, 3], [0.5, 0.5, 0.1]), None),
        (ahead_row([7, -1, -1], [2.0, 0, 0]), None),
        ({"ahead_ids": None}, r"has no array 'ahead_ids', and meta gives horizons \[2, 1\]"),
        ({"ahead_chances": None}, "has no array 'ahead_chances', and meta gives"),
        ({"ahead_ids": None, "ahead_chances": None}, "has no array 'ahead_ids', and meta gives"),
        ({"meta": PLAIN["meta"]}, r"ahead_ids is int16 of shape \(5, 2, 2, 3\).*with horizons \[\]"),
        (meta_with("[1]"), r"expected int16 \(5, 2, 1, n_ahead\), with horizons \[1\]"),
        (
            meta_with("[1, 2]"),
            r"meta gives horizons \[1, 2\]; expected whole numbers of layers, the farthest",
        ),
        (meta_with("[1, 1]"), r"meta gives horizons \[1, 1\]"),
        (meta_with("[2, 0]"), r"meta gives horizons \[2, 0\]"),
        (meta_with("[2, true]"), r"meta gives horizons \[2, True\]"),
        (meta_with('"2"'), "meta gives horizons '2'"),
        ({"ahead_ids": AHEAD_IDS.astype(np.int64)}, "ahead_ids is int64"),
        ({"ahead_ids": AHEAD_IDS[:4]}, r"expected int16 \(5, 2, 2, n_ahead\)"),
        ({"ahead_chances": AHEAD_CHANCES[..., 0]}, r"ahead_chances is float32 of shape \(5, 2, 2\)"),
        ({"ahead_chances": AHEAD_CHANCES[..., :2]}, r"ahead_chances \(5, 2, 2, 2\); expected the same"),
        (ahead_row([8, 4, -1], [0.5, 0.25, 0]), "token 2, layer 1, horizon 2, one that does not exist; .* 7"),
        (ahead_row([-2, -1, -1], [0, 0, 0]), "one that does not exist; expected -1 to 7"),
        (ahead_row([5, -1, 4], [0.5, 0, 0.25]), "one after a -1; expected the -1 last"),
        (ahead_row([5, 4, -1], [0.5, 0, 0]), "one whose chance is no number above 0"),
        (ahead_row([5, 4, -1], [np.nan, 0.1, 0]), "one whose chance is no number above 0"),
        (ahead_row([5, 4, -1], [np.inf, 0.1, 0]), "one whose chance is no number above 0"),
        (ahead_row([5, 4, -1], [0.2, 0.3, 0]), "a likelier one later; expected the likeliest first"),
        (ahead_row([5, 4, 5], [0.5, 0.4, 0.3]), "one twice; expected each once"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(
    tmp_path: Path, changed: dict[str, Any], fault: str | None
) -> None:
    arrays = {name: array for name, array in {**AHEAD, **changed}.items() if array is not None}
    np.savez(tmp_path / "t.npz", **arrays)
    if fault is None:
        assert trace.load(tmp_path / "t.npz").horizons == (2, 1)
        return
    with pytest.raises(TraceError, match=fault):
        trace.load(tmp_path / "t.npz")


def test_files_that_are_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with pytest.raises(TraceError, match="does not exist"):
        trace.load(path)
    with pytest.raises(TraceError, match="cannot be read"):
        trace.load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(TraceError, match=r"not an .npz file, or one cut short"):
        trace.load(path)
    whole = (Path(__file__).parents[1] / "data" / "gptoss20b_stem_400.npz").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="cut short"):
        trace.load(path)


def test_older_files_are_one_step_a_token(tmp_path: Path) -> None:
    ids = np.zeros((5, 2, 1), np.uint8)
    ids[3, 1] = 255
    np.savez(tmp_path / "t.npz", **{**PLAIN, "ids": ids, "prompt_start": np.array([0, 3])})
    old = trace.load(tmp_path / "t.npz")
    assert old.step.tolist() == [0, 1, 2, 3, 4]
    assert old.sequence.tolist() == [0, 0, 0, 1, 1]
    assert old.position.tolist() == [0, 1, 2, 0, 1]
    assert old.path[:, 1].tolist() == [1, 1, 1, 0, 1]
    assert old.meta["n_experts"] == [8, 8]
    assert old.meta["n_slots"] is None


def test_slice_and_hash() -> None:
    routed = real_trace()
    part = routed.slice(90, 200)
    assert part.n_tokens == 110
    assert part.prompt_start.tolist() == [7, 82]
    assert np.array_equal(part.ids, routed.ids[90:200])
    assert part.hash() != routed.hash() == routed.slice(0, 400).hash()


def test_hash_does_not_depend_on_the_dtype() -> None:
    routed = synthetic_trace(50)
    wide = np.where(routed.ids == 255, np.uint16(65535), routed.ids)
    assert replace(routed, ids=wide).hash() == routed.hash()


FOLDER = os.environ.get("FATE_TRACES")
SHARED = {
    "gptoss20b_stem": (90977, 24, 4, 272),
    "gptoss20b_safety": (28120, 24, 4, 96),
    "qwen3_30b_a3b_top6_bigmoe": (156, 48, 6, 1),
    "flame_moe_290m": (2048, 8, 6, 8),
}


@pytest.mark.skipif(FOLDER is None, reason="FATE_TRACES, the folder of real traces, is not set")
@pytest.mark.parametrize("name", SHARED)
def test_real_traces_load(name: str) -> None:
    assert FOLDER is not None
    routed = trace.load(Path(FOLDER) / f"{name}.npz")
    assert (*routed.ids.shape, len(routed.prompt_start)) == SHARED[name]
    assert routed.n_tokens == len(routed.step_bounds()) - 1


def test_checksums_are_crc32_of_the_payload(tmp_path: Path) -> None:
    content, sizes = recorded_part(tmp_path)
    tag, length, checksum = trace._HEADER.unpack_from(content, sizes[0])
    payload = content[sizes[0] + 12 : sizes[1]]
    assert (tag, length, checksum) == (b"ROWS", len(payload), zlib.crc32(payload))


def test_an_array_of_python_objects_is_refused_in_plain_words(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", ids=np.array([{}], object))
    with pytest.raises(TraceError, match=r"cannot be read: it holds Python objects, not numbers$"):
        trace.load(tmp_path / "t.npz")
