"""llama.cpp's own programs on the embedded model, each in a process of its own, as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fate_bind.errors import EngineError
from fate_bind.modelfile import EMBEDDED
from fate_bind.session import Session
from fate_policy.trace import load

pytestmark = pytest.mark.model

SLOW = '''
import time
from fate_policy import Policy

class Slow(Policy):
    """LRU that takes its time, so that a test can interrupt it."""

    def observe(self, step):
        time.sleep(0.02)

class Failing(Policy):
    def observe(self, step):
        raise KeyError("a bug of the user's")
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(SLOW)
    return tmp_path


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "fate_bind", *args],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *args: str, stdin: str = "") -> tuple[int, str, str]:
    process = start(folder, *args)
    out, err = process.communicate(stdin, timeout=120)
    return process.returncode, out, err


def interrupt(folder: Path, *args: str, number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Run until the recording has reached the disk, then press Ctrl-C, or send another signal."""
    process = start(folder, *args, "--fate-policy", "own:Slow", "--fate-record", "trace.npz")
    part = folder / "trace.npz.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 1000):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_run_tells_a_story_and_says_how_it_went(folder: Path) -> None:
    code, out, err = run(folder, "run", "-t", "1")
    assert code == 0
    assert out.startswith("Once upon a time")
    assert len(out) > 300
    assert err.startswith("fate: engaged in 8 of 8 MoE layers, policy lru, table mode\n")
    assert "  slots         16 of 32 experts in each layer" in err


def test_the_pool_does_not_change_the_story(folder: Path) -> None:
    without = run(folder, "run", "-t", "1", "-n", "64", "--fate-mode", "off")[1]
    for flags in (["--fate-slots", "25%"], ["--fate-policy", "frequency", "--fate-mode", "callback"]):
        assert run(folder, "run", "-t", "1", "-n", "64", *flags)[1] == without


def test_a_policy_of_the_users_fails_as_itself(folder: Path) -> None:
    code, out, err = run(folder, "run", "-t", "1", "-n", "16", "--fate-policy", "own:Failing")
    assert code == 1
    assert out.startswith("Once upon a time")
    assert err.rstrip().endswith('KeyError: "a bug of the user\'s"')
    assert "went on as lru" in err


@pytest.mark.parametrize(
    "args",
    [
        ("run", "-t", "1", "-n", "900", "--ignore-eos"),
        ("perplexity", "-m", str(EMBEDDED), "-t", "1", "-f", "text", "-c", "128", "-ub", "1", "-lv", "1"),
        ("bench", "-m", str(EMBEDDED), "-t", "1", "-p", "0", "-n", "900"),
    ],
    ids=lambda args: args[0],
)
def test_ctrl_c_keeps_the_record_and_prints_the_summary(folder: Path, args: tuple[str, ...]) -> None:
    (folder / "text").write_text("The quick brown fox jumps over the lazy dog.\n" * 100)
    code, _, err = interrupt(folder, *args)
    assert code == 130
    assert "fate: engaged in 8 of 8 MoE layers, policy own:Slow" in err
    assert "  recorded      trace.npz" in err
    assert load(folder / "trace.npz").n_tokens >= 10
    assert not (folder / "trace.npz.part").exists()


def test_a_request_to_end_keeps_the_record_too(folder: Path) -> None:
    code, _, err = interrupt(folder, "run", "-t", "1", "-n", "900", "--ignore-eos", number=signal.SIGTERM)
    assert code == 143
    assert "  recorded      trace.npz" in err
    assert load(folder / "trace.npz").n_tokens >= 10
    assert not (folder / "trace.npz.part").exists()


def test_a_request_to_end_ends_the_record_of_a_conversation(folder: Path) -> None:
    flags = ["-t", "1", "-n", "900", "--ignore-eos", "-i"]
    code, _, err = interrupt(folder, "run", *flags, number=signal.SIGTERM)
    assert code == 143
    assert "  recorded      trace.npz" in err
    assert not (folder / "trace.npz.part").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_where_interrupts_were_ignored_signals_still_keep_the_record(folder: Path, number: int) -> None:
    """As for a job that a shell started in the background; llama.cpp sets a handler of its own."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, _, err = interrupt(folder, "run", "-t", "1", "-n", "900", "--ignore-eos", number=number)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 128 + number
    assert "  recorded      trace.npz" in err
    assert not (folder / "trace.npz.part").exists()


def test_a_recording_of_nothing_is_said(folder: Path) -> None:
    flags = ["-n", "2", "--fate-slots", "100%", "--fate-record", "none.npz"]
    code, _, err = run(folder, "run", "-t", "1", *flags)
    assert code == 0
    assert "fate: nothing was recorded in none.npz: not engaged because all experts resident" in err
    assert not (folder / "none.npz").exists()


def test_a_value_that_is_forgotten_is_not_one_of_ours(folder: Path) -> None:
    code, _, err = run(folder, "run", "-n", "2", "-p")
    assert code == 1
    assert "expected value for argument" in err


def test_chat_answers_and_leaves(folder: Path) -> None:
    code, out, err = run(folder, "chat", "-m", str(EMBEDDED), "-t", "1", "-n", "8", stdin="hello\n/exit\n")
    assert code == 0
    assert "> " in out
    assert "fate: engaged in 8 of 8 MoE layers" in err


def test_bench_measures_with_the_pool(folder: Path) -> None:
    flags = ["-t", "1", "-p", "16", "-n", "8", "-r", "1", "--fate-stats", "json:stats.json"]
    code, out, _ = run(folder, "bench", "-m", str(EMBEDDED), *flags)
    assert code == 0
    assert "pp16" in out
    assert "tg8" in out
    numbers = json.loads((folder / "stats.json").read_text())
    assert numbers["layers_engaged"] == 8
    assert numbers["bypassed"] > 0
    assert numbers["hits"] > 0


def test_quantize_makes_a_model_that_verifies(folder: Path) -> None:
    code, _, _ = run(folder, "quantize", "--allow-requantize", str(EMBEDDED), "q8.gguf", "Q8_0")
    assert code == 0
    code, out, _ = run(folder, "verify", "-m", "q8.gguf", "-t", "1", "-n", "8", "--fate-slots", "25%")
    assert (code, out.partition(":")[0]) == (0, "identical")


def test_serve_answers_two_clients_and_stops_on_ctrl_c(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["-t", "1", "-np", "2", "--port", str(port), "-lv", "1", "--fate-record", "trace.npz"]
    process = start(folder, "serve", "-m", str(EMBEDDED), *flags, "--fate-policy", "frequency")
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_for(f"{url}/health", process)
        prompts = ["Once upon a time", "One day, a fox"]
        bodies = [{"prompt": p, "max_tokens": 24, "temperature": 0, "cache_prompt": False} for p in prompts]
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda body: _post(f"{url}/v1/completions", body), bodies))
        assert [answer["usage"]["completion_tokens"] for answer in answers] == [24, 24]
        message = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
        assert _post(f"{url}/v1/chat/completions", message)["choices"][0]["message"]["role"] == "assistant"
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "fate: engaged in 8 of 8 MoE layers, policy frequency" in err
    assert load(folder / "trace.npz").n_tokens > 48


def _wait_for(url: str, process: subprocess.Popen[str]) -> None:
    for _ in range(300):
        assert process.poll() is None, process.communicate()
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


@pytest.mark.parametrize("flags", [["run", "--version"], ["run", "--list-devices"], ["chat", "--version"]])
def test_flags_that_end_the_process(folder: Path, flags: list[str]) -> None:
    """A thread of ours that still ran once turned llama.cpp's exit() into an abort."""
    code, _, err = run(folder, *flags)
    assert code == 0, err


@pytest.mark.parametrize("flag", ["-h", "--version", "--list-devices", "--cache-list", "--completion-bash"])
def test_a_flag_that_ends_the_process_verifies_nothing(folder: Path, flag: str) -> None:
    """It once ended with 0, which says identical."""
    code, out, err = run(folder, "verify", "-t", "1", flag)
    assert (code, out) == (3, "")
    assert err.count("\n") == 1


def test_a_refused_context_ends_with_the_reason(folder: Path) -> None:
    """The reason was once forgotten before it was asked for."""
    code, _, err = run(folder, "run", "-t", "1", "--fate-slots", "2000000000")
    assert code == 1
    assert err.splitlines()[-1] == (
        "fate: error: slots: 2000000000 per layer asked for, but the model has 32 experts per layer; "
        "the maximum is 32"
    )


def test_a_pool_for_everything_is_no_pool(folder: Path) -> None:
    code, out, err = run(folder, "verify", "-t", "1", "-n", "1", "--fate-slots", "4GiB", "--fate-require")
    assert (code, out, err) == (2, "not verified: not engaged because all experts resident\n", "")


def test_four_threads_in_one_session_are_errors() -> None:
    """They once ended the process in llama.cpp."""
    refused: list[str] = []

    def work() -> None:
        try:
            for _ in range(20):
                session.logits([1, 2, 3])
                session.clear()
        except EngineError as error:
            refused.append(str(error))

    with Session(args=["-t", "1"]) as session:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1 <= len(refused) <= 3
        assert all(text.startswith("the session is in use") for text in refused)
        session.check()


def test_wrong_flags_of_bench_end_with_its_own_code(folder: Path) -> None:
    code, _, err = run(folder, "bench", "--no-such-flag")
    assert code == 1, err


def chat_on_a_terminal(folder: Path) -> tuple[int, int]:
    """Start `fate chat` with a terminal for input; return its process id and our end of the terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "TERM": "dumb"}
        command = [sys.executable, "-m", "fate_bind", "chat", "-m", str(EMBEDDED), "-t", "1", "-c", "256"]
        os.execve(sys.executable, command, environment)
    return child, terminal


def read_until(terminal: int, mark: bytes, seconds: float = 60) -> bytes:
    seen = b""
    deadline = time.monotonic() + seconds
    while mark not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
    return seen


def test_ctrl_c_at_the_prompt_leaves_chat(folder: Path) -> None:
    """It once hung: the program's handler ran, but nothing woke its read from the terminal."""
    child, terminal = chat_on_a_terminal(folder)
    read_until(terminal, b"> ")
    time.sleep(0.3)
    os.write(terminal, b"\x03")
    seen = read_until(terminal, b"fate: ")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, seen
    assert b"fate: engaged in 8 of 8 MoE layers" in seen + read_until(terminal, b"policy")
