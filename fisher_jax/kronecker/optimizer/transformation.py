"""K-FAC as one optax transformation: factors in the state, refreshed every few steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._support.dtypes import is_floating, wide
from fisher_jax._support.jax_internals import zeros
from fisher_jax._support.placement import mesh_of
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_arguments, check_batch
from fisher_jax.kronecker.blocks.problem import block_plan, problem_of
from fisher_jax.kronecker.curvature.damped import solve
from fisher_jax.kronecker.curvature.decomposition import decompose
from fisher_jax.kronecker.numbers import at, check_numbers, outside
from fisher_jax.kronecker.optimizer import partial_trees
from fisher_jax.kronecker.optimizer.partial_trees import aligned
from fisher_jax.kronecker.optimizer.quadratic import tree_dot
from fisher_jax.kronecker.optimizer.refresh import KFACState, check_together, renewed
from fisher_jax.kronecker.optimizer.rows import check_rows, check_runs, window
from fisher_jax.kronecker.options import Curvature, Refresh, check_option
from fisher_jax.kronecker.statistics.averaging import widened
from fisher_jax.kronecker.statistics.block_sums import on_any_device
from fisher_jax.kronecker.statistics.observation import observe, observe_taps
from fisher_jax.likelihoods import Likelihood, categorical

__all__ = ["KFACState", "aligned", "floating", "natural_gradients", "scale_by_kfac", "trusted"]

Tree = Any


def scale_by_kfac(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood = categorical,
    *,
    example: Batch,
    damping: Any = 1e-2,
    kl_clip: Any = "auto",
    curvature: Curvature = Curvature(),
    refresh: Refresh = Refresh(),
    model_params: Tree = None,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradients: updates become ``x = (F + damping I)**power g``, block by block, inside a trust region.

    ``update(grads, state, params, batch=batch, key=key)``. The first update and every ``refresh.period``-th after
    it computes fresh factors on its own batch (`fj.kfac_factors` says how), so that they are there from the first
    step.
    Instead of ``batch`` alone, ``taps=`` from the training step's own ``fj.value_grad_and_taps(loss)`` save the
    model evaluation; ``taps_scale`` times that loss is the summed log-likelihood up to its sign (``W`` for a mean
    loss). With weights other than 0 and 1 they count ``w**2`` where a batch counts ``w``.

    The predicted KL divergence per token of the step ``-x`` is ``x . g / 2``. Where it is above ``kl_clip`` nats,
    ``x`` is multiplied by ``sqrt(2 kl_clip / (x . g))``: what follows in the chain then takes a bounded step, also
    where the Fisher of a few rows is of low rank, where factors are out of date, or where the empirical Fisher
    vanishes with the loss.

    Gradients are those of the mean negative log-likelihood per weighted token. A batch with a NaN, a label out of
    range or a negative weight leaves the factors as they are and is counted (``fj.check(state)`` raises), and the
    next update tries again; so does a batch without weight, uncounted. While there are no factors updates are zero.
    Gradients that are not finite are counted, and come out not finite.

    Under ``optax.masked`` and ``multi_transform`` the transformation sees a part of the tree: give the whole tree as
    ``update(..., model_params=params)``, and its shapes as ``model_params=`` here. Only parameters in the part need
    blocks. Under ``optax.MultiSteps`` put it inside: the factors are those of the last micro-batch of a step. Under
    ``optax.inject_hyperparams`` name what is called, ``static_args=("apply_fn", "likelihood")``: it takes any other
    function for a schedule, and calls it with a number.

    Args:
        example: a `Batch` of arrays or ``jax.ShapeDtypeStruct``s, with the shapes of every batch to come.
        damping: in the units of ``F``: per weighted token. A number, an array, or a schedule of the updates so far.
        kl_clip: nats per token, a number, an array or a schedule; ``None``: no trust region. ``"auto"``: 1e-3, but
            none with a ``power`` other than -1, where ``x . g / 2`` is no KL divergence.
        curvature: what the factors are of, how they are kept and inverted.
        refresh: when factors are renewed, and from what.
        model_params: the whole tree (or its ``ShapeDtypeStruct``s), where ``init`` sees a part.
        axis_name: inside ``jax.shard_map(..., check_vma=False)`` the mesh axes over which rows of the batch are
            spread. ``init`` and ``update`` both run there, ``example`` has the shapes of one device's part, and
            gradients are those of the whole batch (``psum``). Sums of statistics are summed over devices, columns
            gathered (at most ``token_cap`` of each device, then of all together), and every device holds the same
            state. A bad value on any device rejects the batch on all.

    Raises:
        TypeError: an argument in the place of another.
        ValueError: options that cannot go together; a parameter without a block, named with its line and the way out;
            ``update`` without what it needs, or with a batch of other shapes.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp, optax
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> tx = optax.chain(fj.scale_by_kfac(apply_fn, example=batch), optax.scale_by_learning_rate(0.1))
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"kernel": jnp.ones((2, 3))}, state, params, batch=batch)
        >>> int(state[0].age), updates["kernel"].shape
        (1, (2, 3))
    """
    check_option("curvature", curvature, Curvature)
    check_option("refresh", refresh, Refresh)
    limit = _limit(kl_clip, curvature.power)
    check_numbers(damping=damping, kl_clip=limit)
    init, natural = natural_gradients(
        apply_fn,
        likelihood,
        example,
        curvature.settled("empirical"),
        refresh.settled(ramp=None),
        model_params,
        axis_name,
    )

    def update(updates: Tree, state: KFACState, params: Tree = None, **given: Any):
        used, clip = at(damping, state.step), at(limit, state.step)
        bad = outside(damping=used, kl_clip=clip)
        found, new = natural(updates, state, params, used, bad, **given)
        if clip is None:
            return found, new
        share = jnp.where(bad == 0, trusted(found, updates, clip), 0)
        return jax.tree.map(lambda x: _times(share, x) if is_floating(x) else x, found), new

    return optax.GradientTransformationExtraArgs(init, update)


def _times(share: Array, x: Array) -> Array:
    product = wide(x)
    return (share.astype(product.dtype) * product).astype(x.dtype)


def _limit(kl_clip: Any, power: float) -> Any:
    """The bound of the predicted KL divergence that a user chose."""
    if isinstance(kl_clip, str):
        if kl_clip != "auto":
            raise ValueError(f"kl_clip is positive, None or 'auto', found {kl_clip!r}")
        return 1e-3 if power == -1 else None
    if kl_clip is not None and power != -1:
        raise ValueError(f"kl_clip bounds a KL divergence that only power=-1 predicts, found power={power}")
    return kl_clip


def natural_gradients(
    apply_fn: Callable,
    likelihood: Likelihood,
    example: Batch,
    curvature: Curvature,
    refresh: Refresh,
    model_params: Tree = None,
    axis_name: Any = None,
) -> tuple[Callable[[Tree], KFACState], Callable]:
    """Natural gradients whose ``update(updates, state, params, damping, bad, ...)`` is told the damping.

    The damping may change from update to update, and what is known of the model's program stays. ``bad`` says why an
    update cannot be made whatever its batch; it is then zero.
    """
    check_arguments(apply_fn, likelihood, example=example)
    check_together(curvature, refresh)
    check_rows(refresh.factor_rows, example)
    example = window(example, refresh.factor_rows)
    problem = problem_of(apply_fn, likelihood, curvature, axis_name)
    build = functools.partial(decompose, problem=problem, factor_dtype=curvature.factor_dtype)
    keeps = refresh.keeps_statistics
    shapes = partial_trees.shapes(model_params)

    def init(params: Tree) -> KFACState:
        whole = partial_trees.whole(params, shapes, "init: give its shapes as scale_by_kfac(..., model_params=)")
        part = partial_trees.restricted(problem, params)
        if refresh.factor_rows is not None:
            check_runs(apply_fn, whole, example.inputs, "factor_rows", refresh.factor_rows)
        _, plan = block_plan(part, whole, example)
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        seen = jax.eval_shape(lambda p, b, k: observe(part, *block_plan(part, p, b), b, k), whole, example, key)
        raw = widened(plan, seen, refresh.factor_rank) if keeps else None
        blocks = jax.tree.map(zeros, jax.eval_shape(functools.partial(build, plan), raw or seen))
        # Each counter its own buffer, so that the state can be donated.
        step, age, rejected, reasons = (jnp.full((), n, jnp.int32) for n in (0, -1, 0, 0))
        raw_age = jnp.full((), -1, jnp.int32) if keeps else None
        return KFACState(blocks, step, age, rejected, reasons, jax.tree.map(zeros, raw), raw_age)

    def update(
        updates: Tree, state: KFACState, params: Tree, damping: Any, bad: Array, *, batch: Batch | None = None,
        key: Any = None, taps: list | None = None, taps_scale: Any = None, model_params: Tree = None, **extra: Any,
    ):  # fmt: skip
        del extra
        given = params if model_params is None else model_params
        if given is None or (batch is None and taps is None):
            missing = "params" if given is None else "batch= or taps="
            raise ValueError(
                f"scale_by_kfac needs {missing}: call update(grads, state, params, batch=batch, key=key)"
            )
        if taps is not None and refresh.factor_rows is not None:
            raise ValueError("taps= hold all rows of the batch: leave out factor_rows, or give batch= alone")
        if taps is not None and taps_scale is None:
            raise ValueError("taps= needs taps_scale=, the number that makes the training loss the summed one")
        if batch is not None:
            check_batch(batch)
            batch = window(batch, refresh.factor_rows, state.step)
            _check_shapes(batch, example)
        whole = partial_trees.whole(given, None, "update: give it as update(..., model_params=)")
        part = partial_trees.restricted(problem, updates)
        program, plan = block_plan(part, whole, example if batch is None else batch)

        def seen():
            if taps is None:
                assert batch is not None
                return observe(part, program, plan, batch, key)
            return observe_taps(part, program, plan, taps, taps_scale, batch or Batch(None, None), key)

        def usable_seen():
            found = seen()
            return found._replace(bad=found.bad | bad)

        decompose_all = functools.partial(build, plan, mesh=mesh_of(whole, batch, taps))
        state, refused = renewed(decompose_all, state, usable_seen, refresh)
        leaves, treedef = aligned(updates, whole)
        found = solve(plan, state.blocks, leaves, damping, curvature.form, curvature.power)
        finite, inverted = _all_finite(leaves), _all_finite(found) | (state.age < 0)
        # An inverse may overflow where nothing is damped; gradients that are not finite come out as they are.
        ready = (state.age >= 0) & (bad == 0) & (inverted | ~finite)
        bad = on_any_device(bad | refused | rejection.reason_mask(non_finite=~(finite & inverted)), axis_name)
        found = [jnp.where(ready, x, jnp.zeros_like(x)) if is_floating(x) else x for x in found]
        state = state._replace(rejected=state.rejected + (bad != 0).astype(jnp.int32), reasons=state.reasons | bad)
        return jax.tree.unflatten(treedef, [x for x in found if x is not None]), state

    return init, update


def trusted(natural: Tree, grads: Tree, kl_clip: Any) -> Array:
    """The share of a step whose predicted KL divergence is at most ``kl_clip``."""
    predicted = tree_dot(floating(natural), floating(grads)) / 2
    return jnp.where(predicted > kl_clip, jnp.sqrt(kl_clip / jnp.where(predicted > 0, predicted, 1)), 1)


def floating(tree: Tree) -> list:
    """Leaves that move."""
    return [x for x in jax.tree.leaves(tree) if is_floating(x)]


def _all_finite(leaves: list) -> Array:
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves if x is not None]))


def _check_shapes(batch: Batch, example: Batch) -> None:
    """Columns are as many as tokens: every batch has the shapes of the example."""
    found, wanted = (jax.tree.map(lambda x: tuple(jnp.shape(x)), b.inputs) for b in (batch, example))
    if found != wanted:
        raise ValueError(f"the inputs of the batch have shape {found} and those of example= {wanted}: pad or split")
