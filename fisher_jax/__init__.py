"""Fisher information of neural networks in JAX, language models first."""

from fisher_jax import checkpoint, groups, lm_head, moving_average, welford
from fisher_jax.batch import Batch, next_token_batch
from fisher_jax.errors import InputError, RejectedBatchError
from fisher_jax.estimator import FisherEstimator
from fisher_jax.moving_average import ema
from fisher_jax.rejection import check

__all__ = [
    "Batch",
    "FisherEstimator",
    "InputError",
    "RejectedBatchError",
    "check",
    "checkpoint",
    "ema",
    "groups",
    "lm_head",
    "moving_average",
    "next_token_batch",
    "welford",
]
