"""A smaller model: only the vocabulary tokens that matter most stay. Embedding, head and
tokenizer are cut together; single bytes and special tokens stay, so that every text can still be encoded. Writes a
Hugging Face folder and says what it costs in bits per byte on held-out text.

examples:
  fisher-jax report                                    scores of the shipped model's tokens, in report/
  fisher-jax trim --state report --keep 16000          a third of the vocabulary, in trimmed/
  fisher-jax trim --state report --task pubmed --keep 16000 --out pubmed   by one of several tasks
  fisher-jax trim --by magnitude --keep 16000 --out other
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run import options
from fisher_jax.cli.run.options import Settings, option, refuse_model_there
from fisher_jax.cli.run.values import count, place, task_name

ORDERS = ("true", "empirical", "saliency", "frequency", "magnitude")


@dataclass(frozen=True, kw_only=True)
class TrimSettings(Settings):
    """What one trimming was asked to do."""

    keep: int = option(type=count(1), help="tokens of the new vocabulary", group="what to cut", fixed=True)
    state: str | None = option(
        None, place, "folder that `fisher-jax report` wrote for this model, or FOLDER:TASK: its scores say which "
        "tokens matter", metavar="DIR",
    )  # fmt: skip
    task: str | None = option(
        None, task_name, "which task of that folder (default: the only finished one)", metavar="NAME"
    )
    by: str = option(
        "true", None, "order of importance: exact true or empirical Fisher of a token's row, saliency, corpus "
        "frequency, or weight magnitude (needs no state)", choices=ORDERS, fixed=True,
    )  # fmt: skip
    model: str = options.model()
    out: Path = options.out("trimmed", "model folder to write")
    overwrite: bool = options.overwrite()
    dtype: str = options.dtype("of the written weights")
    text: tuple[str, ...] = options.text(
        group=("how to measure the loss before and after",
               "every eighth document of the text is used, which a report on the same text does not stream")
    )  # fmt: skip
    split_documents: str = options.split_documents()
    documents: int = options.documents()
    characters: int = options.characters()

    def checked(self) -> Self:
        if self.state is None and self.by != "magnitude":
            raise InputError(
                f"--by {self.by} needs scores: run `fisher-jax report` on this model first and give its folder with "
                "--state, or choose --by magnitude."
            )
        refuse_model_there(self, [self.model, *([self.state] if self.state else [])], "trim.json")
        return self
