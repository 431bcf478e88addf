"""Fisher files: the same bits come back, other tools find the means under the names of checkpoints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import fisher_jax as fj


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.shape(x) == np.shape(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def decoder_tree(rng, lead=()):
    """Leaves of a decoder with two layers: parameters, sums over rows, over a tensor."""
    shapes = {
        "embedding": (7, 4),
        "final_norm": {"scale": (4,)},
        "layers": {
            "attention": {"q": {"kernel": (2, 4, 6)}, "o": {"kernel": (2, 6)}},
            "mlp": {"down": {"kernel": (2,)}},
            "mlp_norm": {"scale": (2, 4)},
        },
    }
    draw = lambda s: jnp.asarray(rng.lognormal(0, 5, (*lead, *s)), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def a_state(unit, weighted):
    """Of random bits: whatever they are must come back."""
    rng = np.random.default_rng(0)
    state = fj.welford.init(decoder_tree(rng), unit=unit, scale=4)
    state = jax.tree.map(lambda x: jnp.asarray(rng.lognormal(0, 5, x.shape), x.dtype), state)
    if unit == "document":
        opened = dataclasses.replace(state.open, weight=jnp.array([5.0, 0.0]))
        state = dataclasses.replace(state, open=opened)
    else:
        state = dataclasses.replace(state, square_mean=None, square_m2=None) if not weighted else state
    return dataclasses.replace(state, weight=jnp.array([10.0, 0.0]), count=jnp.array([5.0, 0.0]))


@pytest.mark.parametrize(("unit", "weighted"), [("document", True), ("token", False)])
@pytest.mark.parametrize("names", [None, "huggingface"])
def test_a_state_comes_back_bit_for_bit(tmp_path, unit, weighted, names):
    state = a_state(unit, weighted)
    assert (state.square_mean is None) == (not weighted)
    fj.exchange.save(tmp_path / "f.safetensors", state, names=names)
    equal(fj.exchange.load(tmp_path / "f.safetensors"), state)
    equal(fj.exchange.load(tmp_path / "f.safetensors", like=state), state)
    assert [x.name for x in tmp_path.iterdir()] == ["f.safetensors"]


def test_other_tools_find_the_means_under_the_names_of_checkpoints(tmp_path):
    state = a_state("document", True)
    fj.exchange.save(tmp_path / "f", state, names="huggingface", metadata={"model": "tiny", "kind": "empirical"})
    found, mean = safetensors.numpy.load_file(tmp_path / "f"), fj.welford.mean(state)
    np.testing.assert_allclose(found["model.embed_tokens.weight"], mean["embedding"], rtol=1e-6)
    for i in range(2):
        kernel = mean["layers"]["attention"]["q"]["kernel"][i]
        np.testing.assert_allclose(found[f"model.layers.{i}.self_attn.q_proj.weight"], kernel.T, rtol=1e-6)
        rows = mean["layers"]["attention"]["o"]["kernel"][i]
        np.testing.assert_allclose(found[f"model.layers.{i}.self_attn.o_proj.weight"], rows, rtol=1e-6)
        total = mean["layers"]["mlp"]["down"]["kernel"][i]
        np.testing.assert_allclose(found[f"model.layers.{i}.mlp.down_proj.weight"], total, rtol=1e-6)
    about = fj.exchange.describe(tmp_path / "f")
    assert about["metadata"] == {"model": "tiny", "kind": "empirical"}
    assert (about["unit"], about["observations"], about["weight"]) == ("document", 6, 15.0)
    assert about["tensors"]["model.layers.1.self_attn.q_proj.weight"] == [6, 4]
    with safetensors.safe_open(tmp_path / "f", "numpy") as file:
        header = file.metadata()
    assert header["normalization"] == "mean per weighted token, summed within groups"
    assert json.loads(header["fisher_jax"])["content"] == "state"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("names", [None, "huggingface", lambda path: "x." + path])
def test_a_tree_of_values_comes_back_bit_for_bit(tmp_path, dtype, names):
    fisher = jax.tree.map(lambda x: x.astype(dtype), decoder_tree(np.random.default_rng(1)))
    fj.exchange.save(tmp_path / "f", fisher, names=names)
    equal(fj.exchange.load(tmp_path / "f"), fisher)


def test_single_arrays_and_trees_of_lists(tmp_path):
    fj.exchange.save(tmp_path / "f", jnp.arange(3.0), names="lm_head.weight")
    equal(fj.exchange.load(tmp_path / "f"), np.arange(3, dtype=np.float32))
    fisher = [jnp.ones(2), {"a": jnp.zeros((0, 3)), "b": jnp.array(2.0)}]
    fj.exchange.save(tmp_path / "f", fisher)
    equal(fj.exchange.load(tmp_path / "f", like=fisher), fisher)
    with pytest.raises(fj.InputError, match="a tree that is not of dicts alone; give its structure as like="):
        fj.exchange.load(tmp_path / "f")


def test_a_file_of_another_tool_is_a_dict_of_its_tensors(tmp_path):
    tensors = {"a.weight": np.ones((2, 2), np.float32), "b": np.zeros(3, np.float16)}
    safetensors.numpy.save_file(tensors, tmp_path / "f", metadata={"by": "another"})
    equal(fj.exchange.load(tmp_path / "f"), tensors)
    equal(fj.exchange.load(tmp_path / "f", like=tensors), tensors)
    about = fj.exchange.describe(tmp_path / "f")
    assert (about["content"], about["metadata"], about["tensors"]["b"]) == ("foreign", {"by": "another"}, [3])


def test_moving_averages_are_stored_as_values(tmp_path):
    state = fj.moving_average.init({"w": jnp.ones(3)}, 0.9)
    fj.exchange.save(tmp_path / "f", state)
    equal(fj.exchange.load(tmp_path / "f"), state.average)


def saved(path, fisher=None, **options):
    fj.exchange.save(path, {"w": jnp.ones(3)} if fisher is None else fisher, **options)
    return path


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: saved(p, {"w": -jnp.ones(3)}), r"\['w'\] of the Fisher has the entry -1"),
        (lambda p: saved(p, names="huggingface"), "w is no leaf of a Llama decoder of fj.models"),
        (lambda p: saved(p, {"a": jnp.ones(1), "b": jnp.ones(1)}, names="w"), "one name for 2 leaves"),
        (
            lambda p: saved(p, {"a": jnp.ones(1), "b": jnp.ones(1)}, names=lambda _: "w"),
            "two leaves have the name 'w'",
        ),
        (lambda p: saved(p, names={"v": "w"}), "names has no name for the leaf 'w'"),
        (lambda p: saved(p, names={"w": "w:m2"}), "has a colon"),
        (lambda p: fj.exchange.load(saved(p), like={"v": jnp.ones(3)}), r"different trees; only in like: \['v'\]"),
        (lambda p: fj.exchange.load(saved(p), like={"w": jnp.ones(4)}), r"\['w'\] has shape \[4\] in like and \[3\]"),
        (lambda p: fj.exchange.load(p), "there is no file"),
        (lambda p: (p.write_bytes(b"no tensors"), fj.exchange.load(p)), "no safetensors file, or a damaged one"),
        (lambda p: (p.write_bytes(saved(p).read_bytes()[:-4]), fj.exchange.load(p)), "or a damaged one"),
    ],
)
def test_what_cannot_be_exchanged_is_one_sentence(tmp_path, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tmp_path / "f")


def test_newer_files_and_files_that_lack_a_tensor_are_refused(tmp_path):
    with safetensors.safe_open(saved(tmp_path / "f"), "numpy") as file:
        header, tensor = file.metadata(), file.get_tensor("w")
    safetensors.numpy.save_file({"w": tensor}, tmp_path / "f", metadata=header | {"format_version": "99"})
    with pytest.raises(fj.InputError, match="has version 99 of this format, known is 2"):
        fj.exchange.load(tmp_path / "f")
    safetensors.numpy.save_file({"v": tensor}, tmp_path / "f", metadata=header)
    with pytest.raises(fj.InputError, match="tensors are not those that its facts name"):
        fj.exchange.load(tmp_path / "f")


def test_a_state_in_float64_needs_x64(tmp_path):
    with jax.enable_x64(True):
        state = fj.welford.init(jnp.zeros(3, jnp.float64))
        fj.exchange.save(tmp_path / "f", state)
        equal(fj.exchange.load(tmp_path / "f"), state)
    with pytest.raises(fj.InputError, match="holds a state in float64"):
        fj.exchange.load(tmp_path / "f")
