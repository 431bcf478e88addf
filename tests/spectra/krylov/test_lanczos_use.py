"""Lanczos in use: errors, interrupted runs, compilations, large vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.spectra.krylov import layout, process, sweeps
from tests.spectra.krylov import operators_of_known_spectrum as known

KEY = jax.random.key(1)
MATRIX = known.dense(np.r_[np.logspace(1, 0, 8), np.linspace(-0.5, 0.5, 32)])


def run(matvec, like, num_steps=10, num_eigenvalues=2, **options):
    return fj.lanczos(matvec, like, num_steps=num_steps, num_eigenvalues=num_eigenvalues, key=KEY, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_eigenvalues": 0}, "between 1 and the dimension, 40; found 0"),
        ({"num_eigenvalues": 41, "num_steps": 50}, "between 1 and the dimension, 40; found 41"),
        ({"num_steps": 3, "num_eigenvalues": 4}, "at least as many steps"),
        ({"num_steps": 3, "which": "both"}, "4 eigenvalues .* at least as many steps"),
        ({"which": "top"}, "which is one of largest, smallest, both, magnitude, found 'top'"),
        ({"storage": "disk"}, "storage is one of"),
        ({"max_basis": 3}, "max_basis is at least 4"),
        ({"tol": -1.0}, "tol is at least 0"),
        ({"resume": True}, "folder of save="),
        ({"start": {"kernel": jnp.zeros((3, 4)), "rest": [None, jnp.zeros(27)]}}, "start is a tree like"),
        ({"start": known.tree(jnp.zeros(40))}, "start vector has norm 0"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(known.matvec(MATRIX), known.like(40), **options)


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        ({"a": jnp.zeros(3, jnp.complex64)}, r"\['a'\] of `like` has dtype complex64"),
        ({"a": jnp.zeros(3, jnp.int32)}, "no floating entry"),
        ({"a": None}, "no floating entry"),
        ({"a": jnp.zeros(0)}, "no floating entry"),
        ({"a": 3.0}, r"\['a'\] of `like` is a float"),
    ],
)
def test_what_is_no_space_is_an_error(like, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(lambda v: v, like, num_steps=1, num_eigenvalues=1)
    with pytest.raises(ValueError, match=sentence):
        fj.spectral_density(lambda v: v, like, num_steps=1, num_probes=1, key=KEY)
    with pytest.raises(ValueError, match=sentence):
        fj.spectra.trace(lambda v: v, like, num_products=4, key=KEY)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(
    ("matvec", "sentence"),
    [
        (lambda v: (v["a"],), "returns a tree"),
        (lambda v: {"a": v["a"][None]}, r"\['a'\] with shape \[1, 6\], wanted \[6\]"),
        (lambda v: {"a": v["a"].astype(jnp.bfloat16)}, r"\['a'\] with dtype bfloat16, wanted float32"),
        (lambda v: {"a": v["a"].astype(jnp.int32)}, r"\['a'\] with dtype int32"),
        (lambda v: {"a": v["a"] * 1j}, r"\['a'\] with dtype complex64"),
        (lambda v: {"a": v["a"] * jnp.nan}, r"step 1 has NaN or infinite entries in \['a'\]"),
        (lambda v: {"a": jnp.roll(v["a"], 1)}, "not symmetric"),
        (lambda v: {"a": jnp.arange(6.0) * v["a"] + 1e-2 * jnp.roll(v["a"], 1)}, "not symmetric"),
        (lambda v: {"a": jnp.sum(v["a"]) * jnp.arange(6.0)}, "not symmetric"),
        (lambda v: {"a": jnp.abs(v["a"]) ** 1.5}, "not (linear|symmetric)"),
    ],
)
def test_what_is_no_operator_is_an_error(matvec, sentence, jit):
    with pytest.raises(ValueError, match=sentence):
        run(matvec, {"a": jnp.zeros(6)}, num_steps=6, jit=jit)


def test_leaves_of_integers_stand_still():
    like = {"step": jnp.array(3), "a": jnp.zeros(6)}
    spectrum = run(lambda v: {"step": None, "a": jnp.arange(6.0) * v["a"]}, like, num_steps=6, eigenvectors=True)
    np.testing.assert_allclose(spectrum.eigenvalues, [5, 4], rtol=1e-5)
    assert spectrum.eigenvectors["step"] is None
    assert spectrum.eigenvectors["a"].shape == (2, 6)


def test_it_runs_on_the_host_and_says_so():
    with pytest.raises(ValueError, match="outside of jit"):
        jax.jit(lambda x: run(lambda v: v, x).eigenvalues)(jnp.zeros(5))


def test_new_parameters_compile_nothing_again():
    traced = []

    def counted(matrix, v):
        traced.append(1)
        return known.product(matrix, v)

    found = [run(known.matvec(scale * MATRIX, counted), known.like(40)).eigenvalues[0] for scale in (1, 2, 3)]
    np.testing.assert_allclose(found, found[0] * np.array([1, 2, 3]), rtol=1e-5)
    assert len(traced) == 1


class InterruptedError(Exception):
    pass


@pytest.mark.parametrize(
    ("storage", "basis_dtype", "max_basis"),
    [("host", None, 14), ("device", None, None), ("host", jnp.bfloat16, None), ("device", jnp.bfloat16, 14)],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, storage, basis_dtype, max_basis):
    matrix, products = jnp.asarray(MATRIX), []

    def matvec(v, until=None):
        products.append(1)
        if len(products) == until:
            raise InterruptedError
        return known.product(matrix, v)

    options = {
        "num_steps": 34, "num_eigenvalues": 5, "which": "both", "storage": storage, "basis_dtype": basis_dtype,
        "max_basis": max_basis, "tol": 0.0, "eigenvectors": True, "jit": False,
    }  # fmt: skip
    whole = run(matvec, known.like(40), **options)
    in_one_go = len(products)
    products.clear()
    with pytest.raises(InterruptedError):
        run(lambda v: matvec(v, until=24), known.like(40), save=tmp_path / "run", save_period=5, **options)
    again = run(matvec, known.like(40), save=tmp_path / "run", save_period=5, resume=True, **options)
    assert len(products) < in_one_go + 6
    for name, a, b in zip(whole._fields, whole, again, strict=True):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
    if max_basis:
        assert whole.num_restarts > 1


def test_a_run_goes_on_only_where_it_belongs(tmp_path):
    options = {"num_steps": 10, "save": tmp_path / "run", "save_period": 5}
    with pytest.raises(fj.InputError, match="does not exist"):
        run(known.matvec(MATRIX), known.like(40), resume=True, **options)
    run(known.matvec(MATRIX), known.like(40), **options)
    with pytest.raises(fj.InputError, match="has which 'largest', wanted 'smallest'"):
        run(known.matvec(MATRIX), known.like(40), resume=True, which="smallest", **options)
    with pytest.raises(fj.InputError, match="another key"):
        fj.lanczos(
            known.matvec(MATRIX), known.like(40), num_eigenvalues=2, key=jax.random.key(2), resume=True, **options
        )
    with pytest.raises(fj.InputError, match="does not fit"):
        run(known.matvec(MATRIX[:39, :39]), known.like(39), resume=True, **options)


def test_the_same_key_gives_the_same_bits_and_another_other_ones():
    a, b = (run(known.matvec(MATRIX), known.like(40)) for _ in range(2))
    other = fj.lanczos(known.matvec(MATRIX), known.like(40), num_steps=10, num_eigenvalues=2, key=jax.random.key(5))
    np.testing.assert_array_equal(a.ritz_values, b.ritz_values)
    assert not np.array_equal(a.ritz_values, other.ritz_values)


@pytest.mark.parametrize("storage", ["host", "device"])
def test_sums_over_many_entries_lose_nothing(storage):
    """2**25 equal terms: a plain float32 sum stops growing at 2**24."""
    size = 1 << 25
    space = layout.layout_of({"a": jax.ShapeDtypeStruct((size,), jnp.float32)})
    basis = sweeps.allocate(space, 1, None, storage == "host")
    ones = [np.ones(size, np.float32)] if storage == "host" else [jnp.ones(size)]
    basis, stored = sweeps.write(basis, [x.copy() for x in ones], 0.3, 0)  # consumes the vector
    value = float(np.float32(0.3))
    assert sweeps.project(basis, ones, 1)[0] == pytest.approx(size * value, rel=3e-6)
    assert sweeps.dot(basis, stored, stored) == pytest.approx(size * value**2, rel=3e-6)
    left, rest, norm = sweeps.subtract(basis, stored, np.array([0.5]))
    assert norm == pytest.approx(value / 2 * size**0.5, rel=3e-6)
    assert rest[0] == pytest.approx(size * value**2 / 2, rel=3e-6)
    assert float(left[0][-1]) == pytest.approx(value / 2, rel=3e-6)


@pytest.mark.parametrize("storage", ["host", "device"])
def test_passes_over_blocks_equal_whole_products(storage):
    """Sizes that no block divides; rotations in place."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 7001), "b": (5,), "c": ()}
    space = layout.layout_of({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()})
    basis, rows = sweeps.allocate(space, 7, None, storage == "host"), []
    for row in range(7):
        vector = [rng.standard_normal(s).astype(np.float32) for s in shapes.values()]
        rows.append(np.concatenate([x.reshape(-1) for x in vector]).astype(np.float64))
        basis, _ = sweeps.write(basis, vector if storage == "host" else [jnp.asarray(x) for x in vector], 1.0, row)
    stack, coefficients = np.stack(rows), rng.standard_normal(6)

    def flat(leaves):
        return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in leaves])

    np.testing.assert_allclose(flat(sweeps.combine(basis, coefficients)), coefficients @ stack[:6], atol=1e-4)
    vector = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes.values()]
    x = flat(vector)
    np.testing.assert_allclose(sweeps.project(basis, vector, 6), stack[:6] @ x, atol=1e-3)
    copy, _, same = sweeps.subtract(basis, [jnp.array(x) for x in vector], coefficients, measure=False)
    left, rest, norm = sweeps.subtract(basis, vector, coefficients)
    assert same == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(flat(copy), flat(left), atol=1e-6)
    wanted = x - coefficients @ stack[:6]
    np.testing.assert_allclose(flat(left), wanted, atol=1e-5)
    np.testing.assert_allclose(rest, stack[:6] @ wanted, rtol=1e-5, atol=1e-2)
    assert norm == pytest.approx(np.linalg.norm(wanted), rel=1e-6)
    few = np.array([0.5, 0, 0, -2.0])  # what is not zero is little: another way on the host
    once, rest, _ = sweeps.subtract(basis, [jnp.asarray(x) for x in left], few)
    np.testing.assert_allclose(flat(once), wanted - few @ stack[:4], atol=1e-5)
    np.testing.assert_allclose(rest, stack[:4] @ (wanted - few @ stack[:4]), rtol=1e-5, atol=1e-2)
    turn = rng.standard_normal((7, 4))
    turned = sweeps.rotate(basis, turn)
    for row in range(4):
        np.testing.assert_allclose(flat(x[row] for x in turned.leaves), turn[:, row] @ stack, atol=1e-4)
    assert all(not np.any(np.asarray(x)[4:]) for x in turned.leaves)


@pytest.mark.parametrize("left", [1.0, 1e-3])
@pytest.mark.parametrize("known_before", [0.0, 0.99])
def test_what_is_left_of_a_vector_is_orthogonal_to_rounding(left, known_before):
    """Also where next to nothing is left, and whatever was predicted."""
    eps = float(np.finfo(np.float32).eps)
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(rng.standard_normal((3000, 9)))[0].T.astype(np.float32)
    coefficients = rng.standard_normal(8)
    w = (coefficients @ rows[:8] + left * rows[8]).astype(np.float32)
    space = layout.layout_of({"a": jax.ShapeDtypeStruct((3000,), jnp.float32)})
    basis = sweeps.Basis([rows[:8].copy()], space, 8, True)
    column, (found,), norm = process.orthogonalise(basis, [w], known_before * coefficients, lambda size: 1e-6 * size)
    found = found.astype(np.float64)
    assert norm == pytest.approx(np.linalg.norm(found), rel=1e-6)
    assert norm == pytest.approx(left, rel=1e-3)
    assert np.linalg.norm(rows[:8] @ found) <= 12 * eps * norm
    np.testing.assert_allclose(column, coefficients, atol=8 * eps * np.abs(coefficients).max() * 3)
