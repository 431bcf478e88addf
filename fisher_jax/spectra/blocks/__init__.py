"""Spectra of blocks of the Fisher matrix (a leaf, a module, a layer) and their capacity."""

from fisher_jax.spectra.blocks.capacity import BlockSpectrum, Capacity
from fisher_jax.spectra.blocks.one_batch import block_spectrum
from fisher_jax.spectra.blocks.stream import BlockSpectra, block_spectra

__all__ = ["BlockSpectra", "BlockSpectrum", "Capacity", "block_spectra", "block_spectrum"]
