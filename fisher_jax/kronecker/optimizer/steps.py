"""The steps of `fj.kfac`: at a fixed rate inside a trust region, and from the exact model of the loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax._support import rejection
from fisher_jax._support.dtypes import is_floating, wide
from fisher_jax._tracing.reading import read
from fisher_jax.kronecker.numbers import at
from fisher_jax.kronecker.optimizer import annealing
from fisher_jax.kronecker.optimizer.quadratic import best_step, local_model, loss, tree_dot
from fisher_jax.kronecker.optimizer.rows import first_rows
from fisher_jax.kronecker.optimizer.transformation import aligned, trusted

__all__ = ["adaptive_step", "combine", "fixed_step"]

Tree = Any
_LARGEST = 1e4
# Early updates turn sharply: adaptive mode looks at each of them, and its least momentum grows over them.
_EARLY = 50


def fixed_step(grads, natural, params, state, rate, momentum, kl_clip, decay):
    """A trust region on the step itself, then momentum."""
    nu = jnp.ones(())
    if kl_clip is not None:
        nu = trusted(natural, grads, kl_clip / jnp.where(rate > 0, rate, 1) ** 2)
    direction = combine(lambda x, p: nu * x + decay * p, natural, params)
    velocity = combine(lambda v, d: momentum * v + d, state.velocity, direction)
    step = combine(lambda v: -rate * v, velocity)
    used = jnp.asarray(rate, jnp.float32), jnp.asarray(momentum, jnp.float32)
    return step, state._replace(velocity=velocity, learning_rate=used[0], momentum=used[1])


def adaptive_step(
    apply_fn, likelihood, batch, whole, params, grads, natural, state, damping, decay, how, min_damping, value
):  # fmt: skip
    """The minimiser of the quadratic model along the natural gradient and the last update."""
    leaves, treedef = jax.tree.flatten(whole)
    part, _ = aligned(params, whole)
    moving = [x for x in part if is_floating(x)]
    places = [i for i, x in enumerate(part) if is_floating(x)]

    def whole_with(moved):
        full = list(leaves)
        for i, x in zip(places, moved, strict=True):
            full[i] = x
        return jax.tree.unflatten(treedef, full)

    def listed(tree):
        return [x for x in aligned(tree, whole)[0] if is_floating(x)]

    tokens, bad, _ = read(likelihood, apply_fn, whole, batch)
    seen = first_rows(tokens, how.model_rows)
    directions = ([-x for x in listed(natural)], listed(state.velocity))
    model = local_model(
        lambda moved: apply_fn(whole_with(moved), seen.inputs), likelihood, seen, moving, listed(grads), directions,
        damping + decay,
    )  # fmt: skip
    least = how.min_momentum
    least = None if least is None else least * jnp.minimum((state.factors.step + 1) / _EARLY, 1)
    annealed = state.annealing
    if isinstance(how.rate_scale, str):
        annealed = annealing.renewed(annealed, model.slope[1], model.curvature[1, 1])
        scale = annealed.scale
    else:
        scale = at(how.rate_scale, state.factors.step)
    (rate, momentum), predicted = best_step(model, least, how.max_momentum, scale)
    velocity = combine(lambda x, v: momentum * v - rate * x, natural, state.velocity)

    def change():
        moved = [p + v.astype(p.dtype) for p, v in zip(moving, listed(velocity), strict=True)]
        norms = [decay / 2 * tree_dot(x, x) for x in (moved, moving)]
        before = model.value if how.model_rows is None else value
        before = loss(apply_fn, likelihood, whole, tokens) if before is None else jnp.asarray(before, jnp.float32)
        return loss(apply_fn, likelihood, whole_with(moved), tokens) + norms[0] - before - norms[1]

    every = jnp.where(state.factors.step < _EARLY, 1, how.adapt_period)
    due = (state.factors.step + 1) % every == 0
    falls = predicted < 0
    changed = jax.lax.cond(due, change, lambda: jnp.zeros(()))
    ratio = jnp.where(due & falls, changed / jnp.where(falls, predicted, -1), state.ratio)
    # A loss that is not finite after the step is no decrease.
    rose = due & jnp.where(falls, ~(ratio >= 0), ~jnp.isfinite(changed))
    shrink = 0.9**every
    factor = jnp.where(rose, 4, jnp.where(ratio > 0.75, shrink, jnp.where(ratio < 0.25, 1 / shrink, 1)))
    moved_damping = jnp.clip(damping * factor, min_damping, _LARGEST)
    moved_damping = jnp.where(due & (falls | rose), moved_damping, damping)
    velocity = combine(lambda v: jnp.where(rose, 0, v), velocity)
    finite = jnp.isfinite(jnp.stack([model.value, rate, momentum, predicted])).all()
    bad = bad | rejection.reason_mask(non_finite=~finite)
    new = state._replace(
        velocity=velocity, damping=moved_damping, learning_rate=rate, momentum=momentum, ratio=ratio,
        annealing=annealed,
    )  # fmt: skip
    return velocity, new, bad


def combine(function: Callable, first: Tree, *rest: Tree) -> Tree:
    """Leaf by leaf in at least float32; what is not floating stays."""

    def leaf(x, *others):
        return function(*(wide(y) for y in (x, *others))) if is_floating(x) else x

    return jax.tree.map(leaf, first, *rest)
