"""Fit the classifier on recorded traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fate_policy import estimators, features, model
from fate_policy.decisions import reaches
from fate_policy.errors import TraceError
from fate_policy.features import EARLY_AT, EARLY_OF, Features, Shape
from fate_policy.model import AHEAD, AHEAD_LAYERS, TARGETS, Head, Model
from fate_policy.progress import Bar
from fate_policy.trace import Trace

Say = Callable[[str], None]
NO_WEIGHTS = (
    "weights: a trace to fit on holds no router weights; record one with `fate run --fate-record`, "
    "or fit without --weights"
)
FAR = 255
"""The distance of uses that are farther away, or never come."""
AHEAD_PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""Penalties to try for the regression on layers before, in times the number of samples, strongest first."""
MOST_PRODUCT = 400_000
"""Numbers of the squeezed context times experts, which a token waits for: 48 x 128 experts have a rank of 65.

Of 24 x 32 a rank of 64 instead of 160 closes 0.544 instead of 0.550 of the gap from LRU to the optimum at a
quarter of the experts, 32 close 0.540 (20,000 tokens of stem, tested on the beginning of its second half).
"""


@dataclass(frozen=True)
class Options:
    """How to fit.

    The windows of the heads, and whether answers are balanced, are chosen anew inside the training prompts by
    `tune`. The other defaults, and the features, come from a study on gpt-oss-20b that looked at its second
    half of stem and at safety too.

    heads : the (share of slots, window) pairs that keep and late heads are fitted for; window 0 asks whether
        the expert is used again before the victim that the optimum would choose with that share
    sample_every : rows are taken at every so many tokens
    rank_basis, rank : length of a token's summary, and at most of the squeezed context: see `MOST_PRODUCT`
    ridge : penalty of the context's regression, in mean squares of its inputs
    penalty : C of the logistic regression
    balanced : samples weigh so that yes and no, of which one is rare, weigh alike in a layer; what that adds
        to the log-odds is taken off again, so that chances hold
    weights : take the router's weights as features too; every trace must hold them
    without : beginnings of the names of inputs that the linear model does without, to see what they are worth
    estimator : "module:Class" of a scikit-learn classifier with predict_proba, instead of the linear one
    """

    heads: tuple[tuple[float, int], ...] = ((0.25, 4), (0.5, 12))
    sample_every: int = 6
    max_rows: int = 160_000
    rank_basis: int = 128
    rank: int = 160
    ridge: float = 0.05
    penalty: float = 1.0
    balanced: bool = False
    n_folds: int = 3
    seed: int = 0
    weights: bool = False
    without: tuple[str, ...] = ()
    estimator: str | None = None
    table_minimum: int = 2


def shape_of(trace: Trace) -> Shape:
    return Shape(np.array(trace.meta["n_experts"], np.int32), np.array(trace.meta["k"], np.int32))


def served_rank(shape: Shape, most: int) -> int:
    """Return the length of the squeezed context for a model of this shape."""
    return max(1, min(most, MOST_PRODUCT // max(1, shape.table[0] * shape.table[1])))


def split(trace: Trace, share: float = 0.5) -> tuple[Trace, Trace]:
    """Cut a trace in two at the prompt nearest below `share` of its prompts."""
    cut = int(trace.prompt_start[int(len(trace.prompt_start) * share)])
    return trace.slice(0, cut), trace.slice(cut, trace.n_tokens)


def fit(
    traces: Sequence[Trace],
    options: Options | None = None,
    say: Say = lambda text: None,
    progress: bool = False,
) -> Model:
    """Return the model fitted on all of these traces. progress : show a bar for each part of the work."""
    options = options or Options()
    shape = shape_of(traces[0])
    options = replace(options, rank=served_rank(shape, options.rank))
    if any(shape_of(trace).n_experts.tolist() != shape.n_experts.tolist() for trace in traces):
        raise TraceError("the traces to train on are of models with different layers or experts")
    if len(names := sorted({trace.token_names for trace in traces})) > 1:
        raise TraceError(f"the traces to train on name tokens differently: by {' and by '.join(names)}")
    if options.weights and any(trace.weights is None for trace in traces):
        raise TraceError(NO_WEIGHTS)
    basis, center = _basis(traces, shape, options.rank_basis)
    say("features")
    seen = _follow(traces, shape, basis, center, options, progress)
    say("context")
    fitted = Model(
        shape=shape,
        basis=basis,
        center=center,
        squeeze=np.zeros((seen.contexts.shape[1], 1), np.float32),
        spread=np.zeros((1, len(TARGETS), basis.shape[0]), np.float32),
        mean=np.zeros((len(TARGETS), basis.shape[0]), np.float32),
        heads=[],
        ahead=np.zeros((0,), np.float32),
        weights=options.weights,
    )
    fitted, predicted = _fit_context(fitted, seen, options)
    heads = []
    questions = [("now", 1, 0.0)]
    questions += [(kind, window, share) for share, window in options.heads for kind in ("keep", "late")]
    for kind, window, share in questions:
        say(f"{kind} {window}")
        heads.append(_fit_head(fitted, seen, predicted, kind, window, share, options, progress))
    fitted = replace(fitted, heads=heads)
    say("layers ahead")
    return replace(
        fitted,
        ahead=_fit_ahead(fitted, seen, predicted, options),
        tables=(
            seen.state.tokens.state(options.table_minimum),
            seen.state.pairs.state(options.table_minimum),
        ),
        meta={
            "sklearn": version("scikit-learn"),
            "model": traces[0].meta.get("model"),
            "traces": [trace.hash() for trace in traces],
            "tokens": traces[0].token_names,
            "estimator": options.estimator or "linear",
            "balanced": options.balanced,
            "seed": options.seed,
            "prompts": len(np.unique(seen.prompt)),
            "importance": importances(fitted, seen.rows, predicted),
        },
    )


def importances(
    fitted: Model, rows: NDArray[np.float16], predicted: NDArray[np.float32]
) -> dict[str, dict[str, float]]:
    """Return, by head, how far a deviation of each input moves the log-odds, the mean over layers."""
    some = slice(None, None, max(1, len(rows) // 500))
    inputs = np.concatenate((rows[some].astype(np.float32), predicted[some]), axis=2)
    spread = inputs.std(axis=(0, 3))
    return {
        head.name: dict(zip(fitted.inputs, (np.abs(head.coef) * spread).mean(axis=0).tolist(), strict=True))
        for head in fitted.heads
    }


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one pass over the training tokens gave; rows only of the sampled tokens.

    contexts : (n_tokens, n_context);  prompt : (n_tokens,);  sampled : (n,)
    rows : float16 (n, n_layers, n_features, n_experts)
    next_use, next_but_one : uint8 (n, n_layers, n_experts): tokens to the first use after this token, and
        after the next one
    """

    contexts: NDArray[np.float32]
    prompt: NDArray[np.int64]
    ids: NDArray[np.int32]
    sampled: NDArray[np.int64]
    rows: NDArray[np.float16]
    next_use: NDArray[np.uint8]
    next_but_one: NDArray[np.uint8]
    state: Features

    def used(self, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which experts these tokens used, (n, n_layers, n_experts)."""
        return uses(self.ids[at], self.next_use.shape[2])


def uses(ids: NDArray[np.int32], n_experts: int) -> NDArray[np.bool_]:
    """Return ids (n, n_layers, k) as bool (n, n_layers, n_experts)."""
    found = np.zeros((*ids.shape[:2], n_experts + 1), np.bool_)
    np.put_along_axis(found, np.where(ids >= 0, ids, n_experts), True, axis=2)
    return found[:, :, :-1]


def _basis(
    traces: Sequence[Trace], shape: Shape, rank: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the directions in which the routing of tokens varies most."""
    n = shape.table[0] * shape.table[1]
    moment = np.zeros((n, n), np.float32)
    total = np.zeros(n)
    n_tokens = 0
    for trace in traces:
        for start in range(0, trace.n_tokens, 4096):
            used = uses(trace.experts(start, start + 4096), shape.table[1]).reshape(-1, n).astype(np.float32)
            moment += used.T @ used
            total += used.sum(axis=0)
            n_tokens += len(used)
    mean = total / n_tokens
    _, vectors = np.linalg.eigh(moment.astype(np.float64) / n_tokens - np.outer(mean, mean))
    basis = np.ascontiguousarray(vectors[:, -min(rank, n) :]).astype(np.float32)
    return basis, (mean @ basis).astype(np.float32)


def _follow(
    traces: Sequence[Trace],
    shape: Shape,
    basis: NDArray[np.float32],
    center: NDArray[np.float32],
    options: Options,
    progress: bool,
) -> _Seen:
    state = Features(shape, basis, center, weights=options.weights)
    n_tokens = sum(trace.n_tokens for trace in traces)
    ids = np.concatenate([trace.experts() for trace in traces])
    prompt = np.concatenate([trace.sequence.astype(np.int64) + i * 2**32 for i, trace in enumerate(traces)])
    tokens = np.concatenate([trace.tokens for trace in traces])
    position = np.concatenate([trace.position for trace in traces])
    decode = np.concatenate([trace.is_decode for trace in traces])
    weights: Any = np.concatenate([trace.weights for trace in traces]) if options.weights else None
    sampled = np.flatnonzero(decode[: n_tokens - 1])
    sampled = sampled[(sampled >= min(2000, n_tokens // 20)) & (sampled % options.sample_every == 0)]
    contexts = np.zeros((n_tokens, state.n_context), np.float32)
    rows = np.zeros(
        (len(sampled), shape.table[0], len(features.names(options.weights)), shape.table[1]), np.float16
    )
    due = iter([*sampled.tolist(), n_tokens])
    n, token_due = 0, next(due)
    bar = Bar(n_tokens, progress)
    for t in range(n_tokens):
        bar.show(t)
        state.expect(int(tokens[t]), int(prompt[t]), int(position[t]))
        row, contexts[t] = state.now()
        if t == token_due:
            rows[n] = row
            n, token_due = n + 1, next(due)
        state.observe(ids[t], int(tokens[t]), int(prompt[t]), weights[t] if options.weights else None)
    bar.clear()
    return _Seen(
        contexts=contexts,
        prompt=np.unique(prompt, return_inverse=True)[1],
        ids=ids,
        sampled=sampled,
        rows=rows,
        next_use=next_uses(ids, shape.table[1], sampled),
        next_but_one=next_uses(ids, shape.table[1], sampled + 1),
        state=state,
    )


def next_uses(ids: NDArray[np.int32], n_experts: int, at: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return, for sorted tokens `at`, the tokens to each expert's first use after it, at most `FAR`."""
    n_tokens, n_layers, _ = ids.shape
    result = np.empty((len(at), n_layers, n_experts), np.uint8)
    distance = np.full((n_layers, n_experts + 1), FAR, np.uint8)
    layers = np.arange(n_layers)[:, None]
    n = len(at) - 1
    for t in range(n_tokens - 1, -1, -1):
        while n >= 0 and at[n] == t:
            result[n] = distance[:, :-1]
            n -= 1
        np.minimum(distance, FAR - 1, out=distance)
        distance += 1
        distance[layers, ids[t]] = 1
    return result


def _fit_context(fitted: Model, seen: _Seen, options: Options) -> tuple[Model, NDArray[np.float32]]:
    """Fit the context's regression; also predict each sampled token by a fit without its prompts."""
    n_tokens, n_context = seen.contexts.shape
    fold = seen.prompt * options.n_folds // (seen.prompt[-1] + 1)
    fold[: min(500, n_tokens // 20)] = options.n_folds  # the tables have yet to fill
    n_out = len(TARGETS) * fitted.basis.shape[0]
    moment = np.zeros((options.n_folds, n_context, n_context))
    product = np.zeros((options.n_folds, n_context, n_out))
    total = np.zeros((options.n_folds, n_out))
    count = np.zeros(options.n_folds)
    sums = np.zeros((options.n_folds, n_context))
    for start, wanted in _targets(seen):
        part = fold[start : start + len(wanted)]
        context = seen.contexts[start : start + len(wanted)]
        for f in range(options.n_folds):
            chosen = context[part == f]
            answers = wanted[part == f]
            moment[f] += chosen.T @ chosen
            product[f] += chosen.T @ answers
            total[f] += answers.sum(axis=0)
            sums[f] += chosen.sum(axis=0)
            count[f] += len(chosen)
    predicted = np.empty((len(seen.sampled), n_out), np.float32)
    whole = fitted
    for out in range(options.n_folds + 1):
        kept = np.arange(options.n_folds) != out
        if not count[kept].sum():
            kept[:] = True
        n = count[kept].sum()
        mean = total[kept].sum(axis=0) / n
        square = moment[kept].sum(axis=0) / n
        cross = (product[kept].sum(axis=0) - np.outer(sums[kept].sum(axis=0), mean)) / n
        squeeze, spread = _reduced(square, cross, options)
        at = np.flatnonzero(fold[seen.sampled] == out)
        if out == options.n_folds:
            whole = replace(
                fitted,
                squeeze=squeeze,
                spread=spread.reshape(len(spread), len(TARGETS), -1),
                mean=mean.reshape(len(TARGETS), -1).astype(np.float32),
            )
        predicted[at] = seen.contexts[seen.sampled[at]] @ squeeze @ spread + mean
    n_layers, n_experts = fitted.shape.table
    return whole, predicted.reshape(-1, len(TARGETS), n_layers, n_experts).transpose(0, 2, 1, 3)


def _reduced(
    square: NDArray[np.float64], cross: NDArray[np.float64], options: Options
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Solve the ridge regression and keep the directions that explain most of its predictions."""
    n = len(square)
    penalty = options.ridge * np.trace(square) / n * np.eye(n)
    weights = np.linalg.solve(square + penalty, cross)
    root = np.linalg.cholesky(square + penalty * 0.01).T
    explained = root @ weights
    _, vectors = np.linalg.eigh(explained @ explained.T)
    vectors = vectors[:, -min(options.rank, n) :]
    squeeze = np.linalg.solve(root, vectors)
    return squeeze.astype(np.float32), (vectors.T @ explained).astype(np.float32)


def _targets(seen: _Seen, chunk: int = 2048) -> Any:
    """Yield (start, targets (n, n_out)) from the end: use now, then decayed uses to come, as in TARGETS."""
    n_tokens = len(seen.ids)
    n_layers, n_experts = seen.next_use.shape[1:]
    soon = np.zeros((n_layers, n_experts), np.float32)
    after = soon.copy()
    for start in range((n_tokens - 1) // chunk * chunk, -1, -chunk):
        used = uses(seen.ids[start : start + chunk], n_experts)
        wanted = np.empty((len(used), len(TARGETS), n_layers, n_experts), np.float32)
        for i in range(len(used) - 1, -1, -1):
            wanted[i] = used[i], soon, after
            after = soon
            soon = 0.75 * soon + 0.25 * used[i]
        yield start, wanted.reshape(len(used), -1)


def _fit_head(
    fitted: Model,
    seen: _Seen,
    predicted: NDArray[np.float32],
    kind: str,
    window: int,
    share: float,
    options: Options,
    progress: bool,
) -> Head:
    n_layers, n_experts = fitted.shape.table
    here, following = seen.used(seen.sampled), seen.used(seen.sampled + 1)
    ask = {"now": np.ones_like(here), "keep": ~here, "late": ~following}[kind]
    within = np.full((len(seen.ids), n_layers), window + 1)
    if window == 0:
        within = reaches(seen.ids, n_experts, fitted.shape.slots(share), FAR)
    answer = {
        "now": here,
        "keep": seen.next_use < within[seen.sampled, :, None],
        "late": seen.next_but_one < within[seen.sampled + 1, :, None],
    }[kind]
    fitted_ones: list[Any] = []
    n_inputs = len(fitted.inputs)
    dropped = [i for i, name in enumerate(fitted.inputs) if name.startswith(options.without)]
    coef = np.zeros((n_layers, n_inputs), np.float32)
    intercept = np.zeros(n_layers, np.float32)
    bonus = np.zeros(n_layers, np.float32)
    rng = np.random.default_rng(options.seed)
    bar = Bar(n_layers, progress)
    for layer in range(n_layers):
        bar.show(layer)
        n_real = int(fitted.shape.n_experts[layer])
        token, expert = np.nonzero(ask[:, layer, :n_real])
        if len(token) > options.max_rows:
            some = np.sort(rng.choice(len(token), options.max_rows, replace=False))
            token, expert = token[some], expert[some]
        inputs = np.concatenate(
            (
                seen.rows[token, layer, :, expert].astype(np.float32),
                predicted[token, layer, :, expert],
                here[token, layer, expert, None].astype(np.float32),
            ),
            axis=1,
        )
        inputs[:, :n_inputs][:, dropped] = 0  # and so are their coefficients
        if kind != "late":
            inputs = inputs[:, :-1]
        wanted = answer[token, layer, expert]
        weight, excess = balance(wanted) if options.balanced else (None, 0.0)
        intercept[layer] = -excess
        if options.estimator:
            name, seed = options.estimator, options.seed
            fitted_ones.append(estimators.fit(name, seed, inputs[:, :n_inputs], wanted, weight))
            bonus[layer] = 2 if kind == "late" else 0
            continue
        linear = _fit_linear(inputs, wanted, weight, options)
        coef[layer] = linear[:n_inputs]
        intercept[layer] += linear[-1]
        if kind == "late":
            bonus[layer] = linear[n_inputs]
    bar.clear()
    return Head(kind, window, share, coef, intercept, bonus, fitted_ones or None)


def balance(wanted: NDArray[np.bool_]) -> tuple[NDArray[np.float64] | None, float]:
    """Return weights (n,) by which yes and no weigh n / 2 each, and what they add to the log-odds of yes.

    No weights where all answers are the same.
    """
    n_yes = np.count_nonzero(wanted)
    n_no = len(wanted) - n_yes
    if not n_yes or not n_no:
        return None, 0.0
    return np.where(wanted, len(wanted) / (2 * n_yes), len(wanted) / (2 * n_no)), float(np.log(n_no / n_yes))


def _fit_linear(
    inputs: NDArray[np.float32],
    wanted: NDArray[np.bool_],
    weight: NDArray[np.float64] | None,
    options: Options,
) -> NDArray[np.float32]:
    """Return the coefficients of the inputs and the intercept of a logistic regression."""
    from sklearn.linear_model import LogisticRegression

    if wanted.all() or not wanted.any():
        return np.zeros(inputs.shape[1] + 1, np.float32)
    center, scale = inputs.mean(axis=0), inputs.std(axis=0)
    # where few tokens were early a small deviation would make wild coefficients of next to nothing
    scale[EARLY_AT] = np.maximum(scale[EARLY_AT], scale[EARLY_OF] / 4)
    scale[scale < 1e-6] = 1
    fitted = LogisticRegression(C=options.penalty, solver="newton-cholesky", max_iter=30, tol=1e-3)
    fitted.fit((inputs - center) / scale, wanted, weight)
    coef = fitted.coef_[0] / scale
    return np.append(coef, fitted.intercept_[0] - coef @ center).astype(np.float32)


def _fit_ahead(
    fitted: Model, seen: _Seen, predicted: NDArray[np.float32], options: Options
) -> NDArray[np.float32]:
    """Fit what the surprises of earlier layers of the same token say about a layer's own."""
    n_layers, n_experts = fitted.shape.table
    now = seen.used(seen.sampled)
    head = fitted.head("now")
    if head.estimators is None:
        own, context = np.split(head.coef, [seen.rows.shape[2]], axis=1)
        odds = np.einsum("lf,nlfe->nle", own, seen.rows, optimize=True)
        odds += np.einsum("lt,nlte->nle", context, predicted, optimize=True)
        odds += head.intercept[:, None]
        expected = model.chance(odds.astype(np.float32))
    else:
        expected = predicted[:, :, 0]
    exists = fitted.shape.even_rates() > 0
    surprise = (now - expected) * exists
    prompt = seen.prompt[seen.sampled]
    is_second = prompt >= np.median(prompt)
    if is_second.all():  # one prompt
        is_second = np.arange(len(prompt)) >= len(prompt) // 2
    ahead = np.zeros((AHEAD, n_layers, AHEAD_LAYERS * n_experts, n_experts), np.float32)
    for first in range(1, n_layers):  # the layers before are known
        wanted = surprise[:, first : first + AHEAD]
        found = _ridge(model.ahead_inputs(surprise, first, 1), wanted, is_second)
        for i in range(wanted.shape[1]):
            ahead[i, first + i] = found[:, i]
    return ahead


def _ridge(
    inputs: NDArray[np.float32], wanted: NDArray[np.float32], is_second: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return the weights (n_inputs, n_wanted, n_experts) that predict `wanted` (n, n_wanted, n_experts).

    Each of the `n_wanted` has the penalty by which either half of the samples is predicted best from the
    other; where none beats predicting zero its weights are zero. Once one gains for none, weaker ones are
    not tried.
    """
    n, n_wanted, n_experts = wanted.shape
    halves = [
        (inputs[half], wanted[half].reshape(-1, n_wanted * n_experts)) for half in (~is_second, is_second)
    ]
    squares = [known.T @ known for known, _ in halves]
    products = [known.T @ answers for known, answers in halves]
    weights = np.zeros((inputs.shape[1], n_wanted, n_experts), np.float32)
    best = np.zeros(n_wanted, np.float32)
    for penalty in AHEAD_PENALTIES:
        # not less for a half: what is best depends on noise and signal, not on the number of samples
        ridge = np.eye(inputs.shape[1], dtype=np.float32) * np.float32(max(1, penalty * n))
        gain = np.zeros(n_wanted, np.float32)  # by how much squared errors fall
        for fit, judge in ((0, 1), (1, 0)):
            tried = np.linalg.solve(squares[fit] + ridge, products[fit])
            fall = (2 * products[judge] - squares[judge] @ tried) * tried
            gain += fall.reshape(weights.shape).sum(axis=(0, 2))
        gains = gain > best
        if not gains.any():
            break
        best[gains] = gain[gains]
        whole = np.linalg.solve(sum(squares) + ridge, sum(products)).reshape(weights.shape)
        weights[:, gains] = whole[:, gains]
    return weights
