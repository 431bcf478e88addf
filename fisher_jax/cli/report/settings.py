"""Which vocabulary tokens (rows of the head) of a language model matter on a text: importance with
confidence intervals, and what pruning by it costs; with --parameters all also every layer and attention head. Writes
report.html, report.md, importance.csv, layers.csv and the state.

examples:
  fisher-jax report                                 the shipped model on Wikipedia articles, under ten minutes
  fisher-jax report --text news                     adds a second task to the same report, side by side
  fisher-jax report --parameters all --out all      every layer and attention head as well
  fisher-jax report --text mine.txt --split-documents blank-line --out mine
  fisher-jax report --model path/to/model.gguf --max-tokens 20000 --out quick
  fisher-jax report --resume                        goes on after Ctrl-C or a crash
  fisher-jax report --part 3/16                     one of 16 jobs, whose parts fisher-jax join makes one report
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run import options
from fisher_jax.cli.run.options import Settings, option
from fisher_jax.cli.run.texts import default_task
from fisher_jax.cli.run.values import PartNumber, count, fraction, part, task_name

KINDS = ("empirical", "true")
PARAMETERS = ("head", "all")
GROUPS = ("row", "param")
UNITS = ("document", "sequence", "token", "batch")
# A backward pass with its rows kept apart takes about four times as long as what the head alone needs.
MAX_TOKENS = {"head": 80_000, "all": 30_000}


@dataclass(frozen=True, kw_only=True)
class ReportSettings(Settings):
    """What one run of the report was asked to do."""

    model: str = options.model(group="what to measure")
    text: tuple[str, ...] = options.text()
    split_documents: str = options.split_documents()
    max_tokens: int = option(
        0, count(1), "tokens to stream, spread over as many documents as possible (default "
        f"{MAX_TOKENS['head']:,}; {MAX_TOKENS['all']:,} with --parameters all)", fixed=True,
    )  # fmt: skip
    held_out_tokens: int = option(
        8192, count(0), "tokens of other documents kept for the pruning curves; 0 for no such curves", fixed=True
    )
    part: PartNumber | None = option(
        None, part, "measure one of N parts of these tokens, in a job of its own: parts are cut at documents; "
        "`fisher-jax join` makes one report of them", metavar="I/N",
    )  # fmt: skip
    task: str = option("", task_name, "name of this measurement (default: that of the text)", metavar="NAME")
    parameters: str = option(
        "head", None, "the rows of the head alone, or all: every layer too, its tensors and attention heads, from "
        "one backward pass per batch, about four times slower", choices=PARAMETERS, fixed=True,
    )  # fmt: skip
    groups: str = option(
        "row", None, "param also keeps every single entry of the head, for saliency and columns",
        group="how to measure it", choices=GROUPS, fixed=True,
    )  # fmt: skip
    kind: str = option(
        "empirical", None, "scores of the text's own next tokens, or the exact mean over the model's",
        choices=KINDS, fixed=True,
    )  # fmt: skip
    unit: str = option(
        "document", None, "what the intervals take as independent; anything finer than documents is too narrow",
        choices=UNITS, fixed=True,
    )  # fmt: skip
    level: float = option(0.95, fraction(0.95), "of the intervals", metavar="P")
    row_length: int = options.row_length()
    batch_size: int = option(8, count(1), "rows per step", fixed=True)
    dtype: str = options.dtype()
    seed: int = options.seed("random orders, ties and signs")
    out: Path = options.out(
        "report", "folder to write (default report/, of --part 3/16 part-03-of-16/)", group="where to keep it"
    )
    resume: bool = options.resume()
    overwrite: bool = options.overwrite("drop an earlier run of this task")
    checkpoint_every: float = options.checkpoint_every()

    def fixed(self) -> dict[str, Any]:
        shared = super().fixed()
        # Row states hold both kinds; entries of single parameters, and layers, are kept for one.
        shared["--kind"] = self.kind if self.groups == "param" or self.parameters == "all" else "both"
        if self.parameters != "all":  # signs and labels are drawn with it
            del shared["--seed"]
        return shared

    def of_page(self) -> dict[str, Any]:
        """The settings that change the page of a task, and not what was measured."""
        return {"--level": self.level, "--kind": self.kind, "--seed": self.seed}

    def checked(self) -> Self:
        """The task is named after the text unless it was named."""
        if self.parameters == "all" and self.unit == "token":
            raise InputError(
                "--unit token is for the head alone: one backward pass of every layer tells documents, sequences or "
                "batches apart; give one of these to --unit, or --parameters head."
            )
        max_tokens = self.max_tokens or MAX_TOKENS[self.parameters]
        return replace(self, max_tokens=max_tokens, task=self.task or default_task(self.text), out=self._place())

    def _place(self) -> Path:
        if self.part is None or self.out is not type(self).out:  # one that was given is another object
            return self.out
        of = str(self.part.of)
        return Path(f"part-{self.part.number:0{len(of)}}-of-{of}")
