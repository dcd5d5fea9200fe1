"""`fate replay`, `fate report` and `fate plan`, without the native library."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policy_contract import real_trace, synthetic_trace, with_predictions

from fate_bind import library
from fate_bind.__main__ import main
from fate_policy import config, cost
from fate_policy.belady import Belady
from fate_policy.classifier import Classifier
from fate_policy.prefetch_rule import Prefetch
from fate_policy.recall import COLUMNS, measure
from fate_policy.replay import replay


@pytest.fixture(autouse=True)
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load() -> Any:
        pytest.fail("the native library was asked for")

    monkeypatch.setattr(library, "load", load)
    real_trace().save(tmp_path / "real.npz")
    monkeypatch.setenv("FATE_TRACES", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_replay_prints_json_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["replay", "real", "--policy", "lru,optimum", "--capacity", "25%,50%", "--format", "json"]) == 0
    )
    rows = json.loads(capsys.readouterr().out)
    assert [(row["policy"], row["capacity"]) for row in rows] == [
        ("lru", "25%"),
        ("optimum", "25%"),
        ("lru", "50%"),
        ("optimum", "50%"),
    ]
    assert [row["hit_rate"] for row in rows] == [
        replay(real_trace(), policy, n_slots=n_slots).hit_rate
        for n_slots in (8, 16)
        for policy in ("lru", "belady")
    ]


def test_replay_prints_csv_and_text_and_draws(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["replay", "real.npz", "--policy", "lru", "--capacity", "8", "--pool", "global", "--cold"]
    assert main([*command, "--admission", "optional", "--format", "csv"]) == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert (row["pool"], row["admission"]) == ("global", "optional")
    assert main([*command, "--resident", "100", "--expert-bytes", "1MB", "--plot", "rates.png"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "of_resident"
    assert line.split()[:5] == ["real", "lru", "8", "global", "forced"]
    assert Path("rates.png").read_bytes().startswith(b"\x89PNG")


def test_replay_takes_the_slots_and_the_delay_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["replay", "real", "--policy", "frequency", "--capacity", "auto", "--no-sync"]
    assert main([*command, "--refresh-tokens", "3", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    counters = replay(real_trace(), "frequency", n_slots=16, sync=False, refresh_tokens=3)
    assert (row["slots"], row["hit_rate"]) == ([16] * 24, counters.hit_rate)


def test_report_writes_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "real", "-o", "page.html"]) == 0
    assert capsys.readouterr().out == "wrote page.html\n"
    assert "Routing of real" in Path("page.html").read_text(encoding="utf-8")
    assert main(["report", "real", "-o", "page.html", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": "page.html"}


def test_report_prints_the_recall_of_recorded_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    routed = with_predictions(synthetic_trace(120))
    routed.save("told.npz")
    assert main(["report", "told", "-o", "page.html", "--budget", "75%"]) == 0
    wrote, head, *rows = capsys.readouterr().out.splitlines()
    found = measure(routed)
    assert wrote == "wrote page.html"
    assert head.split() == list(COLUMNS)
    assert [row.split()[:3] for row in rows] == [
        [str(one.horizon), str(one.used.n), f"{one.used.at_k / one.used.n:.3f}"] for one in found
    ]
    assert "<h2>Predictions inside the token</h2>" in Path("page.html").read_text(encoding="utf-8")
    assert main(["report", "told", "-o", "page.html", "--budget", "75%", "--format", "json"]) == 0
    expected = {"page": "page.html", "recall": [one.as_dict() for one in found]}
    assert json.loads(capsys.readouterr().out) == expected


def test_plan_writes_slots_and_shows_what_they_gain(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--trace", "real", "--budget", "50%", "--expert-bytes", "1000"]
    assert main([*command, "--test", "real", "-o", "plan.yaml", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    slots = config.load("plan.yaml").slots
    assert replay(real_trace(), "lru", n_slots=str(slots)).hit_rate == row["planned"] > row["equal"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["replay", "none"], "unknown trace 'none' (known: gptoss20b_stem, real)"),
        (["replay", "real", "--policy", "lruu"], "did you mean 'lru'?"),
        (["replay", "real", "--capacity", "3"], "a token uses 4 of them; the minimum is 4"),
        (["replay", "real", "--refresh-tokens", "0"], "refresh_tokens: 0 is not allowed; expected a whole"),
        (["replay", "real", "-j", "0"], "--jobs 0: expected a number of workers, or -1 for all cores"),
        (
            ["replay", "real", "--resident", "-5"],
            "--resident -5.0: expected a number of tokens/s greater than 0",
        ),
        (
            ["train", "real", "--test", "gptoss20b_stem", "--table-mb", "0.01"],
            "table_mb: 0.01 is not allowed; expected at",
        ),
        (
            ["train", "real", "--test", "gptoss20b_stem", "--estimator", "none"],
            "estimator 'none': not a name of this form",
        ),
        (["replay", "real", "--link", "0"], "--link 0.0: expected a number of GB/s greater than 0"),
        (["plan", "--trace", "real", "--budget", "8", "--expert-bytes", "1"], "budget: '8' is not allowed"),
        (
            ["report", "real", "-o", "no/page.html"],
            "report no/page.html cannot be written: there is no folder no",
        ),
        (["replay", "real", "--plot", "no/r.png"], "plot no/r.png cannot be written: there is no folder no"),
        (["train", "real", "-o", "no/m.npz"], "model no/m.npz cannot be written: there is no folder no"),
        (["train", "real", "--report", "."], "report . cannot be written: it is a folder"),
        (
            ["train", "real", "-o", "m.npz", "--report", "m.npz"],
            "--report m.npz: expected a name that no other",
        ),
        (["train", "real", "-o", "m.npz", "--report", "m.yaml"], "--report m.yaml: expected a name that no"),
        (["train", "real", "-o", "m.txt"], "--output m.txt: expected a name that ends in .npz"),
        (["train", "real", "-o", "real.npz"], "model real.npz would overwrite what it is made of"),
        (
            ["train", "real", "--test", "real", "-o", "m.npz"],
            "--test real: it is what the model is fitted on",
        ),
        (["report", "real", "-o", "real.npz"], "report real.npz would overwrite what it is made of"),
        (["report", "none.npz"], "trace none.npz does not exist"),
        (
            ["plan", "--trace", "real", "--budget", "50%", "-o", "real.npz"],
            "plan real.npz would overwrite what it is made of",
        ),
        (
            ["plan", "--trace", "real", "--budget", "8", "-o", "no/p"],
            "plan no/p cannot be written: there is no",
        ),
    ],
)
def test_an_error_is_one_line(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) == 1
    assert message in capsys.readouterr().err


def test_a_file_of_the_users_own_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("m.yaml").write_text("policy: lru\n", encoding="utf-8")
    assert main(["train", "real", "--test", "gptoss20b_stem", "-o", "m.npz"]) == 1
    assert "configuration m.yaml would be overwritten" in capsys.readouterr().err
    assert Path("m.yaml").read_text(encoding="utf-8") == "policy: lru\n"
    assert not Path("m.npz").exists()


def test_what_cannot_be_written_is_said_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    name = "m" * 300 + ".npz"  # longer than file systems take
    assert main(["train", "real", "--test", "gptoss20b_stem", "-o", name]) == 1
    assert f"model {name} cannot be written: " in capsys.readouterr().err


def test_what_the_lab_needs_is_asked_for_only_there() -> None:
    """`import fate_policy` works without numba, and `fate replay` names what to install."""
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "from fate_bind.__main__ import main\n"
        "sys.exit(main(['replay', 'real']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "fate: error: replay in compiled loops needs numba: run `pip install 'fate[lab]'`\n"
    )


def save_model() -> None:
    """Save a model of the trace's shape that has seen no token."""
    empty = [], np.zeros((0, 2), np.float32), np.zeros((0, 2, 1), np.float16)
    replace(cost.untrained([32] * 24, [4] * 24), tables=(empty, empty)).save("model.npz")


def test_replay_prefetches_what_a_policy_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    save_model()
    command = ["replay", "real", "--policy", "classifier:model=model.npz+evict_by=lru", "--capacity", "8"]
    command += ["--prefetch", "token", "--prefetch-threshold", "0.4", "--prefetch-experts", "2"]
    assert main([*command, "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    policy = Classifier(model="model.npz", evict_by="lru")
    counters = replay(real_trace(), policy, n_slots=8, prefetch=Prefetch(0.4, 2))
    totals = counters.totals()
    assert row["hit_rate"] == counters.hit_rate
    assert row["prefetched_per_token"] == totals["prefetches"] / totals["tokens"] > 0
    assert row["useful"] == totals["prefetch_useful"] / totals["prefetches"]
    assert main(command) == 0
    assert capsys.readouterr().out.split("\n")[0].split()[-2:] == ["prefetched_per_token", "useful"]


def test_the_optimum_goes_without_prefetch(capsys: pytest.CaptureFixture[str]) -> None:
    """It is among the policies by default and in the plot; where nothing comes in, no share of it is used."""
    with_predictions(real_trace(), (2, 1), 8).save("told.npz")
    command = ["replay", "told", "--policy", "lru,optimum", "--capacity", "4,8", "--prefetch", "layer"]
    assert main([*command, "--format", "json", "--plot", "plot.png"]) == 0
    few, bound, more, _ = json.loads(capsys.readouterr().out)
    assert few["prefetched_per_token"] == 0
    assert few["useful"] is None
    assert more["useful"] > 0
    assert bound["prefetched_per_token"] is bound["useful"] is None
    without = replay(real_trace(), Belady(), n_slots=4)
    assert bound["hit_rate"] == without.hit_rate
    assert Path("plot.png").exists()
    assert main(command) == 0
    assert capsys.readouterr().out.split("\n")[1].split()[-2:] == ["0.000", "-"]


def test_replay_prefetches_what_routers_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Of any policy; and both, in which the policy predicts too, of one that can."""
    save_model()
    routed = with_predictions(real_trace(), (2, 1), 8)
    routed.save("told.npz")
    classifier = Classifier(model="model.npz")
    for name, policy, kind in (("lru", "lru", "layer"), ("classifier:model=model.npz", classifier, "both")):
        command = ["replay", "told", "--policy", name, "--capacity", "8", "--prefetch", kind]
        assert (
            main([*command, "--prefetch-threshold", "0.4", "--prefetch-experts", "2", "--format", "json"])
            == 0
        )
        (row,) = json.loads(capsys.readouterr().out)
        counters = replay(routed, policy, n_slots=8, prefetch=Prefetch(0.4, 2, kind))
        assert row["hit_rate"] == counters.hit_rate
        totals = counters.totals()
        assert row["prefetched_per_token"] == totals["prefetches"] / totals["tokens"] > 0


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        (["--policy", "lru"], "prefetch: policy lru has no predict()"),
        (
            ["--prefetch", "layer"],
            "prefetch: layer brings in what routers told of the layers ahead, and the tra",
        ),
        (["--cold"], "prefetch: is replayed as the engine runs only"),
        (["--no-sync"], "prefetch: can be replayed in table mode with sync"),
        (["--prefetch-threshold", "2"], "prefetch_threshold: 2.0 is not allowed"),
    ],
)
def test_replay_says_where_prefetch_cannot_be(
    args: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model()
    command = ["replay", "real", "--policy", "classifier:model=model.npz", "--capacity", "8"]
    assert main([*command, "--prefetch", "token", *args]) == 1
    assert fault in capsys.readouterr().err
