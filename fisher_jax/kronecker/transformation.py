"""K-FAC as one optax transformation: factors in the state, refreshed every few steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from fisher_jax import rejection
from fisher_jax.batch import Batch
from fisher_jax.jaxprs import zeros
from fisher_jax.kronecker.blocks import Block, Rules
from fisher_jax.kronecker.curvature import BlockFactors, check_form, decompose, solve
from fisher_jax.kronecker.problem import Problem, block_plan, check_options, observe, observe_taps
from fisher_jax.likelihoods import Likelihood, categorical

__all__ = ["KFACState", "aligned", "kfac_static_args", "scale_by_kfac"]

Tree = Any

kfac_static_args = (
    "apply_fn", "likelihood", "example", "update_freq", "fisher", "policy", "token_cap", "form", "power", "shared",
    "temperature", "storage", "diagonal", "model_params",
)  # fmt: skip
"""What must stay static: ``optax.inject_hyperparams(fj.scale_by_kfac, fj.kfac_static_args)``."""


class KFACState(NamedTuple):
    """State of `scale_by_kfac`: a pytree of arrays.

    Attributes:
        blocks: `BlockFactors` of every block.
        step: int32, updates seen.
        age: int32, updates that these factors have served; -1 before there are any.
        rejected: int32, updates with a batch or gradients that cannot be used; read it with ``fj.check``.
        reasons: int32 bits, why.
    """

    blocks: tuple[BlockFactors, ...]
    step: Array
    age: Array
    rejected: Array
    reasons: Array


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
    model_params: Tree = None,
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
        model_params: the whole tree (or its ``ShapeDtypeStruct``s), where ``init`` sees a part.

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
    check_form(form)
    if not isinstance(update_freq, int) or update_freq < 1:
        raise ValueError(f"update_freq is a whole number, at least 1, found {update_freq!r}")
    rules = Rules(policy, token_cap, fisher, shared, diagonal or (lambda path: False))
    problem = Problem(apply_fn, likelihood, rules, temperature)
    refresh = functools.partial(_refresh, storage=storage)
    shapes = _shapes(model_params)

    def init(params: Tree) -> KFACState:
        whole = _whole(params, shapes, "init: give its shapes as scale_by_kfac(..., model_params=)")
        part = _restricted(problem, params)
        plan = block_plan(part, whole, example)
        key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
        like = jax.eval_shape(
            lambda p, b, k: decompose(plan, observe(part, plan, p, b, k), storage), whole, example, key
        )
        blocks = jax.tree.map(zeros, like)
        # Each counter its own buffer, so that the state can be donated.
        step, age, rejected, reasons = (jnp.full((), n, jnp.int32) for n in (0, -1, 0, 0))
        return KFACState(blocks, step, age, rejected, reasons)

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
        whole = _whole(given, None, "update: give it as update(..., model_params=)")
        part = _restricted(problem, updates)
        plan = block_plan(part, whole, example)

        def seen():
            if taps is None:
                assert batch is not None
                return observe(part, plan, whole, batch, key)
            lead = jax.eval_shape(apply_fn, whole, example.inputs).shape[:-1]
            return observe_taps(part, plan, taps, taps_scale, lead, batch or Batch(None, None), key)

        state, bad = refresh(plan, state, seen, update_freq)
        leaves, treedef = aligned(updates, whole)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates)]))
        bad = bad | rejection.reason_mask(non_finite=~finite)
        found = solve(plan, state.blocks, leaves, damping, form, power)
        ready = state.age >= 0
        found = [jnp.where(ready, x, jnp.zeros_like(x)) if _is_floating(x) else x for x in found]
        state = state._replace(rejected=state.rejected + (bad != 0).astype(jnp.int32), reasons=state.reasons | bad)
        return jax.tree.unflatten(treedef, [x for x in found if x is not None]), state

    return optax.GradientTransformationExtraArgs(init, update)


def _refresh(
    plan: tuple[Block, ...], state: KFACState, seen: Callable, update_freq: int, storage: Any
) -> tuple[KFACState, Array]:
    """Fresh factors where they are due and the batch can be used, and why it cannot."""

    def fresh(old):
        found = seen()
        usable = (found.bad == 0) & (found.weight > 0)
        new = jax.lax.cond(usable, lambda: decompose(plan, found, storage), lambda: old)
        return new, usable, found.bad

    def stale(old):
        return old, jnp.zeros((), bool), jnp.zeros((), jnp.int32)

    due = (state.age < 0) | (state.age >= update_freq)
    blocks, renewed, bad = jax.lax.cond(due, fresh, stale, state.blocks)
    age = jnp.where(renewed, 1, jnp.where(state.age < 0, -1, optax.safe_increment(state.age)))
    return state._replace(blocks=blocks, step=optax.safe_increment(state.step), age=age), bad


def _is_floating(x: Any) -> bool:
    return x is not None and bool(jnp.issubdtype(x.dtype, jnp.floating))


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _shapes(tree: Tree) -> Tree:
    return None if tree is None else jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), tree)


def _whole(params: Tree, instead: Tree, where: str) -> Tree:
    """``instead`` where it is given, else ``params``, which must then be all of them."""
    found = params if instead is None else instead
    if any(map(_is_masked, jax.tree.leaves(found, is_leaf=_is_masked))):
        raise ValueError(
            "scale_by_kfac sees a part of the parameters (under optax.masked or multi_transform), and the model "
            f"needs all of them in {where}"
        )
    return found


def _restricted(problem: Problem, part: Tree) -> Problem:
    """The problem of the leaves that are in ``part``."""
    present = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(part)[0]}
    return problem._replace(rules=dataclasses.replace(problem.rules, follow=lambda path: path in present))


def aligned(part: Tree, whole: Tree) -> tuple[list, Any]:
    """Leaves of ``part`` at their places among those of ``whole``, ``None`` elsewhere."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(part)
    present = {jax.tree_util.keystr(path): x for path, x in paths}
    order = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(whole)[0]]
    unknown = sorted(set(present) - set(order))
    if unknown:
        raise ValueError(f"updates have leaves that the parameters do not have: {', '.join(unknown)}")
    return [present.get(path) for path in order], treedef


def _check_shapes(batch: Batch, example: Batch) -> None:
    """Columns are as many as tokens: every batch has the shapes of the example."""
    found, wanted = (jax.tree.map(lambda x: tuple(jnp.shape(x)), b.inputs) for b in (batch, example))
    if found != wanted:
        raise ValueError(f"the inputs of the batch have shape {found} and those of example= {wanted}: pad or split")
