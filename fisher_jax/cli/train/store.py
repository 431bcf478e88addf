"""What a training run keeps on disk: weights and optimizer state, and beside them how far it came and its curve."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fisher_jax as fj
from fisher_jax._support.errors import ConflictError, InputError
from fisher_jax.cli.run.earlier_run import nothing_saved, refuse_difference, refuse_misuse
from fisher_jax.cli.run.records import UnreadableError, check, record
from fisher_jax.cli.train.settings import OPTIMIZERS, TrainSettings

__all__ = ["Point", "TrainProgress", "TrainStore", "progress_of_facts", "read_earlier"]

_KIND = "fisher-jax train"


class Point(NamedTuple):
    """One place of a curve; losses in nats per token, seconds of steps without compilation and evaluation."""

    step: int
    tokens: int
    seconds: float
    train_loss: float | None  # mean over the steps since the point before
    held_out_loss: float


@dataclass
class TrainProgress:
    """How far a run came; floats survive the metadata exactly."""

    settings: dict[str, Any]
    optimizer: str
    text: str  # digests of the rows
    held_out: str  # digest of the held-out rows alone: runs with the same one can be compared
    bytes_per_token: float
    steps: int
    parameters: int = 0
    description: str = ""
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0
    loss_sum: float = 0.0  # since the last point
    loss_steps: int = 0
    points: list[Point] = field(default_factory=list)
    kind: str = _KIND

    @property
    def finished(self) -> bool:
        return self.step >= self.steps


class TrainStore:
    """The state of one run, in the folder `state` of its output."""

    def __init__(self, out: Path):
        self.out, self.path = out, out / "state"
        self.earlier: TrainProgress | None = None
        self._revision = fj.checkpoint.revision(self.path)
        if self._revision or not nothing_saved(self.path):
            self._revision, self.earlier = _read(self.path)

    @property
    def saved(self) -> bool:
        """Whether there is a state to go on from."""
        return self._revision > 0

    def check_before_loading(self, settings: TrainSettings, *, resume: bool) -> None:
        """What can be refused before the text is read."""
        earlier = self.earlier
        refuse_misuse(
            self.out, there=earlier is not None, finished=earlier is not None and earlier.finished, resume=resume,
            overwrite=settings.overwrite, progress=f" ({earlier.step} of {earlier.steps} steps)" if earlier else "",
        )  # fmt: skip

    def begin(self, settings: TrainSettings, fresh: TrainProgress) -> TrainProgress:
        """The progress to go on from: the earlier one where it is of the same run.

        Raises:
            InputError: an earlier run had other settings or another text.
        """
        earlier = self.earlier
        if earlier is None or settings.overwrite:
            return fresh
        facts = [{**progress.settings, "the text": progress.text} for progress in (earlier, fresh)]
        refuse_difference(self.out, *facts)
        return earlier

    def restore(self, like: Any) -> Any:
        return fj.checkpoint.restore(self.path, like)

    def save(self, state: Any, progress: TrainProgress) -> None:
        """
        Raises:
            ConflictError: another run has saved there since.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        try:
            self._revision = fj.checkpoint.save(self.path, state, metadata=asdict(progress), after=self._revision)
        except ConflictError:
            raise ConflictError(
                f"another run has saved into {self.path} meanwhile; its state is kept, this run ends. Choose another "
                "--out, or --resume when the other run has ended."
            ) from None


def _read(path: Path) -> tuple[int, TrainProgress]:
    """The newest save's number, and how far the run came."""
    found = fj.checkpoint.describe(path)
    try:
        progress = progress_of_facts(found["metadata"])
    except UnreadableError as error:
        raise InputError(f"{path} is not the state of fisher-jax train: {error}; choose another folder.") from None
    return found["revision"], progress


def progress_of_facts(facts: Any) -> TrainProgress:
    """
    Raises:
        UnreadableError: something is not what `TrainStore.save` writes; the message says what.
    """
    progress = record(TrainProgress, facts)
    check(progress.kind == _KIND, f"it is of {progress.kind!r}")
    check(progress.optimizer in OPTIMIZERS, f"optimizer is {progress.optimizer!r}")
    check(0 <= progress.step <= progress.steps and progress.steps > 0, f"step is {progress.step} of {progress.steps}")
    counts = (
        progress.tokens, progress.seconds, progress.compile_seconds, progress.parameters, progress.loss_steps,
        progress.loss_steps <= progress.step, progress.bytes_per_token > 0,
    )  # fmt: skip
    check(min(counts) >= 0 and all(counts[-2:]), "its counts do not fit together")
    places = [point.step for point in progress.points]
    check(
        places == sorted(set(places)) and all(0 <= place <= progress.step for place in places), "its curve is not one"
    )
    check(bool(places) or progress.step == 0, "it has no curve")
    return progress


def read_earlier(folder: Path) -> list[tuple[str, TrainProgress]]:
    """(name, progress) of the runs in a folder that `fisher-jax train` wrote.

    Raises:
        InputError: there is none.
    """
    places = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    found = [(place, _read(place / "state")[1]) for place in places if fj.checkpoint.revision(place / "state")]
    if not found:
        raise InputError(f"{folder} holds no run of fisher-jax train; give a folder that it wrote to --against.")
    return [(str(place), progress) for place, progress in found]
