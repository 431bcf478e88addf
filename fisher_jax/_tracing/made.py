"""The product of a parameter that an array comes from, entry by entry."""

import dataclasses

from fisher_jax._tracing.ids import Ids
from fisher_jax._tracing.uses import Data, Use

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
        cap: how far ``c * tanh(z / c)`` has come, and ``c``.
        other: an operation that followed and is no part of a soft cap.
    """

    leaf: int
    use: Use
    axes: tuple[Ids, ...]
    sizes: tuple[int, ...]
    met: int
    bias: int | None = None
    after: bool = False
    cap: tuple[str, float] | None = None
    other: str | None = None
    loops: int = 0

    def same(self, other: "Made") -> bool:
        """Whether both are parts of one array."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "axes"]
        return all(getattr(self, name) == getattr(other, name) for name in names)


def followed(made: Made, name: str, others: list, index: int) -> Made:
    """A product after one more elementwise operation; what a soft cap is made of is recognised."""
    stage, cap = made.cap or ("", 0.0)
    number = float(others[0]) if len(others) == 1 and not isinstance(others[0], Data) else None
    if made.other is None:
        if not made.after and number and (name == "mul" or (name == "div" and index == 0)):
            return dataclasses.replace(made, after=True, cap=("scaled", number if name == "div" else 1 / number))
        if stage == "scaled" and name == "tanh":
            return dataclasses.replace(made, cap=("bounded", cap))
        if stage == "bounded" and name == "mul" and number and abs(cap / number - 1) < 1e-6:
            return dataclasses.replace(made, cap=("capped", number))
    return dataclasses.replace(made, after=True, other=made.other or name)
