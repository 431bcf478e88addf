"""What a run keeps on disk: a dict of task states, and for each task its settings and how far it came.

The folder `state` of a report is one checkpoint: `{task: {"empirical": ..., "true": ..., "counts": ...}}`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fisher_jax as fj
from fisher_jax.cli.earlier_run import nothing_saved, refuse_difference, refuse_misuse
from fisher_jax.cli.settings import Settings
from fisher_jax.errors import InputError

__all__ = ["Progress", "StateStore"]


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
    """The states of every task in one report folder."""

    def __init__(self, out: Path):
        self.path = out / "state"
        self.out = out
        self.tasks: dict[str, Progress] = {}
        self._restored: dict[str, Any] | None = None
        if nothing_saved(self.path):
            return
        metadata = fj.checkpoint.metadata(self.path)
        try:
            self.tasks = {name: Progress(**saved) for name, saved in metadata["tasks"].items()}
        except (KeyError, TypeError, AttributeError):
            raise InputError(f"{self.path} is not the state of a fisher-jax report; choose another --out.") from None

    def check_before_loading(self, settings: Settings) -> None:
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

    def start_or_resume(self, settings: Settings, fresh: Progress) -> tuple[Progress, Any | None]:
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
        return earlier, self.restore()[settings.task]

    def restore(self) -> dict[str, Any]:
        """{task: arrays} as they lie on disk."""
        if self._restored is None:
            self._restored = fj.checkpoint.restore(self.path) if self.tasks else {}
        return dict(self._restored)

    def save(self, task: str, arrays: Any, progress: Progress) -> None:
        """One checkpoint of every task, this one replaced."""
        states = {**self.restore(), task: arrays}
        tasks = {**self.tasks, task: progress}
        self.out.mkdir(parents=True, exist_ok=True)
        fj.checkpoint.save(
            self.path, states, metadata={"tasks": {name: asdict(saved) for name, saved in tasks.items()}}
        )
        # Other tasks stay in memory; this one's arrays are donated by the next step, so they are not kept here.
        self._restored = {name: state for name, state in states.items() if name != task}
        self.tasks = tasks


def _facts(progress: Progress, earlier: Progress) -> dict[str, object]:
    """What two runs must share, by the names of a refusal; the same model and text may go by other names."""
    model = earlier if progress.model == earlier.model else progress
    text = earlier if progress.text == earlier.text else progress
    return {
        "the model": f"{model.model_name} ({model.model[:12]})",
        **progress.settings,
        "the text": f"{' '.join(text.text_names)} ({text.text[:12]})",
    }
