"""`fisher-jax spectrum` on a tiny random model: its numbers against float64, its files, its refusals."""

import csv
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from running import after, interrupt, main

from fisher_jax.cli.spectrum.command import saving
from fisher_jax.cli.spectrum.measure import basis_size
from fisher_jax.cli.spectrum.settings import SpectrumSettings
from fisher_jax.models import load
from fisher_jax.models.weight_names import flatten, unflatten
from fisher_jax.text.corpora import Document
from fisher_jax.text.packing import pack
from tests.models import decoder_oracle

LENGTH, TOKENS = 16, 45


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """A folder with a model of one layer."""
    return str(tiny.write_model(tmp_path_factory.mktemp("one") / "tiny-llama", layers=1))


@pytest.fixture(scope="module")
def loaded(one_layer):
    return load(one_layer)


@pytest.fixture
def run(one_layer, loaded):
    """The command; the model is one object in all runs, so that nothing compiles twice."""

    def load_once(source, **options):
        return loaded if source == one_layer else load(source, **options)

    return functools.partial(main, load=load_once)


@pytest.fixture
def arguments(one_layer, texts):
    """Options of a run."""

    def build(out, *more):
        options = ["--model", one_layer, "--text", *texts[:5], "--row-length", str(LENGTH)]
        options += ["--max-tokens", str(TOKENS), "--batch-size", "2"]
        return ["spectrum", "--out", str(out), *options, *more]

    return build


def _rows(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _numbers(path, field):
    return np.array([float(row[field]) for row in _rows(path)])


class _Dense:
    """Logits as a float64 function of the chosen parameters, on the rows that the command reads."""

    def __init__(self, model, texts, names):
        self.model = model
        documents = [Document(text, Path(text).read_text(encoding="utf-8")) for text in texts]
        rows = pack(
            documents, self.model.tokenizer.encode, seq_len=LENGTH, max_targets=TOKENS, held_out_targets=0,
            vocab_size=self.model.config.vocab_size,
        ).stream  # fmt: skip
        self.rows = [tokens[:length] for tokens, length in zip(rows.tokens, rows.lengths, strict=True)]
        self.flat = {name: np.asarray(x, np.float64) for name, x in flatten(self.model.params).items()}
        self.names = names
        self.point = np.concatenate([self.flat[name].ravel() for name in names])

    def logits(self, vector):
        values, start = dict(self.flat), 0
        for name in self.names:
            size = values[name].size
            values[name] = vector[start : start + size].reshape(values[name].shape)
            start += size
        params = unflatten(values)
        return np.concatenate(
            [decoder_oracle.logits(self.model.config, params, row[None])[0, :-1] for row in self.rows]
        )

    def loss(self, vector):
        logits, targets = self.logits(vector), np.concatenate([row[1:] for row in self.rows])
        top = logits.max(1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(1))
        return np.mean(log_sum - logits[np.arange(len(targets)), targets])

    def ggn(self, step=1e-5):
        units = step * np.eye(self.point.size)
        jacobian = np.stack([self.logits(self.point + e) - self.logits(self.point - e) for e in units], -1) / (
            2 * step
        )
        logits = self.logits(self.point)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        mean = np.einsum("tv,tvi->ti", p, jacobian)
        return (np.einsum("tv,tvi,tvj->ij", p, jacobian, jacobian) - mean.T @ mean) / len(p)

    def hessian(self, step=1e-4):
        """Second differences."""
        units, at = step * np.eye(self.point.size), lambda e: self.loss(self.point + e)
        middle, one = at(0), np.array([at(e) + at(-e) for e in units])
        out = np.diag((one - 2 * middle) / step**2)
        for i in range(len(units)):
            for j in range(i):
                both = at(units[i] + units[j]) + at(-units[i] - units[j])
                out[i, j] = out[j, i] = (both - one[i] - one[j] + 2 * middle) / (2 * step**2)
        return out


def test_the_table_and_the_pages_of_the_ggn(tmp_path, arguments, run, loaded, texts, capsys):
    out = tmp_path / "out"
    more = ["--density", "--density-steps", "5", "--probes", "2", "--blocks", "--block-tokens", "9"]
    assert run(arguments(out, "--parameters", "mlp_norm", "--k", "4", *more)) == 0
    dense = _Dense(loaded, texts[:5], ["layers/mlp_norm/scale"])
    wanted = np.linalg.eigvalsh(dense.ggn())[::-1]
    found, bounds = _numbers(out / "spectrum.csv", "eigenvalue"), _numbers(out / "spectrum.csv", "error_bound")
    assert np.all(np.abs(found - wanted[:4]) <= bounds + 1e-6 * wanted[0])
    assert np.all(bounds <= 1e-2 * found)
    printed = capsys.readouterr().out
    for value in found:
        assert f"{value:.6g}" in printed
    _pages(out, {"spectrum-eigenvalues", "spectrum-density", "spectrum-blocks", "spectrum-capacity"})
    assert f"{found[0]:.6g}" in (out / "spectrum.md").read_text(encoding="utf-8")
    blocks = {row["tensor"]: row for row in _rows(out / "blocks.csv")}
    assert list(blocks) == ["layers/mlp_norm/scale"]
    for row in blocks.values():
        values = np.array([float(x) for x in row["eigenvalues"].split()])
        assert row["scores"] == str(len(values)) == "9"
        assert float(row["participation_ratio"]) == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
    share = _numbers(out / "density.csv", "positive_per_decade")
    cell = np.diff(_numbers(out / "density.csv", "log10_size"))[0]
    assert 0.5 < share.sum() * cell < 1.001
    assert not (out / "unfinished").exists()


def _pages(out, names):
    page = (out / "spectrum.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r'"data:image/png;base64,[^"]*"', "", page)
    assert page.count("<img") == len(names)
    assert {path.stem for path in (out / "figures").iterdir()} == names
    for path in (out / "figures").iterdir():
        raw = path.read_bytes()
        assert raw.startswith(b"\x89PNG")
        assert len(raw) > 10_000  # an empty frame takes less
        assert f"figures/{path.name}" in (out / "spectrum.md").read_text(encoding="utf-8")


def test_both_ends_of_the_hessian_resumed_after_an_interruption(tmp_path, arguments, run, loaded, texts, capsys):
    out = tmp_path / "out"
    few = arguments(out, "--parameters", "mlp_norm", "--k", "3", "--operator", "hessian", "--checkpoint-every", "0")
    assert run(few, after_step=after(6, interrupt)) == 130
    assert "--resume goes on" in capsys.readouterr().out
    assert run(few) == 2
    assert "holds an unfinished run" in capsys.readouterr().err
    assert run([*few, "--resume", "--seed", "1"]) == 2
    assert "had --seed 0, and this one has 1" in capsys.readouterr().err
    assert run([*few, "--resume"]) == 0
    assert not (out / "unfinished").exists()
    wanted = np.linalg.eigvalsh(_Dense(loaded, texts[:5], ["layers/mlp_norm/scale"]).hessian())
    found = _numbers(out / "spectrum.csv", "eigenvalue")
    assert [row["end"] for row in _rows(out / "spectrum.csv")] == ["largest"] * 3 + ["smallest"] * 3
    assert np.all(np.abs(found - np.concatenate([wanted[::-1][:3], wanted[:3]])) <= 1e-5 * np.abs(wanted).max())
    assert found[-1] < 0
    assert "negative eigenvalues" in (out / "spectrum.md").read_text(encoding="utf-8")
    _pages(out, {"spectrum-eigenvalues"})


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--parameters", "nothing"], "matches no parameter of tiny-llama; there are embedding, final_norm/scale"),
        (["--parameters", "("], "is not a regular expression"),
        (["--parameters", "final_norm", "--k", "17"], "--k 17 is more than the 16 entries"),
        (["--row-length", "60", "--max-tokens", "9", "--text", "SHORT"], "fewer than one sequence of 60"),
        (["--row-length", "65"], "longer than the 64 positions"),
        (["--max-products", "5"], "fewer than the 10 eigenvalues"),
        (["--basis", "11"], "need at least 12 vectors"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--text", "nowhere.txt"], "there is no text file nowhere.txt"),
    ],
)
def test_bad_input(more, sentence, tmp_path, arguments, run, capsys):
    short = tmp_path / "short.txt"
    short.write_text("the river runs")
    out = tmp_path / "out"
    assert run(arguments(out, *(str(short) if word == "SHORT" else word for word in more))) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("fisher-jax: ")
    assert captured.err.count("\n") == 1
    assert sentence in captured.err
    assert not out.exists()


@pytest.mark.parametrize("more", [["--k", "0"], ["--tol", "2"], ["--operator", "kfac"], ["--row-length", "1"]])
def test_options_out_of_range(more, tmp_path, arguments, run, capsys):
    assert run(arguments(tmp_path / "out", *more)) == 2
    assert more[0] in capsys.readouterr().err


def test_a_loss_that_is_not_a_number(tmp_path, arguments, run, capsys):
    poisoned = tiny.write_model(tmp_path / "poisoned", poison=True)
    out = tmp_path / "out"
    assert run(arguments(out, "--model", str(poisoned), "--parameters", "mlp_norm", "--k", "1")) == 2
    assert "so it has no curvature here" in capsys.readouterr().err
    assert not out.exists()


def test_the_basis_of_a_large_model_fits():
    million = 1_000_000
    assert basis_size(SpectrumSettings(), 135 * million) == 20
    assert basis_size(SpectrumSettings(), million) == 40
    assert basis_size(SpectrumSettings(), 16) == 16
    assert basis_size(SpectrumSettings(operator="hessian"), 135 * million) == 30
    assert basis_size(SpectrumSettings(basis=25), 135 * million) == 25


def test_a_large_basis_is_saved_only_on_request():
    large, small = 10_800_000_000, 80_000_000
    assert saving(SpectrumSettings(), large) == (None, 0)
    assert saving(SpectrumSettings(), small) == (30, 2 * small)
    assert saving(SpectrumSettings(resume=True), large) == (30, 2 * large)
    assert saving(SpectrumSettings(checkpoint_every=5), large) == (5, 2 * large)


def test_it_stops_as_soon_as_all_have_converged(tmp_path, arguments, run, loaded, texts, capsys):
    out = tmp_path / "out"
    assert run(arguments(out, "--parameters", "layers/.*_norm|final_norm|/q/", "--k", "2", "--basis", "60")) == 0
    printed = capsys.readouterr().out
    products = int(re.search(r"products: (\d+)", printed).group(1))
    assert 2 < products < 30
    assert re.search(rf"products \| {products} of at most 300", (out / "spectrum.md").read_text(encoding="utf-8"))
    paths = ["layers/attention_norm/scale", "layers/mlp_norm/scale", "final_norm/scale", "layers/attention/q/kernel"]
    wanted = np.linalg.eigvalsh(_Dense(loaded, texts[:5], paths).ggn())[::-1]
    found, bounds = _numbers(out / "spectrum.csv", "eigenvalue"), _numbers(out / "spectrum.csv", "error_bound")
    assert np.all(np.abs(found - wanted[:2]) <= bounds + 1e-5 * wanted[0])
    assert np.all(bounds <= 0.01 * found)
