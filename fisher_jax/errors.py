"""The errors that a person can act on."""

__all__ = ["InputError", "RejectedBatchError"]


class InputError(ValueError):
    """A model, text, folder or setting that cannot be used; one sentence that names it and the way out.

    The command line prints the sentence and exits with code 2.
    """


class RejectedBatchError(ValueError):
    """A batch was rejected inside a compiled step; the state was left as it was before that batch."""
