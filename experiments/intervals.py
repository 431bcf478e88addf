"""Are the intervals right? Coverage between random halves of real text, by unit of observation and token frequency.

Documents of a corpus are split at random into two sets. The two means estimate the same thing, so a nominal 95%
interval of their difference should contain zero for 95% of the vocabulary rows. Repeated over splits, for the units
token, sequence and document, the empirical and the exact true Fisher, and bands of label frequency.

    uv run python experiments/intervals.py            # about fifteen minutes on 2 cores; writes results/
    uv run python experiments/intervals.py --tokens 8000 --splits 4     # a look
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import fisher_jax as fj
from fisher_jax import models
from fisher_jax.text import corpora, packing

RESULTS = pathlib.Path(__file__).parent / "results"
CORPORA = ("wikipedia", "news", "pubmed")
KINDS = ("empirical", "true")
UNITS = ("token", "sequence", "document")
BANDS = [(0, 0), (1, 4), (5, 29), (30, 99), (100, 999), (1000, 10**9)]
SEQ_LEN = 257


def sequence_moments(model, corpus, tokens):
    """Token moments of every sequence: weights ``[R]``, means and m2 ``{kind: [R, V]}``, documents, label counts."""
    packed = packing.pack(
        corpora.documents([corpus]), model.tokenizer.encode, seq_len=SEQ_LEN, max_targets=tokens,
        held_out_targets=SEQ_LEN, vocab_size=model.config.vocab_size,
    )  # fmt: skip
    rows = packed.stream

    @jax.jit
    def step(params, tokens, mask, units):
        batch = fj.next_token_batch(tokens, mask, units=units)
        hidden, head = model.hidden(params, batch.inputs), model.head(params)

        def one(row):
            h, y, w = row
            found = fj.lm_head.moments(h, head, y, w > 0, kind=KINDS)
            return {k: (fj.welford.mean(m), fj.welford.variance(m)) for k, m in zip(KINDS, found, strict=True)}

        found = jax.lax.map(one, (hidden, batch.targets, batch.weights))
        return found, batch.weights.sum(1), batch.targets, batch.weights

    parts, weights, documents = {k: ([], []) for k in KINDS}, [], []
    counts = np.zeros(model.config.vocab_size, int)
    for index, (ids, mask, units) in enumerate(rows.batches(4)):
        found, total, targets, active = jax.tree.map(np.asarray, step(model.params, ids, mask, units))
        keep = total > 1
        for kind in KINDS:
            mean, variance = found[kind]
            parts[kind][0].append(mean[keep])
            parts[kind][1].append(variance[keep] * (total[keep, None] - 1))
        weights.append(total[keep])
        documents.append(units[keep])
        counts += np.bincount(targets[active > 0], minlength=len(counts))
        if index % 10 == 0:
            print(f"  {corpus}: batch {index} of {rows.num_batches(4)}", flush=True)
    return (
        np.concatenate(weights),
        {k: (np.concatenate(a), np.concatenate(b)) for k, (a, b) in parts.items()},
        np.concatenate(documents),
        counts,
        packed.choice,
    )


def by_document(weights, means, documents):
    """Weights ``[D]`` and means ``[D, V]`` of whole documents."""
    names, index = np.unique(documents, return_inverse=True)
    total = np.bincount(index, weights)
    sums = np.zeros((len(names), means.shape[1]))
    np.add.at(sums, index, means * weights[:, None])
    return total, sums / total[:, None]


@jax.jit
def _read(values, weights):
    moments = fj.welford.observe(values, weights, unit="sequence")
    return fj.welford.mean(moments), fj.welford.standard_error(moments)


def estimate(unit, weights, means, m2, documents, inside):
    """Mean, standard error and number of observations of the documents ``inside``."""
    rows = np.isin(documents, inside)
    weights, means, m2, documents = weights[rows], means[rows], m2[rows], documents[rows]
    if unit == "token":
        total = weights.sum()
        mean = weights @ means / total
        square = m2.sum(0) + weights @ (means - mean) ** 2
        return mean, np.sqrt(square / (total - 1) / total), total
    if unit == "document":
        weights, means = by_document(weights, means, documents)
    # In units of the overall mean: float32 then holds the squares of rows whose probability is tiny.
    scale = np.maximum(means.mean(0), 1e-300)
    mean, error = _read(jnp.asarray(means / scale, jnp.float32), jnp.asarray(weights, jnp.float32))
    return np.asarray(mean, np.float64) * scale, np.asarray(error, np.float64) * scale, len(weights)


def covers(a, b, level=0.95):
    """Whether the Welch interval of the difference contains zero, per row; NaN where neither half varies."""
    (mean_a, error_a, n_a), (mean_b, error_b, n_b) = a, b
    error = np.hypot(error_a, error_b)
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = error**4 / (error_a**4 / (n_a - 1) + error_b**4 / (n_b - 1))
        inside = np.abs(mean_a - mean_b) <= scipy.stats.t.ppf(0.5 + level / 2, freedom) * error
    return np.where(error > 0, inside, np.nan)


def coverage(weights, parts, documents, counts, splits):
    """``[{kind, unit, band, rows, coverage, low, high}]``: mean over splits, and its range."""
    rng, names = np.random.default_rng(0), np.unique(documents)
    found = []
    halves = [np.array_split(rng.permutation(names), 2) for _ in range(splits)]
    for kind in KINDS:
        means, m2 = (x.astype(np.float64) for x in parts[kind])
        for unit in UNITS:
            inside = np.stack([
                covers(*(estimate(unit, weights, means, m2, documents, half) for half in pair)) for pair in halves
            ])  # fmt: skip
            for low, high in [*BANDS, (30, 10**9)]:
                rows = (counts >= low) & (counts <= high)
                if rows.any():
                    per_split = np.nanmean(inside[:, rows], axis=1)
                    found.append({
                        "kind": kind, "unit": unit, "labels": [low, high], "rows": int(rows.sum()),
                        "coverage": float(per_split.mean()), "lowest": float(per_split.min()),
                        "highest": float(per_split.max()),
                    })  # fmt: skip
    return found


def band_name(low, high):
    return "never" if high == 0 else f">= {low}" if high >= 10**9 else f"{low}-{high}"


def table(results):
    lines = []
    for corpus, result in results.items():
        lines += [f"\n### {corpus}\n", f"{result['choice']}; {result['splits']} splits.\n"]
        lines += [
            "| Fisher | seen as a label | rows | document | sequence | token |",
            "|---|---|---:|---:|---:|---:|",
        ]
        cells = {(r["kind"], tuple(r["labels"]), r["unit"]): r for r in result["coverage"]}
        for kind in KINDS:
            for band in [*BANDS, (30, 10**9)]:
                if (kind, band, "document") in cells:
                    shown = [f"{cells[kind, band, u]['coverage']:.1%}" for u in ("document", "sequence", "token")]
                    rows = cells[kind, band, "document"]["rows"]
                    lines.append(f"| {kind} | {band_name(*band)} | {rows} | {' | '.join(shown)} |")
    return "\n".join(lines)


def picture(results, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 4), layout="constrained")
    colours = {"document": "#0072B2", "sequence": "#E69F00", "token": "#D55E00"}
    axes = np.atleast_1d(figure.subplots(1, len(results), sharey=True))
    for axis, (corpus, result) in zip(axes, results.items(), strict=True):
        for unit in UNITS:
            for kind, style in (("empirical", "-o"), ("true", "--s")):
                rows = [r for r in result["coverage"] if (r["unit"], r["kind"]) == (unit, kind)]
                rows = [r for r in rows if tuple(r["labels"]) in BANDS]
                y = [100 * r["coverage"] for r in rows]
                x = [BANDS.index(tuple(r["labels"])) for r in rows]
                axis.plot(x, y, style, color=colours[unit], mfc="white" if kind == "true" else None, lw=1.5, ms=5)
                if kind == "empirical" and axis is axes[0]:
                    axis.annotate(unit, (x[-1], y[-1]), (6, 0), textcoords="offset points", color=colours[unit])
        axis.axhspan(90, 97, color="0.9", zorder=0)
        axis.axhline(95, color="0.5", lw=1)
        axis.set(title=corpus, xlabel="times seen as a label", xticks=range(len(BANDS)))
        axis.set_xlim(-0.3, len(BANDS) + 0.4)
        axis.set_xticklabels([band_name(*b) for b in BANDS], rotation=30)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("rows whose 95% interval holds (%)")
    figure.suptitle("Coverage between random halves, by unit (solid: empirical, dashed: exact true Fisher)")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=80_000, help="tokens of each corpus")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--corpora", nargs="+", default=CORPORA)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    model = models.load()
    results = {}
    for corpus in args.corpora:
        weights, parts, documents, counts, choice = sequence_moments(model, corpus, args.tokens)
        results[corpus] = {
            "choice": choice, "splits": args.splits, "jax": jax.__version__,
            "coverage": coverage(weights, parts, documents, counts, args.splits),
        }  # fmt: skip
        print(table({corpus: results[corpus]}), flush=True)
    args.out.mkdir(exist_ok=True)
    (args.out / "intervals.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "intervals.md").write_text(f"# Coverage of nominal 95% intervals\n{table(results)}\n")
    picture(results, args.out / "intervals.png")


if __name__ == "__main__":
    main()
