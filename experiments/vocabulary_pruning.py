"""Which order prunes a vocabulary best? SmolLM2 on Wikipedia articles and PubMed abstracts, held-out documents.

Documents are split at random; one half gives the scores, the other one the loss with the least important tokens
removed (their logits are minus infinity; the loss is over the targets that stay, beside it the share that does). The
area between the curve of the loss with logits set to zero and the unpruned loss is one number for each order and
split. Intervals are over splits, with the variance corrected for their overlap (Nadeau and Bengio 2003). Then models
are really trimmed, embedding, head and tokenizer, and their bits per byte measured on documents that gave no scores.

    uv run python experiments/vocabulary_pruning.py              # about 20 minutes on 2 cores; writes results/
    uv run python experiments/vocabulary_pruning.py --quick      # does it run? numbers mean little
    uv run python experiments/vocabulary_pruning.py --tokens 400000 --splits 20      # hours, or a GPU
"""

import argparse
import importlib.metadata
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import head_scores
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats

from fisher_jax import models
from fisher_jax.cli.report.orderings import Ordering
from fisher_jax.cli.report.pruning import prune
from fisher_jax.models.trimming import cut_model, kept_tokens, read_vocabulary
from fisher_jax.text import corpora
from fisher_jax.text.bits_per_byte import bits_per_byte, difference, measure

RESULTS = pathlib.Path(__file__).parent / "results"
CORPORA = ("wikipedia", "pubmed")
REFERENCE = "empirical Fisher"
COLORS = {
    "empirical Fisher": "#0072B2", "true Fisher": "#56B4E9", "saliency": "#009E73",
    "output factor of K-FAC": "#CC79A7", "frequency": "#E69F00", "magnitude": "#D55E00", "random": "#666666",
}  # fmt: skip
KEEPS = (16_000, 8_000)
TRIMMED_BY = ("empirical Fisher", "true Fisher", "saliency", "frequency")


def scores_of(scores, inside, head, rng):
    """``{order: score per vocabulary token}`` of the rows ``inside``; ties are broken at random."""
    squares = np.sum(np.square(head, dtype=np.float64), 1)
    empirical = scores.empirical[inside].sum(0, dtype=np.float64)
    return {
        "empirical Fisher": empirical,
        "true Fisher": scores.true[inside].sum(0, dtype=np.float64),
        "saliency": empirical * squares,
        "output factor of K-FAC": scores.output[inside].sum(0, dtype=np.float64),
        "frequency": scores.counts[inside].sum(0) + rng.uniform(0, 0.5, len(head)),
        "magnitude": squares,
        "random": rng.uniform(size=len(head)),
    }


def one_split(model, rows, scores, rng):
    """Curves of every order on the half of the documents that gave no scores."""
    documents = rng.permutation(np.unique(rows.documents))
    scoring = documents[: len(documents) // 2]
    head = model.head(model.params)
    inside = np.isin(rows.documents, scoring)
    found = scores_of(scores, inside, np.asarray(head), rng)
    ranked = [Ordering(name, np.argsort(score, kind="stable")[None]) for name, score in found.items()]
    return prune(*rows.of(documents[len(documents) // 2 :]).flat(), head, ranked)


def interval(values):
    """Mean and half-width of a 95% interval over random half splits, corrected for their overlap."""
    values = np.asarray(values)
    n = len(values)
    error = np.sqrt(values.var(ddof=1) * (1 / n + 1.0))  # as many test documents as scoring ones
    return float(values.mean()), float(scipy.stats.t.ppf(0.975, n - 1) * error)


def trimmed(model, rows, scores, corpus, options, rng):
    """Bits per byte of really smaller models on documents that no row is of."""
    vocabulary, head = read_vocabulary(model.tokenizer), np.asarray(model.head(model.params))
    taken = set(rows.names.tolist())
    texts = [d.text[: options.characters] for d in corpora.documents([corpus]) if d.id not in taken]
    if len(texts) < options.documents:  # every document gives rows: take texts from behind what was read
        texts = [d.text[-options.characters :] for d in corpora.documents([corpus]) if len(d.text) > 8_000]
    chosen = np.unique(np.linspace(0, len(texts) - 1, options.documents).astype(int))
    texts = [texts[i] for i in chosen]
    before = measure(model, texts)
    found = [{"order": "whole model", "keep": model.config.vocab_size, "bits_per_byte": bits_per_byte(before)}]
    every = scores_of(scores, np.ones(len(rows.documents), bool), head, rng)
    losses = {}
    for keep in options.keeps:
        for name in TRIMMED_BY:
            kept = kept_tokens(vocabulary, np.argsort(-every[name], kind="stable"), keep)
            after = losses[name] = measure(cut_model(model, kept), texts)
            change, error = difference(after, before)
            gap, gap_error = difference(after, losses[REFERENCE])
            found.append({
                "order": name, "keep": keep, "bits_per_byte": bits_per_byte(after), "change": change,
                "half_width": 1.96 * error, "above_reference": gap, "above_reference_half_width": 1.96 * gap_error,
                "tokens": float(after.tokens.sum() / before.tokens.sum()),
            })  # fmt: skip
            print(
                f"  {corpus}, {keep:,} tokens by {name}: {found[-1]['bits_per_byte']:.4f} bits per byte", flush=True
            )
    return found


def run(model, corpus, options):
    rows = head_scores.read_rows(model, corpus, options.tokens)
    scores = head_scores.read_scores(model, rows, corpus)
    rng = np.random.default_rng(0)
    results = []
    for split in range(options.splits):
        results.append(one_split(model, rows, scores, rng))
        print(f"  {corpus}: split {split + 1} of {options.splits}", flush=True)
    areas = {c.name: [r.curves[i].area for r in results] for i, c in enumerate(results[0].curves)}
    curves = {
        c.name: {
            "kept": np.mean([r.curves[i].kept for r in results], 0).tolist(),
            "zeroed": np.mean([r.curves[i].zeroed - r.loss for r in results], 0).tolist(),
            "spread": np.std([r.curves[i].zeroed - r.loss for r in results], 0, ddof=1).tolist(),
        }
        for i, c in enumerate(results[0].curves)
    }
    table = []
    for name, values in areas.items():
        mean, width = interval(values)
        gap, gap_width = interval(np.subtract(values, areas[REFERENCE]))
        table.append({"order": name, "area": mean, "half_width": width, "gap": gap, "gap_half_width": gap_width})
    return {
        "tokens": int(rows.scored.sum()), "documents": len(np.unique(rows.documents)), "splits": options.splits,
        "shares": results[0].shares.tolist(), "areas": table, "curves": curves,
        "trimmed": trimmed(model, rows, scores, corpus, options, rng),
    }  # fmt: skip


def verdict(row):
    if row["order"] == REFERENCE:
        return "reference"
    if abs(row["gap"]) <= row["gap_half_width"]:
        return "cannot be told apart"
    return "worse" if row["gap"] > 0 else "better"


def markdown(results):
    lines = []
    for corpus, found in results.items():
        lines += [
            f"\n### {corpus}\n",
            f"{found['tokens']:,} tokens of {found['documents']} documents, {found['splits']} splits.\n",
            "| Order | area, nats (95%) | above empirical Fisher (95%) | verdict |", "|---|---|---|---|",
            *(
                f"| {r['order']} | {r['area']:.3f} ± {r['half_width']:.3f} "
                f"| {r['gap']:+.3f} ± {r['gap_half_width']:.3f} | {verdict(r)} |"
                for r in sorted(found["areas"], key=lambda r: r["area"])
            ),
            "\n| Trimmed to | by | bits per byte | change (95%) | above empirical Fisher (95%) | tokens, relative |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for r in found["trimmed"]:
            if "change" not in r:
                lines.append(f"| {r['keep']:,} | {r['order']} | {r['bits_per_byte']:.4f} | | | 1 |")
                continue
            lines.append(
                f"| {r['keep']:,} | {r['order']} | {r['bits_per_byte']:.4f} "
                f"| {r['change']:+.4f} ± {r['half_width']:.4f} "
                f"| {r['above_reference']:+.4f} ± {r['above_reference_half_width']:.4f} | {r['tokens']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def picture(results, file):
    figure, axes = plt.subplots(1, len(results), figsize=(5.6 * len(results), 4.4), sharey=True, layout="constrained")
    for axis, (corpus, found) in zip(np.atleast_1d(axes), results.items(), strict=True):
        share = 100 * np.array(found["shares"])
        ends = []
        for name, curve in found["curves"].items():
            mean, spread = np.array(curve["zeroed"]), np.array(curve["spread"])
            axis.plot(share, mean, color=COLORS[name], lw=1.8)
            axis.fill_between(share, mean - spread, mean + spread, color=COLORS[name], alpha=0.18, lw=0)
            ends.append((mean[-1], name))
        place = -np.inf
        for height, name in sorted(ends):
            place = max(place + 0.55, height)
            axis.annotate(name, (100, place), color=COLORS[name], va="center", fontsize=9, annotation_clip=False)
        axis.set(title=corpus, xlabel="vocabulary tokens pruned (%)", xlim=(0, 99))
        axis.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(axes)[0].set_ylabel("loss above the whole vocabulary's (nats per token)")
    figure.savefig(file, dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--splits", type=int, default=8)
    parser.add_argument("--documents", type=int, default=24, help="for bits per byte")
    parser.add_argument("--characters", type=int, default=1_000, help="of each")
    parser.add_argument("--keeps", type=int, nargs="+", default=list(KEEPS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.splits, options.documents, options.keeps = 3_000, 2, 3, [16_000]
    model = models.load()
    results = {corpus: run(model, corpus, options) for corpus in CORPORA}
    name = "vocabulary_pruning-quick" if options.quick else "vocabulary_pruning"
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "fisher-jax")}
    content = {"versions": versions, "model": model.name, "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown(results))
    picture(results, RESULTS / f"{name}.png")
    print(markdown(results))


if __name__ == "__main__":
    main()
