"""Run twice, as ``python -m tests.models.two_processes_loading ADDRESS NUMBER FOLDER``: each reads its part."""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import jax
import numpy as np


def counting(kind):
    class Counting(kind):
        read = 0

        def values(self, name, rows):
            self.read += rows.nbytes
            return super().values(name, rows)

    return Counting


def main(address: str, number: int, folder: Path) -> dict:
    jax.distributed.initialize(address, num_processes=2, process_id=number)
    import gguf
    import published_models
    import tiny_models as tiny
    from sharded_loading import TIED

    from fisher_jax import models
    from fisher_jax._support.errors import InputError
    from fisher_jax.models.gguf_file import GgufFile
    from fisher_jax.models.hf_folder import HfFolder
    from fisher_jax.models.shardings import shardings_of

    folder, params = folder / str(number), tiny.random_params(TIED)
    folder.mkdir()
    sources = {
        "folder": published_models.llama_folder(folder / "folder", TIED),
        "gguf": tiny.write_gguf(folder / "tiny.gguf", TIED, params, quantized=gguf.GGMLQuantizationType.Q8_0),
    }
    rules = models.sharding_rules(jax.make_mesh((4,), ("model",)), vocab="model", heads="model", kv_heads="model",
                                  mlp="model")  # fmt: skip
    shardings = shardings_of(rules, models.abstract_params(TIED))
    plain = {name: models.load(source) for name, source in sources.items()}
    parts = {name: models.load(source, sharding=rules) for name, source in sources.items()}
    files = {"folder": counting(HfFolder)(sources["folder"]), "gguf": counting(GgufFile)(sources["gguf"])}
    held, whole = {}, {}
    for name, file in files.items():
        shards = [x for leaf in jax.tree.leaves(file.params(TIED, np.float32, shardings))
                  for x in {str(shard.index): shard.data for shard in leaf.addressable_shards}.values()]  # fmt: skip
        held[name] = sum(shard.nbytes for shard in shards)
        read, file.read = file.read, 0
        file.params(TIED, np.float32)
        whole[name], file.read = file.read, read
    report = {
        "same": {name: same(plain[name].params, parts[name].params) for name in sources},
        "fingerprints": [model.fingerprint for model in parts.values()],
        "wanted": [model.fingerprint for model in plain.values()],
        "read": {name: file.read for name, file in files.items()},
        "held": held,
        "all": whole,
    }
    # The last row of the embedding lies on a device of the second process.
    damaged = np.array(params["embedding"])
    damaged[-1] = np.nan
    tensors = {"model.embed_tokens.weight": damaged}
    bad = published_models.llama_folder(folder / "bad", TIED, tensors=tensors)
    other = published_models.llama_folder(folder / "other", dataclasses.replace(TIED, num_layers=1 + number))
    for case, source in {"refused": bad, "different": other}.items():
        try:
            models.load(source, sharding=rules)
        except InputError as error:
            report[case] = str(error)
    return report


def same(plain, parts):
    return all(
        np.array_equal(np.asarray(shard.data), np.asarray(whole)[shard.index])
        for whole, leaf in zip(jax.tree.leaves(plain), jax.tree.leaves(parts), strict=True)
        for shard in leaf.addressable_shards
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))) + "\n")
