"""A program is gone through once; what is known of it holds no arrays, and goes with who asked."""

import ast
import gc
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._tracing.program import trace
from fisher_jax._tracing.structure import Structure, Structures

PACKAGE = Path(fj.__file__).parent
BATCH = fj.Batch(jnp.arange(6).reshape(2, 3), jnp.array([[1, 2, 0], [0, 1, 1]]))
KEY = jax.random.key(0)


def params():
    return {"embed": jnp.ones((6, 4)), "w": jnp.ones((4, 4)), "b": jnp.ones(4), "head": jnp.ones((4, 3))}


def model(params, tokens):
    return jnp.tanh(params["embed"][tokens] @ params["w"] + params["b"]) @ params["head"]


def walks():
    return sum(x.walks for x in gc.get_objects() if isinstance(x, Structures))


def fisher(**options):
    estimator = fj.group_fisher(model, example=BATCH, **options)

    def step(state, params):
        return estimator.update(estimator.init(params) if state is None else state, params, BATCH, KEY)

    return step


def curvature(make):
    tx = make(model, example=BATCH, refresh=fj.Refresh(period=1))

    def step(state, params):
        return tx.update(params, tx.init(params) if state is None else state, params, batch=BATCH, key=KEY)[1]

    return step


def captured():
    run = fj.capture(lambda params: jnp.sum(model(params, BATCH.inputs)))
    return lambda state, params: run(params)


def blocks():
    stream = fj.spectra.block_spectra(model, example=BATCH, stacked=True, max_scores=8)
    return lambda state, params: stream.update(stream.init(params) if state is None else state, params, BATCH)


USERS = {
    "signs of rows": lambda: fisher(groups="row"),
    "rows alone": lambda: fisher(groups="row", estimator="sequence"),
    "exact": lambda: fisher(groups="column", estimator="exact"),
    "head": lambda: fisher(groups="row", estimator="head"),
    "K-FAC": lambda: curvature(fj.scale_by_kfac),
    "K-FAC's optimizer": lambda: curvature(fj.kfac),
    "capture": captured,
    "blocks": blocks,
}


@pytest.mark.parametrize("name", USERS)
def test_an_unchanged_program_is_gone_through_once(name):
    step = USERS[name]()
    state = step(None, params())
    before = walks()
    for scale in (1.1, 1.2):
        state = step(state, jax.tree.map(lambda x, scale=scale: x * scale, params()))
    assert before > 0
    assert walks() == before


def test_a_changed_program_is_gone_through_again():
    structures, order = Structures(), [np.arange(3)]

    def moved(params, tokens):
        return model(params, tokens[:, order[0]])

    def structure(batch=BATCH):
        return trace(moved, params(), (batch.inputs,), None, structures, None).structure

    first = structure()
    assert structure() is first
    order[0] = order[0][::-1].copy()
    assert structure() is not first
    assert structures.walks == 2
    longer = fj.Batch(jnp.ones((2, 3), int)[:, :2], None)
    order[0] = np.arange(2)
    assert structure(longer).outputs[0].shape == (2, 2, 3)
    assert structures.walks == 3


def test_indices_that_a_program_holds_are_compared_by_value():
    structures = Structures()

    def with_order(order):
        return trace(
            lambda p, x: model(p, x[:, jnp.asarray(order)]), params(), (BATCH.inputs,), None, structures, None
        )

    first, same, other = (with_order(order).structure for order in ([0, 1, 2], [0, 1, 2], [2, 1, 0]))
    assert first is same
    assert first is not other


@pytest.mark.parametrize("name", USERS)
def test_nothing_keeps_the_parameters(name):
    step, own = USERS[name](), params()
    jax.block_until_ready(step(None, own))
    kept = [weakref.ref(x) for x in own.values()]
    del own
    gc.collect()
    assert not [x for x in kept if x() is not None]


class Module:
    """As of equinox: a model with arrays, called, and not to be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, params, tokens):
        return model(params, tokens) * self.scale


def test_many_functions_leave_nothing_behind():
    gc.collect()
    before = sum(isinstance(x, Structure) for x in gc.get_objects())
    own = params()
    for i in range(1000):
        fj.capture(lambda p, i=i: jnp.sum(p["w"]) * i)(own)
    for i in range(20):
        fj.group_fisher(Module(i), example=BATCH, groups="row").init(own)
    gc.collect()
    assert sum(isinstance(x, Structure) for x in gc.get_objects()) == before


def test_one_function_walks_jaxprs_and_one_reads_dimension_numbers():
    walkers, readers = [], []
    for file in PACKAGE.rglob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                over = node.iter if isinstance(node, ast.For | ast.comprehension) else None
                if over is not None and any(
                    isinstance(x, ast.Attribute) and x.attr in ("equations", "eqns") for x in ast.walk(over)
                ):
                    walkers.append(function.name)
                if isinstance(node, ast.Subscript) and getattr(node.slice, "value", None) == "dimension_numbers":
                    readers.append(function.name)
    assert set(walkers) == {"walk"}
    assert readers == ["_numbers"]
