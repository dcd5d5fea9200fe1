"""The command line: `fate COMMAND [flags]`, also `python -m fate_bind`."""

from __future__ import annotations

import difflib
import json
import re
import sys
import traceback
from collections.abc import Sequence
from itertools import pairwise

from fate_bind import library, modelfile, options, placement, programs, stats
from fate_bind.errors import FateError, UsageError
from fate_bind.verify import verify
from fate_policy import cli, registry

_OURS = {
    "verify": "compare every logit with and without the pool, bit for bit",
    "policies": "list the policies and their parameters",
}
_N_TOKENS = ("-n", "--predict", "--n-predict")


def main(argv: Sequence[str] | None = None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    is_verify = args[:1] == ["verify"]
    try:
        return _dispatch(args)
    except FateError as error:
        print("fate: error:", " ".join(str(error).split()), file=sys.stderr)
        if isinstance(error, UsageError) and not is_verify:
            return 2
    except KeyboardInterrupt:
        print("fate: interrupted", file=sys.stderr)
        return 130
    except Exception:  # the policy's own
        traceback.print_exc()
    return 3 if is_verify else 1


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if args else 2
    command, rest = args[0], args[1:]
    if command == "--version":
        print(_version())
        return 0
    if command == "policies":
        if rest:
            raise UsageError(f"policies {rest[0]}: expected no arguments; it lists what there is")
        print(_policies())
        return 0
    if command == "verify":
        return _verify(rest)
    if command in cli.COMMANDS:
        return cli.main(command, rest)
    if command in programs.PROGRAMS:
        return programs.run(command, rest)
    known = [*programs.PROGRAMS, *_OURS, *cli.COMMANDS]
    near = difflib.get_close_matches(command, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    raise UsageError(f"unknown command {command!r}; {hint}")


def _usage() -> str:
    commands = {name: program.does for name, program in programs.PROGRAMS.items()} | _OURS | cli.COMMANDS
    lines = ["usage: fate COMMAND [--fate-* flags] [llama.cpp's flags]", ""]
    lines += [f"  {name:<12} {does}" for name, does in commands.items()]
    lines += ["  --version    print what is installed", "", "flags of every command that runs a model:", ""]
    return "\n".join([*lines, options.help_text()])


def _version() -> str:
    from importlib.metadata import version

    ffi, lib = library.load()
    return (
        f"fate {version('fate')}, build {library.text(ffi, lib.fate_build_id())}\n"
        f"{library.text(ffi, lib.fate_system_info()).strip()}"
    )


def _policies() -> str:
    lines = []
    for policy in registry.describe():
        params = ", ".join(f"{name}={json.dumps(default)}" for name, default in policy.params.items())
        lines.append(f"{policy.name:<12} {policy.line}")
        if params:
            lines.append(f"{'':<12} {params}")
    return "\n".join(lines)


def _verify(argv: list[str]) -> int:
    chosen, args = options.take(argv)
    if args and placement.given(args[:1], placement.HELP):
        print("usage: fate verify -m MODEL [-p TEXT] [-n TOKENS] [--fate-* flags] [llama.cpp's flags]\n")
        print("exit code: 0 identical, 1 different, 2 not (wholly) engaged, 3 another error\n")
        print(options.help_text())
        return 0
    programs.checked_config(chosen, args, modelfile.meant(None, args))
    result = verify(  # without `require`: not to engage has an exit code of its own
        args=args,
        n_tokens=_n_tokens(args),
        policy=chosen.policy,
        slots=chosen.slots,
        mode=chosen.mode,
        sync=chosen.sync,
        vram=chosen.vram,
        vram_margin=chosen.vram_margin,
        prefetch=chosen.prefetch,
        prefetch_threshold=chosen.prefetch_threshold,
        prefetch_experts=chosen.prefetch_experts,
        record=chosen.record,
    )
    try:
        if chosen.stats_format == "json":
            stats.write(stats.as_dict(result.report), chosen.stats_file)
    finally:
        print(result.message, flush=True)
    return result.exit_code


def _n_tokens(args: Sequence[str]) -> int:
    n_tokens = 64
    for flag, value in pairwise([*args, ""]):
        if flag in _N_TOKENS:
            if not re.fullmatch(r"0*[1-9]\d{0,8}", value):
                raise UsageError(f"{flag} {value}: expected the number of tokens to generate, 1 or more")
            n_tokens = int(value)
    return n_tokens


if __name__ == "__main__":
    sys.exit(main())
