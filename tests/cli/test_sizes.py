"""Sizes: no rows that do not exist, and a refusal before more memory is asked for than there is."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from running import main
from tiny import prose

from fisher_jax._support.errors import InputError
from fisher_jax._support.host_memory import available_memory, check_memory
from fisher_jax.text.corpora import Document
from fisher_jax.text.packing import pack

CPU_SECONDS, MIB = 10, 2**20


def encode(text):
    return list(text.encode())


def packed(**sizes):
    texts = [Document(str(number), prose(number, 30)) for number in range(10)]
    options = {"seq_len": 8, "max_targets": 100, "held_out_targets": 20, "vocab_size": 256, **sizes}
    return pack(texts, encode, **options)


def test_a_batch_has_no_more_rows_than_there_are():
    rows = packed().stream
    (whole,) = rows.batches(10**9)
    assert whole[0].shape == (len(rows.lengths), 8)
    assert rows.num_batches(10**9) == 1
    assert np.array_equal(whole[0], rows.tokens)
    assert rows.names_in_batch(0, 10**9) == list(rows.names)


def test_huge_budgets_take_all_of_the_text_and_no_more():
    assert packed(max_targets=10**12).stream.num_targets == packed(max_targets=10**6).stream.num_targets


def test_rows_that_would_not_fit_into_memory_are_refused():
    texts = [Document("long", "a" * 10**6), *(Document(str(number), "ab") for number in range(10**5))]
    with pytest.raises(InputError, match="--row-length"):
        pack(
            texts,
            encode,
            seq_len=10**6,
            max_targets=10**9,
            held_out_targets=0,
            vocab_size=256,
        )


def test_memory_is_checked_against_what_is_free():
    check_memory(2**30, "this", "less", available=lambda: 2**30)
    with pytest.raises(InputError, match=r"this would take 2\.0 GiB of memory, and 1\.0 GiB are free; less"):
        check_memory(2**31, "this", "less", available=lambda: 2**30)
    assert 2**20 < available_memory() < 2**50


def ended(arguments):
    """Exit code, standard error, processor seconds and peak memory of the command in a process of its own."""
    command = [sys.executable, "-m", "fisher_jax.cli.main", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, said, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "--seed", str(2**64)],
        ["report", "--text", "/dev/zero"],
        ["spectrum", "--k", "1e18"],
        ["trim", "--keep", "5", "--by", "magnitude", "--model", "/dev/zero"],
        ["compare", "/nowhere/[/x]:\x1b[2J"],
        ["train", "--width", "65536", "--layers", "10000", "--heads", "1024"],
        ["train", "--row-length", "10000000"],
    ],
)
def test_a_refusal_is_quick_and_small(arguments, tmp_path):
    peak_of_help = ended(["--help"])[3]
    code, said, seconds, peak = ended([*arguments, "--out", str(tmp_path / "out")])
    assert code == 2
    assert re.fullmatch(r"fisher-jax: [^\n]*\n", said)
    assert said[:-1].isprintable()
    assert seconds < CPU_SECONDS
    assert peak - peak_of_help < 300 * MIB
    assert not (tmp_path / "out").exists()


def test_a_million_rows_asked_for_a_few_there(tmp_path, tiny_model, capsys):
    text = tmp_path / "short.txt"
    text.write_text(prose(1, 300))
    options = ["--row-length", "16", "--batch-size", "1e6"]
    out = str(tmp_path / "out")
    assert main(["report", "--model", tiny_model, "--text", str(text), *options, "--out", out]) == 0


def test_training_with_more_rows_asked_for_than_there_are(tmp_path, capsys):
    text = tmp_path / "short.txt"
    text.write_text(prose(1, 100))
    options = ["--batch-size", "1e9", "--row-length", "16", "--width", "16", "--heads", "2", "--layers", "1"]
    out = str(tmp_path / "out")
    more = ["--steps", "2", "--optimizer", "adamw", "--held-out-tokens", "40"]
    assert main(["train", "--text", str(text), *options, *more, "--out", out]) == 0
    rows = int(re.search(r"([\d,]+) rows of 16 tokens", capsys.readouterr().out)[1].replace(",", ""))
    assert rows < 100
