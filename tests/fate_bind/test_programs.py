from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fate_bind import library, modelfile, options, programs, stats
from fate_bind.__main__ import main
from fate_bind.errors import UsageError
from fate_bind.library import Library
from fate_policy import trace
from fate_policy.base import Geometry, History, Policy, Step
from fate_policy.counters import Counters
from fate_policy.trace import load

KEYS = {
    "engaged", "reason", "policy", "mode", "layers", "slots", "routed", "hits", "misses", "staged",
    "bypassed", "fills", "seed_fills", "evictions", "bytes", "all_resident", "tokens", "policy_seconds",
    "per_layer",
}  # fmt: skip


class OnlyVictims(Policy):
    """Has no scores."""

    def victims(self, layer: int, n: int, pinned: NDArray[np.bool_], history: History) -> list[int]:
        return []


class Failing(Policy):
    """Fail at the third step."""

    def start(self, geometry: Geometry) -> None:
        self.n = 0

    def observe(self, step: Step) -> None:
        self.n += 1
        if self.n == 3:
            raise ZeroDivisionError("in observe")


OWN = f"{__name__}:Failing"


@pytest.fixture
def run(fake: Library, model: Path, capfd: pytest.CaptureFixture[str]):
    """Run `fate run -m MODEL ...`; return exit code, stdout and stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        code = main(["run", "-m", str(model), *args])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def test_our_flags_are_taken_out_and_the_rest_stays_in_order() -> None:
    chosen, rest = options.take(
        [
            "-m",
            "x",
            "--fate-policy=random",
            "-n",
            "3",
            "--fate-slots",
            "25%",
            "--fate-require",
            "--fate-sync=false",
            "--fate-prefetch",
            "token",
            "--fate-prefetch-threshold=0.25",
            "--fate-prefetch-experts=4",
        ]
    )
    assert rest == ["-m", "x", "-n", "3"]
    assert (chosen.policy, chosen.slots, chosen.require, chosen.sync) == ("random", "25%", True, False)
    assert (chosen.prefetch, chosen.prefetch_threshold, chosen.prefetch_experts) == ("token", 0.25, 4)
    assert options.take([])[0] == options.Options()
    assert options.take(["--fate-prefetch-threshold", "auto"])[0].prefetch_threshold == "auto"


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--fate-polcy", "lru"], "unknown flag --fate-polcy; did you mean --fate-policy?"),
        (["--fate-xyzzy"], "known: --fate-policy"),
        (["--fate-slots"], "--fate-slots needs a value: N|N%"),
        (["--fate-slots="], "--fate-slots is empty"),
        (["--fate-sync=maybe"], "expected --fate-sync, --fate-sync=true or --fate-sync=false"),
        (
            ["--fate-prefetch-threshold=x"],
            "--fate-prefetch-threshold x: expected auto, or a number above 0, up to 1",
        ),
        (["--fate-prefetch-experts=2.5"], "--fate-prefetch-experts 2.5: expected a whole number, 1 to 16"),
        (["--fate-stats", "xml"], "--fate-stats xml: expected text"),
        (["--fate-stats", "json:"], "--fate-stats json:: expected text"),
        (["--fate-record", "trace.txt"], r"a name that ends in \.npz"),
        (["--fate-record", "no/such/trace.npz"], "there is no directory no/such"),
        (["--fate-record", "."], "is a directory"),
    ],
)
def test_a_wrong_flag_says_what_is_expected(args: list[str], what: str) -> None:
    with pytest.raises(UsageError, match=what.replace("|", r"\|").replace("?", r"\?")):
        options.take(args)


def test_a_program_gets_its_flags_and_the_placement(run, model: Path) -> None:
    code, out, err = run("-n", "3", "--fate-slots", "4")
    assert code == 0
    assert out == f"completion: --no-repack -fit off -m {model} -n 3\n"
    assert err.startswith("fate: engaged in 2 of 2 MoE layers, policy lru, table mode\n")
    assert "  slots         4 of 8 experts in each layer, a pool of 0.0 MiB\n" in err
    assert "8 tokens in " in err


def test_run_without_a_model_tells_a_story(fake: Library, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-n", "5"]) == 0
    out = capfd.readouterr().out
    assert f"-m {modelfile.EMBEDDED}" in out
    assert "-p Once upon a time" in out
    assert "-n 200" not in out
    assert modelfile.check(modelfile.EMBEDDED).stat().st_size == 20324864


def test_statistics_as_json(run, tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    code, _, err = run("--fate-stats", f"json:{path}", "--fate-policy", "frequency")
    assert (code, err) == (0, "")
    numbers = json.loads(path.read_text())
    assert numbers.keys() >= KEYS
    assert numbers["engaged"] is True
    assert numbers["policy"] == "frequency"
    assert numbers["routed"] == numbers["hits"] + numbers["misses"] == 8 * 2 * 2
    assert len(numbers["per_layer"]["hits"]) == numbers["layers"] == 2
    assert numbers["policy_seconds"] > 0
    _, out, _ = run("--fate-stats", "json")
    assert json.loads(out.splitlines()[-1]).keys() == numbers.keys()


def refused(code: int, err: str, name: str, path: object, expected: int = 2) -> bool:
    told = f"fate: error: --fate-{name} {path} would overwrite what the run reads; give another name\n"
    return (code, err) == (expected, told)


def test_what_the_run_reads_is_not_written(
    run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, policy, profile = tmp_path / "prompt.txt", tmp_path / "own.yaml", tmp_path / "profile.npz"
    prompt.write_text("Once")
    profile.write_bytes(b"a profile")
    policy.write_text(f"policy: static\nstatic:\n  profile: {profile}\n")
    flags = ["-f", str(prompt), "--fate-policy", str(policy)]
    assert run("-p", "x" * 5000)[0] == 0
    for read in (model, prompt, policy, profile, modelfile.EMBEDDED):
        before = read.read_bytes()
        code, _, err = run(*flags, "--fate-stats", f"json:{read}")
        assert refused(code, err, "stats", read)
        assert read.read_bytes() == before
    code, _, err = run(*flags, "--fate-record", str(profile))
    assert refused(code, err, "record", profile)
    (tmp_path / "mine.py").write_text("from fate_policy.lru import LRU\n")
    monkeypatch.chdir(tmp_path)
    code, _, err = run("--fate-policy", "mine:LRU", "--fate-stats", "json:mine.py")
    assert refused(code, err, "stats", "mine.py")


def test_what_one_thing_is_written_to_another_is_not(run, tmp_path: Path) -> None:
    both = str(tmp_path / "both.npz")
    code, _, err = run("--fate-record", both, "--fate-stats", f"json:{both}")
    assert code == 2
    assert err == f"fate: error: --fate-record and --fate-stats both name {both}; give another name\n"


def test_models_that_are_named_otherwise_are_read_too(
    fake: Library,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(model.read_bytes())
    parts = [tmp_path / f"split-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in parts:
        part.write_bytes(model.read_bytes())
    for argv, read in (
        (["bench", "-m", f"{model},{other}"], other),
        (["run", "-m", str(parts[0])], parts[1]),
        (["verify", "-m", str(other)], other),
        (["verify"], modelfile.EMBEDDED),
    ):
        before = read.read_bytes()
        code = main([*argv, "--fate-stats", f"json:{read}"])
        expected = 3 if argv[0] == "verify" else 2  # which has codes of its own
        assert refused(code, capfd.readouterr().err, "stats", read, expected)
        assert read.read_bytes() == before
    monkeypatch.setenv("LLAMA_ARG_MODEL", str(other))
    code = main(["run", "--fate-stats", f"json:{other}"])
    assert refused(code, capfd.readouterr().err, "stats", other)


def test_vram_without_a_gpu_is_said_to_have_no_effect(run) -> None:
    told = "fate: vram has no effect: no GPU was found\n"
    assert run("--fate-vram", "8GiB")[2].startswith(told)
    assert run("--fate-vram-margin", "2GiB")[2].startswith(told)
    assert told not in run()[2]


def test_statistics_that_cannot_be_written_are_one_line(run) -> None:
    """A full disk once ended in a traceback."""
    code, _, err = run("--fate-stats", "json:/dev/full")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("fate: error: --fate-stats: /dev/full cannot be written: ")


@pytest.mark.parametrize("flags", [[], ["--interrupt"]])
def test_a_failed_recording_is_not_called_recorded(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trace, "_finish", full)
    code, _, err = run("--fate-record", str(tmp_path / "trace.npz"), *flags)
    assert code == (0 if flags else 1)  # the program would have ended itself
    assert "No space left on device; what was recorded is kept in" in err
    assert "  recorded " not in err
    assert "tokens in " in err
    assert "Traceback" not in err
    assert load(tmp_path / "trace.npz").n_tokens == (5 if flags else 8)


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        ("belady", "policy belady knows the future: it works in replay only"),
        (f"{__name__}:OnlyVictims", "use --fate-mode callback"),
        ("static", "it goes into a YAML file with `static: {profile: FILE}`, which --fate-policy takes"),
    ],
)
def test_a_policy_that_cannot_run_is_refused_before_a_model_is_loaded(run, policy: str, what: str) -> None:
    code, out, err = run("--fate-policy", policy)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert what in err


def test_serve_says_that_its_page_is_missing(
    fake: Library, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def told(*flags: str) -> bool:
        assert main(["serve", "-m", str(model), *flags]) == 0
        return "fate: the web page is not in this build" in capfd.readouterr().err

    monkeypatch.setattr(library, "has_page", lambda: False)
    assert told()
    assert main(["serve", "-m", str(model)]) == 0
    err = capfd.readouterr().err
    assert err.splitlines()[0].endswith("run `python build.py build --ui` (needs node and npm)")
    assert not any(told(*flags) for flags in (["--no-ui"], ["--no-webui"], ["--path", "public"]))
    with monkeypatch.context() as patch:
        patch.setenv("LLAMA_ARG_UI", "0")
        assert not told()
    monkeypatch.setattr(library, "has_page", lambda: True)
    assert not told()


def test_the_warm_up_before_a_reset_leaves_no_trace(run, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    code, _, err = run("--tokens", "8", "--reset", "--fate-record", str(path))
    assert code == 0
    assert f"  recorded      {path}\n" in err
    assert load(path).token_id.tolist() == [4, 5, 6, 7]
    assert "4 tokens in " in err


def test_an_interrupt_saves_the_record_and_says_how_far_it_got(run, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    before = signal.getsignal(signal.SIGINT)
    _, _, err = run("--tokens", "8", "--interrupt", "--fate-record", str(path))
    assert "5 tokens in " in err
    assert load(path).token_id.tolist() == [0, 1, 2, 3, 4]
    assert not list(tmp_path.glob("*.part"))
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_of_a_conversation_goes_on_recording(run, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    run("-cnv", "--tokens", "8", "--interrupt", "--fate-record", str(path))
    assert load(path).token_id.tolist() == list(range(8))


def test_a_failing_policy_is_told_at_once_and_shown_at_the_end(run) -> None:
    code, _, err = run("--fate-policy", OWN)
    assert code == 1
    assert err.startswith("\nfate: error: ZeroDivisionError: in observe; the run goes on without it\n")
    assert "  policy failed ZeroDivisionError: in observe; the run went on as lru\n" in err
    assert err.rstrip().endswith("ZeroDivisionError: in observe")
    assert "in observe\n" in err


def test_a_refused_context_is_one_error(run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--fate-require", "--fate-slots", "8")[::2] == (
        1,
        "fate: error: not engaged because all experts resident\n",
    )
    code, _, err = run("--fate-slots", "8")
    assert (code, err) == (0, "fate: not engaged because all experts resident\n")
    monkeypatch.setenv("FAKE_REFUSE", "slots: 1 is fewer than 2")
    assert run("--fate-slots", "1")[::2] == (1, "fate: error: slots: 1 is fewer than 2\n")


def test_the_exit_code_of_the_program_is_kept(run) -> None:
    code, _, err = run("--exit", "3")
    assert code == 3
    assert err.endswith("fate: error: llama.cpp's completion ended with code 3; its messages are above\n")


def test_without_a_pool_there_is_nothing_to_record(run, tmp_path: Path) -> None:
    assert run("--fate-mode", "off")[::2] == (0, "fate: not engaged because the mode is off\n")
    code, _, err = run("--fate-mode", "off", "--fate-record", str(tmp_path / "trace.npz"))
    assert code == 1
    assert err == "fate: error: the mode is off, so there is nothing to record or to require\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "does not exist"),
        ("policy: [", "is not YAML"),
        ("policy: !!python/object/apply:os.system [id]", "no tags or objects"),
        ("polcy: lru", "did you mean 'policy'?"),
        ("slots: 0", "slots: 0 is not allowed"),
    ],
)
def test_a_bad_policy_file_is_one_line(run, tmp_path: Path, content: str | None, what: str) -> None:
    path = tmp_path / "policy.yaml"
    if content is not None:
        path.write_text(content)
    code, out, err = run("--fate-policy", str(path))
    assert (code, out) == (1, "")
    assert err.startswith("fate: error: ")
    assert what in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code", "what"),
    [
        (["rum"], 2, "unknown command 'rum'; did you mean 'run'?"),
        (["serve"], 2, "serve needs a model: give -m FILE.gguf"),
        (["run", "-m"], 2, "-m needs a value"),
        (["run", "-m", "none.gguf"], 1, "model none.gguf does not exist"),
        (["bench", "-m", ".,none.gguf"], 1, "model . is a directory"),
        (["policies", "--foo"], 2, "policies --foo: expected no arguments"),
        (["verify", "-n", "0"], 3, "-n 0: expected the number of tokens to generate, 1 or more"),
        (["verify", "--predict", "-1"], 3, "--predict -1: expected the number"),
        (["verify", "-n"], 3, "-n : expected the number"),
        (["verify", "--version"], 3, "--version makes llama.cpp print something and end the process"),
        (["verify", "--list-devices"], 3, "--list-devices makes"),
        (["verify", "-b", "0"], 3, "-b 0: expected a number of tokens, 1 or more"),
        (["run", "--batch-size", "00"], 2, "--batch-size 00: expected a number of tokens, 1 or more"),
        (["bench", "-b", "64,0"], 2, "-b 64,0: expected a number of tokens, 1 or more"),
        (["verify", "-cl"], 3, "-cl makes"),
        (["verify", "--cache-list"], 3, "--cache-list makes"),
        (["verify", "--completion-bash"], 3, "--completion-bash makes"),
        (["verify", "-t", "1", "-h"], 3, "-h makes"),
        (["verify", "-t", "1", "--help"], 3, "--help makes"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    fake: Library, capsys: pytest.CaptureFixture[str], args: list[str], code: int, what: str
) -> None:
    assert main(args) == code
    err = capsys.readouterr().err
    assert what in err
    assert err.count("\n") == 1


def test_downloads_need_openssl(
    fake: Library, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "has_https", lambda: False)
    assert main(["run", "-hf", "some/model"]) == 2
    assert "built without OpenSSL" in capsys.readouterr().err
    assert main(["run", "-hf", "some/model", "--offline"]) == 0


def test_help_shows_our_flags_first(fake: Library, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    out = capfd.readouterr().out
    assert out.index("--fate-policy") < out.index("bench: --help")


def test_the_list_of_commands_and_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in (*programs.PROGRAMS, "verify", "policies"))
    assert main(["policies"]) == 0
    assert "half_life_tokens=16, lfru=false" in capsys.readouterr().out


def test_version_names_the_build(fake: Library, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert ", build fake\n" in capsys.readouterr().out


def test_engines_of_the_same_shape_are_added_up() -> None:
    def report(slots: int, tokens: int, engaged: bool = True) -> stats.Report:
        def column(value: int) -> NDArray[np.int32]:
            return np.full(1, value, np.int32)

        geometry = Geometry(column(8), column(2), column(slots), column(100).astype(np.int64))
        counters = Counters.zeros(1)
        counters.routed[0] = counters.tokens = tokens
        return stats.Report(engaged, "", "m", "lru", "table", geometry, counters, 1, 0.5, 1.0)

    merged = stats.merge([report(0, 0, engaged=False), report(4, 3), report(5, 1), report(4, 4)])
    assert [(one.engaged, one.counters.tokens, one.seconds) for one in merged] == [
        (True, 7, 2.0),
        (True, 1, 1.0),
        (False, 0, 1.0),
    ]
    assert stats.as_dict(merged[0])["all_resident"] is None


def test_what_is_slower_on_a_gpu_is_said() -> None:
    geometry = Geometry(*(np.full(1, value, np.int32) for value in (8, 2, 4)), np.full(1, 100, np.int64))
    plain = stats.Report(True, "", "m", "lru", "callback", geometry, Counters.zeros(1), 1, 0.0, 1.0)
    assert "asked" not in stats.summary(plain)
    assert "ring" not in stats.summary(plain)
    slow = replace(plain, asks=4, timeouts=1, ask_seconds=2e-4, bounced="the page-lock limit is 8 MiB")
    both = stats.merge([slow, slow])[0]
    told = stats.summary(both)
    assert "asked         8 times, 50.0 us each; 2 not answered in time, lru decided" in told
    assert "slower        experts go through a ring of pinned memory: the page-lock limit is 8 MiB" in told
    assert {"asks": 8, "timeouts": 2, "bounced": slow.bounced}.items() <= stats.as_dict(both).items()


def test_what_prefetch_did_is_said_only_where_it_did_something() -> None:
    geometry = Geometry(*(np.full(1, value, np.int32) for value in (8, 2, 4)), np.full(1, 100, np.int64))
    counters = Counters.zeros(1)
    idle = stats.Report(True, "", "m", "own", "table", geometry, counters, 1, 0.0, 1.0)
    assert "prefetch" not in stats.summary(idle)
    counters = Counters.zeros(1)
    for name, value in {
        "prefetches": 8,
        "prefetch_useful": 4,
        "prefetch_late": 1,
        "prefetch_wasted": 2,
    }.items():
        getattr(counters, name)[:] = value
    counters.prefetch_waited_ns[:] = 1_500_000
    told = stats.summary(replace(idle, counters=counters))
    assert "  prefetched    8: 4 useful (50.0 %), 1 late (waited 1.5 ms), 2 wasted; 0 cancelled\n" in told


def test_a_policy_that_predicts_nothing_is_refused_before_a_model_loads(run) -> None:
    code, _, err = run("--fate-prefetch", "token")
    assert code == 1
    assert (
        "prefetch: token needs a policy that predicts, and policy auto found no fitted model; fit one" in err
    )
    code, _, err = run("--fate-prefetch", "token", "--fate-policy", "lru")
    assert code == 1
    assert "fate: error: prefetch: policy lru has no predict(); use the classifier or another" in err
