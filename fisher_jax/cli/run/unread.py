"""A line about files beside a model's weights that are not read."""

from rich.console import Console

from fisher_jax.models import LanguageModel

__all__ = ["say_unread"]


def say_unread(console: Console, model: LanguageModel) -> None:
    """Names the first few, if there are any."""
    if model.unread:
        more = f" and {len(model.unread) - 5} more" if len(model.unread) > 5 else ""
        names = ", ".join(map(repr, model.unread[:5]))
        console.print(f"  not read, since they are not this model's weights: {names}{more}")
