"""What is measured: every estimator and unit, operators, K-FAC, spectra of blocks."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from tests.matrix import cases, rights
from tests.matrix.cases import Case

DAMPING, KL_CLIP = 0.1, 1e-3
DRAWS = 1024


class Row(NamedTuple):
    """Attributes:
    begin: ``begin(case) -> state``; ``None`` where there is no state.
    step: ``step(case, state) -> state`` (which is donated), or the result.
    read: ``read(case, result) -> array``.
    right: ``right(Right) -> array``.
    draws: of what is random, ``draws(case) -> [N, P]``.
    by_row: whether what is observed is a row, which a model whose rows interact does not have.
    saved: whether the result is one that is kept on disk.
    of_model: whether a model is given.
    """

    begin: Callable | None
    step: Callable
    read: Callable
    right: Callable
    draws: Callable | None = None
    by_row: bool = False
    saved: bool = True
    of_model: bool = True


def flat(case: Case, tree: Any) -> np.ndarray:
    """In the order of the plain model's leaves, float64."""
    tree = jax.device_get(tree)
    if case.stacked:
        tree = jax.tree.map(np.asarray, cases.unstack(tree))
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


# Keyed by models and options, so that columns that differ in numbers alone share what is compiled.
@functools.cache
def estimator(apply, options: tuple, example=False, moving=False):
    options = dict(options)
    if example:
        options["example"] = jax.eval_shape(lambda: cases.case("donation").batch)
    found = fj.group_fisher(apply, **options)
    if moving:
        found = fj.ema(found, 0.5)
    return found, jax.jit(found.update, donate_argnums=0)


def key():
    return jax.random.key(5)


def group_fisher(right: Callable, error: Callable | None = None, **options) -> Row:
    """A row of means, and of their standard errors where ``error`` says what is right."""
    moving = options.pop("moving", False)
    example = options.get("groups") is not None or options["estimator"] == "head"
    chosen = tuple(sorted(options.items()))
    fisher = functools.partial(estimator, options=chosen, example=example, moving=moving)
    is_random = options["estimator"] in ("signs", "sampled") or (
        options.get("kind") == "true" and options["estimator"] == "sequence"
    )

    def begin(case):
        return fisher(case.apply)[0].init(case.params)

    def step(case, state):
        return fisher(case.apply)[1](state, case.params, case.batch, key())

    def read(case, state):
        fj.check(state)
        mean = flat(case, fj.mean(state))
        return mean if error is None else np.concatenate([mean, flat(case, fj.standard_error(state))])

    def wanted(found):
        return right(found) if error is None else np.concatenate([right(found), error(found)])

    def draws(case):
        observe = fisher(case.apply)[0].observe
        keys = jax.random.split(key(), DRAWS)
        found = jax.vmap(lambda key: fj.welford.mean(observe(case.params, case.batch, key)))(keys)
        found = jax.device_get(jax.vmap(cases.unstack)(found) if case.stacked else found)
        return np.concatenate([np.asarray(x, np.float64).reshape(DRAWS, -1) for x in jax.tree.leaves(found)], 1)

    by_row = options["estimator"] == "sequence" or (is_random and options.get("unit") in ("sequence", "document"))
    return Row(begin, step, read, wanted, draws if is_random else None, by_row)


def exact(unit: str, kind="empirical") -> Row:
    return group_fisher(
        functools.partial(rights.mean_by_token, kind=kind), functools.partial(rights.errors_by, unit=unit, kind=kind),
        estimator="exact", unit=unit, kind=kind,
    )  # fmt: skip


def of_head(values: np.ndarray) -> np.ndarray:
    """The part of the flat vector that is the head."""
    start = cases.VOCABULARY * cases.WIDTH
    return values[..., start : start + cases.WIDTH * cases.LABELS]


def head(unit: str, kind="empirical") -> Row:
    return group_fisher(
        lambda found: of_head(rights.mean_by_token(found, kind)),
        lambda found: of_head(rights.errors_by(found, unit, kind)),
        estimator="head", unit=unit, kind=kind,
    )  # fmt: skip


def sequence(unit: str) -> Row:
    return group_fisher(rights.mean_of_sequences, estimator="sequence", unit=unit)


def sums_of_rows(values: np.ndarray) -> np.ndarray:
    """One number for each input of a kernel and for each entry of a bias or token of the embedding."""
    leaves = jax.tree.leaves(cases.PARAMS)
    parts = np.split(values, np.cumsum([x.size for x in leaves])[:-1])
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(cases.PARAMS)]
    found = []
    for name, x, part in zip(names, leaves, parts, strict=True):
        part = part.reshape(x.shape)
        found.append(part if x.ndim == 1 else part.sum(1 if "embed" in name else 0))
    return np.concatenate(found)


def moments() -> Row:
    """The closed form of a head, given hidden states."""

    @functools.partial(jax.jit, static_argnums=0)
    def observe(apply, params, batch):
        # What the head multiplies.
        hidden = apply(params | {"head": jnp.eye(cases.WIDTH, dtype=params["head"].dtype)}, batch.inputs)
        return fj.lm_head.moments(
            hidden, params["head"].T, batch.targets, batch.weights, groups="param", unit="token"
        )

    add = jax.jit(fj.welford.add, donate_argnums=0)

    def begin(case):
        return fj.welford.init(observe(case.apply, case.params, case.batch), unit="token")

    def read(case, state):
        fj.check(state)
        return np.concatenate(
            [np.asarray(x, np.float64).T.ravel() for x in (fj.mean(state), fj.standard_error(state))]
        )

    def wanted(found):
        return np.concatenate([of_head(rights.mean_by_token(found)), of_head(rights.errors_by(found, "token"))])

    return Row(
        begin,
        lambda case, state: add(state, observe(case.apply, case.params, case.batch)),
        read,
        wanted,
        of_model=False,
    )


# A product with a vector of random numbers sees every entry of a matrix.
SIZES = [x.size for x in jax.tree.leaves(cases.PARAMS)]
DIRECTIONS = cases.numbers(3, sum(SIZES), seed=11)


def tree_of(case: Case, values: np.ndarray) -> Any:
    """A tree like the parameters of the case, places too, from a flat vector; at least float32."""
    leaves, treedef = jax.tree.flatten(cases.PARAMS)
    parts = np.split(values, np.cumsum(SIZES)[:-1])
    dtype = jnp.promote_types(jax.tree.leaves(case.params)[0].dtype, jnp.float32)
    found = [jnp.asarray(part.reshape(x.shape), dtype) for part, x in zip(parts, leaves, strict=True)]
    tree = jax.tree.unflatten(treedef, found)
    tree = cases.stack(tree) if case.stacked else tree
    return jax.tree.map(lambda v, p: jax.device_put(v, p.sharding), tree, case.params)


@jax.jit
def multiply(matvec, vector):
    return matvec(vector)


def products(case: Case, matvec) -> np.ndarray:
    return np.stack([flat(case, multiply(matvec, tree_of(case, v))) for v in DIRECTIONS])


def along(right: Callable) -> Callable:
    return lambda found: DIRECTIONS @ right(found)


def operator(name: str) -> Row:
    def step(case, state):
        del state
        return getattr(fj.operators, name)(case.apply, fj.categorical, case.params, case.batch)

    return Row(None, step, products, along(functools.partial(rights.operator, kind=name)), saved=False)


@functools.cache
def factors_of(apply, shared):
    curvature = fj.Curvature(shared=shared)

    def run(params, batch):
        return fj.kfac_factors(apply, fj.categorical, params, batch, damping=DAMPING, curvature=curvature)

    return jax.jit(run)


def factors(shared: str) -> Row:
    def step(case, state):
        del state
        return factors_of(case.apply, shared)(case.params, case.batch)

    def read(case, found):
        return products(case, fj.operators.kfac(found))

    return Row(None, step, read, along(functools.partial(rights.kronecker, shared=shared)))


@functools.cache
def transformation(apply):
    example = jax.eval_shape(lambda: cases.case("donation").batch)
    tx = fj.scale_by_kfac(apply, example=example, damping=DAMPING, kl_clip=KL_CLIP, refresh=fj.Refresh(period=1))
    return tx, jax.jit(tx.update, donate_argnums=1)


def gradient(case: Case):
    """Any, of the parameters' shapes."""
    found = jax.tree.map(lambda x: np.linspace(-1, 2, x.size).reshape(x.shape), cases.PARAMS)
    dtype = jax.tree.leaves(case.params)[0].dtype
    found = cases.in_dtype(dtype, found)
    return cases.stack(found) if case.stacked else found


def step_of_kfac() -> Row:
    def begin(case):
        return jax.tree.map(jnp.zeros_like, case.params), transformation(case.apply)[0].init(case.params)

    def step(case, state):
        return transformation(case.apply)[1](gradient(case), state[1], case.params, batch=case.batch)

    def read(case, state):
        fj.check(state[1])
        return flat(case, state[0])

    def wanted(found):
        grads = np.concatenate([np.linspace(-1, 2, x.size) for x in jax.tree.leaves(cases.PARAMS)])
        F = rights.kronecker(found)
        natural = np.linalg.solve(F + DAMPING * np.eye(len(F)), grads)
        return natural * min(1, np.sqrt(2 * KL_CLIP / (natural @ grads)))

    return Row(begin, step, read, wanted)


def spectra(found: dict) -> np.ndarray:
    """The eigenvalues of each block, ascending; those that its rank leaves no number for are 0."""
    each = [np.sort(np.asarray(x.eigenvalues, np.float64)) for x in found.values()]
    return np.concatenate([np.pad(x, (n - x.size, 0)) for x, n in zip(each, SIZES, strict=True)])


def eigenvalues(found, unit: str) -> np.ndarray:
    F = rights.fisher_of_scores(found, unit)
    ends = np.cumsum(SIZES)
    return np.concatenate([np.linalg.eigvalsh(F[e - n : e, e - n : e]) for n, e in zip(SIZES, ends, strict=True)])


def in_order(case: Case, found: dict) -> dict:
    """Blocks of layers in the order of the plain model's leaves."""
    if not case.stacked:
        return found
    names = ["['embed']", "['head']", *(f"['layers']['{x}'][{i}]" for i in (0, 1) for x in "bw")]
    return {name: found[name] for name in names}


def block_spectrum(unit: str) -> Row:
    def step(case, state):
        del state
        stacked = True if case.stacked else None
        return fj.block_spectrum(case.apply, fj.categorical, case.params, case.batch, unit=unit, stacked=stacked)

    def read(case, found):
        return spectra(in_order(case, found))

    return Row(None, step, read, functools.partial(eigenvalues, unit=unit), by_row=True)


@functools.cache
def stream_of(apply, unit, stacked):
    example = jax.eval_shape(lambda: cases.case("donation").batch)
    found = fj.spectra.block_spectra(
        apply, max_scores=64, example=example, unit=unit, stacked=True if stacked else None
    )
    return found, jax.jit(found.update, donate_argnums=0)


def block_spectra(unit: str) -> Row:
    def begin(case):
        return stream_of(case.apply, unit, case.stacked)[0].init(case.params)

    def step(case, state):
        return stream_of(case.apply, unit, case.stacked)[1](state, case.params, case.batch)

    def read(case, state):
        return spectra(in_order(case, stream_of(case.apply, unit, case.stacked)[0].finalize(state)))

    return Row(begin, step, read, functools.partial(eigenvalues, unit=unit), by_row=True)


UNITS = ("token", "sequence", "document", "batch")
true_mean = functools.partial(rights.mean_by_token, kind="true")
ROWS: dict[str, Row] = {
    **{f"`exact` by {unit}": exact(unit) for unit in UNITS},
    "`exact`, true": exact("token", "true"),
    "`exact`, averaged (`fj.ema`)": group_fisher(rights.mean_by_token, estimator="exact", moving=True),
    **{f"`head` by {unit}": head(unit) for unit in UNITS},
    "`head`, true": head("token", "true"),
    "`fj.lm_head.moments`": moments(),
    **{f"`sequence` by {unit}": sequence(unit) for unit in UNITS[1:]},
    "`sequence`, groups of rows": group_fisher(
        lambda found: sums_of_rows(rights.mean_of_sequences(found)), estimator="sequence", groups=fj.groups.row
    ),
    **{f"`signs` by {u}": group_fisher(rights.mean_by_token, estimator="signs", unit=u) for u in UNITS[1:]},
    **{f"`sampled` by {u}": group_fisher(true_mean, estimator="sampled", unit=u) for u in UNITS[1:]},
    **{f"`operators.{x}`": operator(x) for x in ("ggn", "fisher", "empirical_fisher", "hessian")},
    "K-FAC factors": factors("expand"),
    'K-FAC factors, `shared="reduce"`': factors("reduce"),
    "`fj.scale_by_kfac`": step_of_kfac(),
    "`fj.block_spectrum` of tokens": block_spectrum("token"),
    "`fj.block_spectrum` of rows": block_spectrum("sequence"),
    "`fj.spectra.block_spectra` of tokens": block_spectra("token"),
    "`fj.spectra.block_spectra` of rows": block_spectra("sequence"),
}
