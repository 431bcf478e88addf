"""A state that is saved and restored has the same bits."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax.cli.doctor.records import Check, Leaves
from fisher_jax.cli.doctor.subject import Subject


def _state(subject: Subject) -> dict:
    moments = fj.welford.observe({"head": jnp.asarray(subject.params["head"])})
    return {"fisher": fj.welford.add(fj.welford.init(moments), moments), "params": subject.params}


def _bits(tree: object) -> Leaves:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.frombuffer(np.asarray(x).tobytes(), np.uint8) for path, x in leaves}


def restored(subject: Subject) -> Leaves:
    with tempfile.TemporaryDirectory(prefix="fisher-jax-doctor-") as folder:
        fj.checkpoint.save(Path(folder) / "state", _state(subject), metadata={"model": "doctor"})
        return _bits(fj.checkpoint.restore(Path(folder) / "state", metadata={"model": "doctor"}))


CHECKS = (
    Check("checkpoint, save and restore", restored, lambda subject: _bits(_state(subject)), slack=0.0, quick=True),
)
