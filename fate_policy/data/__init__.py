"""Where traces are found: by path, in the folder of traces, or among those shipped."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fate_policy.checks import unknown_name
from fate_policy.errors import TraceError
from fate_policy.trace import Trace

HERE = Path(__file__).resolve().parent
FOLDER_VARIABLE = "FATE_TRACES"

EXPERT_BYTES = {"openai/gpt-oss-20b": 13253760, "Qwen3-30B-A3B (Q4_K_M GGUF)": 2_700_000}
"""Of models whose traces do not tell: bytes of one expert."""


def find(name: str | Path, folder: str | Path | None = None) -> Path:
    """Return the file of a trace given by its path or its name, such as "gptoss20b_stem".

    A name is looked for in `folder`, by default the one that FATE_TRACES names, then among those shipped.
    """
    path = Path(name)
    if path.exists() or path.with_name(path.name + ".part").exists():
        return path
    folder = folder or os.environ.get(FOLDER_VARIABLE)
    folders = [*([Path(folder)] if folder else []), HERE]
    for place in folders:
        for candidate in (place / path, place / f"{path}.npz"):
            if candidate.exists():
                return candidate
    if path.parent == Path() and path.suffix not in (".npz", ".part"):
        known = {file.stem for place in folders for file in place.glob("*.npz")}
        raise TraceError(
            f"{unknown_name('trace', str(name), known)}; more are found in the folder that --traces or "
            f"{FOLDER_VARIABLE} names"
        )
    raise TraceError(f"trace {path} does not exist")


def expert_bytes(trace: Trace, given: ArrayLike | None = None) -> NDArray[np.int64] | None:
    """Return the bytes of an expert of each layer: as given, as the trace tells, or as known of its model.

    None if nobody knows.
    """
    size = given if given is not None else trace.meta.get("expert_bytes")
    if size is None:
        size = EXPERT_BYTES.get(trace.meta.get("model", ""))
    return None if size is None else np.array(np.broadcast_to(np.array(size, np.int64), trace.n_layers))
