"""What `fisher_jax._support.jax_internals` asks of JAX, one small program for each question: a new JAX that answers
otherwise fails here by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fisher_jax._support import jax_internals as ask

W, X = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((4, 2), np.float32)
IMAGE, KERNEL = np.ones((1, 2, 5, 6), np.float32), np.ones((4, 1, 3, 2), np.float32)
INDICES = np.array([1, 0], np.int32)


def name(eqn):
    return eqn.primitive.name


def body(traced):
    opened, constants = ask.opened(traced)
    return [len(opened.constants), len(constants), len(opened.arguments), [name(e) for e in opened.equations]]


def twice(function):
    rule = jax.custom_jvp(function)
    rule.defjvp(lambda primals, tangents: (function(*primals), tangents[0]))
    return rule


def backwards(function):
    rule = jax.custom_vjp(function)
    rule.defvjp(lambda *args: (function(*args), None), lambda kept, g: (g,))
    return rule


def closing_over(x):
    return jax.jit(lambda y: jnp.sin(y) + x)


def scanned(w, x, length=4):
    """Two constants, one carry, one array scanned over."""
    start, rows = jnp.zeros(3), x
    return jax.lax.scan(lambda c, row: (c + row @ w + w[0], c), start, rows, length=length, reverse=True, unroll=2)


def loop(eqn):
    found = ask.loop(eqn)
    return [found.num_consts, found.num_carry, found.length, found.reverse, found.unroll, body(found.traced)[:3]]


def remat(eqn):
    found = ask.rematerialised(eqn)
    return [found.policy is None, found.prevent_cse, body(found.traced)]


def convolve(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, (1, 2), "VALID", feature_group_count=2)


def convolution(eqn):
    found = ask.convolution(eqn.params)
    return [found.inputs, found.kernel, found.outputs, found.groups, found.batch_groups, found.strides, found.padding]


def contraction(eqn):
    return list(ask.contraction(eqn.params))


PLAIN = {"batching": (), "index_batching": (), "row": None, "column": 0, "clips": False}


def lookup(eqn):
    return ask.lookup(eqn.params, eqn.invars[0].aval.shape)._asdict()


# The question, a program, its arguments, who asks, and the answer about the program's last equation.
ROWS = [
    # Names of operations: what a parameter meets, and what it goes through.
    ("name of a product", lambda w, x: x @ w, (W, X), name, "dot_general"),
    ("name of a lookup", lambda w: w[INDICES], (W,), name, "gather"),
    ("name of a scale", lambda w: w * w, (W,), name, "mul"),
    ("name of a bias", lambda w: w + w, (W,), name, "add"),
    ("name of a difference", lambda w: w - w, (W,), name, "sub"),
    ("name of a quotient", lambda w: w / w, (W,), name, "div"),
    ("name of a negation", lambda w: -w, (W,), name, "neg"),
    ("name of a convolution", convolve, (IMAGE, KERNEL), name, "conv_general_dilated"),
    ("name of a stopped gradient", jax.lax.stop_gradient, (W,), name, "stop_gradient"),
    ("name of a named value", lambda w: checkpoint_name(w, "here"), (W,), name, "name"),
    ("name of a barrier", jax.lax.optimization_barrier, (W,), name, "optimization_barrier"),
    ("name of a transpose", lambda w: w.T, (W,), name, "transpose"),
    ("name of a reshape", lambda w: w.reshape(6), (W,), name, "reshape"),
    ("name of a cast", lambda w: w.astype(jnp.bfloat16), (W,), name, "convert_element_type"),
    ("name of a slice", lambda w: w[:1], (W,), name, "slice"),
    ("name of a split", lambda w: jnp.split(w, 3, 1), (W,), name, "split"),
    ("name of an unpacking", lambda w: jnp.unstack(w, axis=1), (W,), name, "unstack"),
    ("name of a reversal", lambda w: jax.lax.rev(w, (0,)), (W,), name, "rev"),
    ("name of a rounding", lambda w: jax.lax.reduce_precision(w, 8, 7), (W,), name, "reduce_precision"),
    ("name of a copy", jnp.copy, (W,), name, "copy"),
    ("name of a soft cap", jnp.tanh, (W,), name, "tanh"),
    ("name of a sigmoid", jax.lax.logistic, (W,), name, "logistic"),
    # Options of these operations.
    ("axes of a product", lambda w, x: jnp.einsum("bxi,bjx->bij", w, x), (W[None].repeat(2, 0), X.reshape(2, 2, 2)),
     lambda e: sorted(map(sorted, ask.contraction(e.params))), [[(0,), (0,)], [(1,), (2,)]]),
    ("whole rows of a lookup", lambda w: w[INDICES], (W,), lookup,
     {**PLAIN, "axes": (0,), "collapsed": (0,), "sizes": (1, 3), "row": 0, "offset": (1,)}),
    ("single entries of a lookup", lambda w: w[INDICES, INDICES], (W,), lookup,
     {**PLAIN, "axes": (0, 1), "collapsed": (0, 1), "sizes": (1, 1), "offset": ()}),
    ("clipping of a lookup", lambda w: jnp.take(w, INDICES, axis=1, mode="clip"), (W,),
     lambda e: lookup(ask.opened(ask.called(e))[0].equations[-1]),
     {**PLAIN, "axes": (1,), "collapsed": (1,), "sizes": (2, 1), "row": 1, "offset": (0,), "clips": True}),
    ("a lookup that is mapped over", lambda w: jax.vmap(lambda i: jax.lax.dynamic_slice(w, (0, i), (2, 1)))(INDICES),
     (W,), lookup, {**PLAIN, "axes": (0, 1), "collapsed": (), "sizes": (2, 1), "row": 1, "column": 1,
                    "offset": (1, 2), "clips": True}),
    ("axes and groups of a convolution", convolve, (IMAGE, KERNEL), convolution,
     [(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3), 2, 1, (1, 2), ((0, 0), (0, 0))]),
    ("order of a transpose", lambda w: jnp.transpose(w[None], (1, 2, 0)), (W,), ask.permutation, (1, 2, 0)),
    ("axes of a broadcast", lambda w: jax.lax.broadcast_in_dim(w, (5, 2, 3), (1, 2)), (W,),
     ask.broadcast_axes, (1, 2)),
    ("axes of a squeeze", lambda w: jax.lax.squeeze(w, [-2]), (W[:1],), ask.named_axes, (0,)),
    ("axes of a reversal", lambda w: jax.lax.rev(w, (1,)), (W,), ask.named_axes, (1,)),
    ("axis of an unpacking", lambda w: jnp.unstack(w, axis=-1), (W,), ask.unstacked_axis, 1),
    ("bounds of a slice", lambda w: w[:, 1:3], (W,), ask.slice_bounds, ((0, 1), (2, 3), None)),
    # Functions inside of equations.
    ("function of a jit", jax.jit(jnp.sin), (W,), lambda e: body(ask.called(e)), [0, 0, 1, ["sin"]]),
    ("function of a jit that closes over an array", lambda w: closing_over(w)(w), (W,),
     lambda e: body(ask.called(e))[3], ["sin", "add"]),
    ("function of a custom_jvp", twice(jnp.sin), (W,), lambda e: body(ask.inside(e)), [0, 0, 1, ["sin"]]),
    ("function of a custom_vjp", backwards(jnp.sin), (W,), lambda e: body(ask.inside(e)), [0, 0, 1, ["sin"]]),
    ("a custom rule is not opened", twice(jnp.sin), (W,), ask.called, None),
    ("function of a checkpoint", jax.checkpoint(jnp.sin, prevent_cse=False), (W,), remat,
     [True, False, [0, 0, 1, ["sin"]]]),
    ("policy of a checkpoint", jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.dots_saveable), (W,),
     lambda e: remat(e)[:2], [False, True]),
    ("parts of a scan", scanned, (W, X), loop, [1, 1, 4, True, 2, [0, 0, 3]]),
    ("no loop", jnp.sin, (W,), ask.loop, None),
    ("no checkpoint", jnp.sin, (W,), ask.rematerialised, None),
    ("constants of branches", lambda w: jax.lax.cond(w[0, 0] > 0, jnp.sin, jnp.cos, w), (W,),
     ask.has_constants, True),
    ("no constants", jax.jit(jnp.sin), (W,), ask.has_constants, False),
    ("numbers in a program", lambda w: w * 2.0, (W,), lambda e: list(map(ask.is_literal, e.invars)), [False, True]),
    ("value of a number", lambda w: w * 2.0, (W,), lambda e: float(e.invars[1].val), 2.0),
    ("shape of an operand", lambda w: w.T, (W,), lambda e: e.invars[0].aval.shape, (2, 3)),
    ("shape of a result", lambda w: w.T, (W,), lambda e: e.outvars[0].aval.shape, (3, 2)),
    ("line of the user's code", lambda w: w.T, (W,), lambda e: ask.user_line(e)[:21], "test_jax_internals.py"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_jax_answers(row):
    _, program, arguments, question, answer = row
    last = ask.opened(jax.make_jaxpr(program)(*arguments))[0].equations[-1]
    assert question(last) == answer
    assert len(ask.bind(last, [jnp.ones(x.aval.shape, x.aval.dtype) for x in last.invars])) == len(last.outvars)


MOVES = {"transpose", "reshape", "broadcast_in_dim", "squeeze", "convert_element_type", "slice", "split", "unstack",
         "rev", "reduce_precision"}  # fmt: skip


@pytest.mark.parametrize("row", [r for r in ROWS if isinstance(r[4], str) and r[4] in MOVES], ids=lambda r: r[4])
def test_a_layout_operation_is_made_anew_from_its_name_and_parameters(row):
    (last,) = ask.opened(jax.make_jaxpr(row[1])(W))[0].equations[-1:]
    params = {key: x for key, x in last.params.items() if key not in ask.PLACES}
    made = ask.equation(name(last), params, jax.ShapeDtypeStruct(last.invars[0].aval.shape, jnp.float32))
    for got, wanted in zip(ask.bind(made, [jnp.asarray(W)]), ask.bind(last, [jnp.asarray(W)]), strict=True):
        np.testing.assert_array_equal(got, wanted)


PROGRAMS = {
    "with constants": lambda w: w + jnp.asarray(W) * jnp.asarray(W).sum(),
    "with a loop": lambda w: jax.lax.scan(lambda c, row: (c + row * jnp.asarray(W)[0], c), w[0], w),
    "with functions": lambda w: (jax.nn.gelu(w), closing_over(w)(w), w),
    "a number": lambda w: 2.0,
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_an_opened_program_runs_to_the_same_values(program):
    opened, constants = ask.opened(jax.make_jaxpr(program)(W))
    found = jax.jit(lambda constants, w: ask.run(opened, [*constants, w]))(constants, W)
    for got, wanted in zip(found, jax.tree.leaves(program(jnp.asarray(W))), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_an_opened_program_takes_other_constants():
    def outer(w):
        opened, constants = ask.opened(jax.make_jaxpr(lambda x: x + w)(w))
        assert len(opened.constants) == len(constants) == 1
        return ask.run(opened, [3 * w, w])[0]

    np.testing.assert_array_equal(jax.jit(outer)(W), 4 * W)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_types_carry_the_places_of_explicit_axes(kind):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
    place = NamedSharding(mesh, P("x"))
    found = ask.abstract(jax.device_put(W, place))
    assert (found.shape, found.dtype) == (W.shape, W.dtype)
    stacked = ask.stacked(found, 5)
    assert stacked.shape == (5, 2, 3)
    assert ask.unstacked(stacked).shape == W.shape
    if kind == AxisType.Explicit:
        specs = [x.sharding.spec for x in (found, stacked, ask.unstacked(stacked))]
        assert [tuple(s)[:2] for s in specs] == [("x", None), (None, "x"), ("x", None)]
        with jax.set_mesh(mesh):
            assert jax.typeof(ask.zeros(found)).sharding.spec == P("x", None)


def test_types_carry_the_manual_axes_that_arrays_vary_over():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    def zeros(w):
        made = ask.zeros(ask.abstract(w))
        assert jax.typeof(made) == jax.typeof(w)
        return made

    np.testing.assert_array_equal(zeros(W), np.zeros_like(W))


def test_traced_arrays_are_told_from_others():
    seen = []
    jax.jit(lambda w: seen.append(ask.is_traced(w)))(W)
    seen += map(ask.is_traced, (jnp.asarray(W), W, None))
    assert seen == [True, False, False, False]


def test_products_of_groups_of_rows_are_told_from_their_gradients():
    x, w, sizes = np.ones((4, 2), np.float32), np.ones((3, 2, 5), np.float32), np.array([1, 1, 2], np.int32)

    def told(function, *args):
        eqns = jax.make_jaxpr(function)(*args).eqns
        return [ask.is_plain_ragged(eqn) for eqn in eqns if eqn.primitive.name == "ragged_dot_general"]

    assert told(jax.lax.ragged_dot, x, w, sizes) == [True]
    gradient = jax.grad(lambda w: jnp.sum(jax.lax.ragged_dot(x, w, sizes)))
    assert told(gradient, w)[-1] is False
