from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fate_bind import placement
from fate_bind.__main__ import main
from fate_bind.errors import EngineError
from fate_bind.library import Library
from fate_bind.session import Session
from fate_bind.verify import verify


def test_equal_logits_are_identical(fake: Library, model: Path) -> None:
    result = verify(model, prompt=[1, 2, 3], n_tokens=5)
    assert result.exit_code == 0
    assert (result.n_tokens, result.n_logits) == (8, 8 * 16)
    assert result.message == (
        f"identical: 128 logits over 8 tokens, 2 of 2 MoE layers engaged, {result.pooled} pooled pairs, "
        f"{result.fills} fills, {result.evictions} evictions; policy: lru; reference: the same model without "
        "the pool"
    )
    assert result.pooled == 8 * 2 * 2


@pytest.mark.parametrize("position", [0, 2, 3, 7])
def test_the_first_different_bit_is_found(
    fake: Library, model: Path, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    monkeypatch.setenv("FAKE_WRONG_LOGIT", str(position))
    result = verify(model, prompt=[5, 6, 7], n_tokens=5)
    assert result.exit_code == 1
    assert result.message == (
        f"different: token position {position}, vocabulary id 3: 0x3e800000 (0.25) without the pool, "
        "0x3e800001 (0.25000003) with it"
    )


def test_a_pool_that_does_not_engage_proves_nothing(fake: Library, model: Path) -> None:
    result = verify(model, prompt=[1, 2, 3], n_tokens=2, slots=8)
    assert (result.exit_code, result.message) == (2, "not verified: not engaged because all experts resident")


def test_the_prompt_comes_from_the_flags(fake: Library, model: Path) -> None:
    assert verify(model, ["-p", "four"], n_tokens=0).n_tokens == 4


def test_a_model_without_a_tokenizer_gets_tokens_made_of_the_bytes(fake: Library, model: Path) -> None:
    assert verify(model, prompt="?abc", n_tokens=1).n_tokens == 5


def test_the_command_exits_as_documented(
    fake: Library, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["verify", "-m", str(model), "-n", "4"]
    assert main([*command, "--fate-slots", "4"]) == 0
    assert capsys.readouterr().out.startswith("identical: ")
    assert main([*command, "--fate-slots=8"]) == 2
    assert main([*command, "--fate-slots=8", "--fate-require"]) == 2
    assert capsys.readouterr() == (
        "not verified: not engaged because all experts resident\n" * 2,
        "",
    )
    assert main([*command, "--fate-mode=off", "--fate-require"]) == 2
    assert capsys.readouterr().out == "not verified: not engaged because the mode is off\n"
    assert main(["verify", "--help"]) == main(["verify", "-h"]) == 0
    assert main([*command, "--fate-slots=4", "--fate-stats=json:/dev/full"]) == 3
    out, err = capsys.readouterr()
    assert out.endswith("without the pool\n")
    assert err.startswith("fate: error: --fate-stats: /dev/full cannot be written: ")
    assert main([*command, "--fate-slot=8"]) == 3
    assert main(["verify", "-m", "none.gguf"]) == 3
    assert main([*command[:-1], "many"]) == 3
    assert main([*command[:-1], "300"]) == 3
    errors = capsys.readouterr().err
    assert "did you mean --fate-slots?" in errors
    assert "do not fit the context of 256" in errors
    assert "Traceback" not in errors
    monkeypatch.setenv("FAKE_WRONG_LOGIT", "1")
    assert main([*command, "--fate-slots", "4"]) == 1


def test_the_reference_on_a_gpu_has_all_experts_in_vram(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLAMA_ARG_CPU_MOE", "LLAMA_ARG_N_GPU_LAYERS"):
        monkeypatch.delenv(name, raising=False)
    assert placement.resident(["-ub", "64"]) == ["-ub", "64", "--no-repack", "-fit", "off", "-ngl", "999"]
    given = ["-fit", "off", "--no-repack"]
    assert placement.resident(given) == [*given, "-ngl", "999", "-ub", "1024"]
    for own in (["-ngl", "0"], ["--n-cpu-moe", "3"], ["-ot", "exps=CPU"]):
        assert placement.resident(own) is None
    monkeypatch.setenv("LLAMA_ARG_CPU_MOE", "1")
    assert placement.resident([]) is None


@pytest.mark.model
def test_a_reference_of_its_own_gives_the_same_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a GPU, but on the CPU: two models are open, and the numbers of the pool are those of one."""
    expected = verify(args=["-c", "64"], prompt=[5, 6, 7], n_tokens=6, slots="25%")
    monkeypatch.setattr(placement, "has_gpu", lambda: True)
    result = verify(args=["-c", "64"], prompt=[5, 6, 7], n_tokens=6, slots="25%")
    assert result.message.startswith("identical")
    assert result.message.partition(";")[0] == expected.message.partition(";")[0]
    assert result.message.endswith("reference: the same model with all experts in VRAM")


@pytest.mark.model
def test_where_the_experts_do_not_fit_in_vram_every_step_is_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where a staging context is one with few slots: the bits are the same."""

    class NoRoom(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            if options.get("place") is False:
                raise EngineError("cannot load the model: out of memory")
            super().__init__(*args, **options)

    monkeypatch.setattr(placement, "has_gpu", lambda: True)
    monkeypatch.setattr(sys.modules[verify.__module__], "Session", NoRoom)
    result = verify(args=["-c", "64"], prompt=[5, 6, 7], n_tokens=6, slots="25%")
    assert result.message.startswith("identical")
    assert "every step's experts staged" in result.message
