"""The page of a report put together from the parts of its tasks, and its tables from their states."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fisher_jax.cli.page.blocks import Block, Contents, Heading, Paragraph, Picture
from fisher_jax.cli.page.files import page_is_current, remove_pages, write_pages
from fisher_jax.cli.report.parts import Part, PartStore, file_name
from fisher_jax.cli.run.choice_error import listed
from fisher_jax.cli.run.json_files import digest

TABLES = ("importance.csv", "layers.csv")
FIGURES = ("tasks/",)
_PAIRS = "side-by-side"


def page_of(parts: PartStore) -> tuple[tuple[str, str], list[Block], str]:
    """(title and lead, blocks, what they were made from) of all finished tasks."""
    names = [name for name, progress in parts.tasks.items() if progress.finished]
    found = {name: parts.get(name) for name in names}
    pairs = [
        pair
        for i, other in enumerate(names)
        for name in names[i + 1 :]
        if (pair := parts.get(other, name)) is not None
    ]
    there = [part for part in found.values() if part is not None]
    made_from = digest(
        [[part.tasks, part.made_from, part.settings] for part in [*there, *pairs]] + [[name] for name in names]
    )
    if len(names) == 1 and there:
        (part,) = there
        return (part.title, part.lead), [_own(part, block) for block in part.blocks], made_from
    return _several(parts, found, pairs), _blocks(found, pairs), made_from


def _several(parts: PartStore, found: Mapping[str, Part | None], pairs: Sequence[Part]) -> tuple[str, str]:
    model = next(iter(parts.tasks.values())).model_name
    title = f"What matters in {model} on {listed(list(found))}"
    lead = f"{len(found)} tasks, measured on one model, each with its own pictures below."
    return title, " ".join([lead, *(part.lead for part in pairs)])


def _blocks(found: Mapping[str, Part | None], pairs: Sequence[Part]) -> list[Block]:
    blocks: list[Block] = []
    contents = {_PAIRS: "Tasks side by side"} if pairs else {}
    blocks.append(Contents(contents | {f"task-{file_name(name)}": name for name in found}))
    if pairs:
        blocks.append(Heading("Tasks side by side", 1, _PAIRS))
        blocks.append(
            Paragraph(
                "The tokens whose importance differs most, by difference over its standard error, among those that "
                "occur five times or more in one of the two tasks; and the rank correlation (Spearman) of all rows. "
                "Tokens that are a label in one text and never in the other lie in bands of their own. How sure a "
                "difference is, fisher-jax compare says."
            )
        )
        for part in pairs:
            blocks += [_lower(_own(part, block)) for block in part.blocks]
    for name, one in found.items():
        blocks.append(Heading(name, 1, f"task-{file_name(name)}"))
        if one is None:
            blocks.append(Paragraph("Measured, but its page is not there: give its command again to write it."))
        else:
            blocks += [Heading(one.title, 3), Paragraph(one.lead), *(_lower(_own(one, x)) for x in one.blocks)]
    return blocks


def _lower(block: Block) -> Block:
    return block._replace(level=max(block.level, 2) + 1) if isinstance(block, Heading) else block


def _own(part: Part, block: Block) -> Block:
    """A picture in the folder of its task or pair."""
    if not isinstance(block, Picture):
        return block
    return block._replace(name=f"tasks/{'--'.join(map(file_name, part.tasks))}/{block.name}")


def report_is_current(out: Path, parts: PartStore) -> bool:
    return page_is_current(out, "report", page_of(parts)[2])


def write_report(out: Path, parts: PartStore, tables: Mapping[str, str | None]) -> None:
    heading, blocks, made_from = page_of(parts)
    write_pages(out, "report", heading, blocks, tables, FIGURES, made_from)


def remove_report(out: Path) -> None:
    """For a folder whose only task was dropped."""
    remove_pages(out, "report", TABLES, FIGURES)
