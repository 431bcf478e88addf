"""Run twice, as ``python -m tests.checkpoint.two_processes ADDRESS NUMBER FOLDER``: a state on both processes."""

import json
import pathlib
import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def main(address: str, number: int, folder: pathlib.Path) -> dict:
    jax.distributed.initialize(address, num_processes=2, process_id=number, local_device_ids=None)
    import jax.numpy as jnp

    import fisher_jax as fj

    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    mesh = Mesh(np.array(jax.devices()).reshape(-1, 2), ("a", "b"))

    def put(x, *spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])

    state = {
        "both": put(values, "a", "b"),
        "rows": put(values.astype(np.int32), "b"),
        "all": put(values[0]),
        "step": 3,
        "host": np.arange(3),
        "local": jnp.ones(2),
    }
    for _ in range(3):
        fj.checkpoint.save(folder / "state", state, metadata={"model": "tiny"})
    try:
        fj.checkpoint.save(folder / "state", {**state, "local": (lambda: 0) if number == 1 else 1})
    except TypeError as error:
        refused = str(error)
    found = fj.checkpoint.restore(folder / "state")
    report = {name: np.asarray(found[name]).tolist() for name in state}
    other = {**state, "both": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=NamedSharding(mesh, P("b", "a")))}
    again = fj.checkpoint.restore(folder / "state", like=other)["both"]
    assert again.sharding.spec == P("b", "a")
    for shard in again.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), values[shard.index])
    return {**report, "refused": refused, "revision": fj.checkpoint.revision(folder / "state")}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))) + "\n")
