"""What `fisher-jax spectrum` computes: the chosen parameters, the operator, its eigenvalues, density and blocks."""

import functools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax._support.printable import few
from fisher_jax.batch.tokens import log_probs
from fisher_jax.cli.run.checkpoints import checkpoints
from fisher_jax.cli.run.tools import Tools
from fisher_jax.cli.spectrum.patterns import matching
from fisher_jax.cli.spectrum.progress import ProductProgress
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.models import LanguageModel
from fisher_jax.models.weight_names import flatten, unflatten
from fisher_jax.text.packing import Rows

Tree = Any
_BASIS_BYTES = 10 * 2**30
_SCORE_BYTES = 4 * 2**30
_ORDER = (
    "embedding", "positions", "attention_norm", "q_norm", "k_norm", "/q/", "/k/", "/v/", "/o/",
    "attention_post_norm", "mlp_norm", "/gate/", "/up/", "/down/", "mlp_post_norm", "final_norm", "head",
)  # fmt: skip
_BLOCK_CHUNK = 4  # backward passes at a time
_OPERATORS = {
    "ggn": fj.operators.ggn,
    "fisher": fj.operators.fisher,
    "empirical-fisher": fj.operators.empirical_fisher,
    "hessian": fj.operators.hessian,
}


class Passes(NamedTuple):
    """Seconds of plain passes over the same tokens, and the loss that they found."""

    forward: float
    forward_and_backward: float
    loss: float


class Measured(NamedTuple):
    """A result, and what its products took."""

    found: Any
    per_product: float
    products: int


class Setup(NamedTuple):
    """What the curvature is of."""

    settings: SpectrumSettings
    model: LanguageModel
    rows: Rows
    chosen: dict[str, bool]  # for every parameter by name whether it moves

    @property
    def sizes(self) -> dict[str, int]:
        """Of the parameters that move."""
        return {name: leaf.size for name, leaf in flatten(self.model.params).items() if self.chosen[name]}

    @property
    def dimension(self) -> int:
        return sum(self.sizes.values())

    @property
    def moving(self) -> Tree:
        """The parameters that move, and `None`."""
        return fj.operators.restrict(self.model.params, unflatten(self.chosen))

    @property
    def batch(self) -> fj.Batch:
        """All rows as one batch, filled up with empty rows to whole micro-batches."""
        rows, size = self.rows, self.settings.batch_size
        missing = -len(rows.lengths) % size
        tokens, mask, _ = next(rows.batches(len(rows.lengths)))
        tokens, mask = (np.pad(x, ((0, missing), (0, 0))) for x in (tokens, mask))
        return fj.next_token_batch(jnp.asarray(tokens), jnp.asarray(mask))


def choose(model: LanguageModel, pattern: str | None) -> dict[str, bool]:
    """For every parameter by name whether it moves.

    Raises:
        InputError: the pattern is found in no name.
    """
    names = list(flatten(model.params))
    found = [True] * len(names) if pattern is None else matching(pattern, names)
    chosen = dict(zip(names, found, strict=True))
    if not any(chosen.values()):
        raise InputError(
            f"--parameters {pattern!r} matches no parameter of {model.name}; there are {few(names, 12)}."
        )
    return chosen


def operator_of(setup: Setup) -> Any:
    settings, model = setup.settings, setup.model
    return _OPERATORS[settings.operator](
        model.apply, fj.categorical, model.params, setup.batch, parameters=unflatten(setup.chosen),
        microbatch_size=settings.batch_size, remat=settings.remat,
    )  # fmt: skip


def basis_size(settings: SpectrumSettings, dimension: int) -> int:
    """Vectors to keep: what the memory holds, not so few that restarts are slow, not so many that it stops late."""
    if settings.basis is not None:
        return min(settings.basis, dimension)
    least, most = max(20, settings.wanted + 10), max(40, 2 * settings.wanted)
    return min(max(least, min(most, _BASIS_BYTES // (4 * dimension))), dimension)


def eigenvalues_of(setup: Setup, console: Console, folder: Path, every: float | None, tools: Tools) -> Measured:
    """The ends of the spectrum, saved in ``folder`` along the way and when a signal ends the run, if that is wanted.

    Raises:
        KeyboardInterrupt: Ctrl-C or a termination signal, after saving.
    """
    settings, like = setup.settings, setup.moving
    with ProductProgress(console, settings.max_products) as display, checkpoints(every or 0, tools) as checkpoint:
        count = display.counting(operator_of(setup))

        def apply(v: Tree) -> Tree:
            checkpoint.stop_if_asked()
            return count(v)

        found = fj.lanczos(
            apply, like, num_steps=settings.max_products, num_eigenvalues=settings.k,
            which=settings.which, key=jax.random.key(settings.seed), max_basis=basis_size(settings, setup.dimension),
            tol=settings.tol, check_period=settings.check_every or None, jit=False, resume=settings.resume,
            save=None if every is None else folder, save_period=lambda steps: checkpoint.due(),
        )  # fmt: skip
        if len(display.seconds) < 2:  # resumed at the end: the one product has compiled, and another is timed
            apply(jax.tree.map(jnp.zeros_like, like))
    return Measured(found, display.per_product, found.num_products)


def density_of(setup: Setup, console: Console) -> Measured:
    settings = setup.settings
    with ProductProgress(console, settings.probes * settings.density_steps) as display:
        found = fj.spectral_density(
            display.counting(operator_of(setup)), setup.moving, num_steps=settings.density_steps,
            num_probes=settings.probes,
            key=jax.random.fold_in(jax.random.key(settings.seed), 1), jit=False,
        )  # fmt: skip
    return Measured(found, display.per_product, found.num_products)


def time_passes(setup: Setup) -> Passes:
    """A forward pass, and a forward and backward pass, in the same micro-batches and for the same parameters.

    Raises:
        InputError: the loss is not finite.
    """
    model, moving, batch = setup.model, setup.moving, setup.batch
    size = setup.settings.batch_size
    parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), (batch.inputs, batch.targets, batch.weights))
    forward, total = _seconds(_summed, model.apply, False, moving, model.params, parts)
    mean = float(total) / float(jnp.sum(batch.weights))
    if not math.isfinite(mean):
        raise InputError(f"the loss of {model.name} on this text is {mean}, so it has no curvature here.")
    both, _ = _seconds(_summed, model.apply, True, moving, model.params, parts)
    return Passes(forward, both, mean)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summed(apply_fn: Callable, backward: bool, moving: Tree, params: Tree, parts: Any) -> Any:
    """The loss summed over all tokens, and its gradient if it is wanted, micro-batch by micro-batch."""

    def loss(moving, part):
        inputs, targets, weights = part
        joined = jax.tree.map(lambda p, m: p if m is None else m, params, moving, is_leaf=lambda x: x is None)
        return -jnp.sum(weights * log_probs(fj.categorical, apply_fn(joined, inputs), targets, weights))

    function = jax.value_and_grad(loss) if backward else loss
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, moving, jax.tree.map(lambda x: x[0], parts)))

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, function(moving, part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def _seconds(function: Any, *arguments: Any) -> tuple[float, Any]:
    """The second of two calls: the first one compiles."""
    jax.block_until_ready(function(*arguments))
    started = time.monotonic()
    out = jax.block_until_ready(function(*arguments))
    return time.monotonic() - started, out


def block_spectra_of(setup: Setup) -> dict[str, dict[int | None, Any]]:
    """``{tensor: {layer, or None where it has none: BlockSpectrum}}``, some tensors at a time to bound the memory.

    Of the empirical Fisher if that is the operator, otherwise of the true Fisher, with a label drawn per token.
    """
    settings, model, batch = setup.settings, setup.model, setup.batch
    weights = _spread(np.asarray(batch.weights), settings.block_tokens)
    number = int(np.sum(weights > 0))
    rows = np.flatnonzero(np.any(weights > 0, axis=1))
    some = fj.Batch(batch.inputs[rows], batch.targets[rows], jnp.asarray(weights[rows]))
    kind = "empirical" if settings.operator == "empirical-fisher" else "true"
    leaves = flatten(model.params)
    spectra: dict[str, fj.spectra.BlockSpectrum] = {}
    for names in _passes(setup.sizes, number):
        spectra |= fj.block_spectrum(
            model.apply, fj.categorical, model.params, some, kind=kind, blocks=_slashed,
            stacked=unflatten({name: name.startswith("layers/") for name in leaves}),
            parameters=unflatten({name: name in names for name in leaves}), chunk_size=_BLOCK_CHUNK,
            key=jax.random.fold_in(jax.random.key(settings.seed), 2),
        )  # fmt: skip
    found: dict[str, dict[int | None, Any]] = {}
    for name, spectrum in sorted(spectra.items(), key=lambda item: _place(item[0])):
        tensor, _, layer = name.partition("[")
        found.setdefault(tensor, {})[int(layer.rstrip("]")) if layer else None] = spectrum
    return found


def _spread(weights: np.ndarray, count: int) -> np.ndarray:
    """Weights of ``count`` tokens spread evenly over those that count, 0 for the others."""
    active = np.flatnonzero(weights)
    kept = np.zeros_like(weights).reshape(-1)
    if active.size:
        picked = active[np.unique(np.linspace(0, active.size - 1, min(count, active.size)).round().astype(int))]
        kept[picked] = weights.reshape(-1)[picked]
    return kept.reshape(weights.shape)


def _passes(sizes: dict[str, int], number: int) -> list[list[str]]:
    """Tensors whose scores fit into memory together.

    Raises:
        InputError: one tensor alone does not fit twice over.
    """
    passes: list[list[str]] = []
    filled = _SCORE_BYTES
    for name, size in sizes.items():
        needed = 4 * size * (number + 2 * _BLOCK_CHUNK)
        if needed > 2 * _SCORE_BYTES:
            raise InputError(
                f"--block-tokens {number} would keep {needed / 2**30:.1f} GiB of scores of {name}; give fewer tokens "
                "or leave it out with --parameters."
            )
        if filled + needed > _SCORE_BYTES:
            passes.append([])
            filled = 0
        passes[-1].append(name)
        filled += needed
    return passes


def _place(name: str) -> int:
    """Tensors in the order in which a token meets them; layers stay in theirs."""
    known = [i for i, part in enumerate(_ORDER) if part in name]
    return known[0] if known else len(_ORDER)


def _slashed(path: str) -> str:
    """``layers/mlp/up/kernel`` from ``['layers']['mlp']['up']['kernel']``."""
    return "/".join(re.findall(r"'([^']+)'", path))
