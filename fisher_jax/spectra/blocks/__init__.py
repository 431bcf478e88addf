"""Spectra of blocks of the Fisher matrix (a leaf, a module, a layer) and their capacity."""
