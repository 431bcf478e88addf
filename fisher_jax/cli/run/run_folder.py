"""The folder that a command writes: checked and held while it runs; failed writes and signals end in a sentence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fisher_jax.cli.run.folder import check_entries, check_writable, disk_error
from fisher_jax.cli.run.folder_lock import Lock, flock, hold
from fisher_jax.cli.run.stopping import InterruptedRunError, stop_if_requested
from fisher_jax.cli.run.temporary import remove_left_over


@contextmanager
def run_folder(out: Path, *, interrupted: Callable[[], str], lock: Lock = flock) -> Iterator[None]:
    """Holds `out` for one run; a folder in which nothing was written goes again.

    Args:
        interrupted: what is kept and how to go on, asked for when a signal ended the run.
        lock: see `folder_lock.hold`.

    Raises:
        InputError: the folder cannot be written, or another run writes there.
        InterruptedRunError: a signal came.
    """
    check_writable(out)
    created = _missing(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_entries(out)
        with _held(out, lock):
            yield
            stop_if_requested()
    except BrokenPipeError:
        raise
    except BaseException as error:
        if _is_interruption(error):
            raise InterruptedRunError(interrupted()) from None
        if isinstance(error, OSError):
            raise disk_error(error, out) from error
        raise
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()  # only if it is empty


@contextmanager
def _held(out: Path, lock: Lock) -> Iterator[None]:
    """By process 0 alone, where there are several."""
    import jax

    if jax.distributed.is_initialized() and jax.process_index() > 0:
        yield
        return
    from fisher_jax.checkpoint import generations

    with hold(out, lock=lock):
        remove_left_over(out)
        generations.remove_left_over(out / "state")
        yield


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that are not there yet, the innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def _is_interruption(error: BaseException) -> bool:
    """A signal's exception may come out of a library as another error."""
    if isinstance(error, KeyboardInterrupt):
        return True
    try:
        stop_if_requested()
    except KeyboardInterrupt:
        return not isinstance(error, InterruptedRunError | GeneratorExit)
    return False
