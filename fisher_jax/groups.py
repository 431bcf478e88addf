"""Groups of parameters: over which axes of a kernel squared scores are summed."""

import dataclasses

__all__ = ["Group", "column", "param", "resolve", "row", "tensor"]


@dataclasses.dataclass(frozen=True)
class Group:
    """One reduction of the squared scores of a kernel ``[out, in]``; squares are *summed* within a group.

    Example:
        >>> import fisher_jax as fj
        >>> fj.groups.row.name
        'row'
    """

    name: str


param = Group("param")
"""Every entry is its own group."""
row = Group("row")
"""One group per output unit; for ``lm_head`` one per vocabulary token."""
column = Group("column")
"""One group per input feature."""
tensor = Group("tensor")
"""The whole kernel is one group."""

_ALL = {group.name: group for group in (param, row, column, tensor)}


def resolve(group: "Group | str") -> Group:
    """A group from itself or from its name.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import fisher_jax as fj
        >>> fj.groups.resolve("row") is fj.groups.row
        True
    """
    name = group.name if isinstance(group, Group) else group
    if name not in _ALL:
        raise ValueError(f"groups is one of {', '.join(_ALL)}, found {name!r}")
    return _ALL[name]
