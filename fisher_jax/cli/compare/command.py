"""`fisher-jax compare` from start to end: two tasks of reports in, a page with what changed out."""

from itertools import combinations

from fisher_jax._support.errors import InputError
from fisher_jax.cli.compare import sections
from fisher_jax.cli.compare.settings import CompareSettings
from fisher_jax.cli.compare.shift import layer_shift, row_shift
from fisher_jax.cli.compare.tables import Compared, layers_csv, rows_csv
from fisher_jax.cli.page.files import write_pages
from fisher_jax.cli.page.style import drawn
from fisher_jax.cli.report.layers import columns
from fisher_jax.cli.report.task_choice import candidates, choose, unfinished
from fisher_jax.cli.report.task_state import Task, check_model, read_task, split_place, tasks_of
from fisher_jax.cli.run.choice_error import Way
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.terminal import Terminal, table
from fisher_jax.cli.run.tools import Tools

# Importance means another thing where one of these differs.
_SHARED = ("--unit", "--row-length", "--dtype")


def run(settings: CompareSettings, tools: Tools) -> int:
    """Compares, writes the page and prints a summary; the exit code."""
    console = Terminal()
    with run_folder(settings.out, interrupted=lambda: "interrupted; give the same command again."):
        found = compared(settings, console, tools)
        with console.stage("page", "pictures and tables"):
            write(found, tools)
    summary(console, found)
    return 0


def compared(settings: CompareSettings, console: Terminal, tools: Tools) -> Compared:
    with console.stage("states", " and ".join(settings.reports)):
        a, b = read_both(settings)
        check_alike(a, b)
        names = called(a, b)
    with console.stage("model", settings.model):
        model = tools.load(settings.model, dtype=a.progress.settings["--dtype"])
        check_model(a, model)
    with console.stage("test", f"{names[1]} minus {names[0]}, every row of the head"):
        rows = {kind: row_shift(a, b, kind) for kind in settings.kinds}
    missing = without_layers(a, b, names)
    layers = None
    if not missing:
        with console.stage("layers", "every tensor, attention head and layer"):
            layers = layer_shift(a, b, model)
    return Compared(
        settings=settings,
        model_name=model.name,
        tokens=[model.tokenizer.token_text(i) for i in range(model.config.vocab_size)],
        tasks=(a, b),
        names=names,
        rows=rows,
        columns=columns(model.config),
        layers=layers,
        layers_missing=missing or "",
        seconds=console.seconds,
    )


def read_both(settings: CompareSettings) -> tuple[Task, Task]:
    """A and B, each by its folder and task; of one folder alone two tasks, in the order they were measured."""
    places = list(settings.reports)
    if len(set(places)) == 1 and split_place(places[0])[1] is None:
        places = places[:1]
    found = [candidates(place) for place in places]
    alone = len(places) == 1
    if alone and (split_place(places[0])[1] is not None or len(found[0]) < 2):
        folder, _ = split_place(places[0])
        tasks = tasks_of(folder).runs.items()
        held = ", ".join(f"{name} (which {unfinished(x)})" if unfinished(x) else name for name, x in tasks)
        raise InputError(
            f"one report alone is compared where it holds two finished tasks, and {folder} holds {held}; give A and "
            "B, as FOLDER or FOLDER:TASK."
        )

    def alike(tasks: tuple[Task, ...]) -> bool:
        try:
            check_alike(tasks[0], tasks[1])
        except InputError:
            return False
        return True

    def way(tasks: tuple[Task, ...]) -> Way:
        if alone:
            return Way(replaced={places[0]: tuple(task.place for task in tasks)})
        pairs = zip(places, tasks, found, strict=True)
        return Way(replaced={place: (task.place,) for place, task, of in pairs if len(of) > 1})

    a, b = choose(places, found, choices=combinations(found[0], 2) if alone else None, together=alike, way=way)
    return read_task(a), read_task(b)


def check_alike(a: Task, b: Task) -> None:
    """Raises InputError unless a difference between the two can only come from their texts."""
    if a.folder.resolve() == b.folder.resolve() and a.name == b.name:
        raise InputError(f"A and B are both {a.place}; give two tasks, as FOLDER:TASK.")
    one, other = a.progress, b.progress
    if one.model != other.model:
        raise InputError(
            f"{a.place} was measured on {one.model_name} ({one.model}) and {b.place} on {other.model_name} "
            f"({other.model}); importance is compared between texts, for one model."
        )
    for name in _SHARED:
        if (left := one.settings[name]) != (right := other.settings[name]):
            raise InputError(
                f"{a.place} was measured with {name} {left} and {b.place} with {right}, so a difference need not "
                "come from the texts; measure one of them again."
            )
    if one.text == other.text:
        raise InputError(f"{a.place} and {b.place} were measured on the very same text; there is nothing to compare.")


def called(a: Task, b: Task) -> tuple[str, str]:
    """Short names for the page: the tasks, with their folders where these are equal."""
    return (a.name, b.name) if a.name != b.name else (f"{a.name} in {a.folder}", f"{b.name} in {b.folder}")


def without_layers(a: Task, b: Task, names: tuple[str, str]) -> str | None:
    """Why layers are not compared, in a sentence; None where they can be."""
    have = ["layers" in task.arrays for task in (a, b)]
    if all(have):
        kinds = [task.progress.settings["--kind"] for task in (a, b)]
        if kinds[0] == kinds[1]:
            return None
        return (
            f"Layers are not compared: they were measured with --kind {kinds[0]} in {names[0]} and {kinds[1]} in "
            f"{names[1]}."
        )
    if any(have):
        lacking = names[have.index(False)]
        return f"Layers are not compared: {lacking} was measured without --parameters all."
    return (
        "Both reports hold the head alone; layers and attention heads are compared where both were measured with "
        "--parameters all."
    )


def write(found: Compared, tools: Tools) -> None:
    tables = {"compare.csv": rows_csv(found), "compare_layers.csv": layers_csv(found)}
    heading = sections.title(found), sections.lead(found)
    write_pages(found.settings.out, "compare", heading, drawn(sections.blocks(found), tools), tables, ("compare-",))


def summary(console: Terminal, found: Compared) -> None:
    kind, shift = next(iter(found.rows.items()))
    rows = []
    for row in [*shift.gained(found.settings.q)[:6], *shift.lost(found.settings.q)[:6]]:
        means = (f"{side.mean[row]:.3g}" for side in (shift.before, shift.after))
        rows.append([found.vocabulary[row], *means, f"{shift.shift.z[row]:+.1f}", f"{shift.shift.q[row]:.2g}"])
    console.summary(
        f"largest changes of importance ({kind} Fisher per token)" if rows else "",
        [*sections.notes(found), sections.lead(found), console.took],
        ("page", found.settings.out / "compare.html"),
        table(("token", *found.names, "z", "q"), rows) if rows else None,
    )
