"""What to do about what the checks found."""

from collections.abc import Sequence

from fisher_jax.cli.doctor.arithmetic import REDUCED
from fisher_jax.cli.doctor.records import FAILED, WRONG, Record
from fisher_jax.cli.run.compiler import without_faulty_fusions


def advice(records: Sequence[Record], jaxlib: str, platform: str, xla_flags: str) -> list[str]:
    """Sentences, the most likely cause first; none where all is right.

    Args:
        jaxlib: its version.
        platform: ``cpu``, ``gpu`` or ``tpu``.
        xla_flags: as the environment has them.
    """
    found = []
    verdicts = {record.verdict for record in records}
    reduced = [name for name in REDUCED if name in verdicts]
    if reduced:
        found.append(
            f"float32 products run in {' and '.join(reduced)}: set JAX_DEFAULT_MATMUL_PRECISION=highest, or "
            'jax.config.update("jax_default_matmul_precision", "highest"), where you want float32.'
        )
    wrong = [record.name for record in records if record.verdict == WRONG]
    remedy = without_faulty_fusions({"XLA_FLAGS": xla_flags}, jaxlib) if platform == "cpu" else {}
    if wrong and remedy:
        found.append(
            f"jaxlib {jaxlib} is known to compile some programs wrongly on a CPU: start Python with "
            f'XLA_FLAGS="{remedy["XLA_FLAGS"]}", as the other commands of fisher-jax do for themselves.'
        )
    elif wrong:
        found.append(
            "the results marked WRONG cannot be relied on with this device, driver and jaxlib: update jax and jaxlib "
            "(and the driver of an accelerator), run the doctor again, and report it with the file of --json if it "
            "stays."
        )
    for record in records:
        if record.verdict == FAILED:
            found.append(f"{record.name} ({record.dtype}) ended with {record.worst}")
    return found
