"""The options of `fisher-jax report`, with no heavy import so that help is instant."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import (
    ROW_LENGTH,
    add_folder_options,
    add_model_option,
    add_row_length_option,
    add_text_options,
    refuse_resume_and_overwrite,
    values_for,
)
from fisher_jax.cli.run.values import count, fraction, seconds, seed, task_name

__all__ = ["Settings", "add_report_options", "settings_from"]

DEFAULT_MODEL = "smollm2"
# A backward pass with its rows kept apart takes about four times as long as what the head alone needs.
DEFAULT_MAX_TOKENS = {"head": 80_000, "all": 30_000}


@dataclass(frozen=True)
class Settings:
    """What one run of the report was asked to do."""

    model: str = DEFAULT_MODEL
    text: tuple[str, ...] = ("wikipedia",)
    split_documents: str = "none"
    max_tokens: int = DEFAULT_MAX_TOKENS["head"]
    held_out_tokens: int = 8192
    parameters: str = "head"
    groups: str = "row"
    kind: str = "empirical"
    unit: str = "document"
    task: str = "wikipedia"
    out: Path = Path("report")
    resume: bool = False
    overwrite: bool = False
    dtype: str = "float32"
    batch_size: int = 8
    seq_len: int = ROW_LENGTH
    seq_len_typed: bool = False
    checkpoint_every: float = 30.0
    level: float = 0.95
    seed: int = 0

    def fixed(self) -> dict[str, object]:
        """The settings that a resumed run must share, by option name; what the text and model *are* is apart."""
        return {
            "--max-tokens": self.max_tokens,
            "--held-out-tokens": self.held_out_tokens,
            "--parameters": self.parameters,
            "--groups": self.groups,
            # Row states hold both kinds; entries of single parameters, and layers, are kept for one.
            "--kind": self.kind if self.groups == "param" or self.parameters == "all" else "both",
            "--unit": self.unit,
            "--dtype": self.dtype,
            "--batch-size": self.batch_size,
            "--seq-len": self.seq_len,
            # Signs and labels are drawn with it.
            **({"--seed": self.seed} if self.parameters == "all" else {}),
        }

    def of_page(self) -> dict[str, Any]:
        """The settings that change the page of a task, and not what was measured."""
        return {"--level": self.level, "--kind": self.kind, "--seed": self.seed}


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Options in the order in which a person meets them."""
    default = Settings()
    what = parser.add_argument_group("what to measure")
    add_model_option(what, default.model)
    add_text_options(what, default.text, default.split_documents)
    what.add_argument(
        "--max-tokens",
        metavar="N",
        type=count(1),
        help="tokens to stream, spread over as many documents as possible (default "
        f"{DEFAULT_MAX_TOKENS['head']:,}; {DEFAULT_MAX_TOKENS['all']:,} with --parameters all)",
    )
    what.add_argument(
        "--held-out-tokens",
        metavar="N",
        type=count(0),
        default=default.held_out_tokens,
        help=f"tokens of other documents kept for the pruning curves; 0 for no such curves (default "
        f"{default.held_out_tokens:,})",
    )
    what.add_argument(
        "--task", metavar="NAME", type=task_name, help="name of this measurement (default: that of the text)"
    )
    what.add_argument(
        "--parameters",
        choices=("head", "all"),
        default=default.parameters,
        help="all adds every layer: tensors, attention heads and layers, from one backward pass per batch, about "
        "four times slower (default %(default)s: rows of the head)",
    )
    how = parser.add_argument_group("how to measure it")
    how.add_argument(
        "--kind",
        choices=("empirical", "true"),
        default=default.kind,
        help="scores of the text's own next tokens, or the exact mean over the model's (default %(default)s)",
    )
    how.add_argument(
        "--groups",
        choices=("row", "param"),
        default=default.groups,
        help="param also keeps every single entry of the head, for saliency and columns (default %(default)s)",
    )
    how.add_argument(
        "--unit",
        choices=("document", "sequence", "token", "batch"),
        default=default.unit,
        help="what the intervals take as independent (default %(default)s; anything finer is too narrow)",
    )
    how.add_argument(
        "--level", metavar="P", type=fraction(0.95), default=default.level, help="of the intervals (0.95)"
    )
    add_row_length_option(how, "--seq-len")
    how.add_argument("--batch-size", metavar="N", type=count(1), default=default.batch_size, help="rows per step (8)")
    how.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype, help="of the model (float32)")
    how.add_argument("--seed", metavar="N", type=seed, default=0, help="random orders, ties and signs (0)")
    where = parser.add_argument_group("where to keep it")
    add_folder_options(
        where, default.out, resume="go on with an interrupted run", overwrite="drop an earlier run of this task"
    )
    where.add_argument(
        "--checkpoint-every",
        metavar="SECONDS",
        type=seconds,
        default=default.checkpoint_every,
        help="at most this much work is lost by a crash (30)",
    )


def settings_from(options: argparse.Namespace) -> Settings:
    """Checked settings; the task is named after the text unless it was named."""
    from fisher_jax.cli.run.texts import default_task

    refuse_resume_and_overwrite(options)
    values = values_for(Settings, options)
    values["max_tokens"] = options.max_tokens or DEFAULT_MAX_TOKENS[options.parameters]
    if options.parameters == "all" and options.unit == "token":
        raise InputError(
            "--unit token is for the head alone: one backward pass of every layer tells documents, sequences or "
            "batches apart; give one of these to --unit, or --parameters head."
        )
    values |= {"seq_len": options.seq_len or ROW_LENGTH, "seq_len_typed": options.seq_len is not None}
    values["task"] = options.task or default_task(values["text"])
    return Settings(**values)
