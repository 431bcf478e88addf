"""Regular expressions that a person gives: compiled with care, and searched for a bounded time."""

import json
import re
import subprocess
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Sequence

from fisher_jax._support.errors import InputError
from fisher_jax._support.printable import printable, shortened

_LONGEST = 1000
_SECONDS = 5.0  # for a few dozen short names, which takes microseconds unless the pattern explodes
# A search cannot be interrupted from within, so it runs in a process that can be ended.
_SEARCH = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
pattern, names = json.load(sys.stdin)
print(json.dumps([re.search(pattern, name) is not None for name in names]))
"""


def pattern(text: str) -> str:
    """A regular expression, as the value of an option."""
    if len(text) > _LONGEST:
        raise ArgumentTypeError(f"has {len(text):,} characters; give a regular expression of at most {_LONGEST:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ArgumentTypeError(
            f"'{printable(shortened(text))}' is not a regular expression ({error}); names are like "
            "layers/attention/q/kernel"
        ) from None
    return text


def matching(text: str, names: Sequence[str], *, seconds: float = _SECONDS) -> list[bool]:
    """For every name whether the pattern is found in it.

    Raises:
        InputError: the search takes longer than ``seconds``.
    """
    command = [sys.executable, "-I", "-S", "-c", _SEARCH]
    try:
        done = subprocess.run(
            command,
            input=json.dumps([text, list(names)]),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"--parameters '{printable(text)}' found no end in {seconds:g} s; give a simpler pattern, without "
            "repetitions inside repetitions."
        ) from None
    return json.loads(done.stdout)
