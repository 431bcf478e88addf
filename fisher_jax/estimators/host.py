"""Statistics in host memory, while the step runs on the accelerator."""

from typing import Any

import jax

from fisher_jax.welford.estimator import FisherEstimator

__all__ = ["on_device", "on_host"]

Tree = Any


def on_host(estimator: FisherEstimator) -> FisherEstimator:
    """The same estimator, its state kept in the host's memory (``pinned_host``) between updates.

    For models whose statistics do not fit beside them: an update copies the state to the device, adds, and copies it
    back, inside the compiled step; between updates the accelerator holds none of it. The state must fit on the device
    during the update. Shardings of the state stay as they are; numbers are the same.

    Args:
        estimator: any `FisherEstimator`, also for ``fj.track_fisher(fj.estimators.on_host(estimator), every=10)``.

    Returns:
        A `FisherEstimator`; read its states as ever, after `on_device` inside of ``jit``.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> fisher = fj.estimators.on_host(fj.group_fisher(apply_fn, estimator="exact"))
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> state = jax.jit(fisher.update)(fisher.init(params), params, batch)
        >>> state.mean["kernel"].sharding.memory_kind
        'pinned_host'
    """
    add = estimator.add

    def init(params):
        return _to(estimator.init(params), jax.memory.Space.Host)

    def update(state, params, batch, key=None, **given):
        found = estimator.update(on_device(state), params, batch, key, **given)
        return _to(found, jax.memory.Space.Host)

    def add_on_device(state, moments):
        assert add is not None
        return _to(add(on_device(state), moments), jax.memory.Space.Host)

    return estimator._replace(init=init, update=update, add=None if add is None else add_on_device)


def on_device(state: Tree) -> Tree:
    """A state from the host's memory in the device's.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> fj.estimators.on_device({"mean": jnp.ones(2)})["mean"].sharding.memory_kind
        'device'
    """
    return _to(state, jax.memory.Space.Device)


def _to(tree: Tree, space: Any) -> Tree:
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)
