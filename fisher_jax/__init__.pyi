# The public names, in sections; each is imported at its first use, so that the command line answers at once.

# Modules
from . import checkpoint as checkpoint
from . import exchange as exchange
from . import groups as groups
from . import lm_head as lm_head
from . import moving_average as moving_average
from . import operators as operators
from . import welford as welford

# Batches and likelihoods
from .batch.batch import Batch as Batch, next_token_batch as next_token_batch
from .likelihoods import (
    Likelihood as Likelihood,
    categorical as categorical,
    bernoulli as bernoulli,
    gaussian as gaussian,
)

# Group Fisher
from .estimators.group_fisher import group_fisher as group_fisher
from .welford.estimator import FisherEstimator as FisherEstimator
from .moving_average import ema as ema
from .estimators.track import track_fisher as track_fisher
from .estimators.host import on_device as on_device, on_host as on_host
from .uses.align import per_parameter as per_parameter
from ._support.rejection import check as check

# Capture
from ._tracing.taps import (
    capture as capture,
    value_grad_and_taps as value_grad_and_taps,
    gradients_from_taps as gradients_from_taps,
    coverage as coverage,
)

# K-FAC
from .kronecker.options import (
    Curvature as Curvature,
    Refresh as Refresh,
    Adaptive as Adaptive,
    FixedRate as FixedRate,
)
from .kronecker.optimizer.kfac import kfac as kfac
from .kronecker.optimizer.transformation import scale_by_kfac as scale_by_kfac
from .kronecker.curvature.factors import kfac_factors as kfac_factors, precondition as precondition
from .kronecker.optimizer.from_state import kfac_factors_from_state as kfac_factors_from_state
from .kronecker.blocks.coverage import kfac_coverage as kfac_coverage, KFACCoverage as KFACCoverage
from .kronecker.curvature.spectrum import kfac_spectrum as kfac_spectrum, KFACSpectrum as KFACSpectrum

# Spectra
from .spectra.krylov import (
    lanczos as lanczos,
    Spectrum as Spectrum,
    spectral_density as spectral_density,
    Density as Density,
    trace as trace,
    frobenius_norm as frobenius_norm,
    Estimate as Estimate,
)
from .spectra.blocks import (
    block_spectrum as block_spectrum,
    block_spectra as block_spectra,
    BlockSpectrum as BlockSpectrum,
    BlockSpectra as BlockSpectra,
    Capacity as Capacity,
)

# Pruning and decisions
from .uses.pruning import saliency as saliency, prune_mask as prune_mask, apply_mask as apply_mask
from .uses.decisions import (
    prune_below as prune_below,
    CautiousPruning as CautiousPruning,
    decide as decide,
    Decisions as Decisions,
)
from .uses.uncertainty import (
    data_needed as data_needed,
    DataNeeded as DataNeeded,
    effective_count as effective_count,
    signal_to_noise as signal_to_noise,
)
from .uses.multiplicity import holm as holm, q_values as q_values

# Several tasks
from .uses.shift import (
    importance_shift as importance_shift,
    Shift as Shift,
    importance_drift as importance_drift,
    Drift as Drift,
)
from .uses.overlap import overlap as overlap, Overlap as Overlap, conflict as conflict, Conflict as Conflict

# Merging and continual learning
from .uses.merging import (
    merge_params as merge_params,
    merge_task_vectors as merge_task_vectors,
    shrunk_mean as shrunk_mean,
)
from .uses.merging_kfac import merge_kfac as merge_kfac, KFACMerge as KFACMerge
from .uses.continual import (
    ewc_penalty as ewc_penalty,
    scale_by_fisher as scale_by_fisher,
    protect_important as protect_important,
    project_away as project_away,
)

# Errors
from ._support.errors import InputError as InputError, RejectedBatchError as RejectedBatchError
