# ruff: noqa: RUF001 -- a minus and a plus-minus sign are what they look like
"""What the page of a comparison says, in plain words."""

import numpy as np

from fisher_jax.cli.compare import plots
from fisher_jax.cli.compare.shift import FEW, NEVER, TINY, RowShift
from fisher_jax.cli.compare.tables import Compared
from fisher_jax.cli.page.blocks import Heading, Paragraph, Sketch, Table
from fisher_jax.cli.page.style import picture
from fisher_jax.cli.report.layers import MODEL, part_name
from fisher_jax.cli.report.sections import KIND_NAMES
from fisher_jax.cli.run.progress import duration

_SHOWN = 15  # gains in a table, and as many losses
SUMS = (
    ("all attention", "layers/attention"),
    ("all MLPs", "layers/mlp"),
    ("all layers", "layers"),
    ("whole model", MODEL),
)


def title(found: Compared) -> str:
    return f"What matters more, and what less, in {found.names[1]} than in {found.names[0]} ({found.model_name})"


def lead(found: Compared) -> str:
    """The answer in a few sentences."""
    return " ".join([*(counted(found, kind) for kind in found.rows), *(_whole(found) if found.layers else [])])


def counted(found: Compared, kind: str) -> str:
    """How many rows changed, and the largest changes of either sign."""
    shift, rate = found.rows[kind], found.settings.q
    gained, lost = shift.gained(rate), shift.lost(rate)
    tested = int(np.sum(shift.reason == ""))
    text = (
        f"By the {KIND_NAMES[kind]} {len(gained) + len(lost):,} of {tested:,} testable rows of the head differ at "
        f"q < {rate:g}: {len(gained):,} matter{'s' * (len(gained) == 1)} more in {found.names[1]}"
    )
    text += f" ({_few(found, gained)}), " if len(gained) else ", "
    text += f"{len(lost):,} less" + (f" ({_few(found, lost)})." if len(lost) else ".")
    return text


def _few(found: Compared, rows: np.ndarray) -> str:
    return "most of all " + ", ".join(f"“{found.vocabulary[row]}”" for row in rows[:4])


def _whole(found: Compared) -> list[str]:
    assert found.layers is not None
    model = found.layers.wholes[MODEL]
    verdict = "a difference" if model.p < found.settings.q else "no difference shown"
    return [
        f"The Fisher information of the whole model is {float(model.before):.3g} in {found.names[0]} and "
        f"{float(model.after):.3g} in {found.names[1]} ({_percent(model.before, model.after)}, p = {_p(model.p)}: "
        f"{verdict})."
    ]


def _percent(before: float | np.ndarray, after: float | np.ndarray) -> str:
    return f"{100 * (float(after) / float(before) - 1):+.0f}%" if before > 0 else "from nothing"


def _p(value: float | np.ndarray) -> str:
    value = float(value)
    return "–" if np.isnan(value) else f"{value:.2g}" if value >= 1e-99 else "0"


def notes(found: Compared) -> list[str]:
    """What a person should know before believing the numbers."""
    a, b = found.tasks
    unit, told = a.progress.settings["--unit"], []
    shift = next(iter(found.rows.values()))
    fewest = min((shift.before.units, found.names[0]), (shift.after.units, found.names[1]))
    if unit != "document":
        told.append(
            f"The reports were measured with --unit {unit}, which takes what stands in one document as independent. "
            "It is not, so the p values are too small; --unit document is the honest choice."
        )
    if fewest[0] < 4:
        told.append(
            f"{fewest[1]} has only {fewest[0]:,.0f} {unit}s; the test was found to keep its promise from 4 on."
        )
    if a.progress.text_names == b.progress.text_names:
        told.append(
            f"Both were measured on {' '.join(a.progress.text_names)}. Documents that are in both make the test "
            "cautious: it takes the two texts as independent."
        )
    return [*told, *([found.layers_missing] if found.layers_missing else [])]


def blocks(found: Compared) -> list[Sketch]:
    """The page after its headline."""
    parts: list[Sketch] = [Paragraph(note) for note in notes(found)]
    for kind in found.rows:
        parts += _of_kind(found, kind)
    return [*parts, *_totals(found), *_untestable(found), *_layers(found), *_method(found), *_reading(found)]


def _of_kind(found: Compared, kind: str) -> list[Sketch]:
    shift, names, rate = found.rows[kind], found.names, found.settings.q
    gained, lost = shift.gained(rate), shift.lost(rate)
    parts: list[Sketch] = [
        Heading(f"Tokens, by the {KIND_NAMES[kind]}"),
        Paragraph(f"{counted(found, kind)} {_by_frequency(found, shift, gained, lost)}".strip()),
        picture(
            f"compare-rows-{kind}",
            f"Importance of every vocabulary row in {names[1]} against its importance in {names[0]}",
            plots.rows_figure, shift, names, found.vocabulary, rate,
        ),
    ]  # fmt: skip
    if not len(gained) + len(lost):
        return parts
    parts.append(
        picture(
            f"compare-changes-{kind}",
            "The largest gains and losses with their importance in both texts and its intervals",
            plots.changes_figure, shift, names, found.vocabulary, rate,
        )
    )  # fmt: skip
    for word, rows in (("more", gained), ("less", lost)):
        if len(rows):
            caption = f"The largest of the {len(rows):,} that matter {word} in {names[1]}"
            parts.append(Table(caption, _header(names), [_row(found, shift, row) for row in rows[:_SHOWN]]))
    return parts


def _by_frequency(found: Compared, shift: RowShift, gained: np.ndarray, lost: np.ndarray) -> str:
    """How many changes go with a change of frequency in the same direction."""
    more = _rate(shift, False) > _rate(shift, True)
    less = _rate(shift, False) < _rate(shift, True)
    told = [
        f"{int(np.sum(direction[rows])):,} of the {len(rows):,} that matter {word} also occur {often} often"
        for rows, direction, word, often in ((gained, more, "more", "more"), (lost, less, "less", "less"))
        if len(rows)
    ]
    if not told:
        return ""
    rows = np.concatenate([gained, lost])
    shares = [100 * float(side.mean[rows].sum() / side.mean.sum()) for side in (shift.before, shift.after)]
    return (
        f"{' and '.join(told)} as the next token there. All of them together hold {shares[0]:.0f}% of the importance "
        f"in {found.names[0]} and {shares[1]:.0f}% in {found.names[1]}."
    )


def _rate(shift: RowShift, before: bool) -> np.ndarray:
    """Occurrences as next token per thousand tokens."""
    side = shift.before if before else shift.after
    return 1000 * side.counts / side.tokens


def _header(names: tuple[str, str]) -> list[str]:
    a, b = names
    return ["token", f"per 1,000 tokens: {a}", b, f"importance: {a}", b, "difference", "± error", "z", "p", "q"]


def _row(found: Compared, shift: RowShift, row: int | np.integer) -> list[str]:
    test = shift.shift
    return [
        found.vocabulary[row],
        *(f"{_rate(shift, before)[row]:.3g}" for before in (True, False)),
        *(f"{side.mean[row]:.3g}" for side in (shift.before, shift.after)),
        f"{test.difference[row]:+.3g}",
        f"{test.standard_error[row]:.2g}",
        f"{test.z[row]:+.1f}",
        _p(test.p[row]),
        _p(test.q[row]),
    ]


def _totals(found: Compared) -> list[Sketch]:
    rows = [
        [
            f"head, {KIND_NAMES[kind]}",
            f"{shift.total.before:.4g}",
            f"{shift.total.after:.4g}",
            _percent(shift.total.before, shift.total.after),
            f"at most {shift.total.error:.2g}",
            f"at most {_p(shift.total.p)}",
        ]
        for kind, shift in found.rows.items()
    ]
    return [
        Heading("In total"),
        Table(
            "Fisher information per token, summed over all rows of the head",
            ["", *found.names, "change", "error", "p"],
            rows,
        ),
        Paragraph(
            "A state keeps no covariances between rows. The error of the sum is therefore bounded by the sum of the "
            "errors, which is what it would be if all rows moved together, and the p value by that of this error. "
            "Sums over layers and the whole model have errors of their own where both reports have --parameters all."
        ),
    ]


def _untestable(found: Compared) -> list[Sketch]:
    reasons = [(NEVER, "never probable, or below what float32 holds"), (TINY, ""), (FEW, "in both texts together")]
    rows = [
        [
            f"{reason}{f' ({why})' if why else ''}",
            *(f"{int(np.sum(x.reason == reason)):,}" for x in found.rows.values()),
        ]
        for reason, why in reasons
    ]
    unseen = [np.sum((x.reason != "") & (x.before.counts + x.after.counts == 0)) for x in found.rows.values()]
    return [
        Heading("What could not be tested"),
        Paragraph(
            "A row whose importance comes from a few documents cannot be told from chance, whatever its size. Such "
            "rows are not tested, and not counted in the q values; that they are unimportant is not said."
        ),
        Table(
            "Rows that were not tested, by reason",
            ["reason", *(KIND_NAMES[kind] for kind in found.rows)],
            [*rows, ["all of them", *(f"{int(np.sum(x.reason != '')):,}" for x in found.rows.values())],
             ["of these never the next token", *(f"{int(x):,}" for x in unseen)]],
        ),
    ]  # fmt: skip


def _layers(found: Compared) -> list[Sketch]:
    layers = found.layers
    if layers is None:
        return []
    names, rate = found.names, found.settings.q
    kernels = [(path, index) for path, change in layers.heads.items() for index in np.argwhere(change.q < rate)]
    kernels.sort(key=lambda x: -abs(float(layers.heads[x[0]].z[tuple(x[1])])))
    tested = sum(int(np.sum(~np.isnan(change.p))) for change in layers.heads.values())
    heads = [
        _part(f"{part_name(path)}, layer {index[0]}, head {index[1]}", layers.heads[path], tuple(index))
        for path, index in kernels[:_SHOWN]
    ]
    kind = KIND_NAMES[found.tasks[0].progress.settings["--kind"]].removeprefix("exact ")
    outside = [path for path in layers.tensors if not path.startswith("layers/")]
    chosen = [
        *((part_name(path), layers.tensors[path]) for path in outside),
        *((part_name(node), layers.wholes[node]) for node in found.columns),
        *((name, layers.wholes[node]) for name, node in SUMS),
    ]
    header = ["part", *names, "change", "± error", "z", "p", "q"]
    return [
        Heading("Layers"),
        Paragraph(
            f"All parameters, by the {kind}: violet where a part of a layer has more information in {names[1]}, "
            f"orange where it has less. q values are adjusted within each kind of part: tensors of a layer, parts of "
            "a layer with several tensors, attention heads, and sums over the model."
        ),
        picture(
            "compare-layers", f"Heat map of the Fisher information in {names[1]} over that in {names[0]}",
            plots.layers_figure, layers, found.columns, names, rate,
        ),
        Table("Sums over the layers", header, [_part(name, change, ()) for name, change in chosen]),
        Paragraph(f"{len(kernels):,} of {tested:,} kernels of an attention head differ at q < {rate:g}."),
        *([Table("Attention heads, the surest differences", header, heads)] if heads else []),
    ]  # fmt: skip


def _part(name: str, change, index: tuple) -> list[str]:
    before, after, difference, error, z, p, q = (float(x[index]) for x in change)
    return [
        name, f"{before:.3g}", f"{after:.3g}", f"{difference:+.2g} ({_percent(before, after)})", f"{error:.2g}",
        f"{z:+.1f}", _p(p), _p(q),
    ]  # fmt: skip


def _method(found: Compared) -> list[Sketch]:
    rows = [["model", found.model_name]]
    first = next(iter(found.rows.values()))
    for letter, task, name, side in zip("AB", found.tasks, found.names, (first.before, first.after), strict=True):
        unit = task.progress.settings["--unit"]
        rows.append([f"{letter}: {name}", f"{task.place}, {side.tokens:,.0f} tokens, {side.units:,.0f} {unit}s, text "
                     f"{' '.join(task.progress.text_names[:3])}"])  # fmt: skip
    rows += [[f"time: {name}", duration(seconds)] for name, seconds in found.seconds.items()]
    return [Heading("How it was measured"), Table("", [], rows, left=2)]


def _reading(found: Compared) -> list[Sketch]:
    return [
        Heading("How to read it"),
        Paragraph(
            f"Every difference is {found.names[1]} minus {found.names[0]}, in Fisher information per token of text. "
            "z is the difference over its standard error, p the two-sided probability of one as large by chance "
            "(Welch's test and the one with pooled variance, the larger of both: importance is heavy-tailed), q the "
            f"p value adjusted for all rows at once (Benjamini and Hochberg): of the rows with q < "
            f"{found.settings.q:g} at most {100 * found.settings.q:g}% are expected to be false."
        ),
        Paragraph(
            "A row that occurs more often has more importance for that alone; the frequencies stand beside it. ␣ "
            "stands for a space and \\n for a line break. All rows are in compare.csv"
            f"{', all parts of the model in compare_layers.csv' if found.layers else ''}; a is {found.names[0]}, b "
            f"is {found.names[1]}."
        ),
    ]
