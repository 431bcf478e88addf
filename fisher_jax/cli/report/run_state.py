"""What a run keeps on disk: a dict of task states, and for each task its settings and how far it came.

The folder `state` of a report is one checkpoint: `{task: {"empirical": ..., "true": ..., "counts": ...}}`.
"""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fisher_jax as fj
from fisher_jax._support.errors import ConflictError, InputError
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.run.earlier_run import nothing_saved, refuse_difference, refuse_misuse
from fisher_jax.cli.run.records import UnreadableError, check, like, record, value
from fisher_jax.welford import State

__all__ = ["KINDS", "Progress", "StateStore", "tasks_of_facts"]

KINDS = ("empirical", "true")
_CHOICES = {
    "--parameters": ("head", "all"),
    "--groups": ("row", "param"),
    "--kind": (*KINDS, "both"),
    "--unit": ("document", "sequence", "token", "batch"),
    "--dtype": ("float32", "bfloat16"),
}


@dataclass
class Progress:
    """How far one task came, beside its arrays; floats survive the metadata exactly."""

    settings: dict[str, Any]
    model: str  # fingerprint
    text: str  # digest of the packed rows
    num_batches: int
    batches_done: int = 0
    log_loss: float = 0.0  # summed over tokens, in nats
    tokens: int = 0
    seconds: float = 0.0
    model_name: str = ""
    text_names: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.batches_done >= self.num_batches


class StateStore:
    """The states of every task in one report folder, as they are in its newest save.

    Two runs may save into one folder, whether locks work or not: a save follows the one that it has seen, and takes
    over what another run has put there for other tasks.
    """

    def __init__(self, out: Path):
        self.path = out / "state"
        self.out = out
        self.tasks: dict[str, Progress] = {}
        self._revision = 0
        self._restored: dict[str, Any] | None = None
        self._read()

    def _read(self) -> None:
        """The facts of the newest save."""
        self._restored = None
        if fj.checkpoint.revision(self.path) == 0:
            if not nothing_saved(self.path):
                raise InputError(f"{self.path} is not the state of a fisher-jax report; choose another --out.")
            self._revision, self.tasks = 0, {}
            return
        found = fj.checkpoint.describe(self.path)
        try:
            self.tasks = tasks_of_facts(found["metadata"])
        except UnreadableError as error:
            raise InputError(
                f"{self.path} is not the state of a fisher-jax report: {error}; choose another --out."
            ) from None
        self._revision = found["revision"]

    def check_before_loading(self, settings: ReportSettings) -> None:
        """What can be refused before the model is loaded."""
        earlier = self.tasks.get(settings.task)
        refuse_misuse(
            self.out,
            there=earlier is not None,
            finished=earlier is not None and earlier.finished,
            resume=settings.resume,
            overwrite=settings.overwrite,
            run=f"run of the task {settings.task!r}",
            progress=f" ({earlier.batches_done} of {earlier.num_batches} batches)" if earlier else "",
            held=f"; it holds {', '.join(self.tasks)}" if self.tasks else "",
        )

    def start_or_resume(self, settings: ReportSettings, fresh: Progress) -> tuple[Progress, Any | None]:
        """The progress to go on from, and the arrays of it; (fresh, None) for a new task.

        Raises:
            InputError: the earlier run of this task, or the other tasks of the folder, had other settings.
        """
        others = [p for name, p in self.tasks.items() if name != settings.task]
        if others and others[0].model != fresh.model:
            raise InputError(
                f"{self.out} holds tasks measured on {others[0].model_name}, and this model is "
                f"{fresh.model_name} ({others[0].model} and {fresh.model}); choose another --out."
            )
        earlier = self.tasks.get(settings.task)
        if earlier is None or settings.overwrite:
            return fresh, None
        run = f"run of the task {settings.task!r}"
        refuse_difference(
            self.out, _facts(earlier, earlier), _facts(fresh, earlier), run=run, instead="another --task or --out"
        )
        arrays = self.restore()[settings.task]
        return copy.deepcopy(self.tasks[settings.task]), arrays

    def restore(self) -> dict[str, Any]:
        """{task: arrays} as they lie on disk.

        Raises:
            InputError: they cannot be read, or are not those of reports.
        """
        while self._restored is None:
            restored = fj.checkpoint.restore(self.path) if self.tasks else {}
            if fj.checkpoint.revision(self.path) == self._revision:
                _check_arrays(self.path, self.tasks, restored)
                self._restored = restored
            else:  # another run has saved in between
                self._read()
        return dict(self._restored)

    def save(self, task: str, arrays: Any, progress: Progress) -> None:
        """One checkpoint of every task, this one replaced.

        Raises:
            ConflictError: another run has saved this very task since it was read here.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        seen = self.tasks.get(task)
        while True:
            states = {**self.restore(), task: arrays}
            if self.tasks.get(task) != seen:
                raise ConflictError(
                    f"another run of the task {task!r} has saved into {self.path} meanwhile; its state is kept, this "
                    "run ends. Give another --task or --out, or --resume when the other run has ended."
                )
            tasks = {**self.tasks, task: progress}
            facts = {"tasks": {name: asdict(saved) for name, saved in tasks.items()}}
            try:
                self._revision = fj.checkpoint.save(self.path, states, metadata=facts, after=self._revision)
                break
            except ConflictError:
                self._read()
        # Other tasks stay in memory; this one's arrays are donated by the next step, so they are not kept here.
        self._restored = {name: state for name, state in states.items() if name != task}
        self.tasks = {**tasks, task: copy.deepcopy(progress)}


def tasks_of_facts(facts: Any) -> dict[str, Progress]:
    """
    Raises:
        UnreadableError: something is not what `StateStore.save` writes; the message says what.
    """
    saved = value(dict[str, Any], facts, "it")
    check(set(saved) == {"tasks"}, "it names no tasks")
    tasks = {name: record(Progress, found) for name, found in value(dict[str, Any], saved["tasks"], "tasks").items()}
    check(bool(tasks), "it names no tasks")
    for progress in tasks.values():
        counts = progress.num_batches, progress.batches_done, progress.tokens, progress.seconds
        check(min(counts) >= 0 and progress.num_batches > 0, f"a count is {min(counts)}")
        check(
            progress.tokens >= progress.batches_done, f"{progress.batches_done} batches have {progress.tokens} tokens"
        )
        check(
            progress.batches_done <= progress.num_batches,
            f"{progress.batches_done} of {progress.num_batches} batches are done",
        )
        like(ReportSettings(parameters="all").fixed(), progress.settings, ReportSettings().fixed())
        for name, values in _CHOICES.items():
            check(progress.settings.get(name, values[0]) in values, f"{name} is {progress.settings[name]!r}")
        for name in ("--row-length", "--batch-size"):
            check(progress.settings[name] > 0, f"{name} is {progress.settings[name]}")
    return tasks


def _check_arrays(path: Path, tasks: dict[str, Progress], restored: Any) -> None:
    held = isinstance(restored, dict) and restored.keys() == tasks.keys()
    if not held or not all(_is_of_report(arrays) for arrays in restored.values()):
        raise InputError(f"{path} does not hold the arrays of the tasks {', '.join(tasks)}; choose another --out.")


def _is_of_report(arrays: Any) -> bool:
    """Whether these are Welford states of the rows of one vocabulary, and how often each row was a label."""
    if not isinstance(arrays, dict) or not {*KINDS, "counts"} <= arrays.keys():
        return False
    shape = getattr(arrays["counts"], "shape", ())
    rows = [arrays[kind] for kind in KINDS]
    states = [arrays[name] for name in (*KINDS, "layers", "param") if name in arrays]
    return (
        len(shape) == 1
        and all(isinstance(state, State) for state in states)
        and all(getattr(state.mean, "shape", ())[1:] == shape for state in rows)
    )


def _facts(progress: Progress, earlier: Progress) -> dict[str, object]:
    """What two runs must share, by the names of a refusal; the same model and text may go by other names."""
    model = earlier if progress.model == earlier.model else progress
    text = earlier if progress.text == earlier.text else progress
    return {
        "the model": f"{model.model_name} ({model.model[:12]})",
        **progress.settings,
        "the text": f"{' '.join(text.text_names)} ({text.text[:12]})",
    }
