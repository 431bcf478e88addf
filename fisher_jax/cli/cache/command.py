"""`fisher-jax cache` from start to end: what is kept of dequantised weights, and its end."""

import time

from fisher_jax.cli.cache.settings import CacheSettings
from fisher_jax.cli.run.progress import duration
from fisher_jax.cli.run.terminal import Terminal, table
from fisher_jax.cli.run.tools import Tools
from fisher_jax.models import weight_cache


def run(settings: CacheSettings, tools: Tools) -> int:
    """Lists what is there, and removes it where that was asked for; the exit code."""
    console, most, kept = Terminal(), weight_cache.limit(), weight_cache.kept()
    console.say("cache", str(weight_cache.folder()))
    if kept:
        now = time.time()
        rows = [(one.source, one.dtype, _size(one.size), f"{duration(max(0, now - one.used))} ago") for one in kept]
        console.print(table(("model", "dtype", "size", "last used"), rows))
    console.print(f"{_size(sum(one.size for one in kept))} of at most {_size(most)}")
    if settings.empty:
        weight_cache.empty()
        console.print(f"removed: {len(kept)} files")
    return 0


def _size(number: int) -> str:
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"
