"""How close is one backward pass with random signs to the squares of every token?

`signs` against `exact` on the same tokens of SmolLM2-135M (all parameters, Wikipedia text): relative error of the
total of every tensor, and Spearman rank correlation of its rows (output units; vocabulary rows of the tied embedding;
entries of a norm's scale), as a function of the number of sequences and over several seeds. `exact` takes a backward
pass for each token, so the sequences are few and short.

With scores `s_t` of one sequence, the signed estimate of `sum_t |s_t|^2` has the variance
`2 sum_(t != u) (s_t . s_u)^2`: nothing when scores are orthogonal, and a relative standard deviation near `sqrt(2)`
when all are parallel. Over `n` sequences that are observed apart, of about equal size, the relative error is at most
about `sqrt(2 / n)`. Sequences that share one backward pass (unit="batch") have cross terms between each other too.

    uv run python experiments/signs_against_exact.py          # some minutes on 2 cores; writes results/
    uv run python experiments/signs_against_exact.py --sequences 4 --seeds 2 --out /tmp/look
"""

import argparse
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import fisher_jax as fj
from fisher_jax import models
from fisher_jax.text import corpora, packing

RESULTS = pathlib.Path(__file__).parent / "results"
KINDS = ("embedding", "q", "k", "v", "o", "gate", "up", "down", "norms")
COLOURS = ("#000000", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#F0E442", "#D55E00", "#999999")


def kind_of(path):
    """The kind of tensor that a path names."""
    return "embedding" if path == "embedding" else "norms" if "norm" in path else path.split("/")[-2]


def sequences(model, number, length):
    """Token ids ``[number, length + 1]``: the first row of as many articles."""
    rows = packing.pack(
        corpora.documents(["wikipedia"]), model.tokenizer.encode, seq_len=length + 1, max_targets=number * length,
        held_out_targets=length, vocab_size=model.config.vocab_size,
    ).stream  # fmt: skip
    tokens = rows.tokens[rows.lengths == length + 1][:number]
    if len(tokens) < number:
        raise SystemExit(f"the corpus gives {len(tokens)} such sequences; ask for fewer with --sequences")
    return tokens


def by_leaf(tree):
    """Rows of every tensor by path, an array for each layer (one for the others)."""
    found = {}
    for path, rows in jax.tree_util.tree_leaves_with_path(tree):
        name, rows = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(rows, np.float64)
        found[name] = rows if name.startswith("layers/") else rows[None]
    return found


def observer(model, length, estimator, **options):
    """A compiled ``(params, tokens [B, length + 1], key) -> rows``: the mean over the tokens of the batch."""
    example = jax.ShapeDtypeStruct((1, length), jnp.int32)
    fisher = fj.group_fisher(
        model.apply, example=fj.Batch(example, example), groups=fj.groups.row, estimator=estimator, **options
    )
    return jax.jit(
        lambda params, tokens, key: fj.welford.mean(fisher.observe(params, fj.next_token_batch(tokens), key))
    )


def accumulated(observe, params, tokens, per_batch, counts, key):
    """``{n: rows by path}`` of the first n sequences, the mean over batches of ``per_batch``."""
    total, found = None, {}
    for index in range(len(tokens) // per_batch):
        batch = tokens[index * per_batch : (index + 1) * per_batch]
        new = by_leaf(observe(params, batch, jax.random.fold_in(key, index)))
        total = new if total is None else {path: total[path] + rows for path, rows in new.items()}
        done = (index + 1) * per_batch
        if done in counts:
            found[done] = {path: rows / (index + 1) for path, rows in total.items()}
    return found


def compared(signs, exact):
    """``{kind: (squared relative errors of totals, rank correlations)}`` over the tensors of a kind."""
    found = {kind: ([], []) for kind in KINDS}
    for path, rows in exact.items():
        errors, correlations = found[kind_of(path)]
        for estimated, true in zip(signs[path], rows, strict=True):
            errors.append((estimated.sum() / true.sum() - 1) ** 2)
            correlations.append(scipy.stats.spearmanr(estimated, true).statistic)
    return found


def measure(model, tokens, seeds, batch_size):
    """``[{way, sequences, kind, error, correlation}]``, root mean squares and means over tensors and seeds."""
    length = tokens.shape[1] - 1
    counts = [2**i for i in range(len(tokens).bit_length()) if 2**i <= len(tokens)]
    began = time.time()
    exact = observer(model, length, "exact", unit="batch", chunk_size=2)
    truth = accumulated(exact, model.params, tokens, 1, counts, jax.random.key(0))
    print(f"exact: {len(tokens) * length} backward passes in {time.time() - began:.0f} s", flush=True)
    results = []
    ways = {"apart": (1, "sequence"), f"batches of {batch_size}": (batch_size, "batch")}
    for way, (per_batch, unit) in ways.items():
        observe = observer(model, length, "signs", unit=unit)
        gathered = {}
        for seed in range(seeds):
            began = time.time()
            found = accumulated(observe, model.params, tokens, per_batch, counts, jax.random.key(seed))
            for n, signs in found.items():
                for kind, parts in compared(signs, truth[n]).items():
                    for kept, new in zip(gathered.setdefault((n, kind), ([], [])), parts, strict=True):
                        kept.extend(new)
            print(f"signs, {way}, seed {seed}: {time.time() - began:.0f} s", flush=True)
        results += [
            {"way": way, "sequences": n, "kind": kind, "error": float(np.sqrt(np.mean(errors))),
             "correlation": float(np.mean(correlations))}
            for (n, kind), (errors, correlations) in gathered.items()
        ]  # fmt: skip
    return results


def table(results):
    """Markdown: relative error of totals and rank correlation of rows by kind of tensor and number of sequences."""
    lines = []
    for way in dict.fromkeys(r["way"] for r in results):
        cells = {(r["kind"], r["sequences"]): r for r in results if r["way"] == way}
        counts = sorted({n for _, n in cells})
        per_draw = 1 if way == "apart" else int(way.split()[-1])
        bound = [f"{np.sqrt(2 * per_draw / n):.1%}" for n in counts]
        lines += [f"\n### {'Sequences apart' if way == 'apart' else f'One draw for {way}'}\n"]
        for name, key, shown in (("error of totals", "error", ".1%"), ("rank correlation", "correlation", ".3f")):
            lines += [_row(name, [f"n = {n}" for n in counts]), "|---|" + "---:|" * len(counts)]
            lines += [_row(kind, [format(cells[kind, n][key], shown) for n in counts]) for kind in KINDS]
            lines += [_row("sqrt(2 / number of draws)", bound), ""] if key == "error" else []
    return "\n".join(lines)


def conclusion(results):
    """The relative errors of the largest number of sequences as parts of the bound, in a sentence for each way."""
    lines = []
    for way in dict.fromkeys(r["way"] for r in results):
        most = max(r["sequences"] for r in results if r["way"] == way)
        draws = most if way == "apart" else most // int(way.split()[-1])
        errors = [r["error"] for r in results if (r["way"], r["sequences"]) == (way, most)]
        bound = np.sqrt(2 / draws)
        lines.append(
            f"- {way}, {most} sequences, {draws} draws: relative errors of totals from {min(errors):.1%} to "
            f"{max(errors):.1%}, which is {min(errors) / bound:.2f} to {max(errors) / bound:.2f} of the "
            f"sqrt(2 / {draws}) = {bound:.1%} that parallel scores would give."
        )
    return "\n".join(lines)


def _row(name, cells):
    return f"| {name} | {' | '.join(cells)} |"


def picture(results, path):
    """Error and rank correlation against the number of sequences, a line for each kind of tensor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    apart = [r for r in results if r["way"] == "apart"]
    counts = sorted({r["sequences"] for r in apart})
    for kind, colour, marker in zip(KINDS, COLOURS, "os^vDPX*h", strict=True):
        rows = sorted((r for r in apart if r["kind"] == kind), key=lambda r: r["sequences"])
        for axes, name, scale in ((left, "error", 100), (right, "correlation", 1)):
            axes.plot(counts, [scale * r[name] for r in rows], marker=marker, color=colour, lw=1.6, ms=5, label=kind)
    left.plot(counts, [100 * np.sqrt(2 / n) for n in counts], "--", color="0.4", lw=1.5)
    left.annotate(
        "sqrt(2 / n)", (counts[1], 100 * np.sqrt(2 / counts[1])), (8, 4), textcoords="offset points", color="0.3"
    )
    left.set(yscale="log", ylabel="relative error, root mean square", title="Totals of tensors")
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if left.get_ylim()[0] <= t <= left.get_ylim()[1]]
    left.set_yticks(ticks, [f"{t}%" for t in ticks])
    left.set_yticks([], minor=True)
    right.set(ylabel="Spearman rank correlation", title="Rows within a tensor", ylim=(None, 1))
    for axes in (left, right):
        axes.set(xscale="log", xlabel="sequences, each observed apart")
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.set_xticks([], minor=True)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*right.get_legend_handles_labels(), loc="outside center right", frameon=False)
    figure.suptitle("signs, one backward pass, against exact, one for each token: SmolLM2-135M, all parameters")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=16, help="scored tokens of a sequence")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of one draw in the second way")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--redraw", action="store_true", help="table and picture of the figures that are there")
    args = parser.parse_args()
    figures = args.out / "signs_against_exact.json"
    if not args.redraw:
        model = models.load()
        results = measure(model, sequences(model, args.sequences, args.length), args.seeds, args.batch_size)
        what = (
            f"{model.name}, all parameters, {args.sequences} sequences of {args.length} scored tokens, each the "
            f"beginning of a Wikipedia article; {args.seeds} seeds. Errors are root mean squares over the tensors of "
            "a kind (one for each layer) and seeds, correlations their means."
        )
        args.out.mkdir(exist_ok=True, parents=True)
        figures.write_text(json.dumps({"what": what, "jax": jax.__version__, "results": results}, indent=1) + "\n")
    found = json.loads(figures.read_text())
    text = (
        f"# `signs` against `exact`\n\n{found['what']}\n\n{conclusion(found['results'])}\n{table(found['results'])}\n"
    )
    print(text)
    (args.out / "signs_against_exact.md").write_text(text)
    picture(found["results"], args.out / "signs_against_exact.png")


if __name__ == "__main__":
    main()
