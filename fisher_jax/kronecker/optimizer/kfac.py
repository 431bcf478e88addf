"""K-FAC ready to use: momentum, a trust region or steps from the exact quadratic model, and adaptive damping."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._support.dtypes import wide, wide_dtype
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import tokens_of
from fisher_jax.kronecker.optimizer import annealing
from fisher_jax.kronecker.optimizer.quadratic import best_step, local_model, loss, tree_dot
from fisher_jax.kronecker.optimizer.rows import check_rows, first_rows, window
from fisher_jax.kronecker.optimizer.transformation import KFACState, aligned, scale_by_kfac
from fisher_jax.likelihoods import Likelihood, categorical

__all__ = ["KFACOptimizerState", "kfac"]

Tree = Any
_LARGEST = 1e4
# Early updates turn sharply: adaptive mode looks at each of them, and its least momentum grows over them.
_EARLY = 50


class KFACOptimizerState(NamedTuple):
    """State of `kfac`.

    Attributes:
        factors: `KFACState`.
        velocity: float32, like the parameters: with a fixed learning rate the running sum of directions; otherwise
            the last update.
        damping: float32; moves only in adaptive mode.
        learning_rate, momentum: float32, what the last update used.
        ratio: float32, loss decrease over the predicted one, when last looked at (adaptive; 1 before).
        annealing: the share of the rate that ``rate_scale="auto"`` has come to, and what moves it.
    """

    factors: KFACState
    velocity: Tree
    damping: Array
    learning_rate: Array
    momentum: Array
    ratio: Array
    annealing: annealing.RateScale


def kfac(
    learning_rate: Any,
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood = categorical,
    *,
    example: Batch,
    damping: Any = None,
    momentum: Any = 0.5,
    kl_clip: Any = 1e-3,
    weight_decay: Any = 0.0,
    adapt_every: int = 1,
    min_damping: Any = None,
    min_momentum: Any = 0.5,
    max_momentum: Any = 0.99,
    rate_scale: Any = "auto",
    model_rows: int | None = None,
    factor_rows: int | None = None,
    refresh_ramp: int | None = 10,
    update_freq: int = 10,
    fisher: str = "sampled",
    policy: str = "auto",
    token_cap: int | None = 1024,
    form: str = "auto",
    power: float = -1.0,
    shared: str = "expand",
    temperature: float = 1.0,
    storage: Any = None,
    diagonal: Callable[[str], bool] | None = None,
    eigenvalue_correction: bool | Callable[[str], bool] = False,
    statistics_freq: int | None = None,
    factor_decay: float | None = None,
    factor_rank: int | None = None,
    model_params: Tree = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with momentum: ``update(grads, state, params, batch=batch, key=key)``, ready for ``apply_updates``.

    Gradients ``g`` are those of the mean negative log-likelihood per weighted token; ``x = (F + damping I)^-1 g`` by
    `fj.scale_by_kfac`.

    - A number or a schedule for ``learning_rate``: ``v <- momentum v + nu x + weight_decay params`` and the update is
      ``-learning_rate v``. The trust region ``nu = min(1, sqrt(2 kl_clip / (learning_rate**2 x . g)))`` keeps the KL
      divergence per token that the step of ``x`` alone is predicted to cause below ``kl_clip`` nats.
    - ``None``, adaptive: the update ``u = -a x + m (last update)`` has ``a`` and ``m`` that minimise the exact
      quadratic model of the loss on this batch, ``g . u + u . (GGN + (damping + weight_decay) I) u / 2`` (two
      Jacobian-vector products; Martens and Grosse 2015, section 7), with ``weight_decay / 2 |params|**2`` in the
      loss, among ``min_momentum min(1, updates / 50) <= m <= max_momentum``; ``a`` is then multiplied by
      ``rate_scale``. Every ``adapt_every`` updates, and at each of the first 50, the loss after the step is
      evaluated and the damping follows the Levenberg-Marquardt rule (section 6.5): it is multiplied by ``0.9`` for
      each update since the last look where the loss fell by more than 3/4 of what the model predicts, and divided by
      as much below 1/4. Where it rose though the model predicts a fall the step is not taken: the update is zero, the
      last update is forgotten, and the damping grows by 4. It stays between ``min_damping`` and 1e4.

    Give ``value=`` as well, the loss of this batch without weight decay, from ``jax.value_and_grad``: adaptive mode
    then need not evaluate it anew where ``model_rows`` leaves some out.

    An update whose batch or gradients cannot be used is zero and leaves all but the counts of the state as it was.

    Args:
        damping: what is added to the curvature; where ``learning_rate`` is ``None`` the first of it. ``None``: 0.01,
            and 0.1 in adaptive mode.
        momentum, kl_clip: only with a fixed learning rate; ``kl_clip=None`` for no trust region, which is one of a
            step without momentum: steps that agree add up to ``1 / (1 - momentum)`` of them.
        min_damping: a model of one batch predicts that batch well at any damping, also where the step fits its noise
            and nothing else; the rule alone lets damping fall until it does. ``None``: 1e-3, or the first damping
            where that is less.
        adapt_every: above 1 saves forward passes and risks a step that nobody looked at: a decoder of bytes whose
            curvature came from 8 of 16 rows diverged with 5, on every one of five seeds, and on none with 1.
        min_momentum, max_momentum: what minimises the model of one batch undoes much of the last update, which fitted
            the noise of the batch before; updates then never average over batches. ``None``: no bound. Where every
            batch is the whole data, no bound from above and ``rate_scale=1.0`` are faster.
        rate_scale: what minimises the model of one batch steps as far as its noise says, at the end too. ``"auto"``:
            the share of that rate falls when updates have come to move about a minimum instead of toward it, as the
            slope along each update on the next batch shows (Yaida 2019), and rises again while there is progress. A
            number or a schedule instead: one that falls as one over steps needs to know how many there will be
            (Robbins and Monro 1951).
        model_rows: the model's curvature is taken on the first so many rows of the batch (the first axis of its
            arrays), gradient and losses on all (section 8 of the paper takes a quarter). ``None``: on all. Few rows
            say too little where they hold few tokens: 8 rows of 32 let a decoder of bytes take steps that raised its
            loss by 0.6 nats, all 32 did not.
        factor_rows: factors are taken from so many rows of the batch, a window that moves on from update to
            update (section 8 of the paper takes an eighth). ``None``: from all.
        refresh_ramp: early factors are soon out of date: after ``n`` updates they serve at most
            ``1 + n // refresh_ramp``, and ``update_freq`` from then on. ``None``: ``update_freq`` from the start.
        fisher: ``"sampled"`` here: the empirical Fisher vanishes with the loss, and steps grow.

    Other arguments and errors are those of `fj.scale_by_kfac`.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp, optax
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> batch = fj.Batch(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [2.0]]))
        >>> tx = fj.kfac(None, apply_fn, fj.gaussian, example=batch, fisher="ggn", damping=1e-6)
        >>> params = {"kernel": jnp.zeros((2, 1))}
        >>> grads = {"kernel": -jnp.array([[0.5], [1.0]])}
        >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        >>> jnp.round(optax.apply_updates(params, updates)["kernel"], 3).tolist()  # least squares, in one step
        [[1.0], [2.0]]
    """
    adaptive = learning_rate is None
    first_damping = damping if damping is not None else (0.1 if adaptive else 0.01)
    if min_damping is None:
        min_damping = jnp.minimum(1e-3, first_damping)
    if isinstance(rate_scale, str) and rate_scale != "auto":
        raise ValueError(f"rate_scale is 'auto', a number or a schedule, found {rate_scale!r}")
    if adaptive and isinstance(rate_scale, str) and max_momentum is None:
        raise ValueError(
            "rate_scale='auto' needs max_momentum, 0.99 for example: a momentum without bound fits the noise that it "
            "looks for; or pass rate_scale=1.0"
        )
    check_rows(factor_rows, example)
    look_at = _Adaptation(adapt_every, min_damping, (min_momentum, max_momentum), model_rows, rate_scale)
    inner = functools.partial(
        scale_by_kfac, apply_fn, likelihood, example=window(example, factor_rows), update_freq=update_freq,
        fisher=fisher, policy=policy, token_cap=token_cap, form=form, power=power, shared=shared,
        temperature=temperature, storage=storage, diagonal=diagonal, eigenvalue_correction=eigenvalue_correction,
        statistics_freq=statistics_freq, factor_decay=factor_decay, factor_rank=factor_rank,
        model_params=model_params,
    )  # fmt: skip

    def init(params: Tree) -> KFACOptimizerState:
        velocity = jax.tree.map(lambda x: jnp.zeros(x.shape, wide_dtype(x.dtype)) if _moves(x) else x, params)
        damping, rate, momentum, ratio = (jnp.full((), x, jnp.float32) for x in (first_damping, 0.0, 0.0, 1.0))
        factors = inner(damping=first_damping).init(params)
        return KFACOptimizerState(factors, velocity, damping, rate, momentum, ratio, annealing.start())

    def update(
        updates: Tree, state: KFACOptimizerState, params: Tree = None, *, batch: Batch | None = None,
        model_params: Tree = None, value: Any = None, **extra: Any,
    ):  # fmt: skip
        if params is None:
            raise ValueError("kfac needs params: call update(grads, state, params, batch=batch, key=key)")
        if refresh_ramp is not None:
            state = state._replace(factors=_due_early(state.factors, refresh_ramp, update_freq, statistics_freq))
        used = state.damping if adaptive else jnp.asarray(first_damping, jnp.float32)
        decay = jnp.asarray(weight_decay, jnp.float32)
        if adaptive:
            updates = _combine(lambda g, p: g + decay * p, updates, params)
        if factor_rows is not None and extra.get("taps") is not None:
            raise ValueError("taps= hold all rows of the batch: leave out factor_rows=, or give batch= alone")
        seen = None if batch is None else window(batch, factor_rows, state.factors.step)
        natural, factors = inner(damping=used + decay if adaptive else used).update(
            updates, state.factors, params, batch=seen, model_params=model_params, **extra
        )
        if adaptive:
            if batch is None:
                raise ValueError("kfac with learning_rate=None evaluates its model: pass batch=")
            whole = params if model_params is None else model_params
            new, bad = _adaptive(
                apply_fn, likelihood, batch, whole, params, updates, natural, state, used, decay, look_at, value
            )
            counted = factors.rejected > state.factors.rejected
            factors = factors._replace(
                rejected=jnp.where((bad != 0) & ~counted, factors.rejected + 1, factors.rejected),
                reasons=factors.reasons | bad,
            )
        else:
            rate = learning_rate(state.factors.step) if callable(learning_rate) else learning_rate
            new = _fixed(updates, natural, params, state, jnp.asarray(rate), momentum, kl_clip, decay)
        step, new = new
        good = (factors.rejected == state.factors.rejected) & (factors.age >= 0)
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b).astype(b.dtype), tuple(new)[1:], tuple(state)[1:])
        step = jax.tree.map(lambda u, g: jnp.where(good, u, 0).astype(g.dtype) if _moves(g) else g, step, updates)
        return step, KFACOptimizerState(factors, *kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _due_early(factors: KFACState, ramp: int, update_freq: int, statistics_freq: int | None) -> KFACState:
    """Ages as those of factors that are due, where they are older than `ramp` allows."""
    early = factors.age > factors.step // ramp
    age = jnp.where(early, jnp.maximum(factors.age, update_freq), factors.age)
    if factors.raw_age is None:
        return factors._replace(age=age)
    raw_age = jnp.where(early, jnp.maximum(factors.raw_age, statistics_freq or update_freq), factors.raw_age)
    return factors._replace(age=age, raw_age=raw_age)


class _Adaptation(NamedTuple):
    """What `kfac` says about its adaptive mode."""

    every: int
    min_damping: Any
    momenta: tuple[Any, Any]
    rows: int | None
    scale: Any


def _fixed(grads, natural, params, state, rate, momentum, kl_clip, decay):
    """A trust region on the step itself, then momentum."""
    nu = jnp.ones(())
    if kl_clip is not None:
        predicted = rate**2 * tree_dot(_floating(natural), _floating(grads)) / 2
        nu = jnp.where(predicted > kl_clip, jnp.sqrt(kl_clip / jnp.where(predicted > 0, predicted, 1)), 1)
    direction = _combine(lambda x, p: nu * x + decay * p, natural, params)
    velocity = _combine(lambda v, d: momentum * v + d, state.velocity, direction)
    step = _combine(lambda v: -rate * v, velocity)
    used = jnp.asarray(rate, jnp.float32), jnp.asarray(momentum, jnp.float32)
    return step, state._replace(velocity=velocity, learning_rate=used[0], momentum=used[1])


def _adaptive(apply_fn, likelihood, batch, whole, params, grads, natural, state, damping, decay, how, value):
    """The minimiser of the quadratic model along the natural gradient and the last update."""
    leaves, treedef = jax.tree.flatten(whole)
    part, _ = aligned(params, whole)
    moving = [x for x in part if _moves(x)]
    places = [i for i, x in enumerate(part) if _moves(x)]

    def whole_with(moved):
        full = list(leaves)
        for i, x in zip(places, moved, strict=True):
            full[i] = x
        return jax.tree.unflatten(treedef, full)

    def listed(tree):
        return [x for x in aligned(tree, whole)[0] if _moves(x)]

    tokens, bad = tokens_of(likelihood, jax.eval_shape(apply_fn, whole, batch.inputs), batch)
    seen = first_rows(tokens, how.rows)
    directions = ([-x for x in listed(natural)], listed(state.velocity))
    model = local_model(
        lambda moved: apply_fn(whole_with(moved), seen.inputs), likelihood, seen, moving, listed(grads), directions,
        damping + decay,
    )  # fmt: skip
    least, most = how.momenta
    least = None if least is None else least * jnp.minimum((state.factors.step + 1) / _EARLY, 1)
    annealed = state.annealing
    if isinstance(how.scale, str):
        annealed = annealing.renewed(annealed, model.slope[1], model.curvature[1, 1])
        scale = annealed.scale
    else:
        scale = how.scale(state.factors.step) if callable(how.scale) else how.scale
    (rate, momentum), predicted = best_step(model, least, most, scale)
    velocity = _combine(lambda x, v: momentum * v - rate * x, natural, state.velocity)

    def change():
        moved = [p + v.astype(p.dtype) for p, v in zip(moving, listed(velocity), strict=True)]
        norms = [decay / 2 * tree_dot(x, x) for x in (moved, moving)]
        before = model.value if how.rows is None else value
        before = loss(apply_fn, likelihood, whole, tokens) if before is None else jnp.asarray(before, jnp.float32)
        return loss(apply_fn, likelihood, whole_with(moved), tokens) + norms[0] - before - norms[1]

    every = jnp.where(state.factors.step < _EARLY, 1, how.every)
    due = (state.factors.step + 1) % every == 0
    falls = predicted < 0
    changed = jax.lax.cond(due, change, lambda: jnp.zeros(()))
    ratio = jnp.where(due & falls, changed / jnp.where(falls, predicted, -1), state.ratio)
    # A loss that is not finite after the step is no decrease.
    rose = due & jnp.where(falls, ~(ratio >= 0), ~jnp.isfinite(changed))
    shrink = 0.9**every
    factor = jnp.where(rose, 4, jnp.where(ratio > 0.75, shrink, jnp.where(ratio < 0.25, 1 / shrink, 1)))
    moved_damping = jnp.clip(damping * factor, how.min_damping, _LARGEST)
    moved_damping = jnp.where(due & (falls | rose), moved_damping, damping)
    velocity = _combine(lambda v: jnp.where(rose, 0, v), velocity)
    finite = jnp.isfinite(jnp.stack([model.value, rate, momentum, predicted])).all()
    bad = bad | rejection.reason_mask(non_finite=~finite)
    new = state._replace(
        velocity=velocity, damping=moved_damping, learning_rate=rate, momentum=momentum, ratio=ratio,
        annealing=annealed,
    )  # fmt: skip
    return (velocity, new), bad


def _moves(x: Any) -> bool:
    return x is not None and bool(jnp.issubdtype(x.dtype, jnp.floating))


def _floating(tree: Tree) -> Tree:
    return [x for x in jax.tree.leaves(tree) if _moves(x)]


def _combine(function: Callable, first: Tree, *rest: Tree) -> Tree:
    """Leaf by leaf in at least float32; what is not floating stays."""

    def leaf(x, *others):
        return function(*(wide(y) for y in (x, *others))) if _moves(x) else x

    return jax.tree.map(leaf, first, *rest)
