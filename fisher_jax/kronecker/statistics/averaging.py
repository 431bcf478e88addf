"""Statistics that stay between refreshes: exponentially weighted sums, from which factors are decomposed when due."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fisher_jax._support.placement import automatic, spec_of
from fisher_jax.kronecker.blocks.plan import Block
from fisher_jax.kronecker.factors.forms import eigen, product
from fisher_jax.kronecker.statistics.observation import Observation

__all__ = ["averaged", "beside", "widened"]


def averaged(old: Observation, new: Observation, decay: Any) -> Observation:
    """``decay old + new``, for every sum and for what divides it: factors are means over tokens with weight
    ``decay**age``. Columns stay as many as ``old`` has, see `beside`."""

    def run(old, new):
        return jax.tree.map(lambda x, y: decay * x + y, old, new)

    U = [_merged(a.get("U"), b.get("U"), decay) for a, b in zip(old.sums, new.sums, strict=True)]
    plain = [{k: v for k, v in x.items() if k != "U"} for x in old.sums], old.weight
    fresh = [{k: v for k, v in x.items() if k != "U"} for x in new.sums], new.weight
    sums, weight = automatic(run, jax.tree.map(spec_of, plain), plain, fresh)
    return Observation(
        tuple(x if u is None else x | {"U": u} for x, u in zip(sums, U, strict=True)), weight, jnp.zeros_like(old.bad)
    )


def _merged(old: Array | None, new: Array | None, decay: Any) -> Array | None:
    if old is None or new is None:
        return None

    def run(old, new):
        return jax.vmap(lambda a, b: beside(a, b, decay))(old, new)

    return automatic(run, spec_of(old), old, new)


def beside(old: Float[Array, "n R"], new: Float[Array, "n T"], decay: Any) -> Float[Array, "n R"]:
    """``R`` columns ``V`` with ``V V^T`` nearest to ``new new^T + decay old old^T``, in every unitary norm.

    Equal to it where its rank is at most ``R``; else its smallest eigenvalues are left out, so that the trace is
    underestimated by their sum.
    """
    both = jnp.concatenate([new, jnp.sqrt(jnp.asarray(decay, old.dtype)) * old], 1)
    _, vectors = eigen(product(both.T, both))
    return product(both, vectors[:, -old.shape[1] :])


def widened(blocks: tuple[Block, ...], seen: Observation, rank: int | None) -> Observation:
    """Shapes of ``seen`` with ``rank`` columns, not more than there are outputs, where columns are kept."""

    def sums(block: Block, found: dict) -> dict:
        if "U" not in found or rank is None:
            return found
        U = found["U"]
        return found | {"U": jax.ShapeDtypeStruct((*U.shape[:-1], rank), U.dtype, sharding=U.sharding)}

    return seen._replace(sums=tuple(sums(b, s) for b, s in zip(blocks, seen.sums, strict=True)))
