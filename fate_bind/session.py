"""Session: open a model with or without the pool, generate, logits, stats, record."""

from __future__ import annotations

import atexit
import codecs
import functools
import operator
import os
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fate_bind import interrupts, library, modelfile, placement
from fate_bind.engine import Engine
from fate_bind.errors import EngineError, PolicyConfigError
from fate_bind.host import Host
from fate_bind.stats import Report, as_dict, not_engaged
from fate_policy.base import Policy
from fate_policy.config import AUTO, Config, load
from fate_policy.counters import Counters
from fate_policy.driver import policy_name
from fate_policy.trace import Trace

Choice = str | Path | Config | Policy
"""What names a policy: its name, "module:Class", a YAML file, a configuration, or an instance."""


def resolve_config(
    policy: Choice = AUTO,
    slots: Any = None,
    mode: str | None = None,
    sync: bool | None = None,
    vram: Any = None,
    vram_margin: Any = None,
    prefetch: str | None = None,
    prefetch_threshold: float | str | None = None,
    prefetch_experts: int | None = None,
) -> tuple[Config, Policy | None]:
    """Return the configuration meant, and the policy's instance if one was given.

    Parameters
    ----------
    slots, mode, sync, vram, vram_margin, prefetch, prefetch_threshold, prefetch_experts
        Win over the configuration's where they are not None.
    """
    given = {"slots": slots, "mode": mode, "sync": sync, "vram": vram}
    given |= {"vram_margin": vram_margin, "prefetch": prefetch}
    given |= {"prefetch_threshold": prefetch_threshold, "prefetch_experts": prefetch_experts}
    overrides = {key: value for key, value in given.items() if value is not None}
    if isinstance(policy, Policy):
        return replace(load("lru", overrides), policy=policy_name(policy)).settled(), policy
    if isinstance(policy, Config):
        checked = load("lru", overrides)
        if policy.chose_prefetch:  # it may be another with what is given
            policy = replace(policy, prefetch=AUTO, chose_prefetch=False)
        return replace(policy, **{key: getattr(checked, key) for key in overrides}), None
    return load(policy, overrides), None


def trained_for(model: Path) -> Path:
    """Return where a model's classifier is looked for: NAME.fate.npz beside NAME.gguf.

    Of a split file, NAME-00001-of-00003.gguf, the part's number does not belong to the name, unless only
    NAME-00001-of-00003.fate.npz is there.
    """
    paths = [
        model.with_name(name + ".fate.npz") for name in (modelfile.SHARD.sub("", model.stem), model.stem)
    ]
    return next((path for path in paths if os.path.lexists(path)), paths[0])


def with_trained(config: Config, model: Path | None) -> Config:
    """Decide what `auto` leaves open, and find the classifier's file where none is named."""
    if config.policy == AUTO and model is not None and config.mode != "off":
        path = trained_for(model)
        try:
            return config.settled(path if os.path.lexists(path) else None)
        except PolicyConfigError as error:
            if str(path) not in str(error) or config.asks_policy:
                raise
            raise PolicyConfigError(
                f"{error}; it was found beside {model.name}: remove it, or name a policy, such as lru"
            ) from error
    if config.policy != "classifier" or config.params.get("model") is not None or model is None:
        return config.settled()
    path = trained_for(modelfile.check(model))
    if not path.exists():
        raise PolicyConfigError(
            f"classifier: no file is named, and {path} does not exist; fit it with `fate train TRACE.npz "
            f"--test OTHER.npz --output {path}`, or name another under classifier: model:"
        )
    return replace(config, params={**config.params, "model": str(path)}).settled()


class _Model:
    """A loaded model, closed with the last session on it."""

    def __init__(self, path: str | Path | None, args: Sequence[str], place: bool) -> None:
        ffi, lib = library.load()
        placement.refuse_ends(args)
        self.path = modelfile.meant(path, args)
        argv = ["fate"]  # ours first: a value that is forgotten at the end is missed
        if path is None:
            modelfile.check_args(args)
        else:
            argv += ["-m", str(modelfile.check(path))]
        if place:
            argv += placement.flags("completion", args, placement.has_gpu())
        argv += args
        keep = [ffi.new("char[]", arg.encode()) for arg in argv]
        handle = ffi.new("fate_model **")
        library.check(lib.fate_model_open(len(keep), ffi.new("char *[]", keep), handle))
        self.handle = handle[0]
        self.n_sessions = 0

    def release(self) -> None:
        self.n_sessions -= 1
        if self.n_sessions == 0:
            library.load().lib.fate_model_close(self.handle)
            self.handle = None


class Session:
    """A model and a context of llama.cpp on it, with the pool or without.

    A context manager; one call at a time, a second one raises `EngineError`. Ctrl-C is raised when the call
    that it met is over, so that no step is missing from the recording; a second one breaks off a policy that
    does not return. An exception of the policy's own is raised by the call during which it happened, after
    which the run goes on as LRU.

    Parameters
    ----------
    model
        A .gguf file; None: the embedded model, unless `args` name one.
    args
        Flags of llama-completion, such as `["-c", "4096", "-t", "8"]`.
    policy, slots, mode, sync, vram, prefetch, prefetch_threshold, prefetch_experts
        See `resolve_config`. The default is LRU, or the classifier fitted for the model (`policy: auto`),
        over as many slots as fit.
    record
        Where to write the routing trace; True: a temporary file that lives as long as the session.
    require
        Raise `EngineError` if the pool does not engage.
    fate
        False: plain llama.cpp.
    place
        False: leave out the flags that place weights where the pool can serve them (`--no-repack -fit off`;
        with a GPU also `-ngl 999 --cpu-moe -ub 1024`), so that only `args` count.
    throttle_gbps
        Hold the fills of a GPU's misses to so many 10^9 bytes a second, to see what a slower link would do.
    times
        Keep when a GPU does what, for `times()`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        args: Sequence[str] = (),
        *,
        policy: Choice = AUTO,
        slots: Any = None,
        mode: str | None = None,
        sync: bool | None = None,
        vram: Any = None,
        prefetch: str | None = None,
        prefetch_threshold: float | str | None = None,
        prefetch_experts: int | None = None,
        record: str | Path | bool | None = None,
        require: bool = False,
        fate: bool = True,
        place: bool = True,
        throttle_gbps: float | None = None,
        times: bool = False,
    ) -> None:
        config, instance = resolve_config(
            policy, slots, mode, sync, vram, None, prefetch, prefetch_threshold, prefetch_experts
        )
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if record is True:
            self._scratch = tempfile.TemporaryDirectory(prefix="fate-")
            record = Path(self._scratch.name) / "trace.npz"
        if not fate and (record or require):
            raise PolicyConfigError("fate is False, so there is nothing to record or to require")
        if model is None and not placement.names_model(args):
            model = modelfile.EMBEDDED
        host = None
        if fate:
            if instance is None:
                config = with_trained(config, modelfile.meant(model, args))
            host = Host(config, instance, Path(record) if record else None, require, throttle_gbps, times)
        with interrupts.held():
            self._open(_Model(model, args, place), host)

    def _open(self, model: _Model, host: Host | None) -> None:
        ffi, lib = library.load()
        self._model = model
        self._host = host
        self._context: Any = None
        self._in_use = threading.Lock()
        model.n_sessions += 1
        handle = ffi.new("fate_context **")
        try:
            if host is None:
                self._check(lib.fate_context_open(model.handle, 0, handle))
            else:
                with host.configured():
                    status = lib.fate_context_open(model.handle, 1, handle)
                self._check(status)
        except BaseException:
            lib.fate_context_close(handle[0])
            model.release()
            raise
        self._context = handle[0]
        self.n_vocab = int(lib.fate_model_n_vocab(model.handle))
        self.n_ctx = int(lib.fate_context_n_ctx(self._context))
        self.n_batch = int(lib.fate_context_n_batch(self._context))
        self.n_seq_max = int(lib.fate_context_n_seq_max(self._context))
        self._is_empty = True
        self._at_exit = functools.partial(_close_left_open, weakref.ref(self))
        atexit.register(self._at_exit)

    def fork(
        self,
        *,
        fate: bool = True,
        policy: Choice | None = None,
        slots: Any = None,
        mode: str | None = None,
        sync: bool | None = None,
        vram: Any = None,
        prefetch: str | None = None,
        prefetch_threshold: float | str | None = None,
        prefetch_experts: int | None = None,
        record: str | Path | None = None,
        require: bool = False,
        throttle_gbps: float | None = None,
    ) -> Session:
        """Return a session with a context and pool of its own on the same loaded model.

        By default it is configured as this one; both can be closed in any order.
        """
        self._open_context()
        if not fate:
            if record or require:
                raise PolicyConfigError("fate is False, so there is nothing to record or to require")
            return self.fork_with(None)
        given = None
        if policy is None:
            policy = self._host.config if self._host is not None else AUTO
            given = self._host.given_copy() if self._host is not None else None
        config, instance = resolve_config(
            policy, slots, mode, sync, vram, None, prefetch, prefetch_threshold, prefetch_experts
        )
        instance = given if instance is None else instance
        if instance is None:
            config = with_trained(config, self._model.path)
        record = Path(record) if record else None
        return self.fork_with(Host(config, instance, record, require, throttle_gbps))

    def fork_with(self, host: Host | None) -> Session:
        """Return what `fork` does, with the engine that `host` describes; None: without any."""
        other = Session.__new__(Session)
        other._scratch = None
        with self._calling():
            other._open(self._model, host)
        return other

    def close(self) -> None:
        """Close the context, finish the recording, and close the model with its last session.

        `stats`, `counters` and `record` go on answering. A second call does nothing.
        """
        if self._context is not None:
            self._close(may_raise=True)

    def _close(self, may_raise: bool) -> None:
        with self._calling(may_raise):
            context, self._context = self._context, None
            library.load().lib.fate_context_close(context)
            self._model.release()
            atexit.unregister(self._at_exit)
            if self._host is not None and may_raise:
                self._host.reraise()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._host is not None:
            self._host.failure = None  # one exception is under way already
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None:
            self._close(may_raise=False)

    # ------------------------------------------------------------------------------------------------ text

    def tokenize(self, text: str, add_special: bool = True) -> NDArray[np.int32]:
        """Return the token ids of a text. A model without a tokenizer raises `EngineError`."""
        ffi, lib = library.load()
        data = text.encode()
        n = ffi.new("int32_t *")
        tokens = np.empty(len(data) + 8, np.int32)
        while True:
            with self._calling():
                status = lib.fate_model_tokenize(
                    self._model.handle, data, len(data), add_special, _ints(tokens), len(tokens), n
                )
                self._check(status)
            if n[0] <= len(tokens):
                return tokens[: n[0]].copy()
            tokens = np.empty(n[0], np.int32)

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token stands for; not always whole characters."""
        ffi, lib = library.load()
        n = ffi.new("int32_t *")
        size = 64
        while True:
            text = ffi.new("char[]", size)
            with self._calling():
                self._check(lib.fate_model_piece(self._model.handle, operator.index(token), text, size, n))
            if n[0] <= size:
                return bytes(ffi.buffer(text, n[0])[:])
            size = n[0]

    def flag_prompt(self) -> str:
        """Return the prompt that the flags -p or -f gave, "" if none."""
        ffi, lib = library.load()
        with self._calling():
            return library.text(ffi, lib.fate_model_prompt(self._model.handle))

    def detokenize(self, tokens: Sequence[int] | NDArray[np.integer]) -> str:
        self._open_context()
        return b"".join(self.piece(token) for token in token_ids(tokens).tolist()).decode("utf-8", "replace")

    def generate(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer],
        n_tokens: int = 128,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield text as it is generated, in whole characters, up to `n_tokens` tokens or the end.

        The prompt follows what sequence 0 holds; `clear` starts over. Temperature 0 is greedy.
        """
        lib = library.load().lib
        with self._calling() as context:
            self._check(
                lib.fate_context_set_sampler(context, temperature, top_k, top_p, min_p, seed & 0xFFFFFFFF)
            )
        return self._generate(prompt, n_tokens)

    def _generate(self, prompt: str | Sequence[int] | NDArray[np.integer], n_tokens: int) -> Iterator[str]:
        ffi, lib = library.load()
        tokens = self.tokenize(prompt, self._is_empty) if isinstance(prompt, str) else token_ids(prompt)
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            last = np.zeros(len(part), np.int8)
            last[-1] = start + len(part) == len(tokens)
            self._decode(part, None, None, last, None)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        token = ffi.new("int32_t *")
        for i in range(n_tokens):
            with self._calling() as context:
                self._check(lib.fate_context_sample(context, token))
                is_end = bool(lib.fate_model_is_eog(self._model.handle, token[0]))
            if is_end:
                break
            if text := decoder.decode(self.piece(token[0])):
                yield text
            if i + 1 < n_tokens:
                self._decode(np.array([token[0]], np.int32), None, None, None, None)
        if text := decoder.decode(b"", final=True):
            yield text

    # ---------------------------------------------------------------------------------------------- numbers

    def logits(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Decode the tokens after what sequence 0 holds; return float32 (n_tokens, n_vocab).

        Splits into batches of `n_batch`, as llama.cpp's programs do.
        """
        self._open_context()
        tokens = token_ids(tokens)
        out = np.empty((len(tokens), self.n_vocab), np.float32)
        for start in range(0, len(tokens), self.n_batch):
            stop = start + self.n_batch
            self._decode(tokens[start:stop], None, None, None, out[start:stop])
        return out

    def decode(
        self,
        tokens: ArrayLike,
        positions: ArrayLike | None = None,
        sequences: ArrayLike | None = None,
        outputs: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """Decode one batch of at most `n_batch` tokens; return float32 (n_outputs, n_vocab).

        Parameters
        ----------
        positions, sequences
            Whole numbers, (n_tokens,). None: the tokens follow what sequence 0 holds. Sequences need `-np`.
        outputs
            bool (n_tokens,): whose logits are wanted. None: all.
        """
        tokens = token_ids(tokens)
        wanted = (
            np.ones(len(tokens), np.int8)
            if outputs is None
            else np.asarray(outputs, np.bool_).astype(np.int8)
        )
        out = np.empty((int(wanted.sum()), self.n_vocab), np.float32)
        at = None if positions is None else token_ids(positions, "positions")
        of = None if sequences is None else token_ids(sequences, "sequences")
        for name, array in (("positions", at), ("sequences", of), ("outputs", wanted)):
            if array is not None and array.shape != tokens.shape:
                raise ValueError(
                    f"{name} of shape {array.shape}; expected {tokens.shape}, one for each token"
                )
        self._decode(tokens, at, of, wanted, out)
        return out

    def _decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32] | None,
        sequences: NDArray[np.int32] | None,
        outputs: NDArray[np.int8] | None,
        logits: NDArray[np.float32] | None,
    ) -> None:
        ffi, lib = library.load()
        with self._calling() as context:
            status = lib.fate_context_decode(
                context,
                len(tokens),
                _ints(tokens),
                ffi.NULL if positions is None else _ints(positions),
                ffi.NULL if sequences is None else _ints(sequences),
                ffi.NULL if outputs is None else ffi.from_buffer("int8_t[]", outputs),
                ffi.NULL if logits is None else ffi.from_buffer("float[]", logits),
            )
            self._is_empty = False
            self._check(status)

    # ---------------------------------------------------------------------------------------------- context

    def clear(self) -> None:
        """Forget all sequences; the pool keeps its experts."""
        with self._calling() as context:
            self._check(library.load().lib.fate_context_clear(context))
            self._is_empty = True

    def shift(self, start: int, stop: int, sequence: int = 0) -> None:
        """Remove the positions from `start` up to `stop` of a sequence and move down what follows."""
        with self._calling() as context:
            self._check(library.load().lib.fate_context_shift(context, sequence, start, stop))

    def state(self) -> bytes:
        """Return what all sequences hold; the pool is no part of it."""
        ffi, lib = library.load()
        size = ffi.new("size_t *")
        with self._calling() as context:
            self._check(lib.fate_context_state_size(context, size))
            data = ffi.new("uint8_t[]", size[0])
            self._check(lib.fate_context_state_get(context, data, size[0]))
        return bytes(ffi.buffer(data, size[0])[:])

    def restore(self, state: bytes) -> None:
        """Take back what `state` returned, from this or another session of the same model and flags."""
        ffi, lib = library.load()
        data = ffi.from_buffer("uint8_t[]", state)
        with self._calling() as context:
            self._check(lib.fate_context_state_set(context, data, len(state)))
            self._is_empty = False

    # ------------------------------------------------------------------------------------------------ engine

    def stats(self) -> dict[str, Any]:
        """Return the numbers so far; the keys are those of `fate_bind.stats.as_dict`."""
        return as_dict(self.report())

    def counters(self) -> Counters:
        return self.report().counters

    def record(self) -> Trace:
        """Return the routing recorded so far.

        Without `sync` this hands the policy the last step now instead of one step later.
        """
        ffi, lib = library.load()
        engine = self._engine()
        with self._entered():
            if self._context is not None and (pointer := lib.fate_context_engine(self._context)) != ffi.NULL:
                self._check(lib.fate_engine_flush(pointer))
            trace = engine.recorded() if engine is not None else None
        if trace is None:
            raise EngineError(
                "nothing was recorded: the session has no record=, did not engage, or has run nothing"
            )
        return trace

    def check(self) -> None:
        """Raise `EngineError` if slot tables contradict each other or a slot does not hold its expert."""
        ffi, lib = library.load()
        with self._calling() as context:
            engine = lib.fate_context_engine(context)
            if engine != ffi.NULL:
                self._check(lib.fate_engine_check(engine))

    def times(self) -> NDArray[np.int64]:
        """Return when a GPU did what for each layer in the newest step, in nanoseconds of its clock.

        Shape (n_layers, n), by `FATE_TIME_*` of fate.h; 0: not at all. The session was opened with `times`.
        """
        ffi, lib = library.load()
        with self._calling() as context:
            engine = lib.fate_context_engine(context)
            if engine == ffi.NULL:
                raise EngineError("there is no engine whose times could be told; open with fate=True")
            if self._host is None or not self._host.times:
                raise EngineError("no times were kept in this session; open it with times=True")
            info = ffi.new("fate_info *")
            self._check(lib.fate_engine_get_info(engine, info))
            found = np.zeros((info.geometry.n_layers, lib.FATE_N_TIMES), np.int64)
            self._check(lib.fate_engine_get_times(engine, ffi.from_buffer("int64_t[]", found), found.size))
        return found

    def _engine(self) -> Engine | None:
        return self._host.engines[0] if self._host is not None and self._host.engines else None

    def report(self) -> Report:
        """Return the numbers so far, as of the last finished step."""
        engine = self._engine()
        if engine is not None:
            return engine.report()
        if self._host is None:
            return not_engaged("lru", "off", "the session was opened with fate=False")
        config = self._host.config
        return not_engaged(config.policy, config.mode, "the mode is off")

    def _open_context(self) -> Any:
        if self._context is None:
            raise EngineError("the session is closed")
        return self._context

    @contextmanager
    def _calling(self, may_raise: bool = True) -> Iterator[Any]:
        """Yield the context for calls of the library: one at a time, and with Ctrl-C held back."""
        with self._entered(may_raise):
            yield self._open_context()

    @contextmanager
    def _entered(self, may_raise: bool = True) -> Iterator[None]:
        with interrupts.held(may_raise=may_raise):
            if not self._in_use.acquire(blocking=False):
                raise EngineError(
                    "the session is in use, by another thread or by the policy's own call; it takes one call "
                    "at a time (`fork` makes a second one on the same model)"
                )
            try:
                yield
            finally:
                self._in_use.release()

    def _check(self, status: int) -> None:
        if self._host is not None:
            self._host.reraise()
        library.check(status)


def token_ids(values: ArrayLike, name: str = "tokens") -> NDArray[np.int32]:
    """Return whole numbers in one dimension as C-contiguous int32; anything else is a `ValueError`."""
    array = np.asarray(values)
    if array.shape == (0,):
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} are {array.dtype} of shape {array.shape}; expected whole numbers (n,)")
    limits = np.iinfo(np.int32)
    if array.min() < limits.min or array.max() > limits.max:
        raise ValueError(f"{name} hold {array.min()} to {array.max()}; expected int32")
    return np.ascontiguousarray(array, np.int32)


def _close_left_open(session: weakref.ref[Session]) -> None:
    """Close while Python is still whole, and before a temporary recording is removed."""
    left = session()
    if left is not None and not left._in_use.locked():  # locked: a thread that Python does not wait for
        left._close(may_raise=False)


def _ints(array: NDArray[np.int32]) -> Any:
    return library.load().ffi.from_buffer("int32_t[]", array)
