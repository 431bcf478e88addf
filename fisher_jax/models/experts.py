"""A mixture of experts in place of an MLP: a router, and as many MLPs as there are experts, scanned one by one."""

import jax
import jax.numpy as jnp
from flax import nnx

from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.dense import Dense, normal, product

__all__ = ["Experts"]


class Kernels(nnx.Module):
    """Kernels of all experts, ``[E, in, out]``."""

    def __init__(self, shape: tuple[int, ...], dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs.params(), shape, dtype))


class ExpertMlps(nnx.Module):
    """Three kernels for each expert."""

    def __init__(self, config: DecoderConfig, dtype, rngs: nnx.Rngs):
        assert config.num_experts is not None
        number, inside, outside = config.num_experts, config.width, config.mlp_size
        self.gate = Kernels((number, inside, outside), dtype, rngs)
        self.up = Kernels((number, inside, outside), dtype, rngs)
        self.down = Kernels((number, outside, inside), dtype, rngs)


class Experts(nnx.Module):
    """``sum_e weight_e(x) down_e(act(gate_e(x)) * up_e(x))`` over the experts that a token is routed to.

    The weights are those of the ``experts_per_token`` largest entries of the router's softmax, in float32, divided by
    their sum where ``norm_expert_weights``; all others are zero. Every expert goes over all tokens, one after the
    other and rematerialised, so that memory is that of the activations of one.
    """

    def __init__(self, config: DecoderConfig, activation, dtype, rngs: nnx.Rngs):
        assert config.num_experts is not None
        assert config.experts_per_token is not None
        self.activation, self.normed = activation, config.norm_expert_weights
        self.number, self.per_token = config.num_experts, config.experts_per_token
        self.router = Dense(config.width, self.number, False, dtype, rngs)
        self.experts = ExpertMlps(config, dtype, rngs)

    def __call__(self, x):
        weights = self.weights(x)
        kernels = tuple(getattr(self.experts, name).kernel[...] for name in ("gate", "up", "down"))

        def one(total, scanned):
            gate, up, down, weight = scanned
            mixed = product(self.activation(product(x, gate)) * product(x, up), down)
            return total + weight[..., None] * mixed, None

        one = jax.checkpoint(one, prevent_cse=False)
        return jax.lax.scan(one, jnp.zeros_like(x), (*kernels, jnp.moveaxis(weights, -1, 0)))[0]

    def weights(self, x):
        """Of every token and expert ``[B, S, E]``, in the dtype of ``x``."""
        shares = jax.nn.softmax(self.router(x).astype(jnp.float32))
        largest, index = jax.lax.top_k(shares, self.per_token)
        if self.normed:
            largest = largest / jnp.sum(largest, -1, keepdims=True)
        chosen = jax.nn.one_hot(index, self.number, dtype=jnp.float32)
        return jnp.sum(chosen * largest[..., None], -2).astype(x.dtype)
