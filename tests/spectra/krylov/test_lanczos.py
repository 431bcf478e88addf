"""Lanczos on prescribed spectra: no ghosts, bounds that bound, and what is missing is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import fisher_jax as fj
from fisher_jax.spectra.krylov import basis_passes, process
from fisher_jax.spectra.krylov.layout import layout_of, product, random_vector
from tests.spectra.krylov import operators_of_known_spectrum as known

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(1)
STEPS = {"clustered": 60, "repeated": 80, "rank 3": 30, "rank 1": 30, "zero": 30, "indefinite": 60,
         "condition 1e12": 100, "identity": 30, "bulk": 100}  # fmt: skip


def run(matrix, function=known.product, key=KEY, **options):
    return fj.lanczos(known.matvec(matrix, function), known.like(len(matrix)), key=key, **options)


@pytest.fixture(scope="module")
def found():
    """Every spectrum, both ends at once, the basis on the host."""
    matrices = {name: known.dense(values) for name, values in known.SPECTRA.items()}
    return {
        name: (matrix, run(matrix, num_steps=STEPS[name], num_eigenvalues=10, which="both"))
        for name, matrix in matrices.items()
    }


@pytest.mark.parametrize("name", known.SPECTRA)
def test_residuals_bound_the_distance_to_an_eigenvalue(found, name):
    matrix, spectrum = found[name]
    present = ~np.isnan(spectrum.eigenvalues)
    assert present.sum() > 0
    assert np.all(known.distances(spectrum, matrix) <= spectrum.residuals[present])
    np.testing.assert_array_equal(np.isnan(spectrum.residuals), ~present)
    assert spectrum.num_missing == np.sum(~present)
    assert not np.any(spectrum.converged & ~present)


@pytest.mark.parametrize("name", known.SPECTRA)
def test_bounds_are_no_larger_than_they_must_be(found, name):
    """Rounding alone is a few eps of the norm; a bound of everything would bound, too."""
    matrix, spectrum = found[name]
    assert spectrum.rounding <= 50 * EPS * np.abs(known.truth(matrix)).max()


@pytest.mark.parametrize("name", known.SPECTRA)
def test_there_are_no_ghosts(found, name):
    """Ritz values of an orthonormal basis interlace (Cauchy), so that a copy too many shows."""
    matrix, spectrum = found[name]
    truth, ritz = known.truth(matrix), spectrum.ritz_values
    slack = 20 * EPS * np.abs(truth).max()
    assert np.all(ritz[::-1] <= truth[::-1][: len(ritz)] + slack)
    assert np.all(ritz >= truth[: len(ritz)] - slack)


@pytest.mark.parametrize("name", ["repeated", "rank 3", "zero", "indefinite", "condition 1e12"])
def test_the_device_basis_gives_what_the_host_basis_gives(found, name):
    matrix, host = found[name]
    device = run(matrix, num_steps=STEPS[name], num_eigenvalues=10, which="both", storage="device")
    tolerance = np.where(np.isnan(host.residuals), 0, 3 * host.residuals)
    both = ~np.isnan(host.eigenvalues) & ~np.isnan(device.eigenvalues)
    assert np.all(np.abs(host.eigenvalues - device.eigenvalues)[both] <= tolerance[both])
    assert np.all(known.distances(device, matrix) <= device.residuals[~np.isnan(device.residuals)])
    if name != "condition 1e12":  # where its values pass below rounding is a matter of rounding
        np.testing.assert_array_equal(np.isnan(host.eigenvalues), np.isnan(device.eigenvalues))


@pytest.mark.parametrize(("name", "nonzero"), [("rank 3", [3.0, 2.0, 1.0]), ("rank 1", [3.0]), ("zero", [])])
def test_a_low_rank_has_its_values_and_at_most_one_zero(found, name, nonzero):
    matrix, _ = found[name]
    spectrum = run(matrix, num_steps=30, num_eigenvalues=10)
    values = spectrum.eigenvalues[~np.isnan(spectrum.eigenvalues)]
    small = np.abs(values) <= 1e-5
    np.testing.assert_allclose(values[~small], nonzero, rtol=1e-6)
    assert small.sum() <= 1
    assert spectrum.num_missing == 10 - len(values)
    assert spectrum.effective_rank == len(nonzero)
    assert spectrum.num_valid_steps == len(nonzero) + 1
    assert spectrum.complete
    assert spectrum.null_dimension == 100 - spectrum.num_valid_steps
    assert f"{10 - len(values)} of the 10 eigenvalues asked for are missing" in spectrum.statement


def test_the_smallest_of_a_low_rank_is_zero_and_not_its_smallest_value(found):
    matrix, _ = found["rank 3"]
    spectrum = run(matrix, num_steps=30, num_eigenvalues=3, which="smallest")
    assert abs(spectrum.eigenvalues[0]) <= 1e-5
    assert np.isnan(spectrum.eigenvalues[1:]).all()
    start = known.tree(jnp.asarray(np.linalg.eigh(matrix)[1][:, -3:].sum(1)))  # Krylov space without any zero
    from_the_range = run(matrix, num_steps=30, num_eigenvalues=3, which="smallest", start=start)
    assert abs(from_the_range.eigenvalues[0]) <= 1e-5


def test_multiplicity_is_found(found):
    matrix, spectrum = found["repeated"]
    np.testing.assert_allclose(spectrum.eigenvalues[:7], known.truth(matrix)[:-8:-1], rtol=1e-6)
    identity = found["identity"][1]
    np.testing.assert_allclose(identity.eigenvalues, np.ones(20), rtol=1e-6)


def test_a_start_in_an_invariant_subspace_does_not_hide_the_rest():
    """Blocks with eigenvalues 5..6 and 1..2, a start inside the second and orthogonal to its top eigenvector."""
    top, bottom = known.dense(np.linspace(5, 6, 10), 1), known.dense(np.linspace(1, 2, 20), 2)
    matrix = np.block([[top, np.zeros((10, 20))], [np.zeros((20, 10)), bottom]]).astype(np.float32)
    start = np.zeros(30, np.float32)
    start[10:] = np.linalg.eigh(bottom)[1][:, :-1].sum(1)
    spectrum = run(matrix, num_steps=30, num_eigenvalues=11, start=known.tree(jnp.asarray(start)))
    np.testing.assert_allclose(spectrum.eigenvalues, known.truth(matrix)[:-12:-1], rtol=2e-6)
    assert spectrum.converged.all()


def test_a_space_smaller_than_the_steps_is_exhausted():
    matrix = known.dense(np.r_[-2.0, np.linspace(1, 3, 16)])
    for storage in ("host", "device"):
        spectrum = run(matrix, num_steps=40, num_eigenvalues=17, storage=storage)
        np.testing.assert_allclose(spectrum.eigenvalues, known.truth(matrix)[::-1], atol=2e-6)
        assert (spectrum.num_valid_steps, spectrum.dimension, spectrum.complete) == (17, 17, True)
        assert "all 17 dimensions" in spectrum.statement
        assert not spectrum.condition_is_lower_bound
        assert spectrum.condition_number == pytest.approx(3, rel=1e-5)


def test_both_ends_agree_with_arpack(found):
    matrix, spectrum = found["indefinite"]
    for part, which in ((slice(0, 2), "LA"), (slice(10, 11), "SA")):
        k = part.stop - part.start
        wanted = scipy.sparse.linalg.eigsh(matrix.astype(np.float64), k=k, which=which, return_eigenvectors=False)
        wanted = np.sort(wanted) if which == "SA" else np.sort(wanted)[::-1]
        np.testing.assert_allclose(spectrum.eigenvalues[part], wanted, rtol=1e-6)
    assert spectrum.negative_count <= np.sum(known.truth(matrix) < 0)
    assert spectrum.negative_count > 10
    assert spectrum.negative_sum >= known.truth(matrix)[known.truth(matrix) < 0].sum() - 1e-4
    largest = run(matrix, num_steps=60, num_eigenvalues=3, which="magnitude")
    np.testing.assert_allclose(largest.eigenvalues, [-5, 4, 3], rtol=1e-6)
    assert largest.spectral_gap == pytest.approx(9, rel=1e-5)


def test_a_condition_beyond_rounding_is_a_lower_bound(found):
    spectrum = found["condition 1e12"][1]
    assert spectrum.condition_is_lower_bound
    assert "lower bound" in spectrum.condition_over
    assert 1e5 < spectrum.condition_number < 1e12
    proved = found["clustered"][1]
    assert proved.condition_is_lower_bound
    assert proved.condition_number <= 30.004


@pytest.mark.parametrize("storage", ["host", "device"])
@pytest.mark.parametrize(("which", "rows"), [("largest", 12), ("both", 16)])
def test_thick_restarts_reach_the_same_ends(storage, which, rows):
    matrix = known.dense(
        np.r_[np.logspace(2, 0.5, 8), np.random.default_rng(0).exponential(0.3, 84), -3 - np.arange(8)]
    )
    options = {"num_eigenvalues": 6, "which": which, "storage": storage, "eigenvectors": True}
    spectrum = run(matrix, num_steps=300, max_basis=rows, tol=1e-4, **options)
    truth = known.truth(matrix)
    wanted = truth[:-7:-1] if which == "largest" else np.r_[truth[:-7:-1], truth[:6]]
    assert spectrum.num_restarts > 1
    assert len(spectrum.ritz_values) <= rows
    assert spectrum.converged.all()
    np.testing.assert_allclose(spectrum.eigenvalues, wanted, atol=20 * EPS * 100)
    assert np.all(known.distances(spectrum, matrix) <= spectrum.residuals)
    assert eigenvector_errors(spectrum, matrix) <= 1


def eigenvector_errors(spectrum, matrix):
    """Largest ratio of a true residual to its bound; the vectors are orthonormal."""
    vectors = np.asarray(jax.vmap(known.flat)(spectrum.eigenvectors), np.float64)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(vectors)), atol=20 * EPS)
    rest = vectors @ matrix.astype(np.float64) - spectrum.eigenvalues[:, None] * vectors
    return np.max(np.linalg.norm(rest, axis=1) / spectrum.residuals)


def test_breakdowns_and_restarts_together():
    matrix = known.dense(known.SPECTRA["repeated"])
    spectrum = run(matrix, num_steps=200, num_eigenvalues=7, max_basis=12, tol=1e-5)
    np.testing.assert_allclose(spectrum.eigenvalues, known.truth(matrix)[:-8:-1], rtol=5e-6)
    assert np.all(known.distances(spectrum, matrix) <= spectrum.residuals)
    low = known.dense(known.SPECTRA["rank 3"])
    spectrum = run(low, num_steps=200, num_eigenvalues=1, max_basis=4, which="both")
    np.testing.assert_allclose(spectrum.eigenvalues, [3, 0], atol=1e-5)


@pytest.mark.parametrize("stated", [None, jnp.bfloat16])
@pytest.mark.parametrize("name", ["rank 3", "repeated", "indefinite", "zero", "identity"])
def test_products_in_bfloat16_are_recognised_and_bounded(name, stated):
    matrix = np.asarray(jnp.asarray(known.dense(known.SPECTRA[name]), jnp.bfloat16), np.float32)
    spectrum = run(matrix, known.bf16_product, num_steps=40, num_eigenvalues=6, matvec_dtype=stated)
    present = ~np.isnan(spectrum.eigenvalues)
    assert np.all(known.distances(spectrum, matrix) <= spectrum.residuals[present])
    norm = np.abs(known.truth(matrix)).max()
    assert np.all(spectrum.ritz_values <= known.truth(matrix).max() + 0.01 * norm)
    assert np.all(spectrum.ritz_values >= known.truth(matrix).min() - 0.01 * norm)
    if name == "rank 3":
        values = spectrum.eigenvalues[present]
        np.testing.assert_allclose(values[:3], known.truth(matrix)[:-4:-1], atol=0.01)
        assert len(values) <= 4


@pytest.mark.parametrize("storage", ["host", "device"])
def test_a_basis_in_bfloat16_costs_bounds_and_little_of_the_values(storage):
    matrix = known.dense(np.r_[np.logspace(2, 0.5, 8), np.random.default_rng(0).exponential(0.3, 92)])
    exact = run(matrix, num_steps=40, num_eigenvalues=4)
    spectrum = run(matrix, num_steps=40, num_eigenvalues=4, basis_dtype=jnp.bfloat16, storage=storage)
    assert np.all(known.distances(spectrum, matrix) <= spectrum.residuals)
    np.testing.assert_allclose(spectrum.eigenvalues, exact.eigenvalues, rtol=1e-3)
    assert np.all(spectrum.residuals > 10 * exact.residuals)


def test_narrow_leaves_are_computed_with_in_float32():
    diagonal = jnp.asarray(np.linspace(0, 3, 40), jnp.bfloat16)
    matvec = jax.tree_util.Partial(lambda d, v: d * v, diagonal)
    spectrum = fj.lanczos(matvec, jnp.zeros(40, jnp.bfloat16), num_steps=40, num_eigenvalues=2, key=KEY,
                          eigenvectors=True)  # fmt: skip
    assert np.all(np.abs(spectrum.eigenvalues - np.asarray(diagonal, float)[:-3:-1]) <= spectrum.residuals)
    assert spectrum.eigenvectors.dtype == jnp.float32
    with jax.enable_x64(True):
        matrix = jnp.asarray(known.dense(known.SPECTRA["bulk"]), jnp.float64)
        spectrum = fj.lanczos(lambda v: matrix @ v, jnp.zeros(100), num_steps=100, num_eigenvalues=5, key=KEY)
    np.testing.assert_allclose(spectrum.eigenvalues, known.truth(np.asarray(matrix, np.float32))[:-6:-1], rtol=1e-13)


def test_without_verification_the_bound_rests_on_the_stated_type():
    matrix = known.dense(known.SPECTRA["bulk"])
    spectrum = run(matrix, num_steps=50, num_eigenvalues=3, verify=False)
    assert np.all(known.distances(spectrum, matrix) <= spectrum.residuals)
    assert spectrum.num_products == 50


def test_a_run_stops_when_all_have_converged_where_that_is_asked_for():
    matrix = known.dense(np.r_[np.logspace(2, 1, 4), np.linspace(0, 0.1, 96)])
    spectrum = run(matrix, num_steps=60, num_eigenvalues=3, check_period=4)
    assert 4 <= spectrum.num_valid_steps <= 16
    assert spectrum.num_valid_steps % 4 == 0
    assert spectrum.converged.all()
    np.testing.assert_allclose(spectrum.eigenvalues, known.truth(matrix)[:-4:-1], rtol=1e-5)
    assert run(matrix, num_steps=24, num_eigenvalues=3).num_valid_steps == 24
    # As many Ritz values as eigenvalues are asked for, and one more, must be there before any can have converged.
    bulk = known.dense(known.SPECTRA["bulk"])
    assert run(bulk, num_steps=40, num_eigenvalues=20, tol=10.0, check_period=1).num_valid_steps == 21
    with pytest.raises(ValueError, match="check_period"):
        run(matrix, num_steps=4, num_eigenvalues=1, check_period=0)


class Counted(list):
    """The leaves of a basis, which count how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_a_step_goes_through_the_basis_three_times():
    """Memory is what a step waits for: a vector is written, one pass predicts and measures, one takes that away."""
    matrix, steps = known.dense(known.SPECTRA["bulk"]), 40
    layout = layout_of(known.like(len(matrix)))
    basis = basis_passes.allocate(layout, steps, None, True)
    counted = Counted(basis.leaves)
    apply, rules = product(known.matvec(matrix), layout, True), process.rules_for(layout, None, None)
    state = process.start(basis._replace(leaves=counted), KEY, random_vector(KEY, layout, "normal"))
    for _ in range(steps):
        state = process.step(state, apply, rules)
    assert state.steps == steps
    assert 3 * steps <= counted.passes <= 3 * steps + 2
