"""``config.json`` of Hugging Face models: what changes the computation is honoured or refused."""

from typing import Any, NamedTuple

from fisher_jax._support.errors import InputError, shown
from fisher_jax.models.checked_settings import MOST_HEAD, MOST_INDEX, MOST_LAYERS, MOST_SIZE, Settings
from fisher_jax.models.config import DecoderConfig, linear_divisors, llama3_divisors
from fisher_jax.models.number_ranges import EPSILON, ROPE_BASE, ROPE_FACTOR, ROPE_PART

__all__ = ["ARCHITECTURES", "config_from_hf"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


class Defaults(NamedTuple):
    """What transformers takes for settings that a ``config.json`` lacks; ``None``: it follows from others."""

    num_kv_heads: int | None = None
    head_size: int | None = None
    window: int | None = None


# For num_key_value_heads an absent setting is not the same as null, which stands for num_attention_heads.
DEFAULTS = {
    "llama": Defaults(),
    "mistral": Defaults(num_kv_heads=8, window=4096),
    "qwen2": Defaults(num_kv_heads=32, window=4096),
    "qwen3": Defaults(num_kv_heads=32, head_size=128, window=4096),
}
# By quantization_config.quant_method, as people call them.
QUANTIZATIONS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}


def config_from_hf(settings: Any, label: str, *, has_head: bool) -> DecoderConfig:
    """The decoder's shape from the content of a ``config.json``.

    ``has_head`` (the files hold an ``lm_head.weight``) decides about tying where the settings do not. A
    sliding window shorter than the positions becomes ``max_positions``: within one window both
    attentions are equal.
    """
    read = Settings(settings, f"the config.json of {label}")
    kind = read.text("model_type", None)
    architectures = read.texts("architectures", None) or [ARCHITECTURES.get(kind)]
    if kind not in ARCHITECTURES or architectures != [ARCHITECTURES[kind]]:
        found = shown(architectures[0] or kind)
        raise InputError(f"{label} is a {found}; supported: {', '.join(ARCHITECTURES.values())}")
    refuse_quantized(read, label)
    read.must("add_cross_attention", False)
    tied = read.boolean("tie_word_embeddings", kind == "gpt2" or not has_head)
    return gpt2_config(read, tied) if kind == "gpt2" else llama_config(read, kind, tied)


def refuse_quantized(read: Settings, label: str) -> None:
    """Weights of a few bits are called by the name of their method."""
    method = None
    if (found := read.inner("quantization_config")) is not None:
        by_bits = any(found.values.get(f"load_in_{bits}bit") for bits in (4, 8))
        name = found.text("quant_method", "bitsandbytes" if by_bits else "an unknown method")
        method = QUANTIZATIONS.get(name, name)
    elif read.get("quantization", None) is not None:
        method = "MLX"
    if method is not None:
        raise InputError(
            f"{label} is quantized with {shown(method)[1:-1]} (quantization_config), which is not read; load the "
            "model from which it was made, or a GGUF file of it"
        )


def llama_config(read: Settings, kind: str, tied: bool) -> DecoderConfig:
    read.must("hidden_act", "silu")
    read.must("partial_rotary_factor", 1.0, 1)
    num_heads, width = read.size("num_attention_heads"), read.size("hidden_size")
    num_layers = read.integer("num_hidden_layers", 1, MOST_LAYERS)
    head_size = read.integer("head_dim", 1, MOST_HEAD, DEFAULTS[kind].head_size) or share(
        read, "hidden_size", width, "num_attention_heads", num_heads
    )
    attention_bias = read.boolean("attention_bias", False) and kind in ("llama", "qwen3")
    max_positions = read.integer("max_position_embeddings", 1, MOST_INDEX)
    base, divisors = rotary(read, head_size)
    return DecoderConfig(
        vocab_size=read.size("vocab_size"),
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads(read, kind, num_heads),
        head_size=head_size,
        mlp_size=read.size("intermediate_size"),
        max_positions=min(max_positions, sliding_window(read, kind, num_layers) or max_positions),
        norm_eps=read.number("rms_norm_eps", 1e-6, **EPSILON),
        rope_base=base,
        rope_divisors=divisors,
        qkv_bias=attention_bias or kind == "qwen2",
        out_bias=attention_bias,
        mlp_bias=read.boolean("mlp_bias", False) and kind == "llama",
        qk_norm=kind == "qwen3",
        tied=tied,
    )


def num_kv_heads(read: Settings, kind: str, num_heads: int) -> int:
    default = num_heads if "num_key_value_heads" in read.values else DEFAULTS[kind].num_kv_heads or num_heads
    return read.size("num_key_value_heads", default)


def share(read: Settings, of: str, width: int, among: str, num_heads: int) -> int:
    if width % num_heads:
        raise InputError(f"{read.label} has {of} {width}, which is not a multiple of its {among} {num_heads}")
    return width // num_heads


def sliding_window(read: Settings, kind: str, num_layers: int) -> int | None:
    """The attention window, where a layer uses one.

    Llama has none. All layers of Mistral use it. Qwen's do where it is switched on: those that ``layer_types`` names,
    else those from ``max_window_layers`` on.
    """
    if kind == "llama":
        return None
    default = None if "sliding_window" in read.values else DEFAULTS[kind].window
    window = read.integer("sliding_window", 1, MOST_INDEX, default)
    if kind == "mistral":
        return window
    first = read.integer("max_window_layers", 0, MOST_INDEX, 28)
    types = read.texts("layer_types", None)
    if types is not None and (len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}):
        read.refuse("layer_types", f"{num_layers} times full_attention or sliding_attention")
    sliding = first < num_layers if types is None else "sliding_attention" in types
    return window if read.boolean("use_sliding_window", False) and sliding else None


def rotary(read: Settings, head_size: int) -> tuple[float, tuple[float, ...] | None]:
    """Base and divisors, from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""
    base = read.number("rope_theta", 10_000.0, **ROPE_BASE)
    scaling = read.inner("rope_parameters") or read.inner("rope_scaling")
    if scaling is None:
        return base, None
    if by_layer := [key for key, value in scaling.values.items() if isinstance(value, dict)]:
        raise InputError(f"{scaling.label} differs between kinds of layers ({shown(by_layer)}), which is not read")
    if (inner := scaling.number("rope_theta", None, **ROPE_BASE)) is not None:
        if read.get("rope_theta", inner) != inner:
            read.refuse("rope_theta", f"the {inner:g} of its rope_parameters")
        base = inner
    scaling.must("partial_rotary_factor", 1.0, 1)
    kind = scaling.text("rope_type", None) or scaling.text("type", "default")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, linear_divisors(scaling.number("factor", **ROPE_FACTOR), head_size)
    if kind == "llama3":
        low, high = (scaling.number(f"{end}_freq_factor", **ROPE_PART) for end in ("low", "high"))
        if low >= high:
            scaling.refuse("low_freq_factor", f"below its high_freq_factor {high:g}")
        return base, llama3_divisors(
            factor=scaling.number("factor", **ROPE_FACTOR),
            low_freq_factor=low,
            high_freq_factor=high,
            original_positions=scaling.integer("original_max_position_embeddings", 1, MOST_SIZE),
            base=base,
            head_size=head_size,
        )
    raise InputError(f"{read.label} has rotary scaling {shown(kind)}; supported: default, linear, llama3")


def gpt2_config(read: Settings, tied: bool) -> DecoderConfig:
    read.must("activation_function", "gelu_new", "gelu_pytorch_tanh")
    read.must("scale_attn_weights", True)
    read.must("scale_attn_by_inverse_layer_idx", False)
    width, num_heads = read.size("n_embd"), read.size("n_head")
    return DecoderConfig(
        vocab_size=read.size("vocab_size"),
        width=width,
        num_layers=read.integer("n_layer", 1, MOST_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=share(read, "n_embd", width, "n_head", num_heads),
        mlp_size=read.size("n_inner", 4 * width),
        max_positions=read.size("n_positions"),
        norm="layer",
        norm_eps=read.number("layer_norm_epsilon", 1e-5, **EPSILON),
        positions="learned",
        activation="gelu_tanh",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=tied,
    )
