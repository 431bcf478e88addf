"""Files of Fisher information that changed after they were saved are refused in one sentence."""

import json
import random
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from tests.mutations_of_states import exchange_header, flip_a_bit, mutated_facts, rewrite_exchange


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    values = {"mlp": {"kernel": jnp.array([[1e-3, 2.0, 3.0], [0.1, 3.0, 1.0]])}, "scale": jnp.array([1.0, 2.0])}
    moments = fj.welford.observe(values, jnp.array([3.0, 1.0]), unit="document", units=jnp.array([1, 2]))
    folder = tmp_path_factory.mktemp("good")
    fj.exchange.save(folder / "f", fj.welford.add(fj.welford.init(moments), moments), metadata={"model": "tiny"})
    return folder


def bytes_of(state):
    import jax

    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def test_flipped_bits_are_refused_or_change_nothing(tmp_path, good, capfd):
    wanted, silent = bytes_of(fj.exchange.load(good / "f")), []
    for i in range(300):
        shutil.copytree(good, tmp_path / "copy", dirs_exist_ok=True)
        what = flip_a_bit(tmp_path / "copy", random.Random(i))
        try:
            fj.exchange.describe(tmp_path / "copy" / "f")
            found = bytes_of(fj.exchange.load(tmp_path / "copy" / "f"))
        except InputError as error:
            assert "\n" not in str(error), what  # noqa: PT017
        else:
            silent += [] if found == wanted else [what]
    assert not silent
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("meant", [False, True], ids=["by accident", "with their hash"])
def test_changed_facts_are_one_sentence(tmp_path, good, capfd, meant):
    header = exchange_header(good / "f")
    facts = json.loads(header["__metadata__"]["fisher_jax"])
    state, accepted = fj.exchange.load(good / "f"), []
    for what, changed in mutated_facts(facts, 300):
        shutil.copytree(good, tmp_path / "copy", dirs_exist_ok=True)
        file = tmp_path / "copy" / "f"
        metadata = {**header["__metadata__"], "fisher_jax": json.dumps(changed)}
        rewrite_exchange(file, {**header, "__metadata__": metadata}, meant=meant)
        for like in (None, state):
            try:
                fj.exchange.describe(file)
                fj.exchange.load(file, like)
            except ValueError as error:
                assert "\n" not in str(error), what  # noqa: PT017
                assert like is not None or isinstance(error, InputError), what  # noqa: PT017
            else:
                accepted += [what]
    assert meant or not accepted
    assert capfd.readouterr().err == ""


def change(name, value):
    return lambda facts: facts.__setitem__(name, value)


@pytest.mark.parametrize(
    "edit",
    [
        change("unit", "furlong"), change("unit", None), change("observations", -1), change("observations", 1.5),
        change("weight", float("nan")), change("weight", -1), change("weight", "3"), change("scale", "0"),
        change("scale", 10**9), change("fractional", 1), change("errors", None), change("content", "other"),
        change("metadata", []), change("leaves", None), change("leaves", []), change("leaves", [None]),
        lambda facts: facts["leaves"].pop(), lambda facts: facts["leaves"][0].pop("names"),
        lambda facts: facts["leaves"][0].update(names=["nobody"]), lambda facts: facts["leaves"][0].update(names=[]),
        lambda facts: facts["leaves"][0].update(names=[[]]), lambda facts: facts["leaves"][0].update(path=[{}]),
        lambda facts: facts["leaves"][0].update(path=["scale", "x"]),
        lambda facts: facts["leaves"][0].update(path=["scale"]),
        lambda facts: facts["leaves"][0].update(path=5), lambda facts: facts["leaves"][0].update(stacked=5),
        lambda facts: facts["leaves"].append(facts["leaves"][0]), lambda facts: facts.pop("unit"),
        lambda facts: facts.update(more=1), lambda facts: facts["checksums"].popitem(),
    ],
)  # fmt: skip
def test_odd_facts_are_refused_even_with_their_hash(tmp_path, good, edit):
    file = shutil.copy(good / "f", tmp_path / "f")
    header = exchange_header(file)
    facts = json.loads(header["__metadata__"]["fisher_jax"])
    edit(facts)
    header["__metadata__"]["fisher_jax"] = json.dumps(facts)
    rewrite_exchange(file, header, meant=True)
    with pytest.raises(InputError):
        fj.exchange.load(file)


@pytest.mark.parametrize("version", ["x", "1e9", "1000000000", "", "-1", "2.0", None])
def test_another_version_is_refused(tmp_path, good, version):
    file = shutil.copy(good / "f", tmp_path / "f")
    header = exchange_header(file)
    header["__metadata__"]["format_version"] = version
    if version is None:
        del header["__metadata__"]["format_version"]
    rewrite_exchange(file, header, meant=True)
    with pytest.raises(InputError):
        fj.exchange.describe(file)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", "{", "", "9" * 10_000])
def test_facts_that_are_no_facts_are_refused(tmp_path, good, text):
    file = shutil.copy(good / "f", tmp_path / "f")
    header = exchange_header(file)
    header["__metadata__"]["fisher_jax"] = text
    rewrite_exchange(file, header, meant=True)
    with pytest.raises(InputError):
        fj.exchange.load(file)
