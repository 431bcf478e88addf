"""Report folders whose states are made from chosen numbers: no model is run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax.cli.report.layers import on_parts, part_sizes
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.report.store import ReportStore, TaskProgress, Text

ROW_LENGTH = 32
MOST = 20  # documents


def state_of(values):
    """A Welford state of documents of ten tokens each, [documents, groups]; one program for any number of them."""
    values = np.float32(values)
    missing = MOST - len(values)
    return _state(
        np.pad(values, ((0, missing), (0, 0))), np.pad(np.full(len(values), 10.0, np.float32), (0, missing))
    )


@jax.jit
def _state(values, weights):
    moments = fj.welford.observe(values, weights, unit="document", units=jnp.arange(MOST))
    return fj.welford.add(fj.welford.init(moments), moments)


def keep(out, task, model, rows, layers=None, *, counts=None, fingerprint=None, done=1, text=None, **more):
    """One task of a report: the documents' values of every row, by kind, and of all totals of the layers.

    A report has both kinds: one that is not given is as the other.
    """
    rows = {**dict.fromkeys(("empirical", "true"), next(iter(rows.values()))), **rows}
    parameters = "head" if layers is None else "all"
    settings = ReportSettings(dtype="float32", row_length=ROW_LENGTH, parameters=parameters).fixed()
    settings |= {f"--{name.replace('_', '-')}": value for name, value in more.items()}
    arrays = {kind: state_of(values) for kind, values in rows.items()}
    arrays["counts"] = jnp.zeros(model.config.vocab_size, jnp.int32) if counts is None else jnp.asarray(counts)
    if layers is not None:
        arrays["layers"] = state_of(layers)
    progress = TaskProgress(
        settings, fingerprint or model.fingerprint, text or f"digest of {task}", 1, done,
        tokens=10 * len(next(iter(rows.values()))), model_name="tiny",
        texts=[Text([task], "none", text or f"digest of {task}")],
    )  # fmt: skip
    ReportStore(Path(out)).save(task, arrays, progress)
    return out


def places(model):
    """Where the numbers of every total of the layers stand in their vector, by field and path; and how many."""
    sizes = part_sizes(model, ReportSettings(row_length=ROW_LENGTH))
    number = sum(x.size for field in sizes.values() for x in field.values())
    found = on_parts(np.arange(number), sizes)
    return {name: {path: x.astype(int) for path, x in field.items()} for name, field in found.items()}, number
