"""`fisher-jax train` from start to end."""

from dataclasses import asdict, replace
from typing import Any

import jax

from fisher_jax._support.errors import InputError
from fisher_jax._support.host_memory import check_memory
from fisher_jax.cli.page.files import page_is_current, write_pages
from fisher_jax.cli.page.style import drawn
from fisher_jax.cli.run.folder import check_writable
from fisher_jax.cli.run.json_files import digest
from fisher_jax.cli.run.row_length import check_attention, row_length
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.terminal import Terminal, table
from fisher_jax.cli.run.tools import Tools
from fisher_jax.cli.train import sections
from fisher_jax.cli.train.data import Text, read_text
from fisher_jax.cli.train.model import Start, start_of, write_model
from fisher_jax.cli.train.optimizers import TITLES, describe
from fisher_jax.cli.train.run import train
from fisher_jax.cli.train.sections import Curve, TrainFindings
from fisher_jax.cli.train.settings import TrainSettings
from fisher_jax.cli.train.store import ONLY, TrainProgress, TrainStore, read_earlier
from fisher_jax.models import DecoderConfig
from fisher_jax.models.functions import abstract_params
from fisher_jax.text.corpora import describe_sources

# Parameters, and what K-FAC keeps for each of them at the sizes of these models, twice while a state is replaced.
_BYTES_PER_PARAMETER = 2 * 40
_TRAINING_BYTES = 16  # in memory at least: the parameters, their gradient, and two moments


def run(settings: TrainSettings, tools: Tools) -> int:
    """Trains, writes the pages and prints the table; the exit code."""
    console = Terminal()
    stores: list[TrainStore] = []
    with run_folder(settings.out, interrupted=lambda: _after_interrupt(stores)):
        stores += _stores(settings)
        found, there_before = _train_and_write(settings, console, stores, tools)
    _summary(console, found, there_before)
    return 0


def _train_and_write(
    settings: TrainSettings, console: Terminal, stores: list[TrainStore], tools: Tools
) -> tuple[TrainFindings, bool]:  # fmt: skip
    """What was found, and whether all of it was there before."""
    earlier = [found for folder in settings.against for found in read_earlier(folder)]
    start = _start(settings, console, tools)
    positions, name = start.config.max_positions, str(start.model)
    settings = replace(settings, row_length=row_length(settings.row_length, positions, name))
    with console.stage("text", describe_sources(settings.text)):
        text = read_text(settings, start.tokenizer)
        console.print(f"  {sections.text_words(text)}")
    # No step has more rows than there are.
    settings = replace(settings, batch_size=text.packed.stream.rows_in_batch(settings.batch_size))
    parameters = _describe_model(settings, console, start.config, tools)
    _check_comparable(earlier, text)
    ours = [
        (each, store, _progress(each, store, text, parameters, start))
        for each, store in zip(settings.runs(), stores, strict=True)
    ]
    there_before = _is_there(settings, ours, earlier)
    for each, store, progress in [] if there_before else ours:
        _train_one(each, console, start, text, store, progress, tools)
    found = TrainFindings(settings, start, text, _curves(ours, earlier), console.seconds)
    if not there_before:
        with console.stage("pages", "pictures and tables"):
            _write(found, tools)
    return found, there_before


def _after_interrupt(stores: list[TrainStore]) -> str:
    saved = [store.path for store in stores if store.revision]
    if not saved:
        return "interrupted before the first checkpoint; nothing was saved."
    return f"stopped; the state is saved in {saved[-1]}. Give the same command with --resume to go on."


def _start(settings: TrainSettings, console: Terminal, tools: Tools) -> Start:
    if settings.init is None:
        start = start_of(settings, tools)
        parameters = _number_of_parameters(start.config)
        check_memory(
            _TRAINING_BYTES * parameters,
            f"training {parameters:,} parameters",
            "give a smaller --width or fewer --layers",
        )
        check_attention(start.config, 1, settings.row_length)  # before the text is read
        return start
    with console.stage("start", settings.init):
        start = start_of(settings, tools)
        console.print(f"  from the weights of {start.model}")
    return start


def _stores(settings: TrainSettings) -> list[TrainStore]:
    """The states of all runs; of several, some may be there and others not."""
    runs = settings.runs()
    stores = [TrainStore(each.out) for each in runs]
    any_there = any(store.earlier is not None for store in stores)
    for each, store in zip(runs, stores, strict=True):
        resume = settings.resume and not (any_there and store.earlier is None)
        store.check_before_loading(ONLY, resume=resume, overwrite=each.overwrite)
    return stores


def _number_of_parameters(config: DecoderConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))


def _describe_model(settings: TrainSettings, console: Terminal, config: DecoderConfig, tools: Tools) -> int:
    parameters = _number_of_parameters(config)
    check_attention(config, settings.batch_size, settings.row_length)
    needed = _BYTES_PER_PARAMETER * parameters * max(len(settings.compare), 1)
    check_writable(settings.out, bytes_needed=needed, tools=tools)
    console.say(
        "model",
        f"{parameters:,} parameters: {config.num_layers} layers of width {config.width}, {config.num_heads} "
        f"heads, vocabulary {config.vocab_size:,}; {settings.batch_size} rows of {settings.row_length} tokens "
        "in a step",
    )
    return parameters


def _check_comparable(earlier: list[tuple[str, TrainProgress]], text: Text) -> None:
    for folder, progress in earlier:
        if progress.held_out != text.packed.held_out.digest():
            raise InputError(
                f"the run in {folder} was measured on other held-out tokens, so its curve cannot be compared; give "
                "the same --text, --tokenizer, --row-length and --held-out-tokens."
            )


def _progress(
    settings: TrainSettings, store: TrainStore, text: Text, parameters: int, start: Start
) -> TrainProgress:  # fmt: skip
    fresh = TrainProgress(
        settings={"--init": start.model, **settings.fixed()},
        optimizer=settings.optimizer,
        text=text.digest(),
        held_out=text.packed.held_out.digest(),
        bytes_per_token=text.bytes_per_token,
        steps=settings.steps,
        parameters=parameters,
        description=describe(settings),
    )
    return store.begin(ONLY, fresh, overwrite=settings.overwrite)


def _train_one(
    settings: TrainSettings, console: Terminal, start: Start, text: Text, store: TrainStore,
    progress: TrainProgress, tools: Tools,
) -> None:  # fmt: skip
    where = f", going on after step {progress.step:,}" if progress.step else ""
    if progress.finished:
        where = "; this run was finished before, its state is used as it is (--overwrite trains again)"
    with console.stage(TITLES[settings.optimizer], f"{settings.steps:,} steps{where}"):
        params = train(settings, console, start, text, store, progress, tools)
        write_model(settings.out / "model", start, params)


def _is_there(settings: TrainSettings, ours: list[Any], earlier: list[tuple[str, TrainProgress]]) -> bool:
    """Whether all runs are finished, and their models and the page written from them."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    models = [each.out / "model" / name for each, _, _ in ours for name in names]
    finished = all(progress.finished for _, _, progress in ours) and all(path.is_file() for path in models)
    return finished and page_is_current(settings.out, "train", _source(_curves(ours, earlier)))


def _source(curves: list[Curve]) -> str:
    """What the page is made from."""
    return digest([[curve.name, asdict(curve.progress)] for curve in curves])


def _curves(ours: list[Any], earlier: list[tuple[str, TrainProgress]]) -> list[Curve]:
    curves = [Curve(TITLES[each.optimizer], str(each.out), progress) for each, _, progress in ours]
    for folder, progress in earlier:
        curves.append(Curve(f"{TITLES[progress.optimizer]} in {folder}", folder, progress))
    return curves


def _write(found: TrainFindings, tools: Tools) -> None:
    heading = sections.title(found), sections.lead(found)
    tables = {"curve.csv": sections.curve_csv(found)}
    page = drawn(sections.blocks(found), tools)
    write_pages(found.settings.out, "train", heading, page, tables, ("train-",), _source(found.curves))


def _summary(console: Terminal, found: TrainFindings, there_before: bool) -> None:
    lines = sections.comparisons(found)
    if there_before:
        lines.append("finished before: nothing had to be computed (--overwrite trains again)")
    models = [str(each.out / "model") for each in found.settings.runs()]
    lines += [console.took, f"{'model' if len(models) == 1 else 'models'}: {', '.join(models)}"]
    shown = table(sections.HEADER, sections.rows(found), padding=1)
    console.summary(sections.title(found), lines, ("page", found.settings.out / "train.html"), shown)
