"""The doctor sees what is wrong: each check can fail, a faulty compiler is named, the exit code says it."""

import json
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import fisher_jax as fj
from fisher_jax.cli.doctor import arithmetic, estimators
from fisher_jax.cli.doctor import command as doctor
from fisher_jax.cli.doctor.advice import advice
from fisher_jax.cli.doctor.examination import CHECKS, examination, in_time, planned
from fisher_jax.cli.doctor.records import FAILED, RIGHT, WRONG, Check, examine
from fisher_jax.cli.doctor.settings import DoctorSettings
from fisher_jax.cli.doctor.subject import make_subject
from fisher_jax.cli.main import main
from fisher_jax.models import DecoderConfig

pytestmark = pytest.mark.optimized
NAMES = [check.name for check in CHECKS]


def decoder(**sizes):
    common = {"num_heads": 2, "num_kv_heads": 1, "tied": False}
    return DecoderConfig(**common, **sizes)


@pytest.fixture(scope="module")
def small():
    """32 tokens: what holds of the checks themselves is seen at any size."""
    config = decoder(vocab_size=11, width=8, num_layers=2, head_size=4, mlp_size=8, max_positions=8)
    return make_subject("float32", config=config, rows=4, scored=slice(3, None, 4))


@pytest.fixture(scope="module")
def large():
    """512 tokens: where jaxlib 0.10.2 begins to be wrong on CPUs."""
    config = decoder(vocab_size=64, width=16, num_layers=1, head_size=8, mlp_size=32, max_positions=32)
    return make_subject("float32", config=config, rows=16, scored=slice(15, None, 16))


def damaged(found, damage):
    """The same results with one entry, the worst placed, a little off."""
    path = max(found)
    values = found[path].astype(float).copy()
    if damage == "scaled":
        values = values * 1.01 + (values == 0)
    else:
        values.flat[np.argmax(np.abs(values))] = {"not a number": np.nan, "lost": 0.0}[damage]
    return {**found, path: values}


@pytest.mark.parametrize("name", NAMES)
def test_every_check_names_wrong_results(name, small):
    check = CHECKS[NAMES.index(name)]
    right = check.reference(small)
    assert examine(check._replace(measure=lambda subject: right), small).verdict == RIGHT
    for damage in ("scaled", "not a number", "lost"):
        record = examine(check._replace(measure=lambda subject, d=damage: damaged(right, d)), small)
        assert record.verdict == WRONG, (damage, record)
        assert record.worst == max(right)


@pytest.mark.parametrize("name", [check.name for check in CHECKS if check.quick])
def test_the_library_is_right_here(name, small):
    record = examine(CHECKS[NAMES.index(name)], small)
    assert record.verdict == RIGHT, record


def plain_exact(subject):
    """Per-token squares as anybody would write them: ``jax.vmap`` of the pullback of all scored tokens."""
    scored, labels = subject.loops.scored, subject.batch.targets[:, subject.loops.scored]

    def run(params, inputs, labels):
        def log_probs(params):
            outputs = jax.nn.log_softmax(subject.model.apply(params, inputs)[:, scored])
            return jnp.take_along_axis(outputs, labels[..., None], -1).reshape(-1)

        values, pullback = jax.vjp(log_probs, params)
        squares = jax.vmap(lambda one: jax.tree.map(jnp.square, pullback(one)[0]))(jnp.eye(values.size))
        return squares

    found = jax.jit(run)(subject.params, subject.batch.inputs, labels)
    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(found)}
    return estimators.summary(estimators.tensor_sums(leaves), np.ones(labels.size), errors=True)


def test_the_formulation_that_one_compiler_gets_wrong_is_named(large):
    check = CHECKS[NAMES.index("group_fisher exact, by token")]
    record = examine(check._replace(measure=plain_exact), large)
    faulty = jaxlib.__version__ == "0.10.2" and jax.default_backend() == "cpu" and not os.environ.get("XLA_FLAGS")
    assert record.verdict == (WRONG if faulty else RIGHT), record
    if faulty:
        (sentence,) = advice([record], jaxlib.__version__, "cpu", "")
        assert "--xla_cpu_experimental_ynn_fusion_type=" in sentence


def test_a_dropped_token_is_named(large):
    check = CHECKS[NAMES.index("group_fisher signs, by sequence")]

    def without_one(subject):
        weights = jnp.ones(subject.batch.targets.shape).at[3, 5].set(0)
        batch = fj.Batch(subject.batch.inputs, subject.batch.targets, weights)
        options = {"groups": fj.groups.row, "estimator": "signs", "unit": "sequence"}
        fisher = fj.group_fisher(subject.model.apply, example=batch, **options)
        return estimators.statistics(fisher, subject.params, batch, subject.key, errors=True)

    assert examine(check._replace(measure=without_one), large).verdict == WRONG


def rounded_to(bits):
    """Products whose operands keep so many bits after the point, as TF32 and bfloat16 do."""

    def measure(subject):
        def short(x):
            mantissa, exponent = np.frexp(np.asarray(x, np.float64))
            return np.ldexp(np.round(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent)

        a, b = map(short, arithmetic.operands(subject.dtype))
        return {"product": a @ b}

    return measure


@pytest.mark.parametrize(("bits", "name"), [(10, "TF32"), (7, "bfloat16")])
def test_reduced_products_are_named_and_explain_errors_of_their_size(bits, name):
    ones = {"x": np.ones(3)}

    def close(error):
        return Check(str(error), lambda subject: {"x": np.ones(3) * (1 + error)}, lambda subject: ones, slack=4.0)

    products = CHECKS[NAMES.index(arithmetic.PRODUCTS)]._replace(measure=rounded_to(bits))
    records = list(examination(planned((products, close(1e-7), close(2.0**-bits), close(0.9)), ["float32"])))
    assert [record.verdict for record in records] == [name, RIGHT, name, WRONG]
    first, *_ = advice(records, "0.99", "gpu", "")
    assert name in first
    assert "JAX_DEFAULT_MATMUL_PRECISION=highest" in first


def test_a_check_that_raises_is_a_record(small):
    def broken(subject):
        raise RuntimeError("the driver\nwent away")

    record = examine(CHECKS[0]._replace(measure=broken), small)
    assert record.verdict == FAILED
    assert "RuntimeError: the driver went away" in record.worst
    assert any("the driver went away" in sentence for sentence in advice([record], "0.99", "gpu", ""))


def test_every_dtype_is_held_to_its_own_rounding(small):
    half = make_subject("bfloat16", small.loops)
    check = CHECKS[NAMES.index("group_fisher sequence, by sequence")]
    assert examine(check, half).verdict == RIGHT
    scaled = examine(check._replace(measure=lambda s: {k: 1.5 * x for k, x in check.measure(s).items()}), half)
    assert scaled.verdict == WRONG


def check_of(name, found, wanted=1.0, **options):
    return Check(name, lambda subject: {"x": np.float64(found)}, lambda subject: {"x": np.float64(wanted)}, **options)


def test_what_does_not_end_in_time_is_said():
    hanging = threading.Event()
    checks = [check_of("first", 1.0), check_of("hangs", 1.0)._replace(measure=lambda subject: hanging.wait())]
    plan = planned([*checks, check_of("third", 1.0)], ["float32"])
    ended = threading.Event()
    left = iter([10.0] * 10_000)
    records = in_time(plan, lambda: examination(plan), lambda: 0.0 if ended.is_set() else next(left))
    assert next(records).verdict == RIGHT
    ended.set()
    assert [(record.name, record.verdict) for record in records] == [("hangs", "not run"), ("third", "not run")]
    hanging.set()


@pytest.mark.parametrize(("found", "code"), [(1.0, 0), (1.2, 1), (np.nan, 1)])
def test_the_exit_code_the_lines_and_the_file(found, code, tmp_path, capsys):
    file = tmp_path / "doctor.json"
    settings = DoctorSettings(dtypes=("float32",), json=file)
    checks = [check_of("good", 1.0), check_of("the other", found)]
    assert doctor.report(settings, {"jax": "1"}, time.monotonic(), checks) == code
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines())
    assert ("WRONG" in printed) == bool(code)
    written = json.loads(file.read_text())
    assert [row["verdict"] for row in written["checks"]] == [RIGHT, WRONG if code else RIGHT]
    assert bool(written["advice"]) == bool(code)
    assert written["facts"] == {"jax": "1"}


@pytest.mark.parametrize(
    "arguments",
    [["--dtypes", "float64"], ["--dtypes", "int8"], ["--json", "{there}/nowhere/file"], ["--json", "{there}"]],
)
def test_options_that_cannot_be(arguments, tmp_path, capsys):
    given = [argument.format(there=tmp_path) for argument in arguments]
    assert main(["doctor", *given]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("variable", ["JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION"])
def test_a_setting_that_jax_refuses_is_one_sentence(variable):
    arguments = [sys.executable, "-m", "fisher_jax.cli.main", "doctor"]
    environment = {**os.environ, variable: "nonsense\x1b[1m"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    assert "JAX does not start: " in done.stdout
    assert "jaxlib" in done.stdout
    assert variable in done.stdout
