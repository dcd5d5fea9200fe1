from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fate_bind import modelfile, placement
from fate_bind.errors import EngineError, PolicyConfigError, TraceError, UsageError
from fate_bind.library import Library
from fate_bind.modelfile import EMBEDDED
from fate_bind.session import Session, resolve_config, trained_for
from fate_bind.verify import verify
from fate_policy import trace
from fate_policy.base import History, Policy
from fate_policy.config import load
from fate_policy.frequency import Frequency


def test_logits_splits_into_batches(fake: Library, model: Path) -> None:
    tokens = np.arange(3 * 8 + 5) % 16
    with Session(model) as session:
        logits = session.logits(tokens)
        assert session.n_batch == 8
    assert logits.shape == (29, 16)
    assert logits.dtype == np.float32
    assert logits.argmax(axis=1).tolist() == ((tokens + 1) % 16).tolist()


def test_decode_returns_the_wanted_rows(fake: Library, model: Path) -> None:
    with Session(model) as session:
        rows = session.decode(
            [4, 5, 6], positions=[0, 1, 2], sequences=[0, 0, 1], outputs=[False, True, True]
        )
        assert rows.argmax(axis=1).tolist() == [6, 7]
        with pytest.raises(ValueError, match="positions of shape"):
            session.decode([4, 5], positions=[0])
        with pytest.raises(EngineError, match="batch of 9 tokens: expected 1 to n_batch = 8"):
            session.decode(list(range(9)))


def test_generate_yields_whole_characters_until_the_end(fake: Library, model: Path) -> None:
    with Session(model) as session:
        assert list(session.generate([0], 3)) == ["é", "d"]  # tokens 1 and 2 are one character
        assert "".join(session.generate([12], 64)) == "nop"  # token 0 ends a generation
        assert list(session.generate([15, 0], 1)) == ["�"]  # half a character at the end
        assert list(session.generate("abc", 0)) == []


def test_text_and_tokens(fake: Library, model: Path) -> None:
    with Session(model) as session:
        assert session.tokenize("a" * 1000).tolist() == [1] * 1000
        assert session.detokenize([1, 2, 3]) == "éd"
        with pytest.raises(EngineError, match="no tokenizer"):
            session.tokenize("?")


def test_state_comes_back(fake: Library, model: Path) -> None:
    with Session(model) as session, session.fork(fate=False) as other:
        session.logits([1, 2, 3])
        other.restore(session.state())
        assert other.state() == session.state()
        session.shift(0, 2)
        assert other.state() != session.state()
        session.clear()
        with pytest.raises(EngineError, match="are not a state"):
            other.restore(b"x")


def test_a_closed_session_answers_about_the_past_only(fake: Library, model: Path) -> None:
    with Session(model, record=True) as session:
        session.logits([1, 2, 3])
        alive = session.stats()
    session.close()
    done = session.stats()
    assert {**alive, "seconds": 0} == {**done, "seconds": 0}
    assert session.record().token_id.tolist() == [1, 2, 3]
    calls: list[Any] = [
        session.check,
        session.clear,
        session.flag_prompt,
        session.fork,
        session.state,
        lambda: session.fork(fate=False),
        lambda: session.restore(b""),
        lambda: session.shift(0, 1),
        lambda: session.logits([1]),
        lambda: session.logits([]),
        lambda: session.decode([1]),
        lambda: session.decode([]),
        lambda: session.tokenize("a"),
        lambda: session.tokenize(""),
        lambda: session.piece(1),
        lambda: session.detokenize([]),
        lambda: session.generate([1]),
    ]
    for call in calls:
        with pytest.raises(EngineError, match=r"^the session is closed$"):
            call()


@pytest.mark.parametrize(
    "tokens", [[[1, 2], [3, 4]], [1.0, 2.0], [1, 2.5], 3, [True, False], ["a"], [2**31], [-(2**31) - 1]]
)
def test_tokens_are_whole_numbers_in_one_dimension(fake: Library, model: Path, tokens: Any) -> None:
    """Rows of a batch and floats were once cut to fit."""
    with Session(model) as session:
        for call in (session.logits, session.decode, session.detokenize, lambda t: list(session.generate(t))):
            with pytest.raises(ValueError, match=r"^tokens .*; expected"):
                call(tokens)
        with pytest.raises(ValueError, match=r"^positions are float64 of shape \(1,\); expected whole"):
            session.decode([1], positions=[0.5])
        with pytest.raises(ValueError, match=r"^sequences"):
            session.decode([1], sequences=[[0]])
        assert session.logits(np.array([1, 2], np.uint8)).shape == (2, 16)
        assert session.logits([]).shape == (0, 16)


@pytest.mark.parametrize("slots", ["4GiB", "1.5G", "50%", "auto", [4, 4], 4])
def test_every_kind_of_slots_reaches_the_library(fake: Library, model: Path, slots: Any) -> None:
    """The bytes of a pool were once also put into a list of int32."""
    with Session(model, slots=slots) as session:
        assert session.stats()["slots"] == 8


@pytest.mark.parametrize("slots", [2**40, 10**20, "99999999999999999999", [4, 2**40]])
def test_absurd_slots_are_one_clear_error(slots: Any) -> None:
    with pytest.raises(PolicyConfigError, match=r"^slots: .* expected a count of 1 to 2147483647"):
        Session("not even looked at", slots=slots)


@pytest.mark.parametrize("given", [{"require": True}, {"record": True}, {"record": "trace.npz"}])
def test_without_a_pool_there_is_nothing_to_record(fake: Library, model: Path, given: Any) -> None:
    with pytest.raises(PolicyConfigError, match="the mode is off, so there is nothing to record or to req"):
        Session(model, mode="off", **given)
    with pytest.raises(PolicyConfigError, match="fate is False, so there is nothing to record or to req"):
        Session(model, fate=False, **given)


def test_what_a_killed_recording_left_is_not_lost(fake: Library, model: Path, tmp_path: Path) -> None:
    part = tmp_path / "t.npz.part"
    part.write_bytes(b"FATE-TRACE-PART\nand more")
    with pytest.raises(TraceError, match="bytes of another recording, which was killed; `fate report"):
        Session(tmp_path / "no model is asked for", record=tmp_path / "t.npz")
    part.write_bytes(b"FATE-TRACE-PART\n")  # nothing was recorded
    with Session(model, record=tmp_path / "t.npz") as session:
        session.logits([1])
    assert [path.name for path in tmp_path.glob("t.npz*")] == ["t.npz"]


@pytest.mark.parametrize(
    ("name", "files", "found"),
    [
        ("m.Q4.gguf", [], "m.Q4.fate.npz"),
        ("m-00001-of-00003.gguf", [], "m.fate.npz"),
        ("m-00001-of-00003.gguf", ["m.fate.npz", "m-00001-of-00003.fate.npz"], "m.fate.npz"),
        ("m-00001-of-00003.gguf", ["m-00001-of-00003.fate.npz"], "m-00001-of-00003.fate.npz"),
    ],
)
def test_a_classifier_is_found_by_the_models_name(
    name: str, files: list[str], found: str, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).touch()
    assert trained_for(tmp_path / name) == tmp_path / found


def test_a_record_that_cannot_be_written_is_refused_at_once(fake: Library, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "t.npz", tmp_path / "file" / "t.npz", tmp_path):
        with pytest.raises(TraceError, match="cannot be recorded"):
            Session("not even looked at", record=path)


@pytest.mark.parametrize(
    ("policy", "what"),
    [
        ("belady", "policy belady knows the future: it works in replay only"),
        (f"{__name__}:OnlyVictims", "names victims but has no scores.*use --fate-mode callback"),
        ("static", r"static: \{profile: FILE\}"),
    ],
)
def test_a_policy_that_cannot_run_is_refused_before_a_model_is_loaded(
    fake: Library, policy: str, what: str
) -> None:
    with pytest.raises(PolicyConfigError, match=what):
        Session("not even looked at", policy=policy)
    with pytest.raises(PolicyConfigError, match=what):
        verify("not even looked at", policy=policy)


class OnlyVictims(Policy):
    """Has no scores."""

    def victims(self, layer: int, n: int, pinned: Any, history: History) -> Any:
        return []


@pytest.mark.parametrize(
    "flag",
    ["-h", "--help", "--usage", "--version", "-cl", "--cache-list", "--list_devices", "--completion-bash"],
)
def test_flags_that_would_end_the_process_are_refused(fake: Library, flag: str) -> None:
    with pytest.raises(UsageError, match=f"^{flag} makes llama.cpp print something and end the process"):
        Session(args=[flag])


def test_a_session_left_open_at_the_end_of_python_is_closed_quietly(script: Any, model: Path) -> None:
    """The temporary recording was once removed first, and closing the session then complained."""
    kept = model.with_name("kept.npz")
    done = script(
        f"""
        from fate_bind.session import Session
        kept = Session({str(model)!r}, record={str(kept)!r})
        left = Session({str(model)!r}, record=True)
        for session in (kept, left):
            session.logits([1, 2, 3])
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert trace.load(kept).token_id.tolist() == [1, 2, 3]


def test_without_fate_there_are_no_numbers(fake: Library, model: Path) -> None:
    with Session(model, fate=False) as session:
        session.logits([1, 2])
        assert session.stats()["engaged"] is False
        assert session.stats()["reason"] == "the session was opened with fate=False"
        session.check()
    with Session(model, mode="off") as session:
        assert session.stats()["reason"] == "the mode is off"


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda folder: folder, "is a directory"),
        (lambda folder: folder / "none.gguf", "does not exist"),
        (lambda folder: _write(folder, b"GGML" + bytes(20)), "is not a GGUF file"),
        (lambda folder: _write(folder, b"GGUF" + (3).to_bytes(4, "little")), "its header does not end"),
        (lambda folder: _write(folder, _header(offset=0, n_values=1 << 62)), "its header does not end"),
        (lambda folder: _write(folder, _header(offset=1 << 20)), "is cut short: .* end at byte"),
        (lambda folder: _write(folder, _header(offset=0) + bytes(44)), "207 bytes, but .* end at byte 208"),
        (
            lambda folder: _write(folder, EMBEDDED.read_bytes()[:-1]),
            "20324863 bytes, but .* byte 20324864",
        ),
    ],
)
def test_a_bad_file_is_refused_before_llama_cpp_sees_it(
    fake: Library, tmp_path: Path, make: Any, what: str
) -> None:
    with pytest.raises(EngineError, match=what):
        Session(make(tmp_path))


@pytest.mark.parametrize("args", [["-m"], ["--model"]])
def test_a_model_among_the_flags_is_checked_too(fake: Library, tmp_path: Path, args: list[str]) -> None:
    path = _write(tmp_path, _header(offset=0))
    with pytest.raises(EngineError, match="is cut short"):
        Session(args=[*args, str(path)])


def test_the_model_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_ARG_MODEL", raising=False)
    assert modelfile.meant("one.gguf", ["-m", "two.gguf"]) == Path("one.gguf")
    assert modelfile.meant(None, ["-m", "two.gguf"]) == Path("two.gguf")
    assert modelfile.meant(None, ["-n", "3"]) == EMBEDDED
    assert modelfile.meant(None, ["-hf", "someone/model"]) is None


def test_the_sizes_of_tensor_types_are_those_of_the_format() -> None:
    never_in_files = ("Q8_1", "Q8_K")
    known = {
        int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items() if kind.name not in never_in_files
    }
    assert {kind: modelfile.TENSOR_SIZES.get(kind) for kind in known} == known


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "bad.gguf"
    path.write_bytes(data)
    return path


def _header(offset: int, n_values: int = 3) -> bytes:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    def string(text: bytes) -> bytes:
        return number(len(text), 8) + text

    keys = string(b"a") + number(8, 4) + string(b"text")
    keys += string(b"b") + number(9, 4) + number(8, 4) + number(2, 8) + string(b"x") + string(b"yz")
    keys += string(b"c") + number(9, 4) + number(5, 4) + number(n_values, 8) + bytes(12)
    tensor = string(b"w") + number(1, 4) + number(4, 8) + number(0, 4) + number(offset, 8)
    return b"GGUF" + number(3, 4) + number(1, 8) + number(3, 8) + keys + tensor


def test_a_flag_that_llama_cpp_refuses_is_an_error(fake: Library, model: Path) -> None:
    with pytest.raises(EngineError, match="flag --bogus is unknown"):
        Session(model, ["--bogus"])


def test_what_is_given_wins_over_the_configuration() -> None:
    config, instance = resolve_config("frequency", slots="25%", sync=True)
    assert (config.policy, str(config.slots), config.sync, config.mode) == ("frequency", "25%", True, "table")
    assert instance is None
    config, _ = resolve_config(load("random", {"mode": "callback", "random": {"seed": 3}}), slots=8)
    assert (config.policy, config.params, config.mode, str(config.slots)) == (
        "random",
        {"seed": 3},
        "callback",
        "8",
    )
    policy = Frequency()
    config, instance = resolve_config(policy)
    assert (config.policy, instance) == ("frequency", policy)
    with pytest.raises(PolicyConfigError, match="slots"):
        resolve_config("lru", slots=0)


@pytest.mark.parametrize(
    ("program", "args", "gpu", "added"),
    [
        ("completion", [], False, ["--no-repack", "-fit", "off"]),
        ("completion", ["--repack", "--fit", "on"], False, []),
        ("completion", ["-nr"], False, ["-fit", "off"]),
        ("server", [], True, ["--no-repack", "-fit", "off", "-ngl", "999", "--cpu-moe", "-ub", "1024"]),
        ("perplexity", [], True, ["--no-repack", "-fit", "off", "-ngl", "999", "--cpu-moe"]),
        ("cli", ["-b", "64", "-ngl", "9"], True, ["--no-repack", "-fit", "off", "--cpu-moe"]),
        ("cli", ["--n_gpu_layers", "5", "-ncmoe", "3", "-ub", "8"], True, ["--no-repack", "-fit", "off"]),
        ("bench", [], True, ["--repack", "0", "-ngl", "999", "-ncmoe", "999"]),
        ("bench", ["--repack", "1", "-ot", "x=CPU"], True, ["-ngl", "999"]),
        ("quantize", [], True, []),
    ],
)
def test_placement_leaves_to_the_user_what_the_user_decides(
    program: str, args: list[str], gpu: bool, added: list[str]
) -> None:
    assert placement.flags(program, args, gpu) == added


def test_placement_respects_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_REPACK", "1")
    assert placement.flags("completion", [], False) == ["-fit", "off"]
