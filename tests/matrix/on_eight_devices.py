"""Run in a process of its own with eight virtual devices; writes one JSON object of findings to standard output."""

import contextlib
import functools
import json
import sys
from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.matrix import cases, table
from tests.matrix.table import APART, ROWS

MESHES = {"Auto mesh": AxisType.Auto, "Explicit mesh": AxisType.Explicit}


def on_mesh(column: str, case: cases.Case) -> tuple[contextlib.AbstractContextManager, cases.Case]:
    """Rows over four devices, the outputs of the layers over two."""
    if column not in MESHES:
        return contextlib.nullcontext(), case
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(MESHES[column],) * 2)
    kernel, bias = P(None, "model"), P("model")
    specs = {"embed": P(), "layer1": {"w": kernel, "b": bias}, "layer2": {"w": kernel, "b": bias}, "head": P()}
    params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), case.params, specs)
    batch = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), case.batch)
    return jax.set_mesh(mesh), case._replace(params=params, batch=batch)


def measured(name: str, column: str, right, draws: Callable) -> dict:
    """How far a cell is from what is right, or the error."""
    row, result = ROWS[name], {}
    context, case = on_mesh(column, cases.case(column))
    try:
        with context:
            state = None if row.begin is None else row.begin(case)
            begun = jax.tree.leaves(state)
            state = row.step(case, state)
            found = row.read(case, state)
            result["donated"] = any(isinstance(x, jax.Array) and x.ndim and x.is_deleted() for x in begun)
    except Exception as error:  # a finding like any other: the test that reads it fails with these words
        return {"failed": f"{type(error).__name__}: {error}"[:1500]}
    wanted = row.right(right) if row.draws is None else draws(name)
    return result | {"distance": table.distance(found, wanted)}


@functools.cache
def one_draw(name: str):
    """Of the plain model on one device, operation by operation."""
    with jax.disable_jit():
        return table.measure(ROWS[name], cases.case(table.same_draws("Auto mesh")))


def main():
    assert jax.device_count() == 8
    found = {}
    for column in APART:
        right = table.wanted(column)
        for name in ROWS:
            if table.kind_of(name, column)[0] != "no meaning":
                found[f"{name}, {column}"] = measured(name, column, right, one_draw)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
