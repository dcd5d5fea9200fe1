"""What is preloaded times the launches of graphs, and changes nothing else of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import graph_time

HERE = Path(__file__).resolve().parent
PROGRAM = """
import ctypes, sys
from bench.graph_time import taken
cuda = ctypes.CDLL(sys.argv[1])
launch = ctypes.CDLL(None).cudaGraphLaunch
stream, beside = ctypes.c_void_p(7), ctypes.c_void_p(8)
status = [launch(ctypes.c_void_p(40 + i), stream) for i in range(9)]
first = taken().tolist()
status += [launch(ctypes.c_void_p(90), beside)]
status += [launch(ctypes.c_void_p(50), stream)]
print(status, first, taken().tolist(), cuda.n_launched())
"""
RUNTIME = """
#include <stdint.h>
static int n_events, n_launches, now;
static int at[16];
int cudaEventCreate(void **event) { *event = (void *)(uintptr_t)(1 + n_events++); return 0; }
int cudaEventRecord(void *event, void *stream) { at[(uintptr_t)event] = now; return stream != (void *)7; }
int cudaEventElapsedTime(float *ms, void *from, void *to) {
  *ms = (float)(at[(uintptr_t)to] - at[(uintptr_t)from]);
  return 0;
}
int cudaStreamGetPriority(void *stream, int *priority) { *priority = stream == (void *)8 ? -5 : 0; return 0; }
int cudaGraphLaunch(void *graph, void *stream) {
  now += stream == (void *)7 ? (int)(uintptr_t)graph : 0; // the other runs beside
  ++n_launches;
  return stream != (void *)7 && stream != (void *)8;
}
int n_launched(void) { return n_launches; }
"""


def test_launches_are_timed(tmp_path: Path) -> None:
    """Of a runtime whose graphs take as many milliseconds as their handle says."""
    source, runtime = tmp_path / "runtime.c", tmp_path / "libcudart.so.13"
    source.write_text(RUNTIME, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", runtime], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(graph_time.compile_timer(tmp_path)),
        "PYTHONPATH": str(HERE.parent.parent),
    }
    command = [sys.executable, "-c", PROGRAM, str(runtime)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # a launch is read when IN_FLIGHT more have been made
    assert graph_time.IN_FLIGHT == 4
    assert done.stdout.split("\n")[0] == f"{[0] * 11} [40.0, 41.0, 42.0, 43.0, 44.0] [45.0] 11"


def test_a_line_tells_both(capsys: pytest.CaptureFixture[str]) -> None:
    told = graph_time.line("lru@50", {"graph": [2.0, 3.0, 4.0], "token": [3.0, 3.5, 4.5]})
    assert "graph p10    2200 us, median    3000; token p10    3100, median    3500; n 3" in told
