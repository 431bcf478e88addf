"""Spectra: Krylov methods over operators, and the blocks of single parameters."""
