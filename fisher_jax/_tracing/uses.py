"""Where a parameter came from: the chain of layout operations and loops between a leaf and its use."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from fisher_jax._support.jax_internals import abstract, bind, brought_out, is_traced, stacked, struct
from fisher_jax._support.outline import outline
from fisher_jax._tracing.ids import Carried, Ids, Link

__all__ = [
    "Data",
    "Experts",
    "Known",
    "Part",
    "Segment",
    "Spec",
    "Step",
    "Use",
    "View",
    "alike",
    "constant_of",
    "plain",
    "real_number",
    "shape_of",
    "signature",
]

Tree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One layout operation."""

    eqn: Any
    output: int = 0

    def __call__(self, x: Array) -> Array:
        return bind(self.eqn, [x])[self.output]

    def key(self) -> tuple:
        return (*signature(self.eqn), self.output)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A chain of layout operations, from one array to one array."""

    source: jax.ShapeDtypeStruct
    steps: tuple[Step, ...] = ()

    def __call__(self, x: Array) -> Array:
        return brought_out(functools.reduce(lambda value, step: step(value), self.steps, x))

    def transpose(self, cotangent: Array) -> Array:
        if not self.steps:
            return cotangent
        (result,) = jax.linear_transpose(self, self.source)(cotangent)
        return result

    def key(self) -> tuple:
        return (self.source.shape, str(self.source.dtype), *(step.key() for step in self.steps))


def signature(eqn: Any) -> tuple:
    return (eqn.primitive.name, str(sorted(eqn.params.items())), *(str(atom.aval) for atom in eqn.invars))


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What the program says a use is in an attention.

    Attributes:
        name: ``query``, ``key`` or ``value`` (its output units belong to heads), ``output`` (its inputs do).
        axes: of the operand, along which these units or inputs lie.
        heads: the head of each of them, int32 over ``axes``; -1 of those in none.
        number: of heads.
        where: the line at which queries meet keys.
        attention: which attention of the program.
    """

    name: str
    axes: tuple[int, ...]
    heads: np.ndarray
    number: int
    where: str
    attention: int


@dataclasses.dataclass(frozen=True)
class Experts:
    """What is known of a dense use that gates let through, see `fisher_jax._tracing.routing`.

    Attributes:
        outputs, inputs: axes of the operand, beside those that the product keeps apart, along which experts lie:
            among its output units, and among what it contracts.
        by_input: whether a gate has gone over what it meets, and not over its output.
    """

    outputs: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    by_input: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """Static facts of one use: how the parameter got there, and the operation that is linear in it.

    Two uses are equal if they compute the same at the same line, so that taps of two traces of one loss have the
    same tree structure.

    Attributes:
        kind: ``dense``, ``embedding``, ``scale``, ``bias``, ``conv``, ``ragged`` (a matrix for each group of rows)
            or ``generic``.
        primitive, where: the JAX operation and the line of the user's code.
        segments: layout chains; between two of them lies a loop.
        loops: for every loop, outermost first, ``"stacked"`` (each iteration has its own slice: layers) or
            ``"shared"`` (all iterations use the same numbers: time). Inputs and cotangents have these leading axes.
        operand: shape and dtype of the parameter where it is used.
        apply: ``apply(operand, *inputs) -> output``, linear in the operand up to a constant; ``None`` for generic.
        roles: what each axis of the operand is: ``row`` (output unit), ``column`` (input), ``both`` (scales, and
            axes that a product keeps apart), ``window`` (of a convolution), ``grouped`` (inputs of one group of a
            grouped convolution); empty for generic.
        index, options: which operand of the operation the parameter is, and the operation's own options (a
            ``dot_general``'s ``dimension_numbers``).
        signature: of the operation, for comparison.
        order: its place among all uses of the program.
        factor, moved: what the numbers of the leaf are multiplied with on the way, and whether nothing else happened
            to them; see `View`. Not compared.
        ids: whose row and position every token of the use is: of what the parameter meets (of the output, for a
            convolution), see `fisher_jax._tracing.ids`. Not compared.
        parts: what it is in attentions. Not compared.
        follows: leaves whose products it meets (a bias: is added to), with no product between. Not compared.
        same_for_all: whether what it meets is made of constants: the same for every row. Not compared.
        experts: see `Experts`; ``None`` where no gate decides over it. Not compared.
    """

    kind: str
    primitive: str
    where: str
    segments: tuple[Segment, ...]
    loops: tuple[str, ...]
    operand: jax.ShapeDtypeStruct
    apply: Callable | None
    roles: tuple[str, ...] = ()
    index: int = 0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    signature: tuple = ()
    order: int = 0
    factor: float = 1.0
    moved: bool = True
    ids: Carried = ()
    parts: tuple[Part, ...] = ()
    follows: frozenset[int] = frozenset()
    experts: Experts | None = None
    same_for_all: bool = False

    @property
    def is_followed(self) -> bool:
        """Whether anything is known of rows and positions."""
        return any(one.kind in ("row", "position") for one in self.ids)

    def __repr__(self) -> str:
        return outline(self)

    def _key(self):
        operand = (self.operand.shape, str(self.operand.dtype))
        chains = tuple(segment.key() for segment in self.segments)
        return (self.kind, self.where, self.loops, operand, self.signature, chains)

    def __eq__(self, other):
        return isinstance(other, Use) and self._key() == other._key()

    def __hash__(self):
        return hash((self.kind, self.where, self.loops, self.operand.shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """What stands for an array in a survey: its type, and what is known without running anything.

    Attributes:
        type: of the array.
        ids: whose row and position every entry is.
        made: the product of a parameter that it comes from, entry by entry.
        constant: gives its value, where it is a constant of the program.
        maker: the equation that it comes from.
        units: of which products its entries are made, see `fisher_jax._tracing.attention`.
        tokens: of each product that its entries come from, one by one, the token; ids of kind ``(leaf, use)``.
        links: what it depends on beside its own row, see `fisher_jax._tracing.rows`.
        varies: of what no data went into, along which axes its entries differ, those of loops first; ``None``: any.
        drawn: where random numbers in it were drawn.
        parts: of vectors of indices, their components.
    """

    type: Any
    ids: Carried = ()
    made: Any = None
    constant: Callable[[], Any] | None = None
    maker: Any = None
    units: tuple[Ids, ...] = ()
    tokens: Carried = ()
    links: tuple[Link, ...] = ()
    varies: tuple[bool, ...] | None = None
    drawn: str = ""
    parts: tuple["Data", ...] = ()


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter leaf on its way through the program: ``value = factor * segments(leaf) + constant``.

    ``moved`` where that is ``segments(leaf)``: nothing but its layout and dtype was changed.
    """

    value: Any
    leaf: int
    segments: tuple[Segment, ...]
    loops: tuple[str, ...] = ()
    factor: float = 1.0
    moved: bool = True

    @classmethod
    def of(cls, value: Any, leaf: int) -> "View":
        return cls(value, leaf, (Segment(shape_of(value)),))

    def through(self, value: Any, step: Step) -> "View":
        last = dataclasses.replace(self.segments[-1], steps=(*self.segments[-1].steps, step))
        return dataclasses.replace(self, value=value, segments=(*self.segments[:-1], last))

    def scaled(self, value: Any, factor: float | None = None) -> "View":
        """After arithmetic with numbers; without a factor nothing happened to it."""
        if factor is None:
            return dataclasses.replace(self, value=value)
        return dataclasses.replace(self, value=value, factor=self.factor * factor, moved=False)

    def inside(self, value: Any, loop: str) -> "View":
        """The view that the body of a loop has of this one."""
        segments = (*self.segments, Segment(shape_of(value)))
        return dataclasses.replace(self, value=value, segments=segments, loops=(*self.loops, loop))


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that no data went into: a function of constants, and of parameters where ``params``."""

    value: Any
    params: bool


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
    return struct(x.type) if isinstance(x, Data) else abstract(x)


def real_number(x: Any) -> float | None:
    """A number of the program; ``None`` for a complex one."""
    return None if np.iscomplexobj(x) else float(x)


def constant_of(x: Any) -> np.ndarray | None:
    """The value of what is a constant of the program; else ``None``."""
    if not isinstance(x, Data):
        return np.asarray(x)
    if x.constant is None:
        return None
    value = x.constant()
    return None if is_traced(value) else np.asarray(value)


def plain(x: Any) -> Any:
    return x.value if isinstance(x, View | Known) else x


def alike(x: Any, value: Any) -> Any:
    """``value``, known where ``x`` is known."""
    return Known(value, x.params) if isinstance(x, Known) else value


@dataclasses.dataclass(frozen=True)
class Spec:
    """A use that was found: its leaf, static facts, and the shapes that its tap will have.

    ``lengths`` are those of ``use.loops``, the leading axes of ``output`` and ``inputs``.
    """

    leaf: int
    use: Use
    output: jax.ShapeDtypeStruct
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    lengths: tuple[int, ...] = ()

    def stacked(self, length: int) -> "Spec":
        def stack(tree):
            return jax.tree.map(lambda x: stacked(x, length), tree)

        return dataclasses.replace(
            self,
            output=stack(self.output),
            inputs=stack(self.inputs),
            lengths=(length, *self.lengths),
        )
