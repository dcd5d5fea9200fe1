"""The routing-trace format: write, read, hash.

A trace is an .npz file (see `Trace` for its arrays). While it is recorded it is FILE.part: a run of blocks,
each with a length and a checksum, so that a killed recording keeps all but its last moment.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fate_policy.base import BYPASS, NOT_RUN, POOL, Geometry, Step
from fate_policy.errors import TraceError

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment]

FORMAT, VERSION = "fate-trace", 1

_MAGIC = b"FATE-TRACE-PART\n"
_HEADER = struct.Struct("<4sII")  # tag, bytes of the payload, its CRC-32
_FLUSH_BYTES = 64 * 1024
_FLUSH_SECONDS = 1.0
_PER_LAYER_META = ("n_experts", "k", "n_slots", "expert_bytes")


@dataclass(frozen=True, eq=False)
class Trace:
    """Recorded routing, in token order.

    ids : uint8 or uint16 (n_tokens, n_layers, k), best first; the dtype's maximum = not run
    path : uint8 (n_tokens, n_layers), as in `Step`
    step, sequence, position, token_id : int32 (n_tokens,); token_id -1 = unknown
    is_decode : bool (n_tokens,): generated, not prompt
    prompt_start : int32: the first token of each sequence
    weights : float16 like ids, or None;  token_hash : uint32 (n_tokens,), or None
    ahead_ids : int16 (n_tokens, n_layers, n_horizons, n_ahead), as in `Step`, or None
    ahead_chances : float32 like ahead_ids, or None
    meta : model, n_experts, k, n_slots, expert_bytes (a list each, one number per layer), and more; with
        ahead_ids also horizons, as in `Step`, a list
    """

    ids: NDArray[np.unsignedinteger]
    path: NDArray[np.uint8]
    step: NDArray[np.int32]
    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    token_id: NDArray[np.int32]
    is_decode: NDArray[np.bool_]
    prompt_start: NDArray[np.int32]
    weights: NDArray[np.float16] | None = None
    token_hash: NDArray[np.uint32] | None = None
    ahead_ids: NDArray[np.int16] | None = None
    ahead_chances: NDArray[np.float32] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    @property
    def n_layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def horizons(self) -> tuple[int, ...]:
        """Say how many layers before its own each recorded prediction was made; () if none was recorded."""
        return () if self.ahead_ids is None else tuple(self.meta["horizons"])

    def experts(self, start: int = 0, stop: int | None = None) -> NDArray[np.int32]:
        """Return ids as int32 with -1 = not run."""
        part = self.ids[start:stop]
        ids = part.astype(np.int32)
        ids[part == np.iinfo(self.ids.dtype).max] = -1
        return ids

    def ahead(self, start: int, stop: int) -> dict[str, Any]:
        """Return the fields of a `Step` of these tokens that tell in-token predictions; {} without any."""
        if self.ahead_ids is None or self.ahead_chances is None:
            return {}
        return {
            "ahead_ids": self.ahead_ids[start:stop].astype(np.int32),
            "ahead_chances": self.ahead_chances[start:stop],
            "horizons": self.horizons,
        }

    @functools.cached_property
    def tokens(self) -> NDArray[np.int32]:
        """Return what names each token: its id, else 31 bits of the hash of its text; -1 = unknown."""
        if self.token_hash is None or (self.token_id >= 0).any():
            return self.token_id
        return (self.token_hash & 0x7FFFFFFF).astype(np.int32)

    @property
    def token_names(self) -> str:
        """Say what `tokens` are: the "id" of each, the "crc32" of its text, or "none"."""
        if (self.token_id >= 0).any():
            return "id"
        return "none" if self.token_hash is None else "crc32"

    def step_bounds(self) -> NDArray[np.int64]:
        """Return where each step starts, and at the end the number of tokens."""
        changes = np.flatnonzero(np.diff(self.step)) + 1
        first = [0] if self.n_tokens else []
        return np.concatenate((first, changes, [self.n_tokens])).astype(np.int64)

    def slice(self, start: int, stop: int) -> Trace:
        """Return the tokens from `start` up to `stop`, as a view."""
        cut = slice(start, stop)
        starts = self.prompt_start[(self.prompt_start >= start) & (self.prompt_start < stop)] - start
        optional: dict[str, Any] = {
            name: column[cut] for name in OPTIONAL if (column := getattr(self, name)) is not None
        }
        return replace(
            self,
            ids=self.ids[cut],
            path=self.path[cut],
            step=self.step[cut],
            sequence=self.sequence[cut],
            position=self.position[cut],
            token_id=self.token_id[cut],
            is_decode=self.is_decode[cut],
            prompt_start=starts.astype(np.int32),
            **optional,
        )

    def hash(self) -> str:
        """Return the SHA-256 of the routing: of experts, paths and steps, whatever the dtype of ids.

        In-token predictions count too, where there are any.
        """
        digest = hashlib.sha256(repr(self.ids.shape).encode())
        for start in range(0, self.n_tokens, 4096):
            stop = start + 4096
            for array in (self.experts(start, stop), self.path[start:stop], self.step[start:stop]):
                digest.update(np.ascontiguousarray(array).tobytes())
        if self.ahead_ids is not None and self.ahead_chances is not None:
            digest.update(repr((self.horizons, self.ahead_ids.shape)).encode())
            for start in range(0, self.n_tokens, 4096):
                for part in (self.ahead_ids, self.ahead_chances):
                    digest.update(np.ascontiguousarray(part[start : start + 4096]).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the .npz file in one go; an old one is replaced only by a whole one."""
        arrays: dict[str, Any] = {
            name: getattr(self, name)
            for name in (*_ROW_COLUMNS, "prompt_start", *OPTIONAL)
            if getattr(self, name) is not None
        }
        arrays["meta"] = np.array(json.dumps(dict(self.meta)))
        path = Path(path)
        unfinished = path.with_name(path.name + ".tmp")
        try:
            with unfinished.open("wb") as file:
                np.savez_compressed(file, **arrays)
            unfinished.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise TraceError(f"trace {path} cannot be written: {error}") from error


_ROW_COLUMNS = ("ids", "path", "step", "sequence", "position", "token_id", "is_decode")
OPTIONAL = ("weights", "token_hash", "ahead_ids", "ahead_chances")
"""Columns of a trace, one row a token, that it may lack."""


def geometry_meta(geometry: Geometry) -> dict[str, list[int]]:
    """Return the part of a trace's meta that tells the model's layers and slots."""
    return {name: getattr(geometry, name).tolist() for name in _PER_LAYER_META}


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A step that is not written yet; its arrays are the receiver's to keep."""

    step: Step
    number: int
    is_decode: NDArray[np.bool_] | None

    def decoded(self) -> NDArray[np.bool_]:
        if self.is_decode is not None:
            return np.asarray(self.is_decode, np.bool_)
        decoded: NDArray[np.bool_] = self.step.positions != 0
        if self.step.n_tokens > 1:
            _, of, count = np.unique(self.step.sequences, return_inverse=True, return_counts=True)
            decoded &= count[of] == 1
        return decoded


def part_of(path: Path) -> Path:
    """Return where what belongs to the trace `path` is while it is recorded."""
    return path.with_name(path.name + ".part")


def check_part(path: Path) -> None:
    """Raise `TraceError` if another recording of `path` is under way, or left what `path` does not hold."""
    part = part_of(path)
    try:
        size = part.stat().st_size
        if size <= len(_MAGIC):
            return
        with part.open("rb") as file:
            is_free = _locked(file)
    except OSError:
        return  # or what opens it meets the same
    if not is_free:
        raise _under_way(path)
    try:
        is_kept = path.exists() and load(part).hash() == load(path).hash()
    except TraceError:
        is_kept = False
    if not is_kept:
        raise TraceError(
            f"trace {path} cannot be recorded: {part} holds {size} bytes of another recording, which was "
            f"killed; `fate report {part}` shows it; move it or remove it, or record elsewhere"
        )


def _under_way(path: Path) -> TraceError:
    return TraceError(
        f"trace {path} cannot be recorded: another recording to {part_of(path)} is under way; record "
        "elsewhere"
    )


def _locked(file: IO[bytes]) -> bool:
    """Lock a file for as long as it is open; False if somebody else has. True where there are no locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # of a file system without locks
        pass
    return True


class TraceWriter:
    """Record steps into PATH.part and turn that into the .npz PATH when closed.

    Memory stays bounded by one block. A block reaches the file when 64 KB are waiting, when a second has
    passed since the last one, and at `close`, where an old PATH is lost. A PATH.part of another recording is
    not overwritten unless PATH holds all of it: `TraceError` says so.

    Parameters
    ----------
    meta
        Must hold the lists n_experts, k, n_slots and expert_bytes (see `geometry_meta`); JSON values. The
        horizons of in-token predictions are added to it, if the first step tells any.
    """

    def __init__(self, path: str | Path, meta: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.part = part_of(self.path)
        missing = [key for key in _PER_LAYER_META if key not in meta]
        if missing:
            raise TraceError(f"trace {self.path}: meta lacks {', '.join(missing)}")
        self.meta = {"format": FORMAT, "version": VERSION, **meta}
        n_experts = max(self.meta["n_experts"], default=0)
        if n_experts > np.iinfo(np.uint16).max:
            raise TraceError(f"trace {self.path}: {n_experts} experts do not fit the format's uint16")
        fits_byte = n_experts <= np.iinfo(np.uint8).max
        self._ids_dtype: np.dtype[Any] = np.dtype(np.uint8 if fits_byte else np.uint16)
        self._not_run = np.iinfo(np.uint8).max if fits_byte else np.iinfo(np.uint16).max
        self._columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        self._row_bytes = 0
        self._waiting: list[_Waiting] = []
        self._waiting_tokens = 0
        self._step = 0
        self._written_at = time.monotonic()
        check_part(self.path)
        try:
            self._file: IO[bytes] | None = self.part.open("ab")
            if not _locked(self._file):  # begun since it was looked for
                self._file.close()
                raise _under_way(self.path)
            if os.fstat(self._file.fileno()).st_size:
                self._file.truncate(0)
            self._file.write(_MAGIC)
            self._file.flush()
        except OSError as error:
            raise TraceError(f"trace {self.path} cannot be recorded: {error}") from error

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, step: Step, is_decode: NDArray[np.bool_] | None = None) -> None:
        """Record one step. All steps of a recording tell weights, or none does, and so with predictions.

        Parameters
        ----------
        is_decode
            bool (n_tokens,): generated tokens. None: those that are alone of their sequence in the step and
            not at position 0, which takes a prompt fed token by token for generated text.
        """
        if self._file is None:
            raise TraceError(f"trace {self.path} is closed")
        if not step.n_tokens:
            return
        shape = step.ids.shape[1:], step.weights is not None, self._ahead_shape(step), step.horizons
        if not self._columns:
            self._shape, self._columns = shape, self._layout(*shape[:3])
            if step.ahead_ids is not None:
                self.meta["horizons"] = list(step.horizons)
            self._row_bytes = sum(dtype.itemsize * math.prod(size) for dtype, size in self._columns.values())
            layout = {name: [dtype.str, list(size)] for name, (dtype, size) in self._columns.items()}
            self._write(b"META", json.dumps({"meta": self.meta, "columns": layout}).encode())
        elif shape != self._shape:
            raise TraceError(
                f"trace {self.path}: a step holds {self._layout(*shape[:3])}, horizons {step.horizons}, the "
                f"steps before {self._columns}, horizons {self._shape[3]}; record them apart"
            )
        self._waiting.append(_Waiting(step, self._step, is_decode))
        self._step += 1
        self._waiting_tokens += step.n_tokens
        is_full = self._waiting_tokens * self._row_bytes >= _FLUSH_BYTES
        if is_full or time.monotonic() - self._written_at >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Hand what waits to the operating system."""
        if not self._waiting:
            return
        waiting, self._waiting, self._waiting_tokens = self._waiting, [], 0
        rows = self._rows(waiting)
        payload = [struct.pack("<I", len(rows["step"]))]
        payload += [rows[name].astype(dtype).tobytes() for name, (dtype, _) in self._columns.items()]
        self._write(b"ROWS", b"".join(payload))

    def close(self) -> None:
        """Write the .npz file and remove the .part; a second call does nothing.

        If that fails, the .part stays and `load` reads it.
        """
        if self._file is None:
            return
        if not self._columns:
            self._write(b"META", json.dumps({"meta": self.meta, "columns": {}}).encode())
        self.flush()
        self._file.close()
        self._file = None
        unfinished = self.path.with_name(self.path.name + ".tmp")
        try:
            _finish(self.part, unfinished, self._ids_dtype)
            unfinished.replace(self.path)
            self.part.unlink()
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise TraceError(
                f"trace {self.path} cannot be written: {error}; what was recorded is kept in {self.part}"
            ) from error

    def _ahead_shape(self, step: Step) -> tuple[int, ...] | None:
        """Return the shape of a row of the step's in-token predictions, None without any."""
        if step.ahead_ids is None:
            if step.ahead_chances is not None or step.horizons:
                raise TraceError(
                    f"trace {self.path}: a step tells horizons {step.horizons} or ahead_chances, and no "
                    "ahead_ids; expected all three or none"
                )
            return None
        shape = (*step.ids.shape[:2], len(step.horizons), step.ahead_ids.shape[-1])
        for name, array in (("ahead_ids", step.ahead_ids), ("ahead_chances", step.ahead_chances)):
            if array is None or array.shape != shape:
                found = "none" if array is None else f"shape {array.shape}"
                raise TraceError(
                    f"trace {self.path}: {name} of a step: {found}; expected shape {shape}, for horizons "
                    f"{step.horizons}"
                )
        if max(self.meta["n_experts"]) - 1 > np.iinfo(np.int16).max:
            raise TraceError(
                f"trace {self.path}: predictions among {max(self.meta['n_experts'])} experts do not fit the "
                "format's int16; record without prefetch: layer"
            )
        return shape[1:]

    def _layout(
        self, ids_shape: tuple[int, ...], has_weights: bool, ahead_shape: tuple[int, ...] | None
    ) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        """Return each column's dtype and the shape of a row, in the order of the file."""
        columns: dict[str, tuple[DTypeLike, tuple[int, ...]]] = {
            "ids": (self._ids_dtype, ids_shape),
            "path": (np.uint8, ids_shape[:1]),
            **dict.fromkeys(("step", "sequence", "position", "token_id"), (np.int32, ())),
            "is_decode": (np.bool_, ()),
        }
        if has_weights:
            columns["weights"] = (np.float16, ids_shape)
        if ahead_shape is not None:
            columns |= {"ahead_ids": (np.int16, ahead_shape), "ahead_chances": (np.float32, ahead_shape)}
        return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in columns.items()}

    def _rows(self, waiting: list[_Waiting]) -> dict[str, NDArray[Any]]:
        steps = [one.step for one in waiting]
        ids = np.concatenate([step.ids for step in steps])
        path = np.concatenate([step.path for step in steps])
        ids[path == NOT_RUN] = -1
        ids[ids < 0] = self._not_run
        rows: dict[str, NDArray[Any]] = {
            "ids": ids,
            "path": path,
            "step": np.repeat([one.number for one in waiting], [step.n_tokens for step in steps]),
            "sequence": np.concatenate([step.sequences for step in steps]),
            "position": np.concatenate([step.positions for step in steps]),
            "token_id": np.concatenate([step.tokens for step in steps]),
            "is_decode": np.concatenate([one.decoded() for one in waiting]),
        }
        for name in ("weights", "ahead_ids", "ahead_chances"):
            if name in self._columns:
                rows[name] = np.concatenate([getattr(step, name) for step in steps])
        return rows

    def _write(self, tag: bytes, payload: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(_HEADER.pack(tag, len(payload), zlib.crc32(payload)))
            self._file.write(payload)
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # it tries to write the same bytes again
                file.close()
            raise TraceError(
                f"trace {self.path} cannot be written: {error}; what came before is kept in {self.part}"
            ) from error
        self._written_at = time.monotonic()


def load(path: str | Path) -> Trace:
    """Read a trace: an .npz file, a .part file, or the .part that a killed recording of `path` left.

    Also reads files without steps and paths, as one step for each token, on the pool path.
    """
    path = Path(path)
    if not path.exists() and part_of(path).exists():
        path = part_of(path)
    try:
        with path.open("rb") as file:
            is_part = file.read(len(_MAGIC)) == _MAGIC
        arrays = _load_part(path) if is_part else _load_npz(path)
    except FileNotFoundError:
        raise TraceError(f"trace {path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise TraceError(f"trace {path} cannot be read: {why_unreadable(error)}") from error
    return _checked(path, arrays)


def why_unreadable(error: Exception) -> str:
    """Return what numpy met, without its advice to allow pickles."""
    return "it holds Python objects, not numbers" if "allow_pickle" in str(error) else str(error)


def _load_npz(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise TraceError(f"trace {path} is not an .npz file, or one cut short")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _load_part(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        part = _Part(file, path)
        arrays: dict[str, Any] = {
            name: np.concatenate([np.empty((0, *shape), dtype), *part.column(name)])
            for name, (dtype, shape) in part.columns.items()
        }
        arrays["meta"] = np.array(json.dumps(part.meta))
    return arrays


class _Part:
    """The whole blocks of a .part file; a torn last one is left out, damage before it is an error."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._blocks: list[tuple[int, int]] = []
        size = os.fstat(file.fileno()).st_size
        at = len(_MAGIC)
        columns = None
        while at + _HEADER.size <= size:
            file.seek(at)
            tag, length, checksum = _HEADER.unpack(file.read(_HEADER.size))
            end = at + _HEADER.size + length
            if end > size:
                break
            payload = file.read(length)
            if zlib.crc32(payload) != checksum or tag not in (b"META", b"ROWS"):
                if end == size:
                    break
                raise TraceError(f"trace {path} is damaged at byte {at}")
            if tag == b"META":
                head = json.loads(payload)
                self.meta, columns = head["meta"], head["columns"]
            else:
                self._blocks.append((at + _HEADER.size + 4, struct.unpack_from("<I", payload)[0]))
            at = end
        if columns is None:
            raise TraceError(
                f"trace {path} holds nothing: its recording ended before the first token was written"
            )
        self.columns = {name: (np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in columns.items()}
        self.n_tokens = sum(n for _, n in self._blocks)

    def column(self, name: str) -> Iterator[NDArray[Any]]:
        """Yield the column block by block."""
        before = 0
        for other, (dtype, shape) in self.columns.items():
            row_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            if other == name:
                break
            before += row_bytes
        for at, n in self._blocks:
            self._file.seek(at + before * n)
            yield np.frombuffer(self._file.read(row_bytes * n), dtype).reshape(n, *shape)


def _finish(part_path: Path, path: Path, ids_dtype: np.dtype[Any]) -> None:
    """Turn blocks into an .npz file, one column after the other, one block in memory."""
    with (
        part_path.open("rb") as file,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as target,
    ):
        part = _Part(file, part_path)
        columns = part.columns or _empty_columns(part.meta, ids_dtype)
        for name, (dtype, shape) in columns.items():
            with target.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype.str, "fortran_order": False, "shape": (part.n_tokens, *shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for block in part.column(name) if part.columns else ():
                    member.write(block.tobytes())
        starts: list[NDArray[np.int64]] = []
        seen = 0
        for position in part.column("position") if part.columns else ():
            starts.append(np.flatnonzero(position == 0) + seen)
            seen += len(position)
        whole = {
            "prompt_start": _with_first(np.concatenate([np.empty(0, np.int64), *starts]), part.n_tokens),
            "meta": np.array(json.dumps(part.meta)),
        }
        for name, array in whole.items():
            with target.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def _empty_columns(
    meta: Mapping[str, Any], ids_dtype: np.dtype[Any]
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    n_layers = len(meta["n_experts"])
    shapes: dict[str, tuple[DTypeLike, tuple[int, ...]]] = {
        "ids": (ids_dtype, (n_layers, max(meta["k"], default=0))),
        "path": (np.uint8, (n_layers,)),
        "is_decode": (np.bool_, ()),
    }
    return {
        name: (np.dtype(shapes.get(name, (np.int32,))[0]), shapes.get(name, (None, ()))[1])
        for name in _ROW_COLUMNS
    }


def _with_first(starts: NDArray[np.integer], n_tokens: int) -> NDArray[np.int32]:
    if n_tokens and (not len(starts) or starts[0] != 0):
        starts = np.concatenate(([0], starts))
    return starts.astype(np.int32)


def _checked(path: Path, arrays: dict[str, Any]) -> Trace:
    """Fill in what older files lack, and refuse what does not fit together."""

    def fail(fault: str) -> TraceError:
        return TraceError(f"trace {path}: {fault}")

    try:
        meta = json.loads(str(arrays.get("meta", "{}")))
    except ValueError:
        raise fail("meta is not JSON") from None
    if not isinstance(meta, dict):
        raise fail("meta is not a JSON object")
    if meta.get("format", FORMAT) != FORMAT or meta.get("version", VERSION) != VERSION:
        raise fail(
            f"format {meta.get('format')!r} version {meta.get('version')!r}; this reads {FORMAT!r} {VERSION}"
        )
    if "ids" not in arrays:
        if meta.get("format") == FORMAT:  # a recording that was killed before its first token
            empty = _empty_columns(meta, np.dtype(np.uint8))
            arrays |= {name: np.empty((0, *shape), dtype) for name, (dtype, shape) in empty.items()}
        else:
            raise fail(f"has no array 'ids' (it holds {', '.join(sorted(arrays)) or 'nothing'})")
    ids = arrays["ids"]
    if ids.ndim != 3 or ids.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise fail(f"ids is {ids.dtype} of shape {ids.shape}; expected uint8 or uint16 (tokens, layers, k)")
    n_tokens, n_layers, max_k = ids.shape
    not_run = ids == np.iinfo(ids.dtype).max
    for key in ("n_experts", "k"):
        meta[key] = _per_layer(meta.get(key), n_layers)
    if meta["n_experts"] is None or meta["k"] is None or max(meta["k"], default=0) > max_k:
        raise fail(f"meta must give n_experts and k, at most {max_k}, of {n_layers} layers")
    for key in ("n_slots", "expert_bytes"):
        meta[key] = _per_layer(meta.get(key), n_layers)
    beyond = (ids >= np.array(meta["n_experts"], np.int64)[:, None]) & ~not_run
    if beyond.any():
        token, layer, rank = np.argwhere(beyond)[0]
        raise fail(
            f"token {token} routes to expert {ids[token, layer, rank]} in layer {layer}, "
            f"which has {meta['n_experts'][layer]}"
        )
    token_axis = np.arange(n_tokens, dtype=np.int32)
    given = arrays.get("prompt_start", np.zeros(0, np.int32))
    starts = _with_first(
        np.flatnonzero(arrays["position"] == 0) if "position" in arrays and not len(given) else given,
        n_tokens,
    )
    sequence = (np.searchsorted(starts, token_axis, side="right") - 1).astype(np.int32)
    ran = (
        np.where(not_run.all(axis=2), NOT_RUN, POOL).astype(np.uint8)
        if n_tokens
        else np.empty((0, n_layers), np.uint8)
    )
    columns: dict[str, NDArray[Any]] = {
        "path": ran,
        "step": token_axis,
        "sequence": sequence,
        "position": token_axis - starts[sequence] if n_tokens else token_axis,
        "token_id": np.full(n_tokens, -1, np.int32),
        "is_decode": np.ones(n_tokens, np.bool_),
    }
    for name, default in columns.items():
        array = arrays.get(name, default)
        if array.shape != default.shape or array.dtype.kind not in "iub":
            raise fail(
                f"{name} is {array.dtype} of shape {array.shape}; expected {default.dtype} {default.shape}"
            )
        columns[name] = array.astype(default.dtype, copy=False)
    if (columns["path"] > BYPASS).any():
        raise fail(f"path holds {columns['path'].max()}; expected 0 to {BYPASS}")
    if (np.diff(columns["step"]) < 0).any():
        raise fail("step goes backwards")
    weights = arrays.get("weights")
    if weights is not None and weights.shape != ids.shape:
        raise fail(f"weights have shape {weights.shape}; expected {ids.shape}")
    ahead: dict[str, Any] = {name: arrays[name] for name in ("ahead_ids", "ahead_chances") if name in arrays}
    if (ahead or meta.get("horizons")) and (fault := _ahead_fault(ahead, meta, n_tokens, n_layers)):
        raise fail(fault)
    return Trace(
        ids=ids,
        prompt_start=starts,
        weights=weights,
        token_hash=arrays.get("token_hash"),
        meta=meta,
        **columns,
        **ahead,
    )


def _ahead_fault(
    ahead: Mapping[str, NDArray[Any]], meta: Mapping[str, Any], n_tokens: int, n_layers: int
) -> str | None:
    """Say what is wrong with recorded in-token predictions, None if nothing is."""
    horizons = meta.get("horizons", [])
    if (
        not isinstance(horizons, list)
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in horizons)
        or sorted(set(horizons), reverse=True) != horizons
    ):
        return f"meta gives horizons {horizons!r}; expected whole numbers of layers, the farthest first"
    shape = (n_tokens, n_layers, len(horizons))
    for name, dtype in (("ahead_ids", np.int16), ("ahead_chances", np.float32)):
        if name not in ahead:
            return f"has no array {name!r}, and meta gives horizons {horizons!r}; expected both or neither"
        array = ahead[name]
        if array.dtype != dtype or array.ndim != 4 or array.shape[:3] != shape or not horizons:
            return (
                f"{name} is {array.dtype} of shape {array.shape}; expected {np.dtype(dtype)} "
                f"({', '.join(map(str, shape))}, n_ahead), with horizons {horizons!r}"
            )
    if (one := ahead["ahead_ids"]).shape != (other := ahead["ahead_chances"]).shape:
        return f"ahead_ids have shape {one.shape}, ahead_chances {other.shape}; expected the same"
    limit = np.array(meta["n_experts"], np.int64)[:, None, None]
    for start in range(0, n_tokens, 1024):
        ids, chances = one[start : start + 1024], other[start : start + 1024]
        named = ids >= 0
        ranked = np.sort(ids, axis=3)
        chance = np.where(named, chances, 0)
        later, earlier = np.s_[..., 1:], np.s_[..., :-1]
        faults = {
            f"one that does not exist; expected -1 to {limit.max() - 1}": (ids < -1) | (ids >= limit),
            "one after a -1; expected the -1 last": named[later] & ~named[earlier],
            "one whose chance is no number above 0": named & ~((chances > 0) & (chances < np.inf)),
            "a likelier one later; expected the likeliest first": chance[later] > chance[earlier],
            "one twice; expected each once": (ranked[later] == ranked[earlier]) & (ranked[later] >= 0),
        }
        for fault, where in faults.items():
            if where.any():
                token, layer, horizon, _ = np.argwhere(where)[0].tolist()
                at = f"token {start + token}, layer {layer}, horizon {horizons[horizon]}"
                return f"ahead_ids names, of experts for {at}, {fault}"
    return None


def _per_layer(value: Any, n_layers: int) -> list[int] | None:
    if isinstance(value, int):
        return [value] * n_layers
    if isinstance(value, list) and len(value) == n_layers and all(isinstance(item, int) for item in value):
        return value
    return None
