"""How many tokens a row has: what was typed, else as many as the model allows, at most the default."""

from fisher_jax._support.errors import InputError

__all__ = ["row_length"]


def row_length(asked: int, typed: bool, positions: int, name: str, option: str = "--seq-len") -> int:
    """The length that was ``typed``, or ``asked`` cut to the positions of the model of this name.

    Raises:
        InputError: a typed length that the model does not have.
    """
    if typed and asked > positions:
        raise InputError(
            f"{option} {asked} is longer than the {positions} positions of {name}; give a smaller one, or leave it "
            "out."
        )
    return min(asked, positions)
