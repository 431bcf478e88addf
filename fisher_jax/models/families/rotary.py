"""Rotary positions of a ``config.json``, read and written."""

import math
from typing import Any

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.checked_settings import MOST_SIZE, REQUIRED, Settings
from fisher_jax.models.config import DecoderConfig, linear_divisors, llama3_divisors, yarn_divisors
from fisher_jax.models.number_ranges import ROPE_BASE, ROPE_FACTOR, ROPE_PART
from fisher_jax.models.rotary_scaling import linear_scaling, llama3_scaling

__all__ = ["rotary", "scaled", "write_rotary", "written_part"]

KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def rotary(
    read: Settings, head_size: int, max_positions: int, *, base: float = 10_000.0, part: float | None = None,
    original: int | None = None, outer: tuple[str, str] = ("rope_theta", "partial_rotary_factor"),
) -> dict[str, Any]:  # fmt: skip
    """The decoder's switches, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

    ``base``, ``part`` (how much of a head turns) and ``original`` (positions before they were stretched) are taken
    where the settings are absent; ``part=None``: the family always turns the whole head. ``outer`` are the names of
    the base and the part outside of the rotary settings.
    """
    scaling = read.inner("rope_parameters") or read.inner("rope_scaling") or Settings({}, read.label)
    if by_layer := [key for key, value in scaling.values.items() if isinstance(value, dict)]:
        raise InputError(f"{scaling.label} differs between kinds of layers ({shown(by_layer)}), which is not read")
    inside = scaling.number("rope_theta", None, **ROPE_BASE)
    base = agreed(read, outer[0], read.number(outer[0], None, **ROPE_BASE), inside, base)
    if part is None:
        read.must("partial_rotary_factor", 1.0, 1)
        scaling.must("partial_rotary_factor", 1.0, 1)
        size = head_size
    else:
        inner = scaling.number("partial_rotary_factor", None, low=0.0, high=1.0)
        part = agreed(read, outer[1], read.number(outer[1], None, low=0.0, high=1.0), inner, part)
        size = int(head_size * part)
        if size < 2 or size % 2:
            raise InputError(
                f"{read.label} turns {size} of {head_size} coordinates of a head ({outer[1]} {part:g}), "
                "but it must be an even number of them, at least 2"
            )
    whole = {} if size == head_size else {"rope_size": size}
    return {"rope_base": base, **whole, **scaled(read, scaling, base, size, max_positions, original)}


def agreed(read: Settings, key: str, outside: Any, inside: Any, default: Any) -> Any:
    """A number that may stand outside and inside of the rotary settings; both must be one."""
    if None not in (inside, outside) and inside != outside:
        read.refuse(key, f"the {inside:g} of its rope_parameters")
    return next((number for number in (outside, inside) if number is not None), default)


def scaled(
    read: Settings, scaling: Settings, base: float, size: int, max_positions: int, original: int | None = None
) -> dict[str, Any]:
    """Divisors and amplitude of the ``size / 2`` frequencies."""
    kind = scaling.text("rope_type", None) or scaling.text("type", "default")
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope_divisors": linear_divisors(scaling.number("factor", **ROPE_FACTOR), size)}
    if kind == "llama3":
        low, high = (scaling.number(f"{end}_freq_factor", **ROPE_PART) for end in ("low", "high"))
        if low >= high:
            scaling.refuse("low_freq_factor", f"below its high_freq_factor {high:g}")
        divisors = llama3_divisors(
            factor=scaling.number("factor", **ROPE_FACTOR),
            low_freq_factor=low,
            high_freq_factor=high,
            original_positions=scaling.integer("original_max_position_embeddings", 1, MOST_SIZE),
            base=base,
            head_size=size,
        )
        return {"rope_divisors": divisors}
    if kind in ("yarn", "longrope"):
        key = "original_max_position_embeddings"
        inside = scaling.integer(key, 1, MOST_SIZE, None)
        original = agreed(read, key, read.integer(key, 1, MOST_SIZE, None), inside, original or max_positions)
        factor = scaling.number("factor", None, **ROPE_FACTOR) or max_positions / original
        if kind == "yarn":
            return yarn(scaling, factor, original, base, size)
        return longrope(scaling, factor, original, size)
    raise InputError(f"{read.label} has rotary scaling {shown(kind)}; supported: {', '.join(KINDS)}")


def yarn(scaling: Settings, factor: float, original: int, base: float, size: int) -> dict[str, Any]:
    fast, slow = scaling.number("beta_fast", 32.0, **ROPE_PART), scaling.number("beta_slow", 1.0, **ROPE_PART)
    if fast <= slow:
        raise InputError(f"{scaling.label} has beta_fast {fast:g}, but it must be above its beta_slow {slow:g}")
    if base == 1.0:
        raise InputError(f"{scaling.label} asks for yarn, which needs a rope_theta above 1")
    parts = [scaling.number(key, None, **ROPE_PART) for key in ("mscale", "mscale_all_dim")]

    def amplitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    told = amplitude(parts[0]) / amplitude(parts[1]) if all(parts) else amplitude(1.0)
    return {
        "rope_divisors": yarn_divisors(
            factor=factor, beta_fast=fast, beta_slow=slow, original_positions=original, base=base, rope_size=size,
            truncate=scaling.boolean("truncate", True),
        ),
        "rope_amplitude": scaling.number("attention_factor", told, **ROPE_PART),
    }  # fmt: skip


def longrope(scaling: Settings, factor: float, original: int, size: int) -> dict[str, Any]:
    short, long = (divisors(scaling, f"{length}_factor", size // 2) for length in ("short", "long"))
    told = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
    both = {} if short == long else {"rope_divisors_long": long, "rope_original_positions": original}
    amplitude = scaling.number("attention_factor", told, **ROPE_PART)
    return {"rope_divisors": short, **both, "rope_amplitude": amplitude}


def divisors(scaling: Settings, key: str, number: int) -> tuple[float, ...]:
    low, high = ROPE_PART["low"], ROPE_PART["high"]

    def fits(x: Any) -> bool:
        numbers = isinstance(x, list) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in x)
        return numbers and len(x) == number and all(low <= n <= high for n in x)

    return tuple(
        map(float, scaling.checked(key, REQUIRED, fits, f"a list of {number} numbers from {low:g} to {high:g}"))
    )


def write_rotary(config: DecoderConfig) -> dict[str, Any]:
    """The settings that `rotary` reads: ``rope_theta`` and ``rope_scaling``.

    Divisors that are neither Llama 3's nor one number are written as ``longrope``, which takes any.
    """
    part = {} if config.rope_size is None else {"partial_rotary_factor": written_part(config)}
    return {"rope_theta": config.rope_base, **part} | written_scaling(config)


def written_part(config: DecoderConfig) -> float:
    """How much of a head turns, such that its product with the head size is not rounded down to less."""
    part = config.rotary_size / config.head_size
    return part if int(config.head_size * part) == config.rotary_size else math.nextafter(part, 1.0)


def written_scaling(config: DecoderConfig) -> dict[str, Any]:
    short, long = config.rope_divisors, config.rope_divisors_long
    if long is None and config.rope_amplitude == 1.0:
        if short is None:
            return {}
        if found := linear_scaling(short) or llama3_scaling(short, config.rope_base):
            return {"rope_scaling": found}
    short = short or (1.0,) * (config.rotary_size // 2)
    original = config.rope_original_positions or config.max_positions
    return {
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": list(short),
            "long_factor": list(long or short),
            "factor": 1.0,  # what follows from it is said in attention_factor
            "attention_factor": config.rope_amplitude,
            "original_max_position_embeddings": original,
        },
        "original_max_position_embeddings": original,
    }
