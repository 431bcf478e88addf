"""`fisher-jax doctor`: whether this device and this compiler compute what they should, and what to do if not."""

import atexit
import dataclasses
import json
import math
import os
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from typing import Any

from fisher_jax._support.errors import InputError
from fisher_jax._support.printable import one_line, printable, shortened
from fisher_jax.cli.doctor import facts
from fisher_jax.cli.doctor.settings import DoctorSettings
from fisher_jax.cli.run.compiler import without_faulty_fusions
from fisher_jax.cli.run.stopping import EXIT_CODE, stop_if_requested
from fisher_jax.cli.run.tools import Tools

_WIDTH = 79
_REST = 3.0  # seconds for what comes after the last check
_NOT_RUN = "not run"
_LINE = "  {:34} {:9} {:>8} {:>8}  {:8} {:>4}"


def run(settings: DoctorSettings, tools: Tools) -> int:
    """Prints the facts, a line for every check, and what to do; 0 where all is right, 1 where something is wrong."""
    began = time.monotonic()
    found = {**facts.packages(), **facts.environment(os.environ), **facts.host()}
    remedy = without_faulty_fusions(os.environ, found["jaxlib"])
    if remedy:
        found["XLA_FLAGS of the other commands"] = f"{remedy['XLA_FLAGS']} (doctor does without, as your programs do)"
    _say_facts(found)
    try:
        about_jax = {**facts.jax_settings(), **facts.devices()}
    except Exception as problem:  # of any kind: a plugin, a driver, a setting that JAX does not know
        sentence = (
            f"JAX does not start: {one_line(problem, 400)}; correct JAX_PLATFORMS and the "
            "settings above, or install jax and jaxlib anew."
        )
        _say("\n" + _folded(printable(sentence), "", "  "))
        _write(settings, found, [], [sentence])
        return 1
    from fisher_jax.cli.doctor.examination import THREAD

    _say_facts(about_jax)
    code = EXIT_CODE  # where a signal ends the report
    try:
        code = report(settings, {**found, **about_jax}, began)
    finally:
        if any(thread.name == THREAD for thread in threading.enumerate()):
            # A check that did not end would crash on what Python takes apart at its end.
            atexit.register(_leave, code)
    return code


def _leave(code: int) -> None:
    sys.stdout.flush()
    os._exit(code)


def report(settings: DoctorSettings, found: dict[str, str], began: float, checks: Sequence[Any] | None = None) -> int:
    """The checks (by default all), their lines, the advice and the exit code."""
    import jax
    import jaxlib

    from fisher_jax.cli.doctor.advice import advice
    from fisher_jax.cli.doctor.examination import CHECKS, examination, in_time, planned

    chosen = [check for check in checks or CHECKS if check.quick or not settings.quick]
    dtypes = settings.dtypes or _dtypes(settings.quick)
    if "float64" in dtypes and not _has_float64():
        raise InputError("--dtypes float64 needs JAX_ENABLE_X64=1, without which JAX makes float32 of it.")
    _say("\nEach part of the library against loops of one token or one row in float32:\n")
    _say(_LINE.format("check", "dtype", "error", "expected", "verdict", "sec").rstrip())
    plan = planned(chosen, dtypes)
    limit = settings.seconds or math.inf
    records = []
    for record in in_time(plan, lambda: examination(plan), lambda: limit - _REST - (time.monotonic() - began)):
        stop_if_requested()
        records.append(record)
        if record.verdict != _NOT_RUN:
            _say_record(record)
    platform = jax.default_backend()
    sentences = advice(records, jaxlib.__version__, platform, os.environ.get("XLA_FLAGS", ""))
    _say_end(records, sentences, time.monotonic() - began, limit)
    _write(settings, found, records, sentences)
    first = records[: sum(check.quick for check in chosen) or 1]
    enough = all(record.verdict != _NOT_RUN for record in first)
    return 0 if enough and all(record.verdict in ("right", _NOT_RUN) for record in records) else 1


def _dtypes(quick: bool) -> tuple[str, ...]:
    """What this device offers; float16 on CPUs is emulated."""
    import jax

    if quick:
        return ("float32",)
    half = () if jax.default_backend() == "cpu" else ("float16",)
    return ("float32", "bfloat16", *half, *(("float64",) if _has_float64() else ()))


def _has_float64() -> bool:
    import jax

    return jax.dtypes.canonicalize_dtype("float64") == "float64"


def _say(text: str) -> None:
    print(text, flush=True)


def _say_facts(found: dict[str, str]) -> None:
    width = min(max(map(len, found), default=0), 24)
    for name, value in found.items():
        text = shortened(printable(f"{name:{width}}  {value}"), 400)
        _say(_folded(text, "  ", " " * (width + 4)))


def _folded(text: str, first: str, later: str) -> str:
    return textwrap.fill(
        text, _WIDTH, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )


def _say_record(record: Any) -> None:
    numbers = ("-" if math.isnan(x) else f"{x:.1e}" if x else "0" for x in (record.error, record.expected))
    _say(_LINE.format(record.name, record.dtype, *numbers, record.verdict, f"{record.seconds:.1f}"))


def _say_end(records: Sequence[Any], sentences: Sequence[str], seconds: float, limit: float) -> None:
    ran = [record for record in records if record.verdict != _NOT_RUN]
    right = sum(record.verdict == "right" for record in ran)
    summary = f"{right} of {len(ran)} checks are right, in {seconds:.0f} s."
    if len(ran) < len(records):
        summary += (
            f" {len(records) - len(ran)} more did not end within {limit:g} s; --seconds 0 gives them all the time "
            "they need."
        )
    _say("")
    for text in (summary, *sentences):
        _say(_folded(printable(text), "", "  "))


def _write(settings: DoctorSettings, found: dict[str, str], records: Sequence[Any], sentences: Sequence[str]) -> None:
    """Everything as JSON, for a bug report."""
    if settings.json is None:
        return
    rows = [{k: _finite(v) for k, v in dataclasses.asdict(record).items()} for record in records]
    text = json.dumps({"facts": found, "checks": rows, "advice": list(sentences)}, indent=1, allow_nan=False)
    try:
        settings.json.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {settings.json} cannot be written: {error.strerror}.") from error


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
