"""Where the pre-tokenizers that GGUF files name cut a text into words before byte-pair encoding."""

from typing import Any, NamedTuple

__all__ = ["PRE_TOKENIZERS", "Pre"]


class Pre(NamedTuple):
    """A pre-tokenizer as it was published with its models, with llama.cpp's defaults for what a file does not say.

    Attributes:
        patterns: each cuts what the ones before left whole into its matches and what lies between them.
        composes: whether a text is brought into the normal form NFC before.
        adds_bos: whether a text begins with the beginning-of-text token.
        ignores_merges: whether a word that is a token is taken as it is, and not built from merges.
    """

    patterns: tuple[str, ...]
    composes: bool = False
    adds_bos: bool = False
    ignores_merges: bool = False

    def cut(self, tokenizers: Any) -> Any:
        """The pre-tokenizer, which ends in GPT-2's alphabet of bytes."""
        kinds = tokenizers.pre_tokenizers
        # GPT-2's own pattern is built into the last step.
        plain = self.patterns[-1] == GPT2
        steps = [*map(kinds_of(tokenizers), self.patterns[: -1 if plain else None])]
        last = kinds.ByteLevel(add_prefix_space=False, use_regex=plain)
        return kinds.Sequence([*steps, last]) if steps else last


def kinds_of(tokenizers: Any):
    kinds = tokenizers.pre_tokenizers

    def step(pattern: str) -> Any:
        if pattern == DIGIT:
            return kinds.Digits(individual_digits=True)
        return kinds.Split(tokenizers.Regex(pattern), "isolated")

    return step


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", DIGIT)
# Words change at the step from small to capital letters.
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
SIGNS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
GPT4O = "|".join([*(f"{word}{CONTRACTION}?" for word in CASED), r"\p{N}{1,3}", SIGNS])
TEKKEN = "|".join([*CASED, DIGIT, SIGNS])
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{SPACES}",
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", DIGIT)
# What llama.cpp does for a file that names no better one.
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

PRE_TOKENIZERS = {
    **dict.fromkeys(("gpt-2", "phi-2"), Pre((GPT2,))),
    **dict.fromkeys(("olmo", "mpt"), Pre((GPT2,), composes=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact"), Pre((DIGIT, GPT2))),
    "command-r": Pre((DIGIT, GPT2), composes=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Pre((LLAMA3,), adds_bos=True, ignores_merges=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Pre((LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2"), Pre((QWEN2,), composes=True)),
    "deepseek-r1-qwen": Pre((QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), Pre((GPT4O,))),
    "tekken": Pre((TEKKEN,), adds_bos=True, ignores_merges=True),
    "deepseek-v3": Pre(DEEPSEEK_V3),
    "deepseek-coder": Pre(DEEPSEEK_CODER),
    "default": Pre(DEFAULT),
}
