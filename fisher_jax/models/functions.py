"""The decoder as pure functions of a plain nested dict of parameters."""

import dataclasses
from collections.abc import Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from fisher_jax._support.errors import InputError
from fisher_jax._support.jax_internals import is_traced
from fisher_jax._support.outline import outline
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.decoder import Decoder

__all__ = [
    "DTYPES",
    "DecoderFunctions",
    "abstract_params",
    "from_config",
    "init_params",
    "kept_dtype",
    "weight_dtype",
]

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, eq=False)
class DecoderFunctions:
    """What can be computed from parameters and tokens; pure, hence fit for ``jax.jit``, ``jax.grad`` and
    ``jax.vmap``. Built by `from_config`.

    ``params`` is a nested dict: ``embedding`` ``[V, D]``; ``layers`` with kernels ``[L, in, out]`` under
    ``attention/{q,k,v,o}/kernel`` and ``mlp/{gate,up,down}/kernel`` and scales under ``attention_norm/scale``
    and ``mlp_norm/scale`` (norms of outputs: ``attention_post_norm``, ``mlp_post_norm``); ``final_norm/scale``;
    experts have kernels ``[L, E, in, out]`` under ``mlp/experts/{gate,up,down}/kernel`` and ``mlp/router/kernel``
    ``[L, D, E]``; ``head`` ``[V, D]`` where it is not tied; ``head_bias`` ``[V]``, ``positions`` ``[P, D]`` and
    ``bias`` beside kernels and scales where the configuration has them.

    Tokens are integers ``[B, S]``, padded on the right: attention is causal, so what follows a position never
    changes it. Raises ``InputError`` for another rank, for more tokens than ``config.max_positions`` and for
    token ids outside the vocabulary where their values are known. Under ``jit`` they are not: there a too
    large id makes its row NaN and a negative one counts from the end of the vocabulary.
    """

    config: DecoderConfig
    graphdef: Any

    def __repr__(self) -> str:
        return outline(self)

    def hidden(self, params: Any, tokens: Int[ArrayLike, "rows positions"]) -> Float[Array, "rows positions width"]:
        """Final-normed hidden states ``[B, S, D]``, what the head multiplies, at least float32; times
        ``logit_multiplier``."""
        tokens = self.checked(tokens)
        return nnx.merge(self.graphdef, nnx.State(jax.tree.map(nnx.Param, params)))(tokens)

    def apply(self, params: Any, tokens: Int[ArrayLike, "rows positions"]) -> Float[Array, "rows positions vocab"]:
        """Logits ``[B, S, V]``, float32: ``hidden head^T + head_bias``, soft-capped where there is a cap."""
        hidden, head = self.hidden(params, tokens), self.head(params)
        logits = jnp.einsum(
            "bsd,vd->bsv",
            hidden,
            head.astype(hidden.dtype),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        if (bias := self.head_bias(params)) is not None:
            logits = logits + bias.astype(jnp.float32)[None, None]
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def head(self, params: Any) -> Float[Array, "vocab width"]:
        """The head ``[V, D]``: the embedding itself where the model is tied."""
        return params["embedding"] if self.config.tied else params["head"]

    def head_bias(self, params: Any) -> Float[Array, " vocab"] | None:
        """The head's bias ``[V]``, or ``None`` where it has none."""
        return params.get("head_bias")

    def checked(self, tokens: Any) -> Int[Array, "rows positions"]:
        if jnp.ndim(tokens) != 2:
            raise InputError(f"tokens have shape {jnp.shape(tokens)}, but must be [rows, positions]")
        if not is_traced(tokens):
            found = np.asarray(tokens)
            if found.dtype.kind not in "iu":
                raise InputError(f"tokens have dtype {found.dtype}, but token ids are integers")
            if found.size and not (found.min() >= 0 and found.max() < self.config.vocab_size):
                raise InputError(
                    f"token ids go from {found.min()} to {found.max()}, "
                    f"but the vocabulary has ids 0 to {self.config.vocab_size - 1}"
                )
        if tokens.shape[1] > self.config.max_positions:
            raise InputError(
                f"a row has {tokens.shape[1]} tokens, but the model has {self.config.max_positions} "
                "positions; cut the rows into shorter ones"
            )
        return jnp.asarray(tokens)


def from_config(config: DecoderConfig) -> DecoderFunctions:
    """The functions of a decoder of this shape, without any file.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> config = fj.models.DecoderConfig(vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1,
        ...     head_size=4, mlp_size=16, max_positions=6)
        >>> params = fj.models.init_params(config, jax.random.key(0))
        >>> fj.models.from_config(config).apply(params, jnp.zeros((1, 3), jnp.int32)).shape
        (1, 3, 11)
    """
    return DecoderFunctions(config, nnx.graphdef(abstract_decoder(config, jnp.float32)))


def abstract_decoder(config: DecoderConfig, dtype) -> Decoder:
    return nnx.eval_shape(lambda: Decoder(config, dtype, rngs=nnx.Rngs(0)))


def abstract_params(config: DecoderConfig, dtype: Any = "float32") -> dict[str, Any]:
    """The parameters' shapes and dtypes as a nested dict of ``jax.ShapeDtypeStruct``.

    Raises:
        InputError: a dtype that is not float32 or bfloat16.

    Example:
        >>> import fisher_jax as fj
        >>> config = fj.models.DecoderConfig(vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1,
        ...     head_size=4, mlp_size=16, max_positions=6)
        >>> fj.models.abstract_params(config)["layers"]["attention"]["q"]["kernel"].shape
        (2, 8, 8)
    """
    state = nnx.state(abstract_decoder(config, weight_dtype(dtype)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), nnx.to_pure_dict(state))


def init_params(config: DecoderConfig, key: Key[Array, ""], dtype: Any = "float32") -> dict[str, Any]:
    """Random parameters: matrices normal with standard deviation 0.02, biases zero, scales such that norms
    multiply by one.

    All matrices are cut from one draw, which compiles in a tenth of the time of one draw each.

    Raises:
        InputError: a dtype that is not float32 or bfloat16.

    Example:
        >>> import fisher_jax as fj, jax
        >>> config = fj.models.DecoderConfig(vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1,
        ...     head_size=4, mlp_size=16, max_positions=6)
        >>> params = fj.models.init_params(config, jax.random.key(0), "bfloat16")
        >>> params["embedding"].shape, params["embedding"].dtype.name
        ((11, 8), 'bfloat16')
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    kinds = [path[-1].key for path, _ in leaves]
    constants = {"scale": not config.norm_plus_one, "bias": 0, "head_bias": 0}
    drawn = sum(leaf.size for kind, (_, leaf) in zip(kinds, leaves, strict=True) if kind not in constants)
    noise, start, values = 0.02 * jax.random.normal(key, (drawn,)), 0, []
    for kind, (_, leaf) in zip(kinds, leaves, strict=True):
        if kind in constants:
            values.append(jnp.full(leaf.shape, constants[kind], leaf.dtype))
        else:
            values.append(noise[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
            start += leaf.size
    return jax.tree.unflatten(treedef, values)


def kept_dtype(kinds: Set[str]) -> str:
    """The dtype of weights whose matrices a file stores as these kinds, such as ``{"F32", "Q8_0"}``: bfloat16 for
    bfloat16, and where some are quantised; else float32, also for float16, which has more digits than bfloat16."""
    return "bfloat16" if kinds == {"BF16"} or kinds - {"F64", "F32", "F16", "BF16"} else "float32"


def weight_dtype(dtype) -> np.dtype:
    """The dtype of the weights, float32 or bfloat16; anything else is an ``InputError``."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise InputError(f"weights cannot be loaded as {dtype!r}; choose one of {', '.join(DTYPES)}")
    return found
