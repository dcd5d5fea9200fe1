"""The guide's policy runs as it stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from policy_contract import real_trace

import fate_policy
from fate_policy import config
from fate_policy.replay import replay

GUIDE = Path(fate_policy.__file__).with_name("README.md").read_text(encoding="utf-8")


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    policy, script = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "weighted.py").write_text(policy, encoding="utf-8")
    (tmp_path / "weighted.yaml").write_text(
        re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)[0], encoding="utf-8"
    )
    real_trace().save(tmp_path / "routing.npz")
    monkeypatch.chdir(tmp_path)
    yield script
    sys.modules.pop("weighted", None)


def test_the_guides_script_prints_three_hit_rates(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(written, "guide", "exec"), {})
    own, lru, belady = (float(line) for line in capsys.readouterr().out.split())
    assert lru < own < belady


def test_the_guides_policy_works_in_both_modes(written: str) -> None:
    policy = config.make_policy(config.load("weighted.yaml"))
    table, asked = (replay(real_trace(), policy, n_slots=8, mode=mode) for mode in ("table", "callback"))
    assert table == asked


def test_the_guides_policy_is_twenty_lines(written: str) -> None:
    lines = Path("weighted.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 20
