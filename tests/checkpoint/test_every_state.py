"""Whatever the library returns as a state is saved and restored to the same bits, with and without a template."""

import dataclasses
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fisher_jax as fj
from fisher_jax.checkpoint.describe import describe
from fisher_jax.checkpoint.nodes import Record
from fisher_jax.checkpoint.types import _TABLE, name_of

# Classes that nobody keeps: functions beside their options, what is known of a program, what one call passes on.
NOT_STATES = {
    "_support.jax_internals:Body",
    "_support.jax_internals:Contraction",
    "_support.jax_internals:Convolution",
    "_support.jax_internals:Lookup",
    "_support.jax_internals:Loop",
    "_support.jax_internals:Remat",
    "_support.jax_internals:Repetition",
    "_support.lanes:Laid",
    "_support.lanes:Lanes",
    "_support.selection:Selection",
    "_tracing.alone:Alone",
    "_tracing.alone:Asking",
    "_tracing.attention:Attention",
    "_tracing.axes:Atom",
    "_tracing.head:Parts",
    "_tracing.heads:HeadSums",
    "_tracing.id_rules:Carrying",
    "_tracing.ids:Ids",
    "_tracing.ids:Link",
    "_tracing.ids:Lost",
    "_tracing.made:Made",
    "_tracing.program:Program",
    "_tracing.program:Tap",
    "_tracing.replay:Replay",
    "_tracing.roles:Grouping",
    "_tracing.routing:Routed",
    "_tracing.rows:Rows",
    "_tracing.structure:Head",
    "_tracing.structure:Structure",
    "_tracing.survey:Findings",
    "_tracing.survey:Survey",
    "_tracing.taps:Coverage",
    "_tracing.uses:Data",
    "_tracing.uses:Experts",
    "_tracing.uses:Known",
    "_tracing.uses:Part",
    "_tracing.uses:Segment",
    "_tracing.uses:Spec",
    "_tracing.uses:Step",
    "_tracing.uses:View",
    "batch.tokens:Tokens",
    "estimators.head:HeadProblem",
    "estimators.head:Met",
    "estimators.problem:Problem",
    "estimators.problem:Split",
    "groups:Experts",
    "groups:Group",
    "groups:Heads",
    "kronecker.blocks.plan:Rules",
    "kronecker.blocks.problem:Problem",
    "kronecker.optimizer.quadratic:LocalModel",
    "kronecker.options:Adaptive",
    "kronecker.options:Curvature",
    "kronecker.options:FixedRate",
    "kronecker.options:Refresh",
    "kronecker.statistics.second_moments:Masks",
    "likelihoods:Likelihood",
    "lm_head.by_token:TokenRows",
    "lm_head.by_vocabulary:Pieces",
    "lm_head.scores:SquaredScores",
    "lm_head.softmax:Head",
    "lm_head.softmax:Partition",
    "operators.conjugate_gradients:Limits",
    "operators.conjugate_gradients:State",
    "operators.minimal_residuals:Rotation",
    "operators.minimal_residuals:State",
    "operators.products:Operator",
    "operators.solving:Solution",
    "spectra.blocks.of_stream:BlockSpectra",
    "spectra.blocks.partition:Blocks",
    "spectra.blocks.partition:ParameterBlock",
    "spectra.blocks.scores:Scoring",
    "spectra.blocks.state:Setting",
    "spectra.krylov.basis_passes:Basis",
    "spectra.krylov.layout:Layout",
    "spectra.krylov.process:Process",
    "spectra.krylov.process:Rules",
    "spectra.krylov.summary:Plan",
    "uses.laplace:Posterior",
    "welford.estimator:FisherEstimator",
    "welford.moments:Arithmetic",
    "welford.per_group:Observed",
}


def apply_fn(params, x):
    return (x * params["scale"]) @ params["kernel"] + params["bias"]


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"kernel": draw(3, 4), "bias": draw(4), "scale": draw(3)}
BATCH = fj.Batch(draw(6, 3), jnp.array([0, 1, 2, 3, 0, 1]), units=jnp.array([0, 0, 1, 1, 2, 2]))
DIAGONAL = jax.tree_util.Partial(lambda d, v: {"w": d * v["w"]}, jnp.array([3.0, 1.0, 0.5, 0.2, 0.1]))
LIKE = {"w": jnp.zeros(5)}


def document_state():
    values = {"a": draw(5, 2) ** 2, "b": draw(5, seed=1) ** 2}
    moments = fj.welford.observe(
        values, jnp.array([3.0, 1, 2, 1, 1]), unit="document", units=jnp.array([1, 1, 2, 2, 3])
    )
    return fj.welford.add(fj.welford.init(moments), moments), moments


def states_of_moments():
    state, moments = document_state()
    average = fj.moving_average.init(jnp.zeros(2), 0.9)
    estimator = fj.group_fisher(apply_fn, estimator="signs")
    yield "welford", state
    yield "lean welford", fj.welford.plain(state, standard_errors=False)
    yield "moments", moments
    yield "moving average", fj.moving_average.add(average, fj.welford.observe(jnp.ones((3, 2))))
    yield "tracked", optax.chain(fj.track_fisher(estimator)).init(PARAMS)[0]
    yield "head", fj.lm_head.moments(draw(6, 3), draw(4, 3), BATCH.targets)
    yield "batch", BATCH


def answers():
    state, _ = document_state()
    other = fj.welford.add(state, document_state()[1])
    fisher = jax.tree.map(jnp.square, PARAMS)
    yield "decisions", fj.stats.decide(state, 0.5)
    yield "pruning", fj.stats.prune_below(state, 0.5)
    yield "shift", fj.importance_shift(state, other)
    yield "drift", fj.shift.importance_drift([state, other, state, other])
    yield "overlap", fj.overlap(fisher, fisher)
    yield "conflict", fj.shift.conflict(PARAMS, fisher, fisher)
    yield "data needed", fj.stats.data_needed(state, width=0.1)
    yield "scaled", fj.continual.scale_by_fisher(fisher, damping=0.1).init(PARAMS)
    yield "protected", fj.continual.protect_important(fisher, 0.5).init(PARAMS)


def spectra():
    options = {"num_steps": 5, "key": jax.random.key(0)}
    density = fj.spectral_density(DIAGONAL, LIKE, num_probes=2, **options)
    yield "spectrum", fj.lanczos(DIAGONAL, LIKE, num_eigenvalues=2, eigenvectors=True, **options)
    yield "density", density
    yield "log density", density.on_log_axis(floor=1e-3)
    yield "trace", fj.spectra.trace(DIAGONAL, LIKE, num_products=6, key=jax.random.key(0))
    blocks = fj.spectra.block_spectra(apply_fn, max_scores=4)
    state = blocks.update(blocks.init(PARAMS), PARAMS, BATCH)
    yield "blocks", state
    yield "block spectra", blocks.finalize(state)


def curvatures():
    factors = fj.kfac_factors(apply_fn, fj.categorical, PARAMS, BATCH)
    yield "factors", factors
    yield "low rank", fj.kfac_factors(apply_fn, fj.categorical, PARAMS, BATCH, curvature=fj.Curvature(policy="all"))
    yield (
        "closed head",
        fj.kfac_factors(
            apply_fn,
            fj.categorical,
            PARAMS,
            BATCH,
            key=jax.random.key(0),
            curvature=fj.Curvature(estimator="exact_head", policy="all"),
        ),
    )
    tokens = fj.Batch(jnp.array([0, 2, 1]), jnp.array([1, 0, 1]))
    table = {"embedding": draw(3, 2), "head": draw(2, 2)}
    yield "embedding", fj.kfac_factors(lambda p, x: p["embedding"][x] @ p["head"], fj.categorical, table, tokens)
    yield (
        "transformation",
        fj.scale_by_kfac(apply_fn, example=BATCH, refresh=fj.Refresh(statistics_period=1)).init(PARAMS),
    )
    yield "optimizer", fj.kfac(apply_fn, example=BATCH).init(PARAMS)
    yield "merge", fj.kfac_tools.merge_kfac([PARAMS, PARAMS], [factors, factors])
    yield "eigenvalues", fj.kfac_tools.kfac_spectrum(factors)
    yield "coverage", fj.kfac_tools.kfac_coverage(apply_fn, fj.categorical, PARAMS, BATCH)


@pytest.fixture(scope="module")
def states():
    return {name: state for room in (states_of_moments, answers, spectra, curvatures) for name, state in room()}


def test_every_state_has_a_short_repr(states):
    """No page of numbers: the names, shapes and dtypes of its fields in one line."""
    for name, state in states.items():
        for found in state.values() if isinstance(state, dict) else (state,):
            assert repr(found).startswith(f"{type(found).__name__}("), name
            assert len(repr(found)) < 600, name
            assert "\n" not in repr(found), name


def bits(tree):
    def leaf(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return type(x), str(getattr(x, "dtype", "")), np.shape(x), np.asarray(x).tobytes() if np.ndim(x) else str(x)

    return [leaf(x) for x in jax.tree.leaves(tree)]


def test_every_state_comes_back_with_and_without_a_template(tmp_path, states):
    for name, state in states.items():
        fj.checkpoint.save(tmp_path / name, state)
        for like in (None, state):
            found = fj.checkpoint.restore(tmp_path / name, like=like)
            assert jax.tree.structure(found) == jax.tree.structure(state), name
            assert bits(found) == bits(state), name


def test_every_type_of_the_table_has_a_state_that_is_tried(states):
    def types(node):
        return {node.type if isinstance(node, Record) else ""}.union(*map(types, node.children()))

    assert set(_TABLE) == set.union(*(types(describe(state)[0]) for state in states.values())) - {""}


def test_every_class_is_a_state_with_a_name_or_no_state():
    unknown = []
    for module in pkgutil.walk_packages(fj.__path__, "fisher_jax."):
        if module.name.split(".")[1] in ("cli", "models", "checkpoint", "exchange", "text"):
            continue
        for name, cls in vars(importlib.import_module(module.name)).items():
            is_record = isinstance(cls, type) and (dataclasses.is_dataclass(cls) or hasattr(cls, "_fields"))
            if is_record and cls.__module__ == module.name and not name.startswith("_"):
                place = f"{module.name.removeprefix('fisher_jax.')}:{name}"
                unknown += [place] if place not in {t.place for t in _TABLE.values()} | NOT_STATES else []
    assert not unknown


def test_the_table_names_the_fields_that_the_classes_have():
    for name, about in _TABLE.items():
        if about.converted:
            continue
        fields = getattr(about.cls, "_fields", None) or [f.name for f in dataclasses.fields(about.cls)]
        assert set(about.kinds) == set(fields), name
        assert set(about.optional.split()) <= set(fields), name
        assert (
            name_of(object.__new__(about.cls) if dataclasses.is_dataclass(about.cls) else about.cls(*fields)) == name
        )
