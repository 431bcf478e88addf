"""From the state of a measured task to what was found, its page and its tables."""

from typing import Any, NamedTuple

import numpy as np

import fisher_jax as fj
from fisher_jax.cli.report.accumulate import hidden_and_targets
from fisher_jax.cli.report.findings import Findings
from fisher_jax.cli.report.importance import importance
from fisher_jax.cli.report.layers import columns, read_layers
from fisher_jax.cli.report.orderings import orderings
from fisher_jax.cli.report.parts import Part
from fisher_jax.cli.report.pruning import PruningResult, prune
from fisher_jax.cli.report.settings import KINDS, ReportSettings
from fisher_jax.cli.report.store import ReportStore, TaskProgress
from fisher_jax.cli.report.summary import summary, told_again
from fisher_jax.cli.report.writing import ReportFolder
from fisher_jax.cli.run.folder import check_writable
from fisher_jax.cli.run.terminal import Terminal, stored_and_kept
from fisher_jax.cli.run.tools import Tools
from fisher_jax.models import LanguageModel
from fisher_jax.text.corpora import describe_sources
from fisher_jax.text.packing import Packed, Rows

OTHER_KIND = {"empirical": "true", "true": "empirical"}
# One Welford state in float32 per row or entry, with its corrections, twice on disk while it is replaced.
_STATE_BYTES = 2 * 40
_REPORT_BYTES = 20 * 2**20


class Reading(NamedTuple):
    """A model, and the text that it reads."""

    settings: ReportSettings
    model: LanguageModel
    plan: Packed
    rows: Rows  # that are streamed here: all of the plan, or a part
    tools: Tools


def check_room(settings: ReportSettings, model: LanguageModel, tools: Tools) -> None:
    """Raises InputError unless the disk holds the states of this model."""
    entries = model.config.vocab_size * (2 + (model.config.width if settings.groups == "param" else 0))
    check_writable(settings.out, bytes_needed=_REPORT_BYTES + _STATE_BYTES * entries, tools=tools)


def report_folder(reading: Reading, store: ReportStore, states: dict[str, Any]) -> ReportFolder:
    """All that the page and the tables are made from, with the states of all tasks."""
    return ReportFolder(reading.settings, _tokens(reading.model), reading.model, store, states, reading.tools)


def conclude(
    console: Terminal, reading: Reading, store: ReportStore, progress: TaskProgress, arrays: dict[str, Any]
) -> Findings | Part:
    """Writes the page and the tables, unless they are there.

    Returns:
        What was found, or the part of the page of a task that was finished before.
    """
    folder = report_folder(reading, store, {**store.restore(), reading.settings.task: arrays})
    found = folder.part() or _findings(console, reading, progress, arrays)
    if not folder.is_current():
        with console.stage("report", "pictures and tables"):
            folder.write(found if isinstance(found, Findings) else None)
    return found


def tell(console: Terminal, settings: ReportSettings, found: Findings | Part) -> None:
    """The last thing on the terminal."""
    if isinstance(found, Findings):
        summary(console, found)
    else:
        told_again(console, settings, found)


def _tokens(model: LanguageModel) -> list[str]:
    return [model.tokenizer.token_text(i) for i in range(model.config.vocab_size)]


def _findings(console: Terminal, reading: Reading, progress: TaskProgress, arrays: dict[str, Any]) -> Findings:
    settings, model, plan = reading.settings, reading.model, reading.plan
    main = importance(arrays, settings.kind, settings.level)
    other = importance(arrays, OTHER_KIND[settings.kind], settings.level)
    by_entry = np.asarray(fj.welford.mean(arrays["param"])) if "param" in arrays else None
    pruning = None
    if len(plan.held_out.lengths):
        with console.stage("pruning", f"loss on {plan.held_out.num_targets:,} held-out tokens"):
            pruning = _prune(reading, arrays, by_entry)
    return Findings(
        settings=settings,
        model_name=model.name,
        dtype=stored_and_kept(model),
        text=describe_sources(settings.text),
        choice=plan.choice,
        held_out=_held_out(plan, pruning),
        tied=model.config.tied,
        tokens=_tokens(model),
        main=main,
        other=other,
        loss=progress.log_loss / max(progress.tokens, 1),
        pruning=pruning,
        by_column=None if by_entry is None else by_entry.sum(axis=0, dtype=np.float64),
        layers=read_layers(arrays["layers"], model, settings) if "layers" in arrays else None,
        columns=columns(model.config),
        timings=console.seconds,
        rate=progress.tokens / max(progress.seconds, 1e-9),
    )


def _held_out(plan: Packed, pruning: PruningResult | None) -> str:
    if pruning is None:
        return ""
    if plan.whole_documents_held_out:
        return f"{pruning.num_tokens:,} tokens of {pruning.num_documents} documents that were not used above"
    return f"the last {pruning.num_tokens:,} tokens, which were not used above but stand next to them"


def _prune(reading: Reading, arrays: dict[str, Any], by_entry: np.ndarray | None) -> PruningResult:
    settings, model = reading.settings, reading.model
    held_out = hidden_and_targets(model, reading.plan.held_out, settings.batch_size)
    head, bias = model.head(model.params), model.head_bias(model.params)
    weights = np.asarray(head, np.float32)
    saliency = None
    if by_entry is not None:
        saliency = 0.5 * np.einsum("vd,vd,vd->v", by_entry, weights, weights, dtype=np.float64)
    empirical, true = (np.asarray(fj.welford.mean(arrays[kind])) for kind in KINDS)
    counts = np.asarray(arrays["counts"])
    ranked = orderings(empirical, true, weights, counts, saliency=saliency, seed=settings.seed)
    shift = None if bias is None else np.asarray(bias, np.float32)
    return prune(*held_out, head, ranked, bias=shift, soft_cap=model.config.logit_soft_cap)
