"""The states that a save can name, by names of their own: where a class lives, or what it is called, is not data.

A state that is not in this table is saved as its leaves with their paths, and needs ``like=`` to be restored.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class StateType:
    """One row of the table.

    Attributes:
        place: module and class, as they are called today.
        arrays, trees, numbers, texts: names of fields that hold an array, a tree of arrays, a Python or NumPy
            number, a string; ``anything`` holds whatever can be saved.
        optional: those of them that may be ``None``.
        static: fields that are not leaves, each with the test that its value passes.
        converted: whether it holds more than data, see `uses`.
        statistic: what the values of a measured state are of their groups, ``"sum"`` or ``"mean"``.
    """

    place: str
    arrays: str = ""
    trees: str = ""
    numbers: str = ""
    texts: str = ""
    anything: str = ""
    optional: str = ""
    static: dict[str, Callable[[Any], bool]] = dataclasses.field(default_factory=dict)
    statistic: str | None = None
    converted: bool = False

    @functools.cached_property
    def kinds(self) -> dict[str, str]:
        """{field: kind}, static ones too."""
        kinds = ("arrays", "trees", "numbers", "texts", "anything")
        return {f: kind for kind in kinds for f in getattr(self, kind).split()} | dict.fromkeys(self.static, "static")

    @functools.cached_property
    def cls(self) -> type:
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(f"fisher_jax.{module}"), name)


def _unit(x: Any) -> bool:
    return x in ("token", "sequence", "document", "batch")


def _scale(x: Any) -> bool:
    return type(x) is int and abs(x) <= 1024


def _flag(x: Any) -> bool:
    return type(x) is bool


def _share(x: Any) -> bool:
    return type(x) in (int, float) and 0 <= x < 1


def _number(x: Any) -> bool:
    return type(x) in (int, float)


def _form(x: Any) -> bool:
    return type(x) is str


def _plan(x: Any) -> bool:
    return type(x) is tuple and all(type(part) is dict and part.get("type") == "kfac block" for part in x)


def _names(x: Any) -> bool:
    return type(x) is tuple and all(type(part) is tuple and all(type(name) is str for name in part) for part in x)


_MOMENTS = "mean m2 square_mean square_m2"
_WEIGHTS = "weight weight_sq count"
_REJECTED = "rejected reasons"

_TABLE = {
    "batch": StateType("batch.batch:Batch", trees="inputs targets", arrays="weights real units",
        optional="weights real units"),
    "welford": StateType("welford.state:State", trees=_MOMENTS, arrays=f"{_WEIGHTS} {_REJECTED}", anything="open",
        optional="square_mean square_m2 open", static={"unit": _unit, "scale": _scale, "errors": _flag},
        statistic="sum"),
    "moments": StateType("welford.moments:Moments", trees=_MOMENTS, arrays=f"{_WEIGHTS} several {_REJECTED}",
        anything="first last", optional="square_mean square_m2 several first last",
        static={"unit": _unit, "scale": _scale}, statistic="sum"),
    "fragment": StateType("welford.moments:Fragment", trees="mean", arrays="weight unit_id"),
    "moving average": StateType("moving_average:MovingAverage", trees="average", arrays=f"weight {_REJECTED}",
        static={"decay": _share}, statistic="sum"),
    "track fisher": StateType("estimators.track:TrackFisherState", arrays="step", anything="fisher"),
    "scale by fisher": StateType("uses.continual:ScaleByFisherState", trees="factor"),
    "protect important": StateType("uses.continual:ProtectState", trees="free"),
    "decisions": StateType("uses.decisions:Decisions", trees="verdict p adjusted"),
    "cautious pruning": StateType("uses.decisions:CautiousPruning", trees="mask p adjusted",
        numbers="num_pruned num_unsure"),
    "shift": StateType("uses.shift:Shift", trees="difference standard_error z degrees_of_freedom p q testable"),
    "drift": StateType("uses.shift:Drift", trees="change difference standard_error z p q testable"),
    "overlap": StateType("uses.overlap:Overlap", numbers="fisher_overlap cosine jaccard shared expected p",
        anything="sizes"),
    "conflict": StateType("uses.overlap:Conflict", arrays="cosine opposed"),
    "data needed": StateType("uses.evidence:DataNeeded", trees="units tokens"),
    "lanczos spectrum": StateType("spectra.krylov.summary:Spectrum",
        arrays="eigenvalues residuals converged ritz_values ritz_residuals",
        numbers="num_missing condition_number condition_is_lower_bound spectral_gap effective_rank negative_count "
        "negative_sum complete null_dimension num_valid_steps num_products num_restarts dimension rounding",
        texts="condition_over statement", trees="eigenvectors", optional="eigenvectors"),
    "density": StateType("spectra.krylov.density:Density",
        arrays="grid density standard_error cumulative cumulative_error edges nodes weights",
        numbers="width mean mean_error num_products dimension"),
    "log density": StateType("spectra.krylov.density:LogDensity", arrays="grid positive negative edges",
        numbers="zero"),
    "estimate": StateType("spectra.krylov.estimates:Estimate",
        numbers="value standard_error num_products exact_part"),
    "block spectra state": StateType("spectra.blocks.state:BlockSpectraState", anything="kept", trees="traces",
        arrays=f"weight count {_REJECTED}", static={"names": _names}),
    "block covariance": StateType("spectra.blocks.score_storage:Covariance", arrays="sums"),
    "block rows": StateType("spectra.blocks.score_storage:ScoreRows", arrays="rows filled lost"),
    "block spectrum": StateType("spectra.blocks.capacity:BlockSpectrum", arrays="eigenvalues", anything="capacity",
        numbers="num_parameters num_scores error_bound", texts="method"),
    "capacity": StateType("spectra.blocks.capacity:Capacity",
        numbers="trace log_determinant participation_ratio entropy_rank condition_number damped_condition_number "
        "rank damping"),
    "kfac state": StateType("kronecker.optimizer.refresh:KFACState", anything="blocks raw",
        arrays=f"step age {_REJECTED} raw_age", optional="raw raw_age"),
    "kfac optimizer state": StateType("kronecker.optimizer.kfac:KFACOptimizerState", anything="factors annealing",
        trees="velocity", arrays="damping learning_rate momentum ratio"),
    "kfac rate scale": StateType("kronecker.optimizer.annealing:RateScale", arrays="scale slope curvature"),
    "kfac block factors": StateType("kronecker.curvature.decomposition:BlockFactors", anything="A G",
        arrays="rows diagonal eigenvalues", optional="A G rows diagonal eigenvalues"),
    "kfac softmax head": StateType("kronecker.factors.woodbury:SoftmaxHead", arrays="mean columns"),
    "kfac observation": StateType("kronecker.statistics.observation:Observation", trees="sums", arrays="weight bad",
        anything="probabilities taps", optional="probabilities taps"),
    "kfac factors": StateType("kronecker.curvature.factors:Factors", anything="blocks", arrays="damping",
        static={"plan": _plan, "form": _form, "power": _number}),
    "kfac block": StateType("kronecker.blocks.plan:Block", texts="kind path",
        numbers="leaf number units width head low_rank columns bias", anything="use bias_use",
        optional="bias use bias_use"),
    "parameter use": StateType("_tracing.uses:Use", texts="kind primitive where",
        anything="segments loops operand roles options signature", numbers="index", converted=True),
    "kfac merge": StateType("uses.merging_kfac:KFACMerge", trees="params", arrays="residual num_steps"),
    "kfac spectrum": StateType("kronecker.curvature.spectrum:KFACSpectrum", arrays="eigenvalues",
        anything="paths blocks", numbers="trace dimension"),
    "kfac block eigenvalues": StateType("kronecker.curvature.spectrum:BlockEigenvalues", texts="kind",
        arrays="eigenvalues residuals", numbers="dimension num_zero trace"),
    "kfac coverage": StateType("kronecker.curvature.coverage:KFACCoverage", anything="rows"),
    "kfac eigen": StateType("kronecker.factors.forms:Eigen", arrays="values vectors"),
    "kfac diagonal": StateType("kronecker.factors.forms:Diagonal", arrays="values"),
    "kfac low rank": StateType("kronecker.factors.forms:LowRank", arrays="columns values vectors"),
}  # fmt: skip


def state_type(name: Any) -> StateType | None:
    return _TABLE.get(name) if isinstance(name, str) else None


def name_of(x: Any) -> str | None:
    """The name of a state's type; ``None`` for what is not in the table."""
    cls = type(x)
    if cls.__module__.partition(".")[0] != "fisher_jax":
        return None
    return _names_by_place().get(f"{cls.__module__.partition('.')[2]}:{cls.__qualname__}")


@functools.cache
def _names_by_place() -> dict[str, str]:
    return {entry.place: name for name, entry in _TABLE.items()}
