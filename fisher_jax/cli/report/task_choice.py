"""Which task of a report a command reads: the named one, the only one that fits, or a question with every answer."""

from collections.abc import Callable, Iterable, Sequence
from itertools import product

from fisher_jax._support.errors import InputError
from fisher_jax.cli.report.store import TaskProgress
from fisher_jax.cli.report.task_state import Task, find_task, split_place, tasks_of
from fisher_jax.cli.run.choice_error import TaskChoiceError, Way, listed


def unfinished(progress: TaskProgress) -> str:
    """Why a task cannot be read yet, or nothing."""
    if not progress.finished:
        return f"is not finished ({progress.so_far})"
    return "" if progress.part is None else f"is part {progress.part} of a run"


def lacks_layers(progress: TaskProgress) -> str:
    """Why a task does not have every tensor, or nothing."""
    if progress.settings["--parameters"] != "all":
        return "was measured without --parameters all"
    return unfinished(progress)


def candidates(
    place: str, task: str | None = None, *, lacks: Callable[[TaskProgress], str] = unfinished
) -> list[Task]:
    """The tasks of `report` or `report:pubmed` that can be read: the named or only one, or all that lack nothing.

    What the named or only one lacks is for its reader to say.

    Raises:
        InputError: no state, no such task, or several of which none fits.
    """
    folder, named = split_place(place)
    if task is not None and named not in (None, task):
        raise InputError(f"{place} names the task {named!r} and --task {task!r}; give one of them.")
    store = tasks_of(folder)
    name = task or named or (next(iter(store.runs)) if len(store.runs) == 1 else None)
    if name is not None:
        return [find_task(store, name)]
    found = [find_task(store, name) for name, progress in store.runs.items() if not lacks(progress)]
    if not found:
        reasons = ", ".join(f"{name} {lacks(progress)}" for name, progress in store.runs.items())
        raise InputError(f"no task of {folder} can be used: {reasons}; measure one with fisher-jax report.")
    return found


def choose(
    places: Sequence[str],
    found: Sequence[Sequence[Task]],
    *,
    choices: Iterable[tuple[Task, ...]] | None = None,
    together: Callable[[tuple[Task, ...]], bool] = lambda tasks: True,
    way: Callable[[tuple[Task, ...]], Way],
) -> tuple[Task, ...]:
    """The only choice whose tasks go together; the choices are one task of each place, unless they are given.

    Raises:
        TaskChoiceError: there are several choices.
    """
    every = list(product(*found) if choices is None else choices)
    # Where nothing goes together the reader says why.
    fitting = [tasks for tasks in every if together(tasks)] or every
    if len(fitting) == 1:
        return fitting[0]
    several = [
        f"{place} holds the tasks {listed([task.name for task in tasks])}"
        for place, tasks in zip(places, found, strict=True)
        if len(tasks) > 1
    ]
    raise TaskChoiceError(f"{listed(several)}, and more than one choice fits", [way(tasks) for tasks in fitting])
