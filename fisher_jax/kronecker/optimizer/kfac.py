"""K-FAC ready to use: momentum, a trust region or steps from the exact quadratic model, and adaptive damping."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fisher_jax._support.dtypes import is_floating, wide_dtype
from fisher_jax._support.outline import outline
from fisher_jax.batch import Batch
from fisher_jax.kronecker.numbers import at, check_numbers, outside
from fisher_jax.kronecker.optimizer import annealing
from fisher_jax.kronecker.optimizer.rows import check_runs, first_rows
from fisher_jax.kronecker.optimizer.steps import adaptive_step, combine, fixed_step
from fisher_jax.kronecker.optimizer.transformation import KFACState, natural_gradients
from fisher_jax.kronecker.options import Adaptive, Curvature, FixedRate, Refresh, check_option
from fisher_jax.likelihoods import Likelihood, categorical

__all__ = ["KFACOptimizerState", "kfac"]

Tree = Any


class KFACOptimizerState(NamedTuple):
    """State of `kfac`.

    Attributes:
        factors: `KFACState`.
        velocity: float32, like the parameters: with a fixed learning rate the running sum of directions; otherwise
            the last update.
        damping: float32, what the next update uses in adaptive mode; else what the last one used.
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

    def __repr__(self) -> str:
        return outline(self)


def kfac(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood = categorical,
    *,
    example: Batch,
    learning_rate: Any = None,
    damping: Any = None,
    momentum: Any = None,
    weight_decay: Any = 0.0,
    curvature: Curvature = Curvature(),
    refresh: Refresh = Refresh(),
    step: FixedRate | Adaptive | None = None,
    model_params: Tree = None,
) -> optax.GradientTransformationExtraArgs:
    """K-FAC with momentum: ``update(grads, state, params, batch=batch, key=key)``, ready for ``apply_updates``.

    Gradients ``g`` are those of the mean negative log-likelihood per weighted token; ``x = (F + damping I)^-1 g`` by
    `fj.scale_by_kfac`.

    - `fj.FixedRate`: ``v <- momentum v + nu x + weight_decay params`` and the update is ``-learning_rate v``. The
      trust region ``nu = min(1, sqrt(2 kl_clip / (learning_rate**2 x . g)))`` keeps the KL divergence per token that
      the step of ``x`` alone is predicted to cause below ``kl_clip`` nats.
    - `fj.Adaptive`: the update ``u = -a x + m (last update)`` has ``a`` and ``m`` that minimise the exact quadratic
      model of the loss on this batch, ``g . u + u . (GGN + (damping + weight_decay) I) u / 2`` (two Jacobian-vector
      products; Martens and Grosse 2015, section 7), among ``min_momentum min(1, updates / 50) <= m <= max_momentum``;
      ``a`` is then multiplied by ``rate_scale``. The loss has ``weight_decay / 2 |params|**2`` in it: here ``g`` is
      ``grads + weight_decay params``, and ``x = (F + (damping + weight_decay) I)^-1 g``. Every
      ``adapt_period`` updates, and at each of the first 50, the loss after the step is evaluated and the damping
      follows the Levenberg-Marquardt rule (section 6.5): it is multiplied by ``0.9`` for each update since the last
      look where the loss fell by more than 3/4 of what the model predicts, and divided by as much below 1/4. Where it
      rose though the model predicts a fall the step is not taken: the update is zero, the last update is forgotten,
      and the damping grows by 4. It stays between ``min_damping`` and 1e4.

    Give ``value=`` as well, the loss of this batch without weight decay, from ``jax.value_and_grad``: adaptive mode
    then need not evaluate it anew where ``model_rows`` leaves some out.

    An update whose batch or gradients cannot be used is zero and leaves all but the counts of the state as it was.

    ``learning_rate``, ``damping``, ``momentum``, ``weight_decay``: numbers, arrays, or schedules, which are functions
    of the updates so far. An update for which one of them is out of range is rejected. Under
    ``optax.inject_hyperparams`` name what is called, ``static_args=("apply_fn", "likelihood")``: it takes any other
    function for a schedule, and calls it with a number.

    Args:
        apply_fn, likelihood: the model; ``apply_fn(params, inputs) -> outputs [..., K]``.
        example: a `Batch` of arrays or ``jax.ShapeDtypeStruct``s, with the shapes of every batch to come.
        learning_rate: of `fj.FixedRate`.
        damping: what is added to the curvature; with `fj.Adaptive` the first of it. ``None``: 0.01, adaptive 0.1.
        momentum: of `fj.FixedRate`; ``None``: 0.5.
        weight_decay: see above.
        curvature: what the factors are of, how they are kept and inverted.
        refresh: when factors are renewed, and from what.
        step: how long updates are. ``None``: `fj.FixedRate` with a learning rate, and `fj.Adaptive` without.
        model_params: the whole tree (or its ``ShapeDtypeStruct``s), where ``init`` sees a part, as for
            `fj.scale_by_kfac`.

    Raises:
        TypeError: an argument in the place of another.
        ValueError: a step that contradicts the learning rate, the momentum or the schedule of the damping; what
            `fj.scale_by_kfac` refuses.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp, optax
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> batch = fj.Batch(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0], [2.0]]))
        >>> tx = fj.kfac(apply_fn, fj.gaussian, example=batch, damping=1e-6, curvature=fj.Curvature(estimator="ggn"))
        >>> params = {"kernel": jnp.zeros((2, 1))}
        >>> grads = {"kernel": -jnp.array([[0.5], [1.0]])}
        >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
        >>> jnp.round(optax.apply_updates(params, updates)["kernel"], 3).tolist()  # least squares, in one step
        [[1.0], [2.0]]
    """
    check_numbers(learning_rate=learning_rate, damping=damping, momentum=momentum, weight_decay=weight_decay)
    how = _how(step, learning_rate, damping, momentum)
    adaptive = isinstance(how, Adaptive)
    check_option("curvature", curvature, Curvature)
    check_option("refresh", refresh, Refresh)
    init_factors, natural_of = natural_gradients(
        apply_fn, likelihood, example, curvature.settled("sampled"), refresh.settled(ramp=10), model_params
    )
    damping = damping if damping is not None else 0.1 if adaptive else 0.01
    momentum = 0.5 if momentum is None else momentum

    def init(params: Tree) -> KFACOptimizerState:
        velocity = jax.tree.map(lambda x: jnp.zeros(x.shape, wide_dtype(x.dtype)) if is_floating(x) else x, params)
        first = at(damping, jnp.zeros((), jnp.int32))
        kept, rate, share, ratio = (jnp.full((), x, jnp.float32) for x in (first, 0.0, 0.0, 1.0))
        factors = init_factors(params)
        if isinstance(how, Adaptive) and how.model_rows is not None:
            whole = params if model_params is None else model_params
            inputs = jax.eval_shape(lambda batch: first_rows(batch, how.model_rows), example).inputs
            check_runs(apply_fn, whole, inputs, "model_rows", how.model_rows)
        return KFACOptimizerState(factors, velocity, kept, rate, share, ratio, annealing.start())

    def update(
        updates: Tree, state: KFACOptimizerState, params: Tree = None, *, batch: Batch | None = None,
        model_params: Tree = None, value: Any = None, **extra: Any,
    ):  # fmt: skip
        if params is None:
            raise ValueError("kfac needs params: call update(grads, state, params, batch=batch, key=key)")
        used = state.damping if adaptive else jnp.asarray(at(damping, state.factors.step), jnp.float32)
        rate, share, decay = (at(x, state.factors.step) for x in (learning_rate, momentum, weight_decay))
        outer = outside(learning_rate=rate, damping=used, momentum=share, weight_decay=decay)
        decay = jnp.asarray(decay, jnp.float32)
        if adaptive:
            updates = combine(lambda g, p: g + decay * p, updates, params)
        total = used + decay if adaptive else used
        natural, factors = natural_of(
            updates, state.factors, params, total, outer, batch=batch, model_params=model_params, **extra
        )
        if isinstance(how, Adaptive):
            if batch is None:
                raise ValueError("kfac with learning_rate=None evaluates its model: pass batch=")
            whole = params if model_params is None else model_params
            floor = jnp.minimum(1e-3, damping) if how.min_damping is None else how.min_damping
            move, new, bad = adaptive_step(
                apply_fn, likelihood, batch, whole, params, updates, natural, state, used, decay, how, floor, value
            )
            counted = factors.rejected > state.factors.rejected
            factors = factors._replace(
                rejected=jnp.where((bad != 0) & ~counted, factors.rejected + 1, factors.rejected),
                reasons=factors.reasons | bad,
            )
        else:
            move, new = fixed_step(updates, natural, params, state, jnp.asarray(rate), share, how.kl_clip, decay)
            new = new._replace(damping=used)
        good = (factors.rejected == state.factors.rejected) & (factors.age >= 0)
        kept = jax.tree.map(lambda a, b: jnp.where(good, a, b).astype(b.dtype), tuple(new)[1:], tuple(state)[1:])
        move = jax.tree.map(
            lambda u, g: jnp.where(good, u, 0).astype(g.dtype) if is_floating(g) else g, move, updates
        )
        return move, KFACOptimizerState(factors, *kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _how(step: FixedRate | Adaptive | None, rate: Any, damping: Any, momentum: Any) -> FixedRate | Adaptive:
    """How steps are chosen; an error where it contradicts what else was given."""
    if step is None:
        step = Adaptive() if rate is None else FixedRate()
    check_option("step", step, FixedRate, Adaptive)
    if isinstance(step, FixedRate):
        if rate is None:
            raise ValueError("step=fj.FixedRate() needs learning_rate=; fj.Adaptive() finds its own")
        return step
    if rate is not None:
        raise ValueError("step=fj.Adaptive() finds its own rates: leave out learning_rate=, or use fj.FixedRate()")
    if momentum is not None:
        raise ValueError(
            "momentum= is that of a fixed learning rate: pass learning_rate= too, or step=fj.Adaptive(min_momentum=, "
            "max_momentum=)"
        )
    if callable(damping):
        raise ValueError("the damping of fj.Adaptive() follows the loss: damping= is its first value, not a schedule")
    return step
