"""Trains a small language model, with K-FAC or with optimizers of optax, on the shipped text or
your own, from one seed to the same bits. Writes train.html, train.md, curve.csv, a checkpoint, and the model as a
Hugging Face folder that every other command opens.

examples:
  fisher-jax train                                   K-FAC on bytes of Wikipedia: two minutes on two cores
  fisher-jax train --compare kfac adamw              two runs from the same weights in one picture
  fisher-jax train --optimizer adamw --learning-rate 3e-3 --out adamw --against train
  fisher-jax train --tokenizer smollm2 --width 128   with a head of 49,152 tokens
  fisher-jax train --init train/model --text pubmed --optimizer adamw --learning-rate 1e-3 --out finetuned
  fisher-jax train --resume                          goes on after Ctrl-C or a crash, to the same bits
  fisher-jax report --model train/model --out train/report   what the trained model found important
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run import options
from fisher_jax.cli.run.options import Settings, option
from fisher_jax.cli.run.values import LONGEST_RUN, count, file_or_folder, folder, not_negative, positive

# In the order of the help; what each of them is stands in `train_optimizers`.
OPTIMIZERS = ("kfac", "kfac-fixed", "adamw", "sgd", "muon", "lion")
BYTES = "bytes"
# Rows of one step: a head of 49,152 rows is two hundred times that of the bytes.
BATCH_SIZES = {True: 32, False: 8}
# Tokens of a row of a new model; with --init as many as its model allows.
NEW_ROW_LENGTH = 64
# What comes with the weights of --init.
_OF_MODEL = ("width", "layers", "heads", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """What one call of train was asked to do; `optimizer` is the one of the run at hand."""

    optimizer: str = option(
        "kfac", None, "kfac (default): natural gradients that choose rate, momentum and damping themselves; "
        "kfac-fixed: with a learning rate and a trust region; adamw, sgd (with momentum), muon, lion: of optax, "
        "warm-up and cosine", group="how to train", choices=OPTIMIZERS, fixed=True,
    )  # fmt: skip
    compare: tuple[str, ...] = option(
        (), None, "several optimizers one after the other, from the same weights on the same batches, in one picture",
        metavar="NAME", nargs="+", choices=OPTIMIZERS,
    )  # fmt: skip
    against: tuple[Path, ...] = option(
        (), folder, "also draw the curves of earlier runs, from their folders", metavar="DIR", nargs="+"
    )
    steps: int = option(400, count(1, LONGEST_RUN), "updates", fixed=True)
    learning_rate: float | None = option(
        None, positive, "highest rate (default: one for each optimizer)", metavar="X", fixed=True
    )
    weight_decay: float | None = option(
        None, not_negative, "default: one for each optimizer", metavar="X", fixed=True
    )
    damping: float | None = option(None, positive, "of kfac, the first one where it adapts", metavar="X", fixed=True)
    update_every: int = option(10, count(1, LONGEST_RUN), "steps that share the factors of kfac", fixed=True)
    batch_size: int = option(
        0, count(1), f"rows per step (default {BATCH_SIZES[True]}; {BATCH_SIZES[False]} with --init, or another "
        "tokenizer)", fixed=True,
    )  # fmt: skip
    row_length: int = options.row_length(f"{NEW_ROW_LENGTH}; with --init ", least=1)
    seed: int = options.seed("first weights, order, drawn labels")
    init: str | None = option(
        None, file_or_folder, "go on from the weights of a model instead of random ones: smollm2, a GGUF file or a "
        "Hugging Face folder, such as DIR/model of an earlier run; sizes and tokenizer are its own",
        group="what to train", metavar="M",
    )  # fmt: skip
    width: int = option(64, count(1, 65_536), "of a token's vector", fixed=True)
    layers: int = option(2, count(1, 10_000), "of the decoder", fixed=True)
    heads: int = option(4, count(1, 65_536), "of attention", fixed=True)
    tokenizer: str = option(
        BYTES, file_or_folder, "bytes, smollm2 (49,152 tokens), or the tokenizer of a GGUF file or Hugging Face "
        "folder", metavar="T", fixed=True,
    )  # fmt: skip
    text: tuple[str, ...] = options.text()
    split_documents: str = options.split_documents()
    held_out_tokens: int = option(
        16_384, count(1), "tokens of other documents that the loss is measured on", fixed=True
    )
    eval_every: int = option(10, count(1, LONGEST_RUN), "steps between two looks at that loss", fixed=True)
    out: Path = options.out("train", group="where to keep it")
    resume: bool = options.resume()
    overwrite: bool = options.overwrite("drop an earlier run")
    checkpoint_every: float = options.checkpoint_every()

    def runs(self) -> list[Self]:
        """One for every optimizer; with several each has a folder of its own inside `out`."""
        return [replace(self, optimizer=name, out=self.out / name) for name in self.compare] or [self]

    def checked(self) -> Self:
        for name in _OF_MODEL if self.init else ():
            if (value := getattr(self, name)) != getattr(TrainSettings, name):
                raise InputError(f"--init brings the model's own {name}; leave --{name} {value} out.")
        if self.width % self.heads or self.width // self.heads % 2:
            raise InputError(
                f"--width {self.width} over --heads {self.heads} gives no even head size; give a width that is a "
                f"multiple of {2 * self.heads}, or another number of heads."
            )
        if self.compare and self.optimizer != TrainSettings.optimizer:
            raise InputError(f"--compare names the optimizers; leave --optimizer {self.optimizer} out.")
        for run in self.runs():
            if run.optimizer == "kfac" and self.learning_rate is not None:
                raise InputError(
                    "kfac chooses its learning rate itself; leave --learning-rate out, or use kfac-fixed."
                )
            if not run.optimizer.startswith("kfac") and self.damping is not None and not self.compare:
                raise InputError(f"--damping is for kfac and kfac-fixed, not for {run.optimizer}; leave it out.")
        new = self.init is None
        return replace(
            self, compare=tuple(dict.fromkeys(self.compare)),
            batch_size=self.batch_size or BATCH_SIZES[new and self.tokenizer == BYTES],
            row_length=self.row_length or (NEW_ROW_LENGTH if new else 0),
        )  # fmt: skip
