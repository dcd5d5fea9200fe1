"""Write a model of random weights with the shape and types of Qwen3-30B-A3B in Q4_K_M; experts differ.

Weights are slices of one random pool at random places, so that writing is as fast as the disk.
"""

from __future__ import annotations

import argparse
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

F32, Q4_K, Q6_K = 0, 12, 14
BLOCK = {F32: (1, 4), Q4_K: (256, 144), Q6_K: (256, 210)}
ALIGNMENT = 32
N_EMBD, N_HEAD, N_HEAD_KV, HEAD, N_FF, N_EXPERT, K, N_VOCAB = 2048, 32, 4, 128, 768, 128, 8, 151936


@dataclass
class Tensor:
    name: str
    shape: tuple[int, ...]
    type: int
    kind: str = "weight"  # norm: ones; router: normal numbers
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        per, size = BLOCK[self.type]
        return int(np.prod(self.shape)) // per * size


def tensors(n_layers: int) -> list[Tensor]:
    made = [
        Tensor("token_embd.weight", (N_EMBD, N_VOCAB), Q4_K),
        Tensor("output.weight", (N_EMBD, N_VOCAB), Q6_K),
    ]
    made.append(Tensor("output_norm.weight", (N_EMBD,), F32, "norm"))
    for i in range(n_layers):
        more = i < n_layers // 8 or i >= 7 * n_layers // 8 or (i - n_layers // 8) % 3 == 2
        for name, shape, kind, to in (
            ("attn_norm", (N_EMBD,), F32, "norm"),
            ("attn_q", (N_EMBD, N_HEAD * HEAD), Q4_K, "weight"),
            ("attn_k", (N_EMBD, N_HEAD_KV * HEAD), Q4_K, "weight"),
            ("attn_v", (N_EMBD, N_HEAD_KV * HEAD), Q6_K if more else Q4_K, "weight"),
            ("attn_output", (N_HEAD * HEAD, N_EMBD), Q4_K, "weight"),
            ("attn_q_norm", (HEAD,), F32, "norm"),
            ("attn_k_norm", (HEAD,), F32, "norm"),
            ("ffn_norm", (N_EMBD,), F32, "norm"),
            ("ffn_gate_inp", (N_EMBD, N_EXPERT), F32, "router"),
            ("ffn_gate_exps", (N_EMBD, N_FF, N_EXPERT), Q4_K, "weight"),
            ("ffn_up_exps", (N_EMBD, N_FF, N_EXPERT), Q4_K, "weight"),
            ("ffn_down_exps", (N_FF, N_EMBD, N_EXPERT), Q6_K if more else Q4_K, "weight"),
        ):
            made.append(Tensor(f"blk.{i}.{name}.weight", shape, kind, to))
    offset = 0
    for tensor in made:
        tensor.offset = offset
        offset += -(-tensor.n_bytes // ALIGNMENT) * ALIGNMENT
    return made


def header(made: list[Tensor], n_layers: int) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs: list[tuple[str, str | int | float]] = [
        ("general.architecture", "qwen3moe"),
        ("general.name", f"random Qwen3-30B-A3B shape, {n_layers} layers"),
        ("qwen3moe.block_count", n_layers),
        ("qwen3moe.context_length", 40960),
        ("qwen3moe.embedding_length", N_EMBD),
        ("qwen3moe.feed_forward_length", 6144),
        ("qwen3moe.attention.head_count", N_HEAD),
        ("qwen3moe.attention.head_count_kv", N_HEAD_KV),
        ("qwen3moe.attention.key_length", HEAD),
        ("qwen3moe.attention.value_length", HEAD),
        ("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6),
        ("qwen3moe.rope.freq_base", 1e6),
        ("qwen3moe.expert_count", N_EXPERT),
        ("qwen3moe.expert_used_count", K),
        ("qwen3moe.expert_feed_forward_length", N_FF),
        ("qwen3moe.vocab_size", N_VOCAB),
        ("tokenizer.ggml.model", "none"),
    ]
    out = b"GGUF" + struct.pack("<IQQ", 3, len(made), len(pairs))
    for key, value in pairs:
        out += text(key)
        if isinstance(value, str):
            out += struct.pack("<I", 8) + text(value)
        elif isinstance(value, int):
            out += struct.pack("<II", 4, value)
        else:
            out += struct.pack("<If", 6, value)
    for tensor in made:
        out += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        out += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape) + struct.pack(
            "<IQ", tensor.type, tensor.offset
        )
    return out + bytes(-len(out) % ALIGNMENT)


def pool_of(kind: int, rng: np.random.Generator, n_bytes: int = 96 << 20) -> np.ndarray:
    """Return random blocks whose weights have a mean near 0 and a deviation near 0.02."""
    size = BLOCK[kind][1]
    blocks = np.frombuffer(bytearray(rng.bytes(n_bytes // size * size)), np.uint8).reshape(-1, size)
    if kind == Q4_K:
        scales = np.array([8e-5, 7.5 * 8e-5], np.float16)
        blocks[:, 0:4] = np.frombuffer(scales.tobytes(), np.uint8)
    else:
        blocks[:, 208:210] = np.frombuffer(np.array([1.5e-5], np.float16).tobytes(), np.uint8)
    return blocks.reshape(-1)


def write(path: Path, n_layers: int, seed: int = 0, threads: int = 16) -> int:
    rng = np.random.default_rng(seed)
    made = tensors(n_layers)
    head = header(made, n_layers)
    pools = {kind: pool_of(kind, rng) for kind in (Q4_K, Q6_K)}
    jobs: list[tuple[int, memoryview]] = []
    for tensor in made:
        at = len(head) + tensor.offset
        if tensor.kind == "norm":
            jobs.append((at, memoryview(np.ones(tensor.shape, np.float32)).cast("B")))
        elif tensor.kind == "router":
            router = rng.normal(0, 0.02, tensor.shape[::-1]).astype(np.float32)
            jobs.append((at, memoryview(router.reshape(-1)).cast("B")))
        else:
            size, pool = BLOCK[tensor.type][1], memoryview(pools[tensor.type])
            piece = tensor.n_bytes // (N_EXPERT if len(tensor.shape) == 3 else 8)
            for start in range(0, tensor.n_bytes, piece):
                n = min(piece, tensor.n_bytes - start)
                place = int(rng.integers((len(pool) - n) // size)) * size
                jobs.append((at + start, pool[place : place + n]))
    total = len(head) + made[-1].offset + made[-1].n_bytes
    with path.open("wb") as file:
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
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    args = parser.parse_args()
    began = time.monotonic()
    n = write(args.path, args.layers)
    print(f"{args.path}: {n / 1e9:.2f} GB in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
