"""`fisher-jax trim` from start to end: a smaller model on disk, and what that costs."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax._support.printable import readable
from fisher_jax.cli.report.orderings import NAMES, orderings
from fisher_jax.cli.report.task_choice import candidates, choose
from fisher_jax.cli.report.task_state import Task, check_model, read_task
from fisher_jax.cli.run.choice_error import Way
from fisher_jax.cli.run.json_files import digest
from fisher_jax.cli.run.model_folder import check_can_be_written, model_folder, save_model, say_written
from fisher_jax.cli.run.model_result import read_result, write_result
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.terminal import Terminal
from fisher_jax.cli.run.tools import Tools
from fisher_jax.cli.trim.settings import TrimSettings
from fisher_jax.models import LanguageModel
from fisher_jax.models.beside_weights import Origin, read_origin
from fisher_jax.models.trimming import cut_model, kept_tokens, read_vocabulary
from fisher_jax.text.bits_per_byte import Loss, bits_per_byte, difference, measure_in_pieces
from fisher_jax.text.corpora import describe_sources
from fisher_jax.text.held_out import held_out


def run(settings: TrimSettings, tools: Tools) -> int:
    """Cuts, writes, loads what was written and measures it; the exit code."""
    console = Terminal()
    with run_folder(settings.out, interrupted=lambda: "interrupted; no model was written."):
        task = None if settings.state is None else task_of(settings.state, settings.task)
        if task is not None:
            console.say("state", task.place)
        console.say("model", settings.model)
        model = tools.load(settings.model, dtype=settings.dtype)
        settings = dataclasses.replace(settings, dtype=model.dtype)
        console.print(f"  {describe(model)}")
        console.say_weights(model)
        console.say_unread(model)
        origin = read_origin(settings.model)
        check_can_be_written(model.config, origin)
        if task is not None:
            check_model(task, model)
        texts = held_out(model, settings.text, settings.split_documents, settings.documents, settings.characters)
        facts = made_from(settings, model, task, texts)
        earlier = read_result(settings.out, "trim.json", facts, settings.overwrite)
        if earlier is None:
            with model_folder(settings.out) as incoming:
                trim(settings, console, incoming, model, origin, task, texts, facts, tools)
    if earlier is not None:
        for line in told(earlier):
            console.print(f"  {line}")
        console.print("finished before: nothing had to be computed (--overwrite cuts again)")
    say_written(console, settings.out)
    return 0


def made_from(
    settings: TrimSettings, model: LanguageModel, task: Task | None, texts: list[str]
) -> dict[str, Any]:  # fmt: skip
    """What decides the result, by the names of a refusal."""
    scores = None if task is None else digest(dataclasses.asdict(task.progress))
    return {**settings.fixed(), "the model": model.fingerprint, "the state": scores, "the text": digest(texts)}


def trim(
    settings: TrimSettings, console: Terminal, incoming: Path, model: LanguageModel, origin: Origin,
    task: Task | None, texts: list[str], facts: dict[str, Any], tools: Tools,
) -> None:  # fmt: skip
    vocabulary = read_vocabulary(model.tokenizer)
    order = most_important_first(model, None if task is None else task.arrays, settings.by)
    kept = kept_tokens(vocabulary, order[order < vocabulary.size].tolist(), settings.keep)
    trimmed = cut_model(model, kept)
    check_texts(model, trimmed, texts)
    console.say(
        "cut",
        f"{len(kept):,} of {vocabulary.size:,} tokens stay, by {NAMES[settings.by]}; among them "
        f"{len(vocabulary.required):,} single bytes and special tokens, so every text that could be encoded "
        "still can",
    )
    params = jax.tree.map(lambda x: np.asarray(x.astype(settings.dtype)), trimmed.params)
    save_model(incoming, trimmed.config, params, trimmed.tokenizer, origin.renumbered(kept))
    written = dataclasses.replace(tools.load(incoming, dtype=settings.dtype), name=settings.out.resolve().name)
    size = (incoming / "model.safetensors").stat().st_size
    console.print(f"  {describe(written)}, {size / 2**20:,.0f} MiB of weights")
    largest = largest_difference(model, written, kept, texts)
    console.print(
        f"  on {settings.dtype} weights read back: logits of the kept tokens differ by at most {largest:.1e} from "
        "those of the whole model"
    )
    console.say("loss", f"{len(texts)} held-out documents of {describe_sources(settings.text)}")
    before, after = measure_in_pieces([model, written], texts)
    result = summary(before, after)
    for line in told(result):
        console.print(f"  {line}")
    dropped = [readable(model.tokenizer.token_text(int(i))) for i in order[~np.isin(order, kept)][:12]]
    console.print(f"  most important tokens that went: {'  '.join(dropped)}")
    content = result | {
        "by": settings.by,
        "largest_logit_difference": largest,
        "model": model.fingerprint,
        "kept_token_ids": kept.tolist(),
    }
    write_result(incoming / "trim.json", content, facts)


def task_of(state: str, name: str | None) -> Task:
    """The named task of a report, or the only one that fits."""
    (task,) = choose([state], [candidates(state, name)], way=lambda tasks: Way(("--task", tasks[0].name)))
    return read_task(task)


def describe(model: LanguageModel) -> str:
    size = sum(x.size for x in jax.tree.leaves(model.params))
    share = model.head(model.params).size / size
    return (
        f"{model.name}: {size:,} parameters, vocabulary {model.config.vocab_size:,} ({share:.0%} of them in the "
        f"{'tied ' if model.config.tied else ''}head)"
    )


def most_important_first(model: LanguageModel, scores: dict[str, Any] | None, by: str) -> np.ndarray:
    head = np.asarray(model.head(model.params), np.float32)
    none = np.zeros(len(head))
    found = orderings(
        none if scores is None else np.asarray(fj.welford.mean(scores["empirical"])),
        none if scores is None else np.asarray(fj.welford.mean(scores["true"])),
        head,
        none if scores is None else np.asarray(scores["counts"]),
    )
    return next(o for o in found if o.name == NAMES[by]).permutations[0][::-1]


def check_texts(model: LanguageModel, trimmed: LanguageModel, texts: list[str]) -> None:
    """Both tokenizers give back the same text; a loss per byte would mean nothing otherwise."""
    for text in texts:
        before, after = (m.tokenizer.decode(m.tokenizer.encode(text, special=False)) for m in (model, trimmed))
        if before != after:
            raise InputError("the smaller tokenizer does not give back a held-out text; please report this")


def largest_difference(model: LanguageModel, written: LanguageModel, kept: np.ndarray, texts: list[str]) -> float:
    """Of logits of kept tokens, on the beginning of the first texts as the smaller tokenizer cuts them."""
    rows = [written.tokenizer.encode(text, special=False)[:64] for text in texts[:2]]
    length = min(map(len, rows))
    short = np.array([row[:length] for row in rows], np.int32)
    whole = np.asarray(model.apply(model.params, jnp.asarray(kept[short], jnp.int32)))[..., kept]
    return float(np.max(np.abs(whole - np.asarray(written.apply(written.params, jnp.asarray(short))))))


def summary(before: Loss, after: Loss) -> dict[str, Any]:
    change, error = difference(after, before)
    return {
        "bits_per_byte_before": bits_per_byte(before),
        "bits_per_byte_after": bits_per_byte(after),
        "change": change,
        "standard_error_of_change": error,
        "bytes": int(before.bytes.sum()),
        "documents": len(before.bytes),
        "tokens_before": int(before.tokens.sum()),
        "tokens_after": int(after.tokens.sum()),
    }


def told(result: dict[str, Any]) -> list[str]:
    more = result["tokens_after"] / result["tokens_before"] - 1
    return [
        f"before: {result['bits_per_byte_before']:.4f} bits per byte, {result['tokens_before']:,} tokens for "
        f"{result['bytes']:,} bytes",
        f"after:  {result['bits_per_byte_after']:.4f} bits per byte, {result['tokens_after']:,} tokens ({more:+.1%})",
        f"change: {result['change']:+.4f} ± {1.96 * result['standard_error_of_change']:.4f} bits per byte (95%, over "
        f"{result['documents']} documents)",
    ]
