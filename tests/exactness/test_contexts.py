"""Several contexts, reload, shift, state, LoRA and split files are exact; dense models say why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from fate_bind.errors import EngineError, FateError
from fate_bind.session import Session
from fate_bind.verify import verify

from .conftest import ROOT, Build

pytestmark = pytest.mark.model

ARGS = ["-c", "256", "-ub", "32"]
TOKENS = [11, 240, 3051, 87, 912, 5, 5, 640, 12, 77, 1031, 400]


def assert_same(got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert got.shape == expected.shape
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_contexts_on_one_model_have_a_pool_each() -> None:
    with (
        Session(args=ARGS, fate=False) as plain,
        plain.fork(slots=4) as small,
        plain.fork(slots=24, mode="callback", policy="frequency") as large,
    ):
        expected = plain.logits(TOKENS)
        for token in TOKENS:  # turn by turn
            small.logits([token])
            large.logits([token])
        plain.clear()
        for session in (small, large):
            session.clear()
            assert_same(session.logits(TOKENS), expected)
            session.check()
        assert small.stats()["slots"] == 8 * 4
        assert large.stats()["slots"] == 8 * 24
        assert small.counters() != large.counters()


def test_reloaded_model_starts_cold_and_exact() -> None:
    totals = []
    logits = []
    for _ in range(2):
        with Session(args=ARGS, slots="25%") as session:
            logits.append(session.logits(TOKENS))
            session.logits(TOKENS[:1])
        totals.append(session.counters().totals())
    assert_same(logits[0], logits[1])
    assert totals[0] == totals[1]
    assert totals[0]["fills"] > 0


def test_context_shift() -> None:
    with Session(args=ARGS, fate=False) as plain, plain.fork(slots="25%") as session:
        for each in (plain, session):
            each.logits(TOKENS)
            each.shift(2, 6)
        for token in (44, 871, 9):
            assert_same(session.logits([token]), plain.logits([token]))
        assert session.counters().hits.sum() > 0


def test_state_moves_between_sessions_with_and_without_pool() -> None:
    with Session(args=ARGS, fate=False) as plain, plain.fork(slots="25%") as session:
        plain.logits(TOKENS)
        session.logits(TOKENS)
        states = plain.state(), session.state()
        expected = plain.logits([9])
        assert_same(session.logits([9]), expected)
        for each, state in ((session, states[0]), (plain, states[1])):
            each.clear()
            each.restore(state)
            assert_same(each.logits([9]), expected)
        with pytest.raises(EngineError, match="not a state of this model"):
            session.restore(b"nonsense")


def test_parallel_sequences_through_the_pool() -> None:
    args = [*ARGS, "-np", "3"]
    with Session(args=args, fate=False) as plain, plain.fork(slots=12) as session:
        for position in range(10):
            batch = [TOKENS[position], TOKENS[-1 - position], TOKENS[(position * 5) % 12]]
            where = [position] * 3, range(3)
            assert_same(session.decode(batch, *where), plain.decode(batch, *where))
        totals = session.counters().totals()
    assert totals["bypassed"] == 0
    assert totals["hits"] + totals["misses"] == 10 * 3 * 8 * 4


def write_lora(path: Path, rank: int = 4, n_embd: int = 256, n_ff: int = 128, n_expert: int = 32) -> Path:
    """Write a LoRA adapter on the experts of two layers of the embedded model."""
    random = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for layer in (1, 6):
        for name, n_in, n_out in (
            ("gate", n_embd, n_ff),
            ("up", n_embd, n_ff),
            ("down", n_ff, n_embd),
        ):
            tensor = f"blk.{layer}.ffn_{name}_exps.weight"
            for part, shape in (("a", (n_expert, rank, n_in)), ("b", (n_expert, n_out, rank))):
                data = random.normal(0, 0.05, shape).astype(np.float32)
                writer.add_tensor(f"{tensor}.lora_{part}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_lora_on_experts_keeps_its_own_ids(models: Path) -> None:
    lora = write_lora(models / "lora.gguf")
    with (
        Session(args=ARGS, fate=False) as plain,
        Session(args=[*ARGS, "--lora", str(lora)], fate=False) as tuned,
    ):
        assert not np.array_equal(plain.logits(TOKENS), tuned.logits(TOKENS))  # it does something
    for mode in ("table", "callback"):
        result = verify(args=[*ARGS, "--lora", str(lora)], prompt=TOKENS, n_tokens=30, slots="25%", mode=mode)
        assert result.message.startswith("identical"), result.message


def test_split_files(build: Build, embedded: Path, models: Path) -> None:
    done = subprocess.run(
        [build.program("llama-gguf-split"), "--split", "--split-max-size", "7M", embedded, models / "split"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first = sorted(models.glob("split-00001-of-*.gguf"))[0]
    assert len(list(models.glob("split-*.gguf"))) > 2
    result = verify(first, ARGS, n_tokens=24, slots="25%")
    assert result.message.startswith("identical"), result.message


@pytest.mark.parametrize(
    "args", [["--load-mode", "none"], ["-fa", "on"], ["-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"]]
)
def test_loading_and_attention_flags(args: list[str]) -> None:
    result = verify(args=[*ARGS, *args], n_tokens=24, slots="25%")
    assert result.message.startswith("identical"), result.message


def test_repacked_weights_are_refused() -> None:
    """A pool cannot be fed from repacked weights; nothing is silently slower or wrong."""
    with Session(args=[*ARGS, "-fit", "off"], place=False) as session:
        session.logits(TOKENS)
        stats = session.stats()
    if not stats["engaged"]:  # this CPU repacks
        assert "--no-repack" in stats["reason"]
    else:
        assert stats["layers_engaged"] == stats["layers"]


@pytest.mark.parametrize("name", ["llama", "gemma3", "mamba"])
def test_dense_models_run_and_say_why(name: str, architectures: Path) -> None:
    model = architectures / f"{name}-dense.gguf"
    with Session(model, ["-c", "64"], fate=False) as plain, plain.fork(slots="50%") as session:
        assert_same(session.logits([1, 2, 3]), plain.logits([1, 2, 3]))
        stats = session.stats()
    assert not stats["engaged"]
    assert stats["reason"] == "the model has no mixture-of-experts layers"
    with pytest.raises(FateError, match="no mixture-of-experts layers"):
        Session(model, ["-c", "64"], require=True)


def embeddings_only_model(path: Path) -> Path:
    """Write a tiny random BERT, which gives no logits."""
    random = np.random.default_rng(1)
    n_embd, n_ff, n_vocab, n_ctx = 32, 64, 64, 64
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(1)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(2)
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(n_vocab)
    writer.add_token_type_count(2)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.normal(0, 0.1, shape).astype(np.float32))

    add("token_embd.weight", n_vocab, n_embd)
    add("token_types.weight", 2, n_embd)
    add("position_embd.weight", n_ctx, n_embd)
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        add(f"{name}.weight", n_embd)
        add(f"{name}.bias", n_embd)
    for name, n_in, n_out in (
        *((f"attn_{part}", n_embd, n_embd) for part in ("q", "k", "v", "output")),
        ("ffn_up", n_embd, n_ff),
        ("ffn_down", n_ff, n_embd),
    ):
        add(f"blk.0.{name}.weight", n_out, n_in)
        add(f"blk.0.{name}.bias", n_out)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_embeddings_only_models_run_and_say_why(models: Path) -> None:
    model = embeddings_only_model(models / "bert.gguf")
    with Session(model, ["-c", "64"]) as session:
        with pytest.raises(EngineError, match="no logits"):
            session.logits([1, 2, 3])
        stats = session.stats()
    assert not stats["engaged"]
    assert stats["reason"] == "the model has no mixture-of-experts layers"


def run_json(args: list[str], stats: Path) -> dict[str, object]:
    command = [
        sys.executable,
        "-m",
        "fate_bind",
        "run",
        "-c",
        "128",
        "-n",
        "8",
        "--fate-stats",
        f"json:{stats}",
        *args,
    ]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(stats.read_text(encoding="utf-8"))
    return result


def test_fit_and_warm_up_leave_no_trace(tmp_path: Path) -> None:
    """`--fit` makes models without data, the warm-up decodes two tokens: neither is counted or cached."""
    base = ["-p", "Once upon a time", "--temp", "0", "--seed", "1"]
    cold = run_json([*base, "--no-warmup", "-fit", "off"], tmp_path / "a.json")
    warm = run_json([*base, "--warmup", "-fit", "on"], tmp_path / "b.json")
    timed = {"seconds", "policy_seconds"}
    assert {k: v for k, v in cold.items() if k not in timed} == {
        k: v for k, v in warm.items() if k not in timed
    }
    assert cold["engaged"]
