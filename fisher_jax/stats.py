"""How sure an importance is: counts of evidence, tests, decisions at a stated chance of error, and their masks."""

from fisher_jax.uses.decisions import CautiousPruning, Decisions, decide, prune_below
from fisher_jax.uses.evidence import DataNeeded, data_needed, effective_count, signal_to_noise
from fisher_jax.uses.many_tests import holm, q_values
from fisher_jax.uses.merging import shrunk_mean
from fisher_jax.uses.pruning import apply_mask

__all__ = [
    "CautiousPruning", "DataNeeded", "Decisions", "apply_mask", "data_needed", "decide", "effective_count", "holm",
    "prune_below", "q_values", "shrunk_mean", "signal_to_noise",
]  # fmt: skip
