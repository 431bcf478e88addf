"""What a finished spectrum keeps in `spectrum.json`: every number, and the settings that they are of."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fisher_jax._support.errors import InputError
from fisher_jax.cli.page.files import digest
from fisher_jax.cli.run.folder import read_plain, write_atomically
from fisher_jax.cli.spectrum.measure import Measured, Passes
from fisher_jax.cli.spectrum.sections import SpectrumFindings
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.spectra.blocks.capacity import BlockSpectrum, Capacity
from fisher_jax.spectra.krylov.density import Density
from fisher_jax.spectra.krylov.summary import Spectrum

__all__ = ["read_facts", "read_finished", "write_finished"]

_FORMAT = "fisher-jax spectrum 1"


def write_finished(path: Path, found: SpectrumFindings, facts: dict[str, Any]) -> None:
    """Floats keep all their digits."""
    content = {
        "format": _FORMAT,
        "facts": facts,
        "additions": found.settings.additions(),
        "model_name": found.model_name,
        "parameters": found.parameters,
        "tokens": found.tokens,
        "rows": found.rows,
        "documents": found.documents,
        "passes": found.passes._asdict(),
        "spectrum": _measured(found.spectrum),
        "basis": found.basis,
        "density": None if found.density is None else _measured(found.density),
        "blocks": [[name, layer, _plain(x)] for name, group in found.blocks.items() for layer, x in group.items()],
        "seconds": found.seconds,
    }
    write_atomically(path, json.dumps(content | {"digest": digest(content)}) + "\n")


def read_facts(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(settings, additions) of the finished run, or None where there is none."""
    content = _content(path)
    return None if content is None else (content["facts"], content["additions"])


def read_finished(path: Path, settings: SpectrumSettings) -> SpectrumFindings:
    """The findings of `write_finished`, to the bit.

    Raises:
        InputError: the file is damaged.
    """
    content = _content(path)
    try:
        assert content is not None
        blocks: dict[str, dict[int | None, Any]] = {}
        for name, layer, saved in content["blocks"]:
            capacity = Capacity(**saved["capacity"])
            blocks.setdefault(name, {})[layer] = _of(BlockSpectrum, saved | {"capacity": capacity})
        return SpectrumFindings(
            settings,
            content["model_name"],
            content["parameters"],
            content["tokens"],
            content["rows"],
            content["documents"],
            Passes(**content["passes"]),
            _read_measured(Spectrum, content["spectrum"]),
            content["basis"],
            None if content["density"] is None else _read_measured(Density, content["density"]),
            blocks,
            content["seconds"],
        )
    except (AssertionError, ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(path) from None


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(read_plain(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        raise _damaged(path) from None
    known = isinstance(content, dict) and content.pop("digest", None) == digest(content)
    known = known and content.get("format") == _FORMAT
    if not known or not all(isinstance(content.get(name), dict) for name in ("facts", "additions")):
        raise _damaged(path)
    return content


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is not what fisher-jax spectrum wrote; choose another --out, or --overwrite.")


def _measured(measured: Measured) -> dict[str, Any]:
    return measured._asdict() | {"found": _plain(measured.found)}


def _read_measured(kind: Any, saved: dict[str, Any]) -> Measured:
    return Measured(_of(kind, saved["found"]), saved["per_product"], saved["products"])


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(field) for name, field in value._asdict().items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _of(kind: Any, saved: dict[str, Any]) -> Any:
    """A NamedTuple whose lists are arrays."""
    return kind(**{name: np.asarray(x) if isinstance(x, list) else x for name, x in saved.items()})
