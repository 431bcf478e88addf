"""What a report keeps on disk: a dict of task states, and for each task its settings and how far it came.

The folder `state` of a report is one checkpoint: `{task: {"empirical": ..., "true": ..., "counts": ...}}`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.cli.report.settings import GROUPS, KINDS, PARAMETERS, UNITS, ReportSettings
from fisher_jax.cli.run.options import DTYPES
from fisher_jax.cli.run.records import check, like, record, value
from fisher_jax.cli.run.store import RunStore
from fisher_jax.cli.run.values import PartNumber
from fisher_jax.welford import State

_CHOICES = {
    "--parameters": PARAMETERS,
    "--groups": GROUPS,
    "--kind": (*KINDS, "both"),
    "--unit": UNITS,
    "--dtype": DTYPES,
}


class Text(NamedTuple):
    """A text that rows were chosen from."""

    names: list[str]  # as --text had them
    split: str  # as --split-documents had it
    digest: str  # of all rows chosen from it, and of those held out


@dataclass
class TaskProgress:
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
    model_source: str = ""  # as --model had it; nothing where no command measured
    texts: list[Text] = field(default_factory=list)  # one, or those of the runs that were joined
    page: dict[str, Any] = field(default_factory=dict)  # settings of the page, as they were asked for first
    part: PartNumber | None = None  # None: all rows

    @property
    def text_names(self) -> list[str]:
        return [name for text in self.texts for name in text.names]

    @property
    def finished(self) -> bool:
        return self.batches_done >= self.num_batches

    @property
    def so_far(self) -> str:
        return f"{self.batches_done} of {self.num_batches} batches"


class ReportStore(RunStore[TaskProgress]):
    """The tasks of one report folder."""

    command = "a fisher-jax report"
    instead = "another --task or --out"

    def named(self, name: str) -> str:
        return f"run of the task {name!r}"

    def facts_of(self, runs: Mapping[str, TaskProgress]) -> dict[str, Any]:
        return {"tasks": {name: asdict(saved) for name, saved in runs.items()}}

    def runs_of(self, facts: Any) -> dict[str, TaskProgress]:
        return tasks_of_facts(facts)

    def read(self) -> None:
        self._restored: dict[str, Any] | None = None
        super().read()

    def restore(self) -> dict[str, Any]:
        """{task: arrays} as they lie on disk.

        Raises:
            InputError: they cannot be read, or are not those of reports.
        """
        while self._restored is None:
            restored = fj.checkpoint.restore(self.path) if self.runs else {}
            if fj.checkpoint.revision(self.path) != self.revision:  # another run has saved in between
                self.read()
                continue
            held = isinstance(restored, dict) and restored.keys() == self.runs.keys()
            if not held or not all(_is_of_report(arrays) for arrays in restored.values()):
                raise InputError(
                    f"{self.path} does not hold the arrays of the tasks {', '.join(self.runs)}; choose another --out."
                )
            self._restored = restored
        return dict(self._restored)

    def content(self, name: str, state: Any) -> Any:
        return {**self.restore(), name: state}

    def keep(self, name: str, content: Any) -> None:
        # Other tasks stay in memory; this one's arrays are donated by the next step.
        self._restored = {other: state for other, state in content.items() if other != name}

    def compared(self, progress: TaskProgress, earlier: TaskProgress) -> dict[str, Any]:
        """The same model and text may go by other names."""
        model = earlier if progress.model == earlier.model else progress
        text = earlier if progress.text == earlier.text else progress
        return {
            "the model": f"{model.model_name} ({model.model[:12]})",
            **progress.settings,
            "--part": "no --part" if progress.part is None else str(progress.part),
            "the text": f"{' '.join(text.text_names)} ({text.text[:12]})",
        }

    def begin(self, name: str, fresh: TaskProgress, *, overwrite: bool) -> TaskProgress:
        others = [progress for other, progress in self.runs.items() if other != name]
        if any((other.part is None) != (fresh.part is None) for other in others):
            held, now = ("whole runs", "a part") if fresh.part is not None else ("parts of runs", "a whole run")
            raise InputError(f"{self.out} holds {held}, and this is {now}; choose another --out.")
        if others and others[0].model != fresh.model:
            raise InputError(
                f"{self.out} holds tasks measured on {others[0].model_name}, and this model is "
                f"{fresh.model_name} ({others[0].model} and {fresh.model}); choose another --out."
            )
        return super().begin(name, fresh, overwrite=overwrite)


def tasks_of_facts(facts: Any) -> dict[str, TaskProgress]:
    """
    Raises:
        UnreadableError: something is not what a save holds; the message says what.
    """
    saved = value(dict[str, Any], facts, "it")
    check(set(saved) == {"tasks"}, "it names no tasks")
    tasks = {
        name: record(TaskProgress, found) for name, found in value(dict[str, Any], saved["tasks"], "tasks").items()
    }
    check(bool(tasks), "it names no tasks")
    for progress in tasks.values():
        counts = progress.num_batches, progress.batches_done, progress.tokens, progress.seconds
        check(min(counts) >= 0 and progress.num_batches > 0, f"a count is {min(counts)}")
        check(
            progress.tokens >= progress.batches_done, f"{progress.batches_done} batches have {progress.tokens} tokens"
        )
        check(progress.batches_done <= progress.num_batches, f"{progress.so_far} are done")
        like(ReportSettings(parameters="all").fixed(), progress.settings, ReportSettings().fixed())
        for name, values in _CHOICES.items():
            check(progress.settings.get(name, values[0]) in values, f"{name} is {progress.settings[name]!r}")
        for name in ("--row-length", "--batch-size"):
            check(progress.settings[name] > 0, f"{name} is {progress.settings[name]}")
        like(ReportSettings().of_page(), progress.page, ())
        check(
            progress.page.get("--kind", KINDS[0]) in KINDS, f"--kind of the page is {progress.page.get('--kind')!r}"
        )
        part = progress.part
        check(part is None or 1 <= part.number <= part.of, f"the part is {part}")
    return tasks


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
