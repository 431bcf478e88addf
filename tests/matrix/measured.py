"""Run in a process of its own with eight virtual devices; writes one JSON object, a finding for every cell.

Most columns run operation by operation, so that one shares what another has compiled. A loop, a donated state and a
mesh are compiled; there a program that is not optimised is ready much sooner.
"""

import contextlib
import functools
import json
import sys
import tempfile
import time

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fisher_jax as fj
from tests.eight_devices import FLAGS
from tests.matrix import cases, table
from tests.matrix.rows import Row
from tests.matrix.table import COLUMNS, ROWS, Refusal, kind_of

# Newer compilers know no other way.
FASTEST = FLAGS + (" --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else "")
MESHES = {"Auto mesh": AxisType.Auto, "Explicit mesh": AxisType.Explicit}
COMPILED = ("scan", "donation", *MESHES)
# Where a draw has other numbers than the plain model's, the mean of many is compared.
DRAWN = ("mask", "rows that interact", "bfloat16", "x64")


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


@functools.cache
def one_draw(name: str, column: str):
    """Of the plain model on one device."""
    with jax.disable_jit():
        return measure(ROWS[name], cases.case(column))[0]


def measure(row: Row, case: cases.Case, column: str = "") -> tuple:
    """One step from an empty state, read; and whether the state was donated.

    For a checkpoint the state is saved and restored, and must go on as the one that was saved.
    """
    state = None if row.begin is None else row.begin(case)
    begun = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array) and x.ndim]
    state = row.step(case, state)
    if column.startswith("checkpoint"):
        with tempfile.TemporaryDirectory() as folder:
            fj.checkpoint.save(f"{folder}/state", state)
            restored = fj.checkpoint.restore(f"{folder}/state", like=state if "like" in column else None)
        if row.begin is not None:
            on, wanted = (row.read(case, row.step(case, x)) for x in (restored, state))
            np.testing.assert_array_equal(on, wanted)
        state = restored
    return row.read(case, state), any(x.is_deleted() for x in begun)


def cell(name: str, column: str, right) -> dict:
    """How far a cell is from what is right, or the error."""
    row, case = ROWS[name], cases.case(column)
    try:
        if row.draws is not None and column in DRAWN:
            with jax.disable_jit():
                largest, root = table.of_draws(row.draws(case), row.right(right), slack=case.rtol)
            return {"largest": largest, "root": root}
        around, case = on_mesh(column, case)
        with around, jax.disable_jit(column not in COMPILED):
            found, donated = measure(row, case, column)
        wanted = row.right(right) if row.draws is None else one_draw(name, table.same_draws(column))
        return {"distance": table.distance(found, wanted), "rtol": case.rtol, "donated": donated}
    except Exception as error:  # a finding like any other: the test that reads it fails with these words
        return {"failed": f"{type(error).__name__}: {error}"[:1500]}


def main(*columns: str):
    assert jax.device_count() == 8
    found = {}
    for column in columns or COLUMNS:
        with table.precision(column):
            right = table.wanted(column)
            for name in ROWS:
                kind, why = kind_of(name, column)
                if kind == "no meaning" and not isinstance(why, Refusal):
                    continue
                began = time.process_time()
                one = cell(name, column, right) | {"seconds": round(time.process_time() - began, 2)}
                found[f"{name}, {column}"] = one
                if columns:
                    print(f"{name}, {column}: {one}", file=sys.stderr, flush=True)  # noqa: T201
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
