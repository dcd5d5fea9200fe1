"""The tutorial's commands run, in order, as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fate_policy
from fate_policy import trace

TUTORIAL = Path(fate_policy.__file__).with_name("TUTORIAL.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", TUTORIAL, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.model
def test_every_command_of_the_tutorial_succeeds(tmp_path: Path) -> None:
    for fate, *args in commands():
        assert fate == "fate"
        done = subprocess.run(
            [sys.executable, "-m", "fate_bind", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{' '.join(args)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert trace.load(tmp_path / "tale.npz").n_tokens > 100
    assert {"rates.png", "tale.html", "plan.yaml"} <= {path.name for path in tmp_path.iterdir()}
