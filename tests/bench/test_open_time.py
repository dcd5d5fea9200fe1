from __future__ import annotations

import pytest

from bench import open_time
from fate_bind.modelfile import EMBEDDED

pytestmark = pytest.mark.model


def test_every_arm_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    open_time.main([str(EMBEDDED), "-n", "1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        [what, arm] for what in ("open", "first_token") for arm in open_time.ARMS
    ]
    seconds = [float(line[3]) for line in lines]
    assert all(0 < opened < first for opened, first in zip(seconds[:2], seconds[2:], strict=True))
