"""Models of random weights with the shapes and types of real ones; experts differ, so that wrong slots show.

Weights are slices of one random pool at random places, so that writing is as fast as the disk.
"""

from __future__ import annotations

import hashlib
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_bind.modelfile import EMBEDDED

F32, Q8_0, Q4_K, Q5_K, Q6_K, MXFP4 = 0, 8, 12, 13, 14, 39
BLOCK = {F32: (1, 4), Q8_0: (32, 34), Q4_K: (256, 144), Q5_K: (256, 176), Q6_K: (256, 210), MXFP4: (32, 17)}
ALIGNMENT = 32
POOL_BYTES = 96 << 20
VERSION = 1
"""Of what is written for a shape and a seed."""


@dataclass(frozen=True)
class Shape:
    """What a model is made of.

    experts : quantisation of the expert weights, "Q4_K_M" (down is Q6_K in half of the layers) or "MXFP4"
    path : a file that exists; None: generated
    """

    name: str
    arch: str
    n_layers: int
    n_experts: int
    k: int
    n_vocab: int
    n_embd: int = 0
    n_ff: int = 0
    n_head: int = 0
    n_head_kv: int = 0
    head: int = 0
    experts: str = "Q4_K_M"
    path: Path | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the generated file."""
        if self.path is not None:
            return self.path.stat().st_size
        made = tensors(self)
        return len(_header(self, made)) + made[-1].offset + made[-1].n_bytes


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "qwen3moe", 8, 32, 4, 16384, path=EMBEDDED),
        Shape("qwen3", "qwen3moe", 48, 128, 8, 151936, 2048, 768, 32, 4, 128),
        Shape("mixtral", "llama", 32, 8, 2, 32000, 4096, 14336, 32, 8, 128),
        Shape("gptoss", "gpt-oss", 24, 32, 4, 201088, 2880, 2880, 64, 8, 64, "MXFP4"),
        Shape("qwen235", "qwen3moe", 94, 128, 8, 151936, 4096, 1536, 64, 4, 128),
    )
}
TITLES = {
    "tiny": "tiny-moe-31m (embedded)",
    "qwen3": "Qwen3-30B-A3B shape",
    "mixtral": "Mixtral-8x7B shape",
    "gptoss": "gpt-oss-20b shape",
    "qwen235": "Qwen3-235B-A22B shape",
}


@dataclass
class Tensor:
    name: str
    shape: tuple[int, ...]
    type: int
    kind: str = "weight"
    """norm: ones; small: normal numbers (routers, biases); weight: blocks of the pool."""
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        per, size = BLOCK[self.type]
        return int(np.prod(self.shape)) // per * size


def fitting(shape: Shape, n_bytes: int) -> Shape:
    """Return the shape with as many of its layers as fit."""
    while shape.n_bytes > n_bytes and shape.n_layers > 1:
        shape = replace(shape, n_layers=shape.n_layers - 1)
    return shape


def _has_more_bits(layer: int, n_layers: int) -> bool:
    """Say which layers llama.cpp gives more bits in Q4_K_M."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _layer(s: Shape, i: int) -> list[Tensor]:
    q, kv, e = s.n_head * s.head, s.n_head_kv * s.head, s.n_experts
    if s.experts == "MXFP4":
        attention = [Q8_0] * 4
        gate, down = MXFP4, MXFP4
    else:
        more = Q6_K if _has_more_bits(i, s.n_layers) else Q4_K
        attention = [Q4_K, Q8_0, Q8_0, Q5_K] if e == 8 else [Q4_K, Q4_K, more, Q4_K]
        gate, down = Q4_K, more
    rows: list[tuple[str, tuple[int, ...], int, str]] = [
        ("attn_norm.weight", (s.n_embd,), F32, "norm"),
        ("attn_q.weight", (s.n_embd, q), attention[0], "weight"),
        ("attn_k.weight", (s.n_embd, kv), attention[1], "weight"),
        ("attn_v.weight", (s.n_embd, kv), attention[2], "weight"),
        ("attn_output.weight", (q, s.n_embd), attention[3], "weight"),
        ("ffn_gate_inp.weight", (s.n_embd, e), F32, "small"),
        ("ffn_gate_exps.weight", (s.n_embd, s.n_ff, e), gate, "weight"),
        ("ffn_up_exps.weight", (s.n_embd, s.n_ff, e), gate, "weight"),
        ("ffn_down_exps.weight", (s.n_ff, s.n_embd, e), down, "weight"),
    ]
    if s.arch == "qwen3moe":
        rows += [(f"attn_{x}_norm.weight", (s.head,), F32, "norm") for x in "qk"]
    if s.arch == "gpt-oss":
        sizes = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": s.n_embd, "ffn_gate_inp": e}
        rows += [(f"{name}.bias", (size,), F32, "small") for name, size in sizes.items()]
        rows += [
            ("ffn_gate_exps.bias", (s.n_ff, e), F32, "small"),
            ("ffn_up_exps.bias", (s.n_ff, e), F32, "small"),
            ("ffn_down_exps.bias", (s.n_embd, e), F32, "small"),
            ("attn_sinks.weight", (s.n_head,), F32, "small"),
            ("post_attention_norm.weight", (s.n_embd,), F32, "norm"),
        ]
    else:
        rows.append(("ffn_norm.weight", (s.n_embd,), F32, "norm"))
    return [Tensor(f"blk.{i}.{name}", *rest) for name, *rest in rows]  # type: ignore[arg-type]


def tensors(shape: Shape) -> list[Tensor]:
    is_q8 = shape.experts == "MXFP4"
    made = [
        Tensor("token_embd.weight", (shape.n_embd, shape.n_vocab), Q8_0 if is_q8 else Q4_K),
        Tensor("output.weight", (shape.n_embd, shape.n_vocab), Q8_0 if is_q8 else Q6_K),
        Tensor("output_norm.weight", (shape.n_embd,), F32, "norm"),
    ]
    for i in range(shape.n_layers):
        made += _layer(shape, i)
    offset = 0
    for tensor in made:
        tensor.offset = offset
        offset += -(-tensor.n_bytes // ALIGNMENT) * ALIGNMENT
    return made


def _header(s: Shape, made: list[Tensor]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    own: dict[str, Any] = {
        "block_count": s.n_layers,
        "context_length": 32768,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff,
        "attention.head_count": s.n_head,
        "attention.head_count_kv": s.n_head_kv,
        "attention.key_length": s.head,
        "attention.value_length": s.head,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "expert_count": s.n_experts,
        "expert_used_count": s.k,
        "vocab_size": s.n_vocab,
    }
    if s.arch == "llama":
        own["rope.dimension_count"] = s.head
    else:
        own["expert_feed_forward_length"] = s.n_ff
    if s.arch == "gpt-oss":
        own["attention.sliding_window"] = 128
    pairs = {
        "general.architecture": s.arch,
        "general.name": f"random weights, {TITLES[s.name]}, {s.n_layers} layers",
        **{f"{s.arch}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": "none",
    }
    out = b"GGUF" + struct.pack("<IQQ", 3, len(made), len(pairs))
    for key, value in pairs.items():
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, int):
            out += struct.pack("<II", 4, value)
        else:
            out += struct.pack("<If", 6, value)
    for tensor in made:
        out += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        out += struct.pack("<IQ", tensor.type, tensor.offset)
    return out + bytes(-len(out) % ALIGNMENT)


def _pool(kind: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return random blocks whose weights have a mean near 0 and a deviation near 0.02."""
    size = BLOCK[kind][1]
    blocks = np.frombuffer(bytearray(rng.bytes(POOL_BYTES // size * size)), np.uint8).reshape(-1, size)

    def halves(*values: float) -> NDArray[np.uint8]:
        return np.frombuffer(np.array(values, np.float16).tobytes(), np.uint8)

    if kind in (Q4_K, Q5_K):  # scale and offset
        scale = 8e-5 if kind == Q4_K else 4e-5
        blocks[:, 0:4] = halves(scale, (7.5 if kind == Q4_K else 15.5) * scale)
    elif kind == Q6_K:
        blocks[:, 208:210] = halves(1.5e-5)
    elif kind == Q8_0:
        blocks[:, 0:2] = halves(2.7e-4)
    else:  # a power of two
        blocks[:, 0] = 120
    return blocks.reshape(-1)


def _bytes(array: NDArray[Any]) -> memoryview:
    data: Any = array.reshape(-1)
    return memoryview(data).cast("B")


def write(path: Path, shape: Shape, seed: int = 0, threads: int = 16) -> int:
    """Write the model; return its bytes."""
    rng = np.random.default_rng(seed)
    made = tensors(shape)
    head = _header(shape, made)
    pools = {kind: _pool(kind, rng) for kind in sorted({t.type for t in made if t.kind == "weight"})}
    jobs: list[tuple[int, memoryview]] = []
    for tensor in made:
        at = len(head) + tensor.offset
        if tensor.kind == "norm":
            jobs.append((at, _bytes(np.ones(tensor.shape, np.float32))))
        elif tensor.kind == "small":
            numbers = rng.normal(0, 0.02, tensor.shape[::-1]).astype(np.float32)
            jobs.append((at, _bytes(numbers)))
        else:
            size, pool = BLOCK[tensor.type][1], _bytes(pools[tensor.type])
            piece = tensor.n_bytes // (tensor.shape[2] if len(tensor.shape) == 3 else 8)
            while piece * 2 > len(pool):
                piece //= 2
            piece = piece // size * size
            for start in range(0, tensor.n_bytes, piece):
                n = min(piece, tensor.n_bytes - start)
                place = int(rng.integers((len(pool) - n) // size)) * size
                jobs.append((at + start, pool[place : place + n]))
    total = len(head) + made[-1].offset + made[-1].n_bytes
    unfinished = path.with_name(path.name + ".new")
    with unfinished.open("wb") as file:
        file.truncate(total)
        file.write(head)
        file.flush()

        def put(job: tuple[int, memoryview]) -> None:
            at, data = job
            while len(data):
                n = os.pwrite(file.fileno(), data, at)
                at, data = at + n, data[n:]

        with ThreadPoolExecutor(threads) as executor:
            list(executor.map(put, jobs))
    unfinished.replace(path)
    return total


def fingerprint(path: Path) -> str:
    """Return a SHA-256 of a file's size and of 256 pieces of 64 KiB spread over it."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(256):
            file.seek(i * max(0, size - (1 << 16)) // 255)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


class Models:
    """The generated models in a folder; makes room for the next one by removing others of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, shape: Shape) -> Path:
        if shape.path is not None:
            return shape.path
        return self.folder / f"fate-bench-{shape.name}-{shape.n_layers}-v{VERSION}.gguf"

    def get(self, name: str) -> tuple[Shape, Path]:
        """Return the shape, with as many layers as fit in free disk and RAM, and the model's file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        shape = SHAPES[name]
        if shape.path is None:
            shape = fitting(shape, self._room())
        path = self.path(shape)
        if not path.exists():
            self._make_room(shape.n_bytes)
            write(path, shape)
        return shape, path

    def _made(self) -> list[Path]:
        return [path for path in self.folder.glob("fate-bench-*") if path.is_file()]

    def _free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def _room(self) -> int:
        """Bytes that a model may have: of the disk without our others, and of RAM, where arms copy it."""
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        disk = self._free() + sum(path.stat().st_size for path in self._made())
        return min(disk - (2 << 30), int(ram * 0.4))

    def _make_room(self, n_bytes: int) -> None:
        for path in sorted(self._made(), key=lambda path: path.stat().st_mtime):
            if self._free() < n_bytes + (1 << 30):
                path.unlink()
