"""Files that claim far more than they hold, and a process that loads each of them and says what it took.

`bombs.py write FOLDER` writes them, `bombs.py load FOLDER` loads them and exits with 1 where one took too much: two
processes, since writing takes memory too.
"""

import json
import resource
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tiny_models as tiny
from published_models import llama_folder, write_json

from fisher_jax import models
from fisher_jax._support.errors import InputError

MOST_MIB, MOST_SECONDS = 300, 10


def write(root: Path) -> int:
    llama_folder(root / "small")
    write_json(root / "bombs.json", {name: str(path) for name, path in bombs(root)})
    return 0


def load(root: Path) -> int:
    models.load(root / "small")  # what reading takes by itself: imports, compiled programs
    start, failed = peak(), False
    for name, path in json.loads((root / "bombs.json").read_text()).items():
        began = time.monotonic()
        try:
            models.load(path)
            outcome = "ACCEPTED"
        except InputError as error:
            outcome = f"refused: {error}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        seconds, more = time.monotonic() - began, peak() - start
        bad = not outcome.startswith("refused") or seconds > MOST_SECONDS or more > MOST_MIB
        failed |= bad
        sys.stdout.write(f"{'BAD ' if bad else ''}{name}: {seconds:.1f} s, {more:.0f} MiB: {outcome[:200]}\n")
    return int(failed)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bombs(root: Path):
    def settings(name, **changes):
        return name, llama_folder(root / name.replace(" ", "-"), **changes)

    for key in (
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "intermediate_size",
        "num_attention_heads",
        "head_dim",
    ):
        yield settings(f"{key} 1e9", **{key: 10**9})
    yield settings("many layers", num_hidden_layers=10**7)
    yield settings("wide heads", head_dim=2**24, rope_scaling={"rope_type": "linear", "factor": 2.0})
    folder = llama_folder(root / "long-settings")
    (folder / "config.json").write_text("[" + "{}," * 40_000_000 + "{}]")
    yield "120 MB of settings", folder
    folder = llama_folder(root / "long-header")
    header = b"{" + b" " * 90_000_000 + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    yield "a header of 90 MB", folder
    folder = llama_folder(root / "words")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 10**9
    write_json(folder / "tokenizer.json", content)
    yield "a token id of 1e9", folder
    folder = llama_folder(root / "many-words")
    content["model"]["vocab"] = {f"w{i}": i for i in range(3_000_000)}
    write_json(folder / "tokenizer.json", content)
    yield "three million tokens for 268 rows", folder
    file = tiny.write_gguf(root / "string.gguf", tiny.LLAMA, tiny.random_params(tiny.LLAMA))
    raw = bytearray(file.read_bytes())
    at = raw.index(b"general.architecture") + len(b"general.architecture")
    raw[at : at + 4] = struct.pack("<I", 9)  # the type byte of a string says array
    file.write_bytes(raw)
    yield "a string whose type says array", file
    file = root / "array.gguf"
    key = b"tokenizer.ggml.tokens"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    for name, kind, count in (("bytes", 0, 10**9), ("strings", 8, 10**9), ("arrays", 9, 2**60)):
        file = root / f"{name}.gguf"
        with file.open("wb") as opened:
            opened.write(head + struct.pack("<IIQ", 9, kind, count))
            opened.truncate(1_200_000_000)
        yield f"an array of 1e9 {name} in a file with holes", file


if __name__ == "__main__":
    sys.exit({"write": write, "load": load}[sys.argv[1]](Path(sys.argv[2])))
