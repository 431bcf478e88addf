"""Ids of rows and positions, carried through a program, against running the program on the ids themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_jax._tracing.ids import NOBODY, Ids, Lost
from fisher_jax._tracing.program import trace

ROWS, LENGTH, WIDTH = 4, 6, 3


def structure_of(function, lead, *arrays):
    return trace(lambda params, *xs: function(*xs), {}, arrays, lead=lead).structure


def ids_of(function, lead, *arrays):
    """Ids of the result by kind."""
    return {one.kind: one for one in structure_of(function, lead, *arrays).ids[0]}


@st.composite
def layouts(draw):
    """A chain of layout operations, as a function of one array, and what it is."""
    shape = [ROWS, LENGTH, WIDTH]
    steps = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(
            ["transpose", "reshape", "flip", "roll", "slice", "take", "expand", "squeeze", "repeat", "concatenate",
             "pad", "broadcast", "split", "dynamic_slice", "update"]
        ))  # fmt: skip
        axis = draw(st.integers(0, len(shape) - 1)) if shape else None
        if axis is None:
            break
        n = shape[axis]
        if kind == "transpose":
            order = draw(st.permutations(range(len(shape))))
            steps.append(lambda x, order=order: jnp.transpose(x, order))
            shape = [shape[i] for i in order]
        elif kind == "reshape" and len(shape) > 1 and draw(st.booleans()):
            i = draw(st.integers(0, len(shape) - 2))
            shape = [*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]]
            steps.append(lambda x, shape=tuple(shape): x.reshape(shape))
        elif kind == "reshape":
            inner = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
            shape = [*shape[:axis], n // inner, inner, *shape[axis + 1 :]]
            steps.append(lambda x, shape=tuple(shape): x.reshape(shape))
        elif kind == "flip":
            steps.append(lambda x, axis=axis: jnp.flip(x, axis))
        elif kind == "roll":
            by = draw(st.integers(0, n))
            steps.append(lambda x, axis=axis, by=by: jnp.roll(x, by, axis))
        elif kind == "slice":
            stride = draw(st.integers(1, 2))
            start = draw(st.integers(0, n - 1))
            cut = [slice(None)] * axis + [slice(start, None, stride)]
            steps.append(lambda x, cut=tuple(cut): x[cut])
            shape[axis] = len(range(start, n, stride))
        elif kind == "take":
            index = np.array(draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=6)))
            steps.append(lambda x, axis=axis, index=index: jnp.take(x, jnp.asarray(index), axis))
            shape[axis] = len(index)
        elif kind == "expand":
            steps.append(lambda x, axis=axis: jnp.expand_dims(x, axis))
            shape.insert(axis, 1)
        elif kind == "squeeze" and n == 1 and len(shape) > 1:
            steps.append(lambda x, axis=axis: jnp.squeeze(x, axis))
            del shape[axis]
        elif kind == "repeat":
            steps.append(lambda x, axis=axis: jnp.repeat(x, 2, axis))
            shape[axis] *= 2
        elif kind == "concatenate":
            steps.append(lambda x, axis=axis: jnp.concatenate([jnp.flip(x, axis), x], axis))
            shape[axis] *= 2
        elif kind == "pad":
            low, high, inside = draw(st.integers(-1, 2)), draw(st.integers(-1, 2)), draw(st.integers(0, 1))
            if low + high + (n - 1) * (inside + 1) + 1 < 1:
                continue
            widths = [(0, 0, 0)] * axis + [(low, high, inside)] + [(0, 0, 0)] * (len(shape) - axis - 1)
            steps.append(lambda x, w=tuple(widths): jax.lax.pad(x, jnp.asarray(NOBODY, x.dtype), w))
            shape[axis] = low + high + (n - 1) * (inside + 1) + 1
        elif kind == "broadcast":
            shape = [2, *shape]
            steps.append(lambda x, shape=tuple(shape): jnp.broadcast_to(x, shape))
        elif kind == "split" and n > 1:
            steps.append(lambda x, axis=axis: jnp.split(x, [1], axis)[1])
            shape[axis] -= 1
        elif kind == "dynamic_slice":
            size = draw(st.integers(1, n))
            start = draw(st.integers(0, n))
            steps.append(lambda x, axis=axis, a=start, b=size: jax.lax.dynamic_slice_in_dim(x, a, b, axis))
            shape[axis] = size
        elif kind == "update" and n > 1:
            steps.append(
                lambda x, axis=axis, n=n: jax.lax.dynamic_update_slice_in_dim(
                    x, jax.lax.slice_in_dim(x, 0, 1, axis=axis), n - 1, axis
                )
            )
        if int(np.prod(shape)) > 3000:
            break

    def chain(x):
        for step in steps:
            x = step(x)
        return x

    return chain


@settings(max_examples=500, deadline=None)
@given(layouts())
def test_layout_operations_move_ids_as_they_move_values(chain):
    x = jnp.zeros((ROWS, LENGTH, WIDTH))
    row, position, _ = np.indices(x.shape)
    found = ids_of(chain, (ROWS, LENGTH), x)
    for kind, values in (("row", row), ("position", position)):
        wanted = np.asarray(chain(jnp.asarray(values, jnp.int32)))
        if kind not in found:
            assert (wanted == NOBODY).all()
            continue
        assert isinstance(found[kind], Ids), found[kind]
        ids = np.broadcast_to(found[kind].values, wanted.shape)
        known = wanted != NOBODY
        np.testing.assert_array_equal(ids[known], wanted[known])


X = jnp.ones((ROWS, LENGTH, WIDTH))


def full(ids, shape):
    return np.broadcast_to(ids.values, shape)


def test_attention_keeps_the_ids_of_its_queries():
    def attention(x):
        scores = jnp.einsum("bqd,bkd->bqk", x, x)
        scores = jnp.where(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), scores, -1e9)
        return jax.nn.softmax(scores) @ jnp.flip(x, 1)[:, ::-1]

    found = ids_of(attention, (ROWS, LENGTH), X)
    np.testing.assert_array_equal(full(found["position"], X.shape), np.indices(X.shape)[1])
    np.testing.assert_array_equal(full(found["row"], X.shape), np.indices(X.shape)[0])


def test_scores_of_queries_and_keys_carry_both():
    ids = structure_of(lambda x: jnp.einsum("bqd,bkd->bqk", x, x), (ROWS, LENGTH), X).ids[0]
    assert [one.axes for one in ids if one.kind == "position"] == [(1,), (2,)]
    assert [one.axes for one in ids if one.kind == "row"] == [(0,)]


def test_a_scan_over_positions_keeps_their_ids_and_its_state_has_none():
    def recurrent(x):
        def step(h, x_t):
            h = jnp.tanh(h + x_t)
            return h, h

        last, every = jax.lax.scan(step, jnp.zeros((ROWS, WIDTH)), jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(every, 0, 1), last

    every, last = structure_of(recurrent, (ROWS, LENGTH), X).ids
    found = {one.kind: one for one in every}
    np.testing.assert_array_equal(full(found["position"], X.shape), np.indices(X.shape)[1])
    assert [(one.kind, one.axes) for one in last] == [("row", (0,))]


def test_a_scan_over_layers_leaves_ids_as_they_are():
    def layers(x):
        return jax.lax.scan(lambda h, _: (jnp.tanh(h), None), x, None, length=3)[0]

    found = ids_of(layers, (ROWS, LENGTH), X)
    np.testing.assert_array_equal(full(found["position"], X.shape), np.indices(X.shape)[1])


@pytest.mark.parametrize(
    ("name", "function", "lost"),
    [
        ("a neighbour", lambda x: x + jnp.roll(x, 1, 1), {"position"}),
        ("a neighbouring row", lambda x: x + jnp.roll(x, 1, 0), {"row"}),
        ("the first row", lambda x: x + x[:1], {"row"}),
        ("a sort", lambda x: jnp.sort(x, 1), {"position"}),
        ("frequencies of positions", lambda x: jnp.fft.fft(x, axis=1).real, {"position"}),
        ("the largest of positions", lambda x: jax.lax.top_k(jnp.swapaxes(x, 1, 2), 2)[0], {"position"}),
        ("a lookup by data", lambda x: jnp.take_along_axis(x, jnp.argsort(x[..., :1], 1), 1), {"position"}),
        ("a matrix over positions", lambda x: jnp.einsum("st,btd->bsd", jnp.ones((LENGTH, LENGTH)), x), {"position"}),
        ("a matrix over rows", lambda x: jnp.einsum("ab,bsd->asd", jnp.ones((ROWS, ROWS)), x), {"row"}),
        ("a convolution that pads nothing", lambda x: jax.lax.conv_general_dilated(
            x, jnp.ones((3, WIDTH, 2)), (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")), {"position"}),
        ("a loop that flips", lambda x: jax.lax.fori_loop(0, 3, lambda _, h: jnp.flip(h, 1), x), {"position"}),
        ("a scan over rows", lambda x: jax.lax.scan(lambda c, y: (c + y, c + y), x[0] * 0, x)[1], {"row"}),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_lost_and_says_where(name, function, lost):
    found = structure_of(function, (ROWS, LENGTH), X).ids[0]
    gone = [one for one in found if isinstance(one, Lost)]
    assert {one.kind for one in gone} == lost, name
    assert all("test_ids.py" in one.where and one.operation for one in gone), gone


@pytest.mark.parametrize(
    ("name", "function", "kinds"),
    [
        ("a mean over positions", lambda x: x.mean(1), {"row"}),
        ("a mean over everything", lambda x: x.mean(), set()),
        ("a product over positions", lambda x: jnp.einsum("bsd,s->bd", x, jnp.ones(LENGTH)), {"row"}),
        ("numbers beside them", lambda x: x * 2 + jnp.arange(LENGTH)[:, None], {"row", "position"}),
        (
            "a matrix over positions beside them",
            lambda x: x + jnp.einsum("st,btd->bsd", jnp.ones((LENGTH, LENGTH)), x),
            {"row", "position"},
        ),
        ("positions and features in one", lambda x: x.reshape(ROWS, -1) @ jnp.ones((LENGTH * WIDTH, 5)), {"row"}),
        ("pairs of features", lambda x: jnp.stack([x, -x], -1).reshape(*x.shape[:2], -1), {"row", "position"}),
        ("a norm", lambda x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)), {"row", "position"}),
        ("a cumulative sum", lambda x: jnp.cumsum(x, 1), {"row", "position"}),
        ("the first position", lambda x: x + x[:, :1], {"row", "position"}),
        ("one branch of two", lambda x: jax.lax.cond(x[0, 0, 0] > 0, jnp.sin, jnp.cos, x), {"row", "position"}),
        ("the first row of a batch of one", lambda x: x[:1] + x[:1][0], {"row", "position"}),
        ("frequencies of features", lambda x: jnp.fft.fft(x).real, {"row", "position"}),
        ("the largest features", lambda x: jax.lax.top_k(x, 2)[0], {"row", "position"}),
        ("a factor of each row", lambda x: jnp.linalg.cholesky(jnp.einsum("bsd,bse->bde", x, x)), {"row"}),
        ("eigenvalues of each row", lambda x: jnp.linalg.eigvalsh(jnp.einsum("bsd,bse->bde", x, x)), {"row"}),
        ("a batch of matrices", lambda x: jax.vmap(lambda y: y @ y.T @ y)(x), {"row", "position"}),
        ("another device", lambda x: jax.device_put(x, jax.devices()[0]), {"row", "position"}),
    ],
)
def test_ids_stay_where_each_entry_has_one(name, function, kinds):
    found = structure_of(function, (ROWS, LENGTH), X).ids[0]
    assert {one.kind for one in found if isinstance(one, Ids)} == kinds, name
    assert not [one for one in found if isinstance(one, Lost)]


def test_ids_are_never_as_large_as_activations():
    x = jnp.ones((8, 512, 4))
    (row, position) = structure_of(lambda x: jnp.tanh(x) @ jnp.ones((4, 50_000)), (8, 512), x).ids[0]
    assert row.values.size == 8
    assert position.values.size == 512


def convolved(x, width, padding, stride=1, dilation=1, layout=("NWC", "WIO", "NWC")):
    groups = x.shape[layout[0].index("C")]
    kernel = jnp.ones([{"W": width, "I": 1, "O": groups}[axis] for axis in layout[1]])
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,),
        [padding],
        rhs_dilation=(dilation,),
        dimension_numbers=layout,
        feature_group_count=groups,
    )


@pytest.mark.parametrize(
    ("name", "function", "axis"),
    [
        ("causal", lambda x: convolved(x, 4, (3, 0)), 1),
        ("centred", lambda x: convolved(x, 3, (1, 1)), 1),
        ("dilated", lambda x: convolved(x, 3, (4, 0), dilation=2), 1),
        ("channels first", lambda x: convolved(x.swapaxes(1, 2), 4, (3, 0), layout=("NCW", "OIW", "NCW")), 2),
        ("positions first", lambda x: convolved(x.swapaxes(0, 1), 3, (2, 0), layout=("WNC", "WIO", "WNC")), 0),
        ("of flipped ones", lambda x: convolved(x[:, ::-1], 3, (2, 0))[:, ::-1], 1),
    ],
)
def test_a_convolution_in_step_keeps_positions(name, function, axis):
    row, position = (ids_of(function, (ROWS, LENGTH), X)[kind] for kind in ("row", "position"))
    np.testing.assert_array_equal(position.values.ravel(), np.arange(LENGTH))
    assert position.axes == (axis,)
    assert row.axes != position.axes


@pytest.mark.parametrize(
    ("name", "function", "lost"),
    [
        ("a position ahead", lambda x: convolved(x, 3, (3, -1)), {"position"}),
        ("a position behind", lambda x: convolved(x, 3, (-1, 3)), {"position"}),
        ("every second", lambda x: convolved(x, 3, (2, 0), stride=2), {"position"}),
        ("no padding", lambda x: convolved(x, 3, (0, 0)), {"position"}),
        ("rows in one line", lambda x: convolved(x.reshape(1, -1, WIDTH), 3, (2, 0)), {"row"}),
    ],
)
def test_any_other_convolution_loses_them(name, function, lost):
    found = structure_of(function, (ROWS, LENGTH), X).ids[0]
    assert lost <= {one.kind for one in found if isinstance(one, Lost)}
