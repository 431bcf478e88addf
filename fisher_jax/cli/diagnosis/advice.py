"""What to do about what the checks found."""

from collections.abc import Sequence

from fisher_jax.cli.diagnosis.arithmetic import REDUCED
from fisher_jax.cli.diagnosis.records import FAILED, WRONG, Record

__all__ = ["advice"]

# Compilers that are known to be wrong, and the XLA flag with which they are right.
KNOWN_FAULTS = {("0.10.2", "cpu"): "--xla_cpu_experimental_ynn_fusion_type="}


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
    flag = KNOWN_FAULTS.get((jaxlib, platform))
    if wrong and flag and not _is_set(flag, xla_flags):
        found.append(
            f"jaxlib {jaxlib} on {platform} compiles some programs wrongly, as is known: update jax and jaxlib to "
            f"0.11.2 or later (Python 3.12 or later), or start Python with {flag} added to XLA_FLAGS."
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


def _is_set(flag: str, xla_flags: str) -> bool:
    return flag in xla_flags.split()
