"""The type checker of the suite: beartype, told what may be other than its annotation says."""

import warnings
from collections.abc import Callable

import beartype
import beartype.roar
import jaxtyping

original = jaxtyping.jaxtyped
check_by_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int may be a float


def check(function: Callable) -> Callable:
    """For `jaxtyping.install_import_hook`, which gives two functions for each one of the package: arguments before a
    call, and arguments with the result after it.

    Only the second is checked: a call that refuses its arguments in a sentence of its own never gets there. Fields of
    dataclasses are not checked, since ``jax.tree.map`` puts whatever it likes into them.
    """
    code = function.__code__
    keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    after = any(name.startswith("ret") for name in keywords)  # the result is handed over so
    if not after or function.__name__ == "__init__":
        return function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", beartype.roar.BeartypeDecorHintPep585DeprecationWarning)  # of Flax's types
        try:
            return check_by_beartype(function)
        except beartype.roar.BeartypeDecorHintException:  # `Self`, or a protocol that is not for ``isinstance``
            return function


def jaxtyped(fn: Callable | None = None, *, typechecker: Callable | None) -> Callable:
    """`jaxtyping.jaxtyped`, except for functions inside functions: they are made anew for each call of the outer one,
    and to check them takes longer than all else that a test does."""
    if fn is None:
        return lambda fn: jaxtyped(fn, typechecker=typechecker)
    return fn if "<locals>" in getattr(fn, "__qualname__", "") else original(fn, typechecker=typechecker)
