"""llama.cpp's programs in this process, with the pool."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fate_bind import library, modelfile, options, placement, stats
from fate_bind.errors import FateError, UsageError
from fate_bind.host import Host
from fate_bind.options import Options
from fate_bind.session import resolve_config, with_trained
from fate_policy.config import Config


@dataclass(frozen=True)
class Program:
    """One of llama.cpp's programs.

    name : as fate_program_run knows it
    does : for the list of commands
    returns_on_interrupt : the first Ctrl-C makes it end by itself, or only stops what it is writing
    """

    name: str
    does: str
    returns_on_interrupt: bool = False
    opens_contexts: bool = True


PROGRAMS = {
    "run": Program("completion", "complete a prompt; without -m a story from the embedded model"),
    "chat": Program("cli", "talk with a model", returns_on_interrupt=True),
    "serve": Program("server", "answer the OpenAI-style endpoints", returns_on_interrupt=True),
    "bench": Program("bench", "measure prompt and decode speed"),
    "perplexity": Program("perplexity", "measure perplexity over a text"),
    "quantize": Program("quantize", "quantise a model file; has no pool", opens_contexts=False),
}

_INTERACTIVE = ("-cnv", "--conversation", "-i", "--interactive", "-if", "--interactive-first")
_DOWNLOADS = ("-hf", "-hfr", "--hf-repo", "-mu", "--model-url")
_PROMPT = ("-p", "--prompt", "-f", "--file", "-bf", "--binary-file", "-sys", "--system-prompt")
# what `run` adds, with the embedded model only, unless one of the flags is given
_STORY = (
    (("-lv", "--verbosity", "--log-verbosity", "-v", "--verbose", "--log-verbose"), ("-lv", "1")),
    (_PROMPT, ("-p", "Once upon a time")),
    (("-no-cnv", "--no-conversation", *_INTERACTIVE), ("-no-cnv",)),
    (("-n", "--predict", "--n-predict"), ("-n", "200")),
    (("-s", "--seed"), ("-s", "7")),
)


def run(command: str, argv: Sequence[str]) -> int:
    """Run a program to its end and print the summary; return its exit code.

    With --help, and after some errors, llama.cpp ends the process itself.
    """
    program = PROGRAMS[command]
    chosen, args = options.take(argv)
    if placement.given(args, placement.HELP):
        print(f"flags of fate {command}, before those of llama.cpp's {program.name}:\n")
        print(options.help_text() + "\n", flush=True)
        return _call(program, args)
    if not program.opens_contexts:
        return _call(program, args)
    args = _complete(command, args)
    config = checked_config(chosen, args, modelfile.of(args))
    host = Host(config, None, chosen.record, chosen.require)
    if command == "serve" and _wants_page(args) and not library.has_page():
        print(
            "fate: the web page is not in this build, only the endpoints are; for the page run "
            "`python build.py build --ui` (needs node and npm)",
            file=sys.stderr,
            flush=True,
        )
    # ours first: a value that is forgotten at the end is missed, and does not become one of ours
    args = [*placement.flags(program.name, args, placement.has_gpu()), *args]
    return _Run(program, args, host, chosen).run()


def checked_config(chosen: Options, args: Sequence[str], model: Path | None) -> Config:
    """Return the configuration meant; refuse to write what the run reads, say what is of no effect here."""
    config, _ = resolve_config(
        chosen.policy,
        chosen.slots,
        chosen.mode,
        chosen.sync,
        chosen.vram,
        chosen.vram_margin,
        chosen.prefetch,
        chosen.prefetch_threshold,
        chosen.prefetch_experts,
    )
    config = with_trained(config, model)
    options.spare(chosen, _read_by(chosen, args, config))
    if config.mode != "off" and (chosen.vram or chosen.vram_margin) and not placement.has_gpu():
        print("fate: vram has no effect: no GPU was found", file=sys.stderr, flush=True)
    return config


def _read_by(chosen: Options, args: Sequence[str], config: Config) -> list[Path]:
    """Return the files that flags, llama.cpp's environment variables and the configuration name."""
    values = [value for name, value in os.environ.items() if name.startswith("LLAMA_ARG_")]
    named = [part for arg in (*args, *values) for part in (arg, *arg.split(","))]
    named += [chosen.policy, *(str(value) for value in config.params.values())]
    files = {path for path in map(Path, named) if _is_file(path)} | {modelfile.EMBEDDED}
    files |= {part for path in files for part in modelfile.parts(path)}
    return [*files, *_source_of(config.policy)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text, too long for a name
        return False


def _source_of(policy: str) -> list[Path]:
    """Return the files that a policy of the user's, module:Class, may come from."""
    module = policy.partition(":")[0] if ":" in policy else ""
    try:
        found = importlib.util.find_spec(module) if module else None
    except (ImportError, ValueError):  # it is refused where it is made
        found = None
    paths = [Path(found.origin)] if found is not None and found.origin else []
    paths += [Path(module.replace(".", "/")).with_suffix(".py")] if module else []  # of this folder
    return [path for path in paths if _is_file(path)]


def _complete(command: str, args: list[str]) -> list[str]:
    """Check the model and add what is left out; all that can be said before llama.cpp is asked."""
    placement.refuse_no_batch(args)
    if command == "run" and not placement.names_model(args):
        args = ["-m", str(modelfile.EMBEDDED), *args]
        for flags, adds in _STORY:
            if not placement.given(args, flags):
                args = [*adds, *args]
        return args
    if command == "serve" and not placement.names_model(args):
        raise UsageError("serve needs a model: give -m FILE.gguf (llama.cpp's router mode is not supported)")
    modelfile.check_args(args, is_list=command == "bench")
    downloads = placement.given(args, _DOWNLOADS) and not placement.given(args, ("--offline",))
    if downloads and not library.has_https():
        raise UsageError(
            "llama.cpp was built without OpenSSL, so it cannot download: give -m FILE.gguf, or install the "
            "headers of OpenSSL (Debian, Ubuntu: apt-get install libssl-dev) and run `python build.py build`"
        )
    return args


def _wants_page(args: Sequence[str]) -> bool:
    """Say whether llama.cpp's server would show its own page: not switched off, and no other one given."""
    return not (
        placement.given(args, ("--no-ui", "--no-webui", "--path"))
        or os.environ.get("LLAMA_ARG_UI") in ("0", "false", "off", "disabled")
        or any(name in os.environ for name in ("LLAMA_ARG_NO_UI", "LLAMA_ARG_STATIC_PATH"))
    )


def _call(program: Program, args: Sequence[str]) -> int:
    ffi, lib = library.load()
    argv = [ffi.new("char[]", arg.encode()) for arg in (f"fate-{program.name}", *args)]
    code = ffi.new("int32_t *")
    sys.stdout.flush()
    library.check(lib.fate_program_run(program.name.encode(), len(argv), ffi.new("char *[]", argv), code))
    return int(code[0])


class _Run:
    """One run of a program: watch for interrupts, then say how it went."""

    def __init__(self, program: Program, args: Sequence[str], host: Host, chosen: Options) -> None:
        self.program = program
        self.args = args
        self.host = host
        self.chosen = chosen

    def run(self) -> int:
        ffi, lib = library.load()
        user = ffi.new_handle(self.interrupted)
        self.host.on_failure = _tell_failure
        with self._interrupts(user), self.host.configured():
            library.check(lib.fate_exit_watch(lib.fate_py_interrupt, user))
            try:
                code = _call(self.program, self.args)
                refusal = library.text(ffi, lib.fate_engine_error())  # the end of the block forgets it
            finally:
                library.check(lib.fate_exit_watch(ffi.NULL, ffi.NULL))
        ctypes.CDLL(None).fflush(None)  # what C has buffered comes before what we print
        return self._end(code, refusal)

    @contextmanager
    def _interrupts(self, user: Any) -> Iterator[None]:
        """Let Ctrl-C reach the program, and us before it where the program would just end."""
        lib = library.load().lib
        if not self.program.returns_on_interrupt:
            library.check(lib.fate_interrupt_watch(lib.fate_py_interrupt, user))
            try:
                yield
            finally:
                lib.fate_interrupt_unwatch()
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in numbers if is_main}
        if is_main:  # Python's own handler would only set a flag
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def interrupted(self) -> None:
        """Say how far it got: the program may end the process right after."""
        try:
            if not any(engine.is_engaged for engine in self.host.engines):
                return
            stops = library.load().lib.fate_interrupt_signal() == signal.SIGINT  # else the process ends
            goes_on = self.program.name == "completion" and placement.given(self.args, _INTERACTIVE)
            is_end = not (stops and goes_on)
            print(file=sys.stderr)
            for engine in self.host.engines:
                try:
                    engine.keep_record(is_end)
                except FateError as error:  # the summary still comes, without "recorded"
                    print(f"fate: error: {error}", file=sys.stderr)
            self._print_summary()
            sys.stdout.flush()
        except BaseException as error:  # nothing may keep the program from ending
            print(f"fate: error: {error}", file=sys.stderr, flush=True)

    def _end(self, code: int, refusal: str) -> int:
        failure, self.host.failure = self.host.failure, None
        if any(engine.is_engaged for engine in self.host.engines) or not (refusal or failure or code):
            try:
                self._print_summary()
            except FateError as error:
                failure = failure or error
        if isinstance(failure, FateError):
            raise failure
        if failure is not None:
            traceback.print_exception(failure)
            return 1
        if code and refusal:
            raise FateError(refusal)
        if code:
            what = f"llama.cpp's {self.program.name} ended with code {code}; its messages are above"
            print(f"fate: error: {what}", file=sys.stderr)
        return code

    def _print_summary(self) -> None:
        config = self.host.config
        reports = stats.merge([engine.report() for engine in list(self.host.engines)])
        if not reports:
            why = "the mode is off" if config.mode == "off" else "no context was opened"
            reports = [stats.not_engaged(config.policy, config.mode, why)]
        if self.host.record is not None and not any(report.counters.tokens for report in reports):
            why = "no token ran" if reports[0].engaged else f"not engaged because {reports[0].reason}"
            print(f"fate: nothing was recorded in {self.host.record}: {why}", file=sys.stderr)
        if self.chosen.stats_format == "text":
            text = "\n".join(stats.summary(report) for report in reports)
            print(text, file=sys.stderr, flush=True)
            return
        document = stats.as_dict(reports[0])
        if len(reports) > 1:
            document["further"] = [stats.as_dict(report) for report in reports[1:]]
        stats.write(document, self.chosen.stats_file)


def _tell_failure(failure: BaseException) -> None:
    what = f"{type(failure).__name__}: {failure}"
    print(f"\nfate: error: {what}; the run goes on without it", file=sys.stderr, flush=True)
