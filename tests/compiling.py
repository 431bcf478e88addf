"""How the suite compiles: quickly, once for each program, and never more at a time than a process can hold.

- Programs run once or twice on small arrays, so that optimising their machine code would take most of the time. XLA's
  own passes over a program (fusions and the like) run as ever, and with them what they may do wrong. Whoever sets
  ``JAX_DISABLE_MOST_OPTIMIZATIONS`` decides; the mark ``optimized`` keeps the machine code of a file as users get it.
- Compiled programs are kept for the next run, in ``$XDG_CACHE_HOME/fisher-jax/tests``, one folder for each process of
  a run: JAX writes into it without a lock. A folder that another run holds, or that a killed run left, is not read.
  Whoever sets ``JAX_COMPILATION_CACHE_DIR`` decides.
- A compiled program takes some 35 mappings of memory, of which Linux gives a process 65,530: JAX's tables are emptied
  after every `LIMIT` programs.
"""

import contextlib
import fcntl
import gc
import os
import pathlib
import platform
import shutil

import jax
import jax.monitoring

__all__ = ["Kept", "Mappings", "optimized"]

LIMIT = 500
BYTES = 2 * 2**30


class Mappings:
    """Counts programs, and lets go of all of them when there are many."""

    def __init__(self):
        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self.count)

    def count(self, event: str, seconds: float, **about) -> None:
        self.programs += event == "/jax/core/compile/backend_compile_duration"

    def bound(self) -> None:
        if self.programs > LIMIT:
            self.programs = 0
            jax.clear_caches()
            gc.collect()


def optimized(value: bool) -> None:
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
        jax.config.update("jax_disable_most_optimizations", not value)


class Kept:
    """The folder of compiled programs of one process, held while the process runs."""

    def __init__(self, process: str):
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        self.folder = base / "fisher-jax" / "tests" / f"jax-{jax.__version__}-{platform.machine()}-{process}"
        self.held = None

    def open(self) -> None:
        if "JAX_COMPILATION_CACHE_DIR" in os.environ:
            return
        with contextlib.suppress(OSError):  # a home that cannot be written to: nothing is kept
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            held = open(f"{self.folder}.lock", "a+")  # noqa: SIM115  # closed in `close`
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                held.close()
                return
            held.seek(0)
            if held.read() or self.size() > BYTES:
                shutil.rmtree(self.folder, ignore_errors=True)
            held.write("in use")
            held.flush()
            self.held = held
            jax.config.update("jax_compilation_cache_dir", str(self.folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def size(self) -> int:
        return sum(file.stat().st_size for file in self.folder.glob("*")) if self.folder.is_dir() else 0

    def close(self) -> None:
        if self.held:
            self.held.truncate(0)
            self.held.close()
            self.held = None
