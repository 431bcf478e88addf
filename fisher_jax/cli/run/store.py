"""The runs that a folder keeps: their states in one checkpoint, and beside them how far each of them came."""

import abc
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import fisher_jax as fj
from fisher_jax._support.errors import ConflictError, InputError
from fisher_jax.cli.run.earlier_run import refuse_difference, refuse_misuse
from fisher_jax.cli.run.records import UnreadableError


class Progress(Protocol):
    """How far a run came: a dataclass whose fields survive the metadata of a checkpoint."""

    @property
    def finished(self) -> bool: ...

    @property
    def so_far(self) -> str:
        """``3 of 6 steps``."""


P = TypeVar("P", bound=Progress)


class RunStore(abc.ABC, Generic[P]):
    """The states of all runs in the folder ``state`` of an output, as they are in its newest save.

    A command says what a save holds (`facts_of`, `runs_of`, `content`, `keep`) and what two runs must share
    (`compared`). Two processes may save into one folder, whether locks work or not: a save follows the one that it
    has seen, and takes over what another process has put there for other runs.
    """

    command: str
    instead = "another --out"  # what a refusal offers

    def __init__(self, out: Path):
        self.out, self.path = out, out / "state"
        self.runs: dict[str, P] = {}
        self.read()

    @abc.abstractmethod
    def facts_of(self, runs: Mapping[str, P]) -> dict[str, Any]:
        """The metadata of a save."""

    @abc.abstractmethod
    def runs_of(self, facts: Any) -> dict[str, P]:
        """What `facts_of` wrote.

        Raises:
            UnreadableError: something else; the message says what is wrong.
        """

    def content(self, name: str, state: Any) -> Any:
        """What a save holds, with this state of this run."""
        return state

    def keep(self, name: str, content: Any) -> None:
        """What has to be remembered of a save."""

    @abc.abstractmethod
    def compared(self, progress: P, earlier: P) -> dict[str, Any]:
        """What a run shares with an earlier one if it goes on with it, by the names of a refusal."""

    def named(self, name: str) -> str:
        return "run"

    def read(self) -> None:
        """The facts of the newest save."""
        self.revision = fj.checkpoint.revision(self.path)
        self.runs = {}
        if self.revision == 0:
            if not self._is_empty():
                raise InputError(f"{self.path} is not the state of {self.command}; choose another --out.")
            return
        found = fj.checkpoint.describe(self.path)
        try:
            self.runs, self.revision = self.runs_of(found["metadata"]), found["revision"]
        except UnreadableError as error:
            raise InputError(
                f"{self.path} is not the state of {self.command}: {error}; choose another --out."
            ) from None

    def _is_empty(self) -> bool:
        """Whether the state folder is not there, or holds no more than what interrupted saves left."""
        there = self.path.exists()
        return not there or (self.path.is_dir() and all(entry.name.startswith(".") for entry in self.path.iterdir()))

    def check_before_loading(self, name: str, *, resume: bool, overwrite: bool) -> None:
        """What can be refused before anything is loaded: nothing to resume, or an unfinished run to lose."""
        earlier = self.runs.get(name)
        refuse_misuse(
            self.out, there=earlier is not None, finished=earlier is not None and earlier.finished, resume=resume,
            overwrite=overwrite, run=self.named(name), progress=f" ({earlier.so_far})" if earlier else "",
            held=f"; it holds {', '.join(self.runs)}" if any(self.runs) else "",
        )  # fmt: skip

    def begin(self, name: str, fresh: P, *, overwrite: bool) -> P:
        """The progress to go on from: that of the earlier run, if there is one of this name, else the fresh one.

        Raises:
            InputError: the earlier run was another one.
        """
        earlier = self.runs.get(name)
        if earlier is None or overwrite:
            return fresh
        saved, now = self.compared(earlier, earlier), self.compared(fresh, earlier)
        refuse_difference(self.out, saved, now, run=self.named(name), instead=self.instead)
        return copy.deepcopy(earlier)

    def save(self, name: str, state: Any, progress: P) -> None:
        """One checkpoint of all runs, this one replaced.

        Raises:
            ConflictError: another process has saved this very run since it was read here.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        seen = self.runs.get(name)
        while True:
            content = self.content(name, state)
            if self.runs.get(name) != seen:
                raise ConflictError(
                    f"another {self.named(name)} has saved into {self.path} meanwhile; its state is kept, this run "
                    f"ends. Give {self.instead}, or --resume when the other run has ended."
                )
            runs = {**self.runs, name: progress}
            try:
                self.revision = fj.checkpoint.save(
                    self.path, content, metadata=self.facts_of(runs), after=self.revision
                )
                break
            except ConflictError:
                self.read()
        self.runs = {**runs, name: copy.deepcopy(progress)}
        self.keep(name, content)
