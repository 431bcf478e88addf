"""One model from several that were fine-tuned from the same one: the mean of their parameters,
in which each counts by its Fisher information on its own text. A report keeps sums over groups, so that each
parameter has the mean of its group: rows of the head, attention heads, else whole tensors of a layer; a .safetensors
file of fj.exchange.save can bring every single one. Writes a Hugging Face folder and, with --text, tells the bits per
byte.

examples:
  fisher-jax train --out base                                            a small model, and two that go on from it
  fisher-jax train --init base/model --text pubmed --out a --optimizer adamw --learning-rate 1e-3 --batch-size 32
  fisher-jax train --init base/model --text news --out b --optimizer adamw --learning-rate 1e-3 --batch-size 32
  fisher-jax report --model a/model --text pubmed --parameters all --out a/report
  fisher-jax report --model b/model --text news --parameters all --out b/report
  fisher-jax merge --models a/model b/model --states a/report b/report --text pubmed --text news
  fisher-jax merge --models a/model b/model --by uniform --base base/model --scale 1.5 --out sum
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run import options
from fisher_jax.cli.run.options import Settings, option, refuse_model_there
from fisher_jax.cli.run.texts import text_source
from fisher_jax.cli.run.values import file_or_folder, finite, not_negative

WAYS = ("fisher", "uniform", "magnitude")


@dataclass(frozen=True, kw_only=True)
class MergeSettings(Settings):
    """What one merging was asked to do."""

    models: tuple[str, ...] = option(
        type=file_or_folder, help="Hugging Face folders or GGUF files of one architecture and tokenizer, fine-tuned "
        "from one model", group="what to merge", metavar="M", nargs="+",
    )  # fmt: skip
    states: tuple[str, ...] = option(
        (), file_or_folder, "for each model, in the same order: a folder of `fisher-jax report --parameters all` on "
        "that model (FOLDER:TASK where it holds several tasks), or a .safetensors file of fj.exchange.save",
        metavar="S", nargs="+",
    )  # fmt: skip
    base: str | None = option(
        None, file_or_folder, "the model that all were fine-tuned from: what each learnt beyond it is merged and "
        "added to it", metavar="M",
    )  # fmt: skip
    by: str = option(
        "fisher", None, "what a model's parameter weighs: its Fisher information, the same for all, or its own "
        "magnitude (with --base: of its change)", group="how to merge", choices=WAYS, fixed=True,
    )  # fmt: skip
    weights: tuple[float, ...] = option(
        (), not_negative, "one number for each model, such as its tokens, by which its weights are multiplied "
        "(default: 1)", metavar="X", nargs="+", fixed=True,
    )  # fmt: skip
    floor: float = option(
        0.0,
        not_negative,
        "least weight of a parameter, as a share of the mean of its tensor",
        metavar="X",
        fixed=True,
    )
    scale: float = option(
        1.0, finite, "with --base: by how much the merged change is multiplied", metavar="X", fixed=True
    )
    out: Path = options.out("merged", "model folder to write", group="where to keep it")
    overwrite: bool = options.overwrite()
    dtype: str = options.dtype("of the written weights")
    text: tuple[tuple[str, ...], ...] = option(
        (), text_source, "a text to measure on: files, one document each, or a shipped corpus: wikipedia, news, "
        "pubmed; give --text again for another one (default: nothing is measured)",
        group=("how to measure it", "bits per byte of every model, of the plain mean and of the merged model; every "
               "eighth document of a text is used, which a report or a training run on the same text does not see"),
        metavar="FILE", nargs="+", action="append",
    )  # fmt: skip
    split_documents: str = options.split_documents()
    documents: int = options.documents()
    characters: int = options.characters()

    def checked(self) -> Self:
        number = len(self.models)
        if number < 2:
            raise InputError("one model alone cannot be merged; give two or more to --models.")
        if self.by == "fisher" and len(self.states) != number:
            raise InputError(
                f"--by fisher needs a state for each of the {number} models, found {len(self.states)}: run "
                "`fisher-jax report --parameters all` on each model and give the folders with --states, or choose "
                "--by uniform."
            )
        if self.by != "fisher" and self.states:
            raise InputError(f"--states are for --by fisher; leave them out for --by {self.by}.")
        if self.weights and len(self.weights) != number:
            raise InputError(
                f"--weights needs one number for each of the {number} models, found {len(self.weights)}."
            )
        if self.weights and not any(self.weights):
            raise InputError("all --weights are 0, so that no model would count; give one above 0.")
        if self.scale != 1 and self.base is None:
            raise InputError("--scale multiplies what was learnt beyond a base; give that model with --base.")
        base = [] if self.base is None else [self.base]
        refuse_model_there(self, [*self.models, *base, *self.states], "merge.json")
        return self
