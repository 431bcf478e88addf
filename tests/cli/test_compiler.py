"""The command turns off what its compiler is known to get wrong, and nothing else."""

import os
import subprocess
import sys

import pytest

from fisher_jax.cli.run.compiler import without_faulty_fusions

FLAG = "--xla_cpu_experimental_ynn_fusion_type"

# In the last sum one factor lacks the first axis; beyond 128 KiB jaxlib 0.10.2 takes the wrong entries of it. The
# first multiplies a batch of matrices by a constant.
PROGRAM = """
import os, sys
from fisher_jax.cli.run.compiler import avoid_faulty_fusions
assert "jax" not in sys.modules
avoid_faulty_fusions(os.environ, "report")
import jax, jax.numpy as jnp, numpy as np
rng = np.random.default_rng(0)
E, g, x = (rng.normal(size=s).astype(np.float32) for s in ((5, 60, 60), (16, 512, 16), (512, 16)))
first = lambda E: ((E @ jnp.full(E.shape, 0.5, E.dtype)) * E).sum(-1)
last = lambda g, x: g + (x[None] * g).sum(-1, keepdims=True)
def error(f, *arrays):
    wanted = np.asarray(f(*(a.astype(np.float64) for a in arrays)))
    return np.abs(np.asarray(jax.jit(f)(*arrays)) - wanted).max() / np.abs(wanted).max()
print(os.environ.get("XLA_FLAGS"), error(first, E) < 1e-5 and error(last, g, x) < 1e-5)
"""


def run(flags):
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ | flags, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_sums_of_products_are_right_in_the_process_of_the_command():
    *flags, right = run({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    assert flags[0] == "--xla_force_host_platform_device_count=2"
    assert right == "True"


@pytest.mark.parametrize("version", ["0.10.1", "0.13.0", "0.10.20", None])
def test_a_version_that_was_not_seen_to_be_faulty_gets_no_flag(version):
    assert without_faulty_fusions({"XLA_FLAGS": "--xla_a=b"}, version) == {}


def test_the_flag_is_appended_and_what_a_person_says_about_it_stays():
    assert without_faulty_fusions({}, "0.10.2") == {"XLA_FLAGS": f"{FLAG}=-reduce"}
    assert without_faulty_fusions({"XLA_FLAGS": "--xla_a=b"}, "0.10.2") == {"XLA_FLAGS": f"--xla_a=b {FLAG}=-reduce"}
    for own in (f"{FLAG}=", f"--xla_a=b {FLAG}=reduce --xla_c=d"):
        assert without_faulty_fusions({"XLA_FLAGS": own}, "0.10.2") == {}
