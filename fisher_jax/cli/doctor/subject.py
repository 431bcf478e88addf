"""What the checks look at: one small decoder and one batch, the same numbers in every dtype."""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax.cli.doctor.loops import Loops
from fisher_jax.models import DecoderConfig, from_config
from fisher_jax.models.functions import DecoderFunctions, abstract_params

ROWS, LENGTH = 32, 32
SCORED = slice(15, None, 16)  # positions of the tokens that have a loss where each takes a backward pass
CONFIG = DecoderConfig(
    vocab_size=64, width=64, num_layers=2, num_heads=4, num_kv_heads=1, head_size=16, mlp_size=64,
    max_positions=LENGTH, tied=False,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A decoder in one dtype, a batch of 1,024 tokens, and the loops that know what is right.

    Every parameter is a number that float16 and bfloat16 hold exactly, so that all dtypes have one reference.
    """

    dtype: str
    params: Any
    batch: fj.Batch
    loops: Loops

    @property
    def model(self) -> DecoderFunctions:
        return self.loops.model

    @property
    def key(self) -> jax.Array:
        return self.loops.key

    @property
    def statistics(self) -> Any:
        """The dtype of statistics: at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def few(self) -> fj.Batch:
        """The same batch, in which only the scored tokens have a loss."""
        weights = np.zeros(self.batch.targets.shape, np.float32)
        weights[:, self.loops.scored] = 1
        return dataclasses.replace(self.batch, weights=jnp.asarray(weights))

    @cached_property
    def factors(self) -> Any:
        """K-FAC factors as the library makes them."""
        make = jax.jit(
            lambda params, batch: fj.kfac_factors(self.model.apply, fj.categorical, params, batch, damping=1.0)
        )
        return make(self.params, self.batch)

    @cached_property
    def direction(self) -> Any:
        """A random tree like the parameters, in the dtype of statistics."""
        generator = np.random.default_rng(2)
        return jax.tree.map(lambda x: jnp.asarray(generator.normal(size=x.shape), self.statistics), self.params)


def make_subject(
    dtype: str, loops: Loops | None = None, config: DecoderConfig = CONFIG, rows: int = ROWS, scored: slice = SCORED
) -> Subject:
    """The decoder in ``dtype``; subjects of several dtypes share the ``loops`` of the first."""
    loops = loops or Loops(from_config(config), _parameters(config), _batch(config, rows), scored)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.dtype(dtype)), loops.params)
    return Subject(dtype, params, loops.batch, loops)


def _parameters(config: DecoderConfig) -> Any:
    """Kernels that neither shrink nor grow what passes through them, scales around 1, logits of a few units."""
    generator = np.random.default_rng(0)

    def leaf(path, like):
        noise = generator.normal(size=like.shape)
        return _exact(1 + 0.2 * noise if path[-1].key == "scale" else noise / np.sqrt(config.width))

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def _exact(x: np.ndarray) -> jax.Array:
    """Rounded to eight binary digits, and to zero below float16's normal numbers."""
    rounded = np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32))
    return jnp.asarray(np.where(np.abs(rounded) < 2.0**-14, 0, rounded), jnp.float32)


def _batch(config: DecoderConfig, rows: int) -> fj.Batch:
    """Random tokens; three rows are one document."""
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (rows, config.max_positions + 1))
    return fj.next_token_batch(jnp.asarray(tokens, jnp.int32), units=jnp.arange(rows, dtype=jnp.int32) // 3)
