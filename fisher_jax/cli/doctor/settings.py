"""The options of `fisher-jax doctor`, with no heavy import so that help is instant."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import values_for
from fisher_jax.cli.run.values import place, seconds

__all__ = ["DTYPES", "DoctorSettings", "add_doctor_options", "doctor_settings_from"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class DoctorSettings:
    """What one examination was asked to do."""

    dtypes: tuple[str, ...] = ()
    quick: bool = False
    seconds: float = 60.0
    json: Path | None = None


def add_doctor_options(parser: argparse.ArgumentParser) -> None:
    """Options in the order in which a person meets them."""
    default = DoctorSettings()
    parser.add_argument(
        "--dtypes",
        metavar="D",
        nargs="+",
        choices=DTYPES,
        default=[],
        help="of the parameters: float32, bfloat16, float16, float64 (default: float32 and bfloat16, float16 on an "
        "accelerator, and float64 where JAX_ENABLE_X64 is set)",
    )
    parser.add_argument("--quick", action="store_true", help="one check of each kind, in float32")
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=seconds,
        default=default.seconds,
        help=f"end after this time and say how many checks are missing ({default.seconds:g}; 0: no limit)",
    )
    parser.add_argument("--json", metavar="FILE", type=place, help="also write everything to this file")


def doctor_settings_from(options: argparse.Namespace) -> DoctorSettings:
    """Checked settings."""
    file = None if options.json is None else Path(options.json)
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise InputError(f"--json {file} is no file that can be written; give a file name in a folder that exists.")
    if file is not None and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise InputError(f"--json {file} cannot be written; choose another file.")
    if len(set(options.dtypes)) != len(options.dtypes):
        raise InputError("--dtypes names a dtype twice; give each once.")
    return DoctorSettings(**values_for(DoctorSettings, options) | {"json": file})
