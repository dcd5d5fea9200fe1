from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fate_bind import placement
from fate_bind.errors import EngineError, PolicyConfigError
from fate_bind.library import Library
from fate_bind.session import Session, resolve_config
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
    for call in (lambda: session.logits([1]), session.clear, lambda: session.tokenize("a"), session.check):
        with pytest.raises(EngineError, match="closed"):
            call()


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
        (lambda folder: _write(folder, _header(offset=1 << 20)), "is cut short: .* a tensor begins at byte"),
    ],
)
def test_a_bad_file_is_refused_before_llama_cpp_sees_it(
    fake: Library, tmp_path: Path, make: Any, what: str
) -> None:
    with pytest.raises(EngineError, match=what):
        Session(make(tmp_path))


def _write(folder: Path, data: bytes) -> Path:
    path = folder / "bad.gguf"
    path.write_bytes(data)
    return path


def _header(offset: int) -> bytes:
    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little")

    def string(text: bytes) -> bytes:
        return number(len(text), 8) + text

    keys = string(b"a") + number(8, 4) + string(b"text")
    keys += string(b"b") + number(9, 4) + number(8, 4) + number(2, 8) + string(b"x") + string(b"yz")
    keys += string(b"c") + number(9, 4) + number(5, 4) + number(3, 8) + bytes(12)
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
        ("server", [], True, ["--no-repack", "-fit", "off", "-ngl", "999", "--cpu-moe"]),
        ("cli", ["--n_gpu_layers", "5", "-ncmoe", "3"], True, ["--no-repack", "-fit", "off"]),
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
