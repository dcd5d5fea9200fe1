from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fate_policy import registry
from fate_policy.config import load, make_policy
from fate_policy.errors import PolicyConfigError
from fate_policy.lru import LRU

OWN = """
from fate_policy import Policy

class Own(Policy):
    \"\"\"Do nothing of note.\"\"\"
    def __init__(self, *, weight=2):
        self.weight = weight

not_a_policy = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_policy.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "broken_policy.py").write_text("import no_such_module", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("own_policy", "broken_policy"):
        sys.modules.pop(name, None)


def test_names_are_the_built_in_ones() -> None:
    assert registry.names()[:6] == ["lru", "frequency", "static", "random", "classifier", "belady"]
    assert registry.get("lru") is LRU


def test_importing_the_package_loads_no_policy_and_no_sklearn() -> None:
    import subprocess

    code = (
        "import sys, fate_policy; print([m for m in ('sklearn', 'fate_policy.belady') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(PolicyConfigError, match=r"unknown policy 'lur'; did you mean 'lru'.*module:Class"):
        registry.get("lur")


def test_an_own_policy_is_found_in_the_current_folder(own: Path) -> None:
    before = list(sys.path)
    config = load("own_policy:Own", {"params": {"weight": 5}})
    policy = make_policy(config)
    assert (type(policy).__name__, policy.weight) == ("Own", 5)  # type: ignore[attr-defined]
    assert sys.path == before


def test_an_unknown_parameter_of_an_own_policy(own: Path) -> None:
    with pytest.raises(
        PolicyConfigError, match="unknown parameter of policy own_policy:Own: 'wight'; did you mean 'weight'"
    ):
        make_policy(load("own_policy:Own", {"params": {"wight": 5}}))


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("own_policy:Other", "has no 'Other'"),
        ("own_policy:not_a_policy", "does not derive from fate_policy.Policy"),
        ("missing_policy:Own", "no module 'missing_policy'"),
        ("missing.policy:Own", "no module 'missing'"),
        ("frequency:half_life_tokens=64", r"no module 'frequency'.*go into a .yaml file, under `frequency:`"),
        (":Own", 'expected "module:Class"'),
        ("a b:Own", 'expected "module:Class"'),
        ("own_policy:", "has no ''"),
    ],
)
def test_wrong_paths(own: Path, path: str, fault: str) -> None:
    with pytest.raises(PolicyConfigError, match=fault):
        registry.get(path)


def test_an_import_error_inside_an_own_module_stays_itself(own: Path) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.get("broken_policy:Own")


def test_installed_policies_are_entry_points(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("own", "own_policy:Own", registry.ENTRY_POINTS),
        EntryPoint("broken", "broken_policy:Own", registry.ENTRY_POINTS),
        EntryPoint("lru", "own_policy:Own", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert registry.names()[6:] == ["broken", "own"]
    assert registry.get("lru") is LRU
    assert registry.get("own").__name__ == "Own"
    described = {row.name: row for row in registry.describe()}
    assert described["own"].line == "Do nothing of note."
    assert described["own"].params == {"weight": 2}
    assert described["broken"].line == "cannot be loaded: No module named 'no_such_module'"


def test_describe_gives_line_and_defaults() -> None:
    described = {row.name: row for row in registry.describe()}
    assert described["frequency"].params == {"half_life_tokens": 16, "lfru": False}
    assert described["lru"].line == "Evict the resident expert whose last use is oldest."
