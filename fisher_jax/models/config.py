"""The shape of a decoder: everything that is fixed before a weight is read."""

import dataclasses
import json
import math

from fisher_jax._support.errors import InputError, shown

__all__ = ["DecoderConfig", "linear_divisors", "llama3_divisors"]

CHOICES = {"norm": ("rms", "layer"), "positions": ("rotary", "learned"), "activation": ("silu", "gelu_tanh")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A causal decoder of the Llama or GPT-2 family.

    Llama, Mistral, Qwen2 and Qwen3 are ``norm="rms"``, ``positions="rotary"``, ``activation="silu"``,
    ``gated=True``; GPT-2 is ``norm="layer"``, ``positions="learned"``, ``activation="gelu_tanh"``,
    ``gated=False`` with all biases.

    - ``num_heads`` query heads share ``num_kv_heads`` key and value heads, each of ``head_size``, which need
      not be ``width / num_heads``.
    - ``rope_divisors``: one number per rotary frequency, ``head_size / 2`` of them, by which that frequency
      is divided (``None``: all one). Linear and Llama-3 scaling are both of this form.
    - ``tied``: the head is the embedding. ``logit_soft_cap = c`` gives ``c tanh(logits / c)``.

    Hashable, hence usable as a static argument. Raises ``InputError`` for sizes that do not fit together.
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
    positions: str = "rotary"
    rope_base: float = 10_000.0
    rope_divisors: tuple[float, ...] | None = None
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = True
    logit_soft_cap: float | None = None

    def __post_init__(self) -> None:
        for name in (field.name for field in dataclasses.fields(self) if field.type is int):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise InputError(f"the model's {name} is {shown(size)}, but must be a whole number, at least 1")
        positive = {name: getattr(self, name) for name in ("norm_eps", "rope_base", "logit_soft_cap")}
        for name, value in (*positive.items(), *(("rope_divisors", x) for x in self.rope_divisors or ())):
            optional = name == "logit_soft_cap" and value is None
            if not optional and not (isinstance(value, int | float) and 0 < value < math.inf):
                raise InputError(f"the model's {name} is {shown(value)}, but must be a positive number")
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"the model's {name} is {value!r}, but must be one of {', '.join(allowed)}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key and value heads evenly; "
                "num_heads must be a multiple of num_kv_heads"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise InputError(f"rotary positions need an even head size, found {self.head_size}")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_size // 2:
            raise InputError(
                f"found {len(self.rope_divisors)} rotary divisors, wanted one per frequency: {self.head_size // 2}"
            )

    def to_json(self) -> str:
        """One line of JSON with sorted keys; `from_json` gives back an equal configuration."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> "DecoderConfig":
        """The configuration that `to_json` wrote."""
        fields = json.loads(text)
        if fields["rope_divisors"] is not None:
            fields["rope_divisors"] = tuple(fields["rope_divisors"])
        return DecoderConfig(**fields)


def linear_divisors(factor: float, head_size: int) -> tuple[float, ...]:
    """Linear position interpolation: every frequency is divided by ``factor``."""
    return (float(factor),) * (head_size // 2)


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
