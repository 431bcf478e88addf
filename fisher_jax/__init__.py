"""Fisher information of neural networks in JAX, language models first."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisher_jax import checkpoint, groups, lm_head, moving_average, welford
    from fisher_jax.batch import Batch, next_token_batch
    from fisher_jax.errors import InputError, RejectedBatchError
    from fisher_jax.estimator import FisherEstimator
    from fisher_jax.moving_average import ema
    from fisher_jax.rejection import check

# Where each public name lives. Loaded on first use, so that the command line answers before jax is imported.
_MODULES = ("checkpoint", "groups", "lm_head", "moving_average", "welford")
_NAMES = {
    "Batch": "batch",
    "FisherEstimator": "estimator",
    "InputError": "errors",
    "RejectedBatchError": "errors",
    "check": "rejection",
    "ema": "moving_average",
    "next_token_batch": "batch",
}

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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fisher_jax.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(f"fisher_jax.{_NAMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fisher_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
