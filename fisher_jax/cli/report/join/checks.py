"""What is refused before anything is joined: a sentence names the folder, what was found there, and the way out."""

from collections.abc import Sequence
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax._support.printable import few
from fisher_jax.cli.report.store import TaskProgress, Text
from fisher_jax.cli.report.task_choice import candidates, choose
from fisher_jax.cli.report.task_state import Task
from fisher_jax.cli.run.choice_error import Way, listed


def chosen(places: Sequence[str], task: str) -> list[Task]:
    """A task of each folder: its only one, the named one, or the one that all folders hold.

    Raises:
        InputError: a folder without states, or several tasks that fit.
    """
    found = [candidates(place, task or None, lacks=_unfinished) for place in places]
    if all(len(tasks) == 1 for tasks in found):
        return [tasks[0] for tasks in found]
    held = [{one.name: one for one in tasks} for tasks in found]
    common = [name for name in held[0] if all(name in names for names in held)]
    if not common:
        place, names = next((p, list(n)) for p, n in zip(places, held, strict=True) if len(n) > 1)
        raise InputError(
            f"{place} holds the tasks {listed(names)}, and the folders have none in common; give FOLDER:TASK."
        )
    choices = [tuple(names[name] for names in held) for name in common]
    return list(choose(places, found, choices=choices, way=lambda tasks: Way(added=("--task", tasks[0].name))))


def check(tasks: Sequence[Task], page: dict[str, Any]) -> None:
    """Raises InputError unless the tasks are all parts of one run, or finished runs on different texts.

    Args:
        page: settings of the page that need not be the same.
    """
    first = tasks[0]
    for i, task in enumerate(tasks):
        earlier = next((x for x in tasks[:i] if _place(x) == _place(task)), None)
        if earlier is not None:
            raise InputError(f"{task.place} is given twice; give each folder once.")
        if task.progress.part is not None and (reason := _unfinished(task.progress)):
            raise InputError(
                f"{task.place} {reason}; go on with it first: fisher-jax report --part {task.progress.part} --resume."
            )
        if reason := _unfinished(task.progress):
            raise InputError(f"{task.place} {reason}; go on with it first: fisher-jax report --resume.")
        if not task.progress.model_source:
            raise InputError(
                f"{task.place} was measured by fj.report, whose model no command can open; join its states with "
                "fj.welford.merge."
            )
        _check_alike(first, task, page)
    if first.progress.part is None:
        _check_texts(tasks)
    else:
        _check_parts(tasks, first.progress.part.of)


def _unfinished(progress: TaskProgress) -> str:
    return "" if progress.finished else f"is not finished ({progress.so_far})"


def _told(text: Text) -> str:
    return f"{' '.join(text.names[:3])} ({text.digest[:12]})"


def _place(task: Task) -> tuple[Any, str]:
    return task.folder.resolve(), task.name


def _check_alike(first: Task, task: Task, page: dict[str, Any]) -> None:
    one, other = first.progress, task.progress
    if one.model != other.model:
        raise InputError(
            f"{first.place} was measured on {one.model_name} ({one.model}) and {task.place} on {other.model_name} "
            f"({other.model}); only states of one model are joined."
        )
    for name in {**one.settings, **other.settings}:
        if (left := one.settings.get(name)) != (right := other.settings.get(name)):
            raise InputError(
                f"{first.place} was measured with {name} {left} and {task.place} with {right}; measure one of them "
                "again with the setting of the other."
            )
    for name in {**one.page, **other.page}:
        if name not in page and (left := one.page.get(name)) != (right := other.page.get(name)):
            raise InputError(f"{first.place} has {name} {left} and {task.place} {right}; say which with {name}.")
    if (one.part is None) != (other.part is None):
        part, whole = (first, task) if one.part is not None else (task, first)
        raise InputError(
            f"{part.place} is part {part.progress.part} of a run and {whole.place} a whole one; join all parts of "
            "that run first."
        )
    if one.part is None or other.part is None:
        return
    if one.texts[0].digest != other.texts[0].digest:
        raise InputError(
            f"{first.place} is a part of {_told(one.texts[0])} and {task.place} of {_told(other.texts[0])}, which is "
            "not the same text; give the parts of one run."
        )
    if one.part.of != other.part.of:
        raise InputError(
            f"{first.place} is part {one.part} and {task.place} part {other.part}; give the parts of one division."
        )


def _check_parts(tasks: Sequence[Task], count: int) -> None:
    """Each of them once."""
    found: dict[int, Task] = {}
    for task in tasks:
        part = task.progress.part
        assert part is not None
        if part.number in found:
            raise InputError(
                f"{found[part.number].place} and {task.place} are both part {part}; give each part once."
            )
        found[part.number] = task
    missing = [f"{index}/{count}" for index in range(1, count + 1) if index not in found]
    if missing:
        raise InputError(
            f"of the {count} parts {len(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
            f"{few(missing, 6)}; measure what is missing with fisher-jax report --part, and join again."
        )


def _check_texts(tasks: Sequence[Task]) -> None:
    if len(tasks) < 2:
        raise InputError(f"{tasks[0].place} is a whole run already; give two or more on different texts.")
    seen: dict[str, Task] = {}
    for task in tasks:
        for text in task.progress.texts:
            if text.digest in seen:
                raise InputError(
                    f"{seen[text.digest].place} and {task.place} were both measured on {_told(text)}; a text counts "
                    "once, so give one of them."
                )
        seen |= {text.digest: task for text in task.progress.texts}
