"""Learning a task without losing the one before: a penalty, smaller steps, or none, where the Fisher is large."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from fisher_jax._support.dtypes import wide
from fisher_jax._support.jax_internals import is_traced
from fisher_jax._support.masked import is_masked
from fisher_jax._support.outline import outline
from fisher_jax.uses import reading
from fisher_jax.uses.group_sums import per_parameter
from fisher_jax.uses.pruning import prune_mask
from fisher_jax.uses.trees import check_alike, check_not_negative

Tree = Any


def ewc_penalty(params: Tree, anchor: Tree, fisher: Any, *, strength: Any = 1.0) -> Float[Array, ""]:
    """``strength / 2 * sum_i F_i (p_i - a_i)**2``: elastic weight consolidation, to be added to the loss.

    To second order the growth of the former task's loss, in nats per weighted token, when its parameters ``a`` become
    ``p``; so ``strength`` 1 weighs a token of either task alike. Its gradient is ``strength F (p - a)``. A group sum
    is taken as spread evenly over its group, ``F_g / |g|`` for each parameter (`fj.per_parameter`). For several
    former tasks add their penalties.

    Args:
        params: a tree of arrays. Differentiable, under ``jit`` and ``vmap``.
        anchor: the parameters of the former task; a tree like ``params``.
        fisher: a tree like ``params``, of their shapes or of sums over groups; or a Welford state, moments or moving
            average, whose mean is taken. Not differentiated.
        strength: a number or scalar array.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: trees or shapes that differ, a negative Fisher.

    See Kirkpatrick et al. (2017), Overcoming catastrophic forgetting in neural networks, eq. 3.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> params, anchor, fisher = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 4.0])}
        >>> float(fj.ewc_penalty(params, anchor, fisher))
        6.5
        >>> jax.grad(fj.ewc_penalty)(params, anchor, fisher)["w"].tolist()
        [3.0, 4.0]
    """
    check_alike(params, anchor, "the parameters", "the anchor")
    fisher = reading.mean(fisher)
    check_not_negative(fisher, "the Fisher")
    weights = jax.lax.stop_gradient(per_parameter(fisher, params))

    def leaf(p, a, f):
        # The difference of half-precision numbers is taken in float32, where it is exact enough.
        return jnp.sum(f * (wide(p) - wide(a)) ** 2)

    terms = jax.tree.leaves(jax.tree.map(leaf, params, anchor, weights))
    return 0.5 * strength * sum(terms, start=jnp.zeros(()))


class ScaleByFisherState(NamedTuple):
    """State of `scale_by_fisher`.

    Attributes:
        factor: a tree like the parameters, what updates are multiplied by.
    """

    factor: Tree

    def __repr__(self) -> str:
        return outline(self)


def scale_by_fisher(fisher: Any, *, damping: float, power: float = 1.0) -> optax.GradientTransformationExtraArgs:
    """Optax: ``u_i -> u_i (damping / (F_i + damping))**power``: small steps where the former task is sensitive.

    A coordinate without information moves freely, one with ``F_i = damping`` half as much (``power=1``). This is the
    damped natural gradient of a diagonal Fisher, up to the constant ``damping`` that keeps the learning rate's
    meaning; ``power=0.5`` is its square root, as in Adam. Works in ``optax.chain``, ``masked``, ``multi_transform``.

    Args:
        fisher: as in `ewc_penalty`; read when the optimizer's state is initialised, and kept there as factors.
        damping: positive, in units of the Fisher of a parameter.
        power: not negative.

    Returns:
        An optax transformation with state `ScaleByFisherState`.

    Raises:
        ValueError: a damping that is not positive, a negative power; at ``init`` trees or shapes that differ, a
            negative Fisher.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, optax
        >>> params, fisher = {"w": jnp.zeros(3)}, {"w": jnp.array([0.0, 1.0, 3.0])}
        >>> tx = optax.chain(fj.continual.scale_by_fisher(fisher, damping=1.0), optax.sgd(0.5))
        >>> updates, _ = tx.update({"w": jnp.ones(3)}, tx.init(params))
        >>> updates["w"].tolist()
        [-0.5, -0.25, -0.125]
    """
    if not damping > 0:
        raise ValueError(f"damping is positive, in units of the Fisher, found {damping}")
    if not power >= 0:
        raise ValueError(f"power is not negative, found {power}")

    def init(params: Tree) -> ScaleByFisherState:
        values, like = _part_of(reading.mean(fisher), params)
        check_not_negative(values, "the Fisher")
        spread = per_parameter(values, like)
        factor = jax.tree.map(lambda f: (damping / (f + damping)) ** power, spread)
        return ScaleByFisherState(_put_back(factor, params))

    return optax.GradientTransformationExtraArgs(init, _multiply)


def _multiply(updates: Tree, state: Any, params: Tree = None, **extra: Any) -> tuple[Tree, Any]:
    del params, extra

    def leaf(update, factor):
        if is_masked(update):
            return update
        return (wide(update) * factor).astype(jnp.result_type(update))

    return jax.tree.map(leaf, updates, state[0], is_leaf=is_masked), state


def _part_of(whole: Tree, part: Tree) -> tuple[Tree, Tree]:
    """Under ``optax.masked`` and ``multi_transform``: leaves of the part that is there, as dicts by number."""
    leaves = jax.tree.leaves(part, is_leaf=is_masked)
    if not any(map(is_masked, leaves)):
        return whole, part
    found = jax.tree.map(lambda p, x: None if is_masked(p) else x, part, whole, is_leaf=is_masked)
    return found, jax.tree.map(lambda p: None if is_masked(p) else p, part, is_leaf=is_masked)


def _put_back(factor: Tree, part: Tree) -> Tree:
    """Masked places of ``part`` are masked in the factors."""
    flat = iter(jax.tree.leaves(factor))
    return jax.tree.map(lambda p: p if is_masked(p) else next(flat), part, is_leaf=is_masked)


def project_away(tree: Tree, fisher: Any, fraction: float, *, scope: str = "global") -> Tree:
    """``tree`` with zeros at the coordinates of the largest Fisher: a step that leaves the former task's most
    sensitive coordinates alone.

    The orthogonal projection onto the other coordinates; of ``N`` all but ``round((1 - fraction) N)`` are zeroed, of
    equal Fishers the earlier ones. With group Fishers the ``N`` are groups, by the mean of their parameters.

    Args:
        tree: gradients, updates or task vectors.
        fisher: as in `ewc_penalty`.
        fraction: the share to protect, in [0, 1]; static.
        scope: ``"global"`` compares all tensors; ``"tensor"`` protects the same share of each.

    Returns:
        A tree like ``tree``, in its dtypes; what stays is the same bits.

    Raises:
        ValueError: a fraction outside [0, 1], trees or shapes that differ, a negative Fisher.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.continual.project_away(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.1, 5.0, 0.2]), 1 / 3).tolist()
        [1.0, 0.0, 3.0]
    """
    free = _free(tree, reading.mean(fisher), fraction, scope)
    return jax.tree.map(lambda x, keep: jnp.where(keep, x, jnp.zeros((), jnp.result_type(x))), tree, free)


def _free(tree: Tree, fisher: Tree, fraction: float, scope: str) -> Tree:
    """True where a coordinate may move."""
    if is_traced(fraction) or not 0 <= fraction <= 1:
        raise ValueError(f"fraction is the share to protect, a static number in [0, 1], found {fraction}")
    check_not_negative(fisher, "the Fisher")
    spread = per_parameter(fisher, tree)
    important = prune_mask(spread, 1 - fraction, structured=False, scope=scope)
    return jax.tree.map(jnp.logical_not, important)


class ProtectState(NamedTuple):
    """State of `protect_important`.

    Attributes:
        free: a tree of booleans, true where a coordinate may move.
    """

    free: Tree

    def __repr__(self) -> str:
        return outline(self)


def protect_important(
    fisher: Any, fraction: float, *, scope: str = "global"
) -> optax.GradientTransformationExtraArgs:
    """Optax: `project_away` of every update, with the coordinates chosen once, when the state is initialised.

    Put it last in the chain: momentum, Adam and weight decay before it would otherwise move what is protected.

    Args:
        fisher, fraction, scope: as in `project_away`.

    Returns:
        An optax transformation with state `ProtectState`.

    Raises:
        ValueError: at ``init``, as `project_away`.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.adamw(0.1), fj.continual.protect_important(jnp.array([0.1, 5.0, 0.2]), 1 / 3))
        >>> params = jnp.ones(3)
        >>> updates, _ = tx.update(jnp.ones(3), tx.init(params), params)
        >>> (updates != 0).tolist()
        [True, False, True]
    """

    def init(params: Tree) -> ProtectState:
        values, like = _part_of(reading.mean(fisher), params)
        return ProtectState(_put_back(_free(like, values, fraction, scope), params))

    def update(updates: Tree, state: ProtectState, params: Tree = None, **extra: Any) -> tuple[Tree, ProtectState]:
        del params, extra

        def leaf(x, keep):
            return x if is_masked(x) else jnp.where(keep, x, jnp.zeros((), jnp.result_type(x)))

        return jax.tree.map(leaf, updates, state.free, is_leaf=is_masked), state

    return optax.GradientTransformationExtraArgs(init, update)
