"""Tables and the picture of `merging.py`."""

import numpy as np
import scipy.stats

DOMAINS = ("wikipedia", "pubmed")
TEST_SHARE = 1 / 3  # test documents for each document that the fine-tunes saw: 20% to 60%
REFERENCE = "uniform"
COLORS = {
    "uniform": "#555555", "magnitude": "#E69F00", "change": "#56B4E9", "empirical Fisher": "#0072B2",
    "true Fisher": "#009E73", "K-FAC, empirical": "#D55E00", "K-FAC, true": "#CC79A7",
}  # fmt: skip


def at_half(row):
    """Test losses by domain at even weights."""
    return np.array(dict(row["shares"])[0.5][1])


def at_best(row):
    """Test losses at the weight of Wikipedia that is best on the other documents, and that weight."""
    return _best(row["shares"])


def at_length(row):
    """The same for the length of the task vector."""
    return _best([*row["lengths"], [1.0, dict(row["shares"])[0.5]]])


def _best(tried):
    chosen, losses = min(tried, key=lambda x: np.mean(x[1][0]))
    return np.array(losses[1]), chosen


def interval(values):
    """Mean and half-width of a 95% interval over random splits, corrected for their overlap."""
    values = np.asarray(values)
    error = np.sqrt(values.var(ddof=1) * (1 / len(values) + TEST_SHARE)) if len(values) > 1 else np.nan
    return float(values.mean()), float(scipy.stats.t.ppf(0.975, max(len(values) - 1, 1)) * error)


VIEWS = (
    ("even weights", lambda row: (at_half(row), None)),
    ("best weights", at_best),
    ("best length", at_length),
)


def rows_of(results):
    """For every method and view the mean loss, that above uniform in the same view, and what was chosen."""
    seeds = list(results["seeds"].values())
    found = {}
    for name in seeds[0]["methods"]:
        found[name] = {}
        even_only = len(seeds[0]["methods"][name]["shares"]) == 1
        for view, of in VIEWS:
            if even_only and view == "best weights":
                continue
            mine = [of(s["methods"][name]) for s in seeds]
            rival = [of(s["methods"][REFERENCE])[0] for s in seeds]
            losses = np.array([m[0] for m in mine])
            gap, width = interval((losses - np.array(rival)).mean(1))
            found[name][view] = {
                "loss": float(losses.mean()), "by_domain": losses.mean(0).tolist(), "gap": gap, "half_width": width,
                "chosen": None if mine[0][1] is None else float(np.median([m[1] for m in mine])),
            }  # fmt: skip
    return found


def verdict(name, row):
    if name == REFERENCE:
        return "reference"
    if not abs(row["gap"]) > row["half_width"]:
        return "cannot be told apart"
    return "worse" if row["gap"] > 0 else "better"


def references_of(results):
    """Mean test losses of the models that are no merges: by domain, and their mean."""
    seeds = list(results["seeds"].values())
    return {k: np.mean([s["references"][k][1] for s in seeds], 0) for k in seeds[0]["references"]}


def table(results):
    unit = results["unit"]
    lines = [f"# Merging: {results['name']}", "", results["versions"], ""]
    lines += [f"{len(results['seeds'])} seeds; nats per {unit}, held-out documents. Chosen on a seed of their own: "
              + ", ".join(f"{k}: {v}" for k, v in results["chosen"].items() if v != "floor 0") + ".", ""]  # fmt: skip
    lines += ["| model | Wikipedia | PubMed | mean |", "|---|---:|---:|---:|"]
    labels = {"base": "before fine-tuning", "wikipedia": "fine-tuned on Wikipedia", "pubmed": "fine-tuned on PubMed",
              "both": "fine-tuned on both"}  # fmt: skip
    for key, (one, two) in references_of(results).items():
        lines.append(f"| {labels[key]} | {one:.4f} | {two:.4f} | {(one + two) / 2:.4f} |")
    lines += ["", "| merged by | Wikipedia | PubMed | mean | above uniform (95%) | verdict "
              "| best weight of Wikipedia: above uniform at its best | best length: above uniform at its best |",
              "|---|---:|---:|---:|---:|---|---:|---:|"]  # fmt: skip
    for name, views in sorted(rows_of(results).items(), key=lambda x: x[1]["even weights"]["loss"]):
        even = views["even weights"]
        one, two = even["by_domain"]
        cells = [name, f"{one:.4f}", f"{two:.4f}", f"{even['loss']:.4f}", shown(even), verdict(name, even)]
        others = (views.get(view) for view, _ in VIEWS[1:])
        cells += ["" if row is None else f"{row['chosen']:.1f}: {row['loss']:.4f}, {shown(row)}" for row in others]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(row):
    return f"{row['gap']:+.4f} ± {row['half_width']:.4f}"


def picture(results, path):
    """Left the mean loss over the weight of Wikipedia, right what each method gains over uniform in three views."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
    seeds = list(results["seeds"].values())
    for name, color in COLORS.items():
        if name not in seeds[0]["methods"]:
            continue
        ends = np.array([[s["references"][d][1] for s in seeds] for d in (DOMAINS[1], DOMAINS[0])]).mean(-1)
        inner = np.array([[np.mean(x[1][1]) for x in s["methods"][name]["shares"]] for s in seeds])
        shares = [x[0] for x in seeds[0]["methods"][name]["shares"]]
        if len(shares) == 1:
            left.plot(shares, inner.mean(0), color=color, marker="D", ms=6, ls="", zorder=3)
            continue
        curve = np.concatenate([ends[0][:, None], inner, ends[1][:, None]], 1).mean(0)
        left.plot((0, *shares, 1), curve, color=color, lw=1.6, marker="o", ms=3)
    references = {k: float(np.mean(v)) for k, v in references_of(results).items()}
    for key, label in (("base", "before fine-tuning"), ("both", "fine-tuned on both")):
        left.axhline(references[key], color="0.5", lw=1, ls="--")
        left.annotate(label, (0.5, references[key]), xytext=(0, 3), textcoords="offset points", color="0.35",
                      fontsize=8, ha="center")  # fmt: skip
    left.set(xlabel="weight of the Wikipedia model (colours as on the right, uniform: grey)",
             ylabel=f"mean loss of both domains (nats per {results['unit']})")  # fmt: skip
    found = rows_of(results)
    names = sorted((n for n in found if n != REFERENCE), key=lambda n: -found[n]["even weights"]["gap"])
    for offset, (view, _), marker in zip((0.22, 0, -0.22), VIEWS, ("o", "s", "^"), strict=True):
        for place, name in enumerate(names):
            row, color = found[name].get(view), COLORS.get(name, "#0072B2")
            if row is None:
                continue
            right.errorbar(row["gap"], place + offset, xerr=row["half_width"], color=color, marker=marker, ms=5,
                           mfc=color if view == "even weights" else "white", lw=1.2, capsize=2)  # fmt: skip
        right.plot([], [], color="0.3", marker=marker, ls="", mfc="0.3" if view == "even weights" else "white",
                   label=view)  # fmt: skip
    right.axvline(0, color=COLORS[REFERENCE], lw=1)
    right.set_yticks(range(len(names)), names)
    for tick, name in zip(right.get_yticklabels(), names, strict=True):
        tick.set_color(COLORS.get(name, "#0072B2"))
    right.set(xlabel=f"above the uniform mean (nats per {results['unit']})")
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results['name']}: {len(seeds)} seeds, 95% intervals")
    figure.savefig(path, dpi=150)
