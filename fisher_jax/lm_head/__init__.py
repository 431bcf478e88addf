"""Closed-form per-token Fisher of a softmax head, without a backward pass and without ``[T, V, H]``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from fisher_jax import groups as groups_room
from fisher_jax import welford
from fisher_jax._support import meshes, rejection
from fisher_jax._support.dtypes import is_floating, wide_dtype
from fisher_jax._support.lanes import Laid, Lanes, lanes_of
from fisher_jax._tracing.reading import readable_inputs
from fisher_jax.batch import Batch
from fisher_jax.batch.tokens import tokens_of, unit_ids, weights_of
from fisher_jax.likelihoods import categorical
from fisher_jax.lm_head import by_token, by_vocabulary, entries
from fisher_jax.lm_head.scores import VALUE_BITS
from fisher_jax.lm_head.softmax import Head
from fisher_jax.welford.estimator import FisherEstimator
from fisher_jax.welford.moments import check_unit, reject_if
from fisher_jax.welford.parts import of_parts

__all__ = ["estimator", "moments"]

KINDS = ("empirical", "true")


def moments(
    hidden: Float[ArrayLike, "*lead width"],
    head: Float[ArrayLike, "vocabulary width"],
    targets: Int[ArrayLike, "*lead"] | None,
    weights: Shaped[ArrayLike, "*lead"] | None = None,
    *,
    groups: "groups_room.Group | str" = "row",
    kind: str | tuple[str, ...] = "empirical",
    unit: str = "token",
    units: Int[ArrayLike, " rows"] | None = None,
    bias: Float[ArrayLike, " vocabulary"] | None = None,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    log_sum_exp: Float[ArrayLike, "*lead"] | None = None,
    chunk_size: int | None = None,
    axis_name: str | None = None,
    with_log_likelihood: bool = False,
) -> Any:
    """Mean and variance of per-token squared scores of a softmax head ``z = h W^T + b``.

    The score of token ``t`` is ``d log p(y_t) / d W[v, j] = -(p_tv - [v = y_t]) h_tj``. With weights ``w`` and
    ``W = sum w``, the mean is per weighted token, whatever the unit of observation:

    - empirical: ``F[v, j] = sum_t w_t (p_tv - [v = y_t])**2 h_tj**2 / W``
    - true, exactly and without sampling: ``F[v, j] = sum_t w_t p_tv (1 - p_tv) h_tj**2 / W``. The mean over labels
      is taken already; a token's observation is ``p (1 - p) h_j**2``.

    Groups sum the squares: ``row`` over ``j`` (one value per vocabulary token, ``[V]``), ``column`` over ``v``
    (``[H]``), ``tensor`` over both (a scalar), ``param`` over nothing (``[V, H]``). For a model whose embedding is
    tied to its head this is the Fisher of the use *as head*, not of the tied parameter.

    Args:
        hidden: ``[..., H]``, what the head multiplies (after the final norm).
        head: ``[V, H]``, float32 or bfloat16 (or the rows of one device, see ``axis_name``).
        targets: labels ``[...]`` in ``[0, V)``; ``None`` for ``kind="true"``. Where the weight is 0 they are ignored.
        weights: ``[...]``, per token. ``None`` is all ones; bool says that all are 0 or 1, which saves half of the
            state for ``unit="token"``.
        groups: ``"row"``, ``"column"``, ``"tensor"``, ``"param"``, or the same from ``fj.groups``.
        kind: ``"empirical"``, ``"true"``, or a tuple of both, which shares the logits and returns a tuple.
        unit: what one observation is: ``"token"``; ``"sequence"``, one entry of the leading axis; ``"document"``,
            consecutive entries of one id in ``units``, across batches too; ``"batch"``. An observation's value is
            the mean over its tokens, its weight the sum of theirs.
        units: ids ``[rows]`` for ``unit="document"``.
        bias: ``[V]``, added to the logits. Its own Fisher is not part of the result.
        soft_cap: ``c`` where the model uses logits ``c tanh(z / c)``.
        temperature: labels come from ``softmax(z / temperature)`` while scores stay untempered; ``kind="true"`` only.
        log_sum_exp: ``[...]``, of the final logits, as the loss has it. Saves one of four matrix products for
            ``groups="param", unit="token"``; the other ways need the exponentials anyway and do without it.
        chunk_size: tokens at a time for ``row``, ``column`` and ``tensor`` (default 64), vocabulary rows at a time
            for ``param`` (default: about half a million logits).
        axis_name: under ``jax.shard_map``, the mesh axis over which the vocabulary is split evenly; ``targets`` are
            indices in the whole vocabulary, results the device's own rows. The head is never gathered. However the
            arrays are split, `jax.shard_map` is called with ``check_vma=False``.
        with_log_likelihood: also return ``log p(y_t)``, ``[...]``, 0 where the weight is 0.

    Returns:
        `fisher_jax.welford.Moments` (a tuple of them for a tuple of kinds), at least float32, or
        ``(moments, log_likelihood)``. A NaN, a label out of range or a negative weight marks them as rejected.
        Edge cases: no tokens of positive weight give weight 0 and mean 0.

    Precision: in float32 an entry is off by at most ``30 eps (1 + max |z|)``, relative; about 1e-5 for logits of
    scale 1, more at scale 40. In float64 the same code is exact to 1e-12. With ``unit="token"`` the variance of a
    batch is a difference of sums and off by a few ``eps mean**2``: a standard deviation below a thousandth of the
    mean is not resolved. The other units have no such limit.

    Raises:
        ValueError: shapes that do not fit, unknown options, a temperature for the empirical Fisher.
        TypeError: labels that are not integers.

    Source: Kunstner, Balles and Hennig 2019 for the two Fishers; the softmax forms follow from ``dz = p - onehot``.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> hidden, head = jnp.ones((1, 4, 2)), jnp.zeros((5, 2))
        >>> found = fj.lm_head.moments(hidden, head, jnp.array([[0, 1, 2, 2]]))
        >>> [round(float(x), 3) for x in fj.welford.mean(found)]
        [0.38, 0.38, 0.68, 0.08, 0.08]
    """
    return laid_moments(
        Laid(), hidden, head, targets, weights, groups=groups, kind=kind, unit=unit, units=units, bias=bias,
        soft_cap=soft_cap, temperature=temperature, log_sum_exp=log_sum_exp, chunk_size=chunk_size,
        axis_name=axis_name, with_log_likelihood=with_log_likelihood,
    )  # fmt: skip


def laid_moments(
    laid: Laid, hidden, head, targets, weights=None, *, groups="row", kind="empirical", unit="token", units=None,
    bias=None, soft_cap=None, temperature=1.0, log_sum_exp=None, chunk_size=None, axis_name=None,
    with_log_likelihood=False,
) -> Any:  # fmt: skip
    """`moments`, where it was seen before on which axes of a mesh arrays lie."""
    group = groups_room.resolve(groups).name
    kinds = (kind,) if isinstance(kind, str) else tuple(kind)
    hidden, head, lead = _check_arrays(hidden, head, bias, log_sum_exp)
    _check_options(kinds, unit, temperature, soft_cap, chunk_size, lead, targets)
    binary = weights is None or jnp.asarray(weights).dtype == bool

    whole_weights = None if binary else jnp.all((jnp.asarray(weights) == 0) | (jnp.asarray(weights) == 1))
    dtype = wide_dtype(hidden.dtype, head.dtype)
    lanes = lanes_of(head, hidden, lead[0], laid) if lead else Lanes(1)

    def run(shared, rows):
        head, bias, whole_weights = shared
        hidden, targets, weights, units, log_sum_exp = rows
        softmax_head = Head(head, bias, soft_cap, axis_name, dtype)
        rows, mask = _rows(hidden, softmax_head, targets, weights, units, unit, binary)
        rows = rows._replace(whole_weights=whole_weights, beside=lanes.number > 1 and not lanes.explicit)
        found, log_likelihood = _run(rows, softmax_head, group, kinds, unit, temperature, log_sum_exp, chunk_size)
        if targets is not None:
            log_likelihood = jnp.where(rows.weights != 0, log_likelihood, 0)
        return found, log_likelihood.reshape(hidden.shape[:-1]), mask

    def close(found, log_likelihood, mask):
        if targets is not None:
            # Where another reason is known, a log-likelihood that is not a number has that reason.
            broken = (mask == 0) & ~jnp.all(jnp.isfinite(log_likelihood))
            mask = mask | rejection.reason_mask(non_finite=broken)
        return {k: reject_if(found[k], mask) for k in kinds}, log_likelihood

    shared, rows = (head, bias, whole_weights), (hidden, targets, weights, units, log_sum_exp)
    if lanes.number == 1:
        each, log_likelihood = meshes.replicating(lambda *both: close(*run(*both)), shared, rows)
    else:
        found, log_likelihood, mask = lanes.each(run, shared, rows)

        def merged(found, log_likelihood, mask):
            found = {k: of_parts(x) for k, x in found.items()}
            return close(found, log_likelihood, rejection.any_of(mask))[0]

        each = lanes.together(merged, found, log_likelihood, mask)
        log_likelihood = lanes.joined(log_likelihood)
    result = each[kind] if isinstance(kind, str) else tuple(each[k] for k in kinds)
    return (result, log_likelihood) if with_log_likelihood else result


def _rows(hidden, head: Head, targets, weights, units, unit: str, binary: bool) -> tuple[by_token.TokenRows, Array]:
    """Tokens in rows of one observation each, cleaned where the weight is 0, and a mask of reasons to reject them."""
    lead = hidden.shape[:-1]
    outputs = jax.ShapeDtypeStruct((*lead, head.total_size), head.dtype)
    tokens, mask = tokens_of(categorical, outputs, Batch(None, targets, weights), targets is not None)
    weights, targets = tokens.weights, tokens.targets
    active = weights > 0
    labels = jnp.full(lead, -1, jnp.int32)
    if targets is not None:
        labels = jnp.where(active & (targets >= 0), targets, -1).astype(jnp.int32)
    whole = unit in ("token", "batch")
    number = 1 if whole or not lead else lead[0]
    rows = by_token.TokenRows(
        jnp.where(active[..., None], hidden, 0).reshape(number, -1, hidden.shape[-1]),
        labels.reshape(number, -1),
        weights.reshape(number, -1),
        unit_ids(unit, units, number),
        binary,
    )
    return rows, mask


def _run(rows, head, group, kinds, unit, temperature, log_sum_exp, chunk_size):
    if rows.targets.size == 0:
        raise ValueError("a batch needs at least one token position (its weight may be 0)")
    if group != "param":
        return by_token.moments_by_token(
            rows, head, group=group, kinds=kinds, unit=unit, temperature=temperature,
            chunk=chunk_size or by_token.DEFAULT_CHUNK,
        )  # fmt: skip
    chunk = min(chunk_size or by_vocabulary.default_chunk(rows.targets.shape[1]), head.size)
    if unit == "token" and temperature == 1:
        if log_sum_exp is None:
            flat = rows.hidden.reshape(-1, rows.hidden.shape[-1])
            labels = rows.targets.reshape(-1)
            log_sum_exp = by_vocabulary.stream_partition(flat, labels, head, chunk, 1.0).log_sum_exp(labels)
        return entries.token_moments(rows, head, kinds, log_sum_exp, chunk)
    return by_vocabulary.moments_by_vocabulary(
        rows, head, kinds=kinds, unit=unit, temperature=temperature, chunk=chunk
    )


def estimator(
    hidden_fn: Callable[[Any, Any], Array],
    head_fn: Callable[[Any], Array],
    *,
    unit: str = "sequence",
    **options,
) -> FisherEstimator:
    """The head's Fisher as a `FisherEstimator`, for models given as functions.

    Args:
        hidden_fn: ``hidden_fn(params, inputs) -> [B, S, H]``.
        head_fn: ``head_fn(params) -> [V, H]``.
        unit, options: as in `moments`.

    Returns:
        ``init(params)``, ``observe(params, batch, key=None)`` and ``update(state, params, batch, key=None)``.

    Example:
        >>> import fisher_jax as fj, jax.numpy as jnp
        >>> params = {"embed": jnp.eye(3, 2), "head": jnp.ones((3, 2))}
        >>> fisher = fj.lm_head.estimator(lambda p, x: p["embed"][x], lambda p: p["head"])
        >>> batch = fj.next_token_batch(jnp.array([[0, 1, 2]]))
        >>> state = fisher.update(fisher.init(params), params, batch)
        >>> fj.welford.mean(state).shape
        (3,)
    """
    group = groups_room.resolve(options.get("groups", "row")).name
    if not isinstance(options.get("kind", "empirical"), str):
        raise ValueError("an estimator has one kind, 'empirical' or 'true'")

    laid = Laid()

    def init(params):
        laid.note_params(params)
        head = jax.eval_shape(head_fn, params)
        shape = {"row": head.shape[:1], "column": head.shape[1:], "tensor": (), "param": head.shape}[group]
        like = jax.ShapeDtypeStruct(shape, wide_dtype(head.dtype))
        return welford.init(like, unit=unit, scale=VALUE_BITS if group in ("row", "param") else 0)

    def observe(params, batch: Batch, key=None):
        del key
        inputs, bad = readable_inputs(hidden_fn, params, batch, batch.weights)
        hidden, weights = hidden_fn(params, inputs), batch.weights
        if batch.real is not None:
            used, odd = weights_of(batch, hidden.shape[:-1], wide_dtype(hidden.dtype))
            bad = bad | odd
            weights = used > 0 if weights is None else used  # those that are not given are 0 or 1
        laid.note_rows(batch.inputs)
        found = laid_moments(
            laid, hidden, head_fn(params), batch.targets, weights, unit=unit, units=batch.units, **options
        )
        return reject_if(found, found.reasons | bad)

    def update(state, params, batch: Batch, key=None):
        return welford.add(state, observe(params, batch, key))

    return FisherEstimator(init, observe, update, welford.add)


def _check_arrays(hidden, head, bias, log_sum_exp):
    hidden, head = jnp.asarray(hidden), jnp.asarray(head)
    if hidden.ndim < 1 or head.ndim != 2 or hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"hidden is [..., width] and head [vocabulary, width], found {list(hidden.shape)} and {list(head.shape)}"
            + ("; transpose the head" if head.ndim == 2 and hidden.shape[-1:] == head.shape[:1] else "")
        )
    for name, x in (("hidden", hidden), ("head", head)):
        if not is_floating(x):
            raise TypeError(f"{name} is an array of floats, found dtype {x.dtype}")
    lead = hidden.shape[:-1]
    if log_sum_exp is not None and jnp.shape(log_sum_exp) != lead:
        raise ValueError(
            f"log_sum_exp has the leading shape of hidden, {list(lead)}, found {list(jnp.shape(log_sum_exp))}"
        )
    if bias is not None and jnp.shape(bias) != head.shape[:1]:
        raise ValueError(f"bias has one value per vocabulary row, [{head.shape[0]}], found {list(jnp.shape(bias))}")
    return hidden, head, lead


def _check_options(kinds, unit, temperature, soft_cap, chunk_size, lead, targets):
    if not kinds or any(k not in KINDS for k in kinds) or len(set(kinds)) != len(kinds):
        raise ValueError(f"kind is 'empirical', 'true' or a tuple of both, found {kinds}")
    check_unit(unit)
    if targets is None and "empirical" in kinds:
        raise ValueError("the empirical Fisher needs targets; kind='true' does without")
    if not temperature > 0:
        raise ValueError(f"temperature is positive, found {temperature}")
    if temperature != 1 and kinds != ("true",):
        raise ValueError("a temperature changes the distribution of sampled labels: it needs kind='true'")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is positive or None, found {soft_cap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is at least 1, found {chunk_size}")
    if unit in ("sequence", "document") and not lead:
        raise ValueError(f"unit={unit!r} needs hidden with a leading axis of rows, [rows, ..., width]")
