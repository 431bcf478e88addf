"""Krylov methods over pytrees: ends of a spectrum with bounds, spectral density, trace and Frobenius norm."""

from fisher_jax.spectra.krylov.density import Density, LogDensity, spectral_density
from fisher_jax.spectra.krylov.estimates import Estimate, frobenius_norm, trace
from fisher_jax.spectra.krylov.spectrum import lanczos
from fisher_jax.spectra.krylov.summary import Spectrum

__all__ = ["Density", "Estimate", "LogDensity", "Spectrum", "frobenius_norm", "lanczos", "spectral_density", "trace"]
