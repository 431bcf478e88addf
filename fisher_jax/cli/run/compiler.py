"""A fault of jaxlib's compiler that the command keeps out of its own process, before jax is imported."""

import sys
from collections.abc import MutableMapping

from fisher_jax._support.machine import installed

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"

# Seen to compute wrong numbers on a CPU: sums of products in which one factor lacks an axis, which is what vmap makes
# of a norm (0.10.2), and sums of batched matrix products with a constant (all three). Versions that were not tried
# may not know the flag, and an unknown flag aborts the process.
_FAULTY = frozenset({"0.10.2", "0.11.2", "0.12.0.1"})


def avoid_faulty_fusions(environ: MutableMapping[str, str], command: str | None) -> None:
    """Turns off what the installed jaxlib is known to compile wrongly, for a process that has not imported jax.

    Not for ``doctor``, which looks at the computer as the library finds it.
    """
    if "jax" not in sys.modules and command != "doctor":
        environ.update(without_faulty_fusions(environ, installed("jaxlib", "none")))


def without_faulty_fusions(environ: MutableMapping[str, str], jaxlib: str | None) -> dict[str, str]:
    """What to change in ``environ``: a flag appended to ``XLA_FLAGS`` for a version known to be faulty, else nothing.

    What a person says about the flag stays.

    >>> without_faulty_fusions({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "0.10.2")
    {'XLA_FLAGS': '--xla_force_host_platform_device_count=2 --xla_cpu_experimental_ynn_fusion_type=-reduce'}
    """
    flags = environ.get("XLA_FLAGS", "")
    if jaxlib not in _FAULTY or _FLAG in flags:
        return {}
    return {"XLA_FLAGS": f"{flags} {_FLAG}=-reduce".lstrip()}
