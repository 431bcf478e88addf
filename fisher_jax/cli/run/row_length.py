"""How many tokens a row has: what was asked for, else as many as the model allows, at most the default."""

from fisher_jax._support.errors import InputError
from fisher_jax.cli.run.options import ROW_LENGTH

__all__ = ["row_length"]


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
