"""The patch series stays small, documented and as export-patches wrote it."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from test_build import build

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "patches"
# Raising one of these is a commit of its own, with the reason.
MAX_PATCHES, MAX_ADDED_LINES, MAX_FILES = 6, 170, 8

SERIES = build.Project(ROOT).series()


def diff_of(patch: Path) -> str:
    return patch.read_text(encoding="utf-8").partition("\n---\n")[2]


def files_of(patch: Path) -> set[str]:
    return set(re.findall(r"^diff --git a/\S+ b/(\S+)$", diff_of(patch), re.MULTILINE))


def test_series_lists_every_patch_once() -> None:
    assert sorted(SERIES) == sorted(PATCHES.glob("*.patch"))


def test_series_is_within_its_budget() -> None:
    added = sum(len(re.findall(r"^\+(?!\+\+ )", diff_of(patch), re.MULTILINE)) for patch in SERIES)
    files = set().union(*(files_of(patch) for patch in SERIES))
    assert len(SERIES) <= MAX_PATCHES
    assert added <= MAX_ADDED_LINES
    assert len(files) <= MAX_FILES, sorted(files)


def test_pin_is_complete() -> None:
    pin = tomllib.loads((PATCHES / "upstream.toml").read_text(encoding="utf-8"))
    assert set(pin) == {
        *("package", "version", "sha256", "folder", "commit", "tree", "licence", "patched_tree"),
    }
    assert re.fullmatch(r"[0-9a-f]{64}", pin["sha256"])
    assert re.fullmatch(r"[0-9a-f]{40}", pin["tree"])
    assert re.fullmatch(r"[0-9a-f]{40}", pin["patched_tree"])
    assert (pin["tree"] == pin["patched_tree"]) == (SERIES == [])


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.stem)
def test_patch_says_why_and_until_when(patch: Path) -> None:
    message = build.patch_message(patch)
    fields = build.patch_fields(message)
    assert message.startswith(f"{patch.stem} : ")
    assert [field for field in build.PATCH_FIELDS if not fields.get(field)] == []
    assert fields["Kind"] in {"temporary", "build", "ours"}
    assert {name for name in files_of(patch) if name not in fields["Touches"]} == set()


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.stem)
def test_patch_is_as_exported(patch: Path) -> None:
    text = patch.read_text(encoding="utf-8")
    author = f"From: {build.AUTHOR[0]} <{build.AUTHOR[1]}>\nDate: Thu, 1 Jan 2026 00:00:00 +0000\n"
    assert text.startswith(f"{build.MBOX}{author}Subject: {patch.stem} : ")
    assert re.search(r"\d", patch.stem) is None
    assert re.findall(r"^\+.*[ \t]$", diff_of(patch), re.MULTILINE) == []


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.stem)
def test_patch_is_on_the_map(patch: Path) -> None:
    assert f"`{patch.stem}`" in (PATCHES / "README.md").read_text(encoding="utf-8")


@pytest.mark.native
def test_series_makes_the_recorded_tree() -> None:
    project = build.Project(ROOT)
    commit, tree = build.apply_series(project)
    assert tree == project.pin["patched_tree"]
    changed = set(build.git(project.src, "diff", "--name-only", "pristine", commit).split())
    assert changed == set().union(*(files_of(patch) for patch in SERIES))


@pytest.mark.native
def test_git_am_reads_the_series(tmp_path: Path) -> None:
    project = build.Project(ROOT)
    build.git(project.src, "worktree", "prune")
    tree = tmp_path / "am"
    build.git(project.src, "worktree", "add", "-q", "--detach", str(tree), "pristine")
    try:
        if SERIES:
            build.git(tree, "am", "-q", "-3", "--keep-non-patch", *(str(patch) for patch in SERIES))
        assert build.git(tree, "rev-parse", "HEAD^{tree}") == project.pin["patched_tree"]
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr)
    finally:
        build.git(project.src, "worktree", "remove", "--force", str(tree))
