"""`fisher-jax join` from start to end: states of several folders in, one report out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

from fisher_jax._support.errors import InputError
from fisher_jax.cli.report.conclusion import Reading, check_room, conclude, report_folder, tell
from fisher_jax.cli.report.findings import Findings
from fisher_jax.cli.report.join.checks import check, chosen
from fisher_jax.cli.report.join.merging import merged
from fisher_jax.cli.report.join.settings import JoinSettings
from fisher_jax.cli.report.parts import Part
from fisher_jax.cli.report.planning import plan_of
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.cli.report.store import ReportStore, TaskProgress, Text
from fisher_jax.cli.report.task_state import Task, check_model
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.terminal import Terminal
from fisher_jax.cli.run.texts import default_task
from fisher_jax.cli.run.tools import Tools
from fisher_jax.models import LanguageModel
from fisher_jax.text.corpora import describe_sources
from fisher_jax.text.dividing import joined, part_of, shared_document
from fisher_jax.text.packing import Packed


def run(settings: JoinSettings, tools: Tools) -> int:
    """Joins, writes the report and prints a summary; the exit code."""
    console = Terminal()
    with (
        _speaking_of_out(),
        run_folder(settings.out, interrupted=lambda: "interrupted; give the same command again."),
    ):
        report, found = _join(settings, console, tools)
    tell(console, report, found)
    return 0


@contextmanager
def _speaking_of_out() -> Iterator[None]:
    """Refusals of other commands' rooms speak of an option that is a word here."""
    try:
        yield
    except InputError as error:
        error.args = (str(error).replace("another --task or --out", "another OUT").replace("--out", "OUT"),)
        raise


def _join(settings: JoinSettings, console: Terminal, tools: Tools) -> tuple[ReportSettings, Findings | Part]:
    with console.stage("folders", f"{len(settings.folders)} to be joined"):
        store = _store(settings)
        tasks = chosen(settings.folders, settings.task)
        check(tasks, settings.page())
        tasks.sort(key=_part_number)
        report = _report_settings(settings, tasks)
        _check_out(store, report.task, overwrite=settings.overwrite)
    with console.stage("model", report.model):
        model = tools.load(report.model, dtype=report.dtype)
        check_model(tasks[0], model)
        check_room(report, model, tools)
        console.say_weights(model)
    with console.stage("text", describe_sources(report.text)):
        texts = _texts(settings, tasks)
        plans = _plans(report, tasks, texts, model)
        plan = joined(plans)
        console.print(f"  {plan.choice}")
    fresh = _progress(report, tasks, texts, plan)
    progress = store.begin(report.task, fresh, overwrite=settings.overwrite)
    reading = Reading(report, model, plan, plan.stream, tools)
    if settings.overwrite and report.task in store.runs:
        report_folder(reading, store, store.restore()).drop()
    if progress is not fresh:
        arrays = store.restore()[report.task]
    else:
        with console.stage("join", f"{fresh.tokens:,} tokens of {len(tasks)} folders"):
            arrays = merged(tasks)
            store.save(report.task, arrays, progress)
    console.seconds[f"streaming, {len(tasks)} runs together"] = progress.seconds
    return report, conclude(console, reading, store, progress, arrays)


def _part_number(task: Task) -> int:
    """Parts in their order; whole runs as they were given."""
    return 0 if task.progress.part is None else task.progress.part.number


def _report_settings(settings: JoinSettings, tasks: Sequence[Task]) -> ReportSettings:
    """As if one run of `fisher-jax report` had measured all."""
    first = tasks[0].progress
    known = {f"--{x.name.replace('_', '-')}": x.name for x in fields(ReportSettings)}
    measured = {known[name]: value for name, value in {**first.settings, **first.page, **settings.page()}.items()}
    texts = _texts(settings, tasks)
    names = {task.name for task in tasks}
    sources = tuple(name for text in texts for name in text.names)
    report = ReportSettings(
        **measured,
        model=settings.model or first.model_source,
        text=sources,
        split_documents=texts[0].split,
        task=names.pop() if len(names) == 1 else default_task(sources),
        out=settings.out,
        overwrite=settings.overwrite,
    )
    for name, value in report.fixed().items():
        if first.settings[name] != value:
            raise InputError(
                f"{tasks[0].place} was measured with {name} {first.settings[name]}, which cannot be changed by "
                f"joining; leave {name} out."
            )
    return report


def _texts(settings: JoinSettings, tasks: Sequence[Task]) -> list[Text]:
    """Of one run, the text that all its parts share; where they lie now."""
    of = tasks[:1] if tasks[0].progress.part is not None else tasks
    texts = [text for task in of for text in task.progress.texts]
    if settings.text and len(settings.text) != len(texts):
        raise InputError(
            f"--text says where a text lies now, for each of {len(texts)}, and is given {len(settings.text)} times; "
            "give one --text for each text."
        )
    if sum("-" in text.names for text in texts) > 1 and not settings.text:
        raise InputError(
            "several of these texts came from standard input, which can be read only once; put them into files and "
            "give --text for each."
        )
    moved = settings.text or [tuple(text.names) for text in texts]
    return [text._replace(names=list(names)) for text, names in zip(texts, moved, strict=True)]


def _store(settings: JoinSettings) -> ReportStore:
    """That of the folder to write, which is not one to read."""
    store = ReportStore(settings.out)
    if any(progress.part is not None for progress in store.runs.values()):
        raise InputError(f"{store.out} holds parts of runs; give the folder to write first: join OUT FOLDER ...")
    return store


def _check_out(store: ReportStore, task: str, *, overwrite: bool) -> None:
    """Raises InputError where an unfinished run would be lost."""
    earlier = store.runs.get(task)
    if earlier is not None and not earlier.finished and not overwrite:
        raise InputError(
            f"{store.out} holds an unfinished run of the task {task!r} ({earlier.so_far}); give another OUT, or "
            "--overwrite to drop it."
        )


def _plans(
    report: ReportSettings, tasks: Sequence[Task], texts: Sequence[Text], model: LanguageModel
) -> list[Packed]:
    """The plan of rows of every text, if it is the one that was measured."""
    plans = [plan_of(report, text.names, text.split, model) for text in texts]
    for text, plan in zip(texts, plans, strict=True):
        if plan.digest() != text.digest:
            raise InputError(
                f"{' '.join(text.names[:3])} is not the text that was measured ({plan.digest()[:12]} instead of "
                f"{text.digest[:12]}); say with --text where that lies."
            )
    if (shared := shared_document(plans)) is not None:
        one, other = (" ".join(texts[i].names[:3]) for i in shared.plans)
        raise InputError(
            f"{shared.names[0]} of the text {one} and {shared.names[1]} of {other} are one document, which would "
            "count twice; measure one of the texts without it."
        )
    for task in tasks:
        part = task.progress.part
        if part is None:
            continue
        rows = part_of(plans[0].stream, *part, report.batch_size, whole_documents=report.unit == "document")
        if rows.digest() != task.progress.text:
            raise InputError(f"{task.place} did not measure the rows of part {part}; measure it again.")
    return plans


def _progress(report: ReportSettings, tasks: Sequence[Task], texts: Sequence[Text], plan: Packed) -> TaskProgress:
    """What one run would have left."""
    found = [task.progress for task in tasks]
    whole = sum(progress.num_batches for progress in found)
    number = whole if found[0].part is None else plan.stream.num_batches(report.batch_size)
    return replace(
        found[0],
        settings=report.fixed(),
        text=plan.stream.digest(),
        num_batches=number,
        batches_done=number,
        log_loss=sum(progress.log_loss for progress in found),
        tokens=sum(progress.tokens for progress in found),
        seconds=sum(progress.seconds for progress in found),
        model_source=report.model,
        texts=list(texts),
        page=report.of_page(),
        part=None,
    )
