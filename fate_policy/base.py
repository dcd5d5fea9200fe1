"""What a policy is: the whole contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fate_policy.linear import LinearModel
from fate_policy.rule import pick_victims

NOT_RUN, POOL, STAGED, BYPASS = 0, 1, 2, 3
"""Values of `Step.path`."""


@dataclass(frozen=True, eq=False)
class Geometry:
    """The mixture-of-experts layers of a model, and their slots. Arrays of shape (n_layers,).

    token_names : what tokens are named by: "id", "crc32" of their text, or "none"; the engine tells ids
    tells_weights : steps tell router weights to a policy that wants them; the engine does
    """

    n_experts: NDArray[np.int32]
    k: NDArray[np.int32]
    n_slots: NDArray[np.int32]
    expert_bytes: NDArray[np.int64]
    token_names: str = "id"
    tells_weights: bool = True

    @property
    def n_layers(self) -> int:
        return len(self.n_experts)

    @property
    def max_experts(self) -> int:
        return int(self.n_experts.max(initial=0))

    @property
    def max_k(self) -> int:
        return int(self.k.max(initial=0))


@dataclass(frozen=True, eq=False)
class Step:
    """What one ubatch routed, and what that did to the pool.

    ids : int32 (n_tokens, n_layers, max_k), best first; -1 where the layer did not run or has a smaller k
    path : uint8 (n_tokens, n_layers): NOT_RUN, POOL, STAGED or BYPASS
    weights : router weights, shaped like `ids`, 0 where unknown; None if not wanted, nor recorded
    tokens, positions, sequences : int32 (n_tokens,); token -1 = unknown
    hits : uint8 like `ids`: 1 = hit in the pool
    fills, evictions : int32 (n, 2), rows (layer, expert) in order
    horizons : how many layers before its own each in-token prediction was made, the farthest first; () if
        none are told
    ahead_ids : int32 (n_tokens, n_layers, n_horizons, n_ahead), the experts that it names for the layer,
        likeliest first, -1 = none; None if none are told
    ahead_chances : float32 like `ahead_ids`: their chances, above 0; 0 where none is named
    """

    ids: NDArray[np.int32]
    path: NDArray[np.uint8]
    weights: NDArray[np.float32] | None
    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    sequences: NDArray[np.int32]
    hits: NDArray[np.uint8]
    fills: NDArray[np.int32]
    evictions: NDArray[np.int32]
    ahead_ids: NDArray[np.int32] | None = None
    ahead_chances: NDArray[np.float32] | None = None
    horizons: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        return len(self.ids)


@dataclass(eq=False)
class History:
    """What has happened so far, kept by the driver; its arrays are read-only views that change in place.

    last_use : int64 (n_layers, max_experts): the layer's clock at the last use, 0 = never
    clock : int64 (n_layers,): routed pairs so far
    resident : bool (n_layers, max_experts)
    scores, bonus : the last publication, (n_layers, max_experts), (n_layers,)
    published_at : the clock at that time, (n_layers,), so that a later use has the bonus
    acts_late : scores act not on the step that `expect` told of last but on the one after it (`sync: false`)
    """

    last_use: NDArray[np.int64]
    clock: NDArray[np.int64]
    resident: NDArray[np.bool_]
    scores: NDArray[np.float32]
    bonus: NDArray[np.float32]
    published_at: NDArray[np.int64]
    acts_late: bool = False
    tokens_seen: int = 0
    steps_seen: int = 0
    publications: int = 0


class Policy:
    """Decides which experts stay. Override what you need; a policy that overrides nothing is LRU.

    Constructor arguments are keyword-only with defaults, are the YAML keys, and are attributes; a value out
    of range raises `PolicyConfigError` there. Everything learned from a run belongs in `start`.
    Events change the policy's state; questions must not: asked twice, they answer the same.
    """

    replay_only: ClassVar[bool] = False

    @property
    def wants_weights(self) -> bool:
        """Whether steps must tell router weights, which is asked before a context is opened."""
        return False

    def start(self, geometry: Geometry) -> None:
        """Event: a context was opened or reset. Forget everything, load files, make arrays."""

    def observe(self, step: Step) -> None:
        """Event: a step is over. Its arrays are yours to keep, not to change."""

    def expect(self, token: int, sequence: int, position: int) -> None:
        """Event: this token makes up the step after the last one observed; told before `scores` is asked.

        `position` is its place in the sequence, from 0, as in `Step.positions`; -1 = unknown.
        With `sync: true` that step waits, and the scores act on it; else it runs already, and they act on the
        step after it (`History.acts_late`). Of a step of several tokens nothing is told.
        """

    def admit(self, layer: int, experts: NDArray[np.int32]) -> None:
        """Event: these experts came into slots. In table mode told just before `observe`, if they stayed.

        In callback mode told at the miss; what a GPU decided without waiting longer is put right before
        `observe`: experts that stayed are admitted again, those that went are dropped.
        """

    def drop(self, layer: int, experts: NDArray[np.int32]) -> None:
        """Event: these experts lost their slots. In table mode told just before `observe`, if for good."""

    def scores(self, history: History) -> NDArray[np.float32] | None:
        """Question: what is each expert worth, shape (n_layers, max_experts)? Higher stays. None = LRU.

        Asked between steps: with `sync: true` once all steps before the one that runs next are observed, else
        all but the last. Equal scores are decided by the last use, then by expert id.
        """
        return None

    def predict(self, step: Step, token_id: int) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
        """Question: which experts will the token after the observed `step` use, most likely first?

        Returns experts and their chances from 0 to 1, both (n_layers, max_experts), each of 0 to
        max_experts - 1 once a layer, also where a layer has fewer; None = nothing is predicted here. Asked
        with `prefetch: token` before (`sync: true`) or beside a step of one token, after `expect` told it.
        """
        return None

    def linear(self) -> LinearModel | None:
        """Question: a linear model of routing by which the engine itself may decide; None = there is none.

        Asked after `start`, in table mode without `sync`. The engine then needs no Python between steps:
        before a step of one token it takes in the step before and has chances and scores for that very token,
        those of `predict`, and of `scores` and `bonus` as with `sync`, up to rounding. Behind other steps
        scores are those of a token that is not known.
        """
        return None

    def bonus(self, history: History) -> NDArray[np.float32]:
        """Question: what does a use in a step not observed yet add to a score, in each layer?"""
        return np.zeros(len(history.clock), np.float32)

    def victims(
        self, layer: int, n: int, pinned: NDArray[np.bool_], history: History
    ) -> Sequence[int] | NDArray[np.integer]:
        """Question, in callback mode only: which `n` resident experts that are not pinned go, in order?

        Asked once per layer and step with a miss that finds no free slot. By default the rule over the
        scores last published, so that callback mode decides as table mode with `sync: true` does.
        """
        candidates = (history.resident[layer, : len(pinned)] > pinned).nonzero()[0]
        return pick_victims(
            candidates,
            n,
            history.scores[layer],
            history.bonus[layer],
            history.last_use[layer],
            int(history.published_at[layer]),
        )


class OfflinePolicy(Policy):
    """A policy that knows the future: for replay, where it is a bound, never for a run."""

    replay_only: ClassVar[bool] = True

    def foresee(self, needs: NDArray[np.int32], step: NDArray[np.int64]) -> None:
        """Event: told once, before `start`, what every layer will need in a slot.

        Parameters
        ----------
        needs
            Shape (n_tokens, n_layers, max_k); -1 = nothing, also where a prompt goes past the pool and the
            token is too early to be seeded from.
        step
            Shape (n_tokens,): the step of each token, counted from 0.
        """
