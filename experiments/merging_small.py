"""What `merging.py small` merges: a decoder on bytes, fine-tuned on two domains."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from natural_gradient_language import cut, decoder
from natural_gradient_runs import orders

import fisher_jax as fj
from fisher_jax.text.corpora import documents

DOMAINS = ("wikipedia", "pubmed")


class Setting(NamedTuple):
    """How much of the small model is run."""

    characters: int = 2_500_000  # of each domain
    batch: int = 16
    base_steps: int = 400
    block: int = 50
    steps: int = 150  # of a fine-tune; twice as many of the one on both
    base_rate: float = 1e-2
    rate: float = 5e-3
    fisher_rows: int = 512
    few_rows: int = 16
    held_out: int = 96  # rows of each domain, to choose on and to test on
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    dampings: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of Wikipedia
    lengths: tuple[float, ...] = (0.7, 1.3, 1.6, 2.0)  # of the task vector, beside 1


def corpus_bytes(corpus, characters):
    """Documents as bytes, every so many of the corpus, until they are ``characters`` in all."""
    texts = [d.text.encode() for d in documents([corpus])]
    order, size, kept = np.random.default_rng(0).permutation(len(texts)), 0, []
    for i in order:
        if size >= characters:
            break
        kept.append(np.frombuffer(texts[i], np.uint8))
        size += len(texts[i])
    return kept


def read_texts(setting):
    return [corpus_bytes(domain, setting.characters) for domain in DOMAINS]


def split_rows(texts, seed):
    """Rows of the documents to train on, to choose on and to test on: 60%, 20% and 20%."""
    order = np.random.default_rng(seed).permutation(len(texts))
    parts = [[texts[i] for i in part] for part in np.split(order, [int(0.6 * len(texts)), int(0.8 * len(texts))])]
    join = np.frombuffer(b"\n\n", np.uint8)
    return [cut(np.concatenate([x for t in part for x in (t, join)]).astype(np.int32)) for part in parts]


class Small(NamedTuple):
    """The small model, compiled once for all seeds.

    Attributes:
        begin: parameters with AdamW's state.
        start: parameters of a seed.
        train: AdamW, ``(parameters with state, rows [steps, batch, length], rates [steps])``.
        loss: ``(params, rows)``.
        signs, sampled: Welford states of squared scores, ``(params, rows, key, rows at a time)``.
        factors: of K-FAC, ``(params, rows, key, fisher)``.
    """

    begin: Callable
    start: Callable
    train: Callable
    loss: Callable
    signs: Callable
    sampled: Callable
    factors: Callable


def small_model():
    functions, start = decoder(256, 2)

    def loss(params, rows):
        batch = fj.next_token_batch(rows)
        return -fj.categorical.log_prob(functions.apply(params, batch.inputs), batch.targets).mean()

    tx = optax.inject_hyperparams(optax.adamw)(0.0, b2=0.95, weight_decay=0.01)

    def train(carry, rows, rates):
        def step(carry, given):
            params, state = carry
            state.hyperparams["learning_rate"] = given[1]
            updates, state = tx.update(jax.grad(loss)(params, given[0]), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, (rows, rates))[0]

    def observe(estimator):
        fisher = fj.group_fisher(functions.apply, estimator=estimator, unit="sequence")
        update = jax.jit(
            lambda state, params, rows, key: fisher.update(state, params, fj.next_token_batch(rows), key)
        )

        def run(params, rows, key, size):
            state = fisher.init(params)
            for i in range(0, len(rows), size):
                state = update(state, params, rows[i : i + size], jax.random.fold_in(key, i))
            fj.check(state)
            return state

        return run

    @functools.partial(jax.jit, static_argnames="fisher")
    def factors(params, rows, key, fisher):
        batch = fj.next_token_batch(rows)
        return fj.kfac_factors(
            functions.apply,
            fj.categorical,
            params,
            batch,
            key=key,
            curvature=fj.Curvature(estimator=fisher, policy="never"),
        )

    return Small(
        lambda params: (params, tx.init(params)),
        start,
        jax.jit(train),
        jax.jit(loss),
        observe("signs"),
        observe("sampled"),
        factors,
    )


def pair(model, setting, texts, seed):
    """Fields of `merging.Pair`."""
    parts = [split_rows(t, 10 * seed + i) for i, t in enumerate(texts)]
    rng = np.random.default_rng(seed)
    held = [[jnp.asarray(rng.permutation(rows)[: setting.held_out]) for rows in (part[1], part[2])] for part in parts]

    def losses(params):
        return jnp.array([[model.loss(params, held[d][part]) for d in (0, 1)] for part in (0, 1)])

    def trained(params, rows, steps, rate, seed):
        """A warm-up and a cosine; block by block, so that one program serves all lengths."""
        chosen = rows[np.asarray(orders(seed, steps, len(rows), setting.batch))]
        rates = jax.vmap(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))(jnp.arange(steps))
        carry = model.begin(params)
        for i in range(0, steps, setting.block):
            carry = model.train(carry, chosen[i : i + setting.block], rates[i : i + setting.block])
        return carry[0]

    count = min(len(part[0]) for part in parts)
    mixed = np.concatenate([rng.permutation(part[0])[:count] for part in parts])
    base = trained(model.start(seed), mixed, setting.base_steps, setting.base_rate, 100 + seed)
    tuned = tuple(
        trained(base, part[0], setting.steps, setting.rate, 200 + 2 * seed + i) for i, part in enumerate(parts)
    )
    joint = trained(base, mixed, 2 * setting.steps, setting.rate, 300 + seed)
    print(f"  seed {seed}: trained", flush=True)
    some = [jnp.asarray(rng.permutation(part[0])[: setting.fisher_rows]) for part in parts]
    fishers = small_fishers(model, tuned, some, setting, seed)
    others = {}
    for name, kind in (("K-FAC, empirical", "empirical"), ("K-FAC, true", "sampled")):
        factors = [model.factors(p, r, jax.random.key(seed), kind) for p, r in zip(tuned, some, strict=True)]
        others[name] = {f"damping {x:g}": kfac_merge(base, tuned, factors, x) for x in setting.dampings}
    return base, tuned, joint, losses, fishers, others


@jax.jit
def merged_by_kfac(models, factors, share):
    return fj.kfac_tools.merge_kfac(models, factors, scales=[share, 1 - share], max_steps=200, tolerance=1e-4)


def kfac_merge(base, models, factors, damping):
    factors = [dataclasses.replace(f, damping=jnp.float32(damping)) for f in factors]

    def merge(share, length):
        merged = merged_by_kfac(models, factors, share).params
        return jax.tree.map(lambda b, m: b + length * (m - b), base, merged)

    return merge


def small_fishers(model, models, rows, setting, seed):
    """Weights of every method for which they are a tree like the parameters."""

    def states(observe, count):
        key = jax.random.key(1000 + seed)
        return [observe(p, r[:count], key, setting.few_rows) for p, r in zip(models, rows, strict=True)]

    empirical, true = (states(f, setting.fisher_rows) for f in (model.signs, model.sampled))
    few = states(model.signs, setting.few_rows)
    return {
        "uniform": tuple(jax.tree.map(jnp.ones_like, p) for p in models),
        "magnitude": tuple(jax.tree.map(jnp.square, p) for p in models),
        "empirical Fisher": tuple(map(fj.welford.mean, empirical)),
        "true Fisher": tuple(map(fj.welford.mean, true)),
        "empirical Fisher, shrunk": tuple(map(fj.stats.shrunk_mean, empirical)),
        "empirical Fisher of few tokens": tuple(map(fj.welford.mean, few)),
        "empirical Fisher of few tokens, shrunk": tuple(map(fj.stats.shrunk_mean, few)),
    }
