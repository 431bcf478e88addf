"""Group Fisher for every parameter: estimators of per-token squared scores from backward passes."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array

from fisher_jax import groups as groups_room
from fisher_jax import welford
from fisher_jax._support import meshes
from fisher_jax._support.dtypes import is_floating
from fisher_jax._support.lanes import Laid
from fisher_jax._tracing import roles
from fisher_jax._tracing.program import check_parameters, trace
from fisher_jax._tracing.structure import Structures
from fisher_jax.batch import Batch
from fisher_jax.batch.arguments import check_arguments, check_batch
from fisher_jax.estimators.by_batch import by_batch
from fisher_jax.estimators.by_row import by_row
from fisher_jax.estimators.by_taps import by_taps
from fisher_jax.estimators.by_token import by_token
from fisher_jax.estimators.head import HeadProblem, head_estimator, head_groups
from fisher_jax.estimators.problem import Problem
from fisher_jax.likelihoods import Likelihood, categorical
from fisher_jax.welford.estimator import FisherEstimator
from fisher_jax.welford.moments import Moments, reject_if

__all__ = ["group_fisher"]

Tree = Any

# For every estimator the units that it can observe, its default first.
_UNITS = {
    "head": ("sequence", "token", "document", "batch"),
    "exact": ("token", "sequence", "document", "batch"),
    "sequence": ("sequence", "document", "batch"),
    "signs": ("batch", "sequence", "document"),
    "sampled": ("batch", "sequence", "document"),
}


def group_fisher(
    apply_fn: Callable[[Any, Any], Array],
    likelihood: Likelihood = categorical,
    *,
    example: Batch | None = None,
    groups: Any = groups_room.param,
    combine: Callable[[Any], Any] | None = None,
    estimator: str = "signs",
    kind: str | None = None,
    unit: str | None = None,
    num_samples: int = 1,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    rows_independent: bool | None = None,
) -> FisherEstimator:
    """Per-token squared scores of every parameter: ``F_i = sum_t w_t s_ti**2 / sum_t w_t``.

    ``s_t = d log p(y_t | outputs_t) / d params``; a token is one element of the leading axes of the outputs.

    - ``exact``: the squares of every token, in chunks. ``T`` backward passes; the true Fisher sums over the ``K``
      columns of the output Fisher's factor, ``T K`` backward passes. Guaranteed, of any model and for any size: what
      a loop of ``jax.grad`` over the tokens gives, to rounding. With jaxlib 0.10.2 on a CPU, whose compiler gets
      batches of passes wrong from about 512 tokens on, they follow one another.
    - ``signs``: an unbiased estimate from one backward pass: each log-likelihood times ``eps_t sqrt(w_t)`` with
      random signs, the sum differentiated and squared; cross terms vanish in expectation.
    - ``sampled``: an unbiased estimate of the true Fisher, labels drawn from the model. One backward pass per sample.
    - ``head``: the squares of every token at the softmax head alone, in closed form (`fj.lm_head`), its true Fisher
      too. A forward pass. Other leaves are ``None``; of a tied embedding it is the Fisher of its use as head.
    - ``sequence``: ``f_u = (sum_t w_t s_t)**2 / w_u`` of every row: another quantity, which contains the correlation
      of a sequence's scores. One backward pass.

    Rows may depend on each other (a batch norm in training mode, dropout of the batch's shape). The score of a token
    is then the derivative of its log-likelihood in the batch as it is, through all rows. ``exact`` and ``head`` give
    the squares of these, ``signs`` and ``sampled`` by ``"batch"`` estimate them without bias.

    What is observed by row (``sequence``, ``signs`` and ``sampled`` with such a unit) runs every row alone, in one
    backward pass of the batch; a model whose rows depend on each other is refused. Sums of squares over the rows or
    columns of a kernel are formed at its use, from Gram matrices over positions where that is cheaper than its
    gradient.

    Under ``jit`` on a mesh, each device goes through its own rows of the batch, and what they found is joined: by row
    always, for ``exact`` where the program says that rows are independent. Mesh axes that parameters lie on divide
    no rows. With Auto axes say where rows and parameters lie by an ``example`` that lies there and ``init(params)``;
    else every device of the mesh is taken to hold rows of its own, which costs memory where that is not so.

    Args:
        apply_fn: ``apply_fn(params, inputs) -> outputs [..., K]``.
        likelihood: ``fj.categorical``, ``fj.bernoulli``, ``fj.gaussian``, ``fj.gaussian_with_scale`` or your own.
        example: a `Batch` of arrays or ``jax.ShapeDtypeStruct``s. Fixes the orientation of every kernel, which all
            groups but ``param`` need, and finds the head for ``head``.
        groups: ``fj.groups.param``, ``.row``, ``.column``, ``.tensor``, ``.expert``, ``.head(...)``, or a
            function ``(path, shape) -> group or reduction``; a reduction is a function of the leaf's squares, which
            it sums, to an array or a tree. A dict of such gives every leaf a dict of statistics.
        combine: a linear function of one observation's tree of sums, applied before it is accumulated: for statistics
            over several parameters, such as totals of layers, with intervals of their own.
        estimator: see above.
        kind: ``"empirical"`` (labels of the batch) or ``"true"`` (labels from the model). ``None``: empirical, and
            true for ``sampled``.
        unit: of observation. ``exact``: ``"token"`` (default), or its means by ``"sequence"``, ``"document"``,
            ``"batch"``; ``sequence``: by ``"sequence"`` (default), means of a document's rows, or of the batch's;
            ``head``: ``"sequence"`` (default), ``"token"``, ``"document"``, ``"batch"``; ``signs`` and ``sampled``:
            the ``"batch"`` at once (default), or by row. A document is all consecutive rows with one id in
            ``Batch.units``, across batches too.
        num_samples: draws of signs or labels whose squares are averaged.
        temperature: labels come from tempered outputs while scores stay untempered; signs are then used, since such
            scores have a mean.
        chunk_size: per-token squares alive at once for ``exact`` (default 16), on an accelerator also the backward
            passes that run together; for ``head`` see `fj.lm_head`;
            elsewhere rows alive at once (default: as many as keep what is formed for them within the size of the
            parameters).
        rows_independent: of the model, for what is observed by row. ``None``: the program says. Where data decide (an
            expert's dispatch), rows are compared with their batch once, in ``init`` with a concrete ``example``, or
            in the first call outside of ``jit``. ``True``: your word, and nothing is asked.

    Returns:
        `FisherEstimator`: ``init(params)``, ``observe(params, batch, key=None) -> Moments`` and
        ``update(state, params, batch, key=None)``; ``key`` is needed by ``signs``, ``sampled`` and true kinds.
        ``head`` and ``sequence`` also take ``taps=`` of the training loss (``fj.value_grad_and_taps``), so that there
        is no second pass, and ``taps_scale=``, which turns the gradient of that loss into that of the summed
        log-likelihood: the sum of weights for a mean loss, 1 for a sum. Taps whose cotangents at the outputs are
        then others (a penalty of the outputs, smoothed labels) reject the batch. Rows are followed wherever the
        model moves them; a use where they cannot be told apart is an error. Leaves that are not floating are
        ``None`` in the statistic; parameters that the loss does not use get zeros, and are one group. A batch of
        weight 0 changes nothing.

    Raises:
        ValueError: a complex parameter, an unknown option, a unit that the estimator does not have, groups without an
            example, or of a parameter whose orientation cannot be told (named, with its way out); by row a model
            whose rows depend on each other (the operation and its line are named).

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp
        >>> apply_fn = lambda params, x: x @ params["kernel"]
        >>> params = {"kernel": jnp.zeros((2, 3))}
        >>> batch = fj.Batch(jnp.ones((4, 2)), jnp.array([0, 1, 2, 2]))
        >>> fisher = fj.group_fisher(apply_fn, example=batch, groups=fj.groups.row, estimator="exact")
        >>> state = fisher.update(fisher.init(params), params, batch)
        >>> [round(float(x), 3) for x in fj.mean(state)["kernel"]]
        [0.389, 0.389, 0.556]
    """
    check_arguments(apply_fn, likelihood)
    if example is not None:
        check_batch(example, "example")
    kind = kind or ("true" if estimator == "sampled" else "empirical")
    _check(estimator, kind, unit, num_samples, temperature, chunk_size, rows_independent)
    unit = unit or _UNITS[estimator][0]
    needs_key = estimator in ("signs", "sampled") or (kind == "true" and estimator == "sequence")
    if estimator == "head":
        if combine is not None or num_samples != 1:
            raise ValueError("estimator='head' has neither combine= nor num_samples=: it is exact, and one leaf")
        if likelihood is not categorical:
            raise ValueError(f"estimator='head' is for fj.categorical outputs, found {likelihood.name}")
        chosen = HeadProblem(apply_fn, Structures(), Laid(), head_groups(groups), kind, unit, temperature, chunk_size)
        return head_estimator(chosen, example)
    observe_with: Callable = by_token if estimator == "exact" else by_batch if _whole(estimator, unit) else by_row

    structures, laid = Structures(), Laid()

    def grouped(params: Tree) -> list:
        check_parameters(params)

        def specs():
            assert example is not None
            return trace(apply_fn, params, (example.inputs,), None, structures, None).structure.specs

        return roles.groupings(groups, params, None if example is None else specs)

    def problem(params: Tree) -> Problem:
        return Problem(
            apply_fn, likelihood, structures, laid, grouped(params), combine, estimator, kind, unit, num_samples,
            temperature, chunk_size, rows_independent,
        )  # fmt: skip

    def init(params: Tree):
        check_parameters(params)
        laid.note_params(params)
        laid.note_rows(None if example is None else example.inputs)
        if example is not None and observe_with is by_row:
            problem(params).rows_alone(params, example.inputs)
        like = jax.eval_shape(lambda p: problem(p).reduce(_floating(p)), params)
        if combine is None:
            like = roles.as_sharded(grouped(params), params, like)
        return meshes.on_mesh_of(welford.init(like, unit=unit), params)

    def observe(params: Tree, batch: Batch, key: Array | None = None, *, taps=None, taps_scale=1.0) -> Moments:
        check_batch(batch)
        if taps is not None:
            if estimator != "sequence":
                raise ValueError(
                    f"estimator={estimator!r} differentiates a loss of its own and takes no taps of another; only "
                    "head and sequence do"
                )
            return reject_if(*by_taps(problem(params), params, batch, taps, taps_scale))
        if needs_key and key is None:
            raise ValueError(f"estimator={estimator!r} with kind={kind!r} draws random numbers: pass key=")
        found, bad = observe_with(problem(params), params, batch, key)
        return reject_if(found, bad)

    def update(state, params: Tree, batch: Batch, key: Array | None = None, **given):
        return welford.add(state, observe(params, batch, key, **given))

    def group_sizes(params: Tree) -> Tree:
        return roles.sizes(grouped(params), params)

    return FisherEstimator(init, observe, update, welford.add, group_sizes)


def _whole(estimator: str, unit: str) -> bool:
    """Whether the batch is one observation of one backward pass."""
    return unit == "batch" and estimator != "sequence"


def _floating(tree: Tree) -> Tree:
    """Leaves that are not floating become ``None``."""
    return jax.tree.map(lambda x: x if is_floating(x) else None, tree)


def _check(estimator, kind, unit, num_samples, temperature, chunk_size, rows_independent):
    if estimator not in _UNITS:
        raise ValueError(f"estimator is one of {', '.join(_UNITS)}, found {estimator!r}")
    if kind not in ("empirical", "true"):
        raise ValueError(f"kind is 'empirical' or 'true', found {kind!r}")
    if estimator == "sampled" and kind != "true":
        raise ValueError("estimator='sampled' draws its labels from the model: kind is 'true'")
    if unit is not None and unit not in _UNITS[estimator]:
        raise ValueError(f"estimator={estimator!r} observes by {' or '.join(_UNITS[estimator])}, not by {unit!r}")
    if num_samples < 1 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(f"num_samples and chunk_size are at least 1, found {num_samples} and {chunk_size}")
    if rows_independent not in (None, True):
        raise ValueError(f"rows_independent is None (the program says) or True (you do), found {rows_independent!r}")
    if not temperature > 0:
        raise ValueError(f"temperature is positive, found {temperature}")
    if temperature != 1 and (kind == "empirical" or estimator == "exact"):
        raise ValueError("a temperature changes the distribution of sampled labels: it needs sampled labels")
