"""The head of any model in a batch: found in its program, or given by a function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax._tracing.reading import read
from fisher_jax._tracing.structure import Structures
from fisher_jax.estimators.head import met_by_head

# Of the largest logit: products are taken in another order.
_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 0.05


class Read(NamedTuple):
    """``logits = soft_cap * tanh((hidden @ head.T + bias) / soft_cap)`` of one batch, or the shapes of its arrays."""

    hidden: Any  # [..., H]
    head: Any  # [V, H]
    bias: Any  # [V] or None
    weights: Any  # of tokens, or None
    bad: Any  # why the batch cannot be used
    soft_cap: float | None
    factor: float  # head = factor * leaf
    tied: bool


class HeadReader:
    """Gives what the head meets in a batch; ``head`` is the user's function, or ``None``."""

    def __init__(self, apply_fn: Callable, head: Callable | None, soft_cap: float | None):
        if soft_cap is not None and head is None:
            raise InputError("soft_cap= belongs to head=; without it both are found in the model")
        self.apply_fn, self.head, self.soft_cap, self.structures = apply_fn, head, soft_cap, Structures()

    def __call__(self, params: Any, batch: fj.Batch) -> Read:
        if self.head is None:
            found = met_by_head(self.apply_fn, self.structures, params, batch)
            own = found.head
            return Read(
                own.hidden, own.head, own.bias, found.weights, found.bad, found.soft_cap, own.factor, found.tied
            )
        tokens, bad, _ = read(fj.categorical, self.apply_fn, params, batch)
        hidden, matrix, *bias = self.head(params, tokens.inputs)
        return Read(hidden, matrix, bias[0] if bias else None, tokens.weights, bad, self.soft_cap, 1.0, False)

    def checked(self, params: Any, batch: fj.Batch) -> Read:
        """With shapes for arrays.

        Raises:
            InputError: no head is found, or the one that was given does not make the model's logits.
        """
        static: list[Read] = []

        def arrays(params: Any, batch: fj.Batch) -> tuple:
            static.append(self(params, batch))
            return static[-1][:5]

        try:
            hidden, matrix, own_bias, weights, bad = jax.eval_shape(arrays, params, batch)
        except ValueError as error:
            if self.head is not None:
                raise
            raise InputError(
                f"no head can be measured in this model: {error}; or give head=, a function of (params, inputs) that "
                "returns (hidden, head) or (hidden, head, bias)"
            ) from error
        found = static[-1]._replace(hidden=hidden, head=matrix, bias=own_bias, weights=weights, bad=bad)
        if self.head is not None:
            self._check_given(found, params, batch)
        return found

    def _check_given(self, found: Read, params: Any, batch: fj.Batch) -> None:
        logits = jax.eval_shape(self.apply_fn, params, batch.inputs)
        (hidden, head, bias), vocabulary = found[:3], logits.shape[-1]
        if head.ndim != 2 or (*hidden.shape[:-1], head.shape[0]) != logits.shape or hidden.shape[-1] != head.shape[1]:
            raise InputError(
                f"head= returns hidden states {list(hidden.shape)} and a head {list(head.shape)}, and the logits are "
                f"{list(logits.shape)}: they must be [..., H], [V, H] and [..., V]"
            )
        if bias is not None and bias.shape != (vocabulary,):
            raise InputError(f"head= returns a bias {list(bias.shape)}, but there are {vocabulary} logits")
        off, largest = map(float, jax.jit(self._differences)(params, batch))
        tolerance = _TOLERANCE if min(logits.dtype.itemsize, hidden.dtype.itemsize) >= 4 else _COARSE_TOLERANCE
        if not off <= tolerance * largest:  # NaN too
            raise InputError(
                f"the logits of head= are off by {off:.3g} from those of the model, whose largest is {largest:.3g}: "
                "return what its last product multiplies, after the last norm (and give soft_cap= where logits are "
                "capped)"
            )

    def _differences(self, params: Any, batch: fj.Batch) -> tuple[jax.Array, jax.Array]:
        """The largest difference from the model's logits where tokens have weights, and the largest logit there."""
        own = self(params, batch)
        hidden, head = (x.astype(jnp.float32) for x in own[:2])
        logits = jnp.einsum("...h,vh->...v", hidden, head, precision="highest")
        if own.bias is not None:
            logits = logits + own.bias.reshape((1,) * (logits.ndim - 1) + own.bias.shape)
        if own.soft_cap is not None:
            logits = own.soft_cap * jnp.tanh(logits / own.soft_cap)
        wanted = self.apply_fn(params, batch.inputs).astype(jnp.float32)
        seen = scored(batch, own.weights)[..., None]
        return jnp.max(jnp.where(seen, jnp.abs(logits - wanted), 0)), jnp.max(jnp.where(seen, jnp.abs(wanted), 0))


def scored(batch: fj.Batch, weights: Any) -> Any:
    """Which tokens count."""
    return jnp.ones(jnp.shape(batch.targets), bool) if weights is None else jnp.asarray(weights) > 0
