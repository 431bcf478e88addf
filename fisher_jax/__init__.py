"""Fisher information of neural networks in JAX, language models first."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisher_jax import checkpoint, exchange, groups, lm_head, moving_average, operators, welford
    from fisher_jax.alignment import per_parameter
    from fisher_jax.batch import Batch, next_token_batch
    from fisher_jax.blocks import BlockSpectra, BlockSpectrum, Capacity, block_spectra, block_spectrum
    from fisher_jax.continual import ewc_penalty, project_away, protect_important, scale_by_fisher
    from fisher_jax.decisions import CautiousPruning, Decisions, decide, prune_below
    from fisher_jax.diagonal import group_fisher
    from fisher_jax.errors import InputError, RejectedBatchError
    from fisher_jax.estimator import FisherEstimator
    from fisher_jax.kronecker.curvature import kfac_factors, precondition
    from fisher_jax.kronecker.from_state import kfac_factors_from_state
    from fisher_jax.kronecker.merging import KFACMerge, merge_kfac
    from fisher_jax.kronecker.optimizer import kfac
    from fisher_jax.kronecker.spectrum import KFACSpectrum, kfac_spectrum
    from fisher_jax.kronecker.table import KFACCoverage, kfac_coverage
    from fisher_jax.kronecker.transformation import kfac_static_args, scale_by_kfac
    from fisher_jax.krylov import Density, Estimate, Spectrum, frobenius_norm, lanczos, spectral_density, trace
    from fisher_jax.likelihoods import Likelihood, bernoulli, categorical, gaussian
    from fisher_jax.memory import on_device, on_host
    from fisher_jax.merging import merge_params, merge_task_vectors, shrunk_mean
    from fisher_jax.moving_average import ema
    from fisher_jax.multiplicity import holm, q_values
    from fisher_jax.pruning import apply_mask, prune_mask, saliency
    from fisher_jax.rejection import check
    from fisher_jax.shift import Drift, Shift, importance_drift, importance_shift
    from fisher_jax.taps import capture, coverage, gradients_from_taps, value_grad_and_taps
    from fisher_jax.tasks import Conflict, Overlap, conflict, overlap
    from fisher_jax.tracking import track_fisher
    from fisher_jax.uncertainty import DataNeeded, data_needed, effective_count, signal_to_noise

# Where each public name lives. Loaded on first use, so that the command line answers before jax is imported.
_MODULES = ("checkpoint", "exchange", "groups", "lm_head", "moving_average", "operators", "welford")
_NAMES = {
    "Batch": "batch",
    "BlockSpectra": "blocks",
    "BlockSpectrum": "blocks",
    "Capacity": "blocks",
    "FisherEstimator": "estimator",
    "InputError": "errors",
    "RejectedBatchError": "errors",
    "Likelihood": "likelihoods",
    "bernoulli": "likelihoods",
    "block_spectra": "blocks",
    "block_spectrum": "blocks",
    "capture": "taps",
    "categorical": "likelihoods",
    "check": "rejection",
    "coverage": "taps",
    "ema": "moving_average",
    "gaussian": "likelihoods",
    "gradients_from_taps": "taps",
    "group_fisher": "diagonal",
    "kfac": "kronecker.optimizer",
    "KFACCoverage": "kronecker.table",
    "kfac_coverage": "kronecker.table",
    "kfac_factors": "kronecker.curvature",
    "kfac_factors_from_state": "kronecker.from_state",
    "kfac_spectrum": "kronecker.spectrum",
    "KFACSpectrum": "kronecker.spectrum",
    "kfac_static_args": "kronecker.transformation",
    "next_token_batch": "batch",
    "on_device": "memory",
    "on_host": "memory",
    "precondition": "kronecker.curvature",
    "scale_by_kfac": "kronecker.transformation",
    "track_fisher": "tracking",
    "value_grad_and_taps": "taps",
    "Density": "krylov",
    "Estimate": "krylov",
    "Spectrum": "krylov",
    "frobenius_norm": "krylov",
    "lanczos": "krylov",
    "spectral_density": "krylov",
    "trace": "krylov",
    "per_parameter": "alignment",
    "apply_mask": "pruning",
    "prune_mask": "pruning",
    "saliency": "pruning",
    "holm": "multiplicity",
    "q_values": "multiplicity",
    "DataNeeded": "uncertainty",
    "data_needed": "uncertainty",
    "effective_count": "uncertainty",
    "signal_to_noise": "uncertainty",
    "CautiousPruning": "decisions",
    "Decisions": "decisions",
    "decide": "decisions",
    "prune_below": "decisions",
    "Drift": "shift",
    "Shift": "shift",
    "importance_drift": "shift",
    "importance_shift": "shift",
    "merge_params": "merging",
    "merge_task_vectors": "merging",
    "shrunk_mean": "merging",
    "ewc_penalty": "continual",
    "project_away": "continual",
    "protect_important": "continual",
    "scale_by_fisher": "continual",
    "Conflict": "tasks",
    "Overlap": "tasks",
    "conflict": "tasks",
    "overlap": "tasks",
    "KFACMerge": "kronecker.merging",
    "merge_kfac": "kronecker.merging",
}

__all__ = [
    "Batch",
    "BlockSpectra",
    "BlockSpectrum",
    "Capacity",
    "CautiousPruning",
    "Conflict",
    "DataNeeded",
    "Decisions",
    "Density",
    "Drift",
    "Estimate",
    "FisherEstimator",
    "InputError",
    "KFACCoverage",
    "KFACMerge",
    "KFACSpectrum",
    "Likelihood",
    "Overlap",
    "RejectedBatchError",
    "Shift",
    "Spectrum",
    "apply_mask",
    "bernoulli",
    "block_spectra",
    "block_spectrum",
    "capture",
    "categorical",
    "check",
    "checkpoint",
    "conflict",
    "coverage",
    "data_needed",
    "decide",
    "effective_count",
    "ema",
    "ewc_penalty",
    "exchange",
    "frobenius_norm",
    "gaussian",
    "gradients_from_taps",
    "group_fisher",
    "groups",
    "holm",
    "importance_drift",
    "importance_shift",
    "kfac",
    "kfac_coverage",
    "kfac_factors",
    "kfac_factors_from_state",
    "kfac_spectrum",
    "kfac_static_args",
    "lanczos",
    "lm_head",
    "merge_kfac",
    "merge_params",
    "merge_task_vectors",
    "moving_average",
    "next_token_batch",
    "on_device",
    "on_host",
    "operators",
    "overlap",
    "per_parameter",
    "precondition",
    "project_away",
    "protect_important",
    "prune_below",
    "prune_mask",
    "q_values",
    "saliency",
    "scale_by_fisher",
    "scale_by_kfac",
    "shrunk_mean",
    "signal_to_noise",
    "spectral_density",
    "trace",
    "track_fisher",
    "value_grad_and_taps",
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
