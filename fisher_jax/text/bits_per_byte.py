"""Bits per byte: the loss of a model on texts, comparable between tokenizers."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int

from fisher_jax._support.errors import InputError
from fisher_jax.models import LanguageModel

__all__ = ["Loss", "bits_per_byte", "difference", "measure", "measure_in_pieces", "pieces"]


class Loss(NamedTuple):
    """Of every text: bits that the model needs for it, its bytes in UTF-8, its tokens."""

    bits: Float64[np.ndarray, " texts"]
    bytes: Int[np.ndarray, " texts"]
    tokens: Int[np.ndarray, " texts"]


def measure(model: LanguageModel, texts: Sequence[str], *, rows: int = 2) -> Loss:
    """The loss of all tokens of every text, the first one predicted from a beginning.

    That is the token that the model's tokenizer puts before a text, else its first special token, else a newline.
    """
    encoded = [model.tokenizer.encode(text, special=False) for text in texts]
    start = beginning(model)
    length = 1 + max(len(ids) for ids in encoded)
    if length > model.config.max_positions:
        raise InputError(
            f"a text has {length - 1} tokens, but {model.name} has {model.config.max_positions} positions; give "
            "fewer --characters."
        )

    @jax.jit
    def nats(params, tokens, mask):
        logits = model.apply(params, tokens[:, :-1])
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, -1) - chosen, 0.0), -1)

    total = []
    for first in range(0, len(encoded), rows):
        tokens = np.full((rows, length), start, np.int32)
        mask = np.zeros((rows, length - 1), bool)
        for row, ids in enumerate(encoded[first : first + rows]):
            tokens[row, 1 : 1 + len(ids)], mask[row, : len(ids)] = ids, True
        total.append(np.asarray(nats(model.params, tokens, mask), np.float64))
    bits = np.concatenate(total)[: len(texts)] / np.log(2)
    if not np.isfinite(bits).all():
        raise InputError(f"the loss of {model.name} is not finite on text {int(np.argmin(np.isfinite(bits)))}")
    return Loss(bits, np.array([len(t.encode()) for t in texts]), np.array([len(ids) for ids in encoded]))


def measure_in_pieces(models: Sequence[LanguageModel], texts: Sequence[str]) -> list[Loss]:
    """Of every model on every text; what is longer than the positions is read in pieces, the same for all models."""
    cut = [list(pieces(models, text)) for text in texts]
    starts = np.cumsum([0, *(len(of_one) for of_one in cut)])[:-1]
    losses = [measure(model, [piece for of_one in cut for piece in of_one]) for model in models]
    return [Loss(*(np.add.reduceat(x, starts) for x in loss)) for loss in losses]


def pieces(models: Sequence[LanguageModel], text: str) -> Iterator[str]:
    """The text in pieces that no model cuts into more tokens than it has positions, less one for the beginning."""
    while text:
        size = len(text)
        while size > 1 and (filled := max(_filled(model, text[:size]) for model in models)) > 1:
            size = max(min(int(size / filled), size - 1), 1)
        yield text[:size]
        text = text[size:]


def _filled(model: LanguageModel, text: str) -> float:
    """Tokens of a text over the model's positions behind a beginning."""
    return len(model.tokenizer.encode(text, special=False)) / (model.config.max_positions - 1)


def beginning(model: LanguageModel) -> int:
    if framed := model.tokenizer.encode(""):
        return framed[0]
    return min(model.tokenizer.added) if model.tokenizer.added else model.tokenizer.encode("\n")[0]


def bits_per_byte(loss: Loss) -> float:
    """Of all texts together."""
    return float(loss.bits.sum() / loss.bytes.sum())


def difference(after: Loss, before: Loss) -> tuple[float, float]:
    """Of bits per byte, and its standard error over texts, paired."""
    size = before.bytes.sum()
    values = after.bits - before.bits
    mean = values.sum() / size
    n = len(values)
    error = np.sqrt(n / (n - 1) * np.sum((values - mean * before.bytes) ** 2)) / size
    return float(mean), float(error)
