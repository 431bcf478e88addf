"""Along which axes of a parameter the experts of a mixture lie."""

from collections.abc import Sequence

from fisher_jax._tracing.axes import UntraceableError, trace_axes
from fisher_jax._tracing.dense import operand_axes
from fisher_jax._tracing.uses import Spec, Use

__all__ = ["expert_axes"]


def expert_axes(specs: Sequence[Spec]) -> tuple[int, ...]:
    """Axes of a leaf that experts lie along, and those of loops over them; none of a leaf that is no expert's.

    Raises:
        UntraceableError: experts that are a part of an axis, or that another use does not keep apart.
    """
    found = [_of_use(spec.use) for spec in specs if spec.use.kind != "generic"]
    if all(spec.use.experts is None for spec in specs):
        return ()
    if len(set(found)) > 1 or len(found) < len(specs):
        raise UntraceableError(f"it is used otherwise too, at {' and '.join(sorted({s.use.where for s in specs}))}")
    return found[0]


def _of_use(use: Use) -> tuple[int, ...]:
    if use.experts is None:
        return ()
    if use.kind == "embedding":
        own = tuple(i for i, role in enumerate(use.roles) if role == "row")
    else:
        own = (*operand_axes(use)[0], *use.experts.outputs, *use.experts.inputs)
    axes, taken = trace_axes(use)
    kept = set(taken)
    for atom in (atom for i in own for atom in axes[i]):
        if not atom.whole or atom.size != use.segments[0].source.shape[atom.axis]:
            raise UntraceableError("they are a part of an axis")
        kept.add(atom.axis)
    return tuple(sorted(kept))
