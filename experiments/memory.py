"""How much memory does every method take, against the size of the model, and what would it take at 1.5B parameters?

Every method runs in a process of its own, on decoders of 1 to 35 million parameters: what it keeps between updates
(its state) and the most that an update takes beside the parameters, both as resident memory, with the programs
compiled before. Beside them stand the formula of the state and what the compiler plans for the update. The same
programs are then compiled, never run, for a decoder of 1.5 billion parameters with a vocabulary of 262,144: the
formula, the exact bytes of the state and the compiler's plan are the extrapolation. Memory does not depend on load.

    uv run python experiments/memory.py              # ten minutes on 2 cores, at most 3 GiB; writes results/
    uv run python experiments/memory.py --only lanczos ema      # these anew, the others as stored
    uv run python experiments/memory.py --plot-only  # table and picture of what is stored
    uv run python experiments/memory.py --quick      # the smallest model alone: does it run?
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import math
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax import models
from fisher_jax.kronecker.factors import forms as factors
from fisher_jax.kronecker.factors import tikhonov

RESULTS = pathlib.Path(__file__).parent / "results"
SIZES = {"1M": (4096, 128, 2), "5M": (8192, 256, 4), "35M": (32768, 512, 6)}  # vocabulary, width, layers
LARGE = (262_144, 1600, 36)
ROWS, LENGTH, LARGE_ROWS, LARGE_LENGTH = 4, 128, 1, 1024
CAP, BASIS, SCORES = 1024, 5, 16  # columns of U, vectors of Lanczos, sequences whose block spectra are taken
PAGES = os.sysconf("SC_PAGE_SIZE")


def config_of(vocabulary, width, layers):
    """A tied decoder with the proportions of a large one: heads of 64, an MLP 8/3 times as wide."""
    return models.DecoderConfig(
        vocab_size=vocabulary, width=width, num_layers=layers, num_heads=width // 64, num_kv_heads=width // 64,
        head_size=64, mlp_size=8 * width // 3 // 64 * 64, max_positions=2048,
    )  # fmt: skip


class Model(NamedTuple):
    """A decoder, its parameters (or their shapes) and a batch (or its shapes)."""

    config: models.DecoderConfig
    apply: Callable
    params: Any
    batch: fj.Batch

    @property
    def tokens(self):
        return math.prod(self.batch.targets.shape)


def model_of(sizes, rows, length, real):
    config = config_of(*sizes)

    def build():
        tokens = jax.random.randint(jax.random.key(1), (rows, length + 1), 0, config.vocab_size)
        return models.init_params(config, jax.random.key(0), "float32"), fj.next_token_batch(tokens)

    params, batch = build() if real else jax.eval_shape(build)
    return Model(config, models.from_config(config).apply, params, batch)


class Way(NamedTuple):
    """What a method keeps, and its update: ``update(state, params, batch, key) -> (state, result)``."""

    init: Callable[[Any], Any] | None
    update: Callable


def diagonal(lean=None, groups="param", decay=None):
    def way(model):
        fisher = fj.group_fisher(model.apply, example=model.batch, groups=groups)
        if decay is not None:
            fisher = fj.ema(fisher, decay)
        init = fisher.init if lean is None else lambda params: lean(fisher.init(params))
        return Way(init, lambda state, params, batch, key: (fisher.update(state, params, batch, key), ()))

    return way


def kfac(storage=None):
    def way(model):
        tx = fj.scale_by_kfac(
            model.apply,
            example=model.batch,
            curvature=fj.Curvature(token_cap=CAP, factor_dtype=storage, estimator="sampled"),
        )

        def update(state, params, batch, key):
            # The parameters stand in for the gradient, which is there in any case.
            updates, state = tx.update(params, state, params, batch=batch, key=key)
            return state, updates

        return Way(tx.init, update)

    return way


def woodbury_head(storage=None):
    """The head's factors alone, from hidden states and probabilities, applied to a gradient of its own shape."""

    def way(model):
        columns = min(model.tokens, CAP // 2)

        def of(a, p):
            return factors.eigen(a.T @ a / columns), factors.low_rank(p, storage)

        def init(params):
            V, H = params["embedding"].shape
            given = jax.ShapeDtypeStruct((columns, H), jnp.float32), jax.ShapeDtypeStruct((V, columns), jnp.float32)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, *given))

        def update(state, params, batch, key):
            head = params["embedding"]
            a = jax.random.normal(key, (columns, head.shape[1]))
            p = jax.nn.softmax(head @ a.T, 0) / columns**0.5
            A, G = of(a, p)
            return (A, G), tikhonov.exact(A, G, head, 1e-3)

        return Way(init, update)

    return way


def lanczos(dtype=None):
    def way(model):
        def update(state, params, batch, key):
            few = jax.tree.map(lambda x: x[:1, :64], batch)
            matvec = fj.operators.ggn(model.apply, fj.categorical, params, few)
            return state, fj.lanczos(
                matvec, params, num_steps=BASIS + 2, max_basis=BASIS, num_eigenvalues=2, tol=0.0, key=key,
                basis_dtype=dtype,
            ).eigenvalues  # fmt: skip

        return Way(None, update)

    return way


def blocks(model):
    """Of every tensor of the layers, from the scores of whole sequences."""

    def update(state, params, batch, key):
        short = fj.next_token_batch(jax.random.randint(key, (SCORES, 33), 0, model.config.vocab_size))
        found = fj.block_spectrum(
            model.apply, fj.categorical, params, short, unit="sequence", stacked=True,
            parameters=lambda path, _: "embedding" not in path,
        )  # fmt: skip
        return state, [x.eigenvalues for x in found.values()]

    return Way(None, update)


def gradient(model):
    """What every training step needs."""

    def loss(params, batch):
        return -jnp.mean(fj.categorical.log_prob(model.apply(params, batch.inputs), batch.targets))

    return Way(lambda params: (), lambda state, params, batch, key: (state, jax.grad(loss)(params, batch)))


def without_errors(state):
    return fj.welford.plain(state, standard_errors=False)


def numbers(model):
    return sum(x.size for x in jax.tree.leaves(model.params))


def rows_of(config):
    """Groups of ``row``: outputs of kernels, rows of the embedding, one for every scale's entry."""
    c = config
    inside = c.num_heads * c.head_size + 2 * c.num_kv_heads * c.head_size + 2 * c.width + 2 * c.mlp_size + 2 * c.width
    return c.vocab_size + c.num_layers * inside + c.width


def kfac_bytes(model, storage=4):
    """Eigenbases of the inputs, and of the outputs or their columns; the embedding's frequencies and diagonals."""
    c, tokens = model.config, model.tokens
    columns = min(tokens, CAP)
    heads, kv = c.num_heads * c.head_size, c.num_kv_heads * c.head_size
    kernels = [(c.width, heads), (c.width, kv), (c.width, kv), (heads, c.width), (c.width, c.mlp_size),
               (c.width, c.mlp_size), (c.mlp_size, c.width)]  # fmt: skip

    def output(units):
        if units > 4096 or tokens < units:
            return units * columns * storage + 4 * (columns**2 + columns)
        return 4 * (units**2 + units)

    layers = c.num_layers * sum(4 * (n**2 + n) + output(units) for n, units in kernels)
    tied = 4 * (c.width**2 + c.width) + c.vocab_size * columns * storage + 4 * columns**2 + 4 * c.vocab_size
    return layers + tied + 4 * (2 * c.num_layers + 1) * c.width


def head_bytes(model, storage=4):
    c, columns = model.config, min(model.tokens, CAP // 2)
    return c.vocab_size * columns * storage + 4 * (columns**2 + columns) + 4 * (c.width**2 + c.width)


class Method(NamedTuple):
    """A method; ``state`` is the formula of what it keeps, in bytes."""

    label: str
    way: Callable[[Model], Way]
    state: Callable[[Model], float]
    formula: str
    compiled: bool = True  # one program, whose memory the compiler plans
    reference: str = ""  # stated elsewhere for 1.5B parameters


METHODS = {
    "gradient": Method("the gradient alone", gradient, lambda m: 0, ""),
    "welford": Method(
        "Welford, every parameter, pairs", diagonal(), lambda m: 32 * numbers(m), "32 P", reference="18 GB"
    ),
    "welford-plain": Method(
        "Welford, plain float32", diagonal(fj.welford.plain), lambda m: 16 * numbers(m), "16 P", reference="18 GB"
    ),
    "welford-lean": Method(
        "Welford, plain, mean and variance", diagonal(without_errors), lambda m: 8 * numbers(m), "8 P",
        reference="18 GB",
    ),
    "welford-rows": Method(
        "Welford, rows", diagonal(groups="row"), lambda m: 32 * rows_of(m.config), "32 rows", reference="18 GB"
    ),
    "ema": Method("EMA, every parameter", diagonal(decay=0.99), lambda m: 4 * numbers(m), "4 P", reference="6 GB"),
    "kfac": Method("K-FAC", kfac(), kfac_bytes, "4 sum(in² + out min(T, 1024)) + V", reference="12 GB"),
    "kfac-bf16": Method(
        "K-FAC, bfloat16 columns", kfac(jnp.bfloat16), lambda m: kfac_bytes(m, 2), "the same, 2 bytes for columns",
        reference="12 GB",
    ),
    "head": Method("Woodbury head", woodbury_head(), head_bytes, "4 (V T + T² + H²), T = 512", reference="50 MB"),
    "head-bf16": Method(
        "Woodbury head, bfloat16", woodbury_head(jnp.bfloat16), lambda m: head_bytes(m, 2), "2 V T + 4 (T² + H²)",
        reference="50 MB",
    ),
    "lanczos": Method(
        "Lanczos, 5 vectors", lanczos(), lambda m: 4 * BASIS * numbers(m), "4 P vectors", False, "30 GB"
    ),
    "lanczos-bf16": Method(
        "Lanczos, 5 vectors, bfloat16", lanczos(jnp.bfloat16), lambda m: 2 * BASIS * numbers(m), "2 P vectors", False,
        "30 GB",
    ),
    "blocks": Method(
        "Block spectra", lambda model: blocks(model),
        lambda m: 8 * SCORES * (9 * m.config.num_layers + 1), "8 N tensors", False, "100 KB",
    ),
}  # fmt: skip


def size(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def planned(compiled, kept):
    """Bytes beside parameters and batch: the state, temporaries and what comes back in memory of its own."""
    plan = compiled.memory_analysis()
    return kept + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def compile_update(way, model, state):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(way.update, donate_argnums=0).lower(state, model.params, model.batch, key).compile()


def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGES


def peak():
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def settle():
    """Give freed memory back and forget the peak so far."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return resident()


def measured(method, sizes):
    """In this process, which has done nothing else."""
    model = model_of(sizes, ROWS, LENGTH, real=True)
    way, key = method.way(model), jax.random.key(2)
    found = {"parameters": numbers(model), "formula": method.state(model)}
    if not method.compiled:
        jax.block_until_ready(way.update((), model.params, model.batch, key))  # compiles all that it needs
        before = settle()
        _, result = jax.block_until_ready(way.update((), model.params, model.batch, key))
        return found | {"peak": peak() - before, "result": sum(np.asarray(x).nbytes for x in jax.tree.leaves(result))}
    shapes = jax.eval_shape(way.init, model.params)
    update = compile_update(way, model, shapes)
    init = jax.jit(way.init).lower(model.params).compile()

    def run():
        state = jax.block_until_ready(init(model.params))
        for _ in range(2):
            state, _ = jax.block_until_ready(update(state, model.params, model.batch, key))
        return state

    run()  # threads and their buffers are there from now on
    before = settle()
    state = run()
    top = peak() - before
    held = settle() - before
    return found | {"state": size(state), "held": held, "peak": top, "planned": planned(update, size(shapes))}


def extrapolated(method):
    """At 1.5 billion parameters: shapes and the compiler's plan; nothing is allocated."""
    model = model_of(LARGE, LARGE_ROWS, LARGE_LENGTH, real=False)
    way = method.way(model)
    found = {"parameters": numbers(model), "formula": method.state(model)}
    if not method.compiled:
        return found
    shapes = jax.eval_shape(way.init, model.params)
    return found | {"state": size(shapes), "planned": planned(compile_update(way, model, shapes), size(shapes))}


def alone(name, which):
    """``measured`` or ``extrapolated`` in a process of its own, forked before jax has started anything."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def run():
        found = extrapolated(METHODS[name]) if which == "large" else measured(METHODS[name], SIZES[which])
        theirs.send(found)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{name} at {which} ended without a result: see its message above") from None
    finally:
        process.join()


def prepare():
    """Once more from the start, where freed memory goes back at once, and programs compile quickly: their memory is
    planned before the machine's code is made."""
    wanted = {
        "MALLOC_MMAP_THRESHOLD_": "65536", "OPENBLAS_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    }  # fmt: skip
    if any(os.environ.get(k) != v for k, v in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def versions():
    return ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "fisher-jax")) + "; CPU"


def write(stored):
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps({"versions": versions(), "found": stored}, indent=1) + "\n")
    (RESULTS / "memory.md").write_text(table(stored))


NONE = ""


def shown(x):
    """Bytes as a person reads them, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if x < 1000 or unit == "GB":
            return f"{x:.3g} {unit}" if x < 1000 else f"{x:.0f} {unit}"
        x /= 1000
    return ""


def beside_gradient(stored, name, size, kind):
    """What an update takes at most beside the parameters, and beside what the gradient takes alone."""
    found, base = stored.get(name, {}).get(size, {}), stored["gradient"].get(size, {})
    return found[kind] - base[kind] if kind in found and kind in base else None


def ratios(stored, name, top, bottom):
    found = [x for size, x in stored[name].items() if size != "large" and top in x and bottom in x]
    return ", ".join(f"{x[top] / x[bottom]:.3f}" for x in sorted(found, key=lambda x: x["parameters"])) or NONE


def table(stored):
    large = next((x["large"]["parameters"] for x in stored.values() if "large" in x), 0)
    vocabulary, width, layers = LARGE
    lines = [
        "# Memory of every method, measured, and at 1.5 billion parameters", "", versions(), "",
        f"P parameters, V words, T columns, H width. Decoders with {', '.join(SIZES)} parameters, {ROWS} x {LENGTH} "
        f"tokens; extrapolated to {large:,} parameters ({layers} layers of width {width}, vocabulary "
        f"{vocabulary:,}, embedding and head tied), {LARGE_ROWS} x {LARGE_LENGTH} tokens. Ratios are one for each "
        "size that was measured, smallest first. *Held*: resident memory that stays after two updates. *Peak*: the "
        "most of an update beside the parameters, the gradient and its activations included.", "",
        "| | formula of the state | held / formula | peak / compiler's plan | state at 1.5B | stated elsewhere | an "
        "update's peak at 1.5B, planned | beside the gradient's |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for name, method in METHODS.items():
        if name not in stored:
            continue
        found = stored[name].get("large", {})
        extra = beside_gradient(stored, name, "large", "planned") if "gradient" in stored else None
        held = ratios(stored, name, "held", "formula") if method.state and name != "gradient" else NONE
        if name.startswith("lanczos"):
            held = (lambda r: r and r + " (peak)")(ratios(stored, name, "peak", "formula"))
        cells = [
            method.label, method.formula, held, ratios(stored, name, "peak", "planned"),
            shown(found.get("state", found["formula"])) if found.get("formula") else NONE, method.reference or NONE,
            shown(found["planned"]) if "planned" in found else NONE,
            shown(extra) if extra is not None and extra > 0 and name != "gradient" else NONE,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


DRAWN = {  # colour, and how far up the label is moved, in points
    "welford": ("#D55E00", 7), "welford-lean": ("#E69F00", 6), "ema": ("#CC79A7", -7), "lanczos": ("#555555", -2),
    "kfac": ("#0072B2", -2), "head": ("#56B4E9", 0), "welford-rows": ("#009E73", 0), "blocks": ("#000000", 0),
}  # fmt: skip


def picture(stored, path):
    """Lines: formulas through all sizes; dots: what stayed resident (Lanczos: the peak)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, (colour, lift) in DRAWN.items():
        if name not in stored:
            continue
        found = sorted(stored[name].values(), key=lambda x: x["parameters"])
        axes.plot([x["parameters"] for x in found], [x["formula"] for x in found], color=colour, lw=1.5)
        seen = [
            (x["parameters"], x.get("held", x.get("result") if name == "blocks" else x.get("peak"))) for x in found
        ]
        seen = [pair for pair in seen if pair[1]]
        axes.plot(*zip(*seen, strict=True), "o", color=colour, ms=5) if seen else None
        last = found[-1]
        label = f"{METHODS[name].label}: {shown(last['formula'])}"
        place = dict(xytext=(8, lift), textcoords="offset points", va="center", fontsize=9)
        axes.annotate(label, (last["parameters"], last["formula"]), color=colour, **place)
    axes.set(
        xscale="log", yscale="log", xlabel="parameters of the model", ylabel="memory that is kept (bytes)",
        title="Lines: formulas, extrapolated to 1.5 billion parameters. Dots: measured, in processes of their own",
    )  # fmt: skip
    axes.title.set_fontsize(10)
    axes.set_xlim(6e5, 1e11)
    axes.set_xticks([1e6, 1e7, 1e8, 1e9], ["1M", "10M", "100M", "1B"])
    axes.set_xticks([], minor=True)
    axes.set_yticks([1e3, 1e6, 1e9, 1e11], ["1 kB", "1 MB", "1 GB", "100 GB"])
    axes.set_yticks([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, help="the others as stored")
    sizes = [*SIZES, "large"]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes, help="the others as stored")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the smallest model; writes nothing")
    args = parser.parse_args(argv)
    file = RESULTS / "memory.json"
    stored = (
        json.loads(file.read_text())["found"]
        if (args.only or args.plot_only or args.sizes != sizes) and file.is_file()
        else {}
    )
    for which in [] if args.plot_only else ["1M"] if args.quick else args.sizes:
        for name in args.only or METHODS:
            found = alone(name, which)
            if file.is_file() and not args.quick:
                stored = json.loads(file.read_text())["found"]  # what others have found meanwhile
            stored.setdefault(name, {})[which] = found
            print(name, which, found, flush=True)
            if not args.quick:
                write(stored)
    if not args.quick:
        print(table(stored))
        picture(stored, RESULTS / "memory.png")


if __name__ == "__main__":
    prepare()
    main()
