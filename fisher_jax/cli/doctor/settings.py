"""Whether this device and this compiler compute what they should: versions, devices, memory,
settings and caches; then every estimator, the closed-form head, K-FAC, Lanczos and a checkpoint on a small decoder,
in each dtype, against loops of one token. It says what to do where something is wrong (exit code 1), and is what a
bug report starts with.

examples:
  fisher-jax doctor                        a minute on two cores
  fisher-jax doctor --json doctor.json     the file to send with a bug report
  fisher-jax doctor --dtypes float16 --seconds 0
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import Settings, option
from fisher_jax.cli.run.values import file, seconds

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(Settings):
    """What one examination was asked to do."""

    dtypes: tuple[str, ...] = option(
        (), None, "of the parameters: float32, bfloat16, float16, float64 (default: float32 and bfloat16, float16 on "
        "an accelerator, and float64 where JAX_ENABLE_X64 is set)", metavar="D", nargs="+", choices=DTYPES,
    )  # fmt: skip
    quick: bool = option(False, help="one check of each kind, in float32")
    seconds: float = option(
        60.0, seconds, "end after this time and say how many checks are missing; 0 for no limit", metavar="SECONDS"
    )
    json: Path | None = option(None, file, "also write everything to this file", metavar="FILE")

    def checked(self) -> Self:
        file = self.json
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise InputError(f"--json {file} cannot be written; give a file name in a folder that exists.")
        if file is not None and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise InputError(f"--json {file} cannot be written; choose another file.")
        if len(set(self.dtypes)) != len(self.dtypes):
            raise InputError("--dtypes names a dtype twice; give each once.")
        return self
