"""The plan: which block of curvature every parameter gets. Nothing is left out silently."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from fisher_jax._support import jax_internals
from fisher_jax._tracing.axes import UntraceableError, roles_of_leaf
from fisher_jax._tracing.dense import block_axes, operand_axes
from fisher_jax._tracing.places import is_at_outputs
from fisher_jax._tracing.structure import Structure
from fisher_jax._tracing.uses import Spec, Use
from fisher_jax.kronecker.blocks import convolution, slices
from fisher_jax.kronecker.blocks.layout import is_rearrangement, unit_axes
from fisher_jax.kronecker.options import Curvature

__all__ = ["EIGEN_LIMIT", "Block", "Rules", "plan"]

# Output factors above this size are never formed under policy="auto" and "hybrid".
EIGEN_LIMIT = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules(Curvature):
    """What the user chose, for the leaves that there are."""

    follow: Callable[[str], bool] = lambda path: True
    devices: int = 1  # over which the rows of a batch are spread inside shard_map


@dataclasses.dataclass(frozen=True)
class Block:
    """The block of one parameter leaf, or of a kernel with its bias.

    Attributes:
        kind: ``dense`` (convolutions too), ``embedding``, ``tied``, ``diagonal``, ``unused`` or ``frozen`` (not a
            floating leaf).
        path, leaf: of the kernel.
        use: of the kernel; the dense one of a tied leaf; of an array whose slices are kernels that of all of them.
        bias, bias_use: of the bias that makes the inputs homogeneous.
        number: of matrices: layers of a stack times experts and axes that a product keeps apart.
        units, width: output and input size of each, the bias not counted.
        head: whether its outputs are the outputs of the model.
        low_rank: whether ``G`` is kept as columns; there are ``columns`` of them.
    """

    kind: str
    path: str
    leaf: int
    use: Use | None = None
    bias: int | None = None
    bias_use: Use | None = None
    number: int = 1
    units: int = 0
    width: int = 0
    head: bool = False
    low_rank: bool = False
    columns: int = 0

    @property
    def is_kronecker(self) -> bool:
        return self.kind in ("dense", "embedding", "tied")

    def is_corrected(self, rules: Rules) -> bool:
        """Whether its eigenvalues are corrected (EK-FAC)."""
        return self.is_kronecker and rules.corrects(self.path)

    def needs_taps(self, rules: Rules) -> bool:
        """Whether these need the raw taps; the inputs of a kernel's columns are kept beside them instead."""
        return self.is_corrected(rules) and not (self.kind == "dense" and self.low_rank)


def plan(found: Structure, leaves: list, paths: list[str], rules: Rules) -> tuple[Block, ...]:
    """A block for every leaf that is to be followed.

    Raises:
        ValueError: a leaf without a block, named with the operation, its line and the way out.
    """
    uses = [found.uses(i) for i in range(len(leaves))]
    blocks = {}
    for i, (leaf, path) in enumerate(zip(leaves, paths, strict=True)):
        if rules.follow(path):
            blocks[i] = _block(i, path, leaf, uses[i], found, rules)
    for kernel, bias in found.biases.items():
        if kernel not in blocks or bias not in blocks or len(uses[kernel]) != 1:
            continue
        joined = _with_bias(blocks[kernel], blocks[bias], uses[bias])
        if joined is not None:
            blocks[kernel] = joined
            del blocks[bias]
    for block in blocks.values():
        _check_correction(block, rules)
    return tuple(blocks.values())


def _check_correction(block: Block, rules: Rules) -> None:
    """Nothing stays uncorrected silently."""
    closed_form = block.head and rules.estimator == "exact_head"
    if not block.is_corrected(rules) or (block.kind != "tied" and not closed_form):
        return
    reason = (
        "an embedding tied to its head is a sum of two products without common eigenvectors"
        if block.kind == "tied"
        else "estimator='exact_head' has the head's output factor in closed form, without gradients of tokens"
    )
    raise ValueError(
        f"the eigenvalues of {block.path} cannot be corrected: {reason}; leave it as it is with "
        f"eigenvalue_correction=lambda path: path != {block.path!r}"
    )


def _block(leaf: int, path: str, x: Any, uses: list[Spec], found: Structure, rules: Rules) -> Block:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return Block("frozen", path, leaf)
    if not uses:
        return Block("unused", path, leaf)
    kinds = [spec.use.kind for spec in uses]
    if not rules.is_diagonal(path) and path not in dict(rules.positions or {}):
        _check_rows(path, uses, found)
    if rules.is_diagonal(path) or set(kinds) <= {"scale", "bias"}:
        return Block("diagonal", path, leaf, uses[0].use)
    if set(kinds) == {"dense"} and (whole := slices.joined([spec.use for spec in uses])) is not None:
        return _dense(Block("dense", path, leaf, whole), x, uses[:1], found, rules)
    for spec in uses:
        _check(path, spec)
    if set(kinds) in ({"dense"}, {"conv"}, {"ragged"}):
        return _dense(Block("dense", path, leaf, uses[0].use), x, uses, found, rules)
    if set(kinds) == {"embedding"}:
        return _embedding(Block("embedding", path, leaf, uses[0].use), uses, rules)
    if sorted(kinds) == ["dense", "embedding"]:
        dense, table = sorted(uses, key=lambda spec: spec.use.kind)
        if _roles(path, dense.use, x.ndim) != _roles(path, table.use, x.ndim):
            raise ValueError(
                f"{path} is an embedding whose rows are not the output units of its dense use at {dense.use.where}; "
                f"{_way_out(path)}"
            )
        return _dense(Block("tied", path, leaf, dense.use), x, [dense], found, rules)
    raise ValueError(f"{path} is used in ways that share no Kronecker block: {', '.join(kinds)}; {_way_out(path)}")


def _check_rows(path: str, uses: list[Spec], found: Structure) -> None:
    """Raise where a use is the same for all rows: its gradient is their sum, of which the square is no Fisher.

    Of data that the program holds itself no rows are known.
    """
    if not any(spec.use.is_followed for spec in found.survey.specs):
        return
    for use in (spec.use for spec in uses):
        kinds = {one.kind for one in use.ids}
        without = "row" not in kinds and (use.kind in ("embedding", "scale", "bias") or "position" in kinds)
        if use.same_for_all and without and found.outputs[0].shape[0] > 1:
            way = (
                "slice it, as table[:length], or look it up for every row, with indices of the shape of the tokens"
                if use.kind == "embedding"
                else "let it meet the data first"
            )
            raise ValueError(
                f"K-FAC has no block for {path}: it meets constants alone ({use.primitive} at {use.where}), the same "
                f"for every row, so that the gradients of rows are summed before they can be squared; {way}, or "
                f"{_way_out(path)}"
            )


def _check(path: str, spec: Spec) -> None:
    use = spec.use
    place = f" at {use.where}" if use.where else ""
    if use.kind not in ("dense", "embedding", "conv", "ragged"):
        what = f"a use of kind {use.kind} ({use.primitive})"
        raise ValueError(f"K-FAC has no block for {path}: {what}{place}; {_way_out(path)}")
    if use.kind == "conv" and (groups := jax_internals.convolution(use.options).batch_groups) != 1:
        raise ValueError(
            f"K-FAC has no block for {path}: a convolution that groups examples (batch_group_count="
            f"{groups}){place}; {_way_out(path)}"
        )
    if use.kind == "embedding" and use.experts is not None and len(use.operand.shape) > 2:
        raise ValueError(
            f"K-FAC has no block for {path}: every token looks up the matrices of its experts{place}, which have "
            f"no inputs there; multiply tokens by them in place (docs/models.md), or {_way_out(path)}"
        )
    if not is_rearrangement(use):
        raise ValueError(
            f"K-FAC has no block for {path}: only a slice, or a repetition, of it is used at {use.where}; "
            f"{_way_out(path)}"
        )


def _way_out(path: str) -> str:
    if "batch_stats" in path or "BatchStat" in path:
        return "running statistics are no parameters: leave them outside, in a closure (docs/models.md)"
    return (
        f"give it a diagonal with diagonal=lambda path: path == {path!r}, or another optimizer through "
        "optax.multi_transform"
    )


def _roles(path: str, use: Use, ndim: int) -> tuple:
    try:
        return roles_of_leaf(use, ndim)
    except UntraceableError as reason:
        raise ValueError(f"K-FAC has no block for {path}: {reason} at {use.where}; {_way_out(path)}") from None


def _dense(block: Block, x: Any, uses: list[Spec], found: Structure, rules: Rules) -> Block:
    if len(uses) > 1:
        loops = {spec.use.loops for spec in uses}
        if len({_roles(block.path, spec.use, x.ndim) for spec in uses}) > 1 or len(loops) > 1:
            raise ValueError(f"{block.path} is used both as it is and transposed; {_way_out(block.path)}")
    assert block.use is not None
    _, units, width = _sizes(block.use)
    tokens = sum(map(_tokens, uses))
    head = all(is_at_outputs(spec.use) for spec in uses)
    if rules.shared == "reduce" and len(uses) > 1 and not head:
        raise ValueError(
            f'shared="reduce" sums over the positions of a row, and {block.path} meets them in {len(uses)} uses '
            f'({", ".join(spec.use.where for spec in uses)}): use shared="expand", or {_way_out(block.path)}'
        )
    number = math.prod(x.shape) // (width * units)
    block = dataclasses.replace(block, number=number, units=units, width=width, head=head)
    return _with_policy(block, tokens, rules)


def _sizes(use: Use) -> tuple[int, int, int]:
    """Matrices kept apart, and outputs and inputs of each."""
    if use.kind == "conv":
        return convolution.sizes(use)
    batch, inside, out = block_axes(use)
    apart, units, width = (math.prod(use.operand.shape[i] for i in axes) for axes in (batch, out, inside))
    return apart, units, width


def _tokens(spec: Spec) -> int:
    """Columns that this use gives to each output factor."""
    shape = spec.use.operand.shape
    if spec.use.kind == "conv":
        groups, out, _ = convolution.sizes(spec.use)
        size = groups * out
    else:
        batch, _, outputs = operand_axes(spec.use)
        size = math.prod(shape[i] for i in (*batch, *outputs))
    repeats = math.prod(n for n, loop in zip(spec.lengths, spec.use.loops, strict=True) if loop == "shared")
    stacks = math.prod(n for n, loop in zip(spec.lengths, spec.use.loops, strict=True) if loop == "stacked")
    return math.prod(spec.output.shape) // (stacks * repeats * size) * repeats


def _embedding(block: Block, uses: list[Spec], rules: Rules) -> Block:
    (use, *rest) = [spec.use for spec in uses]
    if rest or use.loops:
        raise ValueError(f"{block.path} is looked up at several places or in a loop; {_way_out(block.path)}")
    rows = math.prod(n for n, role in zip(use.operand.shape, use.roles, strict=True) if role == "row")
    width = math.prod(use.operand.shape) // rows
    block = dataclasses.replace(block, units=width, width=rows)
    return _with_policy(block, math.prod(uses[0].output.shape) // width, rules)


def _with_policy(block: Block, tokens: int, rules: Rules) -> Block:
    tokens *= rules.devices
    columns = tokens if rules.token_cap is None else min(tokens, rules.token_cap)
    large = block.units > EIGEN_LIMIT
    low_rank = {"all": True, "never": False, "hybrid": large, "auto": large or tokens < block.units}[rules.policy]
    return dataclasses.replace(block, low_rank=low_rank, columns=columns if low_rank else 0)


def _with_bias(kernel: Block, bias: Block, uses: list[Spec]) -> Block | None:
    """The kernel's block with the bias in it; ``None`` where the bias keeps its own diagonal."""
    if kernel.kind != "dense" or bias.kind != "diagonal" or len(uses) != 1 or kernel.use is None:
        return None
    (use,) = [spec.use for spec in uses]
    apart, units, _ = _sizes(kernel.use)
    if use.kind != "bias" or use.loops != kernel.use.loops or apart != 1 or kernel.use.index != 1:
        return None
    if kernel.use.experts is not None and kernel.use.experts.by_input:
        return None  # it is added for tokens that the kernel does not see
    try:
        own = unit_axes(use)
    except UntraceableError:
        return None
    shape = use.operand.shape
    last = tuple(range(len(shape) - len(own), len(shape)))
    wanted = (convolution.channel_axis(kernel.use),) if kernel.use.kind == "conv" else last
    if math.prod(shape[i] for i in own) != units or (own != wanted and units > 1):
        return None
    return dataclasses.replace(kernel, bias=bias.leaf, bias_use=use)
