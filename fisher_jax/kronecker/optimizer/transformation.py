"""K-FAC as one optax transformation: factors in the state, refreshed every few steps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fisher_jax._support import rejection
from fisher_jax._support.jax_internals import zeros
from fisher_jax._support.placement import mesh_of
from fisher_jax.batch import Batch
from fisher_jax.kronecker.blocks.plan import Rules, choice
from fisher_jax.kronecker.blocks.problem import Problem, block_plan, check_options
from fisher_jax.kronecker.curvature.damped import solve
from fisher_jax.kronecker.curvature.decomposition import decompose
from fisher_jax.kronecker.curvature.factors import check_form
from fisher_jax.kronecker.optimizer import partial_trees
from fisher_jax.kronecker.optimizer.partial_trees import aligned
from fisher_jax.kronecker.optimizer.refresh import KFACState, check_periods, refresh, refresh_raw
from fisher_jax.kronecker.statistics.averaging import widened
from fisher_jax.kronecker.statistics.joining import on_any_device
from fisher_jax.kronecker.statistics.observation import observe, observe_taps
from fisher_jax.likelihoods import Likelihood, categorical

__all__ = ["KFACState", "aligned", "kfac_static_args", "scale_by_kfac"]

Tree = Any

kfac_static_args = (
    "apply_fn", "likelihood", "example", "update_freq", "fisher", "policy", "token_cap", "form", "power", "shared",
    "temperature", "storage", "diagonal", "eigenvalue_correction", "statistics_freq", "factor_decay", "factor_rank",
    "model_params", "axis_name",
)  # fmt: skip
"""What must stay static: ``optax.inject_hyperparams(fj.scale_by_kfac, fj.kfac_static_args)``."""


def scale_by_kfac(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood = categorical,
    *,
    example: Batch,
    damping: Any = 1e-3,
    update_freq: int = 10,
    fisher: str = "empirical",
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
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradients: updates become ``(F + damping I)**power`` times the gradient, block by block.

    ``update(grads, state, params, batch=batch, key=key)``. The first update and every ``update_freq``-th after it
    computes fresh factors on its own batch (`fj.kfac_factors` says how), so that they are there from the first step.
    Instead of ``batch`` alone, ``taps=`` from the training step's own ``fj.value_grad_and_taps(loss)`` save the
    model evaluation; ``taps_scale`` times that loss is the summed log-likelihood up to its sign (``W`` for a mean
    loss). With weights other than 0 and 1 they count ``w**2`` where a batch counts ``w``.

    Gradients are those of the mean negative log-likelihood per weighted token. A batch with a NaN, a label out of
    range or a negative weight leaves the factors as they are and is counted (``fj.check(state)`` raises), and the
    next update tries again; so does a batch without weight, uncounted. While there are no factors updates are zero.
    Gradients that are not finite are counted, and come out not finite.

    Under ``optax.masked`` and ``multi_transform`` the transformation sees a part of the tree: give the whole tree as
    ``update(..., model_params=params)``, and its shapes as ``model_params=`` here. Only parameters in the part need
    blocks. Under ``optax.MultiSteps`` put it inside: the factors are those of the last micro-batch of a step. Under
    ``optax.inject_hyperparams`` name ``fj.kfac_static_args``.

    Args:
        example: a `Batch` of arrays or ``jax.ShapeDtypeStruct``s, with the shapes of every batch to come.
        damping: in the units of ``F``: per weighted token.
        update_freq: updates that share factors.
        statistics_freq: statistics are taken every so many updates, at most ``update_freq``, and stay in the state;
            factors are decomposed from them every ``update_freq`` updates. ``None``: at the refresh.
        factor_decay: sums and what divides them are averaged with it before they are decomposed: ``A`` and ``G`` are
            means over the tokens of all statistics so far, those ``k`` statistics ago with ``factor_decay**k`` times
            their weight. Exact for all but columns ``U``, of which the ``factor_rank`` (as many as one batch gives)
            with the largest eigenvalues stay: exact where the rank of the average is not above. ``None``: the newest
            statistics alone.
        model_params: the whole tree (or its ``ShapeDtypeStruct``s), where ``init`` sees a part.
        axis_name: inside ``jax.shard_map(..., check_vma=False)`` the mesh axes over which rows of the batch are
            spread. ``init`` and ``update`` both run there, ``example`` has the shapes of one device's part, and
            gradients are those of the whole batch (``psum``). Sums of statistics are summed over devices, columns
            gathered (at most ``token_cap`` of each device, then of all together), and every device holds the same
            state. A bad value on any device rejects the batch on all.

    The other arguments, and the errors, are those of `fj.kfac_factors`.

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
    check_options(policy, fisher, shared, token_cap, temperature)
    check_form(form, eigenvalue_correction, fisher)
    keeps = check_periods(fisher, eigenvalue_correction, update_freq, statistics_freq, factor_decay, factor_rank)
    if not isinstance(update_freq, int) or update_freq < 1:
        raise ValueError(f"update_freq is a whole number, at least 1, found {update_freq!r}")
    rules = Rules(policy, token_cap, fisher, shared, choice(eigenvalue_correction), diagonal or (lambda path: False))
    problem = Problem(apply_fn, likelihood, rules, temperature, axis_name)
    build = functools.partial(decompose, storage=storage, rules=rules, axis_name=axis_name)
    shapes = partial_trees.shapes(model_params)

    def init(params: Tree) -> KFACState:
        whole = partial_trees.whole(params, shapes, "init: give its shapes as scale_by_kfac(..., model_params=)")
        part = partial_trees.restricted(problem, params)
        plan = block_plan(part, whole, example)
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        seen = jax.eval_shape(lambda p, b, k: observe(part, plan, p, b, k), whole, example, key)
        raw = widened(plan, seen, factor_rank) if keeps else None
        blocks = jax.tree.map(zeros, jax.eval_shape(functools.partial(build, plan), raw or seen))
        # Each counter its own buffer, so that the state can be donated.
        step, age, rejected, reasons = (jnp.full((), n, jnp.int32) for n in (0, -1, 0, 0))
        raw_age = jnp.full((), -1, jnp.int32) if keeps else None
        return KFACState(blocks, step, age, rejected, reasons, jax.tree.map(zeros, raw), raw_age)

    def update(
        updates: Tree, state: KFACState, params: Tree = None, *, batch: Batch | None = None, key: Any = None,
        taps: list | None = None, taps_scale: Any = None, model_params: Tree = None, **extra: Any,
    ):  # fmt: skip
        del extra
        given = params if model_params is None else model_params
        if given is None or (batch is None and taps is None):
            missing = "params" if given is None else "batch= or taps="
            raise ValueError(
                f"scale_by_kfac needs {missing}: call update(grads, state, params, batch=batch, key=key)"
            )
        if taps is not None and taps_scale is None:
            raise ValueError("taps= needs taps_scale=, the number that makes the training loss the summed one")
        if batch is not None:
            _check_shapes(batch, example)
        whole = partial_trees.whole(given, None, "update: give it as update(..., model_params=)")
        part = partial_trees.restricted(problem, updates)
        plan = block_plan(part, whole, example)

        def seen():
            if taps is None:
                assert batch is not None
                return observe(part, plan, whole, batch, key)
            outputs = jax.eval_shape(apply_fn, whole, example.inputs)
            return observe_taps(part, plan, taps, taps_scale, outputs, batch or Batch(None, None), key)

        decompose_all = functools.partial(build, plan, mesh=mesh_of(whole, batch, taps))
        if keeps:
            state, bad = refresh_raw(decompose_all, state, seen, update_freq, statistics_freq, factor_decay)
        else:
            state, bad = refresh(decompose_all, state, seen, update_freq)
        leaves, treedef = aligned(updates, whole)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates)]))
        bad = on_any_device(bad | rejection.reason_mask(non_finite=~finite), axis_name)
        found = solve(plan, state.blocks, leaves, damping, form, power)
        ready = state.age >= 0
        found = [jnp.where(ready, x, jnp.zeros_like(x)) if _is_floating(x) else x for x in found]
        state = state._replace(rejected=state.rejected + (bad != 0).astype(jnp.int32), reasons=state.reasons | bad)
        return jax.tree.unflatten(treedef, [x for x in found if x is not None]), state

    return optax.GradientTransformationExtraArgs(init, update)


def _is_floating(x: Any) -> bool:
    return x is not None and bool(jnp.issubdtype(x.dtype, jnp.floating))


def _check_shapes(batch: Batch, example: Batch) -> None:
    """Columns are as many as tokens: every batch has the shapes of the example."""
    found, wanted = (jax.tree.map(lambda x: tuple(jnp.shape(x)), b.inputs) for b in (batch, example))
    if found != wanted:
        raise ValueError(f"the inputs of the batch have shape {found} and those of example= {wanted}: pad or split")
