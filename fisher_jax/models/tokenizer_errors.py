"""Errors of the package tokenizers: exceptions of no kind, and panics, which are no ``Exception`` and print."""

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

from fisher_jax._support.errors import InputError
from fisher_jax._support.printable import one_line

__all__ = ["refusing_panics", "silence"]

_descriptor = threading.Lock()


@contextlib.contextmanager
def refusing_panics(what: str) -> Iterator[None]:
    """Whatever a compiled package raises inside becomes an ``InputError`` that begins with ``what``."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic derives from BaseException
        raise InputError(f"{what} ({one_line(error)}); fetch its files again") from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What is written to the process's standard error inside appears only if nothing fails.

    A panic prints its own lines there, from where Python cannot keep them.
    """
    with _descriptor, contextlib.ExitStack() as stack:
        try:
            saved = os.dup(2)
        except OSError:  # a process without standard error
            yield
            return
        stack.callback(os.close, saved)
        kept = stack.enter_context(tempfile.TemporaryFile())
        sys.stderr.flush()
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(saved, 2)
            raise
        os.dup2(saved, 2)
        kept.seek(0)
        os.write(2, kept.read(2**16))
