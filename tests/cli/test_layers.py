"""`--parameters all`: every layer, attention head and tensor, against plain gradients in float64."""

import csv
import dataclasses
import io
import os
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from running import after, main, quick

import fisher_jax as fj
from fisher_jax.cli.merge.weights import sums_of_groups
from fisher_jax.cli.page import style
from fisher_jax.cli.report import layer_plots, layers
from fisher_jax.cli.report.settings import ReportSettings
from fisher_jax.models import DecoderConfig, LanguageModel, from_config, init_params, load
from fisher_jax.text.corpora import Document
from fisher_jax.text.packing import pack

ALL = ["--parameters", "all", "--task", "first", "--max-tokens", "1000", "--held-out-tokens", "0", "--seed", "3"]
FAMILIES = {
    "qwen3": {"num_kv_heads": 1, "qk_norm": True, "qkv_bias": True, "tied": False},
    "gpt2": {"num_kv_heads": 2, "norm": "layer", "positions": "learned", "activation": "gelu_tanh", "gated": False,
             "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "qwen3_moe": {"num_kv_heads": 1, "qkv_bias": True, "num_experts": 3, "experts_per_token": 2, "tied": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def report_of_all(tmp_path_factory, report_arguments):
    out = tmp_path_factory.mktemp("all") / "report"
    assert main(report_arguments(out, *ALL)) == 0
    return out


def _lines(out):
    """Lines of layers.csv by (path, layer, head)."""
    with (out / "layers.csv").open(newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    found = {(line["path"], line["layer"], line["head"]): line for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.fixture(scope="module")
def squares_of_documents(texts, tiny_model):
    """Squared gradients of the signed sums, added over the rows of each document: plain float64 gradients."""
    model = load(tiny_model)
    rows = pack(
        [Document(text, Path(text).read_text(encoding="utf-8")) for text in texts], model.tokenizer.encode,
        seq_len=32, max_targets=1000, held_out_targets=0, vocab_size=model.config.vocab_size,
    ).stream  # fmt: skip
    documents: dict = {}
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), model.params)

        def signed(params, tokens, factors):
            logits = model.hidden(params, tokens[None, :-1])[0] @ model.head(params).T
            log_probs = jax.nn.log_softmax(logits)[jnp.arange(len(tokens) - 1), tokens[1:]]
            return jnp.sum(factors * log_probs)

        gradient = jax.jit(jax.grad(signed))
        for index, (tokens, mask, units) in enumerate(rows.batches(4)):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(3), index), len(tokens))
            for row, key in enumerate(keys):
                with jax.enable_x64(False):  # the bits drawn depend on it
                    signs = np.asarray(jax.random.rademacher(jax.random.split(key)[1], (1, 31), jnp.float32))[0]
                factors = signs * mask[row, 1:]
                grads = gradient(params, jnp.asarray(tokens[row]), jnp.asarray(factors, jnp.float64))
                total, weight = documents.get(units[row], (0, 0))
                squares = jax.tree.map(lambda g: np.asarray(g, np.float64) ** 2, grads)
                added = squares if weight == 0 else jax.tree.map(np.add, total, squares)
                documents[units[row]] = added, weight + mask[row, 1:].sum()
    return documents


def _mean_and_error(documents, statistic):
    values = np.array([statistic(total) / weight for total, weight in documents.values()])
    weights = np.array([weight for _, weight in documents.values()])
    mean, n = weights @ values / weights.sum(), len(weights)
    return mean, np.sqrt(n / (n - 1) * np.sum((weights * (values - mean)) ** 2)) / weights.sum(), n


def _attention(squares, name):
    return squares["layers"]["attention"][name]["kernel"]


@pytest.mark.parametrize(
    ("line", "parameters", "statistic"),
    [
        (("embedding", "", ""), 5968, lambda s: s["embedding"].sum()),
        (("layers/attention/k/kernel", "1", ""), 256, lambda s: _attention(s, "k")[1].sum()),
        (("layers/attention/q/kernel", "0", "1"), 128, lambda s: _attention(s, "q")[0, :, 8:].sum()),
        (("layers/attention/o/kernel", "1", "0"), 128, lambda s: _attention(s, "o")[1, :8].sum()),
        (("layers/mlp_norm/scale", "0", ""), 16, lambda s: s["layers"]["mlp_norm"]["scale"][0].sum()),
        (("layers/mlp", "1", ""), 1536, lambda s: sum(x["kernel"][1].sum() for x in s["layers"]["mlp"].values())),
        (("layers/attention/v", "", ""), 512, lambda s: _attention(s, "v").sum()),
        (("model", "", ""), None, lambda s: sum(x.sum() for x in jax.tree.leaves(s))),
    ],
)  # fmt: skip
def test_lines_equal_plain_gradients(report_of_all, squares_of_documents, line, parameters, statistic):
    from scipy import stats

    found = _lines(report_of_all)[line]
    mean, error, n = _mean_and_error(squares_of_documents, statistic)
    reach = stats.t.ppf(0.975, n - 1) * error
    assert parameters in (None, int(found["parameters"]))
    np.testing.assert_allclose(float(found["statistic"]), mean, rtol=2e-4)
    np.testing.assert_allclose([float(found["lower"]), float(found["upper"])], [mean - reach, mean + reach],
                               rtol=1e-3, atol=2e-4 * mean)  # fmt: skip


def test_every_tensor_head_and_layer_has_a_line(report_of_all, tiny_model):
    lines, config = _lines(report_of_all), load(tiny_model).config
    params = layers_of(tiny_model)
    for path, leaf in params.items():
        stacked = path.startswith("layers/")
        own = [line for (name, _, head), line in lines.items() if name == path and head == ""]
        assert [line["layer"] for line in own] == ([str(i) for i in range(config.num_layers)] if stacked else [""])
        assert sum(int(line["parameters"]) for line in own) == leaf.size
    for name, heads in (("q", 2), ("k", 2), ("v", 2), ("o", 2)):
        path = f"layers/attention/{name}/kernel"
        for layer in range(config.num_layers):
            parts = [float(lines[path, str(layer), str(head)]["statistic"]) for head in range(heads)]
            assert sum(parts) == pytest.approx(float(lines[path, str(layer), ""]["statistic"]), rel=1e-5)
    assert int(lines["model", "", ""]["parameters"]) == sum(leaf.size for leaf in params.values())


def layers_of(tiny_model):
    from fisher_jax.models.weight_names import flatten

    return flatten(load(tiny_model).params)


def test_pictures_are_there_and_not_empty(report_of_all):
    text = (report_of_all / "report.md").read_text(encoding="utf-8")
    for name in ("layers-model", "layers-totals", "layers-heads"):
        assert f"figures/tasks/first/{name}.png" in text
        pixels = matplotlib.image.imread(report_of_all / "figures/tasks/first" / f"{name}.png")[::3, ::3, :3]
        assert len(np.unique((255 * pixels).round().reshape(-1, 3), axis=0)) > 30
    assert text.index("The whole model") < text.index("Importance by rank")
    assert "tied to the head" in text
    assert "not the square of a mean gradient" in text


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path, report_of_all, report_arguments, same_bits):
    out = tmp_path / "stopped"
    stop = after(2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert quick(report_arguments(out, *ALL, "--checkpoint-every", "0"), after_step=stop) == 130
    assert not (out / "layers.csv").exists()
    assert quick(report_arguments(out, *ALL, "--resume")) == 0
    assert same_bits(out, report_of_all, "first")
    assert (out / "layers.csv").read_text() == (report_of_all / "layers.csv").read_text()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--unit", "token"], "--unit token is for the head alone"),
        (["--parameters", "head"], "had --parameters all, and this one has head"),
        (["--kind", "true"], "had --kind empirical, and this one has true"),
        (["--seed", "4"], "had --seed 3, and this one has 4"),
    ],
)
def test_what_does_not_fit_is_refused(report_of_all, report_arguments, capsys, more, sentence):
    before = (report_of_all / "layers.csv").read_bytes()
    assert main(report_arguments(report_of_all, *ALL, *more)) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert (report_of_all / "layers.csv").read_bytes() == before


def test_a_task_of_the_head_leaves_the_table_until_its_own_task_is_dropped(report_of_all, report_arguments, tmp_path):
    out = shutil.copytree(report_of_all, tmp_path / "copy")
    few = ["--max-tokens", "100", "--held-out-tokens", "0"]
    assert quick(report_arguments(out, "--task", "second", *few)) == 0
    assert (out / "layers.csv").read_text() == (report_of_all / "layers.csv").read_text()
    assert quick(report_arguments(out, "--task", "first", *few, "--overwrite")) == 0
    assert not (out / "layers.csv").exists()


def _family(name):
    config = DecoderConfig(vocab_size=19, width=8, num_layers=2, num_heads=2, head_size=4, mlp_size=6,
                           max_positions=6, **FAMILIES[name])  # fmt: skip
    functions = from_config(config)
    given = {field.name: getattr(functions, field.name) for field in dataclasses.fields(functions)}
    return LanguageModel(
        **given, name=name, params=init_params(config, jax.random.key(0)), tokenizer=None, fingerprint=""
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_all_its_parameters_in_the_table(family):
    model, settings = _family(family), ReportSettings(row_length=6, unit="batch", kind="true")
    estimator = layers.layer_estimator(model, settings)
    found = layers.read_layers(estimator.init(model.params), model, settings)
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert int(found.wholes["model"].parameters) == size
    assert sum(x.parameters.sum() for x in found.tensors.values()) == size
    assert {tuple(x.mean.shape) for x in found.tensors.values()} == {(), (2,)}
    columns = layers.columns(model.config)
    assert sum(found.wholes[node].parameters for node in columns) == found.wholes["layers"].parameters
    kinds = {f"{name}/{leaf}" for name in "qkv" for leaf in ("kernel", "bias")} | {"o/kernel"}
    assert set(found.heads) == {f"layers/attention/{kind}" for kind in kinds}
    lines = list(csv.DictReader(io.StringIO(layers.layers_csv({"a": found}))))
    assert {line["part"] for line in lines} >= {layers.part_name(node) for node in columns} | {
        "model",
        "layer",
        "MLP",
    }


def test_experts_have_sums_of_their_own():
    model, settings = _family("qwen3_moe"), ReportSettings(row_length=6, unit="batch")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 19, (2, 6)))
    batch, key = fj.next_token_batch(tokens), jax.random.key(1)
    by_layer = layers.layer_estimator(model, settings)
    plain = fj.group_fisher(model.apply, example=batch, unit="batch")
    seen, squares = (jax.jit(one.observe)(model.params, batch, key) for one in (by_layer, plain))
    found = layers.read_layers(fj.welford.add(by_layer.init(model.params), seen), model, settings)
    experts = fj.mean(squares)["layers"]["mlp"]["experts"]
    own = {name: np.asarray(x["kernel"]).sum((2, 3)) for name, x in experts.items()}
    for name, wanted in own.items():
        path = f"layers/mlp/experts/{name}/kernel"
        np.testing.assert_allclose(found.experts[path].mean, wanted, rtol=1e-5)
        np.testing.assert_allclose(found.tensors[path].mean, wanted.sum(1), rtol=1e-5)
    np.testing.assert_allclose(found.experts["layers/mlp/experts"].mean, sum(own.values()), rtol=1e-5)
    lines = list(csv.DictReader(io.StringIO(layers.layers_csv({"a": found}))))
    told = [line for line in lines if line["path"] == "layers/mlp/experts" and line["expert"] == "2"]
    assert [(line["layer"], line["head"], line["parameters"]) for line in told] == [
        ("0", "", "144"),
        ("1", "", "144"),
    ]
    figure = layer_plots.experts_figure(style.LIGHT, found)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["gate", "up", "down"]
    merged = sums_of_groups("layers/mlp/experts/up/kernel", (2, 3, 8, 6), vars_of(found), 4)
    np.testing.assert_allclose(merged[:, :, 0, 0], own["up"], rtol=1e-5)


def vars_of(found):
    """Means by the fields of `Layers`."""
    return {name: {path: x.mean for path, x in getattr(found, name).items()} for name in layers.FAMILIES}


def _measured(*shape, seed=0):
    mean = np.random.default_rng(seed).exponential(size=shape) ** 3
    return layers.Measured(mean, 0.5 * mean, 2 * mean, np.full(shape, 12.0))


@pytest.mark.parametrize("intervals", [True, False])
def test_pictures_of_many_layers_heads_zeros_and_missing_intervals(intervals):
    columns = layers.columns(DecoderConfig(vocab_size=2, width=2, num_layers=40, num_heads=32, num_kv_heads=8,
                                           head_size=2, mlp_size=2, max_positions=2, qk_norm=True))  # fmt: skip
    nodes = [*columns, "layers", "layers/attention", "layers/mlp"]
    found = layers.Layers(
        {"embedding": _measured(), "final_norm/scale": _measured()},
        {f"layers/attention/{name}/kernel": _measured(40, 32 if name in "qo" else 8) for name in "qkvo"},
        {node: _measured(40, seed=i) for i, node in enumerate(nodes)},
        {}, 30.0 if intervals else 1.0, 100.0,
    )  # fmt: skip
    found.parts["layers/mlp"].mean[:7] = 0
    found.parts[columns[2]].mean[3:] = 0
    if not intervals:
        for part in found.parts.values():
            part.lower[:], part.upper[:] = np.nan, np.nan
    other = found._replace(parts={node: _measured(40, seed=50 + i) for i, node in enumerate(nodes)})
    drawings = [
        lambda theme: layer_plots.model_figure(theme, found, columns, ["embedding"], ["final_norm/scale"]),
        lambda theme: layer_plots.totals_figure(theme, found, 0.9),
        lambda theme: layer_plots.heads_figure(theme, found),
        lambda theme: layer_plots.ratio_figure(theme, found, other, columns, "$a", "b"),
    ]
    for draw in drawings:
        assert style.png(draw, style.DARK, dpi=60).startswith(b"\x89PNG")
