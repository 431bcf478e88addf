"""The shape of a decoder: everything that is fixed before a weight is read."""

import dataclasses
import json
import math
from typing import Any

from fisher_jax._support.errors import InputError, shown

__all__ = ["DecoderConfig", "linear_divisors", "llama3_divisors", "yarn_divisors"]

CHOICES = {
    "norm": ("rms", "layer"),
    "norm_placement": ("before", "after", "around"),
    "residual": ("sequential", "parallel", "parallel_one_norm"),
    "qk_norm_scope": ("head", "heads", "width"),
    "positions": ("rotary", "learned"),
    "activation": ("silu", "gelu", "gelu_tanh"),
}
POSITIVE = (
    "norm_eps", "rope_base", "rope_amplitude", "local_rope_base", "embedding_multiplier", "residual_multiplier",
    "logit_multiplier", "attention_scale", "attention_soft_cap", "logit_soft_cap",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder. The defaults are Llama's; a family of models is a choice of these switches.

    Sizes: ``num_heads`` query heads share ``num_kv_heads`` key and value heads, each of ``head_size``, which need
    not be ``width / num_heads``.

    Norms:
    - ``norm``: ``"rms"``, or ``"layer"``, which subtracts the mean, with a bias where ``norm_bias``.
      ``norm_scale=False``: no scale. ``norm_plus_one``: the scale is ``1 + scale``.
    - ``norm_placement``: of attention and MLP, ``"before"`` (of their input), ``"after"`` (of their output, before it
      is added to the residual) or ``"around"`` (both).
    - ``qk_norm``: queries and keys are normed, each head alone with one scale for all (``qk_norm_scope="head"``) or a
      scale for each head (``"heads"``), or all heads as one vector (``"width"``).

    Residuals: ``residual="parallel"`` gives ``x + attention(norm(x)) + mlp(norm(x))`` with two norms, and
    ``"parallel_one_norm"`` with one. Each addend is multiplied by ``residual_multiplier``, the embedding by
    ``embedding_multiplier``, the final-normed hidden states by ``logit_multiplier``.

    Attention:
    - ``attention_scale``: of the products of queries and keys (``None``: ``head_size ** -0.5``);
      ``attention_soft_cap = c`` gives ``c tanh(logits / c)``.
    - ``window``: a position attends to itself and the ``window - 1`` before it, in the layers where
      ``window_layers`` is true (``None``: in all).

    Positions: ``"learned"``, or ``"rotary"`` with
    - ``rope_size``: the first so many coordinates of a head turn (``None``: all);
    - ``rope_divisors``: one number for each of the ``rope_size / 2`` frequencies, by which it is divided (``None``:
      all one); ``rope_divisors_long`` are those of rows of more than ``rope_original_positions`` tokens, padding
      included;
    - ``rope_amplitude``: cosine and sine are multiplied by it;
    - ``local_rope_base``: the base in layers with a window, whose frequencies are not divided;
    - ``rope_layers``: the layers where queries and keys are turned at all (``None``: all).

    Experts: with ``num_experts`` every MLP, gated and without biases, is as many of them. A token goes to the
    ``experts_per_token`` that its router gives most; their weights add up to one where ``norm_expert_weights``,
    else to their share of the router's softmax.

    Head: ``tied``: it is the embedding. ``head_bias``: it has a bias. ``logit_soft_cap = c`` gives
    ``c tanh(logits / c)``.

    Hashable, hence usable as a static argument. Raises ``InputError`` for values that do not fit together.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    mlp_size: int
    max_positions: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    norm_scale: bool = True
    norm_plus_one: bool = False
    norm_placement: str = "before"
    residual: str = "sequential"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    positions: str = "rotary"
    rope_base: float = 10_000.0
    rope_size: int | None = None
    rope_divisors: tuple[float, ...] | None = None
    rope_divisors_long: tuple[float, ...] | None = None
    rope_original_positions: int | None = None
    rope_amplitude: float = 1.0
    local_rope_base: float | None = None
    rope_layers: tuple[bool, ...] | None = None
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    norm_expert_weights: bool = True
    head_bias: bool = False
    qk_norm: bool = False
    qk_norm_scope: str = "head"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    tied: bool = True
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_type(field, getattr(self, field.name))
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"the model's {name} is {value!r}, but must be one of {', '.join(allowed)}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key and value heads evenly; "
                "num_heads must be a multiple of num_kv_heads"
            )
        self.check_positions()
        self.check_experts()
        if self.norm_placement != "before" and self.residual != "sequential":
            raise InputError(f"a {self.residual} residual needs norm_placement 'before'")

    def check_experts(self) -> None:
        if (self.num_experts is None) != (self.experts_per_token is None):
            raise InputError("num_experts and experts_per_token must be given together")
        if self.num_experts is None or self.experts_per_token is None:
            return
        if self.experts_per_token > self.num_experts:
            raise InputError(f"a token goes to {self.experts_per_token} experts, but there are {self.num_experts}")
        if self.mlp_bias or not self.gated:
            raise InputError("experts are gated and have no biases")

    def check_positions(self) -> None:
        """Frequencies and layers, each as many as there are."""
        if self.positions == "rotary" and self.head_size % 2 and self.rope_size is None:
            raise InputError(f"rotary positions need an even head size, found {self.head_size}")
        if self.rotary_size % 2 or self.rotary_size > self.head_size:
            raise InputError(f"rope_size is {self.rope_size}, but must be even and at most {self.head_size}")
        for name in ("rope_divisors", "rope_divisors_long"):
            if (divisors := getattr(self, name)) is not None and len(divisors) != self.rotary_size // 2:
                raise InputError(
                    f"found {len(divisors)} rotary divisors, wanted one per frequency: {self.rotary_size // 2}"
                )
        if (self.rope_divisors_long is None) != (self.rope_original_positions is None):
            raise InputError("rope_divisors_long and rope_original_positions must be given together")
        for name in ("rope_layers", "window_layers"):
            if (layers := getattr(self, name)) is not None and len(layers) != self.num_layers:
                raise InputError(f"{name} has {len(layers)} layers, but the model has {self.num_layers}")
        if self.local_rope_base is not None and (self.window is None or self.rope_layers is not None):
            raise InputError("local_rope_base needs a window and no rope_layers")
        if self.window_layers is not None and self.window is None:
            raise InputError("window_layers needs a window")

    @property
    def rotary_size(self) -> int:
        """How many coordinates of a head turn."""
        return self.head_size - self.head_size % 2 if self.rope_size is None else self.rope_size

    def to_json(self) -> str:
        """One line of JSON with sorted keys; `from_json` gives back an equal configuration."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "DecoderConfig":
        """The configuration that `to_json` wrote; switches that it does not name have their defaults."""
        fields: dict[str, Any] = json.loads(text)
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        return DecoderConfig(**fields)


def check_type(field: dataclasses.Field, value: Any) -> None:
    """An ``InputError`` for a value of another type, or for a number that is not positive."""
    optional = field.type not in (int, float, bool, str)
    if value is None and optional:
        return
    if field.type in (int, int | None):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"the model's {field.name} is {shown(value)}, but must be a whole number, at least 1")
    elif field.name in POSITIVE or field.name.startswith("rope_divisors"):
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise InputError(f"the model's {field.name} is {shown(number)}, but must be a positive number")
    elif field.name in ("rope_layers", "window_layers") and not (
        isinstance(value, tuple) and all(isinstance(x, bool) for x in value)
    ):
        raise InputError(f"the model's {field.name} is {shown(value)}, but must be a tuple of booleans")


def linear_divisors(factor: float, rope_size: int) -> tuple[float, ...]:
    """Linear position interpolation: every frequency is divided by ``factor``."""
    return (float(factor),) * (rope_size // 2)


def llama3_divisors(
    *, factor: float, low_freq_factor: float, high_freq_factor: float, original_positions: int,
    base: float, head_size: int,
) -> tuple[float, ...]:  # fmt: skip
    """Llama 3.1's scaling: long wavelengths divided by ``factor``, short ones kept, a blend in between.

    With ``r = original_positions / wavelength`` and
    ``s = (r - low) / (high - low)`` clipped to [0, 1], a frequency becomes ``f * (s + (1 - s) / factor)``.
    """
    divisors = []
    for i in range(head_size // 2):
        wavelength = 2 * math.pi * base ** (2 * i / head_size)
        smooth = (original_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        divisors.append(1.0 / (smooth + (1.0 - smooth) / factor))
    return tuple(divisors)


def yarn_divisors(
    *, factor: float, beta_fast: float, beta_slow: float, original_positions: int, base: float, rope_size: int,
    truncate: bool = True,
) -> tuple[float, ...]:  # fmt: skip
    """YaRN's scaling (Peng et al. 2023): fast frequencies kept, slow ones divided by ``factor``.

    Frequency ``i`` turns ``beta`` times within the original positions at
    ``i(beta) = rope_size log(original / (2 pi beta)) / (2 log(base))``; from ``i(beta_fast)`` to ``i(beta_slow)``,
    rounded outwards where ``truncate``, the share of the divided frequency rises from 0 to 1 in a line.
    """

    def place(beta: float) -> float:
        return rope_size * math.log(original_positions / (2 * math.pi * beta)) / (2 * math.log(base))

    low, high = place(beta_fast), place(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_size - 1)
    high = high + 0.001 if low == high else high  # as published, against a division by zero
    shares = (min(max((i - low) / (high - low), 0.0), 1.0) for i in range(rope_size // 2))
    return tuple(1.0 / (share / factor + 1.0 - share) for share in shares)
