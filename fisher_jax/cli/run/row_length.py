"""How many tokens a row has: what was asked for, else as many as the model allows, at most the default."""

from fisher_jax._support.errors import InputError
from fisher_jax._support.host_memory import attention_bytes, check_memory
from fisher_jax.cli.run.options import ROW_LENGTH
from fisher_jax.models import DecoderConfig


def row_length(asked: int, positions: int, name: str) -> int:
    """The length that was ``asked`` for, 0 where none was, of a model of this name with so many positions.

    Raises:
        InputError: the model has fewer positions.
    """
    if asked > positions:
        raise InputError(
            f"--row-length {asked} is longer than the {positions} positions of {name}; give a smaller one, or leave "
            "it out."
        )
    return asked or min(ROW_LENGTH, positions)


def check_attention(config: DecoderConfig, rows: int, length: int) -> None:
    """Raises InputError where attention over so many rows at a time does not fit into the memory of the host."""
    check_memory(
        attention_bytes(config.num_heads, rows, length),
        f"attention over rows of {length:,} tokens, {rows:,} at a time",
        "give a smaller --batch-size or --row-length",
    )
