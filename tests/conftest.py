"""Choose which tests run: plain `pytest` is quick, `--all` adds models, native tests and sanitizers."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

# llama.cpp's threads spin while they wait; on a busy machine that costs seconds a token
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# and the matrices of the tests are too small for more than one thread
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
NEEDS_ALL = ("model", "native", "slow")
_left_out = pytest.StashKey[Counter[str]]()


@cache
def gpu_missing() -> str | None:
    """Return why no GPU test can run, or None if a device answers and the active build is for CUDA."""
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "no CUDA device: nvidia-smi does not answer"
    if answer.returncode != 0 or "GPU" not in answer.stdout:
        return "no CUDA device: nvidia-smi lists none"
    active = ROOT / "build" / "active.json"
    if not active.exists() or '"cuda"' not in active.read_text(encoding="utf-8"):
        return "the active build is not for CUDA: run `python build.py build --backend cuda`"
    return None


def pytest_configure() -> None:
    """Undo an ignored SIGINT, which a run in the background hands down: tests interrupt what they start."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="also run the tests marked model, native or slow (what `python build.py test` does)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out: Counter[str] = Counter()
    config.stash[_left_out] = left_out
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        if item.get_closest_marker("gpu") and (reason := gpu_missing()):
            item.add_marker(pytest.mark.skip(reason=reason))
        marks = [name for name in NEEDS_ALL if item.get_closest_marker(name)]
        if marks and not config.getoption("--all"):
            left_out[marks[0]] += 1
            dropped.append(item)
        else:
            kept.append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(_left_out, Counter())
    if left_out:
        counts = ", ".join(f"{n} {name}" for name, n in sorted(left_out.items()))
        terminalreporter.write_line(f"deselected without --all: {counts} (python build.py test runs all)")
