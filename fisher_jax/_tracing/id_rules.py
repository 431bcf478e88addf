"""Ids of rows and positions through one operation of a program: its rule, by the name of the primitive.

Layout operations act on ids as on values; products and reductions drop the ids of the axes that they sum over;
everything else needs equal ids, or loses them, and says where.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fisher_jax._support.jax_internals import (
    broadcast_axes,
    contraction,
    convolution,
    named_axes,
    permutation,
    slice_bounds,
    unstacked_axis,
)
from fisher_jax._tracing import index_rules
from fisher_jax._tracing.ids import NOBODY, Carried, Ids, Lost, LostError, compressed, joined, placed

__all__ = [
    "Carrying",
    "axis_groups",
    "carried_through",
    "extended",
    "is_cumulative",
    "is_elementwise",
    "is_layout",
    "is_reduction",
    "keeps_entries",
    "moved_through",
    "moves_nothing",
]

_SAME = {
    "convert_element_type", "copy", "copy_p", "sharding_constraint", "reduce_precision", "layout_constraint",
    "reshard", "mesh_cast", "pvary", "pcast", "stop_gradient", "name", "optimization_barrier", "device_put",
}  # fmt: skip
_ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "cos", "cosh",
    "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma",
    "igamma_grad_a", "igammac", "imag", "integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "log2",
    "logistic", "lt", "lt_to", "max", "min", "mul", "mulhi", "ne", "neg", "nextafter", "not", "one_minus_square",
    "or", "polygamma", "population_count", "pow", "real",
    "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "sub", "tan", "tanh", "threefry2x32", "xor",
    "zeta",
}  # fmt: skip
_REDUCTIONS = {
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum",
    "reduce_xor", "reduce",
}  # fmt: skip
_LAYOUT = {
    "transpose", "reshape", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "split", "unstack", "rev",
    "gather", "dynamic_slice", "tile",
}  # fmt: skip
_MOVES = {"concatenate", "stack", "pad", "sort", "top_k", "dynamic_update_slice", "scatter"}
_CUMULATIVE = {"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"}


class Carrying(NamedTuple):
    """Ids of one result of an equation, and kinds of an operand's ids that the result has not, as where it sums."""

    ids: Carried
    gone: tuple[Any, ...] = ()


def carried_through(
    eqn: Any,
    given: Sequence[Carried],
    loops: int,
    constant: Callable[..., np.ndarray | None],
    line: Callable[[Any], str],
) -> list["Carrying"]:
    """Ids of the results of an equation, for each of them, and kinds that it leaves out.

    Args:
        eqn: an equation without a function of its own inside.
        given: ids of its operands.
        loops: number of loops around it, the first axes of all ids.
        constant: ``constant(i)``, the value of operand ``i`` where it is a constant of the program, else ``None``;
            ``constant(i, part)`` of one of the numbers of vectors of indices.
        line: where an equation stands.
    """
    if not any(given):
        return [Carrying(()) for _ in eqn.outvars]

    results: list[Carrying] = []
    for output in range(len(eqn.outvars)):
        moved = _all_moved(eqn, given, output, loops, constant, line)
        found = joined(_kept(moved), eqn, line)
        if eqn.primitive.name == "dot_general":
            found = (*found, *_mixed(eqn, given, found, loops, line))
        pairs = [pair for own, new in zip(given, moved, strict=True) for pair in zip(own, new, strict=True)]
        gone = () if moves_nothing(eqn.primitive.name) else tuple(one.kind for one, new in pairs if new is None)
        results.append(Carrying(extended(eqn, found, loops), gone))
    return results


def moved_through(
    eqn: Any, given: Sequence[Carried], output: int, loops: int, constant: Callable, line: Callable
) -> list[Carried]:
    """Ids of each operand as they lie in one result; those that are summed over are gone."""
    return _kept(_all_moved(eqn, given, output, loops, constant, line))


def _all_moved(
    eqn: Any, given: Sequence[Carried], output: int, loops: int, constant: Callable, line: Callable
) -> list[list[Ids | Lost | None]]:
    return [[_moved(eqn, i, one, output, loops, constant, line) for one in own] for i, own in enumerate(given)]


def _kept(moved: Sequence[Sequence[Ids | Lost | None]]) -> list[Carried]:
    return [tuple(one for one in own if one is not None and not _is_nobodys(one)) for own in moved]


def extended(eqn: Any, found: Carried, loops: int) -> Carried:
    """Ids of a result that is made of parts side by side, one along an axis where all that have one have the same."""
    for axis in _joining_axes(eqn):
        found = tuple(x if isinstance(x, Lost) else Ids(x.kind, _extended(x.values, loops + axis)) for x in found)
    return found


def _moved(
    eqn: Any, operand: int, one: Ids | Lost, output: int, loops: int, constant: Callable, line: Callable
) -> Ids | Lost | None:
    """One id of one operand in the result; ``None`` where it is summed over."""
    if isinstance(one, Lost):
        return one
    rule = _convolve_positions if one.kind == "position" and _is_convolution(eqn) else _rule(eqn.primitive.name)
    try:
        values = rule(eqn, operand, one.values, output, loops, constant)
    except LostError as error:
        return Lost(one.kind, eqn.primitive.name, line(eqn), str(error))
    return None if values is None else Ids(one.kind, compressed(values))


def _is_nobodys(one: Ids | Lost) -> bool:
    return isinstance(one, Ids) and bool((one.values == NOBODY).all())


def _mixed(eqn: Any, given: Sequence[Carried], found: Carried, loops: int, line: Callable) -> Carried:
    """Kinds that a product sums over by a matrix, whose other axis may be one of new rows or positions."""
    lost: dict[Any, Lost] = {}
    for operand, own in enumerate(given):
        contracted, batch = (sides[1 - operand] for sides in contraction(eqn.params))
        shape = eqn.invars[1 - operand].aval.shape
        if not any(n > 1 for i, n in enumerate(shape) if i not in (*contracted, *batch)):
            continue
        for one in own:
            axes = [loops + i for i in contraction(eqn.params).contracted[operand]]
            known = {x.kind for x in (*found, *given[1 - operand])}
            if isinstance(one, Lost) or not set(one.axes) & set(axes) or one.kind in known:
                continue
            size = int(np.prod([one.values.shape[i] for i in axes]))
            if len(np.unique(one.values)) == size:  # the axis of them alone, not one of features too
                lost[one.kind] = Lost(one.kind, eqn.primitive.name, line(eqn), "a matrix mixes them", mixed=True)
    return tuple(lost.values())


def is_elementwise(name: str) -> bool:
    """Whether an operation makes each entry of its result from the entries at the same place."""
    return name in _ELEMENTWISE


def keeps_entries(name: str) -> bool:
    """Whether each entry of the result comes from single entries, wherever these were."""
    return is_elementwise(name) or is_layout(name) or name in _MOVES


def is_reduction(name: str) -> bool:
    """Whether an operation goes over whole axes, which its result has not."""
    return name in _REDUCTIONS


def is_cumulative(name: str) -> bool:
    """Whether each entry of the result is made from all up to it."""
    return name in _CUMULATIVE


def moves_nothing(name: str) -> bool:
    """Whether the entries of the result are those of the operand, where they were."""
    return name in _SAME


def is_layout(name: str) -> bool:
    """Whether an operation only moves entries."""
    return name in _SAME or name in _LAYOUT


def _rule(name: str) -> Callable:
    if name in _SAME:
        return _same
    if name in _ELEMENTWISE:
        return _elementwise
    if name in _REDUCTIONS:
        return _reduce
    if name in _CUMULATIVE:
        return _same
    return _RULES.get(name, _unknown)


def _unknown(eqn, operand, values, output, loops, constant):
    raise LostError("nothing is known of what it does to rows and positions")


def _same(eqn, operand, values, output, loops, constant):
    return values if operand == output or len(eqn.invars) == 1 else None


def _elementwise(eqn, operand, values, output, loops, constant):
    ndim = len(eqn.outvars[output].aval.shape)
    if values.ndim == loops + ndim:
        return values
    return values.reshape(*values.shape[:loops], *(1,) * ndim)  # a number beside arrays


def _transpose(eqn, operand, values, output, loops, constant):
    return values.transpose([*range(loops), *(loops + i for i in permutation(eqn))])


def _broadcast(eqn, operand, values, output, loops, constant):
    if operand:
        return None
    shape = [1] * len(eqn.outvars[0].aval.shape)
    for i, to in enumerate(broadcast_axes(eqn)):
        shape[to] = values.shape[loops + i]
    return values.reshape(*values.shape[:loops], *shape)


def _tile(eqn, operand, values, output, loops, constant):
    reps = zip(values.shape[loops:], eqn.params["reps"], strict=True)
    return np.tile(values, (*(1,) * loops, *(n if size > 1 else 1 for size, n in reps)))


def _squeeze(eqn, operand, values, output, loops, constant):
    return values.squeeze(tuple(loops + i for i in named_axes(eqn)))


def _expand(eqn, operand, values, output, loops, constant):
    return np.expand_dims(values, tuple(loops + i for i in named_axes(eqn)))


def _reshape(eqn, operand, values, output, loops, constant):
    if operand:
        return None
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    lead, own = values.shape[:loops], values.shape[loops:]
    full: list[int] = []
    shape: list[int] = []
    for old, new in axis_groups(before, after):
        varies = any(own[i] > 1 for i in old)
        full += [before[i] if varies else 1 for i in old]
        shape += [after[i] if varies else 1 for i in new]
    return np.broadcast_to(values, (*lead, *full)).reshape(*lead, *shape)


def axis_groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[range, range]]:
    """Axes before and after a reshape that hold the same entries, in order and as few as can be."""
    found, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        first, other = i, j
        m = n = 1
        if i < len(before):
            m, i = before[i], i + 1
        if j < len(after):
            n, j = after[j], j + 1
        while m != n:
            if m < n and i < len(before):
                m, i = m * before[i], i + 1
            elif m > n and j < len(after):
                n, j = n * after[j], j + 1
            else:  # one of the two has no axes left but those of length 1
                m, n, i, j = 0, 0, len(before), len(after)
        found.append((range(first, i), range(other, j)))
    return found


def _slice(eqn, operand, values, output, loops, constant):
    starts, limits, strides = slice_bounds(eqn)
    cuts = zip(values.shape[loops:], starts, limits, strides or (1,) * len(starts), strict=True)
    parts = [slice(None) if n == 1 else slice(a, b, c) for n, a, b, c in cuts]
    return values[(slice(None),) * loops + tuple(parts)]


def _split(eqn, operand, values, output, loops, constant):
    axis, sizes = loops + eqn.params["axis"], eqn.params["sizes"]
    if values.shape[axis] == 1:
        return values
    start = sum(sizes[:output])
    return values.take(range(start, start + sizes[output]), axis)


def _unstack(eqn, operand, values, output, loops, constant):
    axis = loops + unstacked_axis(eqn)
    return values.take(output if values.shape[axis] > 1 else 0, axis)


def _rev(eqn, operand, values, output, loops, constant):
    return np.flip(values, tuple(loops + i for i in named_axes(eqn)))


def _concatenate(eqn, operand, values, output, loops, constant):
    axis = int(eqn.params["dimension"])
    sizes = [x.aval.shape[axis] for x in eqn.invars]
    return placed(values, loops + axis, sum(sizes[:operand]), sizes[operand], sum(sizes))


def _stack(eqn, operand, values, output, loops, constant):
    axis = loops + int(eqn.params["axis"]) % len(eqn.outvars[0].aval.shape)
    return placed(np.expand_dims(values, axis), axis, operand, 1, len(eqn.invars))


def _joining_axes(eqn: Any) -> Sequence[int]:
    """Axes along which an operation puts parts side by side."""
    if eqn.primitive.name == "concatenate":
        return (int(eqn.params["dimension"]),)
    if eqn.primitive.name == "stack":
        return (int(eqn.params["axis"]) % len(eqn.outvars[0].aval.shape),)
    return range(len(eqn.outvars[0].aval.shape)) if eqn.primitive.name == "dynamic_update_slice" else ()


def _extended(values: np.ndarray, axis: int) -> np.ndarray:
    """One id along an axis where all parts that have one have the same."""
    if values.shape[axis] == 1:
        return values
    most = values.max(axis, keepdims=True)
    return compressed(most) if ((values == most) | (values == NOBODY)).all() else values


def _pad(eqn, operand, values, output, loops, constant):
    if operand:
        return None
    for i, (low, high, inside) in enumerate(eqn.params["padding_config"]):
        axis = loops + i
        if values.shape[axis] == 1:
            continue
        spread = [NOBODY] * ((values.shape[axis] - 1) * (inside + 1) + 1)
        places = np.arange(len(spread))
        index = np.where(places % (inside + 1) == 0, places // (inside + 1), -1)
        index = np.pad(index, (max(low, 0), max(high, 0)), constant_values=-1)
        index = index[max(-low, 0) : len(index) - max(-high, 0)]
        taken = values.take(index, axis)
        shape = [1] * values.ndim
        shape[axis] = len(index)
        values = np.where((index < 0).reshape(shape), NOBODY, taken)
    return values


def _reduce(eqn, operand, values, output, loops, constant):
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    if len(eqn.invars) > len(eqn.outvars) and operand >= len(eqn.outvars):
        return None  # what a reduction starts from
    return _summed(values, [int(i) for i in axes], loops)


def _over_a_mesh(eqn, operand, values, output, loops, constant):
    """A sum over axes of an array, as ``jax.vmap(axis_name=)`` makes of one over a name."""
    if operand != output:
        return None
    axes = [i for i in eqn.params["axes"] if isinstance(i, int)]
    if len(axes) < len(eqn.params["axes"]):
        raise LostError("it is over a named axis")
    return _summed(values, axes, loops)


def _summed(values: np.ndarray, axes: Sequence[int], loops: int) -> np.ndarray | None:
    """Without axes that are summed over; ``None`` where the id varied along them alone."""
    gone = tuple(loops + i for i in axes)
    if all(values.shape[i] == 1 for i in gone):
        return values.squeeze(gone)
    if any(n > 1 for i, n in enumerate(values.shape) if i not in gone):
        raise LostError("it sums over a part of them")
    return None


def _product(eqn, operand, values, output, loops, constant):
    contracted, batch = (sides[operand] for sides in contraction(eqn.params))
    shape = eqn.invars[operand].aval.shape
    free = [i for i in range(len(shape)) if i not in (*contracted, *batch)]
    others = len(eqn.outvars[0].aval.shape) - len(batch) - len(free)
    kept = _summed(values, contracted, loops)
    if kept is None:
        return None
    left = [i for i in range(len(shape)) if i not in contracted]
    order = [left.index(i) for i in (*batch, *free)]
    kept = kept.transpose([*range(loops), *(loops + i for i in order)])
    lead, own = kept.shape[:loops], kept.shape[loops:]
    beside = (1,) * others
    first, second = (own[len(batch) :], beside) if operand == 0 else (beside, own[len(batch) :])
    return kept.reshape(*lead, *own[: len(batch)], *first, *second)


def _sort(eqn, operand, values, output, loops, constant):
    if values.shape[loops + eqn.params["dimension"]] > 1:
        raise LostError("it sorts them")
    return values


def _top_k(eqn, operand, values, output, loops, constant):
    axis = eqn.params.get("axis", -1) % len(eqn.invars[0].aval.shape)
    if values.shape[loops + axis] > 1:
        raise LostError("it sorts them")
    return values


def _of_last_axes(number: Callable[[Any], int]) -> Callable:
    """The rule of an operation that mixes what lies along the last few axes, one problem after the other."""

    def rule(eqn, operand, values, output, loops, constant):
        ndim, mixed = len(eqn.invars[operand].aval.shape), number(eqn)
        lead = loops + ndim - mixed
        if any(n > 1 for n in values.shape[lead:]):
            raise LostError("it mixes them")
        more = len(eqn.outvars[output].aval.shape) - (ndim - mixed)
        return values.reshape(*values.shape[:lead], *(1,) * more)

    return rule


def _convolve(eqn, operand, values, output, loops, constant):
    conv = convolution(eqn.params)
    if operand or conv.batch_groups != 1:
        raise LostError("it mixes them")
    batch, channels, *space = (values.shape[loops + i] for i in conv.inputs)
    if max([1, *space]) > 1:
        raise LostError("it is a convolution over them")
    if channels > 1:
        if batch > 1 or any(n > 1 for n in values.shape[:loops]):
            raise LostError("it sums over a part of them")
        return None
    shape = [1] * len(conv.outputs)
    shape[conv.outputs[0]] = batch
    return values.reshape(*values.shape[:loops], *shape)


def _is_convolution(eqn):
    return eqn.primitive.name == "conv_general_dilated"


def _convolve_positions(eqn, operand, values, output, loops, constant):
    """A convolution gives each position one of its own where it goes over all of them in steps of one, and its window
    holds the position itself."""
    conv = convolution(eqn.params)
    if operand or conv.batch_groups != 1 or any(values.shape[loops + i] > 1 for i in conv.inputs[:2]):
        return _convolve(eqn, operand, values, output, loops, constant)
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    shape = [1] * len(conv.outputs)
    for i, (own, to, kernel) in enumerate(zip(conv.inputs[2:], conv.outputs[2:], conv.kernel[2:], strict=True)):
        if values.shape[loops + own] == 1:
            continue
        reach = (eqn.invars[1].aval.shape[kernel] - 1) * conv.kernel_dilation[i]
        in_step = conv.strides[i] == conv.input_dilation[i] == 1 and before[own] == after[to]
        if not in_step or not 0 <= conv.padding[i][0] <= reach:
            raise LostError("it is a convolution over them that leaves out some, or is ahead of them")
        shape[to] = values.shape[loops + own]
    order = sorted(range(len(conv.inputs) - 2), key=lambda i: conv.outputs[2 + i])
    moved = values.transpose(
        [*range(loops), *(loops + i for i in (*conv.inputs[:2], *(conv.inputs[2 + i] for i in order)))]
    )
    return moved.reshape(*values.shape[:loops], *shape)


def _window(eqn, operand, values, output, loops, constant):
    if operand >= len(eqn.outvars):
        return None
    sizes = eqn.params["window_dimensions"]
    if any(n > 1 and size > 1 for n, size in zip(values.shape[loops:], sizes, strict=True)):
        raise LostError("its windows hold several of them")
    strides, padding = eqn.params["window_strides"], eqn.params["padding"]
    for n, stride, pad in zip(values.shape[loops:], strides, padding, strict=True):
        if n > 1 and (stride != 1 or tuple(pad) != (0, 0)):
            raise LostError("its windows leave out some of them")
    return values


def _drawn(eqn, operand, values, output, loops, constant):
    """Random numbers belong to whom their key belongs to."""
    before, after = (len(x.aval.shape) for x in (eqn.invars[operand], eqn.outvars[output]))
    own = values.shape[loops:]
    if any(n > 1 for n in own[after:]):
        raise LostError("it mixes them")
    return values.reshape(*values.shape[:loops], *own[:after], *(1,) * (after - min(before, after)))


_RULES: dict[str, Callable] = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "tile": _tile,
    "expand_dims": _expand,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _rev,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "dot_general": _product,
    "sort": _sort,
    "top_k": _top_k,
    "conv_general_dilated": _convolve,
    "reduce_window_max": _window,
    "reduce_window_sum": _window,
    "reduce_window_min": _window,
    "dynamic_slice": index_rules.dynamic_slice,
    "dynamic_update_slice": index_rules.dynamic_update_slice,
    "gather": index_rules.gather,
    "scatter": index_rules.scatter,
    "scatter-add": index_rules.scatter,
    "scatter_add": index_rules.scatter,
    **dict.fromkeys(("pmax", "pmin", "psum", "psum_invariant"), _over_a_mesh),
    "fft": _of_last_axes(lambda eqn: len(eqn.params["fft_lengths"])),
    **dict.fromkeys(("cholesky", "eigh", "householder_product", "lu", "qr", "svd"), _of_last_axes(lambda eqn: 2)),
    "triangular_solve": _of_last_axes(lambda eqn: 2),
    "iota": lambda *_: None,
    **dict.fromkeys(
        (
            "random_bits",
            "random_clone",
            "random_fold_in",
            "random_seed",
            "random_split",
            "random_unwrap",
            "random_wrap",
        ),
        _drawn,
    ),
}
