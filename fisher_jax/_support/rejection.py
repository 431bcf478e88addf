"""Bad values inside a compiled step: counted with a reason there, raised here."""

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.errors import RejectedBatchError

__all__ = [
    "NEGATIVE_WEIGHT",
    "NON_FINITE",
    "OPTION_OUT_OF_RANGE",
    "ROW_OF_PADDING",
    "TARGET_OUT_OF_RANGE",
    "any_of",
    "check",
    "reason_mask",
    "reasons",
]

NON_FINITE = 1
TARGET_OUT_OF_RANGE = 2
NEGATIVE_WEIGHT = 4
OPTION_OUT_OF_RANGE = 8
NOT_REAL_OR_NOT = 16
WEIGHT_OF_PADDING = 32
ROW_OF_PADDING = 64
TAPS_OF_ANOTHER_LOSS = 128

_BITS = {
    "non_finite": NON_FINITE,
    "target_out_of_range": TARGET_OUT_OF_RANGE,
    "negative_weight": NEGATIVE_WEIGHT,
    "option_out_of_range": OPTION_OUT_OF_RANGE,
    "not_real_or_not": NOT_REAL_OR_NOT,
    "weight_of_padding": WEIGHT_OF_PADDING,
    "row_of_padding": ROW_OF_PADDING,
    "taps_of_another_loss": TAPS_OF_ANOTHER_LOSS,
}

_SENTENCES = {
    NON_FINITE: "a NaN or infinite value in the loss, the scores or the parameters",
    TARGET_OUT_OF_RANGE: "a target outside [0, number of outputs) where the weight is not zero",
    NEGATIVE_WEIGHT: "a weight that is negative, NaN or infinite",
    OPTION_OUT_OF_RANGE: "a learning rate, damping, momentum or bound of a step outside of its range",
    NOT_REAL_OR_NOT: "a value of Batch.real that is neither 0 nor 1",
    WEIGHT_OF_PADDING: "a weight that is not 0 where Batch.real is 0",
    ROW_OF_PADDING: "a row in which nothing is real, in a model whose rows depend on each other: leave such rows out",
    TAPS_OF_ANOTHER_LOSS: "taps of a loss whose gradient at the outputs, times taps_scale, is not that of the summed "
    "log-likelihood (a penalty of the outputs, smoothed labels, a mean of means, another scale): leave taps= out",
}


def reason_mask(**found):
    """int32 bit mask from booleans, each under the name of a reason: ``non_finite``, ``negative_weight``, ..."""
    return sum(jnp.where(flag, _BITS[name], 0).astype(jnp.int32) for name, flag in found.items())


def any_of(masks):
    """The bit mask of all reasons in masks ``[N]``, which may lie on several devices."""
    # XLA's CPU has no sum of devices by bits.
    return jnp.max(masks[:, None] & np.array(list(_SENTENCES), np.int32), 0).sum(dtype=jnp.int32)


def reasons(mask: int) -> list[str]:
    """The sentences of a bit mask."""
    return [sentence for bit, sentence in _SENTENCES.items() if int(mask) & bit]


def check(state) -> None:
    """Raise if a batch was rejected anywhere in ``state`` (a Welford or EMA state, or a tree that holds some).

    Inside ``jit`` a bad batch cannot raise: the state stays as it was and ``state.rejected`` counts the batch. Call
    this on the host, as often as you can afford to wait for the device.

    Raises:
        RejectedBatchError: says how many batches were rejected and why.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> state = fj.welford.init(jnp.zeros(3))
        >>> state = fj.welford.add(state, fj.welford.observe(jnp.array([[1.0, 2.0, jnp.nan]])))
        >>> fj.check(state)
        Traceback (most recent call last):
        ...
        fisher_jax._support.errors.RejectedBatchError: 1 batch was rejected (a NaN or infinite value in the loss, ...
    """
    found = [x for x in jax.tree.leaves(state, is_leaf=_counts_rejections) if _counts_rejections(x)]
    if not found:
        raise TypeError(f"no state that counts rejected batches found in {type(state).__name__}")
    count = max(int(np.sum(np.asarray(x.rejected))) for x in found)
    if count:
        mask = int(np.bitwise_or.reduce([np.bitwise_or.reduce(np.ravel(x.reasons)) for x in found]))
        batches = "1 batch was" if count == 1 else f"{count} batches were"
        raise RejectedBatchError(f"{batches} rejected ({'; '.join(reasons(mask))}); the state does not contain them")


def _counts_rejections(x) -> bool:
    return hasattr(x, "rejected") and hasattr(x, "reasons")
