"""What is not real is never read: for every consumer, and for models that read it themselves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

V, D, K = 7, 3, 5
KEY = jax.random.key(0)


def draw(rows=3, length=4):
    rng = np.random.default_rng(1)
    shapes = {"embed": (V, D), "input": (D, D), "kernel": (D, D), "head": (D, K)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    real = np.ones((rows, length), bool)
    real[0, length - 1], real[-1] = False, False
    ids, targets = rng.integers(0, V, (rows, length)), rng.integers(0, K, (rows, length))
    x, weights = rng.normal(size=(rows, length, D)), rng.uniform(0.5, 1, (rows, length)) * real
    weights[1, 0] = 0
    given = {"ids": ids, "x": x.astype(np.float32), "targets": targets, "weights": weights.astype(np.float32)}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params), given | {"real": real}


def body(params, h):
    h = jnp.tanh((h + jnp.cumsum(h, 1)) @ params["kernel"])
    return h, h @ params["head"]


def model(params, inputs):
    return body(params, params["embed"][inputs["ids"]] + inputs["x"] @ params["input"])[1]


def time_major(params, inputs):
    return model(params, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), inputs))


def by_its_own_mask(params, ids):
    """Positions of one id are no part of the sum: the model reads its padding."""
    h = params["embed"][ids] * (ids != V - 1)[..., None]
    return body(params, h)[1]


def by_a_row_of_zeros(params, ids):
    return body(params, params["embed"].at[V - 1].set(0)[ids])[1]


def by_a_row_beside(params, ids):
    return body(params, jnp.concatenate([params["embed"][:-1], jnp.zeros((1, D))])[ids])[1]


def by_a_padded_table(params, ids):
    return body(params, jnp.pad(params["embed"][:-1], ((0, 1), (0, 0)))[ids])[1]


def by_a_masked_table(params, ids):
    return body(params, (params["embed"] * (np.arange(V) != V - 1)[:, None])[ids])[1]


BY_IDS = (by_its_own_mask, by_a_row_of_zeros, by_a_row_beside, by_a_padded_table, by_a_masked_table)


def with_bias(params, inputs):
    """Attention over all positions, of which a bias of minus infinity takes some away."""
    h = inputs["x"] @ params["input"]
    scores = jnp.einsum("bsd,btd->bst", h, h) + inputs["bias"][:, None, :]
    return body(params, jnp.einsum("bst,btd->bsd", jax.nn.softmax(scores), h))[1]


def with_flag(params, inputs):
    """The same of a mask that is true at padding."""
    bias = jnp.where(inputs["padding"], -1e9, 0.0)
    return with_bias(params, {"x": inputs["x"], "bias": bias})


def estimator(name, **options):
    @functools.cache
    def compiled(apply_fn, shape):
        del shape
        fisher = fj.group_fisher(apply_fn, estimator=name, **options)
        return fisher.init, jax.jit(lambda state, params, batch: fisher.update(state, params, batch, KEY))

    def consume(apply_fn, params, batch):
        init, update = compiled(apply_fn, batch.targets.shape)
        state = update(init(params), params, batch)
        fj.check(state)
        return state.mean, state.weight

    return consume


def head(apply_fn, params, batch):
    fisher = fj.group_fisher(apply_fn, estimator="head", example=batch)
    state = fisher.update(fisher.init(params), params, batch)
    fj.check(state)
    return state.mean, state.weight


def kfac_factors(apply_fn, params, batch):
    return fj.precondition(fj.kfac_factors(apply_fn, fj.categorical, params, batch, key=KEY), params)


def scale_by_kfac(apply_fn, params, batch):
    tx = fj.scale_by_kfac(apply_fn, example=batch)
    updates, state = tx.update(params, tx.init(params), params, batch=batch)
    fj.check(state)
    return updates


def operator(name):
    return lambda f, params, batch: getattr(fj.operators, name)(f, fj.categorical, params, batch)(params)


def block_spectrum(unit):
    def consume(apply_fn, params, batch):
        found = fj.block_spectrum(apply_fn, fj.categorical, params, batch, unit=unit)
        return {name: one.eigenvalues[:3] for name, one in found.items()}

    return consume


WHOLE = {
    "exact": estimator("exact"),
    "head": head,
    "ggn": operator("ggn"),
    "empirical_fisher": operator("empirical_fisher"),
    "hessian": operator("hessian"),
}
FACTORS = {"kfac_factors": kfac_factors, "scale_by_kfac": scale_by_kfac}
BY_ROW = {
    "sequence": estimator("sequence"),
    "exact by sequence": estimator("exact", unit="sequence"),
    "block_spectrum by token": block_spectrum("token"),
    "block_spectrum by sequence": block_spectrum("sequence"),
}
DRAWN = {"signs": estimator("signs"), "sampled": estimator("sampled")}
ALL = WHOLE | FACTORS | BY_ROW | DRAWN


def batch_of(given, inputs):
    return fj.Batch(
        *(jax.tree.map(jnp.asarray, x) for x in (inputs, given["targets"], given["weights"], given["real"]))
    )


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * np.abs(y).max())


GARBAGE = [((-1000, np.nan), (10**6, 1e38)), ((10**6, np.inf), (-100, np.nan))]


def spoiled(given, partly, empty):
    """Inputs with an id and a number in every place of padding, and others in the row in which nothing is real."""
    inputs = {"ids": given["ids"].copy(), "x": given["x"].copy()}
    for x, one, other in zip(inputs.values(), partly, empty, strict=True):
        x[~given["real"]] = one
        x[-1] = other
    return inputs


@functools.cache
def wanted(consumer, rows, length):
    """What the batch gives without the row in which nothing is real; of what is drawn, with numbers there."""
    params, given = draw(rows, length)
    if consumer not in DRAWN:
        given = jax.tree.map(lambda x: x[:-1], given)
    return ALL[consumer](model, params, batch_of(given, {"ids": given["ids"], "x": given["x"]}))


@pytest.mark.parametrize("consumer", ALL)
def test_what_is_not_real_may_be_anything(consumer):
    params, given = draw()
    for garbage in GARBAGE:
        found = ALL[consumer](model, params, batch_of(given, spoiled(given, *garbage)))
        same(found, wanted(consumer, *given["real"].shape))


@pytest.mark.parametrize("consumer", ["exact", "head", "sequence", "block_spectrum by token", "ggn", "kfac_factors"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 3)])
def test_time_major_inputs_are_right_or_refused(shape, consumer):
    params, given = draw(*shape)
    inputs = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), spoiled(given, *GARBAGE[0]))
    if consumer in BY_ROW:
        with pytest.raises(ValueError, match="row"):
            ALL[consumer](time_major, params, batch_of(given, inputs))
        return
    same(ALL[consumer](time_major, params, batch_of(given, inputs)), wanted(consumer, *shape))


@pytest.mark.parametrize(
    ("apply_fn", "consumer"),
    [
        *((apply_fn, name) for apply_fn in (*BY_IDS, with_bias, with_flag) for name in ("exact", "sequence", "ggn")),
        *((apply_fn, "kfac_factors") for apply_fn in (by_its_own_mask, with_bias, with_flag)),
    ],
)
def test_a_model_that_reads_its_padding_goes_on_reading_it(apply_fn, consumer):
    """Padding is an id, a bias or a flag to the model: the same as rows that are cut, one by one."""
    params, given = draw()
    real = given["real"]
    x = {"x": given["x"], "bias": np.where(real, 0, -np.inf).astype(np.float32), "padding": ~real}
    x["bias"][-1], x["padding"][-1] = 0, False
    inputs = {
        **dict.fromkeys(BY_IDS, np.where(real, given["ids"] % (V - 1), V - 1)),
        with_bias: {"x": x["x"], "bias": x["bias"]},
        with_flag: {"x": x["x"], "padding": x["padding"]},
    }[apply_fn]
    total, weight = None, 0
    for row in range(2):
        length = int(real[row].sum())
        one = jax.tree.map(lambda a, row=row, length=length: a[row : row + 1, :length], (given, inputs))
        if consumer == "kfac_factors":
            continue
        own = fj.operators.ggn(apply_fn, fj.categorical, params, batch_of(*one))
        w = float(one[0]["weights"].sum())
        product = ALL[consumer](apply_fn, params, batch_of(*one)) if consumer != "ggn" else own(params)
        scaled = jax.tree.map(lambda a, w=w: a * w, product)
        total, weight = scaled if total is None else jax.tree.map(jnp.add, total, scaled), weight + w
    found = ALL[consumer](apply_fn, params, batch_of(given, inputs))
    if consumer == "kfac_factors":
        cut = jax.tree.map(lambda a: a[:-1], (given, inputs))
        same(found, ALL[consumer](apply_fn, params, batch_of(*cut)))
        return
    want = jax.tree.map(lambda a: a / weight, total)
    if consumer != "ggn":
        found, want = found[0], want[0]
    same(found, want)


def translation(params, inputs):
    """The source has as many positions as the target, of which alone ``real`` speaks; its padding is zeros."""
    source = inputs["x"] @ params["input"]
    hidden = params["embed"][inputs["ids"]]
    scores = jnp.einsum("bsd,btd->bst", hidden, source) - 1e9 * (inputs["x"] == 0).all(-1)[:, None]
    return body(params, hidden + jnp.einsum("bst,btd->bsd", jax.nn.softmax(scores), source))[1]


@pytest.mark.parametrize("consumer", ["exact", "sequence", "kfac_factors"])
def test_a_source_that_is_as_long_as_its_target_has_positions_of_its_own(consumer):
    """The same as with a source that is longer by padding."""
    params, given = draw()
    longer = np.pad(given["x"], ((0, 0), (0, 2), (0, 0)))
    found, wanted = (
        ALL[consumer](translation, params, batch_of(given, {"ids": given["ids"], "x": x}))
        for x in (given["x"], longer)
    )
    if consumer == "kfac_factors":  # what the source meets is counted with its padding
        found, wanted = ({name: x[name] for name in ("embed", "kernel", "head")} for x in (found, wanted))
    same(found, wanted)
