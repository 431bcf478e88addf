"""What the experiments on the head of SmolLM2 share: hidden states of a corpus and scores by document.

The model runs once for a corpus; hidden states and the row scores made of them are kept in the cache folder of the
library, so that further experiments begin at once.
"""

import hashlib
import os
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax.text import corpora, packing

SEQ_LEN = 257


class Rows(NamedTuple):
    """Rows of at most 256 targets, each of one document."""

    hidden: np.ndarray  # float32 [R, S, H], what the head multiplies
    targets: np.ndarray  # int32 [R, S]
    scored: np.ndarray  # bool [R, S]
    documents: np.ndarray  # [R], numbers of documents
    names: np.ndarray  # [documents]

    def of(self, inside):
        """The rows of these documents."""
        keep = np.isin(self.documents, inside)
        return Rows(self.hidden[keep], self.targets[keep], self.scored[keep], self.documents[keep], self.names)

    def flat(self):
        """Hidden states ``[T, H]``, targets and documents ``[T]`` of the scored targets."""
        numbers = np.broadcast_to(self.documents[:, None], self.scored.shape)
        return self.hidden[self.scored], self.targets[self.scored], numbers[self.scored]


class Scores(NamedTuple):
    """Sums over the targets of each row of ``Rows``, for every vocabulary token."""

    empirical: np.ndarray  # float32 [R, V], sum of (p - y)**2 |h|**2
    true: np.ndarray  # float32 [R, V], sum of p (1 - p) |h|**2
    output: np.ndarray  # float32 [R, V], sum of (p - y)**2, the diagonal of K-FAC's output factor
    counts: np.ndarray  # int32 [R, V], targets
    tokens: np.ndarray  # [R]


def cache_folder():
    folder = os.environ.get("FISHER_JAX_CACHE", pathlib.Path.home() / ".cache" / "fisher_jax")
    return pathlib.Path(folder) / "experiments"


def cached(name, build, kind):
    """The arrays of an earlier call with this name, or new ones."""
    file = cache_folder() / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz"
    if file.is_file():
        with np.load(file) as stored:
            return kind(**{field: stored[field] for field in kind._fields})
    found = build()
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part.npz")
    np.savez(partial, **found._asdict())
    partial.replace(file)
    return found


def read_rows(model, corpus, tokens, documents=None, name=None):
    """Rows of ``tokens`` targets spread over the documents of a corpus, or over ``documents`` called ``name``."""

    def build():
        packed = packing.pack(
            corpora.documents([corpus]) if documents is None else documents, model.tokenizer.encode, seq_len=SEQ_LEN,
            max_targets=tokens, held_out_targets=0, vocab_size=model.config.vocab_size,
        )  # fmt: skip

        @jax.jit
        def forward(params, tokens, mask, units):
            batch = fj.next_token_batch(tokens, mask, units=units)
            return model.hidden(params, batch.inputs), batch.targets, batch.weights > 0

        parts = []
        for index, (ids, mask, units) in enumerate(packed.stream.batches(4)):
            hidden, targets, scored = map(np.asarray, forward(model.params, ids, mask, units))
            keep = scored.any(1)
            parts.append((hidden[keep], targets[keep], scored[keep], units[keep]))
            if index % 10 == 0:
                print(f"  {name or corpus}: batch {index} of {packed.stream.num_batches(4)}", flush=True)
        return Rows(*(np.concatenate(part) for part in zip(*parts, strict=True)), np.array(packed.stream.names))

    return cached(f"rows {model.fingerprint} {name or corpus} {tokens} {SEQ_LEN}", build, Rows)


def read_scores(model, rows, name):
    """`Scores` of these rows; ``name`` says which they are."""

    def build():
        head = model.head(model.params)

        @jax.jit
        def step(hidden, targets, scored):
            def one(row):
                h, y, w = row
                kinds = fj.lm_head.moments(h, head, y, w, kind=("empirical", "true"))
                empirical, true = (fj.welford.mean(m) * w.sum() for m in kinds)
                probability = jax.nn.softmax(h @ head.T, -1)
                error = probability.at[jnp.arange(len(y)), y].add(-1.0)
                counts = jnp.zeros(head.shape[0], jnp.int32).at[y].add(w.astype(jnp.int32))
                return empirical, true, jnp.sum(jnp.where(w[:, None], error**2, 0), 0), counts, w.sum()

            return jax.lax.map(one, (hidden, targets, scored))

        parts = []
        for first in range(0, len(rows.hidden), 4):
            chunk = slice(first, first + 4)
            parts.append(jax.tree.map(np.asarray, step(rows.hidden[chunk], rows.targets[chunk], rows.scored[chunk])))
        return Scores(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    return cached(f"scores {model.fingerprint} {name} {rows.targets.size} {SEQ_LEN}", build, Scores)


def by_document(rows, values, weights):
    """Sums of the rows of each document: ``[D, V]`` and ``[D]``, documents in ascending order."""
    numbers, index = np.unique(rows.documents, return_inverse=True)
    sums = np.zeros((len(numbers), values.shape[1]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index, weights)


def welford_state(rows, values, weights, inside=None):
    """A `fj.welford` state of the mean per token, with documents as units."""
    sums, total = by_document(rows, values, weights)
    if inside is not None:
        keep = np.isin(np.unique(rows.documents), inside)
        sums, total = sums[keep], total[keep]
    moments = fj.welford.observe(
        jnp.asarray(sums / total[:, None], jnp.float32), jnp.asarray(total, jnp.float32), unit="sequence"
    )
    return fj.welford.add(fj.welford.init(moments), moments)
