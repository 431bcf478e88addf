"""What is known of vectors before any number is: structure, shapes, dtypes, places; products checked by it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.tree_util import Partial
from jaxtyping import Array, Key

from fisher_jax._support.dtypes import common_dtype, is_floating, wide_dtype
from fisher_jax._support.jax_internals import is_traced

Tree = Any
Vector = list  # of arrays, one per moving leaf: of jax, or of numpy where the basis is on the host


class Layout(NamedTuple):
    """Moving leaves of a tree. Hashable, and equal for equal trees: a static argument."""

    treedef: Any  # of the tree with None where nothing moves
    paths: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype, ...]
    places: tuple[Sharding | None, ...]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def work(self) -> tuple[np.dtype, ...]:
        """Dtypes of the arithmetic: those of the leaves, at least float32."""
        return tuple(wide_dtype(dtype) for dtype in self.dtypes)

    @property
    def eps(self) -> float:
        return max(float(jnp.finfo(dtype).eps) for dtype in self.work)

    def tree(self, leaves: Any) -> Tree:
        return jax.tree.unflatten(self.treedef, leaves)


def layout_of(like: Tree) -> Layout:
    """Layout of the floating leaves; ``None`` and leaves of integers stand still."""
    flat, _ = jax.tree_util.tree_flatten_with_path(like)
    kept = []
    for path, x in flat:
        name = jax.tree_util.keystr(path) or "the whole tree"
        if is_traced(x):
            raise ValueError("the Krylov methods run on the host, between compiled steps: call them outside of jit")
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise ValueError(f"{name} of `like` is a {type(x).__name__}; wanted arrays or jax.ShapeDtypeStruct")
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise ValueError(
                f"{name} of `like` has dtype {x.dtype}; eigenvalues are computed over real vectors: store real and "
                "imaginary part as two leaves, or put None in its place"
            )
        kept.append(x if is_floating(x) else None)
    paths = tuple(jax.tree_util.keystr(p) for (p, _), x in zip(flat, kept, strict=True) if x is not None)
    moving = jax.tree.unflatten(jax.tree.structure(like), kept)
    leaves, treedef = jax.tree.flatten(moving)
    shapes = tuple(tuple(x.shape) for x in leaves)
    layout = Layout(treedef, paths, shapes, tuple(np.dtype(x.dtype) for x in leaves), tuple(map(_place, leaves)))
    if layout.size == 0:
        found = ", ".join(f"{jax.tree_util.keystr(p)} {x.dtype}{list(x.shape)}" for p, x in flat[:8]) or "no leaf"
        raise ValueError(f"`like` has no floating entry to compute eigenvalues over; found {found}")
    return layout


def _place(x: Any) -> Sharding | None:
    """Where a leaf was put on purpose; ``None`` where jax may choose."""
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.Array) and not x.committed:
        return None
    if sharding is not None and len(sharding.device_set) > 1 and not isinstance(sharding, NamedSharding):
        raise ValueError(f"leaves on several devices need a NamedSharding, found {type(sharding).__name__}")
    return sharding


def product(matvec: Callable, layout: Layout, jit: bool) -> Callable[[Vector], Vector]:
    """``matvec`` on lists of leaves, results in the dtypes of the arithmetic and in the places of the leaves."""
    partial = matvec if isinstance(matvec, Partial) else Partial(matvec)
    if jit:  # shape errors come before the first product
        like = [jax.ShapeDtypeStruct(s, d, sharding=p) for s, d, p in zip(*layout[2:], strict=True)]
        jax.eval_shape(lambda f, v: _apply(f, v, layout=layout), partial, like)

    def of(vector: Vector) -> Vector:
        put = [_put(x, d, p) for x, d, p in zip(vector, layout.dtypes, layout.places, strict=True)]
        out = _apply(partial, put, layout=layout) if jit else _checked(matvec(layout.tree(put)), layout)
        return [x if p is None else jax.device_put(x, p) for x, p in zip(out, layout.places, strict=True)]

    return of


def _put(x: Any, dtype: np.dtype, place: Sharding | None) -> Array:
    if isinstance(x, np.ndarray):
        x = jnp.array(x, dtype)  # a copy: its memory is written again
    x = x.astype(dtype)
    if place is None:
        return x
    return jax.device_put(x, place)


@functools.partial(jax.jit, static_argnames="layout")
def _apply(matvec: Partial, leaves: Vector, *, layout: Layout) -> Vector:
    return _checked(matvec(layout.tree(leaves)), layout)


def _checked(out: Tree, layout: Layout) -> Vector:
    leaves, treedef = jax.tree.flatten(out)
    if treedef != layout.treedef:
        raise ValueError(f"matvec returns a tree {treedef}, wanted that of `like`, {layout.treedef}")
    for x, path, shape, dtype in zip(leaves, layout.paths, layout.shapes, layout.dtypes, strict=True):
        name, found = path or "the whole tree", jnp.result_type(x)
        if jnp.shape(x) != shape:
            raise ValueError(
                f"matvec returns {name} with shape {list(jnp.shape(x))}, wanted {list(shape)} as in `like`"
            )
        if not jnp.issubdtype(found, jnp.floating) or common_dtype(found, dtype) != found:
            raise ValueError(
                f"matvec returns {name} with dtype {found}, wanted {dtype} as in `like` (or wider): cast its result"
            )
    return [jnp.asarray(x).astype(dtype) for x, dtype in zip(leaves, layout.work, strict=True)]


def random_vector(key: Key[Array, ""], layout: Layout, kind: str) -> Vector:
    """Independent entries, ``normal`` or ``signs``, placed like the leaves; the same on any number of devices."""
    return _sampler(layout, kind)(key)


@functools.lru_cache(maxsize=64)
def _sampler(layout: Layout, kind: str) -> Callable[[Array], Vector]:
    """Compiled once per layout: places of results cannot be static arguments of one program."""
    sample = {"normal": jax.random.normal, "signs": jax.random.rademacher}[kind]

    def draw(key):
        keys = jax.random.split(key, len(layout.shapes))
        return [sample(k, s, d) for k, s, d in zip(keys, layout.shapes, layout.work, strict=True)]

    return jax.jit(draw, out_shardings=list(layout.places))
