"""The one way in which policies are driven, by replay and by the engine's binding alike."""

from __future__ import annotations

import time
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fate_policy import checks, registry
from fate_policy.base import NOT_RUN, POOL, Geometry, History, Policy, Step
from fate_policy.errors import PolicyConfigError, PolicyError

_Scalar = TypeVar("_Scalar", bound=np.generic)


def policy_name(policy: Policy) -> str:
    """Return what a configuration calls this policy: its short name, or "module:Class"."""
    path = f"{type(policy).__module__}:{type(policy).__qualname__}"
    return next((name for name, known in registry.BUILT_IN.items() if known == path), path)


def check_mode(policy: Policy, mode: str, *, replay: bool = False) -> None:
    """Raise `PolicyConfigError` if the policy cannot drive an engine in this mode."""
    if policy.replay_only and not replay:
        raise PolicyConfigError(f"policy {policy_name(policy)} knows the future: it works in replay only")
    if mode == "table" and overrides(policy, "victims") and not overrides(policy, "scores"):
        raise PolicyConfigError(
            f"policy {policy_name(policy)} names victims but has no scores, so it cannot run in table mode; "
            "use --fate-mode callback"
        )


def check_prefetch(policy: Policy) -> None:
    """Raise `PolicyConfigError` if the policy predicts nothing that could be brought in."""
    if not overrides(policy, "predict"):
        raise PolicyConfigError(
            f"prefetch: policy {policy_name(policy)} has no predict(); use the classifier or another "
            "policy that predicts, or prefetch: layer, for which the model's own routers tell what comes"
        )


def overrides(policy: Policy, method: str) -> bool:
    """Tell whether the policy has a method of its own."""
    return getattr(type(policy), method) is not getattr(Policy, method)


def _read_only(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    view = array.view()
    view.flags.writeable = False
    return view


class Driver:
    """Keep the history, ask the policy, and check every answer.

    An exception of the policy's own passes through unchanged; a wrong answer is a `PolicyError`.
    `policy_seconds` is the time spent in the policy's code.

    Parameters
    ----------
    mode
        "table": scores are published between steps; "callback": victims are asked for at every miss.
    refresh_tokens
        Publish only when at least so many tokens were observed since the last publication.
    sync
        False: what is published acts on the step after the next one to be observed. Callback mode has no such
        delay.
    replay
        True lets policies drive that know the future.
    prefetch
        Predictions are asked for, with `predict`; the policy must make some.
    """

    def __init__(
        self,
        policy: Policy,
        geometry: Geometry,
        mode: str = "table",
        refresh_tokens: int = 1,
        *,
        sync: bool = True,
        replay: bool = False,
        prefetch: bool = False,
    ) -> None:
        if not isinstance(policy, Policy):
            raise PolicyConfigError(f"{policy!r} is not a policy: it does not derive from fate_policy.Policy")
        self.mode = checks.choice("mode", mode, ("table", "callback"))
        self.refresh_tokens = checks.integer("refresh_tokens", refresh_tokens, minimum=1)
        check_mode(policy, mode, replay=replay)
        self.acts_late = not checks.flag("sync", sync) and mode == "table"
        if prefetch:
            check_prefetch(policy)
        self.expects = overrides(policy, "expect") or prefetch  # is told what comes
        self.policy = policy
        self.geometry = geometry
        self.policy_seconds = 0.0
        self._name = policy_name(policy)
        # what the policy leaves as it is says and does nothing: it is not called
        self._own = {
            name
            for name in ("observe", "admit", "drop", "scores", "bonus", "victims")
            if getattr(getattr(policy, name), "__func__", None) is not getattr(Policy, name)
        }
        self._n_experts: list[int] = geometry.n_experts.tolist()
        self.reset()

    def reset(self) -> None:
        """Start over with an empty pool, as when a context is opened."""
        shape = (self.geometry.n_layers, self.geometry.max_experts)
        self._last_use = np.zeros(shape, np.int64)
        self._clock = np.zeros(shape[0], np.int64)
        self._resident = np.zeros(shape, np.bool_)
        # as of the last step observed; in callback mode `_resident` is ahead by what was told since
        self._settled = self._resident if self.mode == "table" else self._resident.copy()
        self._scores = np.zeros(shape, np.float32)
        self._bonus = np.zeros(shape[0], np.float32)
        self._published_at = np.zeros(shape[0], np.int64)
        self._layers = np.arange(shape[0])[:, None]
        self._first = self._layers * shape[1]  # of each layer, in a table laid flat
        self._ranks = np.arange(1, self.geometry.max_k + 1)
        self._rows = list(zip(self._last_use, self._resident, strict=True))
        self._tokens_published = 0
        self._last_step: Step | None = None
        self.history = History(
            last_use=_read_only(self._last_use),
            clock=_read_only(self._clock),
            resident=_read_only(self._resident),
            scores=_read_only(self._scores),
            bonus=_read_only(self._bonus),
            published_at=_read_only(self._published_at),
            acts_late=self.acts_late,
        )
        self._timed(self.policy.start, self.geometry)

    def observe(self, step: Step) -> None:
        """Take in a finished step and tell the policy.

        In callback mode new scores come into force here, or in `expect` if the policy has one.
        """
        self._stamp(step)
        self.history.tokens_seen += step.n_tokens
        self.history.steps_seen += 1
        self._last_step = step
        lost, came = self._net_moves(step)
        for moves, is_in in ((lost, False), (came, True)):
            if len(moves):
                self._settled[moves[:, 0], moves[:, 1]] = is_in
        if self.mode == "table":
            self._tell("drop", lost)
            self._tell("admit", came)
        elif (self._settled != self._resident).any():
            self._correct()
        if "observe" in self._own:
            self._timed(self.policy.observe, step)
        if self.mode == "callback" and not self.expects:
            self._refresh()

    def expect(
        self, tokens: NDArray[np.int32], sequences: NDArray[np.int32], positions: NDArray[np.int32]
    ) -> None:
        """Take in what the step after the last one observed consists of, and tell a policy that expects."""
        if not self.expects:
            return
        if len(tokens) == 1:
            self._timed(self.policy.expect, int(tokens[0]), int(sequences[0]), int(positions[0]))
        if self.mode == "callback":
            self._refresh()

    def predict(self, tokens: NDArray[np.int32], chances: NDArray[np.float32]) -> bool:
        """Write into zeros (n_layers, max_experts) the chance that the coming step uses each expert.

        False, and nothing is written: the step is not one of one token, it is the first, or the policy
        predicts nothing here. Told after `expect` of the same tokens.
        """
        if len(tokens) != 1 or self._last_step is None:
            return False
        answer: Any = self._timed(self.policy.predict, self._last_step, int(tokens[0]))
        if answer is None:
            return False
        places, ranked = self._checked_prediction(answer)
        chances.reshape(-1)[places] = ranked
        return True

    def _checked_prediction(self, answer: Any) -> tuple[NDArray[np.integer], NDArray[np.float32]]:
        """Return where in a table laid flat each chance belongs, and the chances, in the order of ranks."""
        shape = self._scores.shape

        def wrong(fault: str) -> PolicyError:
            return PolicyError(f"policy {self._name}: predict() returned {fault}")

        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise wrong(f"{type(answer).__name__}; expected experts and their chances, or None")
        experts = np.asarray(answer[0])
        if experts.shape != shape or experts.dtype.kind not in "iu":
            raise wrong(
                f"experts {experts.dtype} of shape {experts.shape}; expected whole numbers of shape {shape}"
            )
        ranked = self._checked("predict", answer[1], shape)
        if not (ranked.min(initial=0) >= 0 and ranked.max(initial=0) <= 1):  # neither if there is a NaN
            layer, rank = np.argwhere(~((ranked >= 0) & (ranked <= 1)))[0]
            raise wrong(f"chance {ranked[layer, rank]} at layer {layer}, rank {rank}; expected 0 to 1")
        if experts.min(initial=0) < 0 or experts.max(initial=0) >= shape[1]:
            layer, rank = np.argwhere((experts < 0) | (experts >= shape[1]))[0]
            raise wrong(
                f"expert {experts[layer, rank]} at layer {layer}, rank {rank}; expected 0 to {shape[1] - 1}"
            )
        places: NDArray[np.integer] = experts + self._first
        times = np.bincount(places.ravel(), minlength=places.size)
        if times.max(initial=1) > 1:
            layer, expert = divmod(int(times.argmax()), shape[1])
            raise wrong(f"expert {expert} of layer {layer} more than once; expected each one once")
        return places, ranked

    def publish(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return scores (n_layers, max_experts) and bonus (n_layers,) to put in force now, or None.

        None: nothing new is due, the policy is plain LRU, or the mode is callback, where the engine has no
        table to fill. Both arrays are C-contiguous copies, the caller's own.
        """
        return (self._scores.copy(), self._bonus.copy()) if self.refresh() else None

    def refresh(self) -> bool:
        """Do as `publish`, but leave the arrays in `history`; False where that returns None."""
        return self.mode == "table" and self._refresh()

    def victims(
        self, layer: int, n: int, pinned: NDArray[np.bool_], last_use: NDArray[np.int64] | None = None
    ) -> NDArray[np.int32]:
        """Return `n` distinct experts of `layer` that are resident and not pinned, in the policy's order.

        Parameters
        ----------
        pinned
            bool (n_experts,): needed by the op at hand.
        last_use
            int64 (n_experts,): the engine's own last uses, which at the seeding after a bypass are ahead of
            the steps observed. None: those observed are all there are.
        """
        n_experts = self._n_experts[layer]
        known_uses, resident = self._rows[layer]
        if last_use is not None:
            known_uses[:n_experts] = last_use[:n_experts]
        answer: Any = self._timed(self.policy.victims, layer, n, pinned, self.history)
        if "victims" not in self._own and len(answer) == n:
            right: NDArray[np.int32] = answer  # the rule's: nothing to check
            return right
        experts = self._whole_numbers(layer, n, answer)
        if len(experts) != n:
            raise self._wrong_victims(layer, answer, f"expected {n} of them")
        seen: set[int] = set()
        for expert in experts:
            if not 0 <= expert < n_experts:
                fault = f"expert {expert} does not exist; expected 0 to {n_experts - 1}"
            elif pinned[expert]:
                fault = f"expert {expert} is pinned: the op at hand needs it"
            elif not resident[expert]:
                fault = f"expert {expert} is not resident"
            elif expert in seen:
                fault = f"expert {expert} is named twice"
            else:
                seen.add(expert)
                continue
            raise self._wrong_victims(layer, answer, fault)
        return np.array(experts, np.int32)

    def drop(self, layer: int, experts: NDArray[np.int32]) -> None:
        """Take in, in callback mode, that these experts lost their slots."""
        self._set_resident(layer, experts, False)
        if "drop" in self._own:
            self._timed(self.policy.drop, layer, experts)

    def admit(self, layer: int, experts: NDArray[np.int32]) -> None:
        """Take in, in callback mode, that these experts came into slots."""
        self._set_resident(layer, experts, True)
        if "admit" in self._own:
            self._timed(self.policy.admit, layer, experts)

    def _set_resident(self, layer: int, experts: NDArray[np.int32], value: bool) -> None:
        resident = self._rows[layer][1]
        for expert in experts.tolist():  # of a few faster than by their array
            resident[expert] = value

    def _whole_numbers(self, layer: int, n: int, answer: Any) -> list[int]:
        if isinstance(answer, np.ndarray) and answer.dtype.kind in "iu" and answer.ndim == 1:
            whole_numbers: list[int] = answer.tolist()
            return whole_numbers
        try:
            given = list(answer)
            experts = [int(expert) for expert in given]
            whole = experts == given
        except (TypeError, ValueError, OverflowError):
            whole = False
        if not whole:
            raise self._wrong_victims(layer, answer, f"expected {n} whole numbers")
        return experts

    def _net_moves(self, step: Step) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return evictions and fills without experts that are in both: these are where they were before.

        Prefetch makes such: it evicts an expert that the token then needs.
        """
        lost, came = step.evictions, step.fills
        if len(lost) and len(came):
            was_out, was_in = ~self._settled[lost[:, 0], lost[:, 1]], self._settled[came[:, 0], came[:, 1]]
            if was_out.any() or was_in.any():
                size = (self.geometry.max_experts, 1)
                one, other = lost @ size, came @ size
                return lost[~np.isin(one, other)], came[~np.isin(other, one)]
        return lost, came

    def _correct(self) -> None:
        """Tell the policy what became of misses that the engine decided without its answer."""
        lost = np.argwhere(self._resident & ~self._settled).astype(np.int32)
        came = np.argwhere(self._settled & ~self._resident).astype(np.int32)
        self._resident[:] = self._settled
        self._tell("drop", lost)
        self._tell("admit", came)

    def _stamp(self, step: Step) -> None:
        n_layers, n_pairs = self.geometry.n_layers, step.ids.shape[2]
        if len(step.ids) == 1 and step.ids.min(initial=0) >= 0 and step.path.min(initial=POOL) != NOT_RUN:
            uses = step.ids[0, :, ::-1] + self._first
            self._last_use.reshape(-1)[uses] = self._clock[:, None] + self._ranks[:n_pairs]
            self._clock += n_pairs
            return
        uses = step.ids.transpose(1, 0, 2)[:, :, ::-1].reshape(n_layers, -1)
        ran = ((step.ids >= 0) & (step.path[:, :, None] != NOT_RUN)).transpose(1, 0, 2)
        ran = ran[:, :, ::-1].reshape(n_layers, -1)
        stamp = ran.cumsum(axis=1)
        stamp += self._clock[:, None]
        if ran.all():
            self._last_use[self._layers, uses] = stamp
        else:
            layer, use = np.nonzero(ran)
            self._last_use[layer, uses[layer, use]] = stamp[layer, use]
        if stamp.shape[1]:
            self._clock[:] = stamp[:, -1]

    def _tell(self, event: str, moves: NDArray[np.int32]) -> None:
        if event not in self._own:
            return
        tell = getattr(self.policy, event)
        for layer in np.unique(moves[:, 0]).tolist():
            self._timed(tell, layer, np.ascontiguousarray(moves[moves[:, 0] == layer, 1]))

    def _refresh(self) -> bool:
        is_due = self.history.tokens_seen - self._tokens_published >= self.refresh_tokens
        if not is_due or "scores" not in self._own:
            return False
        answer = self._timed(self.policy.scores, self.history)
        if answer is None:
            return False
        scores = self._checked("scores", answer, self._scores.shape)
        if np.isnan(scores.max(initial=-np.inf)):  # the greatest of some numbers and NaN is NaN
            layer, expert = np.argwhere(np.isnan(scores))[0]
            raise PolicyError(
                f"policy {self._name}: scores() returned NaN at layer {layer}, expert {expert}; "
                "expected numbers (infinities are allowed)"
            )
        if "bonus" in self._own:
            bonus = self._checked("bonus", self._timed(self.policy.bonus, self.history), self._bonus.shape)
            if not np.isfinite(bonus).all():
                raise PolicyError(f"policy {self._name}: bonus() returned {bonus}; expected finite numbers")
            self._bonus[:] = bonus
        self._scores[:] = scores
        self._published_at[:] = self._clock
        self._tokens_published = self.history.tokens_seen
        self.history.publications += 1
        return True

    def _checked(self, method: str, answer: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if isinstance(answer, np.ndarray) and answer.dtype == np.float32 and answer.shape == shape:
            return answer
        try:
            array = np.asarray(answer)
        except ValueError:
            array = np.empty(0, np.object_)
        if array.shape != shape or array.dtype.kind not in "fiub":
            got = (
                f"{array.dtype} of shape {array.shape}"
                if array.dtype != object
                else f"{type(answer).__name__}"
            )
            raise PolicyError(
                f"policy {self._name}: {method}() returned {got}; expected float32 of shape {shape}"
            )
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)

    def _wrong_victims(self, layer: int, answer: object, fault: str) -> PolicyError:
        shown = " ".join(repr(answer).split())
        return PolicyError(f"policy {self._name}: victims() for layer {layer} returned {shown}: {fault}")

    def _timed(self, call: Any, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args)
        finally:
            self.policy_seconds += time.perf_counter() - start
