"""What is kept of each use, formed inside its backward pass: second moments of inputs and of output gradients."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from fisher_jax._support.dtypes import wide
from fisher_jax._support.jax_internals import lookup
from fisher_jax._support.placement import spec_of
from fisher_jax._tracing.dense import by_expert, matrices, operand_axes, ragged_matrices
from fisher_jax._tracing.ids import Lost
from fisher_jax._tracing.places import (
    UnfollowedError,
    input_token_axes,
    is_at_outputs,
    of_real_positions,
    of_rows,
    of_tokens,
)
from fisher_jax._tracing.program import Tap, applied
from fisher_jax._tracing.uses import Segment, Use
from fisher_jax.kronecker.blocks.convolution import patches
from fisher_jax.kronecker.blocks.layout import through
from fisher_jax.kronecker.blocks.plan import Block, Rules
from fisher_jax.kronecker.blocks.slices import in_order, is_sliced
from fisher_jax.kronecker.factors.forms import subsample

__all__ = ["COLUMNS", "Masks", "combine", "diagonal_of", "lookups", "observations", "places", "statistic"]

Tree = Any
_HIGHEST = jax.lax.Precision.HIGHEST
# Statistics with one column for each token; all others are sums.
COLUMNS = ("U", "inputs")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weights", "real", "offsets"], meta_fields=["rows", "weighted"]
)
@dataclasses.dataclass(frozen=True)
class Masks:
    """What counts.

    Attributes:
        weights: of the tokens' losses, any shape.
        real: of the positions ``[rows, ...]``; ``None`` where all are real.
        offsets: uniform numbers that place subsampled columns, see `factors.subsample`.
        rows: number of rows of the batch.
        weighted: whether the batch has weights.
    """

    weights: Array
    real: Array | None
    offsets: Array
    rows: int
    weighted: bool


def statistic(tap: Tap, block: Block, masks: Masks, rules: Rules) -> Tree:
    """Sums over the positions of one use; a dict of arrays."""
    assert tap.inputs is not None
    assert tap.cotangents is not None
    if block.kind == "diagonal":
        return _diagonal(tap, masks.weights.ndim)
    if tap.leaf != block.leaf:  # a bias: its statistics are those of its kernel
        return {}
    if tap.kind == "embedding":
        return _embedding(tap, block, masks, rules)
    a, g, mask = observations(tap, block, masks, rules)
    A = jnp.einsum("bti,btj->bij", a * mask[..., None], a, precision=_HIGHEST)
    met = jnp.swapaxes(a * (mask > 0).astype(a.dtype)[..., None], 1, 2)
    return {"A": A, "count": mask.sum(1), **_outputs(g, met, block, masks, rules)}


def observations(tap: Tap, block: Block, masks: Masks, rules: Rules) -> tuple[Array, Array, Array]:
    """Of a product or convolution: inputs ``[batch, T, in]`` and the bias's 1, output gradients, weights in ``A``
    ``[batch, T]``. Of an expert only those of the tokens that it was given: its gradient is zero at all others."""
    assert tap.inputs is not None
    assert tap.cotangents is not None
    rows = {"conv": patches, "ragged": ragged_matrices}.get(tap.kind, matrices)
    a, g = rows(tap.use, (wide(tap.inputs[0]), *tap.inputs[1:]), wide(tap.cotangents))
    a, g = by_expert(tap.use, a, g) if tap.kind == "dense" else (a, g)
    mask = jnp.broadcast_to(_mask(tap, masks).astype(a.dtype), a.shape[:2])
    # What does not count may be NaN, as an attention over nothing is.
    a = jnp.where((mask > 0)[..., None], a, jnp.zeros_like(a))
    if (experts := tap.use.experts) is not None:
        given = jnp.any(g != 0, -1) & (jnp.any(a != 0, -1) if experts.by_input or experts.inputs else True)
        mask = mask * given
        a, g = (jnp.where(given[..., None], x, jnp.zeros_like(x)) for x in (a, g))
    if rules.shared == "reduce" and not is_at_outputs(tap.use):
        a, g, mask = _reduce(tap, a, g, mask, masks.rows)
    if block.bias is not None:
        a = jnp.concatenate([a, jnp.ones((*a.shape[:2], 1), a.dtype)], -1)
    return a, g, mask


def places(tap: Tap, block: Block, rules: Rules) -> Tree:
    """Where the arrays of `statistic` lie: columns stay spread over the output units, all else is everywhere."""
    everywhere = PartitionSpec()
    if block.kind == "diagonal":
        return {"squares" if tap.kind in ("scale", "bias") else "gradient": everywhere}
    if tap.leaf != block.leaf:
        return {}
    table = tap.kind == "embedding"
    if table and block.kind == "tied":
        return {"frequency": everywhere, "positions": everywhere, "square": everywhere}
    outputs = {"U": everywhere if table else _unit_places(tap)} if block.low_rank else {"G": everywhere}
    if block.low_rank and block.is_corrected(rules):
        outputs["inputs"] = everywhere
    inputs = ("frequency", "positions") if table else ("A", "count")
    return {**dict.fromkeys(inputs, everywhere), **outputs}


def _unit_places(tap: Tap) -> PartitionSpec:
    """Of ``[batch, out, T]``, where the output units are one axis of the cotangents."""
    spec = spec_of(tap.cotangents)
    if tap.kind == "conv":
        return PartitionSpec()
    _, _, outputs = operand_axes(tap.use)
    if len(outputs) != 1 or tap.use.index != 1 or not len(spec):
        return PartitionSpec()
    return PartitionSpec(None, spec[-1], None)


def _outputs(g: Array, met: Array, block: Block, masks: Masks, rules: Rules) -> dict[str, Array]:
    """``U`` or ``G`` from output gradients ``[batch, tokens, out]``, not yet divided by the weight.

    With columns whose eigenvalues are corrected the inputs ``met [batch, in, tokens]`` stay beside them.
    """
    if not block.low_rank:
        return {"G": jnp.einsum("bti,btj->bij", g, g, precision=_HIGHEST)}
    columns = {"U": jnp.swapaxes(g, 1, 2)}
    return capped(columns | {"inputs": met} if block.is_corrected(rules) else columns, rules, masks)


def capped(columns: dict[str, Array], rules: Rules, masks: Masks) -> dict[str, Array]:
    """Of each matrix at most ``token_cap`` tokens, the same in all of its arrays."""
    cap = rules.token_cap
    if cap is None:
        return columns
    names = ["U", *(name for name in columns if name != "U")]
    kept = jax.vmap(lambda U, *beside: subsample(U, cap, masks.offsets, *beside))(*(columns[n] for n in names))
    return dict(zip(names, kept, strict=True))


def _embedding(tap: Tap, block: Block, masks: Masks, rules: Rules) -> Tree:
    """Frequencies of the rows looked up, and output gradients."""
    rows, g, mask = lookups(tap, block, masks)
    if block.kind == "tied":
        found = {"square": jnp.sum(g**2)}
        size = block.units
    else:
        size = block.width
        # Of what is padding no row at all.
        found = _outputs(g, jnp.where(mask > 0, rows, size)[None, None], block, masks, rules)
    frequency = jnp.zeros(size, g.dtype).at[rows].add(mask, mode="drop")
    return {"frequency": frequency, "positions": mask.sum(), **found}


def lookups(tap: Tap, block: Block, masks: Masks) -> tuple[Array, Array, Array]:
    """Of an embedding: the rows looked up ``[T]``, output gradients ``[1, T, width]``, and weights in ``A``."""
    assert tap.cotangents is not None
    (indices,) = tap.inputs or ()
    picked = lookup(tap.use.options, tap.use.operand.shape)
    g = wide(jnp.moveaxis(tap.cotangents, picked.offset, range(-len(picked.offset), 0)))
    rows = indices[..., picked.column].ravel()
    if picked.clips:
        rows = jnp.clip(rows, 0, block.width - 1 if block.kind == "embedding" else block.units - 1)
    g = g.reshape(1, rows.size, -1)
    mask = _mask(tap, masks).astype(g.dtype)
    return rows, g, mask


def _shape(tap: Tap) -> tuple[int, ...]:
    """Of what a use meets, along which its tokens lie, without loops."""
    assert tap.inputs is not None
    return jnp.shape(jnp.asarray(tap.cotangents) if tap.kind == "conv" else tap.inputs[0])


def _is_lost(tap: Tap) -> bool:
    return any(one.kind == "token" and isinstance(one, Lost) for one in tap.use.ids)


def _mask(tap: Tap, masks: Masks) -> Array:
    """Weight of every token of a use in the moments of its inputs: the loss's at the head, else real or not."""
    shape = _shape(tap)
    at_outputs = is_at_outputs(tap.use) and (masks.weighted or not _is_lost(tap))
    try:
        if at_outputs:
            return of_tokens(tap.use, shape, masks.weights, tap.iteration)
        if masks.real is not None:
            return of_real_positions(tap.use, shape, masks.real, tap.iteration)
    except UnfollowedError as error:
        what = "the weights of the loss" if at_outputs else "the padding mask Batch.real"
        raise ValueError(
            f"{what} cannot be laid on the tokens of {tap.path}{_place(tap)}: {error}; "
            + _say_positions(tap, masks.weights.shape if at_outputs or masks.real is None else jnp.shape(masks.real))
            + ("" if at_outputs else ", or leave out Batch.real where nothing is padding")
        ) from None
    return jnp.ones(math.prod(shape[i] for i in input_token_axes(tap.use, len(shape))))


def _place(tap: Tap) -> str:
    return f" at {tap.use.where}" if tap.use.where else ""


def _say_positions(tap: Tap, lead: tuple[int, ...]) -> str:
    """The ways out where it is not known whose tokens a use has."""
    shape = _shape(tap)
    tokens = input_token_axes(tap.use, len(shape))
    fitting = [axes for axes in itertools.permutations(tokens, len(lead)) if tuple(shape[i] for i in axes) == lead]
    say = f"say with fj.Curvature(positions={{{tap.path!r}: axes}}) which axes of what it meets, {list(shape)}, are "
    say += f"(row, position), such as {fitting[0]}" if fitting else "rows, (row,)"
    return (
        f"{say}, or None if it has no tokens; or give it a diagonal with diagonal=lambda path: path == {tap.path!r}"
    )


def _reduce(tap: Tap, a: Array, g: Array, mask: Array, rows: int) -> tuple[Array, Array, Array]:
    """One observation for each row: the mean of its inputs, the sum of its output gradients."""
    if "shared" in tap.use.loops:
        raise ValueError(
            f'shared="reduce" sums over the positions of a row, and {tap.path} meets them one after the other in a '
            f'loop at {tap.use.where}: use shared="expand", or diagonal= of fj.Curvature'
        )
    try:
        row = of_rows(tap.use, _shape(tap)) if rows > 1 else np.zeros(a.shape[1], np.int32)
    except UnfollowedError as error:
        raise ValueError(
            f'shared="reduce" needs the row of every token of {tap.path}{_place(tap)}: {error}; '
            + _say_positions(tap, (rows,))
        ) from None
    count = _by_row(mask[..., None], row, rows)
    mean = _by_row(a * mask[..., None], row, rows) / jnp.where(count > 0, count, 1)
    return mean, _by_row(g, row, rows), (count > 0).astype(mask.dtype)[..., 0]


def _by_row(x: Array, row: np.ndarray, rows: int) -> Array:
    """Sums of the tokens of each row; tokens lie along the last axis but one."""
    axis = x.ndim - 2
    if np.array_equal(row, np.repeat(np.arange(rows), row.size // rows)):
        return x.reshape(*x.shape[:axis], rows, -1, *x.shape[axis + 1 :]).sum(axis + 1)
    shape = (*x.shape[:axis], rows, *x.shape[axis + 1 :])
    return jnp.zeros(shape, x.dtype).at[(slice(None),) * axis + (row,)].add(x)


def combine(statistics: list[tuple[Use, Tree]], block: Block, masks: Masks, rules: Rules) -> dict[str, Array]:
    """Sums over loops and uses of one leaf: ``A [N, in, in]``, ``G [N, out, out]`` or ``U [N, out, T]``."""
    parts = [_over_loops(use, found) for use, found in statistics]
    uses = [use for use, _ in statistics]
    found = parts[0]
    if is_sliced(uses[0], block.use):
        return {name: jnp.concatenate([parts[i][name] for i in in_order(uses)]) for name in found}
    for part in parts[1:]:
        found = {k: jnp.concatenate([v, part[k]], -1) if k in COLUMNS else v + part[k] for k, v in found.items()}
    out = {}
    for name, x in found.items():
        last = {"A": 2, "G": 2, "U": 2, "inputs": 2, "frequency": 1}.get(name, 0)
        out[name] = x.reshape(-1, *x.shape[x.ndim - last :])
    columns = {name: x for name, x in out.items() if name in COLUMNS}
    return out | capped(columns, rules, masks) if columns else out


def _over_loops(use: Use, found: Tree) -> Tree:
    """Sum over loops that share the parameter; their columns lie side by side."""
    for axis in reversed(range(len(use.loops))):
        if use.loops[axis] == "shared":
            found = {name: _beside(x, axis) if name in COLUMNS else x.sum(axis) for name, x in found.items()}
    return found


def _beside(U: Array, axis: int) -> Array:
    moved = jnp.moveaxis(U, axis, -2)
    return moved.reshape(*moved.shape[:-2], -1)


def _diagonal(tap: Tap, lead: int) -> Tree:
    """Of scales and biases the squares of every token's gradient, summed; of other uses the gradient of the batch."""
    assert tap.cotangents is not None
    use, g = tap.use, wide(tap.cotangents)
    if tap.kind in ("scale", "bias"):
        by_entry = g * wide(tap.inputs[0]) if tap.kind == "scale" and tap.inputs else g
        return {"squares": _back(use.segments[-1], _squares(tap, by_entry, lead))}
    if use.apply is not None:
        zeros = jnp.zeros(use.operand.shape, use.operand.dtype)
        _, pullback = jax.vjp(lambda w: applied(use, w, tap.inputs or ()), zeros)
        (g,) = pullback(tap.cotangents)
    return {"gradient": _back(use.segments[-1], wide(g))}


def _squares(tap: Tap, x: Array, lead: int) -> Array:
    """Of an operand that was broadcast: a token's gradient is the sum over all of its entries, such as heads.

    Where rows and positions are lost, the axes are theirs if there are no more than the ``lead`` ones of the loss.
    Where a product has summed positions away, as the dispatch to slots of an expert does, nobody knows whether an
    axis that is left is of tokens.
    """
    use = tap.use
    broadcast = {i for i in input_token_axes(use, x.ndim) if x.shape[i] > 1}
    lost = next((one for one in use.ids if isinstance(one, Lost)), None)
    tokens = {i - len(use.loops) for one in use.ids if not isinstance(one, Lost) for i in one.axes} & broadcast
    if lost is not None:
        if len(broadcast) > lead and len(tokens) < lead:
            raise ValueError(
                f"the gradient of {tap.path}{_place(tap)} is summed over axes {sorted(broadcast)} of its output "
                f"{list(x.shape)}, and which of them are rows and positions is lost in {lost}; say with "
                f"fj.Curvature(positions={{{tap.path!r}: axes}}) which they are"
            )
        tokens = broadcast
    elif lead == 2 and {one.kind for one in use.ids if not isinstance(one, Lost)} == {"row"} and broadcast - tokens:
        raise ValueError(
            f"the gradient of {tap.path}{_place(tap)} is summed over axes {sorted(broadcast)} of its output "
            f"{list(x.shape)}; {sorted(tokens)} are rows, a product has summed positions away, and it is "
            f"not known whether {sorted(broadcast - tokens)} holds tokens (slots of an expert) or not (heads): say "
            f"with fj.Curvature(positions={{{tap.path!r}: axes}}) which axes are"
        )
    by_token = x.sum(tuple(broadcast - tokens), keepdims=True)
    return jnp.sum(by_token**2, tuple(tokens), keepdims=True).reshape(use.operand.shape)


def _back(segment: Segment, x: Array) -> Array:
    """The transpose of a chain of layout operations, in the dtype of ``x``."""
    like = jax.ShapeDtypeStruct(segment.source.shape, x.dtype)
    (found,) = jax.linear_transpose(lambda y: through(segment, y), like)(x)
    return found


def diagonal_of(statistics: list[tuple[Use, Tree]]) -> Array:
    """Squares in the shape of the leaf, from those of its uses."""
    squares = [_to_leaf(use, found["squares"]) for use, found in statistics if "squares" in found]
    gradients = [_to_leaf(use, found["gradient"]) for use, found in statistics if "gradient" in found]
    if gradients:
        squares.append(functools.reduce(jnp.add, gradients) ** 2)
    return functools.reduce(jnp.add, squares)


def _to_leaf(use: Use, x: Array) -> Array:
    """From one array for each iteration of the loops to the leaf."""
    for depth in reversed(range(len(use.loops))):
        x = x.sum(depth) if use.loops[depth] == "shared" else x
        back = functools.partial(_back, use.segments[depth])
        for _ in range(depth):
            back = jax.vmap(back)
        x = back(x)
    return x
