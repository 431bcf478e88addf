"""Packages that only reading model files needs."""

import importlib

from fisher_jax._support.errors import InputError

__all__ = ["optional"]


def optional(package: str, purpose: str, extra: str = "fisher-jax[cli]"):
    """The module ``package``; where it is missing, an ``InputError`` that says its use and how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{purpose} needs the package {package!r}; install {extra}") from error
