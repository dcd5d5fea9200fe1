"""build.py on a fake project: every way it can fail ends with one message, and the next run works."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="the fakes are shell scripts")


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fate_build_script", ROOT / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_build()

UPSTREAM = {
    "src/llama-graph.cpp": "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\n",
    "ggml/ggml.c": "alpha\nbeta\n",
    ".gitignore": "*.log\n",
    "kept.log": "a file that git add without -f would drop\n",
}
MESSAGE = "Why: a test needs it\nKind: ours\nRemove-when: never\nTouches: src/llama-graph.cpp\n"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def sdist(path: Path, files: dict[str, str]) -> Path:
    """Write an archive laid out like the pinned one, with its dangling `.git` file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, text in {**files, ".git": "gitdir: ../../.git/modules/vendor/llama.cpp\n"}.items():
            info = tarfile.TarInfo(f"fake_pkg-1.0/vendor/llama.cpp/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A fake upstream: its archive, its sha256 and its git tree."""
    folder = tmp_path_factory.mktemp("upstream")
    checkout = folder / "checkout"
    for name, text in UPSTREAM.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text, encoding="utf-8")
    build.git(checkout, "init", "-q")
    build.git(checkout, "add", "-A", "-f")
    archive = sdist(folder / "fake_pkg-1.0.tar.gz", UPSTREAM)
    tree = build.git(checkout, "write-tree")
    return SimpleNamespace(archive=archive, sha256=build.file_sha256(archive), tree=tree, checkout=checkout)


@pytest.fixture
def project(tmp_path: Path, upstream: SimpleNamespace) -> Any:
    """A bare clone of a fake project inside a git repository of its own, with the archive in its cache."""
    root = tmp_path / "clone"
    (root / "patches").mkdir(parents=True)
    build.git(root, "init", "-q")
    pin = {"package": "fake-pkg", "version": "1.0", "sha256": upstream.sha256, "folder": "vendor/llama.cpp"}
    pin |= {"commit": "abc123", "tree": upstream.tree, "licence": "MIT", "patched_tree": upstream.tree}
    text = "".join(f'{key} = "{value}"\n' for key, value in pin.items())
    (root / "patches" / "upstream.toml").write_text(text, encoding="utf-8")
    (root / "patches" / "series").write_text("# order\n", encoding="utf-8")
    (root / "pyproject.toml").write_text("[project]\nname = 'fake'\n", encoding="utf-8")
    made = build.Project(root)
    made.downloads.mkdir(parents=True)
    shutil.copy2(upstream.archive, made.archive)
    return made


def commit_patch(
    project: Any, subject: str = "door : two is zwei", old: str = "two", new: str = "zwei"
) -> None:
    """Edit the source tree as a developer does: change a file and commit it."""
    file = project.src / "src" / "llama-graph.cpp"
    file.write_text(file.read_text(encoding="utf-8").replace(f"{old}\n", f"{new}\n"), encoding="utf-8")
    build.git(project.src, "commit", "-q", "-a", "-m", f"{subject}\n\n{MESSAGE}")


def with_series(project: Any) -> Any:
    """Give the project two exported patches and a pristine start."""
    build.prepare_source(project)
    commit_patch(project)
    commit_patch(project, "hook : five is funf", "five", "funf")
    build.export_patches(project)
    shutil.rmtree(project.src)
    (project.build / "state.json").unlink()
    return build.Project(project.root)


def no_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "setup", lambda project: None)


# ------------------------------------------------------------------------------------------------------ fetch


def test_cached_archive_is_used_without_pip(project: Any) -> None:
    assert build.fetch(project) == project.archive  # there is no .venv: pip could not have run


def test_cached_archive_with_another_hash_is_fetched_again(
    project: Any,
    upstream: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_setup(monkeypatch)
    project.archive.write_bytes(b"half a download")
    script(project.python, f'for last; do :; done; cp "{upstream.archive}" "$last"')
    assert build.file_sha256(build.fetch(project)) == upstream.sha256
    assert "another sha256" in capsys.readouterr().out


def test_failing_pip_says_so_and_the_next_run_works(
    project: Any, upstream: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_setup(monkeypatch)
    project.archive.unlink()
    script(project.python, 'echo "ERROR: No matching distribution found for fake-pkg==1.0"; exit 1')
    with pytest.raises(build.BuildError) as caught:
        build.fetch(project)
    assert "No matching distribution" in caught.value.what
    assert "check the network" in caught.value.next_step
    assert caught.value.log.read_text(encoding="utf-8").endswith("fake-pkg==1.0\n")
    assert list(project.downloads.iterdir()) == []
    script(project.python, f'for last; do :; done; cp "{upstream.archive}" "$last"')
    assert build.fetch(project) == project.archive


def test_pip_is_told_the_hash(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    no_setup(monkeypatch)
    project.archive.unlink()
    refuse = 'echo "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."; exit 1'
    script(project.python, f'while [ "$1" != -r ]; do shift; done; cat "$2"; {refuse}')
    with pytest.raises(build.BuildError, match="the index serves another") as caught:
        build.fetch(project)
    log = caught.value.log.read_text(encoding="utf-8")
    assert f"fake-pkg==1.0 --hash=sha256:{project.pin['sha256']}" in log


def test_archive_in_find_links_needs_nothing_beside_it(
    project: Any, upstream: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accident: with no index pip wanted the package's build tools before it gave the archive."""
    project.archive.unlink()
    monkeypatch.setenv("PIP_FIND_LINKS", f"/nonexistent file://{upstream.archive.parent}")
    assert build.file_sha256(build.fetch(project)) == upstream.sha256


# ------------------------------------------------------------------------------------------------ source tree


def test_source_tree_is_upstreams_own(project: Any) -> None:
    assert build.prepare_source(project) == project.pin["tree"]
    assert {name: (project.src / name).read_text(encoding="utf-8") for name in UPSTREAM} == UPSTREAM
    assert build.git(project.root, "status", "--porcelain", "--untracked-files=no") == ""


def test_wrong_tree_stops_and_the_next_run_works(project: Any) -> None:
    right = project.pin["tree"]
    project.pin["tree"] = "0" * 40
    with pytest.raises(build.BuildError, match="has the tree"):
        build.prepare_source(project)
    assert not project.src.exists()
    project.pin["tree"] = right
    assert build.prepare_source(project) == right


def test_local_source_is_copied_and_never_edited(project: Any, upstream: SimpleNamespace) -> None:
    project.archive.unlink()
    (upstream.checkout / "untracked.o").write_text("a build product", encoding="utf-8")
    before = build.tree_digest(upstream.checkout)
    assert build.prepare_source(project, upstream.checkout) == project.pin["tree"]
    assert build.tree_digest(upstream.checkout) == before


def test_local_source_must_be_a_checkout(project: Any, tmp_path: Path) -> None:
    for _ in range(2):  # before the source tree is made and after
        with pytest.raises(build.BuildError, match=r"is not a llama\.cpp checkout"):
            build.prepare_source(project, tmp_path)
        build.prepare_source(project)


def test_local_source_with_another_tree_is_refused(
    project: Any, upstream: SimpleNamespace, tmp_path: Path
) -> None:
    build.prepare_source(project)
    other = tmp_path / "other"
    shutil.copytree(upstream.checkout, other, ignore=shutil.ignore_patterns(".git", "*.o"))
    assert build.prepare_source(project, other) == project.pin["tree"]
    (other / "ggml" / "ggml.c").write_text("another version\n", encoding="utf-8")
    with pytest.raises(build.BuildError, match="has the tree") as caught:
        build.prepare_source(project, other)
    assert caught.value.next_step == "check out abc123 there"


def test_export_and_apply_give_the_same_tree(project: Any) -> None:
    project = with_series(project)
    assert (project.patches / "series").read_text(encoding="utf-8") == "# order\ndoor.patch\nhook.patch\n"
    assert build.prepare_source(project) == project.pin["patched_tree"] != project.pin["tree"]
    assert "zwei\nthree\nfour\nfunf\n" in (project.src / "src" / "llama-graph.cpp").read_text(
        encoding="utf-8"
    )
    subjects = build.git(project.src, "log", "--format=%s", "pristine..HEAD").split("\n")
    assert subjects == ["hook : five is funf", "door : two is zwei"]
    before = [patch.read_bytes() for patch in project.series()]
    build.export_patches(project)
    assert [patch.read_bytes() for patch in project.series()] == before


def test_commits_have_the_same_hashes_everywhere(project: Any) -> None:
    project = with_series(project)
    build.prepare_source(project)
    head = build.git(project.src, "rev-parse", "HEAD")
    shutil.rmtree(project.build / project.src.name)
    (project.build / "state.json").unlink()
    build.prepare_source(project)
    assert build.git(project.src, "rev-parse", "HEAD") == head


def test_a_changed_patch_touches_only_its_own_files(project: Any) -> None:
    project = with_series(project)
    build.prepare_source(project)
    os.utime(project.src / "ggml" / "ggml.c", (1, 1))
    build.git(project.src, "update-index", "--refresh")
    patch = project.patches / "hook.patch"
    patch.write_text(patch.read_text(encoding="utf-8").replace("funf", "cinq"), encoding="utf-8")
    build.prepare_source(project, check_tree=False)
    assert "cinq" in (project.src / "src" / "llama-graph.cpp").read_text(encoding="utf-8")
    assert (project.src / "ggml" / "ggml.c").stat().st_mtime == 1


def test_drifted_patch_is_named_and_leaves_the_tree_alone(project: Any) -> None:
    project = with_series(project)
    patch = project.patches / "hook.patch"
    good = patch.read_text(encoding="utf-8")
    patch.write_text(good.replace("-five", "-cinq"), encoding="utf-8")
    with pytest.raises(build.BuildError, match="patch hook does not apply to abc123: patch failed") as caught:
        build.prepare_source(project)
    assert "patch --edit" in caught.value.next_step
    assert build.git(project.src, "status", "--porcelain") == ""
    assert build.git(project.src, "rev-parse", "HEAD") == build.git(project.src, "rev-parse", "pristine")
    patch.write_text(good, encoding="utf-8")
    assert build.prepare_source(project) == project.pin["patched_tree"]


def test_hand_edited_patch_is_noticed(project: Any) -> None:
    project = with_series(project)
    patch = project.patches / "hook.patch"
    patch.write_text(patch.read_text(encoding="utf-8").replace("+funf", "+cinq"), encoding="utf-8")
    with pytest.raises(build.BuildError, match=r"the patches make the tree .*, upstream\.toml says"):
        build.prepare_source(project)


def test_patch_edit_leaves_a_drifted_patch_to_resolve(
    project: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """The accident: the series was applied on top of itself, and conflicted with its own lines."""
    project = with_series(project)
    build.prepare_source(project)
    patch = project.patches / "hook.patch"
    patch.write_text(patch.read_text(encoding="utf-8").replace("-five", "-cinq"), encoding="utf-8")
    build.patch_edit(project, None)
    assert "git am --continue" in capsys.readouterr().out
    assert build.git(project.src, "log", "--format=%s", "pristine..HEAD") == "door : two is zwei"
    build.git(project.src, "am", "--abort")
    commit_patch(project, "hook : five is funf", "five", "funf")
    build.export_patches(project)
    assert build.prepare_source(project) == project.pin["patched_tree"]


def test_edits_of_the_source_tree_are_built_and_kept(
    project: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    project = with_series(project)
    build.prepare_source(project)
    file = project.src / "ggml" / "ggml.c"
    file.write_text("gamma\n", encoding="utf-8")
    tree = build.prepare_source(project)
    assert tree not in (project.pin["tree"], project.pin["patched_tree"])
    assert "with the edits in it" in capsys.readouterr().out
    (project.patches / "series").write_text("door.patch\n", encoding="utf-8")
    with pytest.raises(build.BuildError, match=r"both .* and patches/ have changed"):
        build.prepare_source(project)
    with pytest.raises(build.BuildError, match="holds edits that no patch has"):
        build.clean(project, everything=False)
    assert file.read_text(encoding="utf-8") == "gamma\n"
    build.patch_discard(project)
    assert file.read_text(encoding="utf-8") == UPSTREAM["ggml/ggml.c"]


def test_interrupted_checkout_is_done_again(project: Any) -> None:
    project = with_series(project)
    build.prepare_source(project)
    state = project.state()["source"]
    project.record(source={**state, "pending": True})
    (project.src / "src" / "llama-graph.cpp").write_text("half of it", encoding="utf-8")
    (project.src / ".git" / "index.lock").touch()
    assert build.prepare_source(project) == project.pin["patched_tree"]
    assert build.git(project.src, "status", "--porcelain") == ""


def test_lost_state_costs_nothing_but_time(project: Any) -> None:
    project = with_series(project)
    build.prepare_source(project)
    (project.build / "state.json").write_text('{"source": {"inp', encoding="utf-8")
    assert project.state() == {}
    assert build.prepare_source(project) == project.pin["patched_tree"]


@pytest.mark.parametrize(
    ("subject", "body", "problem"),
    [
        ("door : fact", "Why: so\nKind: ours\nTouches: x\n", "lacks Remove-when"),
        ("No name", MESSAGE, "needs a subject"),
        ("fixup! door : fact", MESSAGE, "needs a subject"),
    ],
)
def test_export_refuses_a_commit_without_its_fields(
    project: Any, subject: str, body: str, problem: str
) -> None:
    build.prepare_source(project)
    build.git(project.src, "commit", "-q", "--allow-empty", "-m", f"{subject}\n\n{body}")
    with pytest.raises(build.BuildError, match=problem):
        build.export_patches(project)
    assert list(project.patches.glob("*.patch")) == []


def test_export_refuses_uncommitted_changes(project: Any) -> None:
    build.prepare_source(project)
    (project.src / "new.h").write_text("", encoding="utf-8")
    with pytest.raises(build.BuildError, match="uncommitted changes"):
        build.export_patches(project)


def test_a_repository_around_the_project_is_never_touched(project: Any) -> None:
    """The accident: git without a ceiling applied the series to the repository around the source tree."""
    (project.src).mkdir(parents=True)
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero"):
        build.git(project.src, "rev-parse", "HEAD")
    assert build.prepare_source(project) == project.pin["tree"]


# -------------------------------------------------------------------------------------------- what is on hand


def test_no_compiler_names_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(build.BuildError, match="no C compiler: looked for cc, gcc, clang") as caught:
        build.find_compiler({"PATH": str(tmp_path)})
    assert "apt-get install g++" in caught.value.next_step
    script(tmp_path / "cc", "echo fake cc 1")
    with pytest.raises(build.BuildError, match="no C\\+\\+17 compiler: looked for nonesuch"):
        build.find_compiler({"PATH": str(tmp_path), "CXX": "nonesuch"})


def test_compiler_id_is_what_the_compilers_say(tmp_path: Path) -> None:
    cc, cxx = (
        script(tmp_path / "cc", "echo fake cc 1"),
        script(tmp_path / "c++", "echo fake c++ 2; echo more"),
    )
    found = build.find_compiler({"PATH": str(tmp_path)})
    assert found == build.Compiler(str(cc), str(cxx), "fake cc 1 / fake c++ 2")


def test_broken_compiler_is_found_before_cmake_runs(tmp_path: Path) -> None:
    cxx = script(tmp_path / "c++", "exit 1")
    with pytest.raises(build.BuildError, match=r"does not compile a C\+\+17 program"):
        build.check_compiler(build.Compiler("cc", str(cxx), "old"))


def test_missing_python_headers_stop_before_the_long_compile(
    project: Any, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "python_headers", lambda: None)
    with pytest.raises(build.BuildError, match=r"Python\.h is not in"):
        build.build_all(project, build.Options(backend="cpu"), 2)
    assert fake_build == []


def fake_toolkit(root: Path) -> Path:
    """Make an nvcc that is a wrapper beside its real toolkit, as distributions install it."""
    (root / "toolkit" / "bin").mkdir(parents=True)
    dry = f'echo "#$ _HERE_={root}/toolkit/bin" >&2'
    text = f'case "$1" in --version) echo "release 13.0, V13";; *) {dry};; esac'
    return script(root / "wrapper" / "nvcc", text)


def test_cuda_parts_are_found_in_the_packages_of_pip(
    project: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_toolkit(tmp_path)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(sys, "path", [])
    assert build.find_cuda(project) == build.Cuda(nvcc, tmp_path / "toolkit", "13.0", None, None)
    wheel = project.venv / "lib" / "python3.11" / "site-packages" / "nvidia" / "cu13"
    for name in ("lib/libcublas.so.13", "include/cublas_v2.h"):
        (wheel / name).parent.mkdir(parents=True)
        (wheel / name).touch()
    found = build.find_cuda(project)
    assert (found.cublas, found.cublas_include) == (wheel / "lib" / "libcublas.so.13", wheel / "include")
    flags = build.cuda_flags(build.Options(backend="cuda", cuda_arch="90"), found)
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in flags
    assert f"-DCUDA_cublas_LIBRARY={found.cublas}" in flags


@pytest.mark.parametrize(
    ("toolkit", "arch", "backend"), [(False, "90", "cpu"), (True, None, "cpu"), (True, "90", "cuda")]
)
def test_auto_is_cuda_only_with_toolkit_and_device(
    project: Any, monkeypatch: pytest.MonkeyPatch, toolkit: bool, arch: str | None, backend: str
) -> None:
    cuda = build.Cuda(Path("nvcc"), Path("/t"), "13.0", Path("/t/libcublas.so"), Path("/t/include"))
    monkeypatch.setattr(build, "find_cuda", lambda project: cuda if toolkit else None)
    monkeypatch.setattr(build, "device_arch", lambda: arch)
    options, found = build.resolve_backend(project, build.Options())
    assert (options.backend, found) == (backend, cuda if backend == "cuda" else None)
    assert build.variant(options) == ("cuda-90" if backend == "cuda" else "cpu")


def test_asking_for_cuda_never_falls_back(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = build.Options(backend="cuda")
    whole = build.Cuda(Path("nvcc"), Path("/t"), "13.0", Path("/t/libcublas.so"), Path("/t/include"))
    monkeypatch.setattr(build, "device_arch", lambda: None)
    for cuda, message in (
        (None, "the CUDA toolkit"),
        (replace(whole, cublas=None), "cuBLAS"),
        (whole, "architecture is unknown"),
    ):
        monkeypatch.setattr(build, "find_cuda", lambda project, cuda=cuda: cuda)
        with pytest.raises(build.BuildError, match=message):
            build.resolve_backend(project, wanted)


# ------------------------------------------------------------------------------------------- running commands


def test_failed_command_shows_its_errors_log_and_next_step(project: Any) -> None:
    tool = script(project.build / "tool", 'echo "[1/2] cc a.c"; echo "a.c:3: error: no such thing"; exit 2')
    with pytest.raises(build.BuildError) as caught:
        build.run_logged(project, "demo", "compiling demo", [str(tool)], "fix a.c")
    assert caught.value.what == "compiling demo failed (exit status 2):\n    a.c:3: error: no such thing"
    assert caught.value.next_step == "fix a.c"
    assert caught.value.log == project.logs / "demo.log"


def test_full_disk_of_a_command_is_said_as_such(project: Any) -> None:
    tool = script(project.build / "tool", 'echo "fatal error: writing a.o: No space left on device"; exit 1')
    with pytest.raises(build.BuildError, match="the disk is full"):
        build.run_logged(project, "demo", "compiling demo", [str(tool)], "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_of_our_own_is_said_as_such(
    project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project.logs.mkdir()
    (project.logs / "pip.log").symlink_to("/dev/full")
    script(project.python, f'case "$1" in -c) echo "{sys.version}";; *) exit 0;; esac')
    assert build.main(["setup"], project.root) == 1
    assert "build.py: the disk is full" in capsys.readouterr().err
    (project.logs / "pip.log").unlink()
    assert build.main(["setup"], project.root) == 0


def test_unexpected_os_error_is_one_message(
    project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(project: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere")

    monkeypatch.setattr(build, "setup", refuse)
    assert build.main(["setup"], project.root) == 1
    assert capsys.readouterr().err == (
        "build.py: Permission denied: /somewhere\n"
        "  next: check the path and its permissions, then run the same command again\n"
    )


def slow_clone(project: Any) -> Path:
    """Give the fake clone a real build.py and a pip that says `started` and then takes its time."""
    shutil.copy2(ROOT / "build.py", project.root / "build.py")
    slow = f'echo $$ > "{project.root}/pip.pid"; [ -e "{project.root}/fast" ] || exec sleep 60'
    script(project.python, f'case "$1" in -c) echo "{sys.version}";; *) {slow};; esac')
    return project.root / "pip.pid"


def wait_for(path: Path) -> str:
    for _ in range(200):
        if path.exists() and path.read_text(encoding="utf-8"):
            return path.read_text(encoding="utf-8")
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def start(project: Any, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(project.root / "build.py"), command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_interrupt_ends_with_one_line_and_the_next_run_works(project: Any) -> None:
    pid_file = slow_clone(project)
    run = start(project, "setup")
    child = int(wait_for(pid_file))
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130
    assert errors == "\nbuild.py: interrupted; run the same command again to go on\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    (project.root / "fast").touch()
    run = start(project, "setup")
    assert run.communicate(timeout=30)[1] == ""
    assert run.returncode == 0


def test_of_two_at_once_one_waits(project: Any) -> None:
    pid_file = slow_clone(project)
    first = start(project, "setup")
    child = int(wait_for(pid_file))
    second = start(project, "setup")
    assert second.stdout is not None
    assert "waiting for it" in second.stdout.readline()
    (project.root / "fast").touch()
    os.kill(child, signal.SIGKILL)
    assert "failed (exit status -9)" in first.communicate(timeout=30)[1]
    assert second.communicate(timeout=30)[1] == ""
    assert second.returncode == 0


def test_progress_says_how_far_and_how_long() -> None:
    out = io.StringIO()
    progress = build.Progress("compiling", out)
    progress.start -= 60
    progress.pause = 0.0
    for step in range(1, 21):
        progress.update(f"[{step}/20] cc x.c\n")
    progress.done()
    lines = out.getvalue().splitlines()
    assert lines[0] == "compiling ..."
    assert lines[1] == "  compiling: 2 of 20, 1:00, about 9:00 left"
    assert lines[-1] == "compiling: done in 1:00"
    assert len(lines) == 12


# ------------------------------------------------------------------------------------------- the command line


def test_flags_after_the_dashes_belong_to_the_program() -> None:
    args, rest = build.parse(["run", "--jobs", "3", "--", "-p", "Once", "--", "x"])
    assert (args.command, args.jobs, rest) == ("run", 3, ["-p", "Once", "--", "x"])
    with pytest.raises(SystemExit):
        build.parse(["setup", "--", "x"])


def test_run_and_test_go_on_with_the_last_build(project: Any) -> None:
    decided = {"backend": "cuda", "cuda_arch": "90", "native": False, "ui": False}
    build.write_atomically(project.build / "active.json", json.dumps({"options": decided}))

    def chosen(*argv: str) -> Any:
        return build.chosen_options(project, build.parse(list(argv))[0])

    assert chosen("test") == build.Options(backend="cuda", cuda_arch="90")
    assert chosen("run", "--native") == build.Options(backend="cuda", cuda_arch="90", native=True)
    assert chosen("test", "--backend", "cpu") == build.Options(backend="cpu")
    assert chosen("build") == build.Options()


def test_old_python_is_told_which_is_needed(
    project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "PYTHON_MIN", (99, 0))
    assert build.main(["setup"], project.root) == 1
    assert "build.py: needs Python 99.0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- the builds


@pytest.fixture
def fake_build(project: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the long commands by ones that leave their products; return the names of those that ran."""
    ran: list[str] = []
    (project.native / "tests").mkdir(parents=True)
    (project.native / "fate.h").write_text("int fate(void);\n", encoding="utf-8")
    (project.native.parent / "_build_ffi.py").write_text("make it\n", encoding="utf-8")

    def run(project: Any, name: str, title: str, command: list[str], *rest: Any) -> None:
        ran.append(name)
        for made in {
            "pip": [project.python],
            "llama-cpu-build": [
                *(project.build / "llama-cpu" / "bin" / name for name in build.TARGETS),
            ],
            "native-cpu-build": [project.build / "native-cpu" / "libfate.so"],
            "extension": [project.native.parent / "_fate.abi3.so"],
        }.get(name, []):
            made.parent.mkdir(parents=True, exist_ok=True)
            made.touch()

    monkeypatch.setattr(build, "run_logged", run)
    monkeypatch.setattr(build, "find_compiler", lambda: build.Compiler("cc", "c++", "fake 1"))
    monkeypatch.setattr(build, "check_compiler", lambda compiler: None)
    monkeypatch.setattr(build, "has_openssl", lambda compiler: False)
    return ran


ALL = ["llama-cpu-configure", "llama-cpu-build", "native-cpu-configure", "native-cpu-build", "extension"]


def test_second_build_does_nothing(project: Any, fake_build: list[str]) -> None:
    cpu = build.Options(backend="cpu")
    build.build_all(project, cpu, 2)
    assert fake_build == ["venv", "pip", *ALL]
    fake_build.clear()
    build.build_all(project, cpu, 2)
    assert fake_build == []


def test_our_native_code_never_recompiles_llama(project: Any, fake_build: list[str]) -> None:
    cpu = build.Options(backend="cpu")
    build.build_all(project, cpu, 2)
    first = json.loads((project.build / "active.json").read_text(encoding="utf-8"))["build_id"]
    fake_build.clear()
    (project.native / "tests" / "test_rule.cpp").write_text("int main() {}\n", encoding="utf-8")
    build.build_all(project, cpu, 2)
    assert fake_build == []
    (project.native / "fate.h").write_text("int fate(int);\n", encoding="utf-8")
    build.build_all(project, cpu, 2)
    assert fake_build == ALL[2:]
    assert json.loads((project.build / "active.json").read_text(encoding="utf-8"))["build_id"] != first


def test_a_product_that_is_missing_is_made_again(project: Any, fake_build: list[str]) -> None:
    cpu = build.Options(backend="cpu")
    build.build_all(project, cpu, 2)
    for product, stages in (
        (project.build / "llama-cpu" / "bin" / "llama-cli", ALL[:2]),
        (project.build / "native-cpu" / "libfate.so", ALL[2:4]),
        (project.native.parent / "_fate.abi3.so", ALL[4:]),
    ):
        fake_build.clear()
        product.unlink()
        build.build_all(project, cpu, 2)
        assert fake_build == stages


def test_an_older_stamp_does_not_cover_an_interrupted_build(
    project: Any, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accident: a folder was emptied, Ctrl-C stopped its build, the old stamp said it was whole."""
    run, cpu = build.run_logged, build.Options(backend="cpu")
    build.build_all(project, cpu, 2)
    shutil.rmtree(project.build / "llama-cpu")

    def interrupt(project: Any, name: str, *rest: Any) -> None:
        run(project, name, *rest)
        if name == "llama-cpu-build":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "run_logged", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build.build_all(project, cpu, 2)
    fake_build.clear()
    build.build_all(project, cpu, 2)
    assert fake_build == ALL[:2]


def test_a_build_that_failed_is_tried_again(
    project: Any, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build.run_logged

    def fail(project: Any, name: str, *rest: Any) -> None:
        if name == "llama-cpu-build":
            raise build.BuildError("compile error", "fix it")
        run(project, name, *rest)

    cpu = build.Options(backend="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(build, "run_logged", fail)
        with pytest.raises(build.BuildError, match="compile error"):
            build.build_all(project, cpu, 2)
    fake_build.clear()
    build.build_all(project, cpu, 2)
    assert fake_build == ALL


def test_clean_keeps_the_download_and_the_environment(project: Any, fake_build: list[str]) -> None:
    build.build_all(project, build.Options(backend="cpu"), 2)
    build.clean(project, everything=False)
    assert sorted(path.name for path in project.build.iterdir()) == ["downloads", "state.json"]
    assert list(project.native.parent.glob("_fate*.so")) == []
    fake_build.clear()
    build.build_all(project, build.Options(backend="cpu"), 2)
    assert fake_build == ALL
    build.clean(project, everything=True)
    assert list(project.build.iterdir()) == []
    assert not project.venv.exists()


def test_doctor_says_what_is_missing_for_what(
    project: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "find_cuda", lambda project: None)
    monkeypatch.setattr(build, "has_openssl", lambda compiler: False)
    build.doctor(project)
    out = capsys.readouterr().out
    assert "OpenSSL        missing: no -hf downloads" in out
    assert "CUDA toolkit   missing: no GPU build" in out
    assert "build id       missing: run `python build.py build`" in out


@pytest.mark.native
def test_compile_error_is_shown_and_the_next_run_works(project: Any) -> None:
    for name in ("cmake", "ninja"):
        project.python.parent.mkdir(parents=True, exist_ok=True)
        Path(project.tool(name)).symlink_to(Path(sys.executable).with_name(name))
    source = project.root / "tiny"
    source.mkdir()
    cmake = "cmake_minimum_required(VERSION 3.18)\nproject(tiny CXX)\nadd_executable(tiny tiny.cpp)\n"
    (source / "CMakeLists.txt").write_text(cmake, encoding="utf-8")
    (source / "tiny.cpp").write_text("int main() { return none; }\n", encoding="utf-8")
    arguments = (project, "tiny", source, project.build / "tiny", [], ["tiny"], 1)
    with pytest.raises(build.BuildError, match=r"compiling tiny failed.*\n.*error: .*none") as caught:
        build.cmake_build(*arguments)
    assert caught.value.log == project.logs / "tiny-build.log"
    (source / "tiny.cpp").write_text("int main() { return 0; }\n", encoding="utf-8")
    build.cmake_build(*arguments)
    assert subprocess.run([project.build / "tiny" / "tiny"], check=False).returncode == 0
