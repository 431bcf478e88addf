"""`fj.solve` against dense float64 solves: operators, likelihoods, preconditioners; its bounds; its refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fisher_jax as fj
from tests.operators.test_products import LIKELIHOODS, batch_of, make, problem, reference

DAMPINGS = (1e-6, 1e-3, 1e-1, 1.0, 1e2)
METHODS = {"ggn": "cg", "empirical_fisher": "cg", "hessian": "minres"}


def right_hand_side(like, seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), dtype or x.dtype), like)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def dense_solution(C, damping, b):
    A = C + damping * np.eye(len(C))
    return A, np.linalg.solve(A, b)


def in_norm(A, e):
    return np.sqrt(e @ A @ e)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("kind", METHODS)
def test_it_is_the_dense_solution_to_rounding(kind, name):
    C = reference(kind, name)
    with jax.enable_x64(True):
        matvec = make(kind, batch=batch_of(name, spoil=True), name=name)
        b = right_hand_side(problem(name)[0])
        for damping in DAMPINGS:
            found = fj.solve(matvec, b, damping=damping, method=METHODS[kind], rtol=0.0)
            A, wanted = dense_solution(C, damping, flat(b))
            error = flat(found.x) - wanted
            size = np.linalg.norm(A, 2) * np.linalg.norm(wanted) / np.linalg.norm(flat(b))
            assert np.linalg.norm(error) <= 10 * 2.3e-16 * np.linalg.cond(A) * np.linalg.norm(wanted)
            assert found.relative_residual <= max(1e-12, 10 * 2.3e-16 * size)
            assert np.isinf(found.error_bound) if kind == "hessian" else in_norm(A, error) <= found.error_bound


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_in_float32_it_is_the_dense_solution_to_its_rounding(name):
    C = reference("ggn", name)
    params = jax.tree.map(jnp.float32, problem(name)[0])
    matvec, b = make("ggn", params, batch_of(name), name), right_hand_side(params)
    for damping in DAMPINGS[1:]:
        found = fj.solve(matvec, b, damping=damping, rtol=0.0)
        A, wanted = dense_solution(C, damping, flat(b))
        error = flat(found.x) - wanted
        assert np.linalg.norm(error) <= 10 * 1.2e-7 * np.linalg.cond(A) * np.linalg.norm(wanted)


@functools.cache
def spectrum(smallest=0.0):
    """A matrix with many equal and many small eigenvalues, and a right-hand side."""
    rng = np.random.default_rng(1)
    vectors = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    values = np.concatenate([np.full(8, smallest), np.logspace(-5, 1, 22)])
    return (vectors * values) @ vectors.T, rng.standard_normal(30)


def as_operator(C):
    return jax.tree_util.Partial(lambda C, v: C @ v, jnp.asarray(C))


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("x64", [False, True])
def test_the_bound_is_a_bound_at_every_step_and_no_empty_one(x64, preconditioned):
    C, b = spectrum()
    with jax.enable_x64(x64):
        C, b = (np.asarray(jnp.asarray(x), np.float64) for x in (C, b))
        operator, diagonal = as_operator(C), jnp.asarray(np.diag(C)) if preconditioned else None
        for damping in (1e-3, 1.0):
            A, wanted = dense_solution(C, float(jnp.asarray(damping)), b)
            for steps in (*range(1, 12), 20, 40, 100):
                found = fj.solve(
                    operator, jnp.asarray(b), damping=damping, rtol=0.0, max_steps=steps, preconditioner=diagonal
                )
                error = in_norm(A, flat(found.x) - wanted)
                assert error <= found.error_bound
                rounding = 1e-4 if x64 else 10.0  # of an error that rounding makes, times 1 / sqrt(damping)
                assert found.error_bound <= 100 * error + rounding


def test_the_residual_is_the_true_one():
    C, b = spectrum()
    found = fj.solve(as_operator(C), jnp.asarray(b), damping=1e-4, rtol=0.0)
    C, b = (np.asarray(jnp.asarray(x), np.float64) for x in (C, b))
    wanted = b - (C + float(jnp.float32(1e-4)) * np.eye(30)) @ flat(found.x)
    np.testing.assert_allclose(found.residual, np.linalg.norm(wanted), rtol=0.2)
    assert found.reason == "limited by rounding"
    assert not found.converged


# A model for Kronecker factors: an embedding tied to the head, a kernel with a bias, a frozen counter.
def tied_model(params, tokens):
    x = params["embed"][tokens]
    x = x + jnp.tanh(x @ params["kernel"] + params["bias"]) * params["scale"]
    return x @ params["embed"].T


@functools.cache
def tied_problem():
    rng = np.random.default_rng(5)
    shapes = {"embed": (6, 3), "kernel": (3, 3), "bias": (3,), "scale": (3,)}
    params = {name: jnp.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    params["count"] = jnp.array(3)
    tokens = rng.integers(0, 6, (4, 5))
    return params, fj.Batch(jnp.asarray(tokens), jnp.roll(jnp.asarray(tokens), -1, 1))


CURVATURES = {
    "plain": {},
    "corrected": {"eigenvalue_correction": lambda path: "embed" not in path},
    "drawn": {"estimator": "sampled"},
}


@functools.cache
def factors(choice):
    params, batch = tied_problem()
    options = fj.Curvature(**CURVATURES[choice])
    return fj.kfac_factors(tied_model, fj.categorical, params, batch, key=jax.random.key(0), curvature=options)


def tied_ggn(**options):
    params, batch = tied_problem()
    return fj.operators.ggn(tied_model, fj.categorical, params, batch, **options)


@pytest.mark.parametrize("choice", CURVATURES)
def test_kronecker_factors_change_nothing_but_the_way(choice):
    params = fj.operators.restrict(tied_problem()[0])
    b, matvec = right_hand_side(params), tied_ggn()
    plain = fj.solve(matvec, b, damping=1e-2)
    found = fj.solve(matvec, b, damping=1e-2, preconditioner=factors(choice))
    assert found.converged
    assert found.x["count"] is None
    np.testing.assert_allclose(flat(found.x), flat(plain.x), atol=2e-4 * np.abs(flat(plain.x)).max())


@pytest.mark.parametrize("correction", [False, True])
def test_kronecker_factors_take_fewer_steps(correction):
    """Inputs of very different sizes, many tokens: what the factors describe."""
    rng = np.random.default_rng(2)
    x = jnp.float32(rng.standard_normal((200, 6)) * np.logspace(-2, 1, 6))
    batch = fj.Batch(x, jnp.asarray(rng.integers(0, 3, 200)))
    params = {"in": jnp.float32(rng.normal(size=(6, 5)) / 3), "out": jnp.float32(rng.normal(size=(5, 3)))}

    def model(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"]

    options = fj.Curvature(eigenvalue_correction=correction)
    found = fj.kfac_factors(model, fj.categorical, params, batch, key=jax.random.key(0), curvature=options)
    matvec, b = fj.operators.ggn(model, fj.categorical, params, batch), right_hand_side(params)
    plain = fj.solve(matvec, b, damping=1e-4, rtol=1e-3)
    better = fj.solve(matvec, b, damping=1e-4, rtol=1e-3, preconditioner=found)
    assert plain.converged
    assert better.converged
    assert better.num_products <= 0.8 * plain.num_products


def test_factors_precondition_some_of_the_parameters():
    params, _ = tied_problem()
    matvec = tied_ggn(parameters="kernel|scale")
    b = right_hand_side(fj.operators.restrict(params, "kernel|scale"))
    found = fj.solve(matvec, b, damping=1e-2, preconditioner=factors("plain"))
    plain = fj.solve(matvec, b, damping=1e-2)
    assert found.x["embed"] is None
    assert found.x["bias"] is None
    np.testing.assert_allclose(flat(found.x), flat(plain.x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("choice", CURVATURES)
def test_the_bound_with_factors_is_a_bound(choice):
    params = fj.operators.restrict(tied_problem()[0])
    b, matvec = right_hand_side(params), tied_ggn()
    exact = fj.solve(matvec, b, damping=1e-1, rtol=0.0)
    for steps in (1, 2, 4, 8, 16):
        found = fj.solve(matvec, b, damping=1e-1, preconditioner=factors(choice), max_steps=steps, rtol=0.0)
        e = jax.tree.map(jnp.subtract, found.x, exact.x)
        error = np.sqrt(flat(e) @ flat(jax.tree.map(lambda c, v: c + 0.1 * v, matvec(e), e)))
        assert error <= found.error_bound + exact.error_bound


def test_several_right_hand_sides_are_solved_as_one_by_one():
    C, b = spectrum()
    several = jnp.stack([jnp.asarray(b), jnp.zeros(30), jnp.cos(jnp.arange(30.0))])
    found = fj.solve(as_operator(C), several, damping=0.1, several=True)
    hosted = fj.solve(as_operator(C), several, damping=0.1, several=True, jit=False)
    for i, one in enumerate(several):
        alone = fj.solve(as_operator(C), one, damping=0.1)
        np.testing.assert_allclose(found.x[i], alone.x, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(hosted.x[i], alone.x, rtol=1e-3, atol=1e-3)
        assert abs(int(found.num_products[i]) - int(alone.num_products)) <= 2
    assert found.reason == ["converged"] * 3
    assert found.num_products[1] == 0
    assert found.error_bound[1] == 0


def test_batches_on_the_host_are_one_operator():
    params, batch = problem()[0], batch_of()
    params = jax.tree.map(jnp.float32, params)
    halves = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in range(2)]
    streamed = fj.operators.over_batches(lambda part: make("ggn", params, part), halves)
    b = right_hand_side(params)
    found = fj.solve(streamed, b, damping=0.1, jit=False)
    wanted = fj.solve(make("ggn", params, batch), b, damping=0.1)
    np.testing.assert_allclose(flat(found.x), flat(wanted.x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_a_start_at_the_solution_is_one_look(method):
    C, b = spectrum(1.0)
    once = fj.solve(as_operator(C), jnp.asarray(b), damping=1.0, method=method)
    again = fj.solve(as_operator(C), jnp.asarray(b), damping=1.0, method=method, x0=once.x, rtol=1e-4)
    assert again.num_products == 1
    assert again.converged
    assert once.num_products > 5


def test_it_runs_inside_jit_and_new_numbers_compile_nothing():
    C, b = spectrum()

    @jax.jit
    def inside(operator, b, damping):
        return fj.solve(operator, b, damping=damping, max_steps=50)

    operator = as_operator(C)
    one = inside(operator, jnp.asarray(b), 0.1)
    two = inside(operator, jnp.asarray(-b), 0.2)
    assert inside._cache_size() == 1
    outside = fj.solve(operator, jnp.asarray(-b), damping=0.2, max_steps=50)
    np.testing.assert_allclose(two.x, outside.x, rtol=1e-4, atol=1e-4)
    assert one.converged


@pytest.mark.parametrize("spoil", ["product", "preconditioner", "right-hand side", "values"])
def test_what_has_no_solution_by_this_way_is_said(spoil):
    C, b = spectrum()
    C = C - 20 * np.eye(30) if spoil == "product" else C * np.nan if spoil == "values" else C
    b = b * np.inf if spoil == "right-hand side" else b
    options = {"preconditioner": jax.tree_util.Partial(lambda v: -v)} if spoil == "preconditioner" else {}

    def run():
        return fj.solve(as_operator(C), jnp.asarray(b), damping=1e-2, **options)

    with pytest.raises(fj.InputError, match="positive" if spoil in ("product", "preconditioner") else "finite"):
        run()
    found = jax.jit(run)()
    assert np.isnan(found.x).all()
    assert np.isnan(found.error_bound)
    assert not found.converged


def test_an_indefinite_product_is_solved_by_minimal_residuals():
    C, b = spectrum()
    C = C - 0.5 * np.eye(30)
    found = fj.solve(as_operator(C), jnp.asarray(b), damping=1e-2, method="minres")
    _, wanted = dense_solution(C, 1e-2, b)
    np.testing.assert_allclose(found.x, wanted, rtol=1e-3, atol=1e-3)
    with_diagonal = fj.solve(
        as_operator(C),
        jnp.asarray(b),
        damping=1e-2,
        method="minres",
        preconditioner=jnp.abs(jnp.diag(jnp.asarray(C))),
    )
    np.testing.assert_allclose(with_diagonal.x, wanted, rtol=1e-3, atol=1e-3)


def test_steps_that_do_not_suffice_are_told():
    C, b = spectrum()
    found = fj.solve(as_operator(C), jnp.asarray(b), damping=1e-4, max_steps=3)
    assert found.reason == "limited by max_steps"
    assert found.num_products == 4
    assert "max_steps" not in repr(found)
    assert len(repr(found)) < 500


def test_without_damping_there_is_no_bound():
    C, b = spectrum(1.0)
    found = fj.solve(as_operator(C + np.eye(30)), jnp.asarray(b), damping=0.0)
    assert np.isinf(found.error_bound)
    assert found.converged
    np.testing.assert_allclose(found.x, np.linalg.solve(C + np.eye(30), b), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"damping": -1.0}, "damping"), ({"method": "lu"}, "cg, minres"), ({"max_steps": 0}, "max_steps"),
     ({"x0": jnp.zeros(3)}, "x0"), ({"b": jnp.arange(30)}, "int32"), ({"b": {"a": None}}, "no leaf"),
     ({"preconditioner": jnp.zeros(3)}, "preconditioner"), ({"preconditioner": -jnp.ones(30)}, "not negative"),
     ({"b": jnp.ones(29)}, "29"),
     ({"b": {"x": jnp.ones((2, 30)), "y": jnp.ones((3, 30))}, "several": True}, "leading axis")],
)  # fmt: skip
def test_what_does_not_fit_raises_a_sentence(change, named):
    C, b = spectrum()
    arguments = {"b": jnp.asarray(b), "damping": 1e-2, **change}
    with pytest.raises((ValueError, TypeError), match=named):
        fj.solve(as_operator(C), arguments.pop("b"), **arguments)
