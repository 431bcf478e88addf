"""The optimizers of `fisher-jax train`, with defaults that need no tuning at the sizes of its models."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

import fisher_jax as fj
from fisher_jax.cli.train.settings import TrainSettings

_WARMUP = 0.05  # of the steps
_END = 0.1  # of the highest rate, where the cosine ends
_CLIP = 1.0  # norm of a gradient, for all but K-FAC, which has its own measure of a step

TITLES = {
    "kfac": "K-FAC",
    "kfac-fixed": "K-FAC fixed",
    "adamw": "AdamW",
    "sgd": "SGD",
    "muon": "Muon",
    "lion": "Lion",
}


class Hyperparameters(NamedTuple):
    """What a run uses where nothing was asked for."""

    learning_rate: float | None
    weight_decay: float
    damping: float | None = None


_DEFAULTS = {
    "kfac": Hyperparameters(None, 0.0, 0.1),
    "kfac-fixed": Hyperparameters(0.1, 0.0, 1e-2),
    "adamw": Hyperparameters(1e-2, 0.1),
    "sgd": Hyperparameters(0.3, 0.0),
    "muon": Hyperparameters(2e-2, 0.1),
    "lion": Hyperparameters(1e-3, 0.1),
}


def hyperparameters(settings: TrainSettings) -> Hyperparameters:
    """Those of the run: the given ones, else the optimizer's own."""
    own = _DEFAULTS[settings.optimizer]
    return Hyperparameters(
        own.learning_rate if settings.learning_rate is None else settings.learning_rate,
        own.weight_decay if settings.weight_decay is None else settings.weight_decay,
        own.damping if own.damping is None or settings.damping is None else settings.damping,
    )


def schedule(settings: TrainSettings, rate: float) -> optax.Schedule:
    """A linear warm-up over 5% of the steps, then a cosine to a tenth."""
    warmup = max(round(_WARMUP * settings.steps), 1)
    return optax.warmup_cosine_decay_schedule(0.0, rate, warmup, max(settings.steps, warmup + 1), _END * rate)


def build(settings: TrainSettings, apply_fn: Callable, example: fj.Batch) -> optax.GradientTransformationExtraArgs:
    """The transformation; `update` takes `batch` and `key` beside the parameters."""
    rate, decay, damping = hyperparameters(settings)
    if settings.optimizer.startswith("kfac"):
        return fj.kfac(
            apply_fn,
            example=_shapes(example),
            learning_rate=None if rate is None else schedule(settings, rate),
            damping=damping,
            weight_decay=decay,
            refresh=fj.Refresh(period=settings.update_every, factor_decay=0.9),
            step=None if rate is None else fj.FixedRate(kl_clip=1e-2),
        )
    assert rate is not None
    made = _OPTAX[settings.optimizer](schedule(settings, rate), decay)
    return optax.with_extra_args_support(optax.chain(optax.clip_by_global_norm(_CLIP), made))


_OPTAX: dict[str, Callable[[optax.Schedule, float], optax.GradientTransformation]] = {
    "adamw": lambda rate, decay: optax.adamw(rate, b2=0.95, weight_decay=decay),
    "sgd": lambda rate, decay: optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate, momentum=0.9, nesterov=True)
    ),
    "muon": lambda rate, decay: optax.contrib.muon(rate, weight_decay=decay),
    "lion": lambda rate, decay: optax.lion(rate, weight_decay=decay),
}


def _shapes(example: fj.Batch) -> fj.Batch:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), example)


def describe(settings: TrainSettings) -> str:
    """The optimizer in a few words, for the page."""
    rate, decay, damping = hyperparameters(settings)
    words = [TITLES[settings.optimizer]]
    if rate is None:
        words.append("rate and momentum from the local quadratic model, the rate falling as noise outweighs progress")
        words.append(f"damping from {damping:g} on")
    else:
        words.append(f"learning rate {rate:g} with warm-up and cosine")
        words += [f"damping {damping:g}"] if damping is not None else []
    if damping is not None:
        words.append(f"factors renewed every {settings.update_every} steps")
    return ", ".join([*words, f"weight decay {decay:g}"])
