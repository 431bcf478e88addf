"""Checks of `fj.group_fisher`, every estimator and its units, against sums over the scores of single tokens."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax.cli.doctor.loops import by_path
from fisher_jax.cli.doctor.records import Check, Leaves
from fisher_jax.cli.doctor.subject import Subject


def statistics(fisher: fj.FisherEstimator, params: Any, batch: fj.Batch, key: Any, errors: bool) -> Leaves:
    """Means, and standard errors where there are several observations, of one compiled observation."""

    def run(params, batch, key):
        moments = fisher.observe(params, batch, key)
        found = {"mean": fj.welford.mean(moments)}
        return found | {"standard error": fj.welford.standard_error(moments)} if errors else found

    return by_path(jax.jit(run)(params, batch, key))


def summary(values: Leaves, weights: np.ndarray, errors: bool) -> Leaves:
    """The same from values ``[observations, ...]`` and weights ``[observations]``, by definition, in float64."""
    total, n = weights.sum(), int((weights > 0).sum())
    found = {}
    for path, f in values.items():
        mean = np.tensordot(weights, f, 1) / total
        found[f"['mean']{path}"] = mean
        if errors:
            spread = np.tensordot(weights**2, (f - mean) ** 2, 1)
            found[f"['standard error']{path}"] = np.sqrt(n / (n - 1) * spread) / total
    return found


def tensor_sums(squares: Leaves) -> Leaves:
    """Squares ``[observations, ...]`` summed over each kernel of each layer."""
    lead = {path: 2 if "layers" in path else 1 for path in squares}
    return {path: x.reshape(*x.shape[: lead[path]], -1).sum(-1) for path, x in squares.items()}


def row_sums(squares: Leaves) -> Leaves:
    """Squares summed over the inputs of each output unit, and over the entries of each vector of a table."""
    axis = {path: -2 if "kernel" in path else -1 for path in squares}
    return {path: x if "scale" in path else x.sum(axis[path]) for path, x in squares.items()}


def exact(unit: str, subject: Subject) -> Leaves:
    """64 of the 1,024 tokens that the decoder reads, since each takes a backward pass over all of them."""

    def apply_fn(params, inputs):
        return subject.model.apply(params, inputs)[:, subject.loops.scored]

    batch = fj.Batch(subject.batch.inputs, subject.batch.targets[:, subject.loops.scored])
    fisher = fj.group_fisher(apply_fn, example=batch, groups=fj.groups.tensor, estimator="exact", unit=unit)
    return statistics(fisher, subject.params, batch, None, errors=True)


def exact_reference(unit: str, subject: Subject) -> Leaves:
    scores = subject.loops.own_scores
    rows, tokens = scores.shape[:2]
    values = tensor_sums(_squares(subject.loops.leaves(scores.reshape(rows * tokens, -1))))
    if unit == "token":
        return summary(values, np.ones(rows * tokens), errors=True)
    by_row = {path: x.reshape(rows, tokens, *x.shape[1:]).mean(1) for path, x in values.items()}
    return summary(by_row, np.full(rows, float(tokens)), errors=True)


def one_pass(estimator: str, unit: str, subject: Subject) -> Leaves:
    """``signs`` or ``sequence``: entries by batch, rows of kernels by sequence."""
    groups = fj.groups.param if unit == "batch" else fj.groups.row
    batch = subject.batch
    fisher = fj.group_fisher(subject.model.apply, example=batch, groups=groups, estimator=estimator, unit=unit)
    return statistics(fisher, subject.params, batch, subject.key, errors=unit != "batch")


def signs_reference(unit: str, subject: Subject) -> Leaves:
    return _squared_sums(subject, subject.loops.labels, subject.loops.signs(unit), unit)


def sequence_reference(unit: str, subject: Subject) -> Leaves:
    return _squared_sums(subject, subject.loops.labels, np.ones(subject.loops.labels.shape), unit)


def sampled(unit: str, subject: Subject) -> Leaves:
    """Labels that rounding could change have weight 0."""
    _, sure = subject.loops.drawn(unit)
    batch = fj.Batch(subject.batch.inputs, subject.batch.targets, jnp.asarray(sure, jnp.float32))
    groups = fj.groups.param if unit == "batch" else fj.groups.row
    fisher = fj.group_fisher(subject.model.apply, example=batch, groups=groups, estimator="sampled", unit=unit)
    return statistics(fisher, subject.params, batch, subject.key, errors=unit != "batch")


def sampled_reference(unit: str, subject: Subject) -> Leaves:
    labels, sure = subject.loops.drawn(unit)
    return _squared_sums(subject, labels, sure.astype(float), unit)


def _squared_sums(subject: Subject, labels: np.ndarray, coefficients: np.ndarray, unit: str) -> Leaves:
    """``(sum_t c_t s_t)**2 / sum_t |c_t|`` of each observation."""
    sums, each = subject.loops.row_sums(labels, coefficients), np.abs(coefficients).sum(1)
    if unit == "batch":
        sums, each = sums.sum(0, keepdims=True), each.sum(keepdims=True)
    squares = _squares(subject.loops.leaves(sums / np.sqrt(each)[:, None]))
    return summary(squares if unit == "batch" else row_sums(squares), each, errors=unit != "batch")


def _squares(leaves: Leaves) -> Leaves:
    return {path: x**2 for path, x in leaves.items()}


def _check(estimator: str, unit: str, measure: Callable, reference: Callable, **options: Any) -> Check:
    name = f"group_fisher {estimator}, by {unit}"
    return Check(name, functools.partial(measure, unit), functools.partial(reference, unit), **options)


_signs, _sequence = (functools.partial(one_pass, estimator) for estimator in ("signs", "sequence"))

CHECKS = (
    _check("exact", "token", exact, exact_reference, quick=True),
    _check("exact", "sequence", exact, exact_reference, once=True),
    _check("signs", "batch", _signs, signs_reference, quick=True),
    _check("signs", "sequence", _signs, signs_reference, once=True),
    _check("sampled", "batch", sampled, sampled_reference),
    _check("sampled", "sequence", sampled, sampled_reference, once=True),
    _check("sequence", "sequence", _sequence, sequence_reference, slack=4.0),
)
