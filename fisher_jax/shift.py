"""Two texts or tasks side by side: what changed, when it changed, what they share and where they conflict."""

from fisher_jax.uses.overlap import Conflict, Overlap, conflict, overlap
from fisher_jax.uses.shift import Drift, Shift, importance_drift, importance_shift

__all__ = [
    "Conflict", "Drift", "Overlap", "Shift", "conflict", "importance_drift", "importance_shift", "overlap",
]  # fmt: skip
