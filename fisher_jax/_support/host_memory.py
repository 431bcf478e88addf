"""How much memory there is, and a refusal before more is asked for."""

import os
from collections.abc import Callable
from pathlib import Path

from fisher_jax._support.errors import InputError

__all__ = ["attention_bytes", "available_memory", "check_memory"]


def available_memory() -> int:
    """Bytes that this process can still take: of the machine, or of the container it runs in."""
    machine = _of_machine()
    return min(machine, _of_container(machine))


def check_memory(needed: int, what: str, way_out: str, *, available: Callable[[], int] = available_memory) -> None:
    """Raises InputError where ``what`` takes more bytes than there are."""
    free = available()
    if needed > free:
        raise InputError(
            f"{what} would take {needed / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free; {way_out}."
        )


def attention_bytes(heads: int, rows: int, length: int) -> int:
    """Of the attention weights of one layer in float32, the largest array of a long row."""
    return 4 * rows * heads * length**2


def _of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_container(machine: int) -> int:
    """By cgroup v2, then v1; caches that the kernel can drop do not count as taken."""
    root = Path("/sys/fs/cgroup")
    for limit, usage, stat in (
        (root / "memory.max", root / "memory.current", root / "memory.stat"),
        (
            root / "memory/memory.limit_in_bytes",
            root / "memory/memory.usage_in_bytes",
            root / "memory/memory.stat",
        ),
    ):
        try:
            most, taken = int(limit.read_text()), int(usage.read_text())
            caches = dict(line.split() for line in stat.read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        return max(most - taken + int(caches.get("inactive_file", 0)), 0)
    return machine
