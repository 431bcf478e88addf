"""Checks of the softmax head's closed form, by itself and as the estimator ``head``, against float64 on the host."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax.cli.doctor.estimators import statistics, summary
from fisher_jax.cli.doctor.loops import by_path
from fisher_jax.cli.doctor.records import Check, Leaves
from fisher_jax.cli.doctor.subject import Subject


def squared_scores(hidden: np.ndarray, table: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """``(p - [v = y])**2 h**2`` and ``p (1 - p) h**2`` of each token, float64 ``[T, V, D]``."""
    h, w = hidden.reshape(-1, hidden.shape[-1]).astype(np.float64), table.astype(np.float64)
    logits = h @ w.T
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    g = p - (np.arange(w.shape[0]) == labels.reshape(-1, 1))
    squares = h[:, None, :] ** 2
    return {"empirical": g[..., None] ** 2 * squares, "true": (p * (1 - p))[..., None] * squares}


def head(unit: str, subject: Subject) -> Leaves:
    batch = subject.batch
    groups = fj.groups.row
    fisher = fj.group_fisher(subject.model.apply, example=batch, groups=groups, estimator="head", unit=unit)
    return statistics(fisher, subject.params, batch, None, errors=True)


def head_reference(unit: str, subject: Subject) -> Leaves:
    loops = subject.loops
    rows, positions = loops.labels.shape
    values = squared_scores(loops.hidden, np.asarray(loops.params["head"]), loops.labels)["empirical"].sum(-1)
    ids = {
        "token": np.arange(rows * positions),
        "sequence": np.repeat(np.arange(rows), positions),
        "document": np.repeat(np.asarray(loops.batch.units), positions),
    }[unit]
    member = (ids == np.unique(ids)[:, None]).astype(float)
    weights = member.sum(1)
    return summary({"['head']": member @ values / weights[:, None]}, weights, errors=True)


def moments(groups: str, subject: Subject) -> Leaves:
    """Both kinds, of hidden states that are given."""

    def run(hidden, table, labels):
        both = fj.lm_head.moments(hidden, table, labels, groups=groups, kind=("empirical", "true"))
        return {
            kind: {"mean": fj.welford.mean(x), "standard error": fj.welford.standard_error(x)}
            for kind, x in zip(("empirical", "true"), both, strict=True)
        }

    return by_path(jax.jit(run)(_hidden(subject), subject.params["head"], subject.batch.targets))


def moments_reference(groups: str, subject: Subject) -> Leaves:
    table = np.asarray(subject.params["head"]).astype(np.float64)
    both = squared_scores(np.asarray(_hidden(subject)), table, subject.loops.labels)
    found: Leaves = {}
    for kind, values in both.items():
        part = summary({"": values.sum(-1) if groups == "row" else values}, np.ones(len(values)), errors=True)
        found |= {f"['{kind}']{path}": x for path, x in part.items()}
    return found


def _hidden(subject: Subject) -> jax.Array:
    return jnp.asarray(subject.loops.hidden, jnp.dtype(subject.dtype))


def _head_check(unit: str, *, quick: bool = False, once: bool = False) -> Check:
    measure, reference = functools.partial(head, unit), functools.partial(head_reference, unit)
    return Check(f"group_fisher head, by {unit}", measure, reference, quick=quick, once=once)


def _moments_check(groups: str, *, quick: bool = False) -> Check:
    measure, reference = functools.partial(moments, groups), functools.partial(moments_reference, groups)
    return Check(f"lm_head.moments, by {groups}", measure, reference, in_statistics=True, quick=quick)


CHECKS = (
    _head_check("sequence", quick=True),
    _head_check("token", once=True),
    _head_check("document", once=True),
    _moments_check("row", quick=True),
    _moments_check("param"),
)
