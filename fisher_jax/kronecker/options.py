"""What a user chooses about K-FAC, each choice said once: the curvature, its refreshes, and the step."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fisher_jax._support.jax_internals import is_traced

__all__ = ["Adaptive", "Curvature", "FixedRate", "Refresh", "check_option"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curvature:
    """What the factors of K-FAC are of, how they are kept, and how they are inverted.

    Attributes:
        estimator: ``"empirical"`` (labels of the batch), ``"sampled"`` (labels from the model), ``"exact_head"`` (the
            true Fisher of a softmax head in closed form, other layers from sampled labels; costs one more forward
            pass) or ``"ggn"`` (exact over labels, one backward pass for each of at most 64 outputs). ``"auto"``:
            sampled in `fj.kfac`, since the empirical Fisher vanishes with the loss and steps grow; else empirical.
        policy: how ``G`` is kept. ``"all"``: by its columns, ``U U^T`` with ``U [out, T]``; ``"never"``: as an
            eigendecomposition; ``"hybrid"``: by columns above 4096 outputs; ``"auto"``: there, and where tokens are
            fewer than outputs, where columns are cheaper to build and to apply.
        token_cap: columns kept at most; from more, one is drawn from each of as many strata of those that are not
            zero, and scaled so that ``U U^T`` keeps its expectation. ``None``: all.
        factor_dtype: of ``U``; ``jnp.bfloat16`` halves it, with relative errors of ``2**-8`` in its entries.
            ``None``: that of the computation.
        form: ``"exact"`` inverts ``A (x) G + damping I``; ``"factored"`` adds ``pi sqrt(damping)`` to ``A`` and
            ``sqrt(damping) / pi`` to ``G``; ``"auto"`` is exact, but for the low-rank true Fisher of a softmax head.
            A tied leaf is always exact.
        power: ``(F + damping I)**power``, for example ``-0.5``; only ``-1`` for a tied leaf and a low-rank softmax
            head.
        shared: ``"expand"`` counts every position on its own; ``"reduce"`` sums output gradients and averages inputs
            over the positions of a row, except at the head.
        positions: ``{path: axes}``, for parameters whose program does not say, or says wrongly, to which rows and
            positions their tokens belong; paths are written as errors print them. Axes of what the parameter meets
            (of the indices for an embedding, of the output for a convolution, of one iteration inside of a loop):
            ``(row, position)``, one for each axis of ``Batch.real``, or ``(row,)`` where a row has one token;
            ``None`` for a use without tokens: all that it meets counts.
        temperature: labels are drawn from outputs divided by it.
        diagonal: ``diagonal(path)`` says which leaves get, in place of a block, the diagonal
            ``(sum_t s_t)**2 / W`` of the batch (scales and biases: squares of the gradient of every position, which
            is the sum over all that the parameter meets there, summed).
        eigenvalue_correction: EK-FAC. Of every kernel and embedding ``a_j g_i`` becomes
            ``sum_t (p_j . a_t)**2 (v_i . g_t)**2 / W``, the diagonal of the second moment of ``vec(g_t a_t^T)`` in
            the same basis: the best one in Frobenius norm. With columns ``U`` the sum is over the tokens that they
            are of, and what they do not span has no curvature, as without. ``eigenvalue_correction(path)`` says
            which leaves; a tied leaf, and the head of ``exact_head``, cannot be among them. Holds the taps of the
            whole backward pass, but for kernels by columns; an embedding takes one number more for each of its own.
            Needs ``form`` other than factored and an ``estimator`` other than ggn.

    Raises:
        ValueError: a field with another value, or two that cannot go together.

    Example:
        >>> import fisher_jax as fj
        >>> fj.Curvature(estimator="sampled", token_cap=256).policy
        'auto'
    """

    estimator: str = "auto"
    policy: str = "auto"
    token_cap: int | None = 1024
    factor_dtype: Any = None
    form: str = "auto"
    power: float = -1.0
    shared: str = "expand"
    positions: Mapping[str, tuple[int, ...] | None] | tuple = ()
    temperature: float = 1.0
    diagonal: Callable[[str], bool] | None = None
    eigenvalue_correction: bool | Callable[[str], bool] = False

    def __post_init__(self) -> None:
        _one_of(self, "estimator", "auto", "empirical", "sampled", "exact_head", "ggn")
        _one_of(self, "policy", "auto", "all", "hybrid", "never")
        _one_of(self, "form", "auto", "exact", "factored")
        _one_of(self, "shared", "expand", "reduce")
        _whole(self, "token_cap", optional=True)
        _number(self, "power", math.isfinite, "a finite number", fixed=True)
        _number(self, "temperature", lambda x: x > 0, "a positive number", fixed=True)
        object.__setattr__(self, "positions", _positions(self.positions))
        if self.factor_dtype is not None and not jnp.issubdtype(self.factor_dtype, jnp.floating):
            raise ValueError(f"factor_dtype is a floating dtype or None, found {self.factor_dtype!r}")
        if self.diagonal is not None and not callable(self.diagonal):
            raise ValueError(f"diagonal is a function of a leaf's path or None, found {self.diagonal!r}")
        if not isinstance(self.eigenvalue_correction, bool) and not callable(self.eigenvalue_correction):
            raise ValueError(
                "eigenvalue_correction is True, False or a function of a leaf's path, found "
                f"{self.eigenvalue_correction!r}"
            )
        if self.temperature != 1 and self.estimator in ("empirical", "ggn"):
            raise ValueError(
                f"temperature={self.temperature} changes the distribution of sampled labels, and "
                f"estimator={self.estimator!r} draws none; use estimator='sampled'"
            )
        if self.eigenvalue_correction and self.form == "factored":
            raise ValueError(
                "eigenvalue_correction leaves no product that factored damping could split; use form='exact'"
            )
        if self.eigenvalue_correction and self.estimator == "ggn":
            raise ValueError("eigenvalue_correction needs the taps of one backward pass; use estimator='sampled'")

    def is_diagonal(self, path: str) -> bool:
        return self.diagonal is not None and bool(self.diagonal(path))

    def corrects(self, path: str) -> bool:
        """Whether the eigenvalues of a kernel or embedding are corrected."""
        which = self.eigenvalue_correction
        return bool(which(path)) if callable(which) else which

    def settled(self, estimator: str) -> "Curvature":
        """With this estimator in place of ``"auto"``."""
        return dataclasses.replace(self, estimator=estimator) if self.estimator == "auto" else self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refresh:
    """When K-FAC's factors are renewed, and from what.

    Attributes:
        period: updates that share factors.
        statistics_period: statistics are taken every so many updates, at most ``period``, and stay in the state;
            factors are decomposed from them every ``period`` updates. ``None``: at the refresh.
        factor_decay: sums and what divides them are averaged with it before they are decomposed: ``A`` and ``G`` are
            means over the tokens of all statistics so far, those ``k`` statistics ago with ``factor_decay**k`` times
            their weight. Exact for all but columns ``U``, of which the ``factor_rank`` with the largest eigenvalues
            stay: exact where the rank of the average is not above. ``None``: the newest statistics alone.
        factor_rank: columns of an average; ``None``: as many as one batch gives.
        factor_rows: factors are taken from so many rows of the batch (the first axis of its arrays), a window that
            moves on from update to update (Martens and Grosse 2015, section 8, take an eighth). ``None``: from all.
        ramp: early factors are soon out of date: after ``n`` updates they serve at most ``1 + n // ramp``, and
            ``period`` from then on. ``None``: ``period`` from the start. ``"auto"``: 10 in `fj.kfac`, else ``None``.

    Raises:
        ValueError: a field with another value, or a rank without a decay.

    Example:
        >>> import fisher_jax as fj
        >>> fj.Refresh(period=20, factor_decay=0.9).statistics_period is None
        True
    """

    period: int = 10
    statistics_period: int | None = None
    factor_decay: float | None = None
    factor_rank: int | None = None
    factor_rows: int | None = None
    ramp: int | str | None = "auto"

    def __post_init__(self) -> None:
        _whole(self, "period")
        _whole(self, "statistics_period", optional=True)
        _whole(self, "factor_rank", optional=True)
        _whole(self, "factor_rows", optional=True)
        if self.ramp != "auto":
            _whole(self, "ramp", optional=True)
        if self.factor_decay is not None:
            _number(self, "factor_decay", lambda x: 0 <= x < 1, "the share of the past that stays, in [0, 1)")
        if self.statistics_period is not None and self.statistics_period > self.period:
            raise ValueError(f"statistics_period is at most period={self.period}, found {self.statistics_period}")
        if self.factor_rank is not None and self.factor_decay is None:
            raise ValueError(f"factor_rank={self.factor_rank} belongs to an average: pass factor_decay= too")

    @property
    def keeps_statistics(self) -> bool:
        """Whether statistics stay in the state between refreshes."""
        return self.statistics_period is not None or self.factor_decay is not None

    def settled(self, ramp: int | None) -> "Refresh":
        """With this ramp in place of ``"auto"``."""
        return dataclasses.replace(self, ramp=ramp) if self.ramp == "auto" else self


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedRate:
    """Steps of `fj.kfac` at a given learning rate, with momentum, inside a trust region.

    Attributes:
        kl_clip: nats per token. A step without momentum is shortened where its predicted KL divergence is above it;
            steps that agree add up to ``1 / (1 - momentum)`` of one. ``None``: no trust region.

    Raises:
        ValueError: ``kl_clip`` that is not positive.
    """

    kl_clip: float | None = 1e-3

    def __post_init__(self) -> None:
        if self.kl_clip is not None:
            _number(self, "kl_clip", lambda x: x > 0, "positive, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Steps of `fj.kfac` from the exact quadratic model of the loss on the batch, with a damping that follows.

    Attributes:
        adapt_period: updates between two looks at the loss after a step. Above 1 saves forward passes and risks a
            step that nobody looked at: a decoder of bytes whose curvature came from 8 of 16 rows diverged with 5, on
            every one of five seeds, and on none with 1.
        min_damping: a model of one batch predicts that batch well at any damping, also where the step fits its noise
            and nothing else; the rule alone lets damping fall until it does. ``None``: 1e-3, or the first damping
            where that is less.
        min_momentum, max_momentum: what minimises the model of one batch undoes much of the last update, which fitted
            the noise of the batch before; updates then never average over batches. ``None``: no bound. Where every
            batch is the whole data, no bound from above and ``rate_scale=1.0`` are faster.
        rate_scale: what minimises the model of one batch steps as far as its noise says, at the end too. ``"auto"``:
            the share of that rate falls when updates have come to move about a minimum instead of toward it, as the
            slope along each update on the next batch shows (Yaida 2019), and rises again while there is progress. A
            number or a schedule instead: one that falls as one over steps needs to know how many there will be
            (Robbins and Monro 1951).
        model_rows: the model's curvature is taken on the first so many rows of the batch (the first axis of its
            arrays), gradient and losses on all (Martens and Grosse 2015, section 8, take a quarter). ``None``: on
            all. Few rows say too little where they hold few tokens: 8 rows of 32 let a decoder of bytes take steps
            that raised its loss by 0.6 nats, all 32 did not.

    Raises:
        ValueError: a field with another value; ``rate_scale="auto"`` without ``max_momentum``.
    """

    adapt_period: int = 1
    min_damping: float | None = None
    min_momentum: float | None = 0.5
    max_momentum: float | None = 0.99
    rate_scale: str | float | Callable[[Any], Any] = "auto"
    model_rows: int | None = None

    def __post_init__(self) -> None:
        _whole(self, "adapt_period")
        _whole(self, "model_rows", optional=True)
        for name in ("min_damping", "min_momentum", "max_momentum"):
            if getattr(self, name) is not None:
                _number(self, name, lambda x: x >= 0, "at least 0, or None")
        if isinstance(self.rate_scale, str):
            _one_of(self, "rate_scale", "auto", more=", a number or a schedule")
        elif not callable(self.rate_scale):
            _number(self, "rate_scale", lambda x: x > 0, "positive, 'auto' or a schedule")
        if isinstance(self.rate_scale, str) and self.max_momentum is None:
            raise ValueError(
                "rate_scale='auto' needs max_momentum, 0.99 for example: a momentum without bound fits the noise "
                "that it looks for; or pass rate_scale=1.0"
            )


def check_option(name: str, found: Any, *kinds: type) -> None:
    """Raise where an argument is none of these classes."""
    if not isinstance(found, kinds):
        wanted = " or ".join(f"fj.{kind.__name__}(...)" for kind in kinds)
        raise TypeError(f"{name} is {wanted}, found {type(found).__name__}")


def _positions(told: Any) -> tuple:
    """Pairs of a path and axes, which hash."""
    try:
        pairs = tuple(told.items()) if isinstance(told, Mapping) else tuple((path, axes) for path, axes in told)
        for path, axes in pairs:
            whole = [isinstance(i, int | np.integer) and not isinstance(i, bool) and i >= 0 for i in axes or ()]
            repeated = axes is not None and len(set(axes)) != len(axes)
            if not isinstance(path, str) or not all(whole) or repeated or (axes is not None and not whole):
                raise ValueError
        return tuple((path, None if axes is None else tuple(map(int, axes))) for path, axes in pairs)
    except (TypeError, ValueError):
        raise ValueError(
            "positions is a mapping from the path of a parameter to different axes from 0 on, (row, position) or "
            f"(row,), or to None, found {told!r}"
        ) from None


def _one_of(options: Any, name: str, *known: str, more: str = "") -> None:
    found = getattr(options, name)
    if not isinstance(found, str) or found not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}{more}, found {found!r}")


def _whole(options: Any, name: str, optional: bool = False) -> None:
    found = getattr(options, name)
    if found is None and optional:
        return
    if not isinstance(found, int | np.integer) or isinstance(found, bool) or found < 1:
        raise ValueError(f"{name} is a whole number, at least 1{', or None' * optional}, found {found!r}")


def _number(options: Any, name: str, allowed: Callable[[Any], bool], words: str, fixed: bool = False) -> None:
    """``fixed``: the program depends on it, so that its value must be known while tracing."""
    found = getattr(options, name)
    if is_traced(found) and not fixed:
        return
    if isinstance(found, jax.Array | np.ndarray | np.generic) and not is_traced(found) and found.shape == ():
        found = found.item()
    if not isinstance(found, numbers.Real) or isinstance(found, bool) or not allowed(found) or math.isinf(found):
        raise ValueError(f"{name} is {words}, found {getattr(options, name)!r}")
