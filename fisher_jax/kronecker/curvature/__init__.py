"""Factors of all blocks, damped and inverted: what preconditioning, products and spectra share."""
