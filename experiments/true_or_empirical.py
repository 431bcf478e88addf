"""When do the empirical and the true Fisher of a head agree, and what does sampling labels cost?

SmolLM2's head on Wikipedia and PubMed. For tokens in bins of the entropy of their prediction: the trace of the
empirical over that of the true Fisher (equal in expectation where predictions are calibrated). For vocabulary rows in
bands of frequency: their rank correlation and the typical ratio. And the error of the sampled Fisher with 1 to 100
labels per token against the exact one, row by row: one over the square root of the labels is the price.

    uv run python experiments/true_or_empirical.py            # minutes on 2 cores; writes results/
"""

import argparse
import importlib.metadata
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import head_scores
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from fisher_jax import models

RESULTS = pathlib.Path(__file__).parent / "results"
CORPORA = ("wikipedia", "pubmed")
BANDS = ((0, 0), (1, 4), (5, 29), (30, 299), (300, 10**9))
LABELS = (1, 3, 10, 30, 100)
COLORS = {"wikipedia": "#0072B2", "pubmed": "#D55E00"}


@jax.jit
def token_traces(head, hidden, targets):
    """Entropy of the prediction in nats, and the traces of both Fishers of the head, for every token."""
    logits = hidden @ head.T
    log_p = jax.nn.log_softmax(logits, -1)
    p = jnp.exp(log_p)
    square, norm = jnp.sum(p * p, -1), jnp.sum(hidden * hidden, -1)
    chosen = jnp.take_along_axis(p, targets[:, None], -1)[:, 0]
    return -jnp.sum(p * log_p, -1), norm * (square - 2 * chosen + 1), norm * (1 - square)


def by_chunk(function, arrays, size=256):
    parts = [
        jax.tree.map(np.asarray, function(*(a[i : i + size] for a in arrays))) for i in range(0, len(arrays[0]), size)
    ]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]


def by_entropy(entropy, empirical, true, documents, bins=10):
    """Ratio of the mean traces in bins of equal size, with a 95% interval over documents (delta method)."""
    edges = np.quantile(entropy, np.linspace(0, 1, bins + 1))
    index = np.clip(np.searchsorted(edges, entropy, side="right") - 1, 0, bins - 1)
    found = []
    for b in range(bins):
        inside = index == b
        _, where = np.unique(documents[inside], return_inverse=True)
        top, bottom = (np.bincount(where, x[inside]) for x in (empirical, true))
        ratio, n = top.sum() / bottom.sum(), len(top)
        error = np.sqrt(n / (n - 1) * np.sum((top - ratio * bottom) ** 2)) / bottom.sum()
        found.append({
            "entropy": float(entropy[inside].mean()), "ratio": float(ratio), "half_width": float(1.96 * error),
            "share_of_true_trace": float(true[inside].sum() / true.sum()),
        })  # fmt: skip
    return found


def by_frequency(scores):
    empirical, true, counts = (x.sum(0, dtype=np.float64) for x in (scores.empirical, scores.true, scores.counts))
    found = []
    for low, high in (*BANDS, (0, 10**9)):
        rows = (counts >= low) & (counts <= high)
        ratio = np.log10(empirical[rows] / true[rows])
        found.append({
            "labels": [low, high], "rows": int(rows.sum()),
            "rank_correlation": float(scipy.stats.spearmanr(empirical[rows], true[rows]).statistic),
            "median_ratio": float(10 ** np.median(ratio)),
            "ratio_10_90": [float(10**x) for x in np.quantile(ratio, [0.1, 0.9])],
            "ratio_of_sums": float(empirical[rows].sum() / true[rows].sum()),
        })  # fmt: skip
    return found


def sampled(head, hidden, exact_rows, counts, seed, most):
    """Relative error of the sampled row sums for each number of labels: root mean square over the rows of a band.

    The mean over drawn labels y of sum_t |h|**2 (p - y)**2 is linear in the labels' counts.
    """

    @jax.jit
    def step(key, h):
        logits = h @ head.T
        p, norm = jax.nn.softmax(logits, -1), jnp.sum(h * h, -1)
        # By inversion: noise for every label of every token would take gigabytes.
        cumulative = jnp.cumsum(p, -1)
        uniform = jax.random.uniform(key, (len(h), most)) * cumulative[:, -1:]
        labels = jax.vmap(jnp.searchsorted)(cumulative, uniform).T
        chosen = jnp.take_along_axis(p, labels.T, -1).T  # [most, T]
        weights = norm * (1 - 2 * chosen)
        fixed = jnp.einsum("t,tv->v", norm, p * p)
        drawn = [
            jnp.zeros(head.shape[0]).at[labels[:n].ravel()].add(weights[:n].ravel() / n) for n in LABELS if n <= most
        ]
        return fixed + jnp.stack(drawn)

    total, key = 0.0, jax.random.key(seed)
    for i, first in enumerate(range(0, len(hidden) // 256 * 256, 256)):
        total = total + np.asarray(step(jax.random.fold_in(key, i), hidden[first : first + 256]), np.float64)
    found = []
    for low, high in BANDS:
        rows = (counts >= low) & (counts <= high)
        error = np.sqrt(np.mean((total[:, rows] / exact_rows[rows] - 1) ** 2, 1))
        found.append({"labels": [low, high], "relative_error": error.tolist()})
    return found


def run(model, corpus, options):
    rows = head_scores.read_rows(model, corpus, options.tokens)
    scores = head_scores.read_scores(model, rows, corpus)
    head = model.head(model.params)
    hidden, targets, documents = rows.flat()
    entropy, empirical, true = by_chunk(lambda h, y: token_traces(head, h, y), (hidden, targets))
    some = rows.of(np.unique(rows.documents)[: options.sampled_documents])
    part = some.flat()[0]
    hidden_part = part[: len(part) // 256 * 256]
    exact = by_rows(head, hidden_part)
    return {
        "tokens": len(targets), "by_entropy": by_entropy(entropy, empirical, true, documents),
        "by_frequency": by_frequency(scores), "sampled_tokens": len(hidden_part),
        "sampled": sampled(head, hidden_part, exact, scores.counts.sum(0), 0, max(LABELS)),
    }  # fmt: skip


def by_rows(head, hidden):
    """Exact sums of |h|**2 p (1 - p) for every row."""

    @jax.jit
    def step(h):
        p = jax.nn.softmax(h @ head.T, -1)
        return jnp.einsum("t,tv->v", jnp.sum(h * h, -1), p * (1 - p))

    return sum(np.asarray(step(hidden[i : i + 256]), np.float64) for i in range(0, len(hidden), 256))


def band(low, high):
    return (
        "all rows"
        if (low, high) == (0, 10**9)
        else "never seen"
        if high == 0
        else f"{low:,}+"
        if high >= 10**9
        else f"{low}-{high}"
    )


def markdown(results):
    lines = []
    for corpus, found in results.items():
        lines += [
            f"\n### {corpus}, {found['tokens']:,} tokens\n",
            "| Entropy of the prediction, nats | empirical / true trace (95%) | share of the true trace |",
            "|---|---|---|",
        ]
        lines += [
            f"| {r['entropy']:.2f} | {r['ratio']:.2f} ± {r['half_width']:.2f} | {r['share_of_true_trace']:.0%} |"
            for r in found["by_entropy"]
        ]
        lines += [
            "\n| Rows seen as a label | rows | rank correlation | median ratio (10% to 90%) | ratio of sums |",
            "|---|---|---|---|---|",
        ]
        for r in found["by_frequency"]:
            low, high = r["ratio_10_90"]
            lines.append(
                f"| {band(*r['labels'])} | {r['rows']:,} | {r['rank_correlation']:.3f} | {r['median_ratio']:.2g} "
                f"({low:.2g} to {high:.2g}) | {r['ratio_of_sums']:.2f} |"
            )
        lines += [
            f"\n| Sampled against exact, {found['sampled_tokens']:,} tokens | "
            + " | ".join(f"{n} label{'s' if n > 1 else ''}" for n in LABELS)
            + " |",
            "|---" * (1 + len(LABELS)) + "|",
        ]
        for r in found["sampled"]:
            lines.append(f"| {band(*r['labels'])} | " + " | ".join(f"{x:.1%}" for x in r["relative_error"]) + " |")
    return "\n".join(lines) + "\n"


def picture(results, file):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    for corpus, found in results.items():
        x, y, w = (np.array([r[k] for r in found["by_entropy"]]) for k in ("entropy", "ratio", "half_width"))
        left.plot(x, y, color=COLORS[corpus], marker="o", ms=4)
        left.fill_between(x, y - w, y + w, color=COLORS[corpus], alpha=0.2, lw=0)
        side, up = ("right", -12) if corpus == CORPORA[0] else ("left", 6)
        place = dict(xytext=(-4 if side == "right" else 6, up), textcoords="offset points", ha=side)
        left.annotate(corpus, (x[1], y[1]), color=COLORS[corpus], **place)
    left.axhline(1, color="#888888", lw=0.8)
    left.set(
        xlabel="entropy of the prediction (nats), deciles of tokens",
        ylabel="trace of empirical over true Fisher",
        yscale="log",
    )
    for row, color in zip(
        results["wikipedia"]["sampled"], plt.cm.viridis(np.linspace(0, 0.85, len(BANDS))), strict=True
    ):
        error = 100 * np.array(row["relative_error"])
        right.plot(LABELS, error, color=color, marker="o", ms=4)
        right.annotate(
            band(*row["labels"]),
            (LABELS[-1], error[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            color=color,
            va="center",
        )
    right.set(
        xscale="log",
        yscale="log",
        xlabel="labels drawn for each token",
        ylabel="relative error of a row (%)",
        title="Wikipedia, by number of labels in the text",
    )
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.18)
    figure.savefig(file, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--sampled-documents", type=int, default=40)
    options = parser.parse_args()
    model = models.load()
    results = {corpus: run(model, corpus, options) for corpus in CORPORA}
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "fisher-jax")}
    (RESULTS / "true_or_empirical.json").write_text(
        json.dumps({"versions": versions, "results": results}, indent=1) + "\n"
    )
    (RESULTS / "true_or_empirical.md").write_text(markdown(results))
    picture(results, RESULTS / "true_or_empirical.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
