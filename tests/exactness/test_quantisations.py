"""Experts of every quantisation that llama-quantize makes of the embedded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fate_bind.verify import verify

from .conftest import Build, quantize

pytestmark = pytest.mark.model

KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K"]
KINDS += ["IQ4_XS", "IQ4_NL", "IQ3_S", "TQ2_0", "MXFP4_MOE", "F16", "BF16", "F32"]


@pytest.mark.parametrize("kind", KINDS)
def test_identical(kind: str, build: Build, embedded: Path, models: Path) -> None:
    model = quantize(build, embedded, models / f"{kind}.gguf", kind)
    result = verify(model, ["-c", "128"], n_tokens=24, slots="25%", policy="frequency")
    model.unlink()
    assert result.message.startswith("identical"), result.message
    assert result.evictions > 0
