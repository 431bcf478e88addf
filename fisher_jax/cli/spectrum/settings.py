"""The options of `fisher-jax spectrum`, with no heavy import so that help is instant."""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import (
    ROW_LENGTH,
    add_folder_options,
    add_model_option,
    add_row_length_option,
    add_text_options,
    refuse_resume_and_overwrite,
    values_for,
)
from fisher_jax.cli.run.values import count, fraction, seed
from fisher_jax.cli.spectrum.patterns import pattern

__all__ = ["SpectrumSettings", "add_spectrum_options", "spectrum_settings_from"]

OPERATORS = ("ggn", "fisher", "empirical-fisher", "hessian")
# What decides the numbers of the Lanczos run, and so what a resumed run must share.
_FIXED = (
    "operator", "parameters", "k", "tokens", "length", "dtype", "batch_size", "remat", "basis", "tol", "check_every",
    "seed",
)  # fmt: skip


@dataclass(frozen=True)
class SpectrumSettings:
    """What one run of the spectrum was asked to do."""

    model: str = "smollm2"
    text: tuple[str, ...] = ("wikipedia",)
    split_documents: str = "none"
    tokens: int = 1_280
    length: int = ROW_LENGTH
    length_typed: bool = False
    operator: str = "ggn"
    parameters: str | None = None
    k: int = 10
    density: bool = False
    probes: int = 4
    density_steps: int = 20
    blocks: bool = False
    block_tokens: int = 32
    tol: float = 0.01
    max_products: int = 300
    check_every: int = 1
    basis: int | None = None
    batch_size: int = 1
    remat: bool = False
    dtype: str = "float32"
    seed: int = 0
    out: Path = Path("spectrum")
    resume: bool = False
    overwrite: bool = False
    save_every: int | None = None

    @property
    def which(self) -> str:
        """A Hessian has two ends; the others have no negative eigenvalue."""
        return "both" if self.operator == "hessian" else "largest"

    @property
    def wanted(self) -> int:
        """Eigenvalues of all ends."""
        return 2 * self.k if self.which == "both" else self.k

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by option name."""
        values = asdict(self)
        return {f"--{name.replace('_', '-')}": values[name] for name in _FIXED}

    def of_finished(self) -> dict[str, Any]:
        """What a finished run must share beside: how far it went at most."""
        return {**self.fixed(), "--max-products": self.max_products}

    def additions(self) -> dict[str, Any]:
        """What a finished run can be given later; None where it was not asked for."""
        return {
            "density": {"probes": self.probes, "density_steps": self.density_steps} if self.density else None,
            "blocks": {"block_tokens": self.block_tokens} if self.blocks else None,
        }

    def with_additions(self, earlier: dict[str, Any]) -> "SpectrumSettings":
        """These, and what an earlier run had beside."""
        new: dict[str, Any] = {}
        for name, options in earlier.items():
            if options is not None and not getattr(self, name):
                new |= {name: True, **options}
        return replace(self, **new)


def add_spectrum_options(parser: argparse.ArgumentParser) -> None:
    """Options in the order in which a person meets them."""
    default = SpectrumSettings()
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--operator",
        choices=OPERATORS,
        default=default.operator,
        help="generalised Gauss-Newton (default; equal to the true Fisher of a language model), true Fisher, "
        "empirical Fisher, or Hessian (both ends of its spectrum)",
    )
    what.add_argument(
        "--parameters",
        metavar="PATTERN",
        type=pattern,
        help="a regular expression searched in names such as layers/attention/q/kernel or final_norm/scale; the "
        "others are frozen (default: all)",
    )
    what.add_argument(
        "--k",
        metavar="N",
        type=count(1, 10_000),
        default=default.k,
        help="eigenvalues of each end (default %(default)s)",
    )
    what.add_argument("--density", action="store_true", help="also the density of all eigenvalues, by random probes")
    what.add_argument(
        "--blocks", action="store_true", help="also the spectrum and the capacity of every layer's tensors"
    )
    add_model_option(what, default.model)
    add_text_options(what, default.text, default.split_documents)
    what.add_argument(
        "--tokens", "--max-tokens", metavar="N", type=count(1), default=default.tokens,
        help=f"next tokens that the mean is over, at most (default {default.tokens:,})",
    )  # fmt: skip
    add_row_length_option(what, "--length", "--seq-len")
    _add_how(parser.add_argument_group("how to measure it"), default)
    where = parser.add_argument_group("where to keep it")
    add_folder_options(
        where, default.out, resume="go on with an interrupted run from what it saved",
        overwrite="drop what an interrupted run saved",
    )  # fmt: skip
    where.add_argument(
        "--save-every", metavar="N", type=count(0),
        help="products between saves, 0 for none (default: 10 if the basis is below 2 GiB, otherwise none)",
    )  # fmt: skip


def _add_how(how: Any, default: SpectrumSettings) -> None:
    how.add_argument(
        "--tol", metavar="P", type=fraction(0.01), default=default.tol,
        help="wanted bound of each eigenvalue's error, relative to it (default %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--max-products", metavar="N", type=count(1, 1_000_000), default=default.max_products,
        help="Lanczos steps, at most; it stops as soon as all eigenvalues have converged (default %(default)s)",
    )  # fmt: skip
    how.add_argument(
        "--check-every", metavar="N", type=count(0), default=default.check_every,
        help="products between looks at what has converged (default %(default)s). The bounds hold whenever it stops, "
        "but a further copy of a repeated eigenvalue, or one that the random start hardly contains, may appear only "
        "later: 0 looks only when the basis is full, and so takes more products",
    )  # fmt: skip
    how.add_argument(
        "--basis", metavar="N", type=count(3, 100_000),
        help="vectors in memory, each as large as the chosen parameters; Lanczos restarts when they are full "
        "(default: what 10 GiB hold, between 20 and 40 for k of 10)",
    )  # fmt: skip
    how.add_argument(
        "--batch-size", metavar="N", type=count(1), default=default.batch_size,
        help="rows at a time inside a product: more memory (default %(default)s)",
    )  # fmt: skip
    how.add_argument("--remat", action="store_true", help="recompute activations in backward passes: less memory")
    how.add_argument(
        "--probes",
        metavar="N",
        type=count(2, 10_000),
        default=default.probes,
        help="random vectors of the density (4)",
    )
    how.add_argument(
        "--density-steps",
        metavar="N",
        type=count(2, 10_000),
        default=default.density_steps,
        help="products per probe (20)",
    )
    how.add_argument(
        "--block-tokens", metavar="N", type=count(1), default=default.block_tokens,
        help="tokens whose scores the block spectra are of, spread over the text: one backward pass each (32)",
    )  # fmt: skip
    how.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype, help="of the model (float32)")
    how.add_argument("--seed", metavar="N", type=seed, default=0, help="start vector, probes, drawn labels (0)")


def spectrum_settings_from(options: argparse.Namespace) -> SpectrumSettings:
    """Checked settings."""
    refuse_resume_and_overwrite(options)
    length = {"length": options.length or ROW_LENGTH, "length_typed": options.length is not None}
    settings = SpectrumSettings(**values_for(SpectrumSettings, options) | length)
    ends = " of both ends" if settings.which == "both" else ""
    if settings.max_products < settings.wanted:
        raise InputError(
            f"--max-products {settings.max_products} is fewer than the {settings.wanted} eigenvalues{ends} that are "
            "asked for; give more products or a smaller --k."
        )
    if settings.basis is not None and settings.basis < settings.wanted + 2:
        raise InputError(
            f"--basis {settings.basis} is too small: {settings.wanted} eigenvalues{ends} need at least "
            f"{settings.wanted + 2} vectors; give more or a smaller --k."
        )
    return settings
