"""What else Kronecker factors tell: coverage, spectrum, models merged by them, posteriors; and the K-FAC states."""

from fisher_jax.kronecker.curvature.coverage import KFACCoverage, kfac_coverage
from fisher_jax.kronecker.curvature.factors import BlockFactors, Factors
from fisher_jax.kronecker.curvature.spectrum import BlockEigenvalues, KFACSpectrum, kfac_spectrum
from fisher_jax.kronecker.optimizer.from_state import kfac_factors_from_state
from fisher_jax.kronecker.optimizer.kfac import KFACOptimizerState
from fisher_jax.kronecker.optimizer.refresh import KFACState
from fisher_jax.uses.laplace import Posterior
from fisher_jax.uses.merging_kfac import KFACMerge, merge_kfac

__all__ = [
    "BlockEigenvalues", "BlockFactors", "Factors", "KFACCoverage", "KFACMerge", "KFACOptimizerState", "KFACSpectrum",
    "KFACState", "Posterior", "kfac_coverage", "kfac_factors_from_state", "kfac_spectrum", "merge_kfac",
]  # fmt: skip
