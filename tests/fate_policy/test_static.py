from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from policy_contract import SYNTHETIC, PolicyContract, golden, real_trace, synthetic_trace

from fate_policy.base import Geometry, Policy
from fate_policy.driver import Driver
from fate_policy.errors import PolicyConfigError
from fate_policy.replay import replay
from fate_policy.static import Static


def ranked(shape: Geometry) -> NDArray[np.float64]:
    return np.arange(shape.n_layers * shape.max_experts).reshape(shape.n_layers, -1) * 7 % 13 / 2


class TestStatic(PolicyContract):
    name = "static"

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.path = tmp_path / "profile.npy"
        type(self).params = {"profile": str(self.path)}
        np.save(self.path, ranked(SYNTHETIC))

    def make_for(self, shape: Geometry) -> Policy:
        np.save(self.path, ranked(shape))
        return self.make()


def test_golden_counts(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", scores=ranked(SYNTHETIC), note="mine")
    assert golden(replay(synthetic_trace(), Static(profile=str(tmp_path / "p.npz")))) == (
        1962,
        1110,
        1156,
        1133,
        194,
    )
    real_trace().slice(0, 200).save(tmp_path / "t.npz")
    assert golden(replay(real_trace(), Static(profile=str(tmp_path / "t.npz")), n_slots=8)) == (
        24780,
        13620,
        13620,
        13428,
        1876,
    )


def test_a_traces_counts_are_the_scores(tmp_path: Path) -> None:
    synthetic_trace(50).save(tmp_path / "t.npz")
    policy = Static(profile=str(tmp_path / "t.npz"))
    history = Driver(policy, SYNTHETIC).history
    ids = synthetic_trace(50).experts()
    for layer, expert in ((0, 0), (1, 3), (2, 15)):
        assert policy.scores(history)[layer, expert] == (ids[:, layer] == expert).sum()


def test_the_constructor_reads_nothing() -> None:
    assert Static(profile="nowhere.npz").profile == "nowhere.npz"


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (
            "p.npy",
            np.zeros((3, 8)),
            r"holds float64 of shape \(3, 8\); this model needs numbers of \(3, 16\)",
        ),
        ("p.npy", np.zeros((3, 16), bool), "holds bool"),
        ("p.npy", np.full((3, 16), np.nan), "holds NaN"),
        ("p.npz", {"other": np.zeros((3, 16))}, "cannot be read: .*has no array 'ids' .it holds other"),
        ("p.npz", {"scores": np.zeros((2, 16))}, r"shape \(2, 16\)"),
        ("p.npy", b"text", r"is no .npy or .npz file"),
        ("p.npy", np.array([{}], object), "cannot be read: it holds Python objects"),
        ("p.npz", {"scores": np.array([{}], object)}, "cannot be read: it holds Python objects"),
        ("p.npy", None, "does not exist"),
        ("real", None, "is a trace of 24 layers of 32 experts; this model has 3 layers of 8/16 experts"),
    ],
)
def test_profiles_that_do_not_fit(tmp_path: Path, name: str, content: Any, fault: str) -> None:
    path = tmp_path / name
    if name == "real":
        path = path.with_suffix(".npz")
        real_trace().save(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(PolicyConfigError, match=f"^profile: .*{fault}") as caught:
        Driver(Static(profile=str(path)), SYNTHETIC)
    assert "pickle" not in str(caught.value)
