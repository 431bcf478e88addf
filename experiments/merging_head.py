"""What `merging.py head` merges: the head of SmolLM2, fine-tuned on hidden states of two domains.

The head is cut to the 4,096 tokens that are most often a target, and tokens with another target carry no loss: the
whole head would take hours of a CPU.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import head_scores
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from natural_gradient_runs import TUNING_SEED

import fisher_jax as fj
from fisher_jax import models

CORPORA = ("wikipedia", "pubmed")


class Setting(NamedTuple):
    """How much of the head is run."""

    tokens: int = 24_000  # of each domain; what is cached
    vocabulary: int = 4_096
    batch: int = 4  # rows of 256 tokens
    steps: int = 40
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)  # of gradient descent; Adam moves rare rows by noise
    held_out: int = 12  # rows of each domain, to choose on and to test on
    few_rows: int = 6
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    dampings: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    ridges: tuple[float, ...] = (1e-3, 1e-2, 1e-1)  # of the input factors, in units of their mean eigenvalue
    kfac_tokens: int = 1024
    shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    lengths: tuple[float, ...] = (0.7, 1.5, 2.0)


class Data(NamedTuple):
    """Rows of both domains, with the numbers of the cut vocabulary as targets, the head, and the rate of training."""

    head: jax.Array
    rows: tuple[head_scores.Rows, ...]
    rate: float


def read_data(setting):
    model = models.load()
    rows = [head_scores.read_rows(model, corpus, setting.tokens) for corpus in CORPORA]
    counts = sum(np.bincount(r.targets[r.scored], minlength=model.config.vocab_size) for r in rows)
    kept = np.sort(np.argsort(-counts, kind="stable")[: setting.vocabulary])
    number = np.full(len(counts), -1)
    number[kept] = np.arange(len(kept))
    print(f"{counts[kept].sum() / counts.sum():.1%} of the targets are among {len(kept):,} tokens", flush=True)
    cut = [
        r._replace(targets=np.maximum(number[r.targets], 0), scored=r.scored & (number[r.targets] >= 0)) for r in rows
    ]
    head = jnp.asarray(np.asarray(model.head(model.params))[kept], jnp.float32)
    return with_rate(setting, Data(head, tuple(cut), setting.rates[0]))


def apply_fn(params, hidden):
    return hidden @ params["kernel"].T


def loss(params, batch):
    weights = batch.weights
    return -jnp.sum(weights * fj.categorical.log_prob(apply_fn(params, batch.inputs), batch.targets)) / weights.sum()


total_loss = jax.jit(loss)


@jax.jit
def train(params, data, order, rate):
    """Gradient descent over batches of rows ``order [steps, batch]`` of ``data``, to a rate of zero."""
    tx = optax.sgd(optax.cosine_decay_schedule(rate, len(order)), momentum=0.9)

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], data))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), order)[0][0]


def batch_of(rows, index=slice(None)):
    arrays = (rows.hidden[index], rows.targets[index], rows.scored[index].astype(np.float32))
    return fj.Batch(*map(jnp.asarray, arrays))


def split(rows, seed):
    """Rows of 60%, 20% and 20% of the documents."""
    order = np.random.default_rng(seed).permutation(np.unique(rows.documents))
    return [rows.of(part) for part in np.split(order, [int(0.6 * len(order)), int(0.8 * len(order))])]


@jax.jit
def moments(params, batch):
    """Means of squared scores of every entry, both kinds; moments of rows, with rows of the batch as units."""
    hidden, targets, weights = batch.inputs, batch.targets, batch.weights
    head = params["kernel"]
    flat = hidden.reshape(-1, hidden.shape[-1]), head, targets.ravel(), weights.ravel()
    entries = [fj.welford.mean(m) for m in fj.lm_head.moments(*flat, groups="param", kind=("empirical", "true"))]
    return entries, fj.lm_head.moments(hidden, head, targets, weights, unit="sequence")


@jax.jit
def output_diagonals(params, batch):
    """Diagonals of the second moment of output gradients: of the batch's labels, and of the model's."""
    hidden, targets, weights = (x.reshape(-1, *x.shape[2:]) for x in (batch.inputs, batch.targets, batch.weights))

    def step(total, given):
        h, y, w = given
        p = jax.nn.softmax(h @ params["kernel"].T, -1)
        empirical = w @ jnp.square(p.at[jnp.arange(len(y)), y].add(-1.0))
        return (total[0] + empirical, total[1] + w @ (p * (1 - p))), None

    zero = jnp.zeros(len(params["kernel"]))
    chunks = jax.tree.map(lambda x: x.reshape(-1, 256, *x.shape[1:]), (hidden, targets, weights))
    return [x / weights.sum() for x in jax.lax.scan(step, (zero, zero), chunks)[0]]


def input_factor(batch):
    hidden = np.asarray(batch.inputs, np.float64).reshape(-1, batch.inputs.shape[-1])
    weights = np.asarray(batch.weights, np.float64).ravel()
    return (hidden * weights[:, None]).T @ hidden / weights.sum()


def by_input_factor(base, tuned, inputs, outputs, ridge):
    """Merges by ``A (x) diag(g)``: in the basis that makes both input factors diagonal it is one of entries."""
    one, two = (a + ridge * np.trace(a) / len(a) * np.eye(len(a)) for a in inputs)
    values, basis = scipy.linalg.eigh(one, two)  # basis.T @ two @ basis = 1
    back, into = jnp.asarray(basis.T, jnp.float32), jnp.asarray(np.linalg.inv(basis).T, jnp.float32)
    eigenvalues = jnp.asarray(values, jnp.float32), jnp.ones(len(values), jnp.float32)
    fishers = [g[:, None] * a for g, a in zip(outputs, eigenvalues, strict=True)]
    turned = [p["kernel"] @ into for p in tuned]

    @jax.jit
    def merge(share, length):
        merged = fj.merge_params(turned, fishers, scales=[share, 1 - share]) @ back
        return {"kernel": base["kernel"] + length * (merged - base["kernel"])}

    return merge


@jax.jit
def solved(tuned, factors):
    return fj.kfac_tools.merge_kfac(tuned, factors, max_steps=60, tolerance=1e-3)


def by_kfac(base, tuned, factors, damping):
    factors = [dataclasses.replace(f, damping=jnp.float32(damping)) for f in factors]
    merged: list[Any] = []

    def merge(share, length):
        assert share == 0.5
        if not merged:
            found = solved(tuned, factors)
            merged.append(found.params)
            print(f"    K-FAC: residual {float(found.residual):.1e} after {int(found.num_steps)} steps", flush=True)
        return jax.tree.map(lambda b, m: b + length * (m - b), base, merged[0])

    return merge


class Split(NamedTuple):
    """Batches of one split of the documents, by domain."""

    seen: list[fj.Batch]
    choose: list[fj.Batch]
    test: list[fj.Batch]


def split_of(setting, data, seed):
    parts = [split(rows, 10 * seed + i) for i, rows in enumerate(data.rows)]
    count = min(len(p[0].hidden) for p in parts)
    sizes = (count, setting.held_out, setting.held_out)
    return Split(*([batch_of(p[i], slice(size)) for p in parts] for i, size in enumerate(sizes)))


def order_of(rng, count, steps, batch):
    """Numbers of rows ``[steps, batch]``, shuffled anew each epoch."""
    epochs = -(-steps * batch // count)
    rows = np.concatenate([rng.permutation(count) for _ in range(epochs)])[: steps * batch]
    return jnp.asarray(rows.reshape(steps, batch))


def with_rate(setting, data):
    """The rate whose fine-tunes of the tuning seed have the lowest loss on their own domains."""
    found, parts, base = {}, split_of(setting, data, TUNING_SEED), {"kernel": data.head}
    for rate in setting.rates:
        rng = np.random.default_rng(TUNING_SEED)
        order = order_of(rng, len(parts.seen[0].inputs), setting.steps, setting.batch)
        tuned = [train(base, batch, order, rate) for batch in parts.seen]
        found[rate] = sum(float(total_loss(p, b)) for p, b in zip(tuned, parts.choose, strict=True)) / 2
    print(f"rates, and losses on their own domains: {found}", flush=True)
    return data._replace(rate=min(found, key=found.get))


def pair(setting, data, seed):
    """Fields of `merging.Pair`."""
    parts, rng = split_of(setting, data, seed), np.random.default_rng(seed)

    def losses(params):
        return jnp.array([[total_loss(params, batch) for batch in part] for part in (parts.choose, parts.test)])

    def trained(seen, steps):
        return train(base, seen, order_of(rng, len(seen.inputs), steps, setting.batch), data.rate)

    base = {"kernel": data.head}
    seen = parts.seen
    tuned = tuple(trained(batch, setting.steps) for batch in seen)
    joint = trained(jax.tree.map(lambda *x: jnp.concatenate(x), *seen), 2 * setting.steps)
    print(f"  seed {seed}: trained", flush=True)
    found = [moments(p, b) for p, b in zip(tuned, seen, strict=True)]
    few = [moments(p, jax.tree.map(lambda x: x[: setting.few_rows], b))[1] for p, b in zip(tuned, seen, strict=True)]

    def tree(values):
        return tuple({"kernel": v} for v in values)

    fishers = {
        "uniform": tree(jnp.ones_like(p["kernel"]) for p in tuned),
        "magnitude": tree(p["kernel"] ** 2 for p in tuned),
        "empirical Fisher": tree(f[0][0] for f in found),
        "true Fisher": tree(f[0][1] for f in found),
        "empirical Fisher of rows": tree(fj.welford.mean(f[1]) for f in found),
        "empirical Fisher of rows, shrunk": tree(fj.stats.shrunk_mean(f[1]) for f in found),
        "empirical Fisher of rows, few tokens": tree(map(fj.welford.mean, few)),
        "empirical Fisher of rows, few tokens, shrunk": tree(map(fj.stats.shrunk_mean, few)),
    }
    inputs = [input_factor(b) for b in seen]
    outputs = list(zip(*(output_diagonals(p, b) for p, b in zip(tuned, seen, strict=True)), strict=True))
    others = {}
    for kind, diagonals in zip(("empirical", "true"), outputs, strict=True):
        others[f"input factor, {kind}"] = {
            f"ridge {r:g}": by_input_factor(base, tuned, inputs, diagonals, r) for r in setting.ridges
        }
    for name, kind in (("K-FAC, empirical", "empirical"), ("K-FAC, true", "sampled")):
        make = functools.partial(factors_of, fisher=kind, token_cap=setting.kfac_tokens, key=jax.random.key(seed))
        factors = [make(p, b) for p, b in zip(tuned, seen, strict=True)]
        others[name] = {f"damping {x:g}": by_kfac(base, tuned, factors, x) for x in setting.dampings}
    # Conjugate gradients take long: one solution, at even weights.
    return base, tuned, joint, losses, fishers, others, frozenset(x for x in others if x.startswith("K-FAC"))


@functools.partial(jax.jit, static_argnames=("fisher", "token_cap"))
def factors_of(params, batch, fisher, token_cap, key):
    return fj.kfac_factors(
        apply_fn,
        fj.categorical,
        params,
        batch,
        key=key,
        curvature=fj.Curvature(estimator=fisher, token_cap=token_cap),
    )
