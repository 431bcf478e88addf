"""`fj.report`: the report of a model that no command knows."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.cli.report.any_model import reported
from fisher_jax.cli.run.tools import Tools

V, D = 13, 5
SCALE, CAP = 0.5, 4.0
RNG = np.random.default_rng(0)
PARAMS = {
    "embedding": jnp.asarray(RNG.normal(size=(V, D)), jnp.float32),
    "bias": jnp.asarray(RNG.normal(size=V), jnp.float32),
}
WITHOUT_PICTURES = Tools(picture=lambda make: b"a picture")
TOKENS = [RNG.integers(0, V, (3, 6)) for _ in range(4)]


def quick(apply_fn, params, batches, **options):
    """`fj.report` without pictures."""
    return reported(apply_fn, params, batches, WITHOUT_PICTURES, **options)


def hidden_fn(params, tokens):
    return jnp.tanh(jnp.cumsum(params["embedding"][tokens], 1))


def model(params, tokens):
    """Tied, with a bias, a scale and a soft cap."""
    logits = hidden_fn(params, tokens) @ params["embedding"].T + params["bias"][None, None, :]
    return CAP * jnp.tanh(SCALE * logits / CAP)


def closed_form(batches):
    """Importance ``[V]`` of both kinds by hand in float64, counts and the mean loss."""
    table, bias = (np.asarray(PARAMS[name], np.float64) for name in ("embedding", "bias"))
    empirical, true, counts, loss, number = np.zeros(V), np.zeros(V), np.zeros(V, int), 0.0, 0
    for row in np.concatenate(batches):
        hidden = np.tanh(np.cumsum(table[row[:-1]], 0))
        raw = hidden @ table.T + bias
        logits = CAP * np.tanh(SCALE * raw / CAP)
        slope = SCALE * (1 - np.tanh(SCALE * raw / CAP) ** 2)
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        labels = np.eye(V)[row[1:]]
        squares = (hidden**2).sum(1)[:, None] * slope**2
        empirical += ((p - labels) ** 2 * squares).sum(0)
        true += (p * (1 - p) * squares).sum(0)
        counts += labels.sum(0).astype(int)
        loss -= np.log((p * labels).sum(1)).sum()
        number += len(row) - 1
    return empirical / number, true / number, counts, loss / number


def table_of(out, task="batches"):
    with (out / "importance.csv").open(encoding="utf-8", newline="") as file:
        rows = {int(row["token_id"]): row for row in csv.DictReader(file) if row["task"] == task}
    return [rows[i] for i in range(V)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "report"
    page = fj.report(
        model, PARAMS, iter(TOKENS), tokenizer=lambda id: f" word{id}", held_out=TOKENS[:1], name="mine", out=folder
    )
    assert page == folder / "report.html"
    return folder


def test_importance_is_that_of_the_closed_form(out):
    empirical, true, counts, loss = closed_form(TOKENS)
    rows = table_of(out)
    np.testing.assert_allclose([float(row["empirical"]) for row in rows], empirical, rtol=2e-5)
    np.testing.assert_allclose([float(row["true"]) for row in rows], true, rtol=2e-5)
    assert [int(row["count"]) for row in rows] == counts.tolist()
    assert json.loads(rows[3]["token"]) == " word3"
    page = (out / "report.md").read_text(encoding="utf-8")
    assert f"{loss:.3f} nats per token" in page
    assert f"word{np.argmax(empirical)}" in page
    assert "15 tokens of 3 rows that were given for it" in page


def test_the_information_is_that_of_the_head_estimator(out):
    """Of the leaf where it is changed before it is used."""
    halved = {**PARAMS, "embedding": 2 * PARAMS["embedding"]}

    def changed(params, tokens):
        return model({**params, "embedding": 0.5 * params["embedding"]}, tokens)

    quick(changed, halved, TOKENS, out=out.parent / "changed")
    quarter = [0.25 * float(row["empirical"]) for row in table_of(out)]
    np.testing.assert_allclose(
        [float(row["empirical"]) for row in table_of(out.parent / "changed")], quarter, rtol=2e-5
    )
    batch = fj.next_token_batch(np.concatenate(TOKENS))
    estimator = fj.group_fisher(changed, estimator="head", groups="row", example=batch)
    found = fj.welford.mean(jax.jit(estimator.observe)(halved, batch))["embedding"]
    np.testing.assert_allclose(found, quarter, rtol=2e-5)


def test_a_head_that_is_not_found_is_given(out):
    """The logits of this model come from a sum over two products."""

    def split(params, tokens):
        hidden, table = hidden_fn(params, tokens), params["embedding"]
        logits = hidden[..., :2] @ table[:, :2].T + hidden[..., 2:] @ table[:, 2:].T
        return CAP * jnp.tanh(SCALE * (logits + params["bias"][None, None, :]) / CAP)

    with pytest.raises(fj.InputError, match=r"no head can be measured .* give head="):
        quick(split, PARAMS, TOKENS, out=out.parent / "split")

    def head(params, tokens):
        return SCALE * hidden_fn(params, tokens), params["embedding"], SCALE * params["bias"]

    with pytest.raises(fj.InputError, match=r"logits of head= are off by .* soft_cap="):
        quick(split, PARAMS, TOKENS, head=head, out=out.parent / "split")
    quick(split, PARAMS, TOKENS, head=head, soft_cap=CAP, out=out.parent / "split")
    for mine, theirs in zip(table_of(out), table_of(out.parent / "split"), strict=True):
        np.testing.assert_allclose(float(theirs["empirical"]), float(mine["empirical"]), rtol=2e-5)
        assert json.loads(theirs["token"]) == f"#{mine['token_id']}"


def test_an_interrupted_call_goes_on_to_the_same_bits(out, same_bits):
    def broken():
        yield from TOKENS[:2]
        raise KeyboardInterrupt

    folder = out.parent / "resumed"
    with pytest.raises(KeyboardInterrupt, match=r"2 batches are saved .* resume=True goes on"):
        quick(model, PARAMS, broken(), out=folder)
    with pytest.raises(fj.InputError, match=r"unfinished .* add resume=True to go on .* overwrite=True"):
        quick(model, PARAMS, TOKENS, out=folder)
    with pytest.raises(fj.InputError, match="had the text"):
        quick(model, PARAMS, TOKENS[::-1], out=folder, resume=True)
    quick(model, PARAMS, TOKENS, out=folder, resume=True)
    assert same_bits(out, folder, "batches")


def test_a_finished_call_computes_nothing_and_other_batches_are_refused(out):
    before = (out / "state").stat().st_mtime_ns, (out / "report.html").stat().st_mtime_ns

    def calls(params, tokens):
        assert isinstance(tokens, jax.core.Tracer)  # traced for its shapes, never run
        return model(params, tokens)

    quick(calls, PARAMS, TOKENS, tokenizer=lambda id: f" word{id}", held_out=TOKENS[:1], name="mine", out=out)
    assert before == ((out / "state").stat().st_mtime_ns, (out / "report.html").stat().st_mtime_ns)
    with pytest.raises(fj.InputError, match="had the text"):
        quick(model, PARAMS, TOKENS[:3], held_out=TOKENS[:1], out=out)
    with pytest.raises(fj.InputError, match=r"tasks measured on mine.* another out="):
        quick(model, jax.tree.map(jnp.negative, PARAMS), TOKENS, task="other", out=out)


def test_documents_are_units_where_batches_have_them(tmp_path):
    """A row in two batches of one document is one observation."""
    batches = [fj.next_token_batch(x, units=np.array([i, i + 1, i + 1])) for i, x in enumerate(TOKENS)]
    quick(model, PARAMS, batches, out=tmp_path / "report")
    state = fj.checkpoint.restore(tmp_path / "report" / "state")["batches"]["empirical"]
    assert int(fj.welford.count(state)) == 5
    with pytest.raises(fj.InputError, match="needs batches with units"):
        quick(model, PARAMS, TOKENS, unit="document", out=tmp_path / "none")


def test_what_came_before_a_bad_batch_is_kept(tmp_path):
    bad = fj.Batch(jnp.asarray(TOKENS[0][:, :-1]), jnp.full((3, 5), V))
    with pytest.raises(fj.RejectedBatchError, match=r"batch 1 was rejected: .* is saved"):
        quick(model, PARAMS, [TOKENS[0], bad], out=tmp_path / "report")
    state = fj.checkpoint.restore(tmp_path / "report" / "state")["batches"]["empirical"]
    np.testing.assert_allclose(fj.welford.mean(state), closed_form(TOKENS[:1])[0], rtol=2e-5)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"batches": []}, "there are no batches"),
        ({"batches": [np.ones((2, 3))]}, r"needs fj\.Batch objects or token ids"),
        ({"tokenizer": ["a"] * (V + 1)}, r"14 texts, but the head has 13 rows"),
        ({"tokenizer": 3}, "must be a list of texts"),
        ({"kind": "exact"}, "must be one of empirical, true"),
        ({"unit": "token"}, "must be one of document, sequence, batch"),
        ({"level": 1.5}, "must lie between 0 and 1"),
        ({"task": "a/b"}, "task= is"),
        ({"soft_cap": 3.0}, "belongs to head="),
        ({"resume": True}, "nothing to resume .* without resume=True"),
        ({"head": lambda params, tokens: (params["embedding"], params["embedding"])}, r"must be \[\.\.\., H\]"),
        ({"batches": [fj.Batch(TOKENS[0], TOKENS[0], np.zeros((3, 6)))]}, "no token of the batches has a weight"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, given, sentence):
    with pytest.raises(fj.InputError, match=sentence):
        quick(model, PARAMS, **{"batches": TOKENS, "out": tmp_path / "report", **given})
    assert not (tmp_path / "report" / "report.html").exists()


def test_every_kind_of_tokenizer_gives_texts():
    import tokenizers

    from fisher_jax.cli.report.token_texts import token_texts

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<s>": 2}, unk_token="a"))
    backend.add_special_tokens(["<s>"])
    backend.enable_padding(length=7)

    class Transformers:
        backend_tokenizer = backend

        def __call__(self, text):
            raise AssertionError("a call would encode a text")

    class Pieces:
        def id_to_piece(self, id):
            return ["\u2581a", "b", "</s>"][id]

    class Tiktoken:
        def decode(self, ids):
            return {(0,): "a", (1,): "b", (2,): "<s>"}[tuple(ids)]

    wanted = ["a", "b", "<s>", "<no text 3>"]
    for tokenizer in (
        backend,
        Transformers(),
        fj.models.Tokenizer.from_json(backend.to_str()),
        Tiktoken(),
        wanted[:3],
    ):
        assert token_texts(tokenizer, 4) == wanted, tokenizer
    assert token_texts(Pieces(), 3) == [" a", "b", "</s>"]
    assert backend.padding["length"] == 7  # the user's own is left alone
