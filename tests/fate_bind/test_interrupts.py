from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from fate_bind import interrupts
from fate_bind.__main__ import main
from fate_bind.library import Library
from fate_bind.session import Session
from fate_policy import trace

PRESSED_AT_RANDOM = """
import json, os, random, signal, threading, time
import numpy as np
from fate_bind.session import Session
from fate_policy.base import Policy

class Watching(Policy):
    def start(self, geometry):
        self.n = 0

    def observe(self, step):
        self.n += step.n_tokens
        sum(range(50))

    def scores(self, history):
        return np.zeros(history.last_use.shape, np.float32)

rng = random.Random({seed})
n_presses, presses, met, ready = 40, 0, 0, threading.Event()

def press():
    global presses
    for _ in range(n_presses):
        ready.wait()
        ready.clear()
        time.sleep(rng.random() * 0.004)
        presses += 1
        os.kill(os.getpid(), signal.SIGINT)

policy = Watching()
with Session({model!r}, policy=policy, mode={mode!r}, sync=True, record={record!r}) as session:
    threading.Thread(target=press, daemon=True).start()
    while met < n_presses:
        try:
            ready.set()
            while True:
                session.logits([rng.randrange(16) for _ in range(8)])
                session.clear()
        except KeyboardInterrupt:
            met += 1
    counters = session.counters()
    assert session.stats()["policy_error"] is None, session.stats()["policy_error"]
    assert policy.n == counters.tokens, (policy.n, counters.tokens)
print(json.dumps([presses, met, int(counters.tokens), int(counters.hits.sum())]))
"""


@pytest.mark.parametrize("mode", ["table", "callback"])
@pytest.mark.parametrize("seed", range(3))
def test_ctrl_c_is_never_lost_and_no_step_is(
    script: Any, model: Path, tmp_path: Path, seed: int, mode: str
) -> None:
    """Python once ran the handler at the first bytecode of a callback, where the exception went nowhere."""
    path = tmp_path / "trace.npz"
    done = script(PRESSED_AT_RANDOM.format(seed=seed, model=str(model), mode=mode, record=str(path)))
    assert done.stderr == ""
    presses, met, n_tokens, n_hits = json.loads(done.stdout)
    assert (presses, met) == (40, 40)
    assert trace.load(path).n_tokens == n_tokens
    assert (done.returncode, n_hits > 0) == (0, True)


@pytest.fixture
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_a_held_interrupt_comes_when_the_outermost_block_is_over() -> None:
    done = []

    def work() -> None:
        with interrupts.held():
            with interrupts.held():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("default_handler")
def test_an_interrupt_in_a_destructor_comes_at_the_next_block() -> None:
    with interrupts.held(may_raise=False):
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupts.held():
        pass
    with interrupts.held():
        pass


def test_handlers_that_are_not_pythons_stay() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.held():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_other_threads_hold_nothing() -> None:
    seen = []

    def work() -> None:
        with interrupts.held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_a_second_ctrl_c_breaks_off_a_policy_that_hangs(script: Any, model: Path) -> None:
    done = script(
        f"""
        import os, signal, threading, time
        from fate_bind.session import Session
        from fate_policy.base import Policy

        class Hangs(Policy):
            def observe(self, step):
                while True:
                    time.sleep(0.01)

        def press():
            for _ in range(2):
                time.sleep(0.2)
                os.kill(os.getpid(), signal.SIGINT)

        with Session({str(model)!r}, policy=Hangs(), sync=True, record=True) as session:
            threading.Thread(target=press).start()
            try:
                session.logits([1, 2, 3])
            except KeyboardInterrupt:
                print("broken off")
            print(session.stats()["policy_error"], session.record().n_tokens, session.stats()["tokens"])
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "broken off\nKeyboardInterrupt:  3 3\n", "")


@pytest.mark.usefixtures("default_handler")
def test_a_second_ctrl_c_breaks_off_a_policy_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's misses are answered on a thread of the engine's, while this one waits in C."""
    broken = []

    def hang() -> None:
        monkeypatch.setattr(interrupts, "policy_thread", threading.get_ident())
        try:
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            broken.append(True)

    thread = threading.Thread(target=hang)

    def work() -> None:
        with interrupts.held():
            thread.start()
            while interrupts.policy_thread is None:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            thread.join(0.3)
            assert thread.is_alive()
            os.kill(os.getpid(), signal.SIGINT)
            thread.join(10)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert broken == [True]


@pytest.mark.parametrize("name", ["fate_py_open", "fate_py_step", "fate_py_miss", "fate_py_close"])
def test_an_exception_at_the_first_bytecode_of_a_callback_is_raised_by_the_call(
    fake: Library, model: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    """That of a timeout's signal handler once vanished there, with a message on stderr."""

    def trace_calls(frame: FrameType, event: str, argument: Any) -> None:
        if frame.f_code.co_name == name:
            raise TimeoutError

    before = sys.gettrace()
    sys.settrace(trace_calls)
    try:
        with pytest.raises(TimeoutError), Session(model, mode="callback") as session:
            session.logits([1, 2, 3])
    finally:
        sys.settrace(before)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("default_handler")
def test_the_command_ends_with_130_and_one_line(
    fake: Library, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argmax = np.argmax

    def press(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return argmax(*args)

    monkeypatch.setattr(np, "argmax", press)
    assert main(["verify", "-m", str(model), "--fate-record", str(model.with_name("t.npz"))]) == 130
    assert capsys.readouterr() == ("", "fate: interrupted\n")
    assert trace.load(model.with_name("t.npz")).n_tokens > 10
    assert not list(model.parent.glob("*.part"))


@pytest.mark.model
@pytest.mark.parametrize("mode", ["table", "callback"])
@pytest.mark.parametrize("delay", [0.0, 0.013, 0.05, 0.111, 0.17, 0.3])
def test_verify_ends_with_130_and_keeps_the_record(tmp_path: Path, delay: float, mode: str) -> None:
    flags = ["-t", "1", "-n", "900", "--fate-policy", "frequency", "--fate-mode", mode]
    process = subprocess.Popen(
        [sys.executable, "-m", "fate_bind", "verify", *flags, "--fate-record", "trace.npz"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "trace.npz.part").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "fate: interrupted\n")
    assert trace.load(tmp_path / "trace.npz").n_tokens >= 1
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]
