"""What several processes of one program must agree on; with one process everything here is at once."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from fisher_jax._support.errors import ConflictError, InputError

TIMEOUT = 300.0  # seconds that a process waits for another one
_KINDS = {kind.__name__: kind for kind in (ConflictError, InputError, OSError, TypeError, ValueError)}
_rounds = itertools.count()


def several() -> bool:
    return jax.process_count() > 1


def is_first() -> bool:
    return jax.process_index() == 0


def _share(value: Any, what: str, timeout: float = TIMEOUT) -> list[Any]:
    """The JSON-ready values of all processes, by process; each has to come here.

    Raises:
        RuntimeError: a process did not, within ``timeout`` seconds.
    """
    import orbax.checkpoint  # slow to import

    client = orbax.checkpoint.multihost.get_jax_distributed_client()
    own, key = jax.process_index(), f"fisher_jax/{next(_rounds)}"
    client.key_value_set(f"{key}/{own}", json.dumps(value))
    found = []
    for process in range(jax.process_count()):
        try:
            text = client.blocking_key_value_get(f"{key}/{process}", int(timeout * 1000))
        except Exception as error:
            raise RuntimeError(
                f"process {process} did not come to {what} within {timeout:g} s; every process has to call this"
            ) from error
        found.append(json.loads(text))
    client.wait_at_barrier(f"{key}/read", int(timeout * 1000))
    client.key_value_delete(f"{key}/{own}")
    return found


def together(step: Callable[[], Any], what: str, timeout: float = TIMEOUT) -> list[Any]:
    """What ``step`` gives on each process, JSON-ready, by process; an error on one process is an error on all.

    Raises:
        Exception: what ``step`` raised here; else, of the same kind, what it raised on another process.
    """
    if not several():
        return [step()]
    value, failed = None, None
    try:
        value = step()
    except BaseException as error:
        failed = error
    said = None if failed is None else [type(failed).__name__, str(failed) or type(failed).__name__]
    try:
        everybody = _share({"value": value, "error": said}, what, timeout)
    except RuntimeError:
        if failed is None:
            raise
    if failed is not None:
        raise failed
    for process, other in enumerate(everybody):
        if other["error"] is not None:
            kind, words = other["error"]
            raise _KINDS.get(kind, RuntimeError)(f"process {process}: {words}")
    return [other["value"] for other in everybody]
