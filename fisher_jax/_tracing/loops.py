"""What is known of an array, into the body of a loop and out of it: one axis more, of iterations, before its own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from fisher_jax._tracing import rows
from fisher_jax._tracing.ids import Carried, Ids, Link, Lost, along
from fisher_jax._tracing.made import Made
from fisher_jax._tracing.uses import Data, Known, View
from fisher_jax._tracing.variation import everywhere

__all__ = [
    "after_loop",
    "as_data",
    "begun",
    "entered",
    "kept_between",
    "linked",
    "made_in_each",
    "renewed",
    "same",
    "unstable",
]


def entered(x: Any, kind: Any, how: str, loops: int) -> Any:
    """What the body of a loop sees of a constant, or of a slice, of type ``kind``."""
    if isinstance(x, View):
        return x.inside(entered(x.value, kind, how, loops), how)
    if isinstance(x, Known):
        return Known(entered(x.value, kind, how, loops), x.params)
    if not isinstance(x, Data):
        return x
    if how == "stacked":
        return Data(kind, x.ids, units=x.units, links=x.links, varies=x.varies, drawn=x.drawn)
    units = tuple(Ids(one.kind, np.expand_dims(one.values, loops)) for one in x.units)
    return dataclasses.replace(beside_loop(x, kind, loops), constant=x.constant, units=units)


def beside_loop(x: Data, kind: Any, loops: int) -> Data:
    """What is the same in every iteration of a loop inside of ``loops`` others."""
    ids = tuple(y if isinstance(y, Lost) else Ids(y.kind, np.expand_dims(y.values, loops)) for y in x.ids)
    axes = everywhere(getattr(x.type, "shape", ()), loops) if x.varies is None else x.varies
    return Data(kind, ids, links=x.links, varies=(*axes[:loops], False, *axes[loops:]), drawn=x.drawn)


def made_in_each(made: Made | None, length: int, loops: int) -> Made | None:
    """A product in the iterations of a loop, whose results lie side by side."""
    if made is None or made.use.loops[loops:][: 1 + made.loops].count("shared") != 1 + made.loops:
        return None
    (ndim,) = {x.values.ndim - loops for x in made.axes} or {1}
    steps = along(f"iteration {made.loops}", np.arange(length), [0], ndim, loops)
    return dataclasses.replace(made, axes=(steps, *made.axes), sizes=(length, *made.sizes), loops=made.loops + 1)


def begun(x: Any, kind: Any, loops: int) -> Data:
    """What the body of a loop sees of its state."""
    return beside_loop(as_data(x), kind, loops)


def after_loop(x: Data, loops: int) -> Data:
    ids = tuple(y if isinstance(y, Lost) else Ids(y.kind, y.values.squeeze(loops)) for y in x.ids)
    axes = None if x.varies is None else (*x.varies[:loops], *x.varies[loops + 1 :])
    return dataclasses.replace(x, ids=ids, varies=axes)


def renewed(x: Data, kind: Any, eqn: Any, made: Made | None = None) -> Data:
    """The same array as the result of an equation."""
    return Data(kind, x.ids, made, maker=eqn, links=x.links, varies=x.varies, drawn=x.drawn)


def as_data(x: Any) -> Data:
    return x if isinstance(x, Data) else Data(jax.typeof(x), constant=lambda: x)


def linked(x: Data, links: tuple[Link, ...]) -> Data:
    return dataclasses.replace(x, links=rows.strongest(x.links, links))


def same(a: Data, b: Data) -> bool:
    alike = bool(b.ids or b.links) or a.varies == b.varies
    return alike and same_ids(a.ids, b.ids) and a.links == b.links


def kept_between(carried: Carried, loops: int, eqn: Any, line: Callable) -> Carried:
    """Of what a loop hands on: its state belongs to no position of its own, but must belong to one row."""
    found: list[Ids | Lost] = []
    for x in carried:
        if isinstance(x, Lost) or x.values.shape[loops] == 1:
            found.append(x)
        elif x.kind == "row":
            found.append(Lost(x.kind, eqn.primitive.name, line(eqn), "it goes from one row to the next"))
    return tuple(found)


def same_ids(a: Carried, b: Carried) -> bool:
    if len(a) != len(b):
        return False
    return all(
        (isinstance(x, Lost) and isinstance(y, Lost) and x.kind == y.kind)
        or (isinstance(x, Ids) and isinstance(y, Ids) and x.kind == y.kind and x.same(y))
        for x, y in zip(a, b, strict=True)
    )


def unstable(before: Carried, after: Carried, eqn: Any, line: Callable) -> Carried:
    if same_ids(before, after):
        return after
    kinds = dict.fromkeys(x.kind for x in after)
    return tuple(Lost(kind, eqn.primitive.name, line(eqn), "they move from round to round") for kind in kinds)
