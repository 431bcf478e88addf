"""Krylov methods over pytrees: ends of a spectrum with bounds, spectral density, traces."""
