"""Weights of GGUF files that were dequantised and kept, so that the next start is faster: where they lie, how large
they are, and, with --empty, away with them. FISHER_JAX_CACHE names the folder, FISHER_JAX_CACHE_GIB is the most that
it holds (16 GiB; 0 keeps nothing): a new model takes the place of what was not used for the longest time.

examples:
  fisher-jax cache
  fisher-jax cache --empty
"""

from dataclasses import dataclass

from fisher_jax.cli.run.options import Settings, option


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Settings):
    """What is to be done with the cache."""

    empty: bool = option(False, help="remove all that is listed")
