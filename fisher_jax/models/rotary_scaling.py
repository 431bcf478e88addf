"""Rotary divisors as the ``rope_scaling`` of a ``config.json``."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from fisher_jax.models.config import llama3_divisors

__all__ = ["linear_scaling", "llama3_scaling"]

# GGUF files hold divisors in float32, computed in float32.
TOLERANCE = 2e-6


def linear_scaling(divisors: tuple[float, ...]) -> dict[str, Any] | None:
    """Position interpolation, where all divisors are one number."""
    return {"rope_type": "linear", "factor": divisors[0]} if len(set(divisors)) == 1 else None


def llama3_scaling(divisors: tuple[float, ...], base: float) -> dict[str, Any] | None:
    """Llama 3's scaling with these divisors to the rounding of float32, or ``None`` where there is none.

    Between the two wavelengths the inverse divisor is a line in the inverse wavelength, so two divisors give the
    line; its parameters are known up to a common factor, which is taken such that ``low_freq_factor`` is 1, or the
    original positions a power of two.
    """
    factor = round(max(divisors), 4)
    if min(divisors) < 1 - TOLERANCE or factor <= 1:
        return None
    for low, high, original in candidates(divisors, base, factor):
        again = llama3_divisors(
            factor=factor, low_freq_factor=low, high_freq_factor=high, original_positions=original, base=base,
            head_size=2 * len(divisors),
        )  # fmt: skip
        if np.allclose(again, divisors, rtol=TOLERANCE, atol=0):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    return None


def candidates(divisors: tuple[float, ...], base: float, factor: float) -> Iterator[tuple[float, float, int]]:
    """Low and high factor and original positions: as published first, then by the line through two divisors."""
    for original in (8192, *(2**power for power in range(4, 21))):
        yield 1.0, 4.0, original
    size = 2 * len(divisors)
    line = [
        (1 / (2 * math.pi * base ** (2 * i / size)), (1 / divisor - 1 / factor) / (1 - 1 / factor))
        for i, divisor in enumerate(divisors)
        if 1 + 1e-4 < divisor < factor * (1 - 1e-4)
    ]
    if len(line) < 2:
        return
    (x1, y1), (x2, y2) = line[0], line[-1]
    slope = (y2 - y1) / (x2 - x1)
    offset = y1 - slope * x1
    if slope <= 0 or offset >= 0:
        return
    ratio, positions = 1 - 1 / offset, -slope / offset  # high / low, original / low
    for low, digits in itertools.product((1.0, *(2.0**power / positions for power in range(4, 21))), (2, 4, 6)):
        yield round(low, digits), round(low * ratio, digits), round(low * positions)
