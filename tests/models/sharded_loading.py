"""Run with eight virtual devices, `sharded_loading.py FOLDER`: models loaded whole and in parts, compared."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import gguf
import jax
import ml_dtypes
import numpy as np
import published_models
import tiny_models as tiny
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from reference_models import reference, write_folder

from fisher_jax import models
from fisher_jax._support.errors import InputError
from fisher_jax.models.weight_names import flatten

TIED = tiny.DecoderConfig(
    vocab_size=272, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, mlp_size=64, max_positions=16,
    rope_base=100.0, tied=True,
)  # fmt: skip
ROLES = {
    "width": "data", "vocab": ("model", "rest"), "heads": ("model", "rest"), "kv_heads": "model", "mlp": "model",
    "experts": "rest",
}  # fmt: skip


def folder_of(path, name, dtype):
    found = reference(name)
    return write_folder(path / f"{name}-{np.dtype(dtype).name}", found.settings, {
        key: tensor.astype(dtype) for key, tensor in found.tensors.items()
    })  # fmt: skip


def sources(path):
    """Tied, fused side by side and by head, experts, interleaved rows, rows of bytes, norms of heads."""
    params = tiny.random_params(TIED)
    quantized = gguf.GGMLQuantizationType.Q8_0
    return {
        "tied": published_models.llama_folder(path / "tied", TIED),
        "fused": folder_of(path, "phi3", np.float32),
        "by_head": folder_of(path, "gpt_neox", ml_dtypes.bfloat16),
        "experts": folder_of(path, "mixtral", ml_dtypes.bfloat16),
        "gguf": tiny.write_gguf(path / "tied.gguf", TIED, params),
        "quantized": tiny.write_gguf(path / "quantized.gguf", TIED, params, quantized=quantized),
        "norms": folder_of(path, "gemma3", np.float32),
    }


def same_bits(a, b):
    return all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def compared(source, mesh):
    """Whether each sharding gives the bits of the plain load, and where the leaves lie."""
    plain = models.load(source, dtype="auto")
    found = models.load(source, dtype="auto", sharding=models.sharding_rules(mesh, **ROLES))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = jax.tree.map(lambda leaf: SingleDeviceSharding(jax.devices()[3]), plain.params)
    others = [models.load(source, dtype="auto", sharding=one) for one in (whole, tree)]
    return {
        "dtype": found.dtype,
        "same": [same_bits(plain.params, one.params) for one in (found, *others)],
        "fingerprints": len({one.fingerprint for one in (plain, found, *others)}),
        "specs": {path: list(leaf.sharding.spec) for path, leaf in flatten(found.params).items()},
        "shards": {path: leaf.addressable_shards[0].data.shape for path, leaf in flatten(found.params).items()},
        "device": [device.id for device in jax.tree.leaves(others[1].params)[0].devices()],
    }


def refused(source, make):
    try:
        models.load(source, sharding=make())
    except InputError as error:
        return str(error)


def main(path):
    kinds = (AxisType.Auto, AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((2, 2, 2), ("data", "model", "rest"), axis_types=kinds)
    found = {name: compared(source, mesh) for name, source in sources(path).items()}
    rules, place = models.sharding_rules, NamedSharding(mesh, PartitionSpec(("data", "model", "rest")))
    refusals = {
        "uneven": lambda: rules(jax.make_mesh((3,), ("model",), devices=jax.devices()[:3]), heads="model"),
        "one axis": lambda: rules(mesh, kv_heads=("data", "model"), width="data"),
        "role": lambda: rules(mesh, embed="data"),
        "axis": lambda: rules(mesh, width="tensor"),
        "cut": lambda: place,
        "no sharding": lambda: lambda path, shape: PartitionSpec(),
        "tree": lambda: {"embedding": place},
    }
    return found, {name: refused(path / "tied", make) for name, make in refusals.items()}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
