"""Saving and restoring: exact, self-describing, atomic, refused where it does not belong."""

import errno

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import fisher_jax as fj
from fisher_jax._support.errors import InputError


def welford_state(unit="document"):
    values = {"head": jnp.array([[1e-3, 2.0], [0.1, 3.0], [5.0, 7.0]]), "scale": jnp.array([1.0, 2.0, 4.0])}
    moments = fj.welford.observe(values, jnp.array([3.0, 1.0, 2.0]), unit=unit, units=jnp.array([1, 1, 2]))
    return fj.welford.add(fj.welford.init(moments), moments)


@pytest.fixture(scope="module")
def state():
    average = fj.moving_average.init(jnp.zeros(2), 0.9)
    return {
        "wikipedia": welford_state(),
        "recent": fj.moving_average.add(average, fj.welford.observe(jnp.ones((3, 2)))),
        "mixed": [jnp.arange(3, dtype=jnp.bfloat16), (np.arange(4), None, 1.5, "text", True), jnp.zeros((0, 3))],
        "key": jax.random.key(7),
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, jax.Array | np.ndarray):
            assert x.dtype == y.dtype
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def test_same_types_and_bits_come_back_without_a_template(tmp_path, state):
    fj.checkpoint.save(tmp_path / "state", state, metadata={"model": "tiny"})
    assert_same(fj.checkpoint.restore(tmp_path / "state"), state)
    assert fj.checkpoint.metadata(tmp_path / "state") == {"model": "tiny"}


def test_a_restored_state_goes_on_to_the_same_bits(tmp_path):
    state = welford_state()
    fj.checkpoint.save(tmp_path / "state", state)
    values = {"head": jnp.ones((1, 2)), "scale": jnp.array([3.0])}
    more = fj.welford.observe(values, jnp.array([2.0]), unit="document", units=jnp.array([2]))
    assert_same(fj.welford.add(fj.checkpoint.restore(tmp_path / "state"), more), fj.welford.add(state, more))


def test_other_libraries_states_come_back_with_a_template(tmp_path):
    params = {"b": jnp.ones(2), "a": jnp.zeros((2, 2))}
    state = optax.adam(1e-3).init(params)
    fj.checkpoint.save(tmp_path / "state", {"opt": state})
    with pytest.raises(InputError, match=r"ScaleByAdamState.*like="):
        fj.checkpoint.restore(tmp_path / "state")
    like = jax.eval_shape(lambda: {"opt": state})
    assert_same(fj.checkpoint.restore(tmp_path / "state", like), {"opt": state})


def test_other_metadata_is_refused_by_name(tmp_path, state):
    fj.checkpoint.save(tmp_path / "state", state, metadata={"model": "one", "groups": "row"})
    with pytest.raises(InputError, match="has model 'one', wanted 'two'"):
        fj.checkpoint.restore(tmp_path / "state", metadata={"groups": "row", "model": "two"})


@pytest.mark.parametrize(
    ("like", "sentence"),
    [
        (
            fj.welford.init(jnp.zeros((2, 3)), unit="document"),
            r"state\.mean is a dict of 'head', 'scale' .* float32\[2, 2, 3\]",
        ),
        (fj.welford.init({"head": jnp.zeros(2), "scale": jnp.zeros(3)}, unit="document"), r"scale.*\[2\].*\[2, 3\]"),
    ],
)
def test_a_state_of_other_groups_is_refused(tmp_path, like, sentence):
    saved = fj.welford.init({"head": jnp.zeros(2), "scale": jnp.zeros(())}, unit="document")
    fj.checkpoint.save(tmp_path / "state", saved)
    with pytest.raises(InputError, match=sentence):
        fj.checkpoint.restore(tmp_path / "state", like)


def test_a_state_of_another_unit_is_refused(tmp_path):
    fj.checkpoint.save(tmp_path / "state", fj.welford.init(jnp.zeros(4), unit="sequence"))
    with pytest.raises(InputError, match=r"'sequence'.*'token'"):
        fj.checkpoint.restore(tmp_path / "state", fj.welford.init(jnp.zeros(4), unit="token"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_save_that_fails_leaves_the_former_one_and_nothing_else(tmp_path, monkeypatch, error):
    fj.checkpoint.save(tmp_path / "state", {"step": jnp.array(1)})

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(orbax.checkpoint.Checkpointer, "save", fail)
        with pytest.raises(type(error)) as caught:
            fj.checkpoint.save(tmp_path / "state", {"step": jnp.array(2)})
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)
    assert int(fj.checkpoint.restore(tmp_path / "state")["step"]) == 1
    fj.checkpoint.save(tmp_path / "state", {"step": jnp.array(3)})
    assert int(fj.checkpoint.restore(tmp_path / "state")["step"]) == 3
    assert [x.name for x in (tmp_path / "state").iterdir()] == ["00000002"]


def test_nothing_there_foreign_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        fj.checkpoint.restore(tmp_path / "nothing")
    with pytest.raises(InputError, match="not a checkpoint"):
        fj.checkpoint.restore(tmp_path)
    fj.checkpoint.save(tmp_path / "state", {"a": jnp.arange(1000.0)})
    data = max((p for p in (tmp_path / "state").rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    data.write_bytes(b"")
    with pytest.raises(InputError, match="damaged"):
        fj.checkpoint.restore(tmp_path / "state")
    (tmp_path / "state" / "00000001" / "facts.json").write_text("{")
    with pytest.raises(InputError, match=r"damaged.*SHA-256"):
        fj.checkpoint.restore(tmp_path / "state")


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-7), ("bfloat16", 4e-3), ("float16", 5e-4)])
def test_statistics_can_be_stored_smaller(tmp_path, dtype, error):
    state = welford_state("sequence")
    fj.checkpoint.save(tmp_path / "state", {"task": state}, dtype=dtype)
    found = fj.checkpoint.restore(tmp_path / "state")["task"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for x, y in zip(*(jax.tree.leaves(fj.welford.mean(s)) for s in (found, state)), strict=True):
        np.testing.assert_allclose(x, y, rtol=error)
        assert dtype == "float32" or not np.array_equal(x, y)
    assert (fj.welford.count(found), fj.welford.weight(found)) == (3, 6.0)


@pytest.mark.parametrize(("value", "what"), [(1e-12, "zero"), (1e9, "infinity")])
def test_float16_refuses_what_it_cannot_hold(tmp_path, value, what):
    moments = fj.welford.observe(jnp.array([[value, 1.0]]))
    with pytest.raises(ValueError, match=f"1 of 2 values would become {what} in float16"):
        fj.checkpoint.save(tmp_path / "state", fj.welford.add(fj.welford.init(moments), moments), dtype="float16")
    assert not (tmp_path / "state").exists()


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"state\['f'\] is a function"):
        fj.checkpoint.save(tmp_path / "state", {"f": lambda: 0})
