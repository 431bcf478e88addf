"""Operations that take entries by index, or write them: a constant index says which, data do not.

`as_slice` is for parameters; every other rule is one of `fisher_jax._tracing.id_rules`.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fisher_jax._support.jax_internals import instead_of, lookup
from fisher_jax._tracing.ids import NOBODY, LostError, placed

__all__ = ["as_slice", "dynamic_slice", "dynamic_update_slice", "gather", "scatter"]


def as_slice(eqn: Any, constant: Callable[[int], np.ndarray | None]) -> Any:
    """A ``gather`` or ``dynamic_slice`` whose indices are constants at equal distances, as a traced function that
    slices the operand; ``None`` for any other, and on a mesh.

    Args:
        constant: the value of operand ``i``, or ``None``.
    """
    operand, name = eqn.invars[0].aval, eqn.primitive.name
    if name not in ("gather", "dynamic_slice") or not operand.sharding.mesh.empty:
        return None
    indices = [x for i in range(1, len(eqn.invars)) if (x := constant(i)) is not None]
    if len(indices) != len(eqn.invars) - 1:
        return None
    sliced = _dynamic_slice_as_slice if name == "dynamic_slice" else _gather_as_slice
    function = sliced(eqn, *indices)
    return None if function is None else instead_of(eqn, function, [operand])


def _dynamic_slice_as_slice(eqn: Any, *indices: np.ndarray) -> Callable | None:
    sizes = eqn.outvars[0].aval.shape
    pairs = zip(indices, sizes, eqn.invars[0].aval.shape, strict=True)
    starts = [int(np.clip(x, 0, n - size)) for x, size, n in pairs]
    return lambda x: jax.lax.slice(x, starts, [a + n for a, n in zip(starts, sizes, strict=True)])


def _gather_as_slice(eqn: Any, index: np.ndarray) -> Callable | None:
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    picked = lookup(eqn.params, shape)
    lead = index.shape[:-1]
    if picked.row is None or sum(n > 1 for n in lead) > 1:
        return None
    row = picked.row
    places = index[..., picked.column].reshape(-1).astype(np.int64)
    steps = np.unique(np.diff(places)) if places.size > 1 else np.ones(1, np.int64)
    if not places.size or steps.size != 1 or steps[0] == 0 or places.min() < 0 or places.max() >= shape[row]:
        return None
    starts, ends, strides = [0] * len(shape), list(shape), [1] * len(shape)
    starts[row], ends[row], strides[row] = int(places.min()), int(places.max()) + 1, abs(int(steps[0]))
    kept = dict(zip(picked.offset, (i for i in range(len(shape)) if i not in picked.collapsed), strict=True))
    outer = dict(zip((i for i in range(len(out)) if i not in picked.offset), lead, strict=True))
    order = [row if i in outer else kept[i] for i in range(len(out)) if outer.get(i, 2) > 1 and kept.get(i) != row]
    order = order if row in order else [row, *order]

    def sliced(x):
        found = jax.lax.slice(x, starts, ends, strides)
        found = found if steps[0] > 0 else jax.lax.rev(found, [row])
        return found.transpose(order).reshape(out)

    return sliced


def dynamic_slice(eqn, operand, values, output, loops, constant):
    if operand:
        return None
    sizes = eqn.outvars[0].aval.shape
    for i, (size, n) in enumerate(zip(sizes, eqn.invars[0].aval.shape, strict=True)):
        if values.shape[loops + i] > 1 and size != n:
            start = constant(1 + i)
            if start is None:
                raise LostError("data say which of them are taken")
            first = int(np.clip(start, 0, n - size))
            values = values.take(range(first, first + size), loops + i)
    return values


def dynamic_update_slice(eqn, operand, values, output, loops, constant):
    if operand > 1:
        return None
    whole, part = (x.aval.shape for x in eqn.invars[:2])
    cut = [i for i, (m, n) in enumerate(zip(whole, part, strict=True)) if m != n]
    varying = {i for i in cut if values.shape[loops + i] > 1}
    starts = {i: constant(2 + i) for i in (varying if operand == 0 else cut)}
    if any(starts[i] is None for i in varying) or (operand == 0 and varying and len(cut) > 1):
        raise LostError("it replaces some of them")
    for i, start in starts.items():
        if start is None:
            continue
        first = int(np.clip(start, 0, whole[i] - part[i]))
        if operand == 1:
            values = placed(values, loops + i, first, part[i], whole[i])
        else:
            values = values.copy()
            values[(slice(None),) * (loops + i) + (slice(first, first + part[i]),)] = NOBODY
    return values


def scatter(eqn, operand, values, output, loops, constant):
    if operand:
        raise LostError("it writes into some of them")
    return values


def gather(eqn, operand, values, output, loops, constant):
    picked = lookup(eqn.params, eqn.invars[0].aval.shape)
    ndim = len(eqn.outvars[0].aval.shape)
    outer = [i for i in range(ndim) if i not in picked.offset]
    if operand == 1:
        shape = [1] * ndim
        for axis, n in zip(outer, values.shape[loops:-1], strict=True):
            shape[axis] = n
        if values.shape[-1] > 1:
            raise LostError("indices along one axis belong to different ones")
        return values.reshape(*values.shape[:loops], *shape)
    own = values.shape[loops:]
    if any(own[i] > 1 for i in picked.axes):
        return _gathered(eqn, values, picked, outer, loops, constant)
    shape = [1] * ndim
    slices = [i for i in range(len(own)) if i not in (*picked.collapsed, *picked.batching)]
    to = dict(zip(slices, picked.offset, strict=True))
    to |= {i: outer[j] for i, j in zip(picked.batching, picked.index_batching, strict=True)}
    for i, n in enumerate(own):
        if n > 1 and i in to:
            shape[to[i]] = n
    order = sorted((i for i in range(len(own)) if own[i] > 1 and i in to), key=to.__getitem__)
    rest = [i for i in range(len(own)) if i not in order]
    moved = values.transpose([*range(loops), *(loops + i for i in (*order, *rest))])
    return moved.reshape(*values.shape[:loops], *shape)


def _gathered(eqn, values, picked, outer, loops, constant):
    """A gather with indices that are constant where it matters, on the ids themselves."""
    index = constant(1)
    if index is None:
        index = _index_of_axes(eqn, values.shape[loops:], picked, constant)
    if any(n > 1 for n in values.shape[:loops]):
        raise LostError("it takes some of them inside of a loop over them")
    operand = eqn.invars[0].aval.shape
    own = values.reshape(values.shape[loops:])
    lead = index.shape[:-1]
    vectors = index.reshape(-1, index.shape[-1]).astype(np.int64)
    batch = np.indices(lead).reshape(len(lead), -1)
    sizes = [1 if own.shape[i] == 1 else n for i, n in enumerate(picked.sizes)]
    inside = np.ones(len(vectors), bool)
    places = []
    for axis, size in enumerate(sizes):
        start = np.zeros(len(vectors), np.int64)
        if axis in picked.axes:
            start = vectors[:, picked.axes.index(axis)]
            last = operand[axis] - picked.sizes[axis]
            if not picked.clips:
                inside &= (start >= 0) & (start <= last)
            start = np.clip(start, 0, last)
        elif axis in picked.batching:
            start = batch[picked.index_batching[picked.batching.index(axis)]]
        if own.shape[axis] == 1:
            start = np.zeros_like(start)
        step = np.arange(size).reshape([-1 if i == axis else 1 for i in range(len(sizes))])
        places.append(start.reshape(-1, *(1,) * len(sizes)) + step)
    found = own[tuple(np.broadcast_arrays(*places))]
    found = np.where(inside.reshape(-1, *(1,) * len(sizes)), found, NOBODY)
    gone = tuple(1 + i for i in (*picked.collapsed, *picked.batching))
    found = found.squeeze(gone).reshape(*lead, *(n for i, n in enumerate(sizes) if 1 + i not in gone))
    found = np.moveaxis(found, range(found.ndim), (*outer, *picked.offset))
    return found.reshape(*values.shape[:loops], *found.shape)


def _index_of_axes(eqn, own, picked, constant):
    """Constant indices into the axes that the ids vary over, and 0 into the others."""
    shape = eqn.invars[1].aval.shape
    index = np.zeros(shape, np.int64)
    for part, axis in enumerate(picked.axes):
        if own[axis] > 1:
            known = constant(1, part)
            if known is None:
                raise LostError("data say which of them are taken")
            index[..., part] = known
    return index
