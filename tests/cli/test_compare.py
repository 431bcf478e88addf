"""`fisher-jax compare`: the tests of SciPy on the documents' own numbers, what is told of them, refusals."""

import csv
import shutil

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import tiny
from kept import keep, places
from running import main, quick

from fisher_jax.models import load

MORE, LESS, NEVER, ONCE = 260, 261, 5, 6  # rows that gain, lose, are 0 in both texts, or owe all to one document
DOCUMENTS = 12, 20


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("compare") / "model")


@pytest.fixture(scope="module")
def values(model):
    """{"a" or "b": {"empirical", "true" and "layers": [documents, groups]}}."""
    loaded, rng = load(model), np.random.default_rng(0)
    where, number = places(loaded)
    found = {}
    for name, documents in zip("ab", DOCUMENTS, strict=True):
        rows = rng.gamma(16.0, 1 / 16, (documents, loaded.config.vocab_size))
        rows[:, NEVER] = 0
        rows[:, ONCE] = np.arange(documents) == 3
        rows[:, MORE] *= {"a": 1, "b": 4}[name]
        rows[:, LESS] *= {"a": 8, "b": 1}[name]
        layers = rng.gamma(16.0, 1 / 16, (documents, number))
        layers[:, where["tensors"]["layers/mlp/up/kernel"][1]] *= {"a": 1, "b": 5}[name]
        layers[:, where["wholes"]["model"]] *= {"a": 3, "b": 1}[name]
        found[name] = {"empirical": rows, "true": rows[:, ::-1], "layers": layers}
    return found


@pytest.fixture(scope="module")
def report(model, values, tmp_path_factory):
    """A folder with the tasks a and b, all parameters."""
    out, loaded = tmp_path_factory.mktemp("report") / "report", load(model)
    counts = np.zeros(loaded.config.vocab_size, int)
    counts[MORE] = 6
    for name, of in values.items():
        rows = {kind: of[kind] for kind in ("empirical", "true")}
        keep(out, name, loaded, rows, of["layers"], counts=counts)
    return out


@pytest.fixture(scope="module")
def compared(model, report, tmp_path_factory):
    """The whole command on it, one kind with its page."""
    out = tmp_path_factory.mktemp("compared") / "out"
    assert main(["compare", str(report), "--model", str(model), "--kind", "empirical", "--out", str(out)]) == 0
    return out


def lines(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def p_values(before, after):
    """The larger of Welch's and Student's, with the degrees of freedom of documents of one length."""
    return np.maximum(*(scipy.stats.ttest_ind(after, before, equal_var=equal).pvalue for equal in (False, True)))


def test_every_row_has_the_tests_of_scipy(compared, values):
    found = {int(line["token_id"]): line for line in lines(compared / "compare.csv")}
    before, after = (np.float32(values[name]["empirical"]).astype(float) for name in "ab")
    tested = np.setdiff1d(np.arange(before.shape[1]), [NEVER, ONCE])
    p = p_values(before[:, tested], after[:, tested])
    q = scipy.stats.false_discovery_control(p)
    for i, row in enumerate(tested):
        line = found[row]
        assert float(line["p"]) == pytest.approx(p[i], rel=1e-4)
        assert float(line["q"]) == pytest.approx(q[i], rel=1e-4)
        assert float(line["difference"]) == pytest.approx(
            after[:, row].mean() - before[:, row].mean(), rel=1e-4, abs=1e-6
        )
        assert not line["not_tested"]
    assert found[NEVER]["not_tested"] == "importance 0"
    assert found[ONCE]["not_tested"] == "fewer than 5 effective observations"
    assert found[ONCE]["p"] == found[ONCE]["q"] == ""
    assert (found[MORE]["count_a"], found[MORE]["count_b"]) == ("6", "6")


def test_the_page_names_what_gained_and_lost(compared, model):
    text = (compared / "compare.md").read_text(encoding="utf-8")
    tokenizer = load(model).tokenizer
    more, less = (f"“{tokenizer.token_text(row).replace(' ', '␣')}”" for row in (MORE, LESS))
    assert f"matters more in b (most of all {more}" in text
    assert f"less (most of all {less}" in text
    assert f"2 of {load(model).config.vocab_size - 2} testable rows" in text
    assert "| all of them | 2 |" in text
    pictures = {path.name for path in (compared / "figures").iterdir()}
    assert pictures == {"compare-rows-empirical.png", "compare-changes-empirical.png", "compare-layers.png"}
    for name in pictures:
        assert matplotlib.image.imread(compared / "figures" / name).std() > 0.05  # something is drawn
    assert (compared / "compare.html").read_text(encoding="utf-8").count("<img") == 3


def test_the_error_of_the_total_is_that_of_rows_that_move_together(model, tmp_path):
    from fisher_jax.cli.compare.shift import row_shift
    from fisher_jax.cli.report.task_state import find_task, read_task, tasks_of

    loaded, rng = load(model), np.random.default_rng(1)
    size = loaded.config.vocab_size
    shares = rng.dirichlet(np.ones(size))
    totals = [rng.gamma(4.0, 1.0, documents) for documents in DOCUMENTS]
    for name, total in zip("ab", totals, strict=True):
        keep(tmp_path / "report", name, loaded, {"empirical": total[:, None] * shares})
    tasks = (read_task(find_task(tasks_of(tmp_path / "report"), name)) for name in "ab")
    found = row_shift(*tasks, "empirical").total
    assert found.after - found.before == pytest.approx(totals[1].mean() - totals[0].mean(), rel=1e-4)
    assert found.error == pytest.approx(np.hypot(*(scipy.stats.sem(total) for total in totals)), rel=1e-4)
    exact = scipy.stats.ttest_ind(*totals, equal_var=False).pvalue
    assert exact < found.p < 1


def test_parts_of_the_model_are_adjusted_within_their_family(compared, values, model):
    found = lines(compared / "compare_layers.csv")
    where, _ = places(load(model))
    before, after = (np.float32(values[name]["layers"]).astype(float) for name in "ab")
    p = p_values(before, after)
    several = [path for path in where["parts"] if path in ("layers", "layers/attention", "layers/mlp")]
    families = {**where, "parts": {path: where["parts"][path] for path in several}}
    assert not families.pop("experts")  # a model without any
    for family, paths in families.items():
        indices = np.concatenate([paths[path].ravel() for path in sorted(paths)])
        wanted = scipy.stats.false_discovery_control(p[indices])
        told = [line for line in found if line["family"] == family]
        assert [line["path"] for line in told] == [path for path in sorted(paths) for _ in paths[path].ravel()]
        np.testing.assert_allclose([float(line["q"]) for line in told], wanted, rtol=1e-4)
    up = next(x for x in found if (x["path"], x["layer"]) == ("layers/mlp/up/kernel", "1"))
    assert float(up["q"]) < 0.01
    means = [x[:, where["wholes"]["model"]].mean() for x in (before, after)]
    told = f"whole model is {means[0]:.3g} in a and {means[1]:.3g} in b"
    assert told in (compared / "compare.md").read_text(encoding="utf-8")


def test_two_folders_of_one_task_and_both_kinds(model, report, tmp_path, capsys):
    other, out = tmp_path / "other:one", tmp_path / "out"
    shutil.copytree(report, other)
    options = ["--model", str(model), "--out", str(out), "--q", "0.001"]
    assert quick(["compare", f"{report}:a", f"{other}:b", *options]) == 0
    assert {line["kind"] for line in lines(out / "compare.csv")} == {"empirical", "true"}
    assert "testable rows of the head differ at q < 0.001" in capsys.readouterr().out
    assert "is in both" not in (out / "compare.md").read_text()


def test_notes_on_what_the_numbers_cannot_say(model, values, tmp_path, capsys):
    loaded, out = load(model), tmp_path / "report"
    for name, of in values.items():
        layers = of["layers"] if name == "a" else None
        few = slice(3) if name == "b" else slice(None)
        keep(out, name, loaded, {"empirical": of["empirical"][few]}, layers, unit="sequence")
    options = ["--kind", "empirical", "--model", str(model), "--out", str(tmp_path / "out")]
    assert quick(["compare", str(out), *options]) == 0
    told = capsys.readouterr().out
    assert "Layers are not compared: b was measured without --parameters all." in told
    assert "b has only 3 sequences" in told
    assert "--unit document is the honest choice" in told
    assert not (tmp_path / "out" / "compare_layers.csv").exists()


@pytest.fixture(scope="module")
def others(model, values, tmp_path_factory):
    """A folder with a task for each thing that keeps it from being compared with task a."""
    out, loaded, rows = tmp_path_factory.mktemp("others") / "others", load(model), values["b"]["empirical"]
    keep(out, "unit", loaded, {"empirical": rows}, unit="sequence")
    keep(out, "length", loaded, {"empirical": rows}, row_length=64)
    keep(out, "short", loaded, {"empirical": rows[:1]})
    keep(out, "unfinished", loaded, {"empirical": rows}, done=0)
    keep(out, "same", loaded, {"empirical": rows}, text="digest of a")
    for name in ("nothing", "zero"):
        keep(out, name, loaded, {"empirical": 0 * rows})
    keep(out, "model", loaded, {"empirical": rows}, fingerprint="0123456789abcdef")
    return out


@pytest.mark.parametrize(
    ("reports", "sentence"),
    [
        (["{r}:a", "{r}:a"], "A and B are both"),
        (["{r}:a"], "one report alone is compared where it holds two finished tasks"),
        (["{r}:a", "{r}:c"], "has no task 'c'; it holds a, b"),
        (["{r}:a", "nowhere"], "nowhere holds no state"),
        (["{r}", "{r}", "{r}"], "two reports are compared, found 3"),
        (["{r}:a", "{o}:model"], "importance is compared between texts, for one model"),
        (["{r}:a", "{o}:unit"], "measured with --unit document and"),
        (["{r}:a", "{o}:length"], "measured with --row-length 32 and"),
        (["{r}:a", "{o}:short"], "has 1 document, and an error of the mean needs two or more"),
        (["{r}:a", "{o}:unfinished"], "is not finished (0 of 1 batches)"),
        (["{r}:a", "{o}:same"], "on the very same text"),
        (["{o}:nothing", "{o}:zero"], "cannot be compared: no group has 5 effective observations"),
    ],
)
def test_input_that_cannot_be_used(reports, sentence, others, report, model, tmp_path, capsys):
    out = tmp_path / "out"
    named = [name.format(r=report, o=others) for name in reports]
    assert main(["compare", *named, "--model", str(model), "--kind", "empirical", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_model_is_held_in_the_dtype_of_its_reports(model, tmp_path):
    found = []

    def loading(source, **options):
        found.append(load(source, **options))
        return found[-1]

    values = np.random.default_rng(0).gamma(16.0, 1 / 16, (8, load(model).config.vocab_size))
    for name in "ab":
        keep(tmp_path / "report", name, load(model), {"true": values}, dtype="bfloat16")
    arguments = ["compare", str(tmp_path / "report"), "--model", str(model), "--out", str(tmp_path / "out")]
    assert quick(arguments, load=loading) == 0
    assert [one.dtype for one in found] == ["bfloat16"]
