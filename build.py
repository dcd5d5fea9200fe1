#!/usr/bin/env python3
"""Take a bare clone to a compiled, patched and verified library; run it and test it. Standard library only.

    python build.py run  [-- flags of llama-completion and --fate-*]
    python build.py test [-- flags of pytest]
    python build.py setup | fetch | build | patch | export-patches | doctor | clean

Everything made here lies in `.venv/` and `build/`. Each stage leaves a stamp of its inputs in
`build/state.json` once it is whole, so a run with nothing changed does nothing, and an interrupted one goes
on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, NoReturn

PYTHON_MIN = (3, 11)
TOOLS = ("cmake>=4.0", "ninja>=1.11", "setuptools>=77")  # setuptools: cffi compiles with it
PROGRAMS = ("completion", "cli", "server", "bench", "perplexity", "quantize")
TARGETS = (
    "llama",
    "llama-common",
    *(f"llama-{name}" for name in PROGRAMS),
    "llama-gguf-split",
    "test-llama-archs",
)
PATCH_FIELDS = ("Why", "Kind", "Remove-when", "Touches")
AUTHOR, DATE = (
    ("FATE", "fate@localhost"),
    "2026-01-01T00:00:00+00:00",
)  # fixed, so that commits have fixed hashes
MBOX = "From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001\n"


class BuildError(Exception):
    """Say what failed, where the log is and what to do next."""

    def __init__(self, what: str, next_step: str, log: Path | None = None) -> None:
        super().__init__(what)
        self.what, self.next_step, self.log = what, next_step, log


@dataclass(frozen=True)
class Options:
    """What the last `build` decided; `run` and `test` go on with it."""

    backend: str = "auto"
    cuda_arch: str | None = None
    native: bool = False
    ui: bool = False


@dataclass(frozen=True)
class Compiler:
    c: str
    cxx: str
    id: str


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit and where each of its parts came from; None for a part that was not found."""

    nvcc: Path
    root: Path
    version: str
    cublas: Path | None
    cublas_include: Path | None


class Project:
    """The paths of one checkout, its pin of llama.cpp and the stamps of what is built."""

    def __init__(self, root: Path) -> None:
        import tomllib

        self.root = root
        self.build = root / "build"
        self.downloads = self.build / "downloads"
        self.logs = self.build / "logs"
        self.venv = root / ".venv"
        self.python = self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.patches = root / "patches"
        self.native = root / "fate_bind" / "native"
        self.pin: dict[str, str] = tomllib.loads((self.patches / "upstream.toml").read_text(encoding="utf-8"))
        self.src = self.build / f"src-{self.pin['commit']}"
        self.archive = (
            self.downloads / f"{self.pin['package'].replace('-', '_')}-{self.pin['version']}.tar.gz"
        )

    def tool(self, name: str) -> str:
        return str(self.python.with_name(name + (".exe" if os.name == "nt" else "")))

    def series(self) -> list[Path]:
        lines = (self.patches / "series").read_text(encoding="utf-8").splitlines()
        return [self.patches / line.strip() for line in lines if line.strip() and not line.startswith("#")]

    def state(self) -> dict[str, Any]:
        try:
            found = json.loads((self.build / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # never written, or torn by a crash: every stage checks itself again
            return {}
        return found if isinstance(found, dict) else {}

    def record(self, **stages: Any) -> None:
        write_atomically(self.build / "state.json", json.dumps({**self.state(), **stages}, indent=1))

    @contextlib.contextmanager
    def stage(self, name: str, stamp: str) -> Iterator[None]:
        """Leave the stamp only if the body ends well; an older one is gone before it starts."""
        self.record(**{name: None})
        yield
        self.record(**{name: stamp})


# ------------------------------------------------------------------------------------------------ small tools


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8", newline="\n")
    new.replace(path)


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_digest(folder: Path, skip: Sequence[str] = ()) -> str:
    """Hash names and contents of all files below `folder`, without the folders named in `skip`."""
    files = (path for path in folder.rglob("*") if path.is_file())
    kept = sorted(path for path in files if not set(path.relative_to(folder).parts) & set(skip))
    return digest(*(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}" for path in kept))


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def note(text: str) -> None:
    print(text, flush=True)


def answer(*command: str, timeout: float = 60, stdin: str | None = None) -> str | None:
    """Return what a short command printed, or None if it is missing or failed."""
    try:
        done = subprocess.run(
            command,
            input=stdin or "",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout + done.stderr if done.returncode == 0 else None


class Progress:
    """One line that says what runs, how far it is and how long it takes; off a terminal one each 10 %."""

    pause = 5.0  # seconds at least between two lines

    def __init__(self, title: str, out: IO[str] | None = None) -> None:
        self.title, self.out = title, out or sys.stdout
        self.start = self.written = time.monotonic()
        self.tenth, self.tty = 0, self.out.isatty()
        if not self.tty:
            self._write(f"{title} ...\n")

    def update(self, line: str) -> None:
        elapsed = time.monotonic() - self.start
        if step := re.match(r"\[(\d+)/(\d+)\]", line):
            done, total = int(step[1]), int(step[2])
            left = f", about {clock(elapsed / done * (total - done))} left" if done else ""
            text = f"{self.title}: {done} of {total}, {clock(elapsed)}{left}"
            late = time.monotonic() - self.written >= self.pause
            if not self.tty and late and done * 10 // total > self.tenth:
                self.tenth, self.written = done * 10 // total, time.monotonic()
                self._write(f"  {text}\n")
        else:
            text = f"{self.title}: {clock(elapsed)}  {line.strip()}"
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            self._write(f"\r{text[:width]:<{width}}")

    def done(self, how: str = "done") -> None:
        if self.tty:
            self._write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
        self._write(f"{self.title}: {how} in {clock(time.monotonic() - self.start)}\n")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def run_logged(
    project: Project,
    name: str,
    title: str,
    command: Sequence[str],
    next_step: str,
    env: dict[str, str] | None = None,
) -> None:
    """Run one long command with its output in `build/logs/NAME.log`; raise BuildError if it fails."""
    project.logs.mkdir(parents=True, exist_ok=True)
    log = project.logs / f"{name}.log"
    progress = Progress(title)
    with log.open("w", encoding="utf-8") as out:
        out.write(f"$ {' '.join(command)}\n")
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, **(env or {})},
                cwd=project.root,
            )
        except OSError as error:
            raise BuildError(
                f"{title}: cannot start {command[0]}: {error.strerror}", next_step, log
            ) from error
        assert process.stdout is not None
        try:
            for line in process.stdout:
                out.write(line)
                progress.update(line)
            status = process.wait()
        except BaseException:  # Ctrl-C or a full disk: do not leave the child behind
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            raise
    progress.done("done" if status == 0 else "failed")
    if status:
        raise failed_command(title, status, log, next_step)


def failed_command(title: str, status: int, log: Path, next_step: str) -> BuildError:
    """Make the error of a failed command from its log: the first lines that name an error."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if "No space left on device" in text:
        return disk_full(log)
    lines = text.splitlines()
    telling = [
        line for line in lines if re.search(r"\berror\b|\bfatal\b|CMake Error|ERROR:", line, re.IGNORECASE)
    ]
    shown = "\n    ".join(line.strip()[:300] for line in (telling[:4] or lines[-4:]))
    return BuildError(f"{title} failed (exit status {status}):\n    {shown}", next_step, log)


def disk_full(log: Path | None = None) -> BuildError:
    return BuildError(
        "the disk is full (a CPU build needs about 3 GB, the tests 2 GB more)",
        "free some space and run the same command again: it goes on where it stopped",
        log,
    )


@contextlib.contextmanager
def locked(project: Project) -> Iterator[None]:
    """Hold `build/.lock`, so that of two build.py at once one waits. No lock where fcntl is missing."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    project.build.mkdir(parents=True, exist_ok=True)
    with (project.build / ".lock").open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("another build.py is at work in this checkout; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -------------------------------------------------------------------------------------------- setup and fetch


def setup(project: Project) -> None:
    """Make `.venv` with our packages (editable), their test tools, cmake and ninja; or do nothing."""
    inputs = digest(
        (project.root / "pyproject.toml").read_text(encoding="utf-8"), TOOLS, sys.version, project.root
    )
    if project.state().get("setup") == inputs and project.python.exists():
        return
    with project.stage("setup", inputs):
        version = answer(str(project.python), "-c", "import pip, sys; print(sys.version)")
        if version is None or version.strip() != sys.version.strip():
            base = getattr(sys, "_base_executable", sys.executable)
            hint = "install the venv module (Debian, Ubuntu: apt-get install python3-venv) and run again"
            run_logged(
                project, "venv", "making .venv", [base, "-m", "venv", "--clear", str(project.venv)], hint
            )
        command = [str(project.python), "-m", "pip", "install", "--disable-pip-version-check"]
        command += ["-e", f"{project.root}[lab,test]", *TOOLS]
        hint = "check the network or the index that `pip config list` shows, then run the same command again"
        run_logged(project, "pip", "installing packages", command, hint, {"PIP_USER": "0"})


def fetch(project: Project) -> Path:
    """Return the pinned archive, its sha256 checked; ask pip for it only if it is not in build/downloads."""
    pin, archive = project.pin, project.archive
    requirement = f"{pin['package']}=={pin['version']}"
    by_hand = f"or put {archive.name} into {archive.parent}, or build with --source CHECKOUT"
    if archive.exists():
        if file_sha256(archive) == pin["sha256"]:
            return archive
        note(f"{archive} has another sha256 than upstream.toml says; fetching it again")
        archive.unlink()
    project.downloads.mkdir(parents=True, exist_ok=True)
    for folder in os.environ.get("PIP_FIND_LINKS", "").split():  # pip would also want its build tools there
        local = Path(folder.removeprefix("file://")) / archive.name
        if local.is_file() and file_sha256(local) == pin["sha256"]:
            shutil.copy2(local, archive)
            return archive
    setup(project)
    with tempfile.TemporaryDirectory(dir=project.downloads) as folder:
        wanted = Path(folder) / "requirements.txt"
        wanted.write_text(f"{requirement} --hash=sha256:{pin['sha256']}\n", encoding="utf-8")
        command = [str(project.python), "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", pin["package"], "--require-hashes", "-r", str(wanted), "-d", folder]
        hint = f"check the network or the index that `pip config list` shows and run again; {by_hand}"
        try:
            run_logged(project, "fetch", f"fetching {requirement}", command, hint)
        except BuildError as error:
            if error.log and "DO NOT MATCH THE HASHES" in error.log.read_text(
                encoding="utf-8", errors="replace"
            ):
                what = f"the index serves another {requirement} than the pinned one (sha256 {pin['sha256']})"
                raise BuildError(what, f"use another package index; {by_hand}", error.log) from error
            raise
        found = list(Path(folder).glob("*.tar.gz"))
        if len(found) != 1 or file_sha256(found[0]) != pin["sha256"]:
            raise BuildError(f"pip fetched {[path.name for path in found]}, not {archive.name}", hint)
        found[0].replace(archive)
    return archive


# ------------------------------------------------------------------------------------ the patched source tree


def git(repo: Path, *args: str, index: Path | None = None, stdin: str | None = None) -> str:
    """Run git in `repo` alone: no user's configuration, no repository around it, fixed author and date.

    Raises subprocess.CalledProcessError with git's own words in `stderr`.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {
        "GIT_CEILING_DIRECTORIES": str(repo.parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
    }
    env |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_NAME": AUTHOR[0], f"GIT_{who}_EMAIL": AUTHOR[1], f"GIT_{who}_DATE": DATE}
    if index:
        env["GIT_INDEX_FILE"] = str(index)
    done = subprocess.run(
        ["git", *args], cwd=repo, env=env, input=(stdin or "").encode(), capture_output=True, check=False
    )
    if done.returncode:
        raise subprocess.CalledProcessError(
            done.returncode, ["git", *args], stderr=done.stderr.decode(errors="replace")
        )
    return done.stdout.decode(errors="replace").rstrip("\n")


def unpack(project: Project, source: Path | None, target: Path) -> None:
    """Put llama.cpp's files into the empty folder `target`, from the archive or from a local checkout."""
    if source is None:
        with tarfile.open(fetch(project)) as archive:
            if hasattr(tarfile, "data_filter"):
                archive.extraction_filter = tarfile.data_filter
            prefix = f"{project.archive.name.removesuffix('.tar.gz')}/{project.pin['folder']}/"
            for member in archive:
                if member.name.startswith(prefix) and member.name != prefix + ".git":  # .git: a dangling file
                    member.name = member.name.removeprefix(prefix)
                    archive.extract(member, target)
        return
    if not (source / "src" / "llama-graph.cpp").is_file():
        raise BuildError(
            f"--source {source} is not a llama.cpp checkout", "name the folder that holds src/ and ggml/"
        )
    if (source / ".git").exists():
        try:
            names = git(source, "-c", f"safe.directory={source}", "ls-files", "-z").split("\0")
        except subprocess.CalledProcessError:
            names = []
    else:
        names = []
    for name in filter(None, names):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, target / name, follow_symlinks=False)
    if not names:
        shutil.copytree(
            source, target, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git")
        )


def make_pristine(project: Project, source: Path | None) -> None:
    """Make `build/src-COMMIT` with upstream's files as its one commit, tagged `pristine`."""
    pin, new = project.pin, project.src.with_name(project.src.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    progress = Progress(f"unpacking llama.cpp {pin['commit']}")
    unpack(project, source, new)
    git(new, "init", "-q")
    git(new, "symbolic-ref", "HEAD", "refs/heads/fate")
    git(new, "add", "-A", "-f")
    tree = git(new, "write-tree")
    if tree != pin["tree"]:
        raise BuildError(
            f"{source or project.archive} has the tree {tree}, upstream.toml says {pin['tree']}",
            f"check out {pin['commit']} there" if source else f"delete {project.archive} and run again",
        )
    git(new, "reset", "-q", "--hard", git(new, "commit-tree", tree, stdin=f"llama.cpp {pin['commit']}\n"))
    git(new, "tag", "pristine")
    if (project.src / ".git").exists():
        shutil.rmtree(new)
    else:
        shutil.rmtree(project.src, ignore_errors=True)
        new.replace(project.src)
    progress.done()


def patch_message(patch: Path) -> str:
    """Return the commit message that a .patch file carries: subject, blank line, body."""
    head, _, body = patch.read_text(encoding="utf-8").partition("\n\n")
    subject = re.search(r"^Subject: (.*(?:\n[ \t].*)*)", head, re.MULTILINE)
    if not subject:
        raise BuildError(
            f"{patch.name} has no Subject line", "restore it from git: it is made by export-patches"
        )
    return (
        re.sub(r"\s+", " ", subject[1])
        + "\n\n"
        + re.split(r"^---$|^diff --git ", body, flags=re.MULTILINE)[0]
    )


def patch_fields(message: str) -> dict[str, str]:
    """Return the `Key: value` fields of a patch's message; a value goes on until the next key."""
    found = re.split(r"^([A-Z][A-Za-z-]*):[ \t]*", message, flags=re.MULTILINE)[1:]
    return {key: " ".join(value.split()) for key, value in zip(found[::2], found[1::2], strict=True)}


def apply_series(project: Project) -> tuple[str, str]:
    """Make one commit a patch on top of `pristine` without touching the files; return (commit, tree)."""
    commit, tree = git(project.src, "rev-parse", "pristine^{commit}"), project.pin["tree"]
    with tempfile.TemporaryDirectory(dir=project.build) as folder:
        index = Path(folder) / "index"
        git(project.src, "read-tree", commit, index=index)
        for patch in project.series():
            edit = (
                "run `python build.py patch --edit`, which leaves the conflict in the source tree to resolve"
            )
            try:
                git(project.src, "apply", "--cached", "--whitespace=nowarn", str(patch), index=index)
            except subprocess.CalledProcessError as error:
                why = error.stderr.strip().splitlines()[0] if error.stderr.strip() else "no reason given"
                why = why.removeprefix("error: ")
                what = f"patch {patch.stem} does not apply to {project.pin['commit']}: {why}"
                raise BuildError(what, edit) from error
            tree = git(project.src, "write-tree", index=index)
            commit = git(project.src, "commit-tree", tree, "-p", commit, stdin=patch_message(patch))
    return commit, tree


def series_inputs(project: Project) -> str:
    pin = {key: value for key, value in project.pin.items() if key != "licence"}
    return digest(pin, *(f"{patch.name} {patch.read_bytes()!r}" for patch in project.series()))


def edited(project: Project) -> bool:
    """Tell whether the source tree holds edits that no patch has: other commits or changed files."""
    state = project.state().get("source", {})
    if not (project.src / ".git").exists() or state.get("pending"):
        return False
    head = git(project.src, "rev-parse", "HEAD")
    known = {state.get("head"), git(project.src, "rev-parse", "pristine^{commit}")}
    return head not in known or bool(git(project.src, "status", "--porcelain"))


def prepare_source(project: Project, source: Path | None = None, check_tree: bool = True) -> str:
    """Bring `build/src-COMMIT` to upstream plus the series; return its tree hash.

    Edits made there by hand are never overwritten: they are built as they are.
    """
    inputs, state = series_inputs(project), project.state().get("source", {})
    made = (project.src / ".git").exists()
    if source or not made:
        make_pristine(project, source)  # where the tree is made already, a --source is only checked
        state = state if made else {}
    if edited(project):
        if state and state["inputs"] != inputs:
            raise BuildError(
                f"both {project.src} and patches/ have changed",
                "run `python build.py export-patches` (keeps the tree) or `patch --discard` (keeps patches/)",
            )
        note(f"building {project.src} with the edits in it (export-patches makes them patches)")
        return edited_tree(project)
    if state.get("inputs") == inputs and not state.get("pending"):
        return str(state["tree"])
    head, tree = apply_series(project)
    if check_tree and tree != project.pin["patched_tree"]:
        raise BuildError(
            f"the patches make the tree {tree}, upstream.toml says {project.pin['patched_tree']}",
            "restore patches/ from git, or run `python build.py patch --edit` and then `export-patches`",
        )
    reset_source(project, head, tree, inputs)
    return tree


def reset_source(project: Project, head: str, tree: str, inputs: str) -> None:
    """Check out `head`. The stamp says `pending` meanwhile, so that an interrupted one is done again."""
    project.record(source={"inputs": inputs, "head": head, "tree": tree, "pending": True})
    (project.src / ".git" / "index.lock").unlink(missing_ok=True)
    git(project.src, "reset", "-q", "--hard", head)
    project.record(source={"inputs": inputs, "head": head, "tree": tree})


def edited_tree(project: Project) -> str:
    with tempfile.TemporaryDirectory(dir=project.build) as folder:
        index = Path(folder) / "index"
        shutil.copy2(project.src / ".git" / "index", index)
        git(project.src, "add", "-A", index=index)
        return git(project.src, "write-tree", index=index)


def patch_edit(project: Project, source: Path | None) -> None:
    """Leave the source tree ready for editing, with one commit a patch."""
    try:
        prepare_source(project, source, check_tree=False)
    except BuildError as error:
        if "does not apply" not in error.what:
            raise
        note(f"{error.what}\napplying the series with `git am -3` instead")
        git(project.src, "reset", "-q", "--hard", "pristine")
        try:
            git(project.src, "am", "-3", "--keep-non-patch", *(str(patch) for patch in project.series()))
        except subprocess.CalledProcessError as stop:
            note(stop.stderr.strip())
            note(f"resolve it in {project.src}, `git add` the files and `git am --continue`")
    note(
        f"edit {project.src}: one commit a patch, subject `name : fact`, body {', '.join(PATCH_FIELDS)}.\n"
        "To change a patch: `git commit --fixup COMMIT`, then `git rebase -i --autosquash pristine`.\n"
        "Then: python build.py export-patches (keep) or python build.py patch --discard (throw away)"
    )


def patch_discard(project: Project) -> None:
    """Throw away all edits of the source tree."""
    if not (project.src / ".git").exists():
        return
    with contextlib.suppress(subprocess.CalledProcessError):  # there may be no `git am` to stop
        git(project.src, "am", "--abort")
    git(project.src, "clean", "-q", "-f", "-d")
    reset_source(project, *apply_series(project), series_inputs(project))
    note(f"{project.src} is upstream plus the series again")


def export_patches(project: Project) -> None:
    """Write one .patch for each commit of the source tree, the series, and the patched tree's hash."""
    if not (project.src / ".git").exists():
        raise BuildError(
            f"there is no {project.src} to export from", "run `python build.py patch --edit` first"
        )
    if git(project.src, "status", "--porcelain"):
        raise BuildError(f"{project.src} has uncommitted changes", "commit them there, then export again")
    written: dict[str, str] = {}
    for commit in git(project.src, "rev-list", "--reverse", "pristine..HEAD").split():
        message = git(project.src, "log", "-1", "--format=%B", commit).strip()
        subject, _, body = message.partition("\n")
        name = subject.partition(":")[0].strip()
        missing = [field for field in PATCH_FIELDS if not patch_fields(message).get(field)]
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or name in written or missing:
            problem = (
                f"lacks {', '.join(missing)}" if missing else "needs a subject `name : fact`, each name once"
            )
            next_step = f"reword it in {project.src} (git rebase -i --autosquash pristine) and export again"
            raise BuildError(f"commit {commit[:10]} ({subject}) {problem}", next_step)
        diff = git(project.src, "diff", "--full-index", "--no-renames", "--no-color", f"{commit}^", commit)
        headers = (
            f"From: {AUTHOR[0]} <{AUTHOR[1]}>\nDate: Thu, 1 Jan 2026 00:00:00 +0000\nSubject: {subject}\n"
        )
        written[name] = f"{MBOX}{headers}\n{body.strip()}\n---\n{diff}\n"
    for old in project.patches.glob("*.patch"):
        if old.stem not in written:
            old.unlink()
    for name, text in written.items():
        write_atomically(project.patches / f"{name}.patch", text)
    series = project.patches / "series"
    comments = [line for line in series.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    write_atomically(series, "\n".join([*comments, *(f"{name}.patch" for name in written)]) + "\n")
    pin = project.patches / "upstream.toml"
    tree = git(project.src, "rev-parse", "HEAD^{tree}")
    text = re.sub(
        r'^patched_tree = ".*"$', f'patched_tree = "{tree}"', pin.read_text(encoding="utf-8"), flags=re.M
    )
    write_atomically(pin, text)
    project.pin["patched_tree"] = tree
    head, again = apply_series(project)
    if again != tree:
        raise BuildError(
            f"the exported patches make the tree {again}, not {tree}", "this is a bug in export_patches"
        )
    reset_source(project, head, tree, series_inputs(project))
    note(f"wrote {len(written)} patches; patched tree {tree}")


# -------------------------------------------------------------------------------------------- what is on hand


def find_compiler(env: dict[str, str] | None = None) -> Compiler:
    """Return the C and C++ compilers (CC and CXX first), or raise BuildError with what to install."""
    env = dict(os.environ) if env is None else env
    found: list[str] = []
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        wanted = (env[variable],) if env.get(variable) else names
        paths = [path for name in wanted if (path := shutil.which(name, path=env.get("PATH", "")))]
        if not paths:
            raise BuildError(
                f"no {'C' if variable == 'CC' else 'C++17'} compiler: looked for {', '.join(wanted)}",
                "install one (Debian, Ubuntu: apt-get install g++; Fedora: gcc-c++) or set CC and CXX",
            )
        found.append(paths[0])
    versions = [(answer(path, "--version") or "unknown").splitlines()[0] for path in found]
    return Compiler(found[0], found[1], " / ".join(versions))


def check_compiler(compiler: Compiler) -> None:
    program = "#include <filesystem>\n#include <string_view>\nint main() { if constexpr (true) return 0; }\n"
    if answer(compiler.cxx, "-std=c++17", "-x", "c++", "-fsyntax-only", "-", stdin=program) is None:
        raise BuildError(
            f"{compiler.cxx} ({compiler.id}) does not compile a C++17 program",
            "install a newer compiler with its standard library, or set CC and CXX to one",
        )


def check_git() -> None:
    if answer("git", "--version") is None:
        raise BuildError("git is missing", "install it (Debian, Ubuntu: apt-get install git) and run again")


def python_headers() -> Path | None:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return header if header.exists() else None


def check_python_headers() -> None:
    """Stop before the long compile, not after it, where the Python extension could not be compiled."""
    if python_headers() is None:
        raise BuildError(
            f"Python.h is not in {sysconfig.get_path('include')}",
            "install the headers of this Python (Debian, Ubuntu: apt-get install python3-dev) and run again",
        )


def has_openssl(compiler: Compiler) -> bool:
    """Tell whether the compiler sees OpenSSL, without compiling: this is asked on every run."""
    header = "#if !__has_include(<openssl/ssl.h>)\n#error\n#endif\n"
    names = ("libssl.so", "libssl.dylib", "libssl.a")
    found = [answer(compiler.cxx, f"-print-file-name={name}") for name in names]
    seen = any(path and Path(path.strip()).is_absolute() for path in found)
    return seen and answer(compiler.cxx, "-x", "c++", "-fsyntax-only", "-", stdin=header) is not None


def find_cuda(project: Project) -> Cuda | None:
    """Look for nvcc, then for cuBLAS in its toolkit and in the NVIDIA packages of pip."""
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    places += [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for place in filter(None, [*places, "/usr/local/cuda/bin/nvcc"]):
        dry = answer(place, "--dryrun", "-x", "cu", "-c", os.devnull)
        version = re.search(r"release ([\d.]+)", answer(place, "--version") or "")
        top = re.search(r"^#\$ _HERE_=(.*)$", dry or "", re.MULTILINE)
        if version and top:
            break
    else:
        return None
    root = Path(top[1]).parent
    folders = [(root / lib, root / "include") for lib in ("lib64", "lib", "targets/x86_64-linux/lib")]
    for site in [
        *project.venv.glob("lib/python*/site-packages"),
        *(Path(entry) for entry in sys.path if entry),
    ]:
        for part in (f"nvidia/cu{version[1].split('.')[0]}", "nvidia/cublas"):
            folders.append((site / part / "lib", site / part / "include"))
    for lib, include in folders:
        for cublas in sorted(lib.glob("libcublas.so*"), key=lambda path: len(path.name)):
            if (include / "cublas_v2.h").exists():
                return Cuda(Path(place), root, version[1], cublas, include)
    return Cuda(Path(place), root, version[1], None, None)


def device_arch() -> str | None:
    """Return the compute capability of the first CUDA device, as in "90", or None if none answers."""
    found = re.search(
        r"^(\d+)\.(\d+)", answer("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader") or ""
    )
    return found[1] + found[2] if found else None


def job_count() -> int:
    """Return one job a core, but no more than one for each 2 GB of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    except (AttributeError, ValueError, OSError):
        return cores
    return max(1, min(cores, gigabytes // 2))


# ------------------------------------------------------------------------------------------------- the builds


def resolve_backend(project: Project, options: Options) -> tuple[Options, Cuda | None]:
    """Turn `auto` into cpu or cuda: CUDA only where a toolkit is found and a device answers."""
    if options.backend == "cpu":
        return options, None
    arch = options.cuda_arch or device_arch()
    cuda = find_cuda(project) if options.backend == "cuda" or device_arch() else None
    if options.backend == "auto" and not (cuda and cuda.cublas and device_arch()):
        return replace(options, backend="cpu"), None
    if cuda is None or cuda.cublas is None:
        part = "cuBLAS (library and cublas_v2.h)" if cuda else "the CUDA toolkit (nvcc)"
        hint = (
            f"pip install nvidia-cublas into {project.venv}" if cuda else "install it or set CUDACXX to nvcc"
        )
        raise BuildError(f"--backend cuda: {part} was not found", f"{hint}; or build with --backend cpu")
    if arch is None:
        raise BuildError(
            "no CUDA device answers, so its architecture is unknown", "add --cuda-arch, say 90 for Hopper"
        )
    return replace(options, backend="cuda", cuda_arch=arch), cuda


def variant(options: Options) -> str:
    return "cpu" if options.backend == "cpu" else f"cuda-{options.cuda_arch}"


def cuda_flags(options: Options, cuda: Cuda | None) -> list[str]:
    if cuda is None:
        return []
    return [
        f"-DCMAKE_CUDA_COMPILER={cuda.nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={options.cuda_arch}-real",
        "-DCMAKE_CUDA_RUNTIME_LIBRARY=Shared",
        f"-DCMAKE_CUDA_FLAGS=-I{cuda.cublas_include}",
        f"-DCUDA_cublas_LIBRARY={cuda.cublas}",
    ]


def llama_flags(project: Project, options: Options, cuda: Cuda | None, openssl: bool) -> list[str]:
    on = {True: "ON", False: "OFF"}
    backend = ["-DGGML_CUDA=ON", "-DGGML_CUDA_NO_VMM=ON", "-DGGML_CUDA_NCCL=OFF"] if cuda else []
    return [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=ON",
        "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_BUILD_TESTS=ON",
        "-DLLAMA_BUILD_NUMBER=1",
        f"-DLLAMA_BUILD_COMMIT={project.pin['commit']}",
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        f"-DLLAMA_BUILD_UI={on[options.ui]}",
        f"-DLLAMA_OPENSSL={on[openssl]}",
        f"-DGGML_NATIVE={on[options.native]}",
        "-DCMAKE_UNITY_BUILD_RELOCATABLE=ON",  # else ccache knows no file of libllama again in another folder
        "-DGGML_CCACHE=OFF",  # the launcher below does it, for our own library too
        *backend,
        *cuda_flags(options, cuda),
    ]


def launcher_flags(cuda: bool) -> list[str]:
    if not shutil.which("ccache"):
        return []
    return [f"-DCMAKE_{name}_COMPILER_LAUNCHER=ccache" for name in ("C", "CXX", *(["CUDA"] if cuda else []))]


def cmake_build(
    project: Project,
    name: str,
    source: Path,
    build: Path,
    flags: Sequence[str],
    targets: Sequence[str],
    jobs: int,
) -> None:
    """Configure and build one CMake folder; a folder that another place or compiler made is made anew."""
    compiler = find_compiler()
    check_compiler(compiler)
    cache = build / "CMakeCache.txt"
    ours = (f"CMAKE_HOME_DIRECTORY:INTERNAL={source}", f"CMAKE_CXX_COMPILER:FILEPATH={compiler.cxx}")
    if cache.exists() and not all(line in cache.read_text(encoding="utf-8") for line in ours):
        shutil.rmtree(build)
    env = {
        "CCACHE_BASEDIR": str(project.root),
        "CCACHE_NOHASHDIR": "1",
        "CC": compiler.c,
        "CXX": compiler.cxx,
    }
    env |= {"NINJA_STATUS": "[%f/%t] ", "GIT_CEILING_DIRECTORIES": str(source.parent)}
    configure = [project.tool("cmake"), "-S", str(source), "-B", str(build), "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={project.tool('ninja')}", f"-DCMAKE_CXX_COMPILER={compiler.cxx}"]
    hint = "read the log; `python build.py doctor` shows what was found; `python build.py clean` starts over"
    run_logged(project, f"{name}-configure", f"configuring {name}", [*configure, *flags], hint, env)
    command = [project.tool("cmake"), "--build", str(build), "--parallel", str(jobs), "--target", *targets]
    hint = "read the log; after a fix run the same command again: it goes on where it stopped"
    run_logged(project, f"{name}-build", f"compiling {name}", command, hint, env)


def build_llama(
    project: Project,
    source: Path,
    build: Path,
    tree: str,
    flags: list[str],
    targets: Sequence[str],
    jobs: int,
) -> str:
    """Compile llama.cpp unless nothing changed; return the stamp of what it was made from."""
    name = build.relative_to(project.build).as_posix().replace("/", "-")
    stamp = digest(tree, flags, targets, find_compiler().id, project.root)
    made = [path.name.split(".")[0] for path in (build / "bin").glob("*")]
    whole = all(target in made or f"lib{target}" in made for target in targets)
    if project.state().get(name) != stamp or not whole:
        launchers = launcher_flags("-DGGML_CUDA=ON" in flags)
        with project.stage(name, stamp):
            cmake_build(project, name, source, build, [*flags, *launchers], targets, jobs)
    return stamp


def build_unpatched(project: Project, options: Options, jobs: int) -> None:
    """Compile libllama from the untouched source too, for the test that the doors change no bit."""
    options, cuda = resolve_backend(project, options)
    prepare_source(project)
    home = project.build / "unpatched"  # laid out like build/, so that ccache knows the common files again
    source = home / project.src.name
    if not (source / ".git").exists():
        shutil.rmtree(source, ignore_errors=True)
        git(project.src, "worktree", "prune")
        git(project.src, "worktree", "add", "-q", "-f", "--detach", str(source), "pristine")
    flags = llama_flags(project, options, cuda, has_openssl(find_compiler()))
    build = home / f"llama-{variant(options)}"
    build_llama(project, source, build, project.pin["tree"], flags, ["llama", "llama-completion"], jobs)
    note(f"unpatched: {build}")


def build_all(project: Project, options: Options, jobs: int, source: Path | None = None) -> None:
    """Bring everything up to date: environment, source, llama.cpp, our library, the Python extension."""
    check_git()
    compiler = find_compiler()
    check_python_headers()
    setup(project)
    options, cuda = resolve_backend(project, options)
    if options.ui and not (shutil.which("node") and shutil.which("npm")):
        raise BuildError(
            "--ui needs node and npm", "install them, or build without --ui (no web page in fate serve)"
        )
    tree = prepare_source(project, source)
    flags = llama_flags(project, options, cuda, has_openssl(compiler))
    llama = project.build / f"llama-{variant(options)}"
    llama_stamp = build_llama(project, project.src, llama, tree, flags, TARGETS, jobs)

    native = project.build / f"native-{variant(options)}"
    ours = tree_digest(project.native, skip=("tests",))
    build_id = digest(tree, ours, flags, compiler.id)[:16]
    native_flags = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DFATE_LLAMA_SRC={project.src}",
        f"-DFATE_LLAMA_BUILD={llama}",
    ]
    native_flags += [
        f"-DFATE_BACKEND={options.backend}",
        f"-DFATE_BUILD_ID={build_id}",
        *cuda_flags(options, cuda),
    ]
    stamp = digest(llama_stamp, ours, native_flags)
    if project.state().get(native.name) != stamp or not list(native.glob("libfate.*")):
        flags = [*native_flags, *launcher_flags(cuda is not None)]
        with project.stage(native.name, stamp):
            cmake_build(project, native.name, project.native, native, flags, ["all"], jobs)

    maker = project.root / "fate_bind" / "_build_ffi.py"
    stamp = digest(build_id, native, maker.read_text(encoding="utf-8"), sys.version)
    if project.state().get("extension") != stamp or not list(maker.parent.glob("_fate.*.so")):
        command = [str(project.python), "-m", "fate_bind._build_ffi", "--native-dir", str(native)]
        command += ["--build-id", build_id]
        hint = "read the log; after a fix run the same command again"
        with project.stage("extension", stamp):
            run_logged(project, "extension", "compiling the Python extension", command, hint)

    active = {"backend": options.backend, "variant": variant(options), "build_id": build_id, "tree": tree}
    active |= {"native_dir": str(native), "llama_dir": str(llama), "source_dir": str(project.src)}
    text = json.dumps({**active, "options": asdict(options)}, indent=1)
    path = project.build / "active.json"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


# ------------------------------------------------------------------------------------------- doctor and clean


def doctor(project: Project) -> None:
    """Print what was found and what is missing for which feature."""

    def line(name: str, found: object, without: str = "") -> None:
        print(f"  {name:<14} {found or 'missing' + (f': {without}' if without else '')}")

    print("found")
    line("Python", f"{sys.version.split()[0]} ({sys.executable})")
    line("Python.h", python_headers(), "no build (apt-get install python3-dev)")
    line("git", (answer("git", "--version") or "").strip(), "nothing works without it")
    compiler = None
    try:
        compiler = find_compiler()
        line("compiler", f"{compiler.cxx}: {compiler.id}")
    except BuildError as error:
        line("compiler", None, error.next_step)
    cmake = (answer(project.tool("cmake"), "--version") or "").splitlines()
    line("CMake", f"{cmake[0]} ({project.tool('cmake')})" if cmake else None, "run `python build.py setup`")
    line("ccache", shutil.which("ccache"), "repeated builds are slower")
    ssl = compiler and has_openssl(compiler)
    line("OpenSSL", "headers and libraries" if ssl else None, "no -hf downloads (apt-get install libssl-dev)")
    node = shutil.which("node") and shutil.which("npm")
    line("node, npm", node, "no web page in fate serve (build --ui needs them)")
    cuda = find_cuda(project)
    line("CUDA toolkit", cuda and f"{cuda.version} in {cuda.root}", "no GPU build")
    if cuda:
        line("cuBLAS", cuda.cublas, "no GPU build (pip install nvidia-cublas)")
        line("cuBLAS headers", cuda.cublas_include, "no GPU build (pip install nvidia-cublas)")
    gpu = answer(
        "nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"
    )
    line("GPU", "; ".join((gpu or "").strip().splitlines()), "no CUDA device answers; runs use the CPU")
    print("machine")
    with contextlib.suppress(AttributeError, ValueError, OSError):
        line("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB")
    with contextlib.suppress(ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        line("page-lock limit", "none" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:.0f} MiB")
    line("free disk", f"{shutil.disk_usage(project.root).free / 1e9:.0f} GB")
    print("build")
    active = project.build / "active.json"
    made = json.loads(active.read_text(encoding="utf-8")) if active.exists() else {}
    line("source", project.src if project.src.exists() else None, "run `python build.py build`")
    for key in ("variant", "build_id", "tree"):
        line(key.replace("_", " "), made.get(key), "run `python build.py build`")


def clean(project: Project, everything: bool) -> None:
    """Remove what was built; with `everything` the download and `.venv` too."""
    if edited(project):
        raise BuildError(
            f"{project.src} holds edits that no patch has",
            "run `python build.py export-patches` or `python build.py patch --discard` first",
        )
    keep = set() if everything else {"downloads", ".lock", "state.json"}
    for path in project.build.iterdir() if project.build.exists() else ():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for extension in (project.root / "fate_bind").glob("_fate*.so"):
        extension.unlink()
    if everything:
        shutil.rmtree(project.venv, ignore_errors=True)
    else:
        stamp = project.state().get("setup")
        write_atomically(project.build / "state.json", json.dumps({"setup": stamp}))


# ------------------------------------------------------------------------------------------------ the command


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the command line at the first `--`: ours before it, the program's or pytest's flags after it."""
    cut = argv.index("--") if "--" in argv else len(argv)
    how = argparse.ArgumentParser(add_help=False)
    how.add_argument(
        "--backend", choices=["auto", "cpu", "cuda"], help="auto: CUDA if toolkit and device are there"
    )
    how.add_argument("--cuda-arch", metavar="NN", help="compute capability to compile for, say 90")
    how.add_argument("--native", action="store_true", default=None, help="use all instructions of this CPU")
    how.add_argument(
        "--ui", action="store_true", default=None, help="build the server's web page (node, npm)"
    )
    how.add_argument("--jobs", type=int, default=job_count(), metavar="N", help="compile jobs (%(default)s)")
    how.add_argument(
        "--source", type=Path, metavar="DIR", help="a llama.cpp checkout to copy instead of fetching"
    )
    parser = argparse.ArgumentParser(prog="build.py", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "run", parents=[how], help="build, then run llama-completion in process: run [-- flags]"
    )
    commands.add_parser("test", parents=[how], help="build, then run all tests: test [-- pytest flags]")
    commands.add_parser("setup", help="make .venv with all dependencies")
    commands.add_parser("fetch", help="download the pinned llama.cpp")
    build = commands.add_parser("build", parents=[how], help="compile everything that changed")
    build.add_argument(
        "--unpatched", action="store_true", help="also libllama from the untouched source (for a test)"
    )
    patch = commands.add_parser("patch", help="edit the patches of llama.cpp")
    group = patch.add_mutually_exclusive_group(required=True)
    group.add_argument("--edit", action="store_true", help="make the source tree ready, one commit a patch")
    group.add_argument("--discard", action="store_true", help="throw away what was edited there")
    patch.add_argument(
        "--source", type=Path, metavar="DIR", help="a llama.cpp checkout to copy instead of fetching"
    )
    commands.add_parser("export-patches", help="write patches/ from the commits in the source tree")
    commands.add_parser("doctor", help="show what was found and what is missing for which feature")
    clean_parser = commands.add_parser("clean", help="remove what was built")
    clean_parser.add_argument("--all", action="store_true", help="the download and .venv too")
    args = parser.parse_args(argv[:cut])
    if argv[cut + 1 :] and args.command not in ("run", "test"):
        parser.error(f"{args.command} takes nothing after --")
    return args, argv[cut + 1 :]


def chosen_options(project: Project, args: argparse.Namespace) -> Options:
    """Return the options given; `run` and `test` take what is not given from the last build."""
    given = {name: value for name in asdict(Options()) if (value := getattr(args, name)) is not None}
    last: dict[str, Any] = {}
    active = project.build / "active.json"
    if args.command != "build" and "backend" not in given and active.exists():
        last = json.loads(active.read_text(encoding="utf-8")).get("options", {})
    return Options(**{**last, **given})


def hand_over(command: list[str]) -> NoReturn:
    """Become the program that was asked for, so that Ctrl-C and the exit status are its own."""
    sys.stdout.flush()
    if os.name == "nt":
        sys.exit(subprocess.call(command))
    os.execv(command[0], command)


def command_line(project: Project, argv: list[str]) -> None:
    args, rest = parse(argv)
    source = args.source.resolve() if getattr(args, "source", None) else None
    if args.command == "doctor":
        doctor(project)
        return
    with locked(project):
        if args.command in ("run", "test", "build"):
            options = chosen_options(project, args)
            build_all(project, options, args.jobs, source)
            if getattr(args, "unpatched", False):
                build_unpatched(project, options, args.jobs)
        elif args.command == "setup":
            setup(project)
        elif args.command == "fetch":
            note(str(fetch(project)))
        elif args.command == "patch" and args.edit:
            check_git()
            patch_edit(project, source)
        elif args.command == "patch":
            patch_discard(project)
        elif args.command == "export-patches":
            export_patches(project)
        elif args.command == "clean":
            clean(project, args.all)
    if args.command == "run":
        hand_over([str(project.python), "-m", "fate_bind", "run", *rest])
    if args.command == "test":
        os.chdir(project.root)
        hand_over([str(project.python), "-m", "pytest", "--all", *rest])


def main(argv: Iterable[str], root: Path) -> int:
    if sys.version_info < PYTHON_MIN:
        print(
            f"build.py: needs Python {PYTHON_MIN[0]}.{PYTHON_MIN[1]}, this is {sys.version.split()[0]}\n"
            "  next: run it with a newer one, say `python3.12 build.py ...`",
            file=sys.stderr,
        )
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        try:
            command_line(Project(root), list(argv))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full() from error
            what = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            raise BuildError(
                what, "check the path and its permissions, then run the same command again"
            ) from error
        except subprocess.CalledProcessError as error:
            if "No space left on device" in error.stderr:
                raise disk_full() from error
            words = error.stderr.strip().splitlines()
            what = f"{' '.join(error.cmd[:2])} failed: {words[-1] if words else error.returncode}"
            raise BuildError(what, "`python build.py clean` and the same command again start over") from error
    except BuildError as error:
        sys.stdout.flush()
        log = f"\n  log:  {error.log}" if error.log else ""
        print(f"build.py: {error.what}{log}\n  next: {error.next_step}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nbuild.py: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent))
