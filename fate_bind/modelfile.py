"""The model file: the embedded one, and what can be said about a file before llama.cpp opens it."""

from __future__ import annotations

import glob
import math
import mmap
import os
import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fate_bind import placement
from fate_bind.errors import EngineError, UsageError

EMBEDDED = Path(__file__).resolve().parent / "models" / "tiny-moe-31m-q4_0.gguf"

SHARD = re.compile(r"-\d{5}-of-\d{5}$")
"""How the name of a split file's part ends."""

_STRING, _ARRAY = 8, 9
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of GGUF's value types
_MAX_DIMS = 64

# of GGUF's tensor types that files hold: elements and bytes of a block
TENSOR_SIZES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip


def check(path: str | Path) -> Path:
    """Return the path if it is a GGUF file whose header is whole and whose tensors end inside it."""
    path = Path(path)
    if path.is_dir():
        raise EngineError(f"model {path} is a directory; expected a .gguf file")
    if not path.exists():
        raise EngineError(f"model {path} does not exist")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise EngineError(f"model {path} is not a GGUF file: it begins with {magic!r}")
            size = os.fstat(file.fileno()).st_size
            try:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    end = _end_of_tensors(_Cursor(data, file.tell()))
            except (EOFError, struct.error, KeyError, OverflowError):
                raise EngineError(f"model {path} is cut short or damaged: its header does not end") from None
    except OSError as error:
        raise EngineError(f"model {path} cannot be read: {error}") from error
    if end > size:
        raise EngineError(f"model {path} is cut short: {size} bytes, but its tensors end at byte {end}")
    return path


def _named(args: Sequence[str]) -> list[str]:
    named = [value for flag, value in pairwise(args) if flag in ("-m", "--model")]
    if not named and not placement.given(args, placement.MODEL_FLAGS) and os.environ.get("LLAMA_ARG_MODEL"):
        named = [os.environ["LLAMA_ARG_MODEL"]]
    return named


def of(args: Sequence[str]) -> Path | None:
    """Return the model that -m names last, as llama.cpp takes it; None: it comes from elsewhere."""
    named = _named(args)
    return Path(named[-1]) if named else None


def meant(model: str | Path | None, args: Sequence[str]) -> Path | None:
    """Return `model`, or what `args` name, or else the embedded model; None: it comes from elsewhere."""
    if model is not None:
        return Path(model)
    return of(args) if placement.names_model(args) else EMBEDDED


def parts(model: Path) -> list[Path]:
    """Return the files of a model: of NAME-00001-of-00003.gguf all three that are there."""
    name = SHARD.sub("", model.stem)
    if name == model.stem:
        return [model]
    return sorted(model.parent.glob(f"{glob.escape(name)}-?????-of-?????{glob.escape(model.suffix)}"))


def check_args(args: Sequence[str], is_list: bool = False) -> None:
    """Check the models that -m names; with `is_list` it may name several, separated by commas."""
    for value in _named(args):
        for path in value.split(",") if is_list else [value]:
            check(path)
    if args and args[-1] in ("-m", "--model"):
        raise UsageError(f"{args[-1]} needs a value: FILE.gguf")


def _end_of_tensors(header: _Cursor) -> int:
    version, n_tensors, n_keys = header.take("<IQQ")
    if not 2 <= version <= 3:
        return 0  # another byte order or format: llama.cpp knows
    alignment = 32
    for _ in range(n_keys):
        key = header.string()
        (kind,) = header.take("<I")
        if key == b"general.alignment" and kind == 4:
            (alignment,) = header.take("<I")
        else:
            _skip_value(header, kind)
    last = 0
    for _ in range(n_tensors):
        header.skip_strings(1)
        (n_dims,) = header.take("<I")
        if n_dims > _MAX_DIMS:
            raise EOFError
        *dims, kind, offset = header.take(f"<{n_dims}QIQ")
        n_block, n_bytes = TENSOR_SIZES.get(kind, (1, 0))  # a newer type: at least it begins inside
        last = max(last, offset + math.prod(dims) // n_block * n_bytes)
    return (header.at + alignment - 1) // max(alignment, 1) * alignment + last if n_tensors else 0


def _skip_value(header: _Cursor, kind: int) -> None:
    if kind == _STRING:
        header.skip_strings(1)
    elif kind == _ARRAY:
        of, n = header.take("<IQ")
        if of == _STRING:
            header.skip_strings(n)
        elif of == _ARRAY:
            for _ in range(n):
                _skip_value(header, of)
        else:
            header.skip(n * _SIZES[of])
    else:
        header.skip(_SIZES[kind])


class _Cursor:
    """A place in a mapped file; what would go past its end is an EOFError or a struct.error."""

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self.data = data
        self.at = at

    def skip(self, n: int) -> None:
        if n > len(self.data) - self.at:
            raise EOFError
        self.at += n

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def string(self) -> bytes:
        (length,) = self.take("<Q")
        self.skip(length)
        return self.data[self.at - length : self.at]

    def skip_strings(self, n: int) -> None:
        """Skip n strings; of a vocabulary there are some 300,000."""
        length_at = struct.Struct("<Q").unpack_from
        data, at = self.data, self.at
        for _ in range(n):
            at += 8 + length_at(data, at)[0]
        self.skip(at - self.at)
