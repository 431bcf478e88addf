"""What a spectrum keeps in its folder: while it runs the state of `fj.lanczos`, at its end every number."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.earlier_run import refuse_difference, refuse_misuse
from fisher_jax.cli.run.folder import read_plain
from fisher_jax.cli.run.json_files import digest, read_facts, read_sealed, write_facts, write_sealed
from fisher_jax.cli.run.records import UnreadableError
from fisher_jax.cli.run.temporary import temporary_beside
from fisher_jax.cli.spectrum.measure import Measured, Passes
from fisher_jax.cli.spectrum.sections import SpectrumFindings
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.spectra.blocks.capacity import BlockSpectrum, Capacity
from fisher_jax.spectra.krylov.density import Density
from fisher_jax.spectra.krylov.summary import Spectrum

_FORMAT = "fisher-jax spectrum 1"


class SpectrumStore:
    """An unfinished run, in ``unfinished/``: its state and the facts that it is of; a finished one: spectrum.json."""

    def __init__(self, out: Path):
        self.out = out
        self.state = out / "unfinished" / "lanczos"
        self._facts = out / "unfinished" / "run.json"
        self._finished = out / "spectrum.json"

    def check_before_loading(self, *, resume: bool, overwrite: bool) -> None:
        there = self._facts.exists() and fj.checkpoint.revision(self.state) > 0
        finished = self._finished.exists()
        refuse_misuse(self.out, there=there or finished, finished=finished, resume=resume, overwrite=overwrite)
        if there and resume:
            self._unfinished()

    def begin(self, facts: dict[str, Any], *, resume: bool, saving: bool) -> None:
        """Raises InputError where the saved run is another one."""
        if resume:
            refuse_difference(self.out, self._unfinished(), facts)
            return
        self._finished.unlink(missing_ok=True)
        self.drop()
        if saving:
            write_facts(self._facts, facts)

    def _unfinished(self) -> dict[str, Any]:
        try:
            return read_facts(self._facts) or {}
        except UnreadableError as error:
            raise InputError(f"{self._facts} is damaged: {error}; give --overwrite to start again.") from None

    def drop(self) -> None:
        """The unfinished run goes in one step, so that a process killed here has all of it or nothing."""
        folder = self.state.parent
        if folder.exists():
            aside = temporary_beside(folder)
            folder.rename(aside)
            shutil.rmtree(aside)

    def after_interrupt(self) -> str:
        if fj.checkpoint.revision(self.state):
            return "interrupted; the same command with --resume goes on from the last save."
        self.drop()
        return "interrupted before anything was saved; --checkpoint-every saves along the way."

    @property
    def digest(self) -> str:
        """Of all that was found."""
        return digest(read_plain(self._finished))

    def write(self, found: SpectrumFindings, facts: dict[str, Any]) -> None:
        names = [x.name for x in fields(found) if x.name not in ("settings", "blocks")]
        content = {
            "format": _FORMAT,
            "facts": facts,
            "additions": found.settings.additions(),
            **{name: _plain(getattr(found, name)) for name in names},
            "blocks": [[name, layer, _plain(x)] for name, of in found.blocks.items() for layer, x in of.items()],
        }
        write_sealed(self._finished, content)

    def read_facts(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(settings, additions) of the finished run, or None where there is none."""
        content = self._content()
        return None if content is None else (content["facts"], content["additions"])

    def read(self, settings: SpectrumSettings) -> SpectrumFindings:
        """The findings of `write`, to the bit.

        Raises:
            InputError: the file is damaged.
        """
        content = self._content()
        try:
            assert content is not None
            blocks: dict[str, dict[int | None, Any]] = {}
            for name, layer, saved in content["blocks"]:
                capacity = Capacity(**saved["capacity"])
                blocks.setdefault(name, {})[layer] = _of(BlockSpectrum, saved | {"capacity": capacity})
            plain = ("model_name", "parameters", "tokens", "rows", "documents", "basis", "seconds")
            return SpectrumFindings(
                settings=settings,
                passes=Passes(**content["passes"]),
                spectrum=_read_measured(Spectrum, content["spectrum"]),
                density=None if content["density"] is None else _read_measured(Density, content["density"]),
                blocks=blocks,
                **{name: content[name] for name in plain},
            )
        except (AssertionError, ValueError, KeyError, TypeError, AttributeError):
            raise self._damaged() from None

    def _content(self) -> dict[str, Any] | None:
        try:
            content = read_sealed(self._finished)
        except UnreadableError:
            raise self._damaged() from None
        whole = content is None or (
            content.get("format") == _FORMAT and all(isinstance(content.get(x), dict) for x in ("facts", "additions"))
        )
        if not whole:
            raise self._damaged()
        return content

    def _damaged(self) -> InputError:
        return InputError(
            f"{self._finished} is not what fisher-jax spectrum wrote; choose another --out, or --overwrite."
        )


def _read_measured(kind: Any, saved: dict[str, Any]) -> Measured:
    return Measured(_of(kind, saved["found"]), saved["per_product"], saved["products"])


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(field) for name, field in value._asdict().items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _of(kind: Any, saved: dict[str, Any]) -> Any:
    """A NamedTuple whose lists are arrays."""
    return kind(**{name: np.asarray(x) if isinstance(x, list) else x for name, x in saved.items()})
