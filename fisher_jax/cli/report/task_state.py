"""Reading what `fisher-jax report` kept: one finished task of a folder, and whose model it was measured on."""

from pathlib import Path
from typing import Any, NamedTuple

from fisher_jax._support.errors import InputError
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.report.store import ReportStore, TaskProgress
from fisher_jax.models import LanguageModel

LEVEL = 0.95  # of the intervals of single means


class Task(NamedTuple):
    """A finished measurement, as it lies in a report's folder."""

    folder: Path
    name: str
    progress: TaskProgress
    arrays: dict[str, Any]  # Welford states by name, and label counts

    @property
    def place(self) -> str:
        """How a person names it on the command line."""
        return f"{self.folder}:{self.name}"


def split_place(place: str) -> tuple[Path, str | None]:
    """(folder, task) of `report` or `report:pubmed`; a folder that is there wins over a colon in its name."""
    cuts = [i for i, character in enumerate(place) if character == ":"]
    if Path(place).exists() or not cuts:
        return Path(place), None
    cut = next((i for i in reversed(cuts) if Path(place[:i]).is_dir()), cuts[-1])
    return Path(place[:cut]), place[cut + 1 :]


def tasks_of(folder: Path) -> ReportStore:
    """The states of a report folder, not yet read.

    Raises:
        InputError: the folder holds none.
    """
    store = ReportStore(folder)
    if not store.runs:
        raise InputError(f"{folder} holds no state; give the folder that `fisher-jax report` wrote.")
    return store


def find_task(store: ReportStore, name: str) -> Task:
    """A task of a report folder, its arrays not yet read.

    Raises:
        InputError: there is no such task.
    """
    if name not in store.runs:
        raise InputError(f"{store.out} has no task {name!r}; it holds {', '.join(store.runs)}.")
    return Task(store.out, name, store.runs[name], {})


def read_task(task: Task) -> Task:
    """The task with its arrays.

    Raises:
        InputError: it is not finished, or a part of a run.
    """
    progress = task.progress
    if not progress.finished:
        raise InputError(
            f"the task {task.name!r} in {task.folder} is not finished ({progress.so_far}); go on with it first: "
            "fisher-jax report --resume."
        )
    if progress.part is not None:
        raise InputError(
            f"the task {task.name!r} in {task.folder} is part {progress.part} of a run; join all parts first: "
            "fisher-jax join."
        )
    return task._replace(arrays=ReportStore(task.folder).restore()[task.name])


def check_model(task: Task, model: LanguageModel) -> None:
    """Raises InputError unless the task was measured on this very model."""
    progress = task.progress
    if progress.model != model.fingerprint:
        raise InputError(
            f"the state in {task.folder} was measured on {progress.model_name} ({progress.model}), and this model is "
            f"{model.name} ({model.fingerprint}); give the state of this "
            "model, or the other one to --model."
        )


def layer_settings(progress: TaskProgress, level: float = LEVEL) -> ReportSettings:
    """Those of a run that matter for reading its layers."""
    saved = progress.settings
    return ReportSettings(kind=saved["--kind"], unit=saved["--unit"], row_length=saved["--row-length"], level=level)
