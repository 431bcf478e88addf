"""Group Fisher for every parameter: estimators of per-token squared scores from backward passes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fisher_jax import groups as groups_room
from fisher_jax import moments as moments_room
from fisher_jax import rejection, welford
from fisher_jax.batch import Batch
from fisher_jax.estimator import FisherEstimator
from fisher_jax.likelihoods import Likelihood, categorical
from fisher_jax.moments import Moments, from_sums, reject_if
from fisher_jax.orientation import reduction

__all__ = ["group_fisher"]

Tree = Any

_UNITS = {"exact": "token", "sequence": "sequence", "signs": "batch", "sampled": "batch"}


class _Problem(NamedTuple):
    """What every estimator needs to know."""

    apply_fn: Callable
    likelihood: Likelihood
    reduce: Callable[[Tree], Tree]  # squares of the parameters' shapes to groups
    kind: str
    num_samples: int
    temperature: float
    chunk_size: int | None


def group_fisher(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood = categorical,
    *,
    example: Batch | None = None,
    groups: Any = groups_room.param,
    estimator: str = "signs",
    kind: str | None = None,
    unit: str | None = None,
    num_samples: int = 1,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> FisherEstimator:
    """Per-token squared scores of every parameter: ``F_i = sum_t w_t s_ti**2 / sum_t w_t``.

    ``s_t = d log p(y_t | outputs_t) / d params``; a token is one element of the leading axes of the outputs.

    - ``exact``: the squares of every token, in chunks. ``T`` backward passes; the true Fisher sums over the ``K``
      columns of the output Fisher's factor, ``T K`` backward passes.
    - ``signs``: an unbiased estimate from one backward pass: each log-likelihood times ``eps_t sqrt(w_t)`` with
      random signs, the sum differentiated and squared; cross terms vanish in expectation.
    - ``sampled``: an unbiased estimate of the true Fisher, labels drawn from the model. One backward pass per sample.
    - ``sequence``: ``f_u = (sum_t w_t s_t)**2 / w_u`` of every sequence: another quantity, which contains the
      correlation of a sequence's scores. One backward pass.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs [..., K]``.
        likelihood: ``fj.categorical``, ``fj.bernoulli`` or ``fj.gaussian``.
        example: a `Batch` of arrays or ``jax.ShapeDtypeStruct``s. Fixes the orientation of every kernel, which
            ``row`` and ``column`` need.
        groups: ``fj.groups.param``, ``.tensor``, ``.row``, ``.column``, or a function ``(path, shape) -> reduction``
            that returns a function of squares (which it sums).
        estimator: see above.
        kind: ``"empirical"`` (labels of the batch) or ``"true"`` (labels from the model). ``None``: empirical, and
            true for ``sampled``.
        unit: of observation; ``None`` is the only one an estimator offers: token for ``exact``, sequence for
            ``sequence``, batch for ``signs`` and ``sampled``.
        num_samples: draws of signs or labels whose squares are averaged.
        temperature: labels come from tempered outputs while scores stay untempered; signs are then used, since such
            scores have a mean.
        chunk_size: per-token gradients alive at once for ``exact`` (default 16), sequences for ``sequence`` (1).

    Returns:
        `FisherEstimator`: ``init(params)``, ``observe(params, batch, key=None) -> Moments`` and
        ``update(state, params, batch, key=None)``; ``key`` is needed by ``signs``, ``sampled`` and true kinds. Leaves
        that are not floating are ``None`` in the statistic; parameters that the loss does not use get zeros. A batch
        of weight 0 changes nothing.

    Raises:
        ValueError: an unknown option, a unit that the estimator does not have, ``row`` or ``column`` without an
            example, or of a parameter whose orientation cannot be told (named, with its way out).

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> fisher = fj.group_fisher(apply_fn, estimator="exact")
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> state = fisher.update(fisher.init(params), params, batch)
        >>> [round(float(x), 3) for x in fj.welford.mean(state)["kernel"][0]]
        [0.194, 0.194, 0.278]
    """
    kind = kind or ("true" if estimator == "sampled" else "empirical")
    _check(estimator, kind, unit, num_samples, temperature, chunk_size)
    unit = _UNITS[estimator]
    observe_with = {"exact": _exact, "sequence": _sequence, "signs": _signs, "sampled": _signs}[estimator]
    needs_key = estimator in ("signs", "sampled") or (kind == "true" and estimator == "sequence")

    def problem(params: Tree) -> _Problem:
        reduce = reduction(groups, apply_fn, params, example)
        return _Problem(apply_fn, likelihood, reduce, kind, num_samples, temperature, chunk_size)

    def init(params: Tree):
        like = jax.eval_shape(lambda p: problem(params).reduce(_squares(_floating(p))), params)
        return welford.init(like, unit=unit)

    def observe(params: Tree, batch: Batch, key: Array | None = None) -> Moments:
        if needs_key and key is None:
            raise ValueError(f"estimator={estimator!r} with kind={kind!r} draws random numbers: pass key=")
        found, bad = observe_with(problem(params), params, batch, key)
        return reject_if(found, bad)

    def update(state, params: Tree, batch: Batch, key: Array | None = None):
        return welford.add(state, observe(params, batch, key))

    return FisherEstimator(init, observe, update, welford.add)


def _check(estimator, kind, unit, num_samples, temperature, chunk_size):
    if estimator not in _UNITS:
        raise ValueError(f"estimator is one of {', '.join(_UNITS)}, found {estimator!r}")
    if kind not in ("empirical", "true"):
        raise ValueError(f"kind is 'empirical' or 'true', found {kind!r}")
    if estimator == "sampled" and kind != "true":
        raise ValueError("estimator='sampled' draws its labels from the model: kind is 'true'")
    if unit not in (None, _UNITS[estimator]):
        raise ValueError(f"estimator={estimator!r} observes by {_UNITS[estimator]}, not by {unit!r}")
    if num_samples < 1 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(f"num_samples and chunk_size are at least 1, found {num_samples} and {chunk_size}")
    if not temperature > 0:
        raise ValueError(f"temperature is positive, found {temperature}")
    if temperature != 1 and (kind == "empirical" or estimator == "exact"):
        raise ValueError("a temperature changes the distribution of sampled labels: it needs sampled labels")


def _floating(tree: Tree) -> Tree:
    """Leaves that are not floating become ``None``."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.floating) else None, tree)


def _squares(tree: Tree) -> Tree:
    """Squares in at least float32."""
    return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)) ** 2, tree)


class _Split(NamedTuple):
    """Parameters to differentiate, and a model of them."""

    free: Tree
    outputs: Callable[[Tree, Any], Array]


def _split(problem: _Problem, params: Tree) -> _Split:
    leaves, treedef = jax.tree.flatten(params)
    is_free = [jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) for x in leaves]

    def outputs(free, inputs):
        moving = iter(jax.tree.leaves(free))
        joined = [next(moving) if ok else x for x, ok in zip(leaves, is_free, strict=True)]
        return problem.apply_fn(jax.tree.unflatten(treedef, joined), inputs)

    return _Split(_floating(jax.tree.map(jnp.asarray, params)), outputs)


class _Tokens(NamedTuple):
    """Targets and weights of the tokens of one batch, and why it cannot be used."""

    targets: Any
    weights: Array
    bad: Array


def _tokens(problem: _Problem, outputs: Any, batch: Batch, labels_matter: bool) -> _Tokens:
    lead = outputs.shape[:-1]
    dtype = jnp.promote_types(outputs.dtype, jnp.float32)
    weights = jnp.ones(lead, dtype) if batch.weights is None else jnp.asarray(batch.weights).astype(dtype)
    if weights.shape != lead:
        raise ValueError(
            f"weights have one value per token, the leading shape of the outputs {list(lead)}, found "
            f"{list(weights.shape)}"
        )
    bad = rejection.reason_mask(negative_weight=~jnp.all((weights >= 0) & jnp.isfinite(weights)))
    targets = batch.targets
    if labels_matter:
        inside = problem.likelihood.in_range(outputs, targets)
        if inside.shape != lead:
            raise ValueError(
                f"targets of shape {list(jnp.shape(targets))} do not fit {problem.likelihood.name} outputs of shape "
                f"{list(outputs.shape)}"
            )
        bad = bad | rejection.reason_mask(target_out_of_range=jnp.any((weights > 0) & ~inside))
    return _Tokens(targets, weights, bad)


def _log_probs(problem: _Problem, outputs: Array, targets: Any, weights: Array) -> Array:
    """Per-token log-likelihood, 0 (and without gradient) where the weight is 0."""
    return jnp.where(weights > 0, problem.likelihood.log_prob(outputs, targets), 0)


def _signs(problem: _Problem, params: Tree, batch: Batch, key: Any):
    """One observation: the batch. Random signs, or labels from the model, or both."""
    split = _split(problem, params)
    out = jax.eval_shape(split.outputs, split.free, batch.inputs)
    tokens = _tokens(problem, out, batch, problem.kind == "empirical")
    # Scores of labels drawn from the model itself have mean zero: no signs needed.
    signed = problem.kind == "empirical" or problem.temperature != 1

    def one(key):
        label_key, sign_key = jax.random.split(key)

        def loss(free):
            outputs = split.outputs(free, batch.inputs)
            targets = tokens.targets
            if problem.kind == "true":
                targets = problem.likelihood.sample(label_key, jax.lax.stop_gradient(outputs), problem.temperature)
            root = jnp.sqrt(jnp.maximum(tokens.weights, 0))
            if signed:
                root = root * jax.random.rademacher(sign_key, root.shape, root.dtype)
            return jnp.sum(root * _log_probs(problem, outputs, targets, tokens.weights))

        value, grads = jax.value_and_grad(loss)(split.free)
        return problem.reduce(_squares(grads)), value

    def step(carry, key):
        total, finite = carry
        squares, value = one(key)
        return (jax.tree.map(jnp.add, total, squares), finite & jnp.isfinite(value)), None

    keys = jax.random.split(key, problem.num_samples)
    like = jax.eval_shape(lambda k: one(k)[0], keys[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    (total, finite), _ = jax.lax.scan(step, (zeros, jnp.ones((), bool)), keys)
    weight = tokens.weights.sum()
    scale = jnp.where(weight > 0, 1 / (problem.num_samples * jnp.where(weight > 0, weight, 1)), 0)
    values = jax.tree.map(lambda x: (x * scale.astype(x.dtype))[None], total)
    found = moments_room.observe(values, weight[None], unit="batch")
    return found, tokens.bad | rejection.reason_mask(non_finite=~finite)


def _exact(problem: _Problem, params: Tree, batch: Batch, key: Array | None):
    """Every token is an observation; ``chunk_size`` gradients exist at a time."""
    del key
    split = _split(problem, params)
    outputs, pullback = jax.vjp(lambda free: split.outputs(free, batch.inputs), split.free)
    tokens = _tokens(problem, outputs, batch, problem.kind == "empirical")
    num_outputs, weights = outputs.shape[-1], tokens.weights.reshape(-1)
    flat = outputs.reshape(-1, num_outputs)
    if problem.kind == "empirical":
        total, log_prob_pullback = jax.vjp(
            lambda z: jnp.sum(_log_probs(problem, z, tokens.targets, tokens.weights)), outputs
        )
        (rows,) = log_prob_pullback(jnp.ones_like(total))
        rows, columns, finite = rows.reshape(flat.shape), 1, jnp.isfinite(total)
    else:
        rows, columns, finite = None, num_outputs, jnp.all(jnp.isfinite(flat) | (weights == 0)[:, None])

    def squares(token, column):
        row = rows[token] if rows is not None else problem.likelihood.fisher_factor(flat[token], column)
        (grads,) = pullback(jnp.zeros_like(flat).at[token].set(row.astype(flat.dtype)).reshape(outputs.shape))
        return problem.reduce(_squares(grads))

    def value(token):
        """``f_t``: one square, or the sum of those of the columns of the output Fisher's factor."""
        if columns == 1:
            return squares(token, 0)
        return _sum_over(lambda c: squares(token, c), columns, problem.chunk_size or 16)

    return _token_moments(problem, value, weights, columns), tokens.bad | rejection.reason_mask(non_finite=~finite)


def _sum_over(function: Callable[[Array], Tree], number: int, chunk: int) -> Tree:
    """``sum_i function(i)``, ``chunk`` at a time."""
    size = min(chunk, number)
    starts = jnp.arange(0, number, size)

    def step(total, start):
        index = start + jnp.arange(size)
        found = jax.vmap(function)(jnp.minimum(index, number - 1))
        keep = index < number
        return jax.tree.map(lambda t, x: t + jnp.tensordot(keep.astype(x.dtype), x, 1), total, found), None

    like = jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return jax.lax.scan(step, zeros, starts.astype(jnp.int32))[0]


def _token_moments(problem: _Problem, value: Callable[[Array], Tree], weights: Array, columns: int) -> Moments:
    """Moments over tokens from sums of ``w f``, ``w f**2`` and the same with ``w**2``."""

    def sums(token):
        f, w = value(token), jnp.maximum(weights[token], 0)
        powers = (w, w, w * w, w * w)
        squared = jax.tree.map(jnp.square, f)
        return tuple(
            jax.tree.map(lambda x, p=p: p.astype(x.dtype) * x, part)
            for part, p in zip((f, squared, f, squared), powers, strict=True)
        )

    chunk = problem.chunk_size or 16
    total = _sum_over(sums, weights.shape[0], chunk if columns == 1 else 1)
    return from_sums(total, weights)


def _sequence(problem: _Problem, params: Tree, batch: Batch, key: Array | None):
    """Every row is an observation, ``(sum_t w_t s_t)**2 / w_u``."""
    split = _split(problem, params)
    out = jax.eval_shape(split.outputs, split.free, batch.inputs)
    tokens = _tokens(problem, out, batch, problem.kind == "empirical")
    if len(out.shape) < 2:
        raise ValueError(f"estimator='sequence' needs outputs [rows, ..., K], found shape {list(out.shape)}")
    num_rows = out.shape[0]
    keys = jax.random.split(jax.random.key(0) if key is None else key, num_rows)

    def loss(free, row, key):
        inputs, targets, weights = jax.tree.map(
            lambda x: x[row][None], (batch.inputs, tokens.targets, tokens.weights)
        )
        outputs = split.outputs(free, inputs)
        if problem.kind == "true":
            targets = problem.likelihood.sample(key, jax.lax.stop_gradient(outputs), problem.temperature)
        return jnp.sum(weights * _log_probs(problem, outputs, targets, weights))

    def value(row):
        total, grads = jax.value_and_grad(loss)(split.free, row, keys[row])
        weight = tokens.weights[row].sum()
        safe = jnp.where(weight > 0, weight, 1)
        return jax.tree.map(lambda x: x / safe.astype(x.dtype), problem.reduce(_squares(grads))), total

    chunk = min(problem.chunk_size or 1, num_rows)
    starts = jnp.arange(0, num_rows, chunk, dtype=jnp.int32)

    def step(carry, start):
        folded, finite = carry
        index = start + jnp.arange(chunk)
        found, totals = jax.vmap(value)(jnp.minimum(index, num_rows - 1))
        weights = jnp.where(
            index < num_rows, tokens.weights.reshape(num_rows, -1).sum(1)[index.clip(0, num_rows - 1)], 0
        )
        for i in range(chunk):
            total = jax.tree.map(lambda x, i=i: x[i] * weights[i].astype(x.dtype), found)
            folded = moments_room.fold(folded, total, weights[i], jnp.zeros((), jnp.int32))
        return (folded, finite & jnp.all(jnp.isfinite(totals))), None

    like = jax.eval_shape(lambda r: value(r)[0], jax.ShapeDtypeStruct((), jnp.int32))
    first = (moments_room.start(like, "sequence"), jnp.ones((), bool))
    (folded, finite), _ = jax.lax.scan(step, first, starts)
    return moments_room.finish(folded), tokens.bad | rejection.reason_mask(non_finite=~finite)
