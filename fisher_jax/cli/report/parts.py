"""The parts of a report's page, kept in `parts/`: one for every task, and one for every two tasks side by side.

The page is put together from them, so that a task that was measured long ago keeps its own. A part says what it was
made from: it counts only while the states are the same.
"""

import base64
import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fisher_jax.cli.page.blocks import Block, Heading, Paragraph, Picture, Table
from fisher_jax.cli.report.store import TaskProgress
from fisher_jax.cli.run.json_files import digest, read_sealed, write_sealed

_BLOCKS = {"heading": Heading, "paragraph": Paragraph, "table": Table, "picture": Picture}
_PLAIN = re.compile(r"[a-z0-9]+(?:[._+-][a-z0-9]+)*")
_LONGEST = 60


class Part(NamedTuple):
    """What the page says of one task, or of two."""

    tasks: tuple[str, ...]
    made_from: str
    settings: dict[str, Any]  # that only concern the page
    title: str
    lead: str
    blocks: list[Block]


def file_name(task: str) -> str:
    """A file name for a task: its own where it is plain, else what is left of it and a digest.

    Different tasks have different ones, also on file systems that do not tell upper from lower case.
    """
    if _PLAIN.fullmatch(task) and len(task) <= _LONGEST:
        return task
    left = re.sub(r"[^a-z0-9]+", "-", task.lower())[: _LONGEST - 20].strip("-")
    # No plain name has a tilde.
    return f"{left or 'task'}~{hashlib.sha256(task.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


class PartStore:
    """The parts of one report folder; ``tasks`` are those whose states it holds."""

    def __init__(self, out: Path, tasks: dict[str, TaskProgress]):
        self.folder = out / "parts"
        self.tasks = tasks

    def get(self, *tasks: str) -> Part | None:
        """The part of a task or a pair, if there is one and the states are those that it was made from."""
        part = self._read(tasks)
        return part if part is not None and part.made_from == self.source(*tasks) else None

    def put(self, part: Part) -> None:
        saved = part._asdict() | {"blocks": [_encoded(block) for block in part.blocks]}
        write_sealed(self._path(part.tasks), saved)

    def drop(self, task: str) -> None:
        """The part of a task and those of its pairs."""
        name = file_name(task)
        for path in self.folder.glob("*.json"):
            if name in path.stem.split("--"):
                path.unlink()

    def source(self, *tasks: str) -> str:
        """What a part is made from: which runs the states are of."""
        return digest([asdict(self.tasks[task]) for task in tasks])

    def _path(self, tasks: tuple[str, ...]) -> Path:
        return self.folder / f"{'--'.join(map(file_name, tasks))}.json"

    def _read(self, tasks: tuple[str, ...]) -> Part | None:
        try:
            saved = read_sealed(self._path(tasks)) or {}
            part = Part(**saved | {"blocks": [_decoded(block) for block in saved["blocks"]]})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # it is made again from the state
        return part._replace(tasks=tasks)


def _encoded(block: Block) -> dict[str, Any]:
    fields = block._asdict()
    if isinstance(block, Picture):
        fields |= {shade: base64.b64encode(fields[shade]).decode() for shade in ("light", "dark")}
    return {"block": type(block).__name__.lower(), **fields}


def _decoded(saved: dict[str, Any]) -> Block:
    fields = dict(saved)
    kind = _BLOCKS[fields.pop("block")]
    if kind is Picture:
        fields |= {shade: base64.b64decode(fields[shade]) for shade in ("light", "dark")}
    return kind(**fields)
