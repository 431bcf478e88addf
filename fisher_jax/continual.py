"""Several tasks in one model: learn one without losing those before, or merge models of each."""

from fisher_jax.uses.continual import (
    ProtectState,
    ScaleByFisherState,
    ewc_penalty,
    project_away,
    protect_important,
    scale_by_fisher,
)
from fisher_jax.uses.merging import merge_params, merge_task_vectors

__all__ = [
    "ProtectState", "ScaleByFisherState", "ewc_penalty", "merge_params", "merge_task_vectors", "project_away",
    "protect_important", "scale_by_fisher",
]  # fmt: skip
