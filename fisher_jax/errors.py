"""The errors that a person can act on."""

__all__ = ["ConflictError", "InputError", "RejectedBatchError"]


class InputError(ValueError):
    """A model, text, folder or setting that cannot be used; one sentence that names it and the way out.

    The command line prints the sentence and exits with code 2.
    """


class ConflictError(InputError):
    """Another run saved into the same folder meanwhile; replacing its save would drop what was never seen here."""


class RejectedBatchError(ValueError):
    """A batch was rejected inside a compiled step; the state was left as it was before that batch."""
