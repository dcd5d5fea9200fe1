"""Layers that tell of later ones, on the host: same bits, counters of replay, what routers are worth."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exactness.test_architectures import ENGAGING
from exactness.test_embedded import TEXT
from exactness.test_prefetch import ARGS, N_EXPERTS, N_LAYERS, Forged, K, Scoring, drive, plain, recorded
from fate_bind import library
from fate_bind.errors import EngineError
from fate_bind.session import Session
from fate_bind.verify import verify
from fate_policy.base import Policy
from fate_policy.errors import TraceError
from fate_policy.prefetch_rule import Prefetch
from fate_policy.recall import measure
from fate_policy.replay import replay
from fate_policy.trace import Trace, load

__all__ = ["plain", "recorded"]  # fixtures

pytestmark = pytest.mark.model

Plain = tuple[Session, NDArray[np.float32]]

# fmt: off
BLIND = {"deepseek4", "ernie4_5-moe", "grovemoe", "kimi-k3", "smallthinker"}
"""They select by other numbers than the router's, or by what another tensor is routed on."""
ALONE = {
    "afmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "deepseek", "deepseek2", "deepseek32", "dots1",
    "dots3note", "exaone-moe", "glm-dsa", "glm4moe", "glm5-next", "hy_v4", "kimi-linear", "laguna", "lfm2moe",
    "minimax-m3", "mistral4",
}
"""Their fixtures have one such layer, after which none comes."""
CLEAR = {"bailingmoe", "grok", "hunyuan-moe", "llada-moe", "mimo2", "minimax-m2", "olmoe", "qwen3moe"}
"""The hidden state of their fixtures, whose weights are random, changes little from layer to layer."""
# fmt: on


def policy_of(name: str, trace: Trace) -> Policy | str:
    made: dict[str, Policy] = {"random": Forged("random", trace), "random, scores": Scoring("random", trace)}
    return made.get(name, name)


@pytest.mark.parametrize("slots", [K, K + 1, 10, 16, N_EXPERTS - 1])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("layer", "lru"),
        ("layer", "frequency"),
        ("layer", "random, scores"),
        ("both", "random"),
        ("both", "random, scores"),
    ],
)
def test_the_bits_are_those_without_and_the_counters_those_of_replay(
    kind: str, name: str, slots: int, plain: Plain, recorded: Trace, tmp_path: Path
) -> None:
    session, expected = plain
    path = tmp_path / "trace.npz"
    prefetch = Prefetch(0.5, 6, kind=kind)
    with session.fork(
        policy=policy_of(name, recorded),
        slots=slots,
        sync=True,
        prefetch=kind,
        prefetch_threshold=prefetch.threshold,
        prefetch_experts=prefetch.experts,
        record=path,
    ) as pooled:
        got = drive(pooled)
        pooled.check()
        stats = pooled.stats()
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))
    engine = pooled.counters()
    assert engine == replay(load(path), policy_of(name, recorded), prefetch=prefetch), engine.totals()
    assert (engine.totals()["prefetches"] > 0) == (slots > K)
    assert engine.totals()["prefetch_late"] == engine.totals()["prefetch_cancelled"] == 0
    assert (stats["no_prefetch"] == "") == (slots > K)


def test_routers_tell_most_of_the_next_layers(plain: Plain, tmp_path: Path) -> None:
    """Of the embedded model, which was trained; far more than the token before does."""
    path = tmp_path / "trace.npz"
    with plain[0].fork(slots=16, sync=True, prefetch="layer", record=path) as session:
        drive(session)
    one, two = sorted(measure(load(path)), key=lambda found: found.horizon)
    assert (one.horizon, two.horizon) == (1, 2)
    for found, least in ((one, 0.65), (two, 0.55)):
        at_k, at_2k, before = found.used.shares()
        assert at_k is not None
        assert at_2k is not None
        assert before is not None
        assert at_2k > at_k > max(least, before)


def test_nothing_is_told_of_tokens_without_output(plain: Plain) -> None:
    with plain[0].fork(slots=10, sync=True, prefetch="layer") as session:
        session.decode(range(4))
        before = session.counters().totals()["prefetches"]
        for token in range(30, 60):
            session.decode([token], outputs=[False])
        assert session.counters().totals()["prefetches"] == before
        session.decode([7])
        assert session.counters().totals()["prefetches"] > before


def test_on_the_host_without_sync_it_says_why_there_is_none(plain: Plain) -> None:
    with plain[0].fork(slots=10, prefetch="layer") as session:
        session.logits([1])
        session.logits([2])
        assert session.counters().totals()["prefetches"] == 0
        assert "CPU" in session.stats()["no_prefetch"]


def test_what_no_layer_can_tell_is_not_recorded(plain: Plain, tmp_path: Path) -> None:
    """By default layers tell; on the host only with sync."""
    for prefetch in (None, "layer"):
        path = tmp_path / f"{prefetch}.npz"
        with plain[0].fork(policy="lru", slots=10, prefetch=prefetch, record=path) as session:
            for token in (1, 2):
                session.logits([token])
        assert load(path).ahead_ids is None


@pytest.mark.parametrize(
    ("sync", "said"), [(True, r", \d+ prefetched;"), (False, ", nothing prefetched: the layers run")]
)
def test_verify_tells_whether_anything_was_prefetched(sync: bool, said: str) -> None:
    found = verify(prompt=range(1, 20), n_tokens=6, slots=10, prefetch="layer", sync=sync)
    assert found.exit_code == 0
    assert re.search(said, found.message), found.message


def test_a_recording_in_which_nothing_was_told_is_no_source_for_replay(plain: Plain, tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with plain[0].fork(slots=10, prefetch="layer", record=path) as session:
        drive(session)
    trace = load(path)
    assert measure(trace) == []
    with pytest.raises(TraceError, match=r"holds none of that; record it .* --fate-sync"):
        replay(trace, "lru", prefetch=Prefetch(kind="layer"))


def in_lockstep(session: Session, without: Session, n: int) -> None:
    """Decode the tokens below n on both, with the same bits."""
    for token in range(1, n):
        assert np.array_equal(
            session.logits([token]).view(np.uint32), without.logits([token]).view(np.uint32)
        )


@pytest.mark.parametrize("name", ENGAGING)
def test_every_architecture_tells_or_says_why_not(name: str, architectures: Path, tmp_path: Path) -> None:
    model, args = architectures / f"{name}-moe.gguf", ["-c", "128", "-ub", "8"]
    path = tmp_path / "trace.npz"
    with (
        Session(model, args, fate=False) as without,
        Session(model, args, slots=5, sync=True, prefetch="layer", record=path) as session,
    ):
        in_lockstep(session, without, 20)
        session.check()
        counters, why = session.counters(), session.stats()["no_prefetch"]
    if name in BLIND:
        assert "routes in a way that is not known" in why
    elif name in ALONE:
        assert why.startswith("no layer is followed by another")
    else:
        assert why == ""
        assert counters.totals()["prefetches"] > 0
        assert counters == replay(load(path), "lru", prefetch=Prefetch(kind="layer"))
    if name in CLEAR:
        near = next(found for found in measure(load(path)) if found.horizon == 1)
        assert near.used.at_k > 0.7 * near.used.n


def in_groups(arch: str, n_groups: int, n_used: int) -> list[str]:
    keys = {"expert_group_count": n_groups, "expert_group_used_count": n_used}
    return ["--override-kv", ",".join(f"{arch}.{key}=int:{value}" for key, value in keys.items())]


@pytest.mark.parametrize("name", ["minimax-m2", "qwen3moe"])
def test_experts_in_groups(name: str, architectures: Path, tmp_path: Path) -> None:
    """By the sigmoid and a bias, and by the softmax; 8 experts of which 4 are in the best groups."""
    model, args = architectures / f"{name}-moe.gguf", ["-c", "128", "-ub", "8", *in_groups(name, 4, 2)]
    path = tmp_path / "trace.npz"
    with (
        Session(model, args, fate=False) as without,
        Session(model, args, slots=5, sync=True, prefetch="layer", record=path) as session,
    ):
        in_lockstep(session, without, 60)
        assert session.stats()["no_prefetch"] == ""
        counters = session.counters()
    assert counters == replay(load(path), "lru", prefetch=Prefetch(kind="layer"))
    near = next(found for found in measure(load(path)) if found.horizon == 1)
    assert near.used.at_k > 0.9 * near.used.n


def test_experts_in_groups_of_a_trained_model(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    with Session(
        args=in_groups("qwen3moe", 8, 2), slots=10, sync=True, prefetch="layer", record=path
    ) as session:
        for token in session.tokenize(TEXT):
            session.logits([token])
    near = next(found for found in measure(load(path)) if found.horizon == 1)
    assert near.used.at_k > 0.6 * near.used.n


class Given:
    """Predictions in place of routers, for a replayed routing."""

    def __init__(self, horizons: tuple[int, ...], n_rows: int = 40, m: int = 6) -> None:
        rng = np.random.default_rng(7)
        shape = (n_rows, N_LAYERS, N_EXPERTS)
        self.routing = np.ascontiguousarray(np.argsort(rng.random(shape), axis=2)[..., :K].astype(np.int32))
        named = np.argsort(rng.random((len(horizons), *shape)), axis=3)[..., :m].astype(np.int32)
        named[..., 0] = self.routing[..., 0]  # something right
        repeated = (named[..., 1:] == named[..., :1]).any(axis=3)
        named[repeated, 1:] = -1
        self.ids = np.ascontiguousarray(named)
        chances = np.linspace(0.95, 0.3, m, dtype=np.float32)
        self.chances = np.ascontiguousarray(np.where(named >= 0, chances, np.float32(0)))
        self.horizons = np.array(horizons, np.int32)

    def tell(self) -> int:
        ffi, lib = library.load()
        status: int = lib.fate_replay_predictions(
            ffi.from_buffer("int32_t[]", self.ids),
            ffi.from_buffer("float[]", self.chances),
            len(self.horizons),
            ffi.from_buffer("int32_t[]", self.horizons),
            *self.ids.shape[1:],
        )
        return status


@pytest.fixture
def nothing_given() -> Iterator[None]:
    yield
    ffi, lib = library.load()
    library.check(lib.fate_replay_routing(ffi.NULL, 0, 0, 0))
    library.check(lib.fate_replay_predictions(ffi.NULL, ffi.NULL, 0, ffi.NULL, 0, 0, 0))


@pytest.mark.usefixtures("nothing_given")
@pytest.mark.parametrize("horizons", [(1,), (4,), (2, 1), (5, 3)])
def test_given_predictions_take_the_place_of_routers(
    horizons: tuple[int, ...], plain: Plain, tmp_path: Path
) -> None:
    given, path = Given(horizons), tmp_path / "trace.npz"
    ffi, lib = library.load()
    pointer = ffi.from_buffer("int32_t[]", given.routing)
    library.check(lib.fate_replay_routing(pointer, *given.routing.shape))
    library.check(given.tell())
    with (
        Session(args=ARGS, slots="100%") as without,
        plain[0].fork(slots=10, sync=True, prefetch="layer", record=path) as session,
    ):
        for _ in range(60):
            assert np.array_equal(session.logits([3]), without.logits([3]))
        session.check()
        counters = session.counters()
    trace = load(path)
    assert trace.horizons == horizons
    assert counters == replay(trace, "lru", prefetch=Prefetch(kind="layer"))
    assert counters.totals()["prefetch_useful"] > 0
    assert trace.ahead_ids is not None
    rows = np.arange(60) % len(given.routing)
    for at, horizon in enumerate(horizons):
        told = trace.ahead_ids[:, horizon:, at, : given.ids.shape[3]]
        assert np.array_equal(told, given.ids[at][rows, horizon:])


@pytest.mark.usefixtures("nothing_given")
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"horizons": (0,)}, "horizon 0: expected 1 to 8"),
        ({"horizons": (9,)}, "horizon 9: expected 1 to 8"),
        ({"horizons": (1, 2)}, "from the farthest to the nearest"),
        ({"horizons": (3, 2, 1)}, "up to 2 horizons"),
        ({"horizons": (1,), "m": 17}, "up to 16 experts"),
    ],
)
def test_predictions_that_make_no_sense(change: dict[str, object], fault: str) -> None:
    with pytest.raises(EngineError, match=fault):
        library.check(Given(**change).tell())  # type: ignore[arg-type]


@pytest.mark.usefixtures("nothing_given")
def test_an_expert_that_is_named_twice() -> None:
    given = Given((1,))
    given.ids[0, 3, 2, :2] = 5
    with pytest.raises(EngineError, match="names expert 5 twice"):
        library.check(given.tell())
