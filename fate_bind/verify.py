"""With and without the pool, bit for bit."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_bind import modelfile, placement
from fate_bind.errors import EngineError
from fate_bind.host import Host
from fate_bind.session import Choice, Session, resolve_config, token_ids, with_trained
from fate_bind.stats import Report
from fate_policy.config import AUTO, Slots, load

PROMPT = "Once upon a time, there was a little girl who wanted to know how the moon stays in the sky."

IDENTICAL, DIFFERENT, NOT_ENGAGED = 0, 1, 2

WITHOUT_POOL = "the same model without the pool"
IN_VRAM = "the same model with all experts in VRAM"
STAGED = "the same model with every step's experts staged, since they do not all fit in VRAM"


@dataclass(frozen=True)
class Difference:
    """The first logit that is not the reference's, and both values."""

    position: int
    token_id: int
    reference: float
    pooled: float

    def __str__(self) -> str:
        def both(value: float) -> str:
            return f"0x{struct.unpack('<I', struct.pack('<f', value))[0]:08x} ({value:.9g})"

        return (
            f"token position {self.position}, vocabulary id {self.token_id}: "
            f"{both(self.reference)} without the pool, {both(self.pooled)} with it"
        )


@dataclass(frozen=True, eq=False)
class VerifyResult:
    """What a comparison found.

    n_logits, n_tokens : compared
    report : the engine's
    reference : what the pool was compared with
    """

    n_logits: int
    n_tokens: int
    difference: Difference | None
    report: Report
    reference: str = WITHOUT_POOL

    @property
    def n_layers(self) -> int:
        return self.report.geometry.n_layers

    @property
    def n_layers_engaged(self) -> int:
        return self.report.n_layers_engaged

    @property
    def pooled(self) -> int:
        """Routed pairs that went through the pool."""
        return int((self.report.counters.hits + self.report.counters.misses).sum())

    @property
    def fills(self) -> int:
        return int(self.report.counters.fills.sum())

    @property
    def evictions(self) -> int:
        return int(self.report.counters.evictions.sum())

    @property
    def why_not(self) -> str:
        """Return why the comparison does not prove much, "" if it does."""
        if not self.report.engaged:
            return f"not engaged because {self.report.reason}"
        if self.n_layers_engaged < self.n_layers:
            return f"{self.n_layers_engaged} of {self.n_layers} MoE layers engaged: {self.report.reason}"
        if not self.pooled:
            return "no routed pair went through the pool: every batch was too large for it; give more slots"
        if not self.fills:
            return "nothing was filled"
        return ""

    @property
    def exit_code(self) -> int:
        if self.difference is not None:
            return DIFFERENT
        return NOT_ENGAGED if self.why_not else IDENTICAL

    @property
    def message(self) -> str:
        if self.difference is not None:
            return f"different: {self.difference}"
        if self.why_not:
            return f"not verified: {self.why_not}"
        return (
            f"identical: {self.n_logits} logits over {self.n_tokens} tokens, "
            f"{self.n_layers_engaged} of {self.n_layers} MoE layers engaged, "
            f"{self.pooled} pooled pairs, {self.fills} fills, {self.evictions} evictions{self._ahead}; "
            f"policy: {self.report.policy}; reference: {self.reference}"
        )

    @property
    def _ahead(self) -> str:
        prefetched = int(self.report.counters.prefetches.sum())
        if prefetched:
            return f", {prefetched} prefetched"
        return f", nothing prefetched: {self.report.no_prefetch}" if self.report.no_prefetch else ""


def verify(
    model: str | Path | None = None,
    args: Sequence[str] = (),
    *,
    prompt: str | Sequence[int] | None = None,
    n_tokens: int = 64,
    policy: Choice = AUTO,
    slots: Any = None,
    mode: str | None = None,
    sync: bool | None = None,
    vram: Any = None,
    vram_margin: Any = None,
    prefetch: str | None = None,
    prefetch_threshold: float | str | None = None,
    prefetch_experts: int | None = None,
    record: str | Path | None = None,
    require: bool = False,
    place: bool = True,
) -> VerifyResult:
    """Run prompt and greedy decode with and without the pool, in lockstep, and compare every logit.

    Stops at the first difference. At the end the engine checks its slots against the model. The reference is
    the same model without the pool; with a GPU it has all experts in VRAM, since a CPU gives other bits, or,
    where they do not fit, stages every step's experts there, which gives the same bits where they do.

    Parameters
    ----------
    args
        Flags of llama-completion; `-p` or `-f` among them give the prompt where `prompt` is None.
    n_tokens
        Tokens generated after the prompt; the end-of-text token does not stop it.
    policy, slots, mode, sync, vram, vram_margin, prefetch..., record, require, place
        As for `Session`, but by default half of the experts have slots, whatever would fit: what is to be
        verified is the pool.
    """
    config, instance = resolve_config(
        policy, slots, mode, sync, vram, vram_margin, prefetch, prefetch_threshold, prefetch_experts
    )
    if config.slots.kind == "auto" and slots is None and config.vram is None:
        config = replace(config, slots=Slots.parse("50%"))
    if instance is None:
        config = with_trained(config, modelfile.meant(model, args))
    host = Host(config, instance, Path(record) if record else None, require)  # refuses before a model loads
    with ExitStack() as stack:
        reference = stack.enter_context(Session(model, args, fate=False, place=place))
        pooled = stack.enter_context(reference.fork_with(host))
        resident = placement.resident(args) if place and placement.has_gpu() else None
        named = WITHOUT_POOL
        if resident is not None:
            reference, named = _gpu_reference(stack, model, resident, pooled)
        tokens = _prompt_tokens(reference, prompt)
        if len(tokens) + n_tokens > reference.n_ctx:
            raise EngineError(
                f"a prompt of {len(tokens)} tokens and {n_tokens} more do not fit the context of "
                f"{reference.n_ctx}; raise -c or lower -n"
            )
        position, difference = 0, None
        batches = [tokens[i : i + reference.n_batch] for i in range(0, len(tokens), reference.n_batch)]
        while batches and difference is None:
            batch = batches.pop(0)
            expected = reference.decode(batch)
            difference = _first_difference(expected, pooled.decode(batch), position)
            position += len(batch)
            if not batches and position < len(tokens) + n_tokens:
                batches = [np.array([np.argmax(expected[-1])], np.int32)]
        if difference is None:
            pooled.check()
    report = pooled.report()
    return VerifyResult(position * reference.n_vocab, position, difference, report, named)


def _gpu_reference(
    stack: ExitStack, model: str | Path | None, args: Sequence[str], pooled: Session
) -> tuple[Session, str]:
    """Open the model with all experts in VRAM beside the pool; where they do not fit, a staging context."""
    try:
        return stack.enter_context(Session(model, args, fate=False, place=False)), IN_VRAM
    except EngineError as error:
        why = error
    geometry = pooled.report().geometry
    slots = Slots.parse(max(int(geometry.k.max(initial=1)), 1))
    host = Host(replace(load("lru"), slots=slots), require=True, stage_all=True)
    try:
        return stack.enter_context(pooled.fork_with(host)), STAGED
    except EngineError as error:
        raise EngineError(
            f"no reference can be opened: with all experts in VRAM: {why}; with experts staged: {error}; "
            "take a smaller context (-c), or place the weights yourself, with -ngl and --cpu-moe, to compare "
            "with experts on the CPU"
        ) from error


def _prompt_tokens(session: Session, prompt: str | Sequence[int] | None) -> NDArray[np.int32]:
    if prompt is None:
        prompt = session.flag_prompt() or PROMPT
    if not isinstance(prompt, str):
        return token_ids(prompt, "the prompt's tokens")
    try:
        tokens = session.tokenize(prompt)
    except EngineError:
        tokens = np.empty(0, np.int32)
    if not len(tokens):  # a model without a tokenizer
        text = np.frombuffer(prompt.encode(), np.uint8).astype(np.int32)
        tokens = np.minimum(1 + text % max(session.n_vocab - 1, 1), session.n_vocab - 1)
    return tokens.astype(np.int32)


def _first_difference(
    expected: NDArray[np.float32], got: NDArray[np.float32], position: int
) -> Difference | None:
    unequal = expected.view(np.uint32) != got.view(np.uint32)
    if not unequal.any():
        return None
    row, column = (int(i) for i in np.argwhere(unequal)[0])
    return Difference(position + row, column, float(expected[row, column]), float(got[row, column]))
