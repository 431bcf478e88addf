# The names at the top, in the sections of the documentation; each is imported at its first use, so that the command
# line answers at once. docs/names.md says what the modules hold.

# Modules
from . import checkpoint as checkpoint
from . import continual as continual
from . import estimators as estimators
from . import exchange as exchange
from . import groups as groups
from . import kfac_tools as kfac_tools
from . import lm_head as lm_head
from . import models as models
from . import moving_average as moving_average
from . import operators as operators
from . import shift as shift
from . import spectra as spectra
from . import stats as stats
from . import welford as welford

# Batches and likelihoods
from .batch.batch import Batch as Batch, next_token_batch as next_token_batch
from .likelihoods import (
    Likelihood as Likelihood,
    categorical as categorical,
    bernoulli as bernoulli,
    gaussian as gaussian,
    gaussian_with_scale as gaussian_with_scale,
)

# Measure
from .estimators.group_fisher import group_fisher as group_fisher
from .welford.estimator import FisherEstimator as FisherEstimator
from .moving_average import ema as ema
from .estimators.track import track_fisher as track_fisher
from ._support.rejection import check as check

# Read
from .uses.reading import mean as mean, standard_error as standard_error, interval as interval
from .uses.group_sums import per_parameter as per_parameter

from .cli.report.any_model import report as report

# Capture
from ._tracing.taps import (
    capture as capture,
    value_grad_and_taps as value_grad_and_taps,
    gradients_from_taps as gradients_from_taps,
    Tap as Tap,
    Use as Use,
    coverage as coverage,
    Coverage as Coverage,
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

# Spectra
from .spectra.krylov.spectrum import lanczos as lanczos
from .spectra.krylov.density import spectral_density as spectral_density
from .spectra.blocks.of_batch import block_spectrum as block_spectrum

# Inverse curvature
from .operators.solving import solve as solve
from .uses.influence import influence as influence

# Use
from .uses.pruning import saliency as saliency, prune_mask as prune_mask
from .uses.merging import merge_params as merge_params
from .uses.shift import importance_shift as importance_shift
from .uses.overlap import overlap as overlap
from .uses.continual import ewc_penalty as ewc_penalty

# Errors
from ._support.errors import InputError as InputError, RejectedBatchError as RejectedBatchError
