"""``config.json`` of Hugging Face models: what changes the computation is honoured or refused."""

from typing import Any

from fisher_jax.errors import InputError
from fisher_jax.models.config import DecoderConfig, linear_divisors, llama3_divisors

__all__ = ["config_from_hf"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def config_from_hf(settings: dict, label: str, *, has_head: bool) -> DecoderConfig:
    """The decoder's shape from the content of a ``config.json``.

    ``has_head`` (the files hold an ``lm_head.weight``) decides about tying where the settings do not. A
    sliding window shorter than the positions becomes ``max_positions``: within one window both
    attentions are equal.
    """
    kind = settings.get("model_type")
    architectures = settings.get("architectures") or [ARCHITECTURES.get(str(kind))]
    if kind not in ARCHITECTURES or architectures != [ARCHITECTURES[kind]]:
        found = architectures[0] or kind
        raise InputError(f"{label} is a {found}; supported: {', '.join(ARCHITECTURES.values())}")
    read = Settings(settings, label)
    read.must("quantization_config", None)
    read.must("add_cross_attention", False)
    tied = settings.get("tie_word_embeddings")
    tied = not has_head if tied is None else bool(tied)
    return gpt2_config(read, tied) if kind == "gpt2" else llama_config(read, kind, tied)


class Settings:
    """A ``config.json`` that names itself in its errors."""

    def __init__(self, values: dict, label: str):
        self.values, self.label = values, label

    def get(self, key: str, default: Any = ...) -> Any:
        """A setting; ``null`` counts as absent; without a default an absent one is an ``InputError``."""
        if (value := self.values.get(key)) is not None:
            return value
        if default is ...:
            raise InputError(f"the config.json of {self.label} has no {key}")
        return default

    def must(self, key: str, *allowed: Any) -> None:
        """Refuse any value but the allowed ones, the first of which is meant where the setting is absent."""
        if (found := self.get(key, allowed[0])) not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise InputError(f"{self.label} has {key} {found!r}; supported: {wanted}")


def llama_config(read: Settings, kind: str, tied: bool) -> DecoderConfig:
    read.must("hidden_act", "silu")
    read.must("partial_rotary_factor", 1.0)
    num_heads, width = read.get("num_attention_heads"), read.get("hidden_size")
    head_size = read.get("head_dim", width // num_heads)
    attention_bias = read.get("attention_bias", False) and kind in ("llama", "qwen3")
    max_positions = read.get("max_position_embeddings")
    base, divisors = rotary(read, head_size)
    return DecoderConfig(
        vocab_size=read.get("vocab_size"),
        width=width,
        num_layers=read.get("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=read.get("num_key_value_heads", num_heads),
        head_size=head_size,
        mlp_size=read.get("intermediate_size"),
        max_positions=min(max_positions, sliding_window(read, kind) or max_positions),
        norm_eps=read.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_divisors=divisors,
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=read.get("mlp_bias", False) and kind == "llama",
        qk_norm=kind == "qwen3",
        tied=tied,
    )


def sliding_window(read: Settings, kind: str) -> int | None:
    """The attention window, where one is in force. Llama has none; Qwen has one only if it is switched on."""
    if kind == "llama" or (kind in ("qwen2", "qwen3") and not read.get("use_sliding_window", False)):
        return None
    return read.get("sliding_window", None)


def rotary(read: Settings, head_size: int) -> tuple[float, tuple[float, ...] | None]:
    """Base and divisors, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""
    scaling = Settings(read.get("rope_parameters", None) or read.get("rope_scaling", {}), read.label)
    base = float(scaling.get("rope_theta", None) or read.get("rope_theta", 10_000.0))
    scaling.must("partial_rotary_factor", 1.0)
    kind = scaling.get("rope_type", None) or scaling.get("type", "default")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, linear_divisors(scaling.get("factor"), head_size)
    if kind == "llama3":
        return base, llama3_divisors(
            factor=scaling.get("factor"),
            low_freq_factor=scaling.get("low_freq_factor"),
            high_freq_factor=scaling.get("high_freq_factor"),
            original_positions=scaling.get("original_max_position_embeddings"),
            base=base,
            head_size=head_size,
        )
    raise InputError(f"{read.label} has rotary scaling {kind!r}; supported: default, linear, llama3")


def gpt2_config(read: Settings, tied: bool) -> DecoderConfig:
    read.must("activation_function", "gelu_new", "gelu_pytorch_tanh")
    read.must("scale_attn_weights", True)
    read.must("scale_attn_by_inverse_layer_idx", False)
    width, num_heads = read.get("n_embd"), read.get("n_head")
    if width % num_heads:
        raise InputError(f"{read.label} has n_embd {width}, which is not a multiple of its n_head {num_heads}")
    return DecoderConfig(
        vocab_size=read.get("vocab_size"),
        width=width,
        num_layers=read.get("n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=width // num_heads,
        mlp_size=read.get("n_inner", 4 * width),
        max_positions=read.get("n_positions"),
        norm="layer",
        norm_eps=read.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=tied,
    )
