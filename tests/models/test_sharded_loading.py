"""Models loaded in parts, over eight devices and by two processes, have the bits of the plain load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.test_two_processes import run_two
from tests.eight_devices import FLAGS

SCRIPT = Path(__file__).parent / "sharded_loading.py"
MODELS = {
    "tied": "float32", "fused": "float32", "by_head": "bfloat16", "experts": "bfloat16", "gguf": "float32",
    "quantized": "bfloat16", "norms": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    command = [sys.executable, "-W", "error", str(SCRIPT), str(tmp_path_factory.mktemp("sharded"))]
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MODELS)
def test_parts_have_the_bits_of_the_plain_load(findings, name):
    found = findings[0][name]
    assert found["same"] == [True, True, True]
    assert found["dtype"] == MODELS[name]
    assert found["fingerprints"] == 1
    assert found["device"] == [3]


def test_axes_lie_where_their_roles_say(findings):
    specs = {name: found["specs"] for name, found in findings[0].items()}
    both = ["model", "rest"]
    assert specs["tied"] == {
        "embedding": [both, "data"],
        "final_norm/scale": ["data"],
        "layers/attention/q/kernel": [None, "data", both],
        "layers/attention/k/kernel": [None, "data", "model"],
        "layers/attention/v/kernel": [None, "data", "model"],
        "layers/attention/o/kernel": [None, both, "data"],
        "layers/attention_norm/scale": [None, "data"],
        "layers/mlp/gate/kernel": [None, "data", "model"],
        "layers/mlp/up/kernel": [None, "data", "model"],
        "layers/mlp/down/kernel": [None, "model", "data"],
        "layers/mlp_norm/scale": [None, "data"],
    }
    assert specs["experts"]["layers/mlp/experts/down/kernel"] == [None, "rest", "model", "data"]
    assert specs["experts"]["layers/mlp/router/kernel"] == [None, "data", "rest"]
    assert specs["by_head"]["layers/attention/q/bias"] == [None, both]
    assert specs["by_head"]["layers/mlp/down/bias"] == [None, "data"]
    assert specs["norms"]["layers/attention/q_norm/scale"] == [None, None]
    assert findings[0]["tied"]["shards"]["embedding"] == [68, 16]


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("uneven", ["layers/attention/o/kernel", "32 for heads", "the 3 devices", "'model'"]),
        ("one axis", ["width and kv_heads", "layers/attention/k/kernel", "'data'"]),
        ("role", ["'embed'", "kv_heads"]),
        ("axis", ["width=", "'tensor'", "data, model, rest"]),
        ("cut", ["layers/attention/k/kernel", "[2, 32, 16]"]),
        ("no sharding", ["for embedding", "jax.sharding.Sharding"]),
        ("tree", ["dict", "layers/mlp/down/kernel"]),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(findings, case, told):
    assert all(word in findings[1][case] for word in told), findings[1][case]
    assert "\n" not in findings[1][case]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    results = run_two("tests.models.two_processes_loading", tmp_path_factory.mktemp("two"))
    assert [code for code, _, _ in results] == [0, 0], [errors[-2000:] for _, _, errors in results]
    return [json.loads(output.splitlines()[-1]) for _, output, _ in results]


def test_two_processes_hold_one_model(both):
    for found in both:
        assert found["same"] == {"folder": True, "gguf": True}
        assert found["fingerprints"] == found["wanted"]


def test_each_process_reads_its_own_part(both):
    """Of four devices two are of each process: half of what is cut, and all that is whole."""
    for found in both:
        assert found["read"]["folder"] == found["held"]["folder"] < 0.6 * found["all"]["folder"]
        assert found["read"]["gguf"] < 0.75 * found["all"]["gguf"]


def test_what_one_process_refuses_all_refuse(both):
    first, second = (found["refused"] for found in both)
    assert first == f"process 1: {second}"
    assert "model.embed_tokens.weight" in second


def test_processes_with_different_models_are_refused(both):
    assert all("different shapes" in found["different"] for found in both)
