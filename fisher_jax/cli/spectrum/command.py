"""`fisher-jax spectrum` from start to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax._support.host_memory import attention_bytes, check_memory
from fisher_jax._support.printable import printable
from fisher_jax.cli.page.files import digest, page_is_current, write_pages
from fisher_jax.cli.run.clock import Clock
from fisher_jax.cli.run.earlier_run import refuse_difference, refuse_misuse
from fisher_jax.cli.run.folder import check_writable, read_plain, write_atomically
from fisher_jax.cli.run.options import CHECKPOINT_EVERY
from fisher_jax.cli.run.progress import duration
from fisher_jax.cli.run.row_length import row_length
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.temporary import temporary_beside
from fisher_jax.cli.run.terminal import Terminal, bold
from fisher_jax.cli.run.unread import say_unread
from fisher_jax.cli.spectrum import sections
from fisher_jax.cli.spectrum.measure import (
    Measured,
    basis_size,
    block_spectra_of,
    choose,
    density_of,
    eigenvalues_of,
    one_batch,
    operator_of,
    time_passes,
)
from fisher_jax.cli.spectrum.sections import SpectrumFindings
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.cli.spectrum.store import read_facts, read_finished, write_finished
from fisher_jax.models import LanguageModel, load
from fisher_jax.models.layout import flatten, unflatten
from fisher_jax.text.corpora import describe_sources, documents
from fisher_jax.text.packing import Rows, longest_document, pack

__all__ = ["run"]

_CHEAP_SAVE = 2 * 2**30  # bytes


class _Run:
    """Where an interrupted run is kept: the state of `fj.lanczos`, and which run it is of."""

    def __init__(self, settings: SpectrumSettings):
        self.settings = settings
        self.folder = settings.out / "unfinished"
        self.state = self.folder / "lanczos"
        self._facts = self.folder / "run.json"
        self.finished = settings.out / "spectrum.json"

    def check_before_loading(self) -> None:
        there = self._facts.exists() and fj.checkpoint.revision(self.state) > 0
        finished = self.finished.exists()
        resume, overwrite = self.settings.resume, self.settings.overwrite
        refuse_misuse(
            self.settings.out, there=there or finished, finished=finished, resume=resume, overwrite=overwrite
        )
        if there and resume:
            self._read()

    def begin(self, facts: dict[str, Any], saving: bool) -> None:
        """Raises InputError where the saved run is another one."""
        if self.settings.resume:
            refuse_difference(self.settings.out, self._read(), facts)
            return
        self.finished.unlink(missing_ok=True)
        self.drop()
        if saving:
            write_atomically(self._facts, json.dumps(facts, indent=1))

    def _read(self) -> dict[str, Any]:
        try:
            saved = json.loads(read_plain(self._facts))
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from None
        if not isinstance(saved, dict):
            raise self._damaged("it holds no named facts")
        return saved

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{self._facts} is damaged: {reason}; give --overwrite to start again.")

    def drop(self) -> None:
        """In one step, so that a run killed here has all of it or nothing."""
        if self.folder.exists():
            aside = temporary_beside(self.folder)
            self.folder.rename(aside)
            shutil.rmtree(aside)

    def after_interrupt(self) -> str:
        if fj.checkpoint.revision(self.state):
            return "interrupted; the same command with --resume goes on from the last save."
        self.drop()
        return "interrupted before anything was saved; --checkpoint-every saves along the way."


def run(settings: SpectrumSettings) -> int:
    """Measures, writes the pages and prints the table; the exit code."""
    console, errors = Terminal(), Terminal(stderr=True)
    clock = Clock(console)
    kept = _Run(settings)
    with run_folder(settings.out, interrupted=kept.after_interrupt):
        kept.check_before_loading()
        found, nothing = _measure_and_write(settings, console, errors, clock, kept)
        kept.drop()
    _summary(console, found, clock.total, nothing)
    return 0


def _measure_and_write(
    settings: SpectrumSettings, console: Console, errors: Console, clock: Clock, kept: _Run
) -> tuple[SpectrumFindings, bool]:  # fmt: skip
    """What was found, and whether all of it was there before."""
    with clock.stage("model", settings.model):
        model = load(settings.model, dtype=settings.dtype)
        say_unread(console, model)
        positions = model.config.max_positions
        settings = replace(settings, row_length=row_length(settings.row_length, positions, model.name))
        chosen = _chosen(settings, model, console)
    with clock.stage("text", describe_sources(settings.text)):
        rows = _rows(settings, model)
        console.print(f"  {rows.num_targets:,} tokens of {len(rows.names):,} documents in {len(rows.lengths)} rows")
        settings = replace(settings, batch_size=rows.rows_in_batch(settings.batch_size))
    facts = {**settings.of_finished(), "the model": model.fingerprint, "the text": rows.digest()[:16]}
    found = _finished(settings, errors, clock, kept, facts, model, rows, chosen)
    if found is not None and page_is_current(settings.out, "spectrum", _source(kept)):
        return found, True
    if found is None:
        found = _measure(settings, console, errors, clock, kept, model, rows, chosen)
        write_finished(kept.finished, found, facts)
    with clock.stage("pages", "pictures and tables"):
        _write(settings.out, found, _source(kept))
    return found, False


def _source(kept: _Run) -> str:
    """What the page is made from."""
    return digest(read_plain(kept.finished))


def _finished(
    settings: SpectrumSettings,
    errors: Console,
    clock: Clock,
    kept: _Run,
    facts: dict[str, Any],
    model: LanguageModel,
    rows: Rows,
    chosen: dict[str, bool],
) -> SpectrumFindings | None:
    """What a finished run with these settings found, with the density and the blocks if they were not asked for then.

    Raises:
        InputError: it had other settings.
    """
    earlier = None if settings.overwrite else read_facts(kept.finished)
    if earlier is None:
        return None
    refuse_difference(settings.out, earlier[0], facts)
    settings = settings.with_additions(earlier[1])
    found = read_finished(kept.finished, settings)
    new = {name for name, options in settings.additions().items() if options != earlier[1][name]}
    if new:
        density, spectra = _additions(settings, errors, clock, model, rows, chosen, new)
        found = replace(found, density=density or found.density, blocks=spectra or found.blocks)
        write_finished(kept.finished, found, facts)
    return found


def _chosen(settings: SpectrumSettings, model: LanguageModel, console: Console) -> dict[str, bool]:
    chosen = choose(model, settings.parameters)
    sizes = _sizes(model, chosen)
    dimension = sum(sizes.values())
    if settings.k > dimension:
        raise InputError(f"--k {settings.k} is more than the {dimension} entries of the chosen parameters.")
    console.print(f"  {model.name}: {dimension:,} parameters in {len(sizes)} tensors")
    return chosen


def _sizes(model: LanguageModel, chosen: dict[str, bool]) -> dict[str, int]:
    return {name: leaf.size for name, leaf in flatten(model.params).items() if chosen[name]}


def _rows(settings: SpectrumSettings, model: LanguageModel) -> Rows:
    longest = longest_document(settings.max_tokens, settings.row_length)
    return pack(
        documents(settings.text, split=settings.split_documents, longest=longest),
        model.tokenizer.encode,
        seq_len=settings.row_length,
        max_targets=settings.max_tokens,
        held_out_targets=0,
        vocab_size=model.config.vocab_size,
    ).stream


def _check_memory(settings: SpectrumSettings, model: LanguageModel, basis: int, dimension: int) -> None:
    """What is known to be needed; a device with memory of its own says itself what it lacks."""
    if jax.default_backend() != "cpu":
        return
    check_memory(
        4 * basis * dimension, f"{basis:,} vectors of {dimension:,} parameters", "give a smaller --basis or --k"
    )
    if settings.density:
        steps = min(settings.density_steps, dimension)
        check_memory(
            4 * steps * dimension, f"{steps:,} vectors of {dimension:,} parameters", "give a smaller --density-steps"
        )
    rows, length = settings.batch_size, settings.row_length
    check_memory(
        attention_bytes(model.config.num_heads, rows, length),
        f"attention over rows of {length:,} tokens, {rows:,} at a time",
        "give a smaller --batch-size or --row-length",
    )


def _measure(
    settings: SpectrumSettings,
    console: Console,
    errors: Console,
    clock: Clock,
    kept: _Run,
    model: LanguageModel,
    rows: Rows,
    chosen: dict[str, bool],
) -> SpectrumFindings:
    sizes = _sizes(model, chosen)
    dimension, batch = sum(sizes.values()), one_batch(rows, settings.batch_size)
    like = fj.operators.restrict(model.params, unflatten(chosen))
    with clock.stage("passes", "the loss, forward and backward, to compare products with"):
        passes = time_passes(settings, model, batch, chosen)
    matvec = operator_of(settings, model, batch, chosen)
    basis = basis_size(settings, dimension)
    _check_memory(settings, model, basis, dimension)
    every = _checkpoint_every(settings, basis, dimension)
    with clock.stage("eigenvalues", _plan(settings, basis, dimension, every)):
        facts = {**settings.fixed(), "the model": model.fingerprint, "the text": rows.digest()[:16]}
        kept.begin(facts, saving=every is not None)
        spectrum = eigenvalues_of(settings, errors, matvec, like, dimension, kept.state, every)
    asked = {name for name, options in settings.additions().items() if options is not None}
    density, spectra = _additions(settings, errors, clock, model, rows, chosen, asked)
    return SpectrumFindings(
        settings, model.name, sizes, rows.num_targets, len(rows.lengths), len(rows.names), passes, spectrum, basis,
        density, spectra, clock.seconds,
    )  # fmt: skip


def _additions(
    settings: SpectrumSettings,
    errors: Console,
    clock: Clock,
    model: LanguageModel,
    rows: Rows,
    chosen: dict[str, bool],
    asked: set[str],
) -> tuple[Measured | None, dict[str, dict[int | None, Any]]]:
    """The density and the spectra of the blocks, where they were asked for."""
    batch = one_batch(rows, settings.batch_size)
    density: Measured | None = None
    if "density" in asked:
        with clock.stage("density", f"{settings.probes} probes of {settings.density_steps} products"):
            like = fj.operators.restrict(model.params, unflatten(chosen))
            density = density_of(settings, errors, operator_of(settings, model, batch, chosen), like)
    spectra: dict[str, dict[int | None, Any]] = {}
    if "blocks" in asked:
        with clock.stage("blocks", f"scores of {min(settings.block_tokens, rows.num_targets)} tokens"):
            spectra = block_spectra_of(settings, model, batch, chosen)
    return density, spectra


def _checkpoint_every(settings: SpectrumSettings, basis: int, dimension: int) -> float | None:
    """Seconds between saves; None for none."""
    size = 4 * basis * dimension
    every = settings.checkpoint_every
    if every is None and (size <= _CHEAP_SAVE or settings.resume):
        every = CHECKPOINT_EVERY
    if every is not None:
        # The new save is complete before the old one goes.
        check_writable(settings.out, bytes_needed=2 * size)
    return every


def _plan(settings: SpectrumSettings, basis: int, dimension: int, every: float | None) -> str:
    ends = f"{settings.k} of each end" if settings.which == "both" else f"the {settings.k} largest"
    place = "on the host" if jax.default_backend() == "cpu" else "on the device"
    kept = f"{basis} vectors {place}, {sections.memory(4 * basis * dimension)}"
    saves = "not saved along the way (--checkpoint-every would)" if every is None else f"saved every {every:g} s"
    return f"{ends} of the {sections.NAMES[settings.operator]}; {kept}; {saves}"


def _write(out: Path, found: SpectrumFindings, made_from: str) -> None:
    tables = {
        "spectrum.csv": sections.eigenvalues_csv(found),
        "density.csv": sections.density_csv(found) if found.density is not None else None,
        "blocks.csv": sections.blocks_csv(found) if found.blocks else None,
    }
    heading = sections.title(found), sections.lead(found)
    write_pages(out, "spectrum", heading, sections.blocks(found), tables, ("spectrum-",), made_from)


def _summary(console: Console, found: SpectrumFindings, seconds: float, nothing: bool) -> None:
    """The last thing on the terminal."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for i, name in enumerate(sections.EIGENVALUE_HEADER):
        table.add_column(name, justify="right" if i else "left")
    for row in sections.eigenvalue_rows(found):
        table.add_row(*row)
    console.print()
    console.print(bold(sections.title(found)))
    console.print(table)
    console.print()
    for name, value in sections.facts(found):
        console.print(f"{name}: {value}")
    if nothing:
        console.print("finished before: nothing had to be computed (--overwrite measures again)")
    console.print(f"took {duration(seconds)}")
    path = (found.settings.out / "spectrum.html").resolve()
    console.print(Text.assemble("spectrum: ", (printable(str(path)), "bold")))
