"""`fisher-jax spectrum` from start to end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from fisher_jax._support.errors import InputError
from fisher_jax._support.host_memory import check_memory
from fisher_jax.cli.page.files import page_is_current, write_pages
from fisher_jax.cli.page.style import drawn
from fisher_jax.cli.run.earlier_run import refuse_difference
from fisher_jax.cli.run.folder import check_writable
from fisher_jax.cli.run.options import CHECKPOINT_EVERY
from fisher_jax.cli.run.row_length import check_attention, row_length
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.terminal import Terminal, table
from fisher_jax.cli.run.tools import Tools
from fisher_jax.cli.spectrum import sections
from fisher_jax.cli.spectrum.measure import (
    Measured,
    Setup,
    basis_size,
    block_spectra_of,
    choose,
    density_of,
    eigenvalues_of,
    time_passes,
)
from fisher_jax.cli.spectrum.sections import SpectrumFindings
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.cli.spectrum.store import SpectrumStore
from fisher_jax.models.weight_names import flatten
from fisher_jax.text.corpora import describe_sources, documents
from fisher_jax.text.packing import longest_document, pack

_CHEAP_SAVE = 2 * 2**30  # bytes


def run(settings: SpectrumSettings, tools: Tools) -> int:
    """Measures, writes the pages and prints the table; the exit code."""
    console = Terminal()
    store = SpectrumStore(settings.out)
    with run_folder(settings.out, interrupted=store.after_interrupt):
        store.check_before_loading(resume=settings.resume, overwrite=settings.overwrite)
        found, there_before = _measure_and_write(settings, console, store, tools)
        store.drop()
    _summary(console, found, there_before)
    return 0


def _measure_and_write(
    settings: SpectrumSettings, console: Terminal, store: SpectrumStore, tools: Tools
) -> tuple[SpectrumFindings, bool]:  # fmt: skip
    """What was found, and whether all of it was there before."""
    setup = _setup(settings, console, tools)
    of = {"the model": setup.model.fingerprint, "the text": setup.rows.digest()[:16]}
    found = _finished(setup, console, store, of)
    if found is not None and page_is_current(settings.out, "spectrum", store.digest):
        return found, True
    if found is None:
        found = _measure(setup, console, store, of, tools)
        store.write(found, setup.settings.of_finished() | of)
    with console.stage("pages", "pictures and tables"):
        _write(settings.out, found, store.digest, tools)
    return found, False


def _setup(settings: SpectrumSettings, console: Terminal, tools: Tools) -> Setup:
    with console.stage("model", settings.model):
        model = tools.load(settings.model, dtype=settings.dtype)
        console.say_weights(model)
        console.say_unread(model)
        settings = replace(settings, dtype=model.dtype)
        length = row_length(settings.row_length, model.config.max_positions, model.name)
        settings = replace(settings, row_length=length)
        chosen = choose(model, settings.parameters)
        sizes = [leaf.size for name, leaf in flatten(model.params).items() if chosen[name]]
        if settings.k > sum(sizes):
            raise InputError(f"--k {settings.k} is more than the {sum(sizes)} entries of the chosen parameters.")
        console.print(f"  {model.name}: {sum(sizes):,} parameters in {len(sizes)} tensors")
    with console.stage("text", describe_sources(settings.text)):
        longest = longest_document(settings.max_tokens, length)
        rows = pack(
            documents(settings.text, split=settings.split_documents, longest=longest), model.tokenizer.encode,
            seq_len=length, max_targets=settings.max_tokens, held_out_targets=0, vocab_size=model.config.vocab_size,
        ).stream  # fmt: skip
        console.print(f"  {rows.num_targets:,} tokens of {len(rows.names):,} documents in {len(rows.lengths)} rows")
    return Setup(replace(settings, batch_size=rows.rows_in_batch(settings.batch_size)), model, rows, chosen)


def _finished(
    setup: Setup, console: Terminal, store: SpectrumStore, of: dict[str, Any]
) -> SpectrumFindings | None:  # fmt: skip
    """What a finished run with these settings found, with the density and the blocks if they were not asked for then.

    Raises:
        InputError: it had other settings.
    """
    earlier = None if setup.settings.overwrite else store.read_facts()
    if earlier is None:
        return None
    facts = setup.settings.of_finished() | of
    refuse_difference(store.out, earlier[0], facts)
    settings = setup.settings.with_additions(earlier[1])
    found = store.read(settings)
    new = {name for name, options in settings.additions().items() if options != earlier[1][name]}
    if new:
        density, spectra = _additions(setup._replace(settings=settings), console, new)
        found = replace(found, density=density or found.density, blocks=spectra or found.blocks)
        store.write(found, facts)
    return found


def _check_memory(setup: Setup, basis: int) -> None:
    """What is known to be needed; a device with memory of its own says itself what it lacks."""
    if jax.default_backend() != "cpu":
        return
    settings, dimension = setup.settings, setup.dimension
    check_memory(
        4 * basis * dimension, f"{basis:,} vectors of {dimension:,} parameters", "give a smaller --basis or --k"
    )
    if settings.density:
        steps = min(settings.density_steps, dimension)
        check_memory(
            4 * steps * dimension, f"{steps:,} vectors of {dimension:,} parameters", "give a smaller --density-steps"
        )
    check_attention(setup.model.config, settings.batch_size, settings.row_length)


def _measure(
    setup: Setup, console: Terminal, store: SpectrumStore, of: dict[str, Any], tools: Tools
) -> SpectrumFindings:
    settings, dimension, rows = setup.settings, setup.dimension, setup.rows
    with console.stage("passes", "the loss, forward and backward, to compare products with"):
        passes = time_passes(setup)
    basis = basis_size(settings, dimension)
    _check_memory(setup, basis)
    every, needed = saving(settings, 4 * basis * dimension)
    check_writable(settings.out, bytes_needed=needed, tools=tools)
    with console.stage("eigenvalues", _plan(settings, basis, dimension, every)):
        store.begin(settings.fixed() | of, resume=settings.resume, saving=every is not None)
        spectrum = eigenvalues_of(setup, Terminal(stderr=True), store.state, every, tools)
    asked = {name for name, options in settings.additions().items() if options is not None}
    density, spectra = _additions(setup, console, asked)
    return SpectrumFindings(
        settings, setup.model.name, setup.sizes, rows.num_targets, len(rows.lengths), len(rows.names), passes,
        spectrum, basis, density, spectra, console.seconds,
    )  # fmt: skip


def _additions(
    setup: Setup, console: Terminal, asked: set[str]
) -> tuple[Measured | None, dict[str, dict[int | None, Any]]]:
    """The density and the spectra of the blocks, where they were asked for."""
    settings = setup.settings
    density: Measured | None = None
    if "density" in asked:
        with console.stage("density", f"{settings.probes} probes of {settings.density_steps} products"):
            density = density_of(setup, Terminal(stderr=True))
    spectra: dict[str, dict[int | None, Any]] = {}
    if "blocks" in asked:
        with console.stage("blocks", f"scores of {min(settings.block_tokens, setup.rows.num_targets)} tokens"):
            spectra = block_spectra_of(setup)
    return density, spectra


def saving(settings: SpectrumSettings, size: int) -> tuple[float | None, int]:
    """Seconds between saves of a basis of so many bytes, `None` for no saves, and the bytes that they need."""
    every = settings.checkpoint_every
    if every is None and (size <= _CHEAP_SAVE or settings.resume):
        every = CHECKPOINT_EVERY
    # The new save is complete before the old one goes.
    return every, 0 if every is None else 2 * size


def _plan(settings: SpectrumSettings, basis: int, dimension: int, every: float | None) -> str:
    ends = f"{settings.k} of each end" if settings.which == "both" else f"the {settings.k} largest"
    place = "on the host" if jax.default_backend() == "cpu" else "on the device"
    kept = f"{basis} vectors {place}, {sections.memory(4 * basis * dimension)}"
    saves = "not saved along the way (--checkpoint-every would)" if every is None else f"saved every {every:g} s"
    return f"{ends} of the {sections.NAMES[settings.operator]}; {kept}; {saves}"


def _write(out: Path, found: SpectrumFindings, made_from: str, tools: Tools) -> None:
    tables = {
        "spectrum.csv": sections.eigenvalues_csv(found),
        "density.csv": sections.density_csv(found) if found.density is not None else None,
        "blocks.csv": sections.blocks_csv(found) if found.blocks else None,
    }
    heading = sections.title(found), sections.lead(found)
    write_pages(out, "spectrum", heading, drawn(sections.blocks(found), tools), tables, ("spectrum-",), made_from)


def _summary(console: Terminal, found: SpectrumFindings, there_before: bool) -> None:
    lines = [f"{name}: {value}" for name, value in sections.facts(found)]
    if there_before:
        lines.append("finished before: nothing had to be computed (--overwrite measures again)")
    shown = table(sections.EIGENVALUE_HEADER, sections.eigenvalue_rows(found))
    page = "spectrum", found.settings.out / "spectrum.html"
    console.summary(sections.title(found), [*lines, console.took], page, shown)
