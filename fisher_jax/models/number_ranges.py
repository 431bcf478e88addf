"""Which numbers a decoder can have at all, for every reader of settings."""

__all__ = ["EPSILON", "MULTIPLIER", "ROPE_BASE", "ROPE_FACTOR", "ROPE_PART"]

# Published ones go from 1e-8 to 1e-3, from 1e4 to 1e9, and from 1 to 100; multipliers from 1e-3 to 50.
EPSILON = {"low": 1e-20, "high": 1.0}
ROPE_BASE = {"low": 1.0, "high": 1e15}
ROPE_FACTOR = {"low": 1.0, "high": 1e6}
ROPE_PART = {"low": 1e-3, "high": 1e6}
MULTIPLIER = {"low": 1e-6, "high": 1e6}
