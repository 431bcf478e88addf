"""Along which axes an array varies that no data went into, so that a place in the batch can be told from its row."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fisher_jax._support.jax_internals import (
    broadcast_axes,
    contraction,
    convolution,
    lookup,
    named_axes,
    permutation,
    unstacked_axis,
)
from fisher_jax._tracing.id_rules import axis_groups, is_cumulative, is_elementwise, is_reduction, moves_nothing

__all__ = ["Axes", "everywhere", "is_followed", "of_value", "varied"]

# For each loop and each axis of an array, whether its entries differ along it.
Axes = tuple[bool, ...]


def everywhere(shape: Sequence[int], loops: int = 0) -> Axes:
    """Nothing is known but lengths."""
    return (*(True,) * loops, *(n > 1 for n in shape))


def of_value(value: np.ndarray) -> Axes:
    return tuple(n > 1 and not bool((value == value.take([0], i)).all()) for i, n in enumerate(value.shape))


def varied(eqn: Any, given: Sequence[Axes], loops: int) -> list[Axes]:
    """Axes along which the results of an equation vary, from those of its operands."""
    found = []
    for output, var in enumerate(eqn.outvars):
        shape = getattr(var.aval, "shape", ())
        own = [one[loops:] for one in given]
        rule = _rule(eqn.primitive.name)
        lead = tuple(any(one[i] for one in given) for i in range(loops))
        tail = _anywhere(eqn, given, len(shape)) if rule is None else rule(eqn, own, output)
        found.append((*lead, *(x and n > 1 for x, n in zip(tail, shape, strict=True))))
    return found


def is_followed(name: str) -> bool:
    """Whether it is known which axes of an operation's results come from which of its operands'."""
    return _rule(name) is not None


def _rule(name: str) -> Callable | None:
    if moves_nothing(name):
        return lambda eqn, own, output: own[output]
    if is_elementwise(name):
        return _elementwise
    if is_reduction(name):
        return _reduced
    if is_cumulative(name):
        return lambda eqn, own, output: _with(own[0], (int(eqn.params["axis"]),))
    return _RULES.get(name)


def _anywhere(eqn: Any, given: Sequence[Axes], ndim: int) -> Axes:
    """Of an operation of which nothing is known: it makes differences out of differences, or out of nothing."""
    makes = not given or eqn.primitive.name.startswith(("random", "rng")) or eqn.effects
    return (bool(makes or any(map(any, given))),) * ndim


def _any(parts: Sequence[Axes]) -> Axes:
    return tuple(map(any, zip(*parts, strict=True)))


def _with(own: Axes, axes: Sequence[int]) -> Axes:
    return tuple(x or i in axes for i, x in enumerate(own))


def _elementwise(eqn, own, output):
    ndim = len(eqn.outvars[output].aval.shape)
    return _any([one if len(one) == ndim else (False,) * ndim for one in own])


def _reduced(eqn, own, output):
    axes = eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]
    return tuple(x for i, x in enumerate(own[output]) if i not in axes)


def _reshaped(eqn, own, output):
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    found = [True] * len(after)
    for old, new in axis_groups(before, after):
        for i in new:
            found[i] = any(own[0][j] for j in old)
    return tuple(found)


def _broadcast(eqn, own, output):
    found = [False] * len(eqn.outvars[0].aval.shape)
    for i, to in enumerate(broadcast_axes(eqn)):
        found[to] = own[0][i]
    return tuple(found)


def _expanded(eqn, own, output):
    left = iter(own[0])
    return tuple(False if i in named_axes(eqn) else next(left) for i in range(len(eqn.outvars[0].aval.shape)))


def _product(eqn, own, output):
    (left, right), (first, second) = contraction(eqn.params)
    batch = [own[0][i] or own[1][j] for i, j in zip(first, second, strict=True)]
    free = [x for i, x in enumerate(own[0]) if i not in (*left, *first)]
    return (*batch, *free, *(x for i, x in enumerate(own[1]) if i not in (*right, *second)))


def _gathered(eqn, own, output):
    picked = lookup(eqn.params, eqn.invars[0].aval.shape)
    ndim = len(eqn.outvars[0].aval.shape)
    found = [False] * ndim
    outer = [i for i in range(ndim) if i not in picked.offset]
    for to, x in zip(outer, own[1][:-1], strict=True):
        found[to] |= x
    slices = [i for i in range(len(own[0])) if i not in (*picked.collapsed, *picked.batching)]
    for i, to in zip(slices, picked.offset, strict=True):
        found[to] |= own[0][i]
    for i, j in zip(picked.batching, picked.index_batching, strict=True):
        found[outer[j]] |= own[0][i]
    return tuple(found)


def _convolved(eqn, own, output):
    conv = convolution(eqn.params)
    found = [True] * len(conv.outputs)
    found[conv.outputs[0]] = own[0][conv.inputs[0]] or conv.batch_groups != 1
    return tuple(found)


def _last_axes(number: Callable[[Any], int]) -> Callable:
    """The rule of an operation on the last few axes, one problem after the other."""

    def rule(eqn, own, output):
        ndim = len(eqn.outvars[output].aval.shape)
        apart = max(map(len, own)) - number(eqn)
        lead = _any([one[:apart] for one in own if len(one) >= apart])
        return (*lead, *(True,) * (ndim - apart))

    return rule


def _stacked(eqn: Any, own: Axes) -> Axes:
    axis = int(eqn.params["axis"]) % (len(own) + 1)
    return (*own[:axis], True, *own[axis:])


def _written(eqn, own, output):
    cut = [i for i, (a, b) in enumerate(zip(*(x.aval.shape for x in eqn.invars[:2]), strict=True)) if a != b]
    return _with(_any(own[:2]), cut)


def _counted(eqn, own, output):
    return _with((False,) * len(eqn.outvars[0].aval.shape), (int(eqn.params["dimension"]),))


_RULES: dict[str, Callable] = {
    "transpose": lambda eqn, own, output: tuple(own[0][i] for i in permutation(eqn)),
    "reshape": _reshaped,
    "broadcast_in_dim": _broadcast,
    "squeeze": lambda eqn, own, output: tuple(x for i, x in enumerate(own[0]) if i not in named_axes(eqn)),
    "expand_dims": _expanded,
    **dict.fromkeys(("slice", "split", "rev", "dynamic_slice", "tile"), lambda eqn, own, output: own[0]),
    "unstack": lambda eqn, own, output: tuple(x for i, x in enumerate(own[0]) if i != unstacked_axis(eqn)),
    "concatenate": lambda eqn, own, output: _with(_any(own), (int(eqn.params["dimension"]),)),
    "stack": lambda eqn, own, output: _stacked(eqn, _any(own)),
    "pad": lambda eqn, own, output: _with(
        own[0], [i for i, widths in enumerate(eqn.params["padding_config"]) if any(widths)]
    ),
    "dynamic_update_slice": _written,
    "dot_general": _product,
    "gather": _gathered,
    "iota": _counted,
    "conv_general_dilated": _convolved,
    "sort": lambda eqn, own, output: _with(_any(own), (int(eqn.params["dimension"]),)),
    **dict.fromkeys(
        ("reduce_window_max", "reduce_window_min", "reduce_window_sum"),
        lambda eqn, own, output: _with(
            own[output], [i for i, n in enumerate(eqn.params["window_dimensions"]) if n > 1]
        ),
    ),
    "fft": _last_axes(lambda eqn: len(eqn.params["fft_lengths"])),
    **dict.fromkeys(
        ("cholesky", "eigh", "householder_product", "lu", "qr", "svd", "triangular_solve"), _last_axes(lambda eqn: 2)
    ),
}
