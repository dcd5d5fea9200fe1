"""Traces by name, and the one that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest
from policy_contract import real_trace

from fate_policy import data, trace
from fate_policy.errors import TraceError


def test_the_shipped_trace_is_whole_and_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATE_TRACES", raising=False)
    path = data.find("gptoss20b_stem")
    shipped = trace.load(path)
    assert path.stat().st_size < 3.2e6
    assert shipped.hash() == "ee5b7313ca54c8321b2c0e02a4cafe31aa73389747f23d08fe879ea35cbdc1f5"
    assert (shipped.ids.shape, len(shipped.prompt_start)) == ((90977, 24, 4), 272)
    assert shipped.token_hash is not None
    assert len(shipped.token_hash) == 90977
    assert (shipped.meta["licence"], len(shipped.meta["repetitive_prompts"])) == ("Apache-2.0", 64)
    assert path.with_name("LICENSE-APACHE-2.0").exists()


def test_a_path_wins_over_the_folder_and_the_folder_over_what_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, folder = tmp_path / "here", tmp_path / "folder"
    for place in (here, folder):
        place.mkdir()
    monkeypatch.chdir(here)
    real_trace().save(folder / "gptoss20b_stem.npz")
    monkeypatch.setenv("FATE_TRACES", str(folder))
    assert data.find("gptoss20b_stem") == folder / "gptoss20b_stem.npz"
    assert data.find("gptoss20b_stem.npz", folder) == folder / "gptoss20b_stem.npz"
    real_trace().save(here / "gptoss20b_stem.npz")
    assert data.find("gptoss20b_stem.npz") == Path("gptoss20b_stem.npz")


def test_an_unknown_name_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"unknown trace 'gptoss'.*known: gptoss20b_stem.*FATE_TRACES"):
        data.find("gptoss", tmp_path)
    with pytest.raises(TraceError, match=r"trace no/where\.npz does not exist"):
        data.find("no/where.npz")
