"""The tokenizer inside a GGUF file: byte-level BPE from its tokens, merges and kind of pre-tokenizer."""

from fisher_jax.errors import InputError
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.optional import optional
from fisher_jax.models.tokenizer import Tokenizer

__all__ = ["tokenizer_from_gguf"]

# How words are cut before BPE, as published with these models; None is GPT-2's pattern, built into ByteLevel.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3,
    "qwen2": LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}
CONTROL, USER_DEFINED = 3, 4


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """The file's tokenizer; an ``InputError`` that names its kind where that is not supported."""
    tokenizers = optional("tokenizers", "a tokenizer")
    model = file.metadata("tokenizer.ggml.model")
    if model != "gpt2":
        raise InputError(
            f"{file.label} has a tokenizer of the kind {model!r}; only byte-level BPE ('gpt2') is read "
            "from GGUF files, so load the model's Hugging Face folder with its tokenizer.json instead"
        )
    kind = file.metadata("tokenizer.ggml.pre")
    if kind not in PATTERNS:
        raise InputError(
            f"{file.label} has the pre-tokenizer {kind!r}; supported: {', '.join(PATTERNS)}; "
            "load the model's Hugging Face folder with its tokenizer.json instead"
        )
    tokens, types = file.metadata("tokenizer.ggml.tokens"), file.metadata("tokenizer.ggml.token_type")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"{file.label} names {len(tokens) - len(vocabulary)} of its tokens twice")
    merges = [tuple(merge.split(" ")) for merge in file.metadata("tokenizer.ggml.merges")]
    try:
        bpe = tokenizers.models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe")
    except Exception as error:  # the package raises plain Exception
        raise InputError(f"the merges of {file.label} do not fit its tokens: {error}") from error
    backend = tokenizers.Tokenizer(bpe)
    if kind == "qwen2":
        backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer(tokenizers, kind)
    backend.decoder = tokenizers.decoders.ByteLevel()
    for token, type in zip(tokens, types, strict=True):
        if type in (CONTROL, USER_DEFINED):
            added = tokenizers.AddedToken(token, special=type == CONTROL, normalized=False)
            backend.add_special_tokens([added]) if type == CONTROL else backend.add_tokens([added])
    frame = {
        end: tokens[file.metadata(f"tokenizer.ggml.{end}_token_id")]
        for end in ("bos", "eos")
        if file.metadata(f"tokenizer.ggml.add_{end}_token", False)
    }
    if frame:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[
                *([frame["bos"]] if "bos" in frame else []),
                "$A",
                *([frame["eos"]] if "eos" in frame else []),
            ],
            special_tokens=[(token, vocabulary[token]) for token in frame.values()],
        )
    return Tokenizer(backend)


def pre_tokenizer(tokenizers, kind: str):
    cut, pattern = tokenizers.pre_tokenizers, PATTERNS[kind]
    bytes_only = cut.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if kind == "smollm":
        return cut.Sequence([cut.Digits(individual_digits=True), bytes_only])
    if pattern is None:
        return bytes_only
    return cut.Sequence([cut.Split(tokenizers.Regex(pattern), "isolated"), bytes_only])
