"""Compile the extension fate_bind._fate from fate.h: `python -m fate_bind._build_ffi --native-dir DIR`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import cffi

from fate_bind.errors import BuildError

PACKAGE = Path(__file__).resolve().parent
HEADER = PACKAGE / "native" / "fate.h"
FILE_NAME = "_fate.abi3.so"

OURS = """
int32_t      fate_extension_abi_version(void);
const char * fate_extension_build_id(void);
"""

SOURCE = """
#include "{header}"

static int32_t fate_extension_abi_version(void) {{ return FATE_ABI_VERSION; }}
static const char * fate_extension_build_id(void) {{ return "{build_id}"; }}
"""


def cdef(header: str) -> str:
    """Make what cffi reads out of the text of fate.h; each fate_NAME_fn becomes a callback fate_py_NAME."""
    begin, end = "// cdef begin", "// cdef end"
    if begin not in header or end not in header:
        raise BuildError(f"{HEADER} lacks the marks {begin!r} and {end!r}")
    body = header.partition(begin)[2].partition(end)[0].replace("FATE_API ", "")
    body = re.sub(r"^#define (\w+) .*$", r"#define \1 ...", body, flags=re.MULTILINE)
    callbacks = re.findall(r"typedef\s+(\w+)\s*\(\*\s*fate_(\w+)_fn\)\((.*?)\);", body, flags=re.DOTALL)
    python = "\n".join(f"{result} fate_py_{name}({arguments});" for result, name, arguments in callbacks)
    return f'{body}\n{OURS}\nextern "Python" {{\n{python}\n}}\n'


def read_build_id(native_dir: Path) -> str:
    """Return the build id that CMake left beside the library."""
    path = native_dir / "fate_build_id.h"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error}; run `python build.py build`") from error
    _, mark, rest = text.partition("#define FATE_BUILD_ID")
    if not mark:
        raise BuildError(f"{path} defines no FATE_BUILD_ID; run `python build.py build`")
    return rest.split()[0].strip('"')


def build(
    native_dir: Path,
    output_dir: Path = PACKAGE,
    *,
    build_id: str | None = None,
    header: Path = HEADER,
    library: str = "fate",
) -> Path:
    """Compile the extension against the library in `native_dir` and return its path.

    The extension finds the library by a path relative to its own place; LD_LIBRARY_PATH goes before that.
    """
    native_dir, output_dir = native_dir.resolve(), output_dir.resolve()
    text = header.read_text(encoding="utf-8")
    build_id = build_id or read_build_id(native_dir)
    ffi = cffi.FFI()
    ffi.cdef(cdef(text))
    ffi.set_source("_fate", SOURCE.format(header=header.name, build_id=build_id))
    target = output_dir / FILE_NAME
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "_fate.c"
        ffi.emit_c_code(str(source))
        made = Path(scratch) / FILE_NAME
        _compile(source, made, header.parent, native_dir, os.path.relpath(native_dir, output_dir), library)
        unfinished = target.with_suffix(".new")
        shutil.copyfile(made, unfinished)
        unfinished.replace(target)  # a running process keeps the old file
    return target


def _compile(
    source: Path, target: Path, include: Path, native_dir: Path, relative: str, library: str
) -> None:
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise BuildError(
            f"Python.h is not in {headers}; install the headers of Python {sys.version_info.major}."
            f"{sys.version_info.minor} (Debian, Ubuntu: apt-get install python3-dev)"
        )
    compiler = shlex.split(os.environ.get("CC") or "")
    if not compiler:
        names = [*shlex.split(sysconfig.get_config_var("CC") or "")[:1], "cc", "gcc", "clang"]
        compiler = [found for name in names if (found := shutil.which(name))][:1]
    if not compiler:
        raise BuildError("no C compiler was found; install one, or name it in the environment variable CC")
    if sys.platform == "darwin":
        link = ["-bundle", "-undefined", "dynamic_lookup", f"-Wl,-rpath,@loader_path/{relative}"]
    else:
        link = ["-shared", f"-Wl,-rpath,$ORIGIN/{relative}", "-Wl,--enable-new-dtags"]
    command = [*compiler, "-O2", "-fPIC", f"-I{headers}", f"-I{include}", str(source), "-o", str(target)]
    command += [*link, f"-L{native_dir}", f"-l{library}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"the extension does not compile: {shlex.join(command)}\n{done.stderr.strip()}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fate_bind._build_ffi", description=__doc__)
    parser.add_argument("--native-dir", type=Path, required=True, help="where libfate was built")
    parser.add_argument("--output-dir", type=Path, default=PACKAGE, help="where the extension goes")
    parser.add_argument("--build-id", help="default: the one in NATIVE_DIR/fate_build_id.h")
    args = parser.parse_args()
    try:
        print(build(args.native_dir, args.output_dir, build_id=args.build_id))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
