"""Masks and loss weights lie on the positions they belong to, wherever a model moves these."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj

ROWS, LENGTH, VOCABULARY, WIDTH = 3, 4, 7, 5
ORDER = np.array([2, 0, 3, 1])


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {
    "embed": draw(VOCABULARY, WIDTH),
    "w": draw(WIDTH, WIDTH, seed=1),
    "b": draw(WIDTH, seed=2),
    "o": draw(WIDTH, 6, seed=3),
}
TOKENS = jnp.asarray(np.random.default_rng(4).integers(0, VOCABULARY, (ROWS, LENGTH)))
TARGETS = jnp.asarray(np.random.default_rng(5).integers(0, 6, (ROWS, LENGTH)))
REAL = jnp.arange(LENGTH) < jnp.array([4, 2, 1])[:, None]
WEIGHTS = jnp.where(REAL, draw(ROWS, LENGTH, seed=6) ** 2, 0)


def plain(params, tokens):
    return jnp.tanh(params["embed"][tokens] @ params["w"] + params["b"]) @ params["o"]


def moved(there, back):
    """The same function, computed on positions that were moved ``there`` and brought ``back``."""
    return lambda params, tokens: back(plain(params, there(tokens)))


def swap(x):
    return jnp.swapaxes(x, 0, 1)


MODELS = {
    "positions first": moved(swap, swap),
    "flipped": moved(lambda x: jnp.flip(x, 1), lambda x: jnp.flip(x, 1)),
    "rolled": moved(lambda x: jnp.roll(x, 1, 1), lambda x: jnp.roll(x, -1, 1)),
    "gathered": moved(lambda x: x[:, ORDER], lambda x: x[:, np.argsort(ORDER)]),
    "rows reversed": moved(lambda x: x[::-1], lambda x: x[::-1]),
    "windows": moved(
        lambda x: x.reshape(2 * ROWS, LENGTH // 2), lambda x: x.reshape(ROWS, LENGTH, x.shape[-1])
    ),
    "one axis": moved(jnp.ravel, lambda x: x.reshape(ROWS, LENGTH, -1)),
    "strided windows": moved(
        lambda x: x.reshape(ROWS, 2, LENGTH // 2).transpose(0, 2, 1).reshape(2 * ROWS, 2),
        lambda x: x.reshape(ROWS, LENGTH // 2, 2, -1).transpose(0, 2, 1, 3).reshape(ROWS, LENGTH, -1),
    ),
    "row by row": lambda params, tokens: jax.vmap(lambda row: plain(params, row))(tokens),
    "one loop over rows": lambda params, tokens: jnp.stack([plain(params, row[::-1])[::-1] for row in tokens]),
    "half after half": lambda params, tokens: jnp.concatenate(
        [plain(params, tokens[:, 2:]), plain(params, tokens[:, :2])], 1
    )[:, np.array([2, 3, 0, 1])],
}  # fmt: skip
# More than one use of a parameter: blocks of embeddings and heads then have another form.
TWICE = ("one loop over rows", "half after half")


def dense(factors):
    """Every block as a matrix or a diagonal."""
    found = {}
    for block, kept in zip(factors.plan, factors.blocks, strict=True):
        if kept.diagonal is not None:
            found[block.path] = kept.diagonal
            continue
        for name, one in (("A", kept.A), ("G", kept.G)):
            vectors = getattr(one, "vectors", None)
            matrix = one.values if vectors is None else jnp.einsum("nij,nj,nkj->nik", vectors, one.values, vectors)
            found[block.path, name] = matrix
    return found


@pytest.mark.parametrize("shared", ["expand", "reduce"])
@pytest.mark.parametrize("masks", ["padding", "weights", "both"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in TWICE])
def test_factors_are_those_of_the_batch_major_model(name, masks, shared):
    batch = fj.Batch(
        TOKENS, TARGETS, weights=WEIGHTS if masks != "padding" else jnp.where(REAL, 1.0, 0.0),
        real=REAL if masks != "weights" else None,
    )  # fmt: skip
    options = fj.Curvature(policy="never", shared=shared)
    wanted = dense(fj.kfac_factors(plain, fj.categorical, PARAMS, batch, curvature=options))
    found = dense(fj.kfac_factors(MODELS[name], fj.categorical, PARAMS, batch, curvature=options))
    assert found.keys() == wanted.keys()
    for path, matrix in wanted.items():
        np.testing.assert_allclose(found[path], matrix, atol=1e-6 * float(jnp.abs(matrix).max()), err_msg=str(path))


@pytest.mark.parametrize("name", TWICE)
def test_several_uses_of_a_kernel_sum_up_to_the_one_of_the_whole_batch(name):
    """All parameters but ``w`` keep a diagonal: their block has another form where they are used several times."""
    batch = fj.Batch(TOKENS, TARGETS, weights=WEIGHTS, real=REAL)
    options = fj.Curvature(policy="never", diagonal=lambda path: "w" not in path)
    params = PARAMS | {"b": jnp.zeros(WIDTH)}
    without = lambda model: lambda params, tokens: model(params | {"b": jnp.zeros(WIDTH)}, tokens)  # noqa: E731
    params.pop("b")
    wanted, found = (
        dense(fj.kfac_factors(without(model), fj.categorical, params, batch, curvature=options))
        for model in (plain, MODELS[name])
    )
    for side in "AG":
        np.testing.assert_allclose(found["['w']", side], wanted["['w']", side], rtol=1e-5, atol=1e-6)


def test_what_belongs_to_no_position_counts_where_its_outputs_do():
    """A table of positions is looked up at places that are real in some rows."""
    params = PARAMS | {"places": draw(LENGTH, WIDTH, seed=8)}

    def model(params, tokens):
        hidden = params["embed"][tokens] + params["places"][jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)]
        return jnp.tanh(hidden @ params["w"] + params["b"]) @ params["o"]

    real = jnp.arange(LENGTH) < jnp.array([3, 2, 1])[:, None]
    batch = fj.Batch(TOKENS, TARGETS, weights=jnp.where(real, 1.0, 0.0), real=real)
    factors = fj.kfac_factors(model, fj.categorical, params, batch, curvature=fj.Curvature(policy="never"))
    (found,) = [k for b, k in zip(factors.plan, factors.blocks, strict=True) if b.path == "['places']"]
    np.testing.assert_allclose(found.A.values[0], [3 / 6, 2 / 6, 1 / 6, 0], atol=1e-6)


def test_pooled_positions_count_by_their_row():
    real = jnp.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]])

    def model(params, tokens):
        return jnp.tanh(params["embed"][tokens].mean(1) @ params["w"] + params["b"]) @ params["o"]

    batch = fj.Batch(TOKENS, TARGETS[:, 0], weights=jnp.array([1.0, 0.0, 1.0]), real=real)
    factors = fj.kfac_factors(model, fj.categorical, PARAMS, batch, curvature=fj.Curvature(policy="never"))
    # What the model looks up at padding is 0.
    pooled = np.asarray(PARAMS["embed"])[np.where(real, TOKENS, 0)].mean(1)[[0, 2]]
    pooled = np.concatenate([pooled, np.ones((2, 1))], 1)
    np.testing.assert_allclose(dense(factors)["['w']", "A"][0], pooled.T @ pooled / 2, atol=1e-5)


def beside(params, tokens):
    embedded = params["embed"][tokens]
    return jnp.tanh((embedded + jnp.roll(embedded, 1, 1)) @ params["w"] + params["b"]) @ params["o"]


def mixed(params, tokens):
    embedded = jnp.einsum("st,btd->bsd", jnp.tril(jnp.ones((LENGTH, LENGTH))), params["embed"][tokens])
    return jnp.tanh(embedded @ params["w"] + params["b"]) @ params["o"]


@pytest.mark.parametrize(
    ("name", "model", "told"),
    [
        ("sorted", lambda p, x: plain(p, jnp.sort(x, 1)), "sort"),
        ("by data", lambda p, x: plain(p, jnp.take_along_axis(x, jnp.argsort(x, 1), 1)), "gather"),
        ("with a matrix", mixed, "dot_general.*a matrix mixes them"),
        ("with a neighbour", beside, "different positions"),
    ],
)  # fmt: skip
def test_positions_that_cannot_be_followed_are_refused_where_a_mask_must_lie(name, model, told):
    batch = fj.Batch(TOKENS, TARGETS, weights=WEIGHTS, real=REAL)
    with pytest.raises(ValueError, match=rf"\['(embed|w)'\].*{told}"):
        fj.kfac_factors(model, fj.categorical, PARAMS, batch)
    # Without padding there is no mask to lay.
    fj.kfac_factors(model, fj.categorical, PARAMS, fj.Batch(TOKENS, TARGETS))


def test_a_closure_that_starts_to_move_positions_is_looked_at_again():
    order = [np.arange(LENGTH)]

    def model(params, tokens):
        return plain(params, tokens[:, order[0]])[:, np.argsort(order[0])]

    batch = fj.Batch(TOKENS, TARGETS, weights=WEIGHTS, real=REAL)
    options = {"curvature": fj.Curvature(policy="never"), "refresh": fj.Refresh(period=1), "damping": 0.1}
    tx = fj.scale_by_kfac(model, example=batch, kl_clip=None, **options)
    state = tx.init(PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    wanted, state = tx.update(grads, state, PARAMS, batch=batch)
    order[0] = ORDER
    found, state = tx.update(grads, state, PARAMS, batch=batch)
    for path, x in jax.tree_util.tree_leaves_with_path(wanted):
        np.testing.assert_allclose(
            dict(jax.tree_util.tree_leaves_with_path(found))[path], x, rtol=1e-3, atol=1e-4, err_msg=str(path)
        )


def recurrent(scan):
    """A recurrent network over positions, in a loop or unrolled."""

    def model(params, tokens):
        embedded = jnp.swapaxes(params["embed"][tokens], 0, 1)

        def step(state, x):
            state = jnp.tanh(x @ params["w"] + (state @ params["u"] if "u" in params else state))
            return state, state

        if scan:
            _, states = jax.lax.scan(step, jnp.zeros((ROWS, WIDTH)), embedded)
        else:
            state, found = jnp.zeros((ROWS, WIDTH)), []
            for x in embedded:
                state, _ = step(state, x)
                found.append(state)
            states = jnp.stack(found)
        return jnp.swapaxes(states, 0, 1) @ params["o"]

    return model


@pytest.mark.parametrize("correction", [False, True])
def test_masks_follow_a_loop_over_positions(correction):
    params = {key: PARAMS[key] for key in ("embed", "w", "o")}
    batch = fj.Batch(TOKENS, TARGETS, weights=WEIGHTS, real=REAL)
    options = fj.Curvature(policy="never", eigenvalue_correction=correction)
    found, wanted = (
        fj.kfac_factors(recurrent(scan), fj.categorical, params, batch, curvature=options, damping=0.1)
        for scan in (True, False)
    )
    for path, matrix in dense(wanted).items():
        np.testing.assert_allclose(dense(found)[path], matrix, rtol=1e-5, atol=1e-6, err_msg=str(path))
    for path, x in fj.precondition(wanted, params).items():
        np.testing.assert_allclose(fj.precondition(found, params)[path], x, rtol=1e-4, atol=1e-4, err_msg=path)


def test_a_state_counts_at_the_position_that_it_is_used_at():
    """The state before a position meets its kernel there: ``A`` is over the states before real positions."""
    params = {key: PARAMS[key] for key in ("embed", "w", "o")} | {"u": draw(WIDTH, WIDTH, seed=9)}
    batch = fj.Batch(TOKENS, TARGETS, weights=WEIGHTS, real=REAL)
    factors = fj.kfac_factors(recurrent(True), fj.categorical, params, batch, curvature=fj.Curvature(policy="never"))
    w, u, embedded = (np.asarray(x, np.float64) for x in (params["w"], params["u"], params["embed"][TOKENS]))
    state, wanted = np.zeros((ROWS, WIDTH)), np.zeros((WIDTH, WIDTH))
    for t in range(LENGTH):
        before = state[np.asarray(REAL[:, t])]
        wanted += before.T @ before
        state = np.tanh(embedded[:, t] @ w + state @ u)
    np.testing.assert_allclose(dense(factors)["['u']", "A"][0], wanted / int(REAL.sum()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (ROWS - 1,), (LENGTH,), (ROWS, LENGTH - 1), (ROWS, LENGTH, 1)])
def test_a_padding_mask_of_another_shape_is_refused(shape):
    batch = fj.Batch(TOKENS, TARGETS, real=jnp.ones(shape, bool))
    with pytest.raises(ValueError, match=r"Batch.real .* per row and position.*\[3, 4\]"):
        fj.kfac_factors(plain, fj.categorical, PARAMS, batch)


def test_rows_are_not_reduced_where_a_loop_takes_their_positions_apart():
    params = {key: PARAMS[key] for key in ("embed", "w", "o")}
    with pytest.raises(ValueError, match=r"\['w'\].*in a loop at.*expand"):
        fj.kfac_factors(
            recurrent(True),
            fj.categorical,
            params,
            fj.Batch(TOKENS, TARGETS),
            curvature=fj.Curvature(shared="reduce"),
        )


def hidden(params, tokens):
    return jnp.tanh(params["embed"][tokens] @ params["w"] + params["b"])


def looped(params, tokens, axis=0, size=1, remat=False):
    """The head in a loop over chunks, as where logits of all positions would not fit."""
    x = jnp.moveaxis(hidden(params, tokens), axis, 0)
    head = lambda part: jnp.tanh(part @ params["o"])  # noqa: E731
    found = jax.lax.map(jax.checkpoint(head) if remat else head, x.reshape(-1, size, *x.shape[1:]))
    return jnp.moveaxis(found.reshape(*x.shape[:-1], -1), 0, axis)


def in_parts(axis, cuts, back=None):
    def model(params, tokens):
        parts = [jnp.tanh(part @ params["o"]) for part in jnp.split(hidden(params, tokens), cuts, axis)]
        found = jnp.concatenate(parts if back is None else [parts[i] for i in back], axis)
        return found

    return model


CHUNKED = {
    "rows": in_parts(0, [1]),
    "positions": in_parts(1, [1, 3]),
    "one position each": lambda p, x: jnp.stack([jnp.tanh(h @ p["o"]) for h in jnp.swapaxes(hidden(p, x), 0, 1)], 1),
    "loop over rows": looped,
    "loop over positions": lambda p, x: looped(p, x, 1, 2),
    "rematerialised": lambda p, x: looped(p, x, 1, 1, True),
    "nested loops": lambda p, x: jax.lax.map(
        lambda row: jax.lax.map(lambda h: jnp.tanh(h @ p["o"]), row), hidden(p, x)
    ),
    "outputs in another order": lambda p, x: jnp.tanh(hidden(p, x) @ p["o"][:, ::-1])[..., ::-1],
}  # fmt: skip


@pytest.mark.parametrize("name", CHUNKED)
def test_loss_weights_lie_on_a_head_in_chunks(name):
    batch = fj.Batch(TOKENS, TARGETS, weights=WEIGHTS, real=REAL)
    options = fj.Curvature(policy="never")
    whole = lambda params, tokens: jnp.tanh(hidden(params, tokens) @ params["o"])  # noqa: E731
    wanted = dense(fj.kfac_factors(whole, fj.categorical, PARAMS, batch, curvature=options))
    found = dense(fj.kfac_factors(CHUNKED[name], fj.categorical, PARAMS, batch, curvature=options))
    if name == "outputs in another order":
        wanted["['o']", "G"] = wanted["['o']", "G"][:, ::-1, ::-1]
    for path, matrix in wanted.items():
        np.testing.assert_allclose(found[path], matrix, rtol=1e-5, atol=1e-6, err_msg=str(path))


def test_a_head_whose_tokens_are_lost_is_refused_where_weights_must_lie():
    def model(params, tokens):
        found = hidden(params, tokens) @ params["o"]
        return jnp.take_along_axis(found, jnp.argsort(tokens, 1)[..., None], 1)

    with pytest.raises(ValueError, match=r"weights of the loss .*\['o'\].*gather.*positions="):
        fj.kfac_factors(model, fj.categorical, PARAMS, fj.Batch(TOKENS, TARGETS, weights=WEIGHTS))
    fj.kfac_factors(model, fj.categorical, PARAMS, fj.Batch(TOKENS, TARGETS))


AXES = {f"['{name}']": (0, 1) for name in ("embed", "w", "o")}


def by_data(params, tokens):
    """Positions that data move and move back."""
    order = jnp.argsort(tokens, 1)
    moved = plain(params, jnp.take_along_axis(tokens, order, 1))
    return jnp.take_along_axis(moved, jnp.argsort(order, 1)[..., None], 1)


def test_a_user_says_where_rows_and_positions_are():
    """What every parameter meets is in another order than the batch; the user says that it is in none."""
    batch = fj.Batch(TOKENS, TARGETS, weights=WEIGHTS, real=REAL)
    with pytest.raises(ValueError, match=r"\['\w+'\].*positions=\{\"\['\w+'\]\": axes\}.*such as \(0, 1\)"):
        fj.kfac_factors(by_data, fj.categorical, PARAMS, batch)
    options = fj.Curvature(policy="never", positions=AXES)
    fj.kfac_tools.kfac_coverage(by_data, fj.categorical, PARAMS, batch, curvature=options)
    found = dense(fj.kfac_factors(by_data, fj.categorical, PARAMS, batch, curvature=options))
    tokens = np.take_along_axis(np.asarray(TOKENS), np.argsort(np.asarray(TOKENS), 1, kind="stable"), 1)
    counted = np.bincount(tokens[np.asarray(REAL)], minlength=VOCABULARY) / int(REAL.sum())
    np.testing.assert_allclose(found["['embed']", "A"][0], counted, atol=1e-6)
    # Where the program says the same, nothing changes.
    told, wanted = (
        dense(fj.kfac_factors(plain, fj.categorical, PARAMS, batch, curvature=c))
        for c in (options, fj.Curvature(policy="never"))
    )
    for path, matrix in wanted.items():
        np.testing.assert_allclose(told[path], matrix, atol=1e-6, err_msg=str(path))


def test_a_use_without_tokens_counts_whole():
    options = fj.Curvature(policy="never", positions={"['w']": None})
    batch = fj.Batch(TOKENS, TARGETS, weights=WEIGHTS, real=REAL)
    found = dense(fj.kfac_factors(plain, fj.categorical, PARAMS, batch, curvature=options))
    met = np.asarray(PARAMS["embed"], np.float64)[np.where(REAL, TOKENS, 0)].reshape(-1, WIDTH)
    met = np.concatenate([met, np.ones((len(met), 1))], 1)
    np.testing.assert_allclose(found["['w']", "A"][0], met.T @ met / len(met), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ({"['x']": (0, 1)}, r"names \['x'\], and the parameters are \['b'\], \['embed'\]"),
        ({"w": (0, 1)}, r"names w, and"),
        ({"['w']": (0, 5)}, r"tokens lie along axes 0, 1 .*not along axes 0, 5"),
        ({"['w']": (0, 2)}, r"tokens lie along axes 0, 1 .*not along axes 0, 2"),
        ({"['w']": (1, 0)}, r"sizes \[4, 3\], and rows and positions of the batch \[3, 4\]"),
        ({"['w']": (1,)}, r"sizes \[4\]"),
        ({"['w']": (0, 0)}, r"different axes"),
        ({"['w']": (0, -1)}, r"different axes from 0 on"),
        ({"['w']": ()}, r"mapping"),
        ({"['w']": (0, 1.0)}, r"mapping"),
        ({"['w']": 3}, r"mapping"),
        ({3: (0, 1)}, r"mapping"),
        ("['w']", r"mapping"),
        (None, r"mapping"),
    ],
)
@pytest.mark.parametrize("real", [None, REAL])
def test_positions_that_do_not_fit_are_refused(positions, words, real):
    batch = fj.Batch(TOKENS, TARGETS, real=real)
    with pytest.raises(ValueError, match=f"^positions.*{words}"):
        fj.kfac_tools.kfac_coverage(plain, fj.categorical, PARAMS, batch, curvature=fj.Curvature(positions=positions))


def test_rows_are_not_reduced_over_several_uses():
    options = fj.Curvature(shared="reduce", diagonal=lambda path: "embed" in path)
    with pytest.raises(ValueError, match=r"reduce.*\['w'\] meets them in 2 uses"):
        fj.kfac_factors(
            MODELS["half after half"], fj.categorical, PARAMS, fj.Batch(TOKENS, TARGETS), curvature=options
        )


def attending(params, inputs):
    """A bias of positions, or a number for each of them, beside the tokens."""
    x = params["embed"][inputs["tokens"]]
    scores = jnp.einsum("bsd,btd->bst", x, x)
    if "bias" in inputs:
        scores += inputs["bias"]
    if "scale" in inputs:
        scores *= inputs["scale"]
    if "features" in inputs:
        x += (inputs["features"] @ params["f"])[:, None]
    mixed = x + jax.nn.softmax(scores) @ x
    return jnp.tanh(mixed @ params["w"] + params["b"]) @ params["o"]


@pytest.mark.parametrize("name", ["bias", "scale", "features", "all"])
def test_an_input_as_large_as_a_batch_is_not_taken_for_one(name):
    """As many rows as positions: factors are those of a batch with one row more, which counts nowhere."""
    tokens, targets = (jnp.concatenate([x, x[:1]]) for x in (TOKENS, TARGETS))
    real, weights = (jnp.concatenate([x, x[:1]]) for x in (REAL, WEIGHTS))
    more = {"bias": draw(LENGTH, LENGTH, seed=3), "scale": draw(LENGTH, seed=4), "features": draw(LENGTH, LENGTH)}
    inputs = {"tokens": tokens} | {key: x for key, x in more.items() if name in (key, "all")}
    params = PARAMS | ({"f": draw(LENGTH, WIDTH, seed=5)} if "features" in inputs else {})
    padded = {
        key: jnp.concatenate([x, jnp.zeros_like(x[:1])]) if key in ("tokens", "features") else x
        for key, x in inputs.items()
    }
    nothing = lambda x: jnp.concatenate([x, jnp.zeros_like(x[:1])])  # noqa: E731
    options = fj.Curvature(policy="never", diagonal=lambda path: "embed" in path)
    found, wanted = (
        dense(fj.kfac_factors(attending, fj.categorical, params, batch, curvature=options))
        for batch in (
            fj.Batch(inputs, targets, weights=weights, real=real),
            fj.Batch(padded, nothing(targets), weights=nothing(weights), real=nothing(real)),
        )
    )
    for path, matrix in wanted.items():
        np.testing.assert_allclose(found[path], matrix, rtol=1e-4, atol=1e-5, err_msg=str(path))
