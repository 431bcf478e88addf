"""What a training run keeps on disk: weights and optimizer state, and beside them how far it came and its curve."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.records import check, record
from fisher_jax.cli.run.store import RunStore
from fisher_jax.cli.train.settings import OPTIMIZERS

_KIND = "fisher-jax train"
ONLY = ""  # the name of the run in its folder


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

    @property
    def so_far(self) -> str:
        return f"{self.step} of {self.steps} steps"


class TrainStore(RunStore[TrainProgress]):
    """The state of one run."""

    command = _KIND

    def facts_of(self, runs: Mapping[str, TrainProgress]) -> dict[str, Any]:
        return asdict(runs[ONLY])

    def runs_of(self, facts: Any) -> dict[str, TrainProgress]:
        return {ONLY: progress_of_facts(facts)}

    def compared(self, progress: TrainProgress, earlier: TrainProgress) -> dict[str, Any]:
        return {**progress.settings, "the text": progress.text}

    @property
    def earlier(self) -> TrainProgress | None:
        return self.runs.get(ONLY)

    def restore(self, like: Any) -> Any:
        return fj.checkpoint.restore(self.path, like)


def progress_of_facts(facts: Any) -> TrainProgress:
    """
    Raises:
        UnreadableError: something is not what a save holds; the message says what.
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
    stores = [TrainStore(place) for place in places if fj.checkpoint.revision(place / "state")]
    if not stores:
        raise InputError(f"{folder} holds no run of fisher-jax train; give a folder that it wrote to --against.")
    return [(str(store.out), store.runs[ONLY]) for store in stores]
