"""The product of a parameter that an array comes from, entry by entry."""

import dataclasses
import math

from fisher_jax._tracing.ids import Ids
from fisher_jax._tracing.uses import Data, Use, real_number

__all__ = ["Made", "followed"]


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A product of a parameter, and what happened to it entry by entry.

    Attributes:
        leaf, use: of the product.
        axes: for each axis of its output the place along it, as ids of kind 0, 1, ....
        sizes: lengths of these axes.
        met: number of axes of what the parameter meets (of the output, for a convolution).
        loops: number of axes before those of its output, for the iterations of loops that it is in.
        bias: leaf of the bias that was added to it.
        after: whether anything but a bias followed.
        scale, cap: it became ``cap * tanh(scale * z / cap)``, or ``scale * z`` where ``cap`` is ``None``.
        other: an operation that followed and is no part of these.
    """

    leaf: int
    use: Use
    axes: tuple[Ids, ...]
    sizes: tuple[int, ...]
    met: int
    bias: int | None = None
    after: bool = False
    scale: float = 1.0
    cap: float | None = None
    other: str | None = None
    loops: int = 0

    def same(self, other: "Made") -> bool:
        """Whether both are parts of one array."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "axes"]
        return all(getattr(self, name) == getattr(other, name) for name in names)


def followed(made: Made, name: str, others: list, index: int) -> Made:
    """A product after one more elementwise operation; a scale and what a soft cap is made of are recognised."""
    number = real_number(others[0]) if len(others) == 1 and not isinstance(others[0], Data) else None
    if made.other is None:
        # A cap is symmetric, so the sign of a number is one of the scale.
        if number and math.isfinite(number) and (name == "mul" or (name == "div" and index == 0)):
            factor = number if name == "mul" else 1 / number
            cap = None if made.cap is None else made.cap * abs(factor)
            return dataclasses.replace(made, after=True, scale=made.scale * factor, cap=cap)
        if made.cap is None and name == "tanh":
            return dataclasses.replace(made, after=True, cap=1.0)
    return dataclasses.replace(made, after=True, other=made.other or name)
