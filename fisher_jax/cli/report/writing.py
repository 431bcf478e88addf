"""From the states of a report folder to its parts, its page and its tables; nothing is drawn that is there."""

from typing import Any, NamedTuple

from fisher_jax._support.printable import readable
from fisher_jax.cli.page.style import drawn
from fisher_jax.cli.report.findings import Findings, lead, title
from fisher_jax.cli.report.importance import compare, importance, importance_csv
from fisher_jax.cli.report.layers import Layers, columns, layers_csv, read_layers
from fisher_jax.cli.report.page import remove_report, report_is_current, write_report
from fisher_jax.cli.report.pair_sections import Pair, pair_blocks, pair_line, pair_title
from fisher_jax.cli.report.parts import Part, PartStore
from fisher_jax.cli.report.sections import blocks
from fisher_jax.cli.report.settings import KINDS, ReportSettings
from fisher_jax.cli.report.store import ReportStore
from fisher_jax.cli.report.task_state import layer_settings
from fisher_jax.cli.run.tools import Tools
from fisher_jax.models import LanguageModel


class ReportFolder(NamedTuple):
    """All that the page and the tables are made from."""

    settings: ReportSettings
    tokens: list[str]  # by id, as they are in the text
    model: LanguageModel | None  # None: layers are not told of
    store: ReportStore
    states: dict[str, dict[str, Any]]  # of every task
    tools: Tools

    @property
    def parts(self) -> PartStore:
        return PartStore(self.settings.out, self.store.runs)

    def part(self) -> Part | None:
        """That of the task at hand, if it was made from its state and with the settings of this call."""
        part = self.parts.get(self.settings.task)
        return part if part is not None and part.settings == self.settings.of_page() else None

    def is_current(self) -> bool:
        """Whether all is there: the part of the task, those of its pairs, the page and the tables."""
        return (
            self.part() is not None and not self._missing_pairs() and report_is_current(self.settings.out, self.parts)
        )

    def _missing_pairs(self) -> list[tuple[str, str]]:
        return [pair for pair in self._pairs() if self.parts.get(*pair) is None]

    def _pairs(self) -> list[tuple[str, str]]:
        """The task at hand with each of the others, the one first that was measured first."""
        names = [name for name, progress in self.store.runs.items() if progress.finished]
        at = names.index(self.settings.task)
        return [(name, names[at]) if i < at else (names[at], name) for i, name in enumerate(names) if i != at]

    def write(self, found: Findings | None) -> None:
        """Writes what is missing; ``found`` is None where the part of the task at hand is there."""
        task, parts = self.settings.task, self.parts
        if found is not None:
            made_from = parts.source(task)
            page = drawn(blocks(found), self.tools)
            parts.put(Part((task,), made_from, self.settings.of_page(), title(found), lead(found), page))
        lines = [self._write_pair(*pair) for pair in (self._missing_pairs() if found is None else self._pairs())]
        if found is not None:
            found.comparisons += lines
        write_report(self.settings.out, parts, self._tables(parts))

    def drop(self) -> None:
        """The files of the task at hand go; those of the others stay."""
        task = self.settings.task
        self.parts.drop(task)
        others = {name: progress for name, progress in self.store.runs.items() if name != task}
        if not any(progress.finished for progress in others.values()):
            remove_report(self.settings.out)
            return
        parts = PartStore(self.settings.out, others)
        write_report(self.settings.out, parts, self._tables(parts))

    def _write_pair(self, other: str, task: str) -> str:
        """The part of two tasks side by side; what it says in a sentence."""
        pair = self._pair(other, task)
        line, settings, parts = pair_line(pair), self.settings.of_page(), self.parts
        page = drawn(pair_blocks(pair), self.tools)
        parts.put(Part((other, task), parts.source(other, task), settings, pair_title(pair), line, page))
        return line

    def _pair(self, other: str, task: str) -> Pair:
        there, here = (importance(self.states[x], self.settings.kind, self.settings.level) for x in (other, task))
        layers = [self._layers(x, self.settings.level) for x in (task, other)]
        both = (layers[0], layers[1]) if layers[0] is not None and layers[1] is not None else None
        comparison = compare(task, here, other, there)
        vocabulary = [readable(token) for token in self.tokens]
        return Pair(comparison, here, there, vocabulary, both, columns(self.model.config) if self.model else [])

    def _layers(self, task: str, level: float) -> Layers | None:
        if self.model is None or "layers" not in self.states[task]:
            return None
        settings = layer_settings(self.store.runs[task], level)
        return read_layers(self.states[task]["layers"], self.model, settings)

    def _tables(self, parts: PartStore) -> dict[str, str | None]:
        rows, layers = {}, {}
        for task, progress in parts.tasks.items():
            if not progress.finished:
                continue
            part = parts.get(task)
            settings = self.settings.of_page() if part is None else part.settings
            kinds = sorted(KINDS, key=lambda kind: kind != settings["--kind"])
            rows[task] = {kind: importance(self.states[task], kind, settings["--level"]) for kind in kinds}
            found = self._layers(task, settings["--level"])
            if found is not None:
                layers[task] = found
        return {
            "importance.csv": importance_csv(rows, self.tokens),
            "layers.csv": layers_csv(layers) if layers else None,
        }
