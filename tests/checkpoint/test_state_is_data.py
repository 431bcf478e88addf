"""A state folder is data: it cannot run code, lie, or be taken for another state; every damage is one sentence."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from tests.mutations_of_states import facts_of, flip_a_bit, mutated_facts, rewrite, rewritten


@pytest.fixture(scope="module")
def state():
    moments = fj.welford.observe({"head": jnp.array([[1e-3, 2.0], [0.1, 3.0]]), "scale": jnp.array([1.0, 2.0])})
    random_numbers = np.random.default_rng(0)
    return {
        "wikipedia": fj.welford.add(fj.welford.init(moments), moments),
        "average": fj.moving_average.init(jnp.zeros(2), 0.9),
        "large": jnp.asarray(random_numbers.normal(size=(100, 30)), jnp.float32),
        "mixed": [jnp.arange(3, dtype=jnp.bfloat16), (random_numbers.normal(size=5), None, 1.5, "text", True)],
        "key": jax.random.key(7),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, state):
    place = tmp_path_factory.mktemp("good") / "state"
    fj.checkpoint.save(place, state, metadata={"model": "tiny", "tasks": {"a": {"batches_done": 3}}})
    return place


@pytest.fixture
def damaged(tmp_path, folder):
    """Copies of the good folder, one after the other in the same place."""

    def fresh():
        shutil.rmtree(tmp_path / "state", ignore_errors=True)
        return shutil.copytree(folder, tmp_path / "state")

    return fresh


def bits(tree):
    """Every leaf with its path, type and bytes."""

    def leaf(x):
        x = jax.random.key_data(x) if isinstance(x, jax.Array) and x.dtype == jax.random.key(0).dtype else x
        return (str(type(x)), str(getattr(x, "dtype", "")), np.shape(x), np.asarray(x).tobytes())

    found = jax.tree_util.tree_leaves_with_path(tree)
    return str(jax.tree.structure(tree)), [(jax.tree_util.keystr(path), leaf(x)) for path, x in found]


@pytest.mark.parametrize(
    "name",
    [
        "fisher_jax.checkpoint:os.system",
        "fisher_jax.checkpoint:shutil.rmtree",
        "fisher_jax.exchange:os.system",
        "os:system",
        "builtins:eval",
        "subprocess:run",
    ],
)
@pytest.mark.parametrize("key", ["class", "type"])
def test_a_folder_cannot_run_code(damaged, tmp_path, name, key):
    place, victim = damaged(), tmp_path / "victim"
    victim.mkdir()
    argument = {"system": f"rmdir {victim}", "rmtree": str(victim)}.get(name.split(".")[-1], str(victim))
    field = {"system": "command", "rmtree": "path"}.get(name.split(".")[-1], "args")

    def attack(facts):
        for at in ("structure", "tree"):
            facts[at] = {key: name, "fields": {field: {"value": argument}}}

    rewritten(place, attack)
    with pytest.raises(InputError):
        fj.checkpoint.restore(place)
    assert victim.exists()


def test_flipped_bits_are_refused_or_change_nothing(damaged, folder, state, capfd):
    wanted, silent = bits(fj.checkpoint.restore(folder)), []
    capfd.readouterr()
    for i in range(60):
        place = damaged()
        what = flip_a_bit(place, random.Random(i))
        try:
            found = bits(fj.checkpoint.restore(place))
        except InputError as error:
            assert "\n" not in str(error), what  # noqa: PT017
        else:
            silent += [] if found == wanted else [what]
    assert not silent
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "0",
        '"x"',
        "{}",
        "{",
        "",
        "\x00\x01",
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"format": 2}',
        '{"format": "x"}',
        '{"format": null}',
        '{"format": 1e999}',
        "9" * 10_000,
    ],
)
def test_facts_of_another_kind_are_refused(damaged, text):
    place = damaged()
    rewrite(facts_of(place), text)
    for read in (fj.checkpoint.restore, fj.checkpoint.metadata):
        with pytest.raises(InputError):
            read(place)


@pytest.mark.parametrize("meant", [False, True], ids=["by accident", "with their hash"])
def test_changed_facts_are_one_sentence(damaged, folder, state, capfd, meant):
    """Facts that changed by accident never restore; those that come with their hash may say what a save could."""
    facts = json.loads(facts_of(folder).read_text())
    place, accepted, number = damaged(), [], 0
    for what, changed in mutated_facts(facts, 150):
        number += changed != facts
        text = json.dumps(changed)
        if meant:
            rewrite(facts_of(place), text)
        else:
            facts_of(place).write_text(text)
        for like in (None, state):
            try:
                fj.checkpoint.restore(place, like=like)
            except InputError as error:
                assert "\n" not in str(error), what  # noqa: PT017
            else:
                accepted += [what]
    assert number > 100
    assert meant or not accepted
    assert capfd.readouterr().err == ""


def test_what_is_not_a_plain_file_is_refused(damaged, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for change in ("link", "folder", "missing", "empty", "garbage", "link to itself"):
        names = [p.relative_to(damaged()) for p in sorted((tmp_path / "state").rglob("*")) if p.is_file()]
        for name in names:
            file = damaged() / name
            if file.suffix == ".txt":
                continue
            data = file.read_bytes()
            file.unlink()
            if change == "link":
                (tmp_path / "elsewhere" / "file").write_bytes(data)
                file.symlink_to(tmp_path / "elsewhere" / "file")
            elif change == "link to itself":
                file.symlink_to(file)
            elif change == "folder":
                file.mkdir()
            elif change != "missing":
                file.write_bytes(b"" if change == "empty" else b"\xff\x00garbage" * 10)
            with pytest.raises(InputError):
                fj.checkpoint.restore(tmp_path / "state")


def test_keys_of_other_types_stay_apart(tmp_path):
    for i, tree in enumerate(
        ({1: 1.0, 2: 2.0}, {"1": 1.0}, {True: 1.0}, {1.5: 1.0}, {(1, "a"): 1.0}, {(1, (2, 3)): 1.0})
    ):
        fj.checkpoint.save(tmp_path / str(i), tree)
        found = fj.checkpoint.restore(tmp_path / str(i))
        assert found == tree
        assert [type(k) for k in found] == [type(k) for k in tree]
    fj.checkpoint.save(tmp_path / "m", {"a": 1}, metadata={"counts": {1: "whole", "1": "text"}})
    assert fj.checkpoint.metadata(tmp_path / "m") == {"counts": {1: "whole", "1": "text"}}


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        ({"a": 0, "b": 1}, {"a": 0, "c": 1}),
        ({1: 0}, {"1": 0}),
        ({"x": {"a": 0}}, {"y": {"a": 0}}),
        ([0, 1], (0, 1)),
        ({"a": [0]}, {"a": (0,)}),
    ],
)
def test_other_keys_of_equal_shapes_are_refused(tmp_path, saved, wanted):
    fj.checkpoint.save(tmp_path / "state", jax.tree.map(jnp.asarray, saved))
    with pytest.raises(InputError):
        fj.checkpoint.restore(tmp_path / "state", like=jax.tree.map(jnp.asarray, wanted))


def test_lengths_of_claimed_arrays_are_checked_before_anything_is_allocated(damaged):
    for shape in ([10**12], [10**9, 10**9], [2**63], [3000, 1]):
        place = damaged()

        def claim(facts, shape=shape):
            for node in _nodes(facts):
                if isinstance(node.get("shape"), list) and node["shape"] == [100, 30]:
                    node["shape"] = shape

        rewritten(place, claim)
        with pytest.raises(InputError):
            fj.checkpoint.restore(place)


def _nodes(x):
    if isinstance(x, dict):
        yield x
    for child in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from _nodes(child)


def problem():
    apply_fn = lambda params, x: x @ params["kernel"] + params["bias"]  # noqa: E731
    batch = fj.Batch(
        jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32), jnp.array([0, 1, 2, 3, 0, 1])
    )
    return apply_fn, {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}, batch


def test_block_spectra_restore_with_a_template(tmp_path):
    apply_fn, params, batch = problem()
    spectra = fj.spectra.block_spectra(apply_fn)
    state = spectra.update(spectra.init(params), params, batch)
    fj.checkpoint.save(tmp_path / "state", state)
    for like in (None, state, spectra.init(params)):
        assert bits(fj.checkpoint.restore(tmp_path / "state", like=like)) == bits(state)


def test_kfac_factors_restore_and_precondition(tmp_path):
    apply_fn, params, batch = problem()
    factors = fj.kfac_factors(apply_fn, fj.categorical, params, batch)
    fj.checkpoint.save(tmp_path / "state", factors)
    for like in (None, factors):
        found = fj.checkpoint.restore(tmp_path / "state", like=like)
        assert jax.tree.structure(found) == jax.tree.structure(factors)
        ones = jax.tree.map(jnp.ones_like, params)
        assert bits(fj.precondition(found, ones)) == bits(fj.precondition(factors, ones))


def test_deep_trees_are_saved_and_deeper_ones_are_refused_at_once(tmp_path):
    def nested(depth):
        return {"a": nested(depth - 1)} if depth else {"a": 1.5}

    fj.checkpoint.save(tmp_path / "state", nested(80))
    assert fj.checkpoint.restore(tmp_path / "state", like=nested(80)) == nested(80)
    with pytest.raises(ValueError, match="levels deep"):
        fj.checkpoint.save(tmp_path / "deeper", nested(150))
    assert fj.checkpoint.revision(tmp_path / "deeper") == 0
