"""Every mixture-of-experts architecture of the pinned llama.cpp goes through the same doors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fate_bind.verify import verify

pytestmark = pytest.mark.model

# fmt: off
ENGAGING = [
    "afmoe", "arctic", "bailingmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "dbrx", "deepseek",
    "deepseek2", "deepseek32", "deepseek4", "dots1", "dots3note", "ernie4_5-moe", "exaone-moe",
    "glm-dsa", "glm4moe", "glm5-next", "gpt-oss", "granite", "granitemoe", "grok", "grovemoe",
    "hunyuan-moe", "hy_v3", "hy_v4", "kimi-k3", "kimi-linear", "laguna", "lfm2moe", "llada-moe",
    "llama", "llama4", "maple", "mellum", "mimo2", "minicpm", "minimax-01", "minimax-m2", "minimax-m3",
    "mistral3", "mistral4", "olmoe", "phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next",
    "qwen3vlmoe", "qwen4exp", "rnd1", "smallthinker",
]
# fmt: on

WITHOUT_EXPERT_TENSORS = ["ernie4_5", "paddleocr", "refact"]
"""Their fixtures carry the name, but llama.cpp loads no expert tensors for them."""


def test_the_lists_are_all_there_is(architectures: Path) -> None:
    made = sorted(path.name.removesuffix("-moe.gguf") for path in architectures.glob("*-moe.gguf"))
    assert made == sorted(ENGAGING + WITHOUT_EXPERT_TENSORS)
    assert len(ENGAGING) >= 52


@pytest.mark.parametrize("name", ENGAGING)
def test_identical_through_the_pool(name: str, architectures: Path) -> None:
    # -ub 8: the prompt takes several steps and goes past the pool; a single token goes through it
    result = verify(
        architectures / f"{name}-moe.gguf",
        ["-c", "128", "-ub", "8"],
        prompt=range(1, 25),
        n_tokens=12,
        slots=4,
    )
    assert result.message.startswith("identical"), result.message


@pytest.mark.parametrize("name", WITHOUT_EXPERT_TENSORS)
def test_without_expert_tensors_says_so(name: str, architectures: Path) -> None:
    result = verify(architectures / f"{name}-moe.gguf", ["-c", "64"], prompt=[1, 2, 3], n_tokens=4, slots=4)
    assert result.difference is None
    assert result.exit_code == 2
    assert result.message == "not verified: not engaged because the model has no mixture-of-experts layers"


def test_gpt_oss_in_callback_mode_with_small_batches(architectures: Path) -> None:
    """Biases on every expert tensor, several tokens through the pool at once."""
    result = verify(
        architectures / "gpt-oss-moe.gguf",
        ["-c", "128", "-ub", "3"],
        prompt=range(1, 31),
        slots=6,
        mode="callback",
    )
    assert result.message.startswith("identical"), result.message
    assert result.report.counters.bypassed.sum() == 0
