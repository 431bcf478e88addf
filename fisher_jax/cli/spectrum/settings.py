"""Eigenvalues of the curvature of a language model's loss on a text, each with a bound of its
error: sharpness, condition number, gap; with --density how all of them are distributed, with --blocks the
spectrum and capacity of every layer. Writes spectrum.html, spectrum.md, spectrum.csv and pictures.

examples:
  fisher-jax spectrum --parameters final_norm                 one small tensor: a minute
  fisher-jax spectrum                                         the 10 largest over all parameters; long
  fisher-jax spectrum --operator hessian --k 3 --max-tokens 256   both ends
  fisher-jax spectrum --parameters "layers/attention" --density --blocks --out attention
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run import options
from fisher_jax.cli.run.options import Settings, option
from fisher_jax.cli.run.values import count, fraction
from fisher_jax.cli.spectrum.patterns import pattern

OPERATORS = ("ggn", "fisher", "empirical-fisher", "hessian")


@dataclass(frozen=True, kw_only=True)
class SpectrumSettings(Settings):
    """What one run of the spectrum was asked to do."""

    operator: str = option(
        "ggn", None, "generalised Gauss-Newton (default; equal to the true Fisher of a language model), true Fisher, "
        "empirical Fisher, or Hessian (both ends of its spectrum)", group="what to measure", choices=OPERATORS,
        fixed=True,
    )  # fmt: skip
    parameters: str | None = option(
        None, pattern, "a regular expression searched in names such as layers/attention/q/kernel or "
        "final_norm/scale; the others are frozen (default: all)", metavar="PATTERN", fixed=True,
    )  # fmt: skip
    k: int = option(10, count(1, 10_000), "eigenvalues of each end", fixed=True)
    density: bool = option(False, help="also the density of all eigenvalues, by random probes")
    blocks: bool = option(False, help="also the spectrum and the capacity of every layer's tensors")
    model: str = options.model()
    text: tuple[str, ...] = options.text()
    split_documents: str = options.split_documents()
    max_tokens: int = option(1_280, count(1), "next tokens that the mean is over", fixed=True)
    row_length: int = options.row_length()
    tol: float = option(
        0.01, fraction(0.01), "wanted bound of each eigenvalue's error, relative to it", group="how to measure it",
        metavar="P", fixed=True,
    )  # fmt: skip
    max_products: int = option(
        300, count(1, 1_000_000), "Lanczos steps, at most; it stops as soon as all eigenvalues have converged"
    )
    check_every: int = option(
        1, count(0), "products between looks at what has converged. The bounds hold whenever it stops, but a further "
        "copy of a repeated eigenvalue, or one that the random start hardly contains, may appear only later: 0 looks "
        "only when the basis is full, and so takes more products", fixed=True,
    )  # fmt: skip
    basis: int | None = option(
        None, count(3, 100_000), "vectors in memory, each as large as the chosen parameters; Lanczos restarts when "
        "they are full (default: what 10 GiB hold, between 20 and 40 for k of 10)", fixed=True,
    )  # fmt: skip
    batch_size: int = option(1, count(1), "rows at a time inside a product: more memory", fixed=True)
    remat: bool = option(False, help="recompute activations in backward passes: less memory", fixed=True)
    probes: int = option(4, count(2, 10_000), "random vectors of the density")
    density_steps: int = option(20, count(2, 10_000), "products per probe")
    block_tokens: int = option(
        32, count(1), "tokens whose scores the block spectra are of, spread over the text: one backward pass each"
    )
    dtype: str = options.dtype(default="float32")
    seed: int = options.seed("start vector, probes, drawn labels")
    out: Path = options.out("spectrum", group="where to keep it")
    resume: bool = options.resume()
    overwrite: bool = options.overwrite("drop an earlier run")
    checkpoint_every: float | None = options.checkpoint_every(
        None, " (default: 30 if the basis is below 2 GiB, otherwise nothing is saved)"
    )

    @property
    def which(self) -> str:
        """A Hessian has two ends; the others have no negative eigenvalue."""
        return "both" if self.operator == "hessian" else "largest"

    @property
    def wanted(self) -> int:
        """Eigenvalues of all ends."""
        return 2 * self.k if self.which == "both" else self.k

    def of_finished(self) -> dict[str, Any]:
        """What a finished run must share beside: how far it went at most."""
        return {**self.fixed(), "--max-products": self.max_products}

    def additions(self) -> dict[str, Any]:
        """What a finished run can be given later; None where it was not asked for."""
        return {
            "density": {"probes": self.probes, "density_steps": self.density_steps} if self.density else None,
            "blocks": {"block_tokens": self.block_tokens} if self.blocks else None,
        }

    def with_additions(self, earlier: dict[str, Any]) -> Self:
        """These, and what an earlier run had beside."""
        new: dict[str, Any] = {}
        for name, given in earlier.items():
            if given is not None and not getattr(self, name):
                new |= {name: True, **given}
        return replace(self, **new)

    def checked(self) -> Self:
        ends = " of both ends" if self.which == "both" else ""
        if self.max_products < self.wanted:
            raise InputError(
                f"--max-products {self.max_products} is fewer than the {self.wanted} eigenvalues{ends} that are "
                "asked for; give more products or a smaller --k."
            )
        if self.basis is not None and self.basis < self.wanted + 2:
            raise InputError(
                f"--basis {self.basis} is too small: {self.wanted} eigenvalues{ends} need at least "
                f"{self.wanted + 2} vectors; give more or a smaller --k."
            )
        return self
