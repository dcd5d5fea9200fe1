from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from policy_contract import SYNTHETIC, random_ids, real_trace

from fate_policy import features
from fate_policy.errors import PolicyConfigError
from fate_policy.features import LATER, LATER_DECAY, Contexts, Features, Shape, Table

SHAPE = Shape(SYNTHETIC.n_experts, SYNTHETIC.k)
N = 3 * 16


def make(**options: Any) -> Features:
    basis = np.eye(N, 6, dtype=np.float32)
    return Features(SHAPE, basis, np.zeros(6, np.float32), **{"table_mb": 8, **options})


def follow(state: Features, ids: NDArray[np.int32], tokens: list[int], sequence: int = 0) -> list[NDArray]:
    """Return the features of each token, made before it was routed."""
    rows = []
    for row, token in zip(ids, tokens, strict=True):
        state.expect(token, sequence)
        rows.append(np.concatenate([part.ravel() for part in state.now()]))
        state.observe(row, token, sequence)
    return rows


def column(state: Features, name: str) -> NDArray[np.float32]:
    return state.now()[0][:, features.names(state.weights).index(name)]


def test_nothing_depends_on_the_future() -> None:
    ids = random_ids(60, SYNTHETIC, 3)
    changed = ids.copy()
    changed[40:] = random_ids(60, SYNTHETIC, 4)[40:]
    tokens = [t % 7 for t in range(60)]
    first, second = follow(make(), ids, tokens), follow(make(), changed, [*tokens[:41], *range(100, 119)])
    for t in range(41):
        assert np.array_equal(first[t], second[t])
    assert not np.array_equal(first[41], second[41])


def test_the_token_about_to_run_matters_and_asking_changes_nothing() -> None:
    ids = random_ids(60, SYNTHETIC, 3)
    state = make()
    follow(state, ids, [t % 7 for t in range(60)])
    state.expect(3, 0)
    here = state.now()[0].copy()
    with state.supposing(4, 0):
        assert not np.array_equal(state.now()[0], here)
    assert np.array_equal(state.now()[0], here)


def test_rates_and_age() -> None:
    state = make()
    ids = np.full((3, 4), -1, np.int32)
    ids[1, 0] = 5
    state.observe(ids, 1, 0)
    empty = np.full((3, 4), -1, np.int32)
    for _ in range(3):
        state.observe(empty, 1, 0)
    half = 4 / 16 * 2 ** (-4 / 8)
    assert column(state, "rate_8")[1, 5] == pytest.approx(half + (1 - 2 ** (-1 / 8)) * 2 ** (-3 / 8))
    assert column(state, "log_age")[1, 5] == pytest.approx(np.log(4))
    assert column(state, "rate_8")[0, 8:].tolist() == [0] * 8  # layer 0 has 8 experts


def test_weights_decay_to_a_mean() -> None:
    state = make(weights=True)
    ids = np.full((3, 4), -1, np.int32)
    ids[1, :2] = 5, 7
    weights = np.zeros((3, 4), np.float32)
    weights[1, :2] = 0.75, 0.1
    state.observe(ids, 1, 0, weights)
    for _ in range(3):
        state.observe(np.full((3, 4), -1, np.int32), 1, 0, np.zeros((3, 4), np.float32))
    start, last = 1 / 16 * 2 ** (-4 / 4), (1 - 2 ** (-1 / 4)) * 2 ** (-3 / 4)
    got = column(state, "weight_4")[1, [4, 5, 7]]
    assert got == pytest.approx([start, start + 0.75 * last, start + float(np.float16(0.1)) * last])
    assert column(state, "log_weight_4")[1, 5] == pytest.approx(np.log(got[1] + 0.01))
    assert column(state, "weight_4")[0, 8:].tolist() == [0] * 8


def test_weights_leave_the_other_features_alone() -> None:
    with_weights, without = make(weights=True), make()
    for t, row in enumerate(random_ids(60, SYNTHETIC, 3)):
        with_weights.observe(row, t % 7, 0, np.full(row.shape, 0.25, np.float32))
        without.observe(row, t % 7, 0)
    with_weights.expect(3, 0)
    without.expect(3, 0)
    n = len(features.names(weights=False))
    assert np.array_equal(with_weights.now()[0][:, :n], without.now()[0])
    with pytest.raises(
        PolicyConfigError, match=r"^weights: None is not allowed; expected the router weights"
    ):
        with_weights.observe(row, 3, 0)


def test_a_token_and_a_pair_remember_what_they_used() -> None:
    state = make()
    ids = np.tile(np.array([[0, 1, -1, -1], [0, 1, 2, 3], [4, 5, 6, 7]], np.int32), (12, 1, 1))
    ids[::2] += np.where(ids[::2] >= 0, 2, 0)
    follow(state, ids, [10, 20, 10, 20, 10, 20, 10, 20, 10, 30, 10, 20])
    state.expect(10, 0)
    assert column(state, "token_now")[1, 2:6].min() > column(state, "token_now")[1, [0, 1]].max()
    state.expect(20, 0)
    assert column(state, "token_now")[1, [0, 1]].min() > column(state, "token_now")[1, [4, 5]].max()
    state.expect(10, 0)
    pair = column(state, "pair_now").copy()
    with state.supposing(10, 1):  # in another sequence nothing came before
        assert not np.array_equal(column(state, "pair_now"), pair)


def test_what_comes_later_is_counted_with_decay() -> None:
    state = make()
    ids = random_ids(LATER + 1, SYNTHETIC, 2)
    follow(state, ids, [7, *range(100, 100 + LATER)])
    row = state.tokens.get(7)
    weights = (1 - LATER_DECAY) * LATER_DECAY ** np.arange(LATER)
    expected = np.zeros((3, 16))
    for weight, token in zip(weights, ids[1:], strict=True):
        for layer in range(3):
            expected[layer, token[layer][token[layer] >= 0]] += weight
    assert state.tokens.n[row].tolist() == pytest.approx([1, weights.sum()])
    np.testing.assert_allclose(state.tokens.sums[row, 1, :N].reshape(3, 16), expected, atol=2e-3)


def test_a_repeated_context_foretells_what_followed_it() -> None:
    state = make()
    ids = random_ids(20, SYNTHETIC, 2)
    follow(state, ids, list(range(20)))
    state.observe(ids[3], 3, 1)
    state.observe(ids[4], 4, 1)
    state.observe(ids[5], 5, 1)
    state.expect(6, 1)
    used = np.zeros(16, bool)
    used[ids[6, 1]] = True
    assert (column(state, "repeat_2_now")[1] > 0).tolist() == used.tolist()
    assert (column(state, "repeat_4_now")[1] > 0).tolist() == used.tolist()
    assert column(state, "repeat_8_now").max() == 0
    assert column(state, "repeat_4_soon")[1, ids[7, 1]].min() >= np.float32(1 - features.FOLLOW_SOON)


def test_rates_count_by_how_early_a_token_is_in_its_sequence() -> None:
    state = make()
    ids = random_ids(40, SYNTHETIC, 3)
    follow(state, ids, [t % 5 for t in range(40)])
    names = [f"log_rate_{n}" for n in features.EARLY_HALF_LIVES]
    early = {}
    for position in (0, features.EARLY_TOKENS, features.EARLY_END, features.UNKNOWN):
        state.expect(3, 0, position)
        early[position] = [column(state, f"early_{name}").copy() for name in names]
    rates = [column(state, name).copy() for name in names]
    assert np.array_equal(early[0], rates)
    assert np.array_equal(early[features.EARLY_TOKENS], np.divide(rates, 2))
    assert not np.any(early[features.EARLY_END])
    assert not np.any(early[features.UNKNOWN])
    state.expect(3, 0, features.EARLY_END)
    with state.supposing(3, 0, 0):
        assert np.array_equal(column(state, f"early_{names[0]}"), rates[0])
    assert not column(state, f"early_{names[0]}").any()


def test_frozen_tables_do_not_change() -> None:
    state = make()
    ids = random_ids(40, SYNTHETIC, 3)
    follow(state, ids, [t % 5 for t in range(40)])
    before = [part.copy() for part in (state.tokens.sums, state.tokens.n, state.pairs.sums)]
    state.learning = False
    follow(state, ids, [t % 9 for t in range(40)])
    for old, new in zip(before, (state.tokens.sums, state.tokens.n, state.pairs.sums), strict=True):
        assert np.array_equal(old, new)


def test_an_unknown_token_has_no_features_of_its_own() -> None:
    state = make()
    ids = random_ids(40, SYNTHETIC, 3)
    follow(state, ids, [t % 5 for t in range(40)])
    state.expect(features.UNKNOWN, 0)
    unknown = state.now()[0].copy()
    state.expect(999, 0)
    assert np.array_equal(state.now()[0], unknown)


class TestTable:
    def test_the_least_recent_key_makes_room(self) -> None:
        table = Table(2, 2)
        one = np.ones(2, np.float32)
        for key in ("a", "b", "a", "c"):
            table.add(key, 0, one)
        assert (table.get("b"), len(table)) == (-1, 2)
        assert table.sums[table.get("c"), 0].tolist() == [1, 1]
        assert table.n[table.get("a"), 0] == 2

    def test_sums_stay_exact_in_half_precision(self) -> None:
        table = Table(1, 1)
        for _ in range(5000):
            table.add(0, 0, np.ones(1, np.float32))
        assert table.sums[0, 0, 0] == table.n[0, 0]
        assert features.MAX_COUNT / 2 <= table.n[0, 0] < features.MAX_COUNT

    def test_a_key_without_a_row_gets_none_from_what_followed(self) -> None:
        table = Table(1, 2)
        table.add("a", 1, np.ones(1, np.float32))
        assert len(table) == 0

    def test_state_comes_back(self) -> None:
        table, copy = Table(1, 4), Table(1, 4)
        for key in ("a", "b", "a"):
            table.add(key, 0, np.ones(1, np.float32))
        copy.restore(*table.state(1))
        assert copy.sums[copy.get("a"), 0, 0] == 2
        assert [copy.get(key) >= 0 for key in ("a", "b")] == [True, True]
        assert table.state(2)[0] == ["a"]

    def test_memory_is_what_is_said(self) -> None:
        table = Table(10, 7)
        assert table.sums.nbytes + table.n.nbytes == 7 * (Table.row_bytes(10) - features.KEY_BYTES)


@pytest.mark.parametrize(("table_mb", "n_tokens"), [(0.3, 600), (1, 1500)])
def test_everything_that_grows_is_under_the_cap(table_mb: float, n_tokens: int) -> None:
    """Tables, keys, history and contexts; the history and what Python keeps were once on top of it."""
    ids = random_ids(200, SYNTHETIC, 3)
    tokens = np.random.default_rng(0).integers(0, 10**6, n_tokens).tolist()
    tracemalloc.start()
    try:
        empty = tracemalloc.get_traced_memory()[0]
        state = make(table_mb=table_mb)
        for t, token in enumerate(tokens):
            state.observe(ids[t % 200], token, 0)
        used = tracemalloc.get_traced_memory()[0] - empty
    finally:
        tracemalloc.stop()
    assert len(state.tokens) == len(state.tokens.sums) < n_tokens  # full
    assert 0.6 * table_mb * 2**20 < used < table_mb * 2**20 + 80_000


def test_a_cap_below_one_row_is_refused() -> None:
    with pytest.raises(PolicyConfigError, match=r"table_mb: 0\.01 is not allowed; expected at least 0\.0"):
        make(table_mb=0.01)


def test_contexts_are_found_until_newer_ones_take_their_places() -> None:
    contexts = Contexts(1000)
    grams = [(i, i + 1) for i in range(1000)]
    for i, gram in enumerate(grams):
        contexts.put(gram, i)
    assert np.mean([contexts.get(gram) == i for i, gram in enumerate(grams)]) > 0.9
    contexts.put(grams[3], 2000)
    assert contexts.get(grams[3]) == 2000
    assert contexts.get((5, 5)) == -1


def test_it_survives_more_tokens_than_its_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MAX_HISTORY", 16)
    state = make()
    ids = random_ids(100, SYNTHETIC, 3)
    follow(state, ids, [t % 5 for t in range(100)])
    assert np.isfinite(state.now()[0]).all()


def test_real_tokens_are_told_apart() -> None:
    assert len(set(real_trace().tokens.tolist())) > 1
