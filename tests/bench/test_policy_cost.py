from __future__ import annotations

import numpy as np
import pytest

from bench import models, policy_cost
from bench.routing import stretch
from fate_policy import data, trace
from fate_policy.lru import LRU

pytestmark = pytest.mark.model  # needs the built library, though it opens no model
SHAPE = models.Shape("small", "qwen3moe", 3, 128, 8, 100)


def test_what_is_asked_and_told_is_what_lru_decides() -> None:
    routed = trace.load(data.find("gptoss20b_stem", None))
    ids = stretch(routed.experts(0, 100).astype(np.int32), 30, np.arange(3))
    steps, asked = policy_cost.walk(ids, routed.tokens[:30], 128, 32)
    caller = policy_cost.Caller(LRU(), "callback", SHAPE, 32, None)
    for t, questions in enumerate(asked[:-1]):
        answers: list[tuple[int, int]] = []
        for question in questions:
            caller.question(question)()
            answers += [(question.layer, caller.victims[i]) for i in range(question.n_victims)]
        assert answers == [tuple(row) for row in steps[t].evictions.tolist()]
        caller.step(steps[t], steps[t + 1])()
    assert sum(len(step.evictions) for step in steps) > 100


def test_every_policy_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(policy_cost, "N_TOKENS", 6)
    monkeypatch.setattr(policy_cost, "WARM_UP", 2)
    policy_cost.main([])
    policy_cost.main(["lru", "--callback", "--record"])
    policy_cost.main(["--prefetch"])
    policy_cost.main(["native", "--shape", "gptoss", "--slots", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        *([name, "token"] for name in (*policy_cost.POLICIES, "native")),
        ["lru", "token"],
        ["lru", "question"],
        ["classifier", "token"],
        ["predictor", "token"],
        ["native", "token"],
        ["native", "token"],
    ]
