"""Tables and the picture of `landscape.py`."""

import re

import numpy as np
import scipy.stats

DAMPINGS = (0.1, 0.01, 0.001)
COLORS = {"AdamW": "#0072B2", "K-FAC": "#D55E00"}
PHASES = ("#56B4E9", "#0072B2", "#000000")


def kept_share(values):
    """Of what fresh factors gain over the gradient, the share that old ones keep: ``[..., 4] -> [...]``."""
    values = np.asarray(values)
    return (values[..., 1] - values[..., 3]) / (values[..., 2] - values[..., 3])


def half_life(ages, shares, level=0.5):
    """The age at which the share falls to ``level``, between ages on a logarithm; infinite if it does not."""
    x = np.log(np.maximum(ages, 0.5))
    for i in range(1, len(ages)):
        if shares[i] < level <= shares[i - 1]:
            part = (shares[i - 1] - level) / (shares[i - 1] - shares[i])
            return float(np.exp(x[i - 1] + part * (x[i] - x[i - 1])))
    return np.inf if shares[0] >= level else max(float(ages[0]), 0.5)


def interval(values):
    """Mean and half-width of a 95% interval over seeds."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(scipy.stats.t.ppf(0.975, len(values) - 1) * error)


def lives(results, name, anchor, damping):
    """Half-lives of the gain by seed, and their geometric mean with an interval where all are finite."""
    setting = results["sizes"]
    a, d = setting["anchors"].index(anchor), DAMPINGS.index(damping)
    shares = [kept_share(np.array(r["staleness"])[a, :, d]) for r in results["run"][name]]
    values = [half_life(setting["ages"], s) for s in shares]
    if not np.all(np.isfinite(values)):
        return shares, values, f"{sum(map(np.isinf, values))} of {len(values)} seeds beyond {setting['ages'][-1]}"
    centre, width = interval(np.log(values))
    return shares, values, f"{np.exp(centre):.0f} ({np.exp(centre - width):.0f} to {np.exp(centre + width):.0f})"


def plus_minus(values, digits=2):
    centre, width = interval(values)
    return f"{centre:.{digits}f}" + (f" ± {width:.{digits}f}" if np.isfinite(width) else "")


def while_falling(run):
    """Mean sharpness at the looks at which the loss has fallen to between 90% and 20% of its start."""
    before = np.array([losses[-1] for losses in run["losses"]]) / run["losses"][0][0]
    falling = (before < 0.9) & (before > 0.2)
    return float(np.mean(np.array(run["sharpness"])[1:][falling])) if falling.any() else np.nan


def edge_table(found):
    lines = ["", "### Gradient descent with a constant rate on a fixed batch", "",
             "Sharpness: top eigenvalue of the Hessian; while the loss falls: from 90% to 20% of its start.", "",
             "| rate | 2 / rate | at the start | while the loss falls | of 2 / rate | last quarter | of 2 / rate "
             "| loss at the end |", "|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for rate, runs in found["rates"].items():
        sharp, falling = np.array([r["sharpness"] for r in runs]), np.array([while_falling(r) for r in runs])
        late = sharp[:, -max(sharp.shape[1] // 4, 1) :].mean(1)
        cells = [rate, f"{2 / float(rate):.1f}", plus_minus(sharp[:, 0], 1), plus_minus(falling, 1),
                 plus_minus(falling * float(rate) / 2), plus_minus(late, 1), plus_minus(late * float(rate) / 2),
                 plus_minus([r["losses"][-1][-1] for r in runs], 3)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run_table(results):
    setting, lines = results["sizes"], []
    for name, rows in results["run"].items():
        lines += ["", f"### {name}, {len(rows)} seeds", "",
                  "| step | loss | top of the Hessian | second | top of the GGN | ratio | trace of the Fisher "
                  "| largest block's share |", "|---:|---:|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
        for i, look in enumerate(setting["looks"]):
            found = [r["eigenvalues"][i] for r in rows]
            traces = [{k: v["trace"] for k, v in r["blocks"]["looks"][i].items()} for r in rows]
            shares = {k: np.mean([t[k] / sum(t.values()) for t in traces]) for k in traces[0]}
            largest = max(shares, key=shares.get)
            cells = [str(look), plus_minus([f["loss"] for f in found]),
                     plus_minus([f["hessian"][0] for f in found], 1),
                     f"{np.mean([f['hessian'][1] for f in found]):.1f}", plus_minus([f["ggn"][0] for f in found], 1),
                     plus_minus([f["hessian"][0] / f["ggn"][0] for f in found]),
                     plus_minus([sum(t.values()) for t in traces], 1),
                     f"{short(largest)} {shares[largest]:.0%}"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        scores = rows[0]["blocks"]["scores"]
        lines += ["", f"Effective rank (exponential of the entropy) of blocks, of {scores} scores:", "",
                  "| block | parameters | " + " | ".join(f"step {x}" for x in setting["looks"]) + " |",
                  "|---|---:|" + "---:|" * len(setting["looks"])]  # fmt: skip
        for block, facts in rows[0]["blocks"]["looks"][0].items():
            ranks = [np.mean([r["blocks"]["looks"][i][block]["entropy_rank"] for r in rows])
                     for i in range(len(setting["looks"]))]  # fmt: skip
            lines.append(f"| {short(block)} | {facts['parameters']:,} | {' | '.join(f'{x:.0f}' for x in ranks)} |")
    lines += ["", "### Old factors: share of the gain of fresh ones over the gradient that is kept", "",
              "| trained by | damping | from step | fresh factors' gain over the gradient's | "
              + " | ".join(f"{n} steps old" for n in setting["ages"]) + " | half lost after, steps (95%) |",
              "|---|---:|---:|---:|" + "---:|" * (len(setting["ages"]) + 1)]  # fmt: skip
    for name, rows in results["run"].items():
        for d, damping in enumerate(DAMPINGS):
            for a, anchor in enumerate(setting["anchors"]):
                shares, _, life = lives(results, name, anchor, damping)
                gains = np.array([np.array(r["staleness"])[a, 0, d] for r in rows])
                cells = [name, f"{damping:g}", str(anchor), plus_minus(gains[:, 2] / gains[:, 3], 1),
                         *(plus_minus(x) for x in np.array(shares).T), life]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def short(path):
    """``['layers']['mlp']['down']['kernel'][0]`` as ``mlp down 0``."""
    return " ".join(x for x in re.findall(r"\w+", path) if x not in ("layers", "kernel", "attention", "scale"))


def table(results):
    lines = ["# Curvature along training runs", "", results["versions"]]
    if "edge" in results:
        lines += edge_table(results["edge"])
    if "run" in results:
        lines += run_table(results)
    return "\n".join(lines) + "\n"


def band(axis, x, curves, color, **options):
    """Median and range; the median's end."""
    curves = np.asarray(curves)
    axis.fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.18, lw=0)
    axis.plot(x, np.median(curves, 0), color=color, lw=1.5, **options)
    return np.median(curves, 0)[-1]


def label_ends(axis, x, ends, gap):
    """``(height, label, color)`` beside the ends of curves, at least ``gap`` apart: a difference, or a log ratio."""
    log, place = axis.get_yscale() == "log", -np.inf
    for height, label, color in sorted((np.log(h) if log else h, *rest) for h, *rest in ends):
        place = max(place + gap, height)
        axis.annotate(label, (x, np.exp(place) if log else place), xytext=(4, 0), textcoords="offset points",
                      color=color, fontsize=8, va="center", annotation_clip=False)  # fmt: skip


def picture(results, path):
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    draw_edge(axes[0, 0], results["edge"])
    draw_top(axes[0, 1], results)
    draw_densities(axes[0, 2], results)
    draw_ranks(axes[1, 0], results)
    draw_staleness(axes[1, 1], results, "AdamW")
    draw_staleness(axes[1, 2], results, "K-FAC")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        for side in (axis.xaxis, axis.yaxis):
            if side.get_scale() == "log" and side.get_view_interval()[0] > 1e-3:
                side.set_major_formatter("{x:g}")
                side.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    figure.suptitle("Curvature of a small decoder along training: medians and ranges over seeds")
    figure.savefig(path, dpi=150)


def draw_edge(axis, found):
    ends = []
    for (rate, runs), color in zip(found["rates"].items(), ("#0072B2", "#D55E00", "#009E73"), strict=False):
        curves = np.array([r["sharpness"] for r in runs])
        x = np.arange(curves.shape[1]) * found["steps"]
        ends.append((band(axis, x, curves, color), f"rate {rate}", color))
        axis.axhline(2 / float(rate), color=color, ls="--", lw=1)
        axis.annotate(f"2 / {rate}", (0, 2 / float(rate)), xytext=(2, 3), textcoords="offset points", color=color,
                      fontsize=8)  # fmt: skip
    axis.set(title="gradient descent, constant rate", xlabel="steps", ylabel="top eigenvalue of the Hessian (nats)",
             yscale="log")  # fmt: skip
    label_ends(axis, x[-1], ends, 0.1)


def draw_top(axis, results):
    looks, ends = np.maximum(results["sizes"]["looks"], 3), []
    for name, rows in results["run"].items():
        for kind, style in (("hessian", "-"), ("ggn", ":")):
            curves = [[look[kind][0] for look in r["eigenvalues"]] for r in rows]
            label = f"{name}, {'Hessian' if kind == 'hessian' else 'GGN'}"
            ends.append((band(axis, looks, curves, COLORS[name], ls=style, marker="o", ms=3), label, COLORS[name]))
    axis.set(title="top eigenvalues in training", xlabel="steps (0 drawn at 3)", xscale="log", yscale="log",
             ylabel="eigenvalue (nats per token)")  # fmt: skip
    label_ends(axis, looks[-1], ends, 0.2)


def draw_densities(axis, results):
    row = next(r for r in results["run"]["AdamW"] if "densities" in r)
    for (look, found), color in zip(row["densities"]["hessian"].items(), PHASES, strict=True):
        x = 10 ** np.array(found["grid"])
        axis.plot(x, found["positive"], color=color, lw=1.5, label=f"step {look}")
        axis.plot(x, found["negative"], color=color, lw=1, ls=":")
    axis.set(title="density of the Hessian, AdamW (dotted: negative)", xlabel="|eigenvalue| (nats per token)",
             ylabel="share of the eigenvalues per decade", xscale="log")  # fmt: skip
    axis.legend(frameon=False, fontsize=8)


def draw_ranks(axis, results):
    looks, rows = np.maximum(results["sizes"]["looks"], 3), results["run"]["AdamW"]
    names = [n for n in rows[0]["blocks"]["looks"][0] if "norm" not in n and any(
        x in n for x in ("embedding", "q'", "o'", "down"))]  # fmt: skip
    colors = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
    ends = []
    for name, color in zip(names, colors, strict=False):
        curves = np.array([[look[name]["entropy_rank"] for look in r["blocks"]["looks"]] for r in rows])
        ends.append((band(axis, looks, curves, color), short(name), color))
    scores = rows[0]["blocks"]["scores"]
    axis.set(title="effective rank of blocks of the Fisher matrix, AdamW", xlabel="steps (0 drawn at 3)",
             ylabel=f"effective rank, of {scores} scores", xscale="log", yscale="log")  # fmt: skip
    label_ends(axis, looks[-1], ends, 0.2)


def draw_staleness(axis, results, name, damping=0.01):
    setting = results["sizes"]
    ages, ends = np.maximum(setting["ages"], 0.5), []
    for anchor, color in zip(setting["anchors"], PHASES, strict=True):
        shares, *_ = lives(results, name, anchor, damping)
        end = band(axis, ages, 100 * np.array(shares), color)
        ends.append((float(np.clip(end, -50, 110)), f"from step {anchor}", color))
    label_ends(axis, ages[-1], ends, 9)
    axis.axhline(50, color="0.6", lw=1, ls="--")
    axis.axhline(0, color="0.6", lw=0.8)
    axis.set(title=f"old factors along {name}'s run, damping {damping:g}", xscale="log",
             xlabel="age of the factors (steps; 0 drawn at 0.5)", ylim=(-60, 115),
             ylabel="gain over the gradient's that is kept (%)")  # fmt: skip
