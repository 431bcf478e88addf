"""Batches of tokens, and what a batch says of its tokens."""

from fisher_jax.batch.batch import Batch, next_token_batch

__all__ = ["Batch", "next_token_batch"]
