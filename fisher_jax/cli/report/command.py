"""`fisher-jax report` from start to end."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import fisher_jax as fj
from fisher_jax.cli.report.accumulate import accumulate, hidden_and_targets
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
from fisher_jax.cli.run.progress import StreamProgress
from fisher_jax.cli.run.row_length import check_attention, row_length
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.terminal import Terminal, stored_and_kept
from fisher_jax.cli.run.tools import Tools
from fisher_jax.models import LanguageModel
from fisher_jax.text.corpora import describe_sources, documents
from fisher_jax.text.packing import Packed, longest_document, pack

OTHER_KIND = {"empirical": "true", "true": "empirical"}
# One Welford state in float32 per row or entry, with its corrections, twice on disk while it is replaced.
_STATE_BYTES = 2 * 40
_REPORT_BYTES = 20 * 2**20


class Reading(NamedTuple):
    """A model, and the text that it reads."""

    settings: ReportSettings
    model: LanguageModel
    packed: Packed
    tools: Tools


def run(settings: ReportSettings, tools: Tools) -> int:
    """Measures, writes the report and prints a summary; the exit code."""
    console = Terminal()
    store: ReportStore | None = None
    with run_folder(settings.out, interrupted=lambda: _after_interrupt(store, settings)):
        store = ReportStore(settings.out)
        store.check_before_loading(settings.task, resume=settings.resume, overwrite=settings.overwrite)
        found = _measure_and_write(settings, console, store, tools)
    if isinstance(found, Findings):
        summary(console, found)
    else:
        told_again(console, settings, found)
    return 0


def _measure_and_write(
    settings: ReportSettings, console: Terminal, store: ReportStore, tools: Tools
) -> Findings | Part:
    """What was found, or the part of the page of a task that was finished before."""
    with console.stage("model", settings.model):
        model = tools.load(settings.model, dtype=settings.dtype)
        console.print(f"  {model.name}: vocabulary {model.config.vocab_size:,}, width {model.config.width:,}")
        console.say_weights(model)
        console.say_unread(model)
    settings = replace(settings, dtype=model.dtype)
    settings = _fitted(settings, model, tools)
    with console.stage("text", describe_sources(settings.text)):
        packed = _pack(settings, model)
        console.print(f"  {packed.choice}")
        _warn_about_intervals(console, settings, packed)
        check_attention(model.config, packed.stream.rows_in_batch(settings.batch_size), settings.row_length)
    fresh = TaskProgress(
        settings=settings.fixed(),
        model=model.fingerprint,
        text=packed.stream.digest(),
        num_batches=packed.stream.num_batches(settings.batch_size),
        model_name=model.name,
        text_names=list(settings.text),
    )
    tokens = _tokens(model)
    progress = store.begin(settings.task, fresh, overwrite=settings.overwrite)
    state = store.restore()[settings.task] if progress.batches_done else None
    if settings.overwrite and settings.task in store.runs:
        ReportFolder(settings, tokens, model, store, store.restore(), tools).drop()
    reading = Reading(settings, model, packed, tools)
    arrays = _stream(console, reading, store, progress, state)
    folder = ReportFolder(settings, tokens, model, store, {**store.restore(), settings.task: arrays}, tools)
    found = folder.part() or _findings(console, reading, progress, arrays)
    if not folder.is_current():
        with console.stage("report", "pictures and tables"):
            folder.write(found if isinstance(found, Findings) else None)
    return found


def _tokens(model: LanguageModel) -> list[str]:
    return [model.tokenizer.token_text(i) for i in range(model.config.vocab_size)]


def _after_interrupt(store: ReportStore | None, settings: ReportSettings) -> str:
    saved = None if store is None else store.runs.get(settings.task)
    if store is None or saved is None:
        return "interrupted before the first checkpoint; nothing was saved."
    if saved.finished:
        return "interrupted after measuring; give the same command again to write the report."
    return (
        f"stopped after {saved.so_far}; the state is saved in {store.path}. Give the same command with --resume to "
        "go on."
    )


def _fitted(settings: ReportSettings, model: LanguageModel, tools: Tools) -> ReportSettings:
    """With rows that fit the model, once the disk was found to hold its states."""
    entries = model.config.vocab_size * (2 + (model.config.width if settings.groups == "param" else 0))
    check_writable(settings.out, bytes_needed=_REPORT_BYTES + _STATE_BYTES * entries, tools=tools)
    return replace(settings, row_length=row_length(settings.row_length, model.config.max_positions, model.name))


def _pack(settings: ReportSettings, model: LanguageModel) -> Packed:
    longest = longest_document(settings.max_tokens, settings.held_out_tokens, settings.row_length)
    return pack(
        documents(settings.text, split=settings.split_documents, longest=longest),
        model.tokenizer.encode,
        seq_len=settings.row_length,
        max_targets=settings.max_tokens,
        held_out_targets=settings.held_out_tokens,
        vocab_size=model.config.vocab_size,
    )


def _warn_about_intervals(console: Terminal, settings: ReportSettings, packed: Packed) -> None:
    if settings.unit == "document" and len(packed.stream.names) < 2:
        console.print(
            "  note: one document gives no intervals; give more files, --split-documents blank-line, or --unit "
            "sequence"
        )


def _stream(
    console: Terminal, reading: Reading, store: ReportStore, progress: TaskProgress, state: dict[str, Any] | None
) -> dict[str, Any]:
    settings, rows = reading.settings, reading.packed.stream
    if progress.finished and state is not None:
        return state
    verb = f"going on after batch {progress.batches_done} of" if progress.batches_done else "in"
    whose = "the head"
    if settings.parameters == "all":
        whose = (
            f"the head and of every layer on {rows.num_targets:,} tokens, one backward pass for each batch (about "
            "four times slower than --parameters head)"
        )
    with (
        console.stage("stream", f"Fisher information of {whose}, {verb} {progress.num_batches} batches"),
        StreamProgress(console, rows.num_targets, progress.tokens) as display,
    ):
        return accumulate(reading.model, rows, settings, store, progress, state, display, reading.tools)


def _findings(
    console: Terminal, reading: Reading, progress: TaskProgress, arrays: dict[str, Any]
) -> Findings:  # fmt: skip
    settings, model, packed, _ = reading
    main = importance(arrays, settings.kind, settings.level)
    other = importance(arrays, OTHER_KIND[settings.kind], settings.level)
    by_entry = np.asarray(fj.welford.mean(arrays["param"])) if "param" in arrays else None
    pruning = None
    if len(packed.held_out.lengths):
        with console.stage("pruning", f"loss on {packed.held_out.num_targets:,} held-out tokens"):
            pruning = _prune(reading, arrays, by_entry)
    return Findings(
        settings=settings,
        model_name=model.name,
        dtype=stored_and_kept(model),
        text=describe_sources(settings.text),
        choice=packed.choice,
        held_out=_held_out(packed, pruning),
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


def _held_out(packed: Packed, pruning: PruningResult | None) -> str:
    if pruning is None:
        return ""
    if packed.whole_documents_held_out:
        return f"{pruning.num_tokens:,} tokens of {pruning.num_documents} documents that were not used above"
    return f"the last {pruning.num_tokens:,} tokens, which were not used above but stand next to them"


def _prune(reading: Reading, arrays: dict[str, Any], by_entry: np.ndarray | None) -> PruningResult:
    settings, model, packed, _ = reading
    held_out = hidden_and_targets(model, packed.held_out, settings.batch_size)
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
