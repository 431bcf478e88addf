"""The states of several tasks as one."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.cli.report.store import ReportStore
from fisher_jax.cli.report.task_state import Task
from fisher_jax.welford import State


def merged(tasks: Sequence[Task]) -> dict[str, Any]:
    """The arrays of all tasks, read one after the other: Welford states by Chan's formula, counts by addition.

    Raises:
        InputError: arrays that cannot be read, or have another form than those of the first task.
    """
    whole: dict[str, Any] = {}
    for task in tasks:
        arrays = ReportStore(task.folder).restore()[task.name]
        if whole and _form(arrays) != _form(whole):
            raise InputError(f"{task.place} holds other arrays than {tasks[0].place}; measure it again.")
        whole = {name: _add(whole[name], x) if whole else x for name, x in arrays.items()}
    return whole


def _add(a: Any, b: Any) -> Any:
    return _merge(a, b) if isinstance(a, State) else a + b


@functools.partial(jax.jit, donate_argnums=0)
def _merge(a: State, b: State) -> State:
    # Separate runs number their documents anew.
    return fj.welford.merge(fj.welford.finish(a), b)


def _form(arrays: dict[str, Any]) -> Any:
    leaves, treedef = jax.tree.flatten(arrays)
    return treedef, [(x.shape, x.dtype) for x in leaves]
