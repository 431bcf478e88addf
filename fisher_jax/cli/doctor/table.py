"""All checks, in the order in which they run."""

from fisher_jax.cli.doctor import arithmetic, closed_form, curvature, estimators, storage

CHECKS = (*arithmetic.CHECKS, *estimators.CHECKS, *closed_form.CHECKS, *curvature.CHECKS, *storage.CHECKS)
