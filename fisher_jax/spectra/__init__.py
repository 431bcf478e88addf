"""Spectra: Krylov methods over operators, and the blocks of single parameters."""

from fisher_jax.spectra.blocks.capacity import BlockSpectrum, Capacity
from fisher_jax.spectra.blocks.of_batch import block_spectrum
from fisher_jax.spectra.blocks.of_stream import BlockSpectra, block_spectra
from fisher_jax.spectra.blocks.state import BlockSpectraState
from fisher_jax.spectra.krylov.density import Density, LogDensity, spectral_density
from fisher_jax.spectra.krylov.estimates import Estimate, trace
from fisher_jax.spectra.krylov.spectrum import lanczos
from fisher_jax.spectra.krylov.summary import Spectrum

__all__ = [
    "BlockSpectra", "BlockSpectraState", "BlockSpectrum", "Capacity", "Density", "Estimate", "LogDensity", "Spectrum",
    "block_spectra", "block_spectrum", "lanczos", "spectral_density", "trace",
]  # fmt: skip
