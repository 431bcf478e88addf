"""`fisher-jax report` from start to end."""

from dataclasses import replace
from typing import Any

from fisher_jax.cli.report.accumulate import accumulate
from fisher_jax.cli.report.conclusion import Reading, check_room, conclude, report_folder, tell
from fisher_jax.cli.report.findings import Findings
from fisher_jax.cli.report.parts import Part
from fisher_jax.cli.report.planning import plan_of, text_of
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.report.store import ReportStore, TaskProgress
from fisher_jax.cli.run.progress import StreamProgress, duration
from fisher_jax.cli.run.row_length import check_attention, row_length
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.terminal import Terminal
from fisher_jax.cli.run.tools import Tools
from fisher_jax.models import LanguageModel
from fisher_jax.text.corpora import describe_sources
from fisher_jax.text.dividing import part_of
from fisher_jax.text.packing import Packed, Rows


def run(settings: ReportSettings, tools: Tools) -> int:
    """Measures, writes the report and prints a summary; the exit code."""
    console = Terminal()
    store: ReportStore | None = None
    with run_folder(settings.out, interrupted=lambda: _after_interrupt(store, settings)):
        store = ReportStore(settings.out)
        store.check_before_loading(settings.task, resume=settings.resume, overwrite=settings.overwrite)
        found = _measure_and_write(settings, console, store, tools)
    if found is None:
        _tell_part(console, settings, store.runs[settings.task])
    else:
        tell(console, settings, found)
    return 0


def _measure_and_write(
    settings: ReportSettings, console: Terminal, store: ReportStore, tools: Tools
) -> Findings | Part | None:
    """What was found, or the part of the page of a task that was finished before; nothing for a part of a run."""
    with console.stage("model", settings.model):
        model = tools.load(settings.model, dtype=settings.dtype)
        console.print(f"  {model.name}: vocabulary {model.config.vocab_size:,}, width {model.config.width:,}")
        console.say_weights(model)
        console.say_unread(model)
    settings = _fitted(settings, model, tools)
    with console.stage("text", describe_sources(settings.text)):
        plan = plan_of(settings, settings.text, settings.split_documents, model)
        console.print(f"  {plan.choice}")
        rows = _rows(console, settings, plan)
        _warn_about_intervals(console, settings, plan)
        check_attention(model.config, rows.rows_in_batch(settings.batch_size), settings.row_length)
    fresh = TaskProgress(
        settings=settings.fixed(),
        model=model.fingerprint,
        text=rows.digest(),
        num_batches=rows.num_batches(settings.batch_size),
        model_name=model.name,
        model_source=settings.model,
        texts=[text_of(settings, plan)],
        page=settings.of_page(),
        part=settings.part,
    )
    progress = store.begin(settings.task, fresh, overwrite=settings.overwrite)
    reading = Reading(settings, model, plan, rows, tools)
    state = store.restore()[settings.task] if progress.batches_done else None
    if settings.overwrite and settings.task in store.runs:
        report_folder(reading, store, store.restore()).drop()
    arrays = _stream(console, reading, store, progress, state)
    return conclude(console, reading, store, progress, arrays) if settings.part is None else None


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
    """In the model's dtype and with rows that fit it, once the disk was found to hold its states."""
    check_room(settings, model, tools)
    length = row_length(settings.row_length, model.config.max_positions, model.name)
    return replace(settings, dtype=model.dtype, row_length=length)


def _rows(console: Terminal, settings: ReportSettings, plan: Packed) -> Rows:
    """Those that are streamed here."""
    if settings.part is None:
        return plan.stream
    rows = part_of(
        plan.stream, *settings.part, settings.batch_size, whole_documents=settings.unit == "document"
    )  # fmt: skip
    console.print(f"  part {settings.part}: {rows.num_targets:,} of these {plan.stream.num_targets:,} tokens")
    return rows


def _warn_about_intervals(console: Terminal, settings: ReportSettings, plan: Packed) -> None:
    if settings.unit == "document" and len(plan.stream.names) < 2:
        console.print(
            "  note: one document gives no intervals; give more files, --split-documents blank-line, or --unit "
            "sequence"
        )


def _stream(
    console: Terminal, reading: Reading, store: ReportStore, progress: TaskProgress, state: dict[str, Any] | None
) -> dict[str, Any]:
    settings, rows = reading.settings, reading.rows
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


def _tell_part(console: Terminal, settings: ReportSettings, progress: TaskProgress) -> None:
    """For a part of a run, which has no page."""
    console.summary(
        f"part {progress.part} of {progress.model_name} on {settings.task} is measured",
        [
            f"{progress.tokens:,} tokens in {duration(progress.seconds)}; {console.took}",
            "When all parts are measured, `fisher-jax join` makes one report of their folders.",
        ],
        ("part", settings.out),
    )
