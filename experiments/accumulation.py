"""How to accumulate scores over a long corpus: Welford, moving averages, or a plain float32 sum?

Heavy-tailed scores of known mean (log-normal, as Fisher scores of vocabulary rows are) in a stream of batches.

Precision: after 1e8 tokens the relative error of the mean against exact float64 sums of the very same numbers.
Stationary: standard deviation of the estimate against that of the plain mean, and bias at the start.
Shifting: the mean of every group triples in the middle; updates until an estimate has come half and 90% of the way,
and its error at the end.

    uv run python experiments/accumulation.py            # about two minutes on 2 cores; writes results/
"""

import functools
import importlib.metadata
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import fisher_jax as fj

RESULTS = pathlib.Path(__file__).parent / "results"
GROUPS, BATCH = 32, 64  # groups, tokens of a batch in the streams
DECAYS = (0.9, 0.99, 0.999)
SIGMA = 2.0  # of the logarithm: the largest of 10,000 tokens then holds several percent of the sum
COLORS = {
    "Welford": "#0072B2", "plain float32 sum": "#666666", "EMA 0.9": "#E69F00", "EMA 0.99": "#D55E00",
    "EMA 0.999": "#CC79A7", "EMA 0.9, uncorrected": "#009E73",
}  # fmt: skip


def scores(key, number, scale=1.0):
    """``[number, GROUPS]`` log-normal scores of mean ``scale``."""
    return scale * jnp.exp(SIGMA * jax.random.normal(key, (number, GROUPS)) - SIGMA**2 / 2)


# The moments of a batch are made by the library; one program serves every batch.
moments_of = functools.partial(fj.welford.observe, unit="token")


def precision(num_batches=25_000, per_batch=4_000):
    """Relative errors after ``num_batches * per_batch`` tokens; batches repeat, so that float64 sums are exact."""
    some = [scores(jax.random.key(i), per_batch) for i in range(16)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(moments_of(x) for x in some))
    exact_sums = np.stack([np.asarray(x, np.float64).sum(0) for x in some])

    @jax.jit
    def run(stacked):
        def step(carry, i):
            state, total, mean = carry
            moments = jax.tree.map(lambda x: x[i % 16], stacked)
            value = fj.welford.mean(moments)
            mean = mean + (value - mean) / (i + 1).astype(jnp.float32)
            return (fj.welford.add(state, moments), total + value * per_batch, mean), None

        first = jax.tree.map(lambda x: x[0], stacked)
        start = fj.welford.init(first), jnp.zeros(GROUPS), jnp.zeros(GROUPS)
        return jax.lax.scan(step, start, jnp.arange(num_batches))[0]

    state, total, mean = run(stacked)
    tokens = num_batches * per_batch
    times = np.array([len(range(i, num_batches, 16)) for i in range(16)])
    exact = times @ exact_sums / tokens
    found = {
        "Welford": fj.welford.mean(state), "plain float32 sum": np.asarray(total, np.float64) / tokens,
        "running mean in float32": mean,
    }  # fmt: skip
    return tokens, {k: float(np.max(np.abs(np.asarray(v, np.float64) / exact - 1))) for k, v in found.items()}


@functools.partial(jax.jit, static_argnames=("num_batches", "factor"))
def stream(key, num_batches, factor):
    """Estimates ``{name: [num_batches, GROUPS]}``; scores are ``factor`` times larger from the middle on."""
    like = jax.eval_shape(lambda: moments_of(scores(key, BATCH)))
    start = (
        fj.welford.init(like), jnp.zeros(GROUPS), jnp.zeros(GROUPS),
        tuple(fj.moving_average.init(like, decay=d) for d in DECAYS),
    )  # fmt: skip

    def step(carry, i):
        state, total, raw, averages = carry
        scale = jnp.where(i >= num_batches // 2, factor, 1.0)
        moments = moments_of(scores(jax.random.fold_in(key, i), BATCH, scale))
        value = fj.welford.mean(moments)
        state, total = fj.welford.add(state, moments), total + value
        raw = DECAYS[0] * raw + (1 - DECAYS[0]) * value
        averages = tuple(fj.moving_average.add(a, moments) for a in averages)
        out = {"Welford": fj.welford.mean(state), "plain float32 sum": total / (i + 1)}
        out |= {f"EMA {d:g}": fj.moving_average.mean(a) for d, a in zip(DECAYS, averages, strict=True)}
        out[f"EMA {DECAYS[0]:g}, uncorrected"] = raw
        return (state, total, raw, averages), out

    return jax.lax.scan(step, start, jnp.arange(num_batches))[1]


def repeated(num_batches, factor, repeats):
    keys = jax.random.split(jax.random.key(0), repeats)
    found = [jax.tree.map(np.asarray, stream(key, num_batches, factor)) for key in keys]
    return {name: np.concatenate([f[name] for f in found], 1).astype(np.float64) for name in found[0]}


def with_interval(values):
    """Mean and half-width over groups and repeats, which are independent."""
    return [float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))]


def stationary(found, num_batches):
    plain = found["Welford"][-1].std(ddof=1)
    return {
        name: {
            "bias_first_update": with_interval(path[0] - 1), "bias_last_update": with_interval(path[-1] - 1),
            "deviation_over_welford": float(path[-1].std(ddof=1) / plain),
            "theory": theory(name, num_batches),
        }
        for name, path in found.items()
    }  # fmt: skip


def theory(name, num_batches):
    """``sqrt((1 - d) / (1 + d))`` over ``1 / sqrt(batches)`` for an average of decay ``d`` that has settled."""
    if not name.startswith("EMA"):
        return 1.0
    decay = float(name.split()[1].rstrip(","))
    return float(np.sqrt((1 - decay) / (1 + decay) * num_batches))


def shifting(found, num_batches, factor):
    middle = num_batches // 2
    rows = {}
    for name, path in found.items():
        mean = path.mean(1)
        way = (mean[middle:] - 1) / (factor - 1)
        reached = [int(np.argmax(way >= part)) + 1 if (way >= part).any() else None for part in (0.5, 0.9)]
        rows[name] = {
            "updates_to_half": reached[0], "updates_to_90": reached[1],
            "relative_error_at_end": with_interval(path[-1] / factor - 1),
            "root_mean_square_error_at_end": float(np.sqrt(np.mean((path[-1] / factor - 1) ** 2))),
        }  # fmt: skip
    return rows


def markdown(content):
    lines = ["| Mean after 1e8 tokens | largest relative error |", "|---|---|"]
    lines += [f"| {name} | {error:.1e} |" for name, error in content["precision"].items()]
    lines += [
        "\n| Stationary stream | bias at the first update | at the last | deviation over Welford's | theory |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["stationary"].items():
        first, last = (f"{m:+.1%} ± {w:.1%}" for m, w in (row["bias_first_update"], row["bias_last_update"]))
        lines.append(f"| {name} | {first} | {last} | {row['deviation_over_welford']:.2f} | {row['theory']:.2f} |")
    lines += [
        "\n| After the mean tripled | updates to half the way | to 90% | error at the end | root mean square |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["shifting"].items():
        error = "{:+.1%} ± {:.1%}".format(*row["relative_error_at_end"])
        half, most = (row[k] if row[k] is not None else "never" for k in ("updates_to_half", "updates_to_90"))
        lines.append(f"| {name} | {half} | {most} | {error} | {row['root_mean_square_error_at_end']:.1%} |")
    return "\n".join(lines) + "\n"


def picture(found, num_batches, file):
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for name, path in found.items():
        if name == "plain float32 sum" or "uncorrected" in name:
            continue  # the same as Welford's, and as the corrected one, at this scale
        mean, low, high = path.mean(1), *np.quantile(path, [0.25, 0.75], axis=1)
        axis.plot(mean, color=COLORS[name], lw=1.5)
        axis.fill_between(np.arange(num_batches), low, high, color=COLORS[name], alpha=0.15, lw=0)
    ends = sorted((found[n][-1].mean(), n) for n in found if n in COLORS and "float32" not in n and "uncorr" not in n)
    place = -np.inf
    for height, name in ends:
        place = max(place + 0.17, height)
        axis.annotate(name, (num_batches, place), color=COLORS[name], va="center", annotation_clip=False)
    axis.step([0, num_batches // 2, num_batches], [1, 3, 3], where="post", color="black", lw=0.8, ls=":")
    axis.set(xlabel="updates", ylabel="estimated mean score")
    axis.set_title("dotted: true mean; bands: middle half of the groups", fontsize=10)
    axis.set(ylim=(0, 4.5), xlim=(0, num_batches))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150, bbox_inches="tight")


def main():
    num_batches, repeats, factor = 4_000, 8, 3.0
    tokens, errors = precision()
    flat = repeated(num_batches, 1.0, repeats)
    moved = repeated(num_batches, factor, repeats)
    content = {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "fisher-jax")},
        "tokens": tokens, "precision": errors, "groups": GROUPS * repeats, "updates": num_batches,
        "stationary": stationary(flat, num_batches), "shifting": shifting(moved, num_batches, factor),
    }  # fmt: skip
    (RESULTS / "accumulation.json").write_text(json.dumps(content, indent=1) + "\n")
    (RESULTS / "accumulation.md").write_text(markdown(content))
    picture(moved, num_batches, RESULTS / "accumulation.png")
    print(markdown(content))


if __name__ == "__main__":
    main()
