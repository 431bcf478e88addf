"""The options of `fisher-jax train`, with no heavy import so that help is instant."""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import (
    ROW_LENGTH,
    add_folder_options,
    add_text_options,
    refuse_resume_and_overwrite,
    values_for,
)
from fisher_jax.cli.run.values import (
    LONGEST_ROW,
    LONGEST_RUN,
    count,
    file_or_folder,
    folder,
    not_negative,
    positive,
    seconds,
    seed,
)

__all__ = ["OPTIMIZERS", "TrainSettings", "add_train_options", "train_settings_from"]

# In the order of the help; what each of them is stands in `train_optimizers`.
OPTIMIZERS = ("kfac", "kfac-fixed", "adamw", "sgd", "muon", "lion")
BYTES = "bytes"
# Tokens of one step: a head of 49,152 rows is two hundred times that of the bytes.
BATCH_SIZES = {True: 32, False: 8}
# Tokens of a row of a new model; with --init as many as its model allows.
SEQ_LEN = 64
# What decides the numbers of a run, and so what a resumed run must share.
_FIXED = (
    "optimizer", "steps", "batch_size", "seq_len", "width", "layers", "heads", "tokenizer", "held_out_tokens",
    "learning_rate", "weight_decay", "damping", "update_freq", "eval_every", "seed",
)  # fmt: skip
# What comes with the weights of --init.
_OF_MODEL = ("width", "layers", "heads", "tokenizer")


@dataclass(frozen=True)
class TrainSettings:
    """What one call of train was asked to do; `optimizer` is the one of the run at hand."""

    text: tuple[str, ...] = ("wikipedia",)
    split_documents: str = "none"
    init: str | None = None
    tokenizer: str = BYTES
    held_out_tokens: int = 16_384
    width: int = 64
    layers: int = 2
    heads: int = 4
    seq_len: int = SEQ_LEN
    seq_len_typed: bool = False
    batch_size: int = BATCH_SIZES[True]
    optimizer: str = "kfac"
    compare: tuple[str, ...] = ()
    against: tuple[Path, ...] = ()
    steps: int = 400
    learning_rate: float | None = None
    weight_decay: float | None = None
    damping: float | None = None
    update_freq: int = 10
    eval_every: int = 10
    seed: int = 0
    out: Path = Path("train")
    resume: bool = False
    overwrite: bool = False
    checkpoint_every: float = 30.0

    def fixed(self) -> dict[str, Any]:
        """The settings that a resumed run must share, by option name."""
        values = asdict(self)
        return {f"--{name.replace('_', '-')}": values[name] for name in _FIXED}

    def runs(self) -> list["TrainSettings"]:
        """One for every optimizer; with several each has a folder of its own inside `out`."""
        return [replace(self, optimizer=name, out=self.out / name) for name in self.compare] or [self]


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Options in the order in which a person meets them."""
    default = TrainSettings()
    _add_how(parser.add_argument_group("how to train"), default)
    _add_what(parser.add_argument_group("what to train"), default)
    where = parser.add_argument_group("where to keep it")
    add_folder_options(
        where, default.out, resume="go on with an interrupted run, to the same bits", overwrite="drop an earlier run"
    )
    where.add_argument(
        "--checkpoint-every", metavar="SECONDS", type=seconds, default=default.checkpoint_every,
        help="at most this much work is lost by a crash (30)",
    )  # fmt: skip


def _add_how(how: Any, default: TrainSettings) -> None:
    which = how.add_mutually_exclusive_group()
    which.add_argument(
        "--optimizer", choices=OPTIMIZERS, default=default.optimizer,
        help="kfac (default): natural gradients that choose rate, momentum and damping themselves; kfac-fixed: with "
        "a learning rate and a trust region; adamw, sgd (with momentum), muon, lion: of optax, warm-up and cosine",
    )  # fmt: skip
    which.add_argument(
        "--compare", metavar="NAME", nargs="+", choices=OPTIMIZERS, default=[],
        help="several optimizers one after the other, from the same weights on the same batches, in one picture",
    )  # fmt: skip
    how.add_argument(
        "--against", metavar="DIR", nargs="+", type=folder, default=[],
        help="also draw the curves of earlier runs, from their folders",
    )  # fmt: skip
    how.add_argument("--steps", metavar="N", type=count(1, LONGEST_RUN), default=default.steps, help="updates (400)")
    how.add_argument(
        "--learning-rate", metavar="X", type=positive, help="highest rate (default: one for each optimizer)"
    )
    how.add_argument("--weight-decay", metavar="X", type=not_negative, help="default: one for each optimizer")
    how.add_argument("--damping", metavar="X", type=positive, help="of kfac, the first one where it adapts")
    how.add_argument(
        "--update-freq", metavar="N", type=count(1, LONGEST_RUN), default=default.update_freq,
        help="steps that share the factors of kfac (10)",
    )  # fmt: skip
    how.add_argument(
        "--batch-size", metavar="N", type=count(1), help="rows per step (32; 8 with --init, or another tokenizer)"
    )
    how.add_argument(
        "--seq-len", metavar="N", type=count(1, LONGEST_ROW),
        help=f"tokens per row ({SEQ_LEN}; with --init {ROW_LENGTH}, or all positions of a model that has fewer)",
    )  # fmt: skip
    how.add_argument("--seed", metavar="N", type=seed, default=0, help="first weights, order, drawn labels (0)")


def _add_what(what: Any, default: TrainSettings) -> None:
    what.add_argument(
        "--init", metavar="M", type=file_or_folder,
        help="go on from the weights of a model instead of random ones: smollm2, a GGUF file or a Hugging Face "
        "folder, such as DIR/model of an earlier run; sizes and tokenizer are its own",
    )  # fmt: skip
    what.add_argument(
        "--width", metavar="N", type=count(1, 65_536), default=default.width, help="of a token's vector (64)"
    )
    what.add_argument(
        "--layers", metavar="N", type=count(1, 10_000), default=default.layers, help="of the decoder (2)"
    )
    what.add_argument("--heads", metavar="N", type=count(1, 65_536), default=default.heads, help="of attention (4)")
    what.add_argument(
        "--tokenizer", metavar="T", type=file_or_folder, default=default.tokenizer,
        help="bytes (default), smollm2 (49,152 tokens), or the tokenizer of a GGUF file or Hugging Face folder",
    )  # fmt: skip
    what.add_argument(
        "--bytes", dest="tokenizer", action="store_const", const=BYTES, help="same as --tokenizer bytes"
    )
    add_text_options(what, default.text, default.split_documents)
    what.add_argument(
        "--held-out-tokens", metavar="N", type=count(1), default=default.held_out_tokens,
        help=f"tokens of other documents that the loss is measured on (default {default.held_out_tokens:,})",
    )  # fmt: skip
    what.add_argument(
        "--eval-every", metavar="N", type=count(1, LONGEST_RUN), default=default.eval_every, help="steps between (10)"
    )


def train_settings_from(options: argparse.Namespace) -> TrainSettings:
    """Checked settings."""
    refuse_resume_and_overwrite(options)
    values = values_for(TrainSettings, options)
    values["batch_size"] = options.batch_size or BATCH_SIZES[options.tokenizer == BYTES and options.init is None]
    untyped = SEQ_LEN if options.init is None else ROW_LENGTH
    values |= {"seq_len": options.seq_len or untyped, "seq_len_typed": options.seq_len is not None}
    values["compare"] = tuple(dict.fromkeys(options.compare))
    settings = TrainSettings(**values)
    for name in _OF_MODEL if settings.init else ():
        if (value := getattr(settings, name)) != getattr(TrainSettings, name):
            raise InputError(f"--init brings the model's own {name}; leave --{name} {value} out.")
    if settings.width % settings.heads or settings.width // settings.heads % 2:
        raise InputError(
            f"--width {settings.width} over --heads {settings.heads} gives no even head size; give a width that is a "
            f"multiple of {2 * settings.heads}, or another number of heads."
        )
    for run in settings.runs():
        if run.optimizer == "kfac" and settings.learning_rate is not None:
            raise InputError("kfac chooses its learning rate itself; leave --learning-rate out, or use kfac-fixed.")
        if not run.optimizer.startswith("kfac") and settings.damping is not None and not settings.compare:
            raise InputError(f"--damping is for kfac and kfac-fixed, not for {run.optimizer}; leave it out.")
    return settings
