"""`fisher-jax merge` from start to end: several fine-tuned models in, one model folder out, and what it costs."""

import dataclasses
import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.cli.merge.settings import MergeSettings
from fisher_jax.cli.merge.weights import read_weights, states_digest
from fisher_jax.cli.run.json_files import digest
from fisher_jax.cli.run.model_folder import check_can_be_written, model_folder, save_model, say_written
from fisher_jax.cli.run.model_result import read_result, write_result
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.terminal import Terminal, table
from fisher_jax.cli.run.texts import default_task
from fisher_jax.cli.run.tools import Tools
from fisher_jax.models import LanguageModel
from fisher_jax.models.beside_weights import Origin, read_origin
from fisher_jax.models.functions import kept_dtype
from fisher_jax.models.loading import AUTO
from fisher_jax.text.bits_per_byte import Loss, bits_per_byte, difference, measure_in_pieces
from fisher_jax.text.held_out import held_out

TITLES = {"fisher": "Fisher information", "uniform": "equal weights", "magnitude": "magnitude"}


class Sources(NamedTuple):
    """What is merged, and what it is measured on."""

    settings: MergeSettings
    models: list[LanguageModel]
    base: LanguageModel | None
    texts: dict[str, list[str]]  # documents by the name of a text


def run(settings: MergeSettings, tools: Tools) -> int:
    """Merges, writes, loads what was written and measures it; the exit code."""
    console = Terminal()
    with run_folder(settings.out, interrupted=lambda: "interrupted; no model was written."):
        models = [read(console, tools, source) for source in settings.models]
        base = None if settings.base is None else read(console, tools, settings.base, " (base)")
        settings = dataclasses.replace(settings, dtype=written_dtype(settings.dtype, models))
        for other in [*models[1:], *([] if base is None else [base])]:
            check_same(models[0], other)
        origin = read_origin(settings.models[0])
        check_can_be_written(models[0].config, origin)
        amount = settings.split_documents, settings.documents, settings.characters
        texts = {default_task(text): held_out(models[0], text, *amount) for text in settings.text}
        sources = Sources(settings, models, base, texts)
        facts = made_from(sources)
        earlier = read_result(settings.out, "merge.json", facts, settings.overwrite)
        if earlier is None:
            with model_folder(settings.out) as incoming:
                merge_and_measure(sources, console, incoming, origin, facts, tools)
    if earlier is not None:
        if texts:
            console.print(table_of(earlier["bits_per_byte"]))
        console.print("finished before: nothing had to be computed (--overwrite merges again)")
    say_written(console, settings.out)
    return 0


def made_from(sources: Sources) -> dict[str, Any]:
    """What decides the result, by the names of a refusal."""
    settings, models, base, texts = sources
    return {
        **settings.fixed(),
        "--weights": list(settings.weights),  # as JSON gives it back
        "--models": [model.fingerprint for model in models],
        "--base": None if base is None else base.fingerprint,
        "--states": states_digest(settings.states),
        "the text": digest(texts),
    }


def merge_and_measure(
    sources: Sources, console: Terminal, incoming: Path, origin: Origin, facts: dict[str, Any], tools: Tools
) -> None:  # fmt: skip
    settings, models = sources.settings, sources.models
    merged = merge(sources, weights_of(sources, console))
    params = jax.tree.map(lambda x: np.asarray(x.astype(settings.dtype)), merged)
    save_model(incoming, models[0].config, params, models[0].tokenizer, origin)
    console.say("merged", f"in {settings.dtype}")
    content = {
        "models": {source: model.fingerprint for source, model in zip(settings.models, models, strict=True)},
        **{name: getattr(settings, name) for name in ("states", "base", "by", "weights", "floor", "scale")},
    }
    if sources.texts:
        content["bits_per_byte"] = evaluate(sources, console, incoming, tools)
    write_result(incoming / "merge.json", content, facts)


def read(console: Terminal, tools: Tools, source: str, what: str = "") -> LanguageModel:
    console.say(f"model{what}", source)
    model = tools.load(source)
    console.say_unread(model)
    return model


def written_dtype(asked: str, models: Sequence[LanguageModel]) -> str:
    """That of all models' files, unless told otherwise; they are merged in float32."""
    kept = {kept_dtype(set(model.stored.split(", "))) for model in models}
    return asked if asked != AUTO else kept.pop() if len(kept) == 1 else "float32"


def check_same(first: LanguageModel, other: LanguageModel) -> None:
    """Raises InputError where two models differ in anything but their weights, and names the first difference."""
    for field in dataclasses.fields(first.config):
        one, two = (getattr(model.config, field.name) for model in (first, other))
        if one != two:
            raise InputError(
                f"{first.name} and {other.name} have different architectures: {field.name} is {one} and {two}; only "
                "models fine-tuned from one model can be merged."
            )
    tokens = [[m.tokenizer.backend.id_to_token(i) for i in range(m.tokenizer.vocab_size)] for m in (first, other)]
    merges = [json.loads(m.tokenizer.to_json())["model"].get("merges", []) for m in (first, other)]
    for what, (left, right) in {"token": tokens, "merge": merges}.items():
        for i, (one, two) in enumerate(zip_longest(left, right)):
            if one != two:
                raise InputError(
                    f"{first.name} and {other.name} have different tokenizers: {what} {i} is {one!r} and {two!r}; a "
                    "row of the embedding would be the mean of two tokens."
                )


def weights_of(sources: Sources, console: Terminal) -> list[Any]:
    """A tree for each model: what its parameters weigh."""
    settings, models, base, _ = sources
    console.say("weights", TITLES[settings.by])
    if settings.by == "uniform":
        return [equal(model.params) for model in models]
    if settings.by == "magnitude":
        start = jax.tree.map(jnp.zeros_like, models[0].params) if base is None else base.params
        return [jax.tree.map(lambda x, y: jnp.abs(x - y), model.params, start) for model in models]
    found = read_weights(settings.states, models)
    for source, weights in zip(settings.states, found, strict=True):
        console.print(f"  {source}: {weights.words}; each parameter weighs as the mean of its group")
    return [weights.values for weights in found]


def equal(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.ones((1,) * x.ndim), params)


def merge(sources: Sources, fishers: Sequence[Any]) -> Any:
    """Merged parameters, in float32."""
    settings, base, params = sources.settings, sources.base, [model.params for model in sources.models]
    scales = list(settings.weights) or None
    if base is None:
        return fj.merge_params(params, fishers, scales=scales, floor=settings.floor)
    return fj.continual.merge_task_vectors(
        base.params, params, fishers, scale=settings.scale, scales=scales, floor=settings.floor
    )


def evaluate(sources: Sources, console: Terminal, folder: Path, tools: Tools) -> dict[str, dict[str, float]]:
    """{model: {text: bits per byte}}, printed as a table with the differences that matter."""
    settings, loaded, base, texts = sources
    number = sum(map(len, texts.values()))
    console.say("loss", f"{number} held-out documents of {' and '.join(texts)}")
    written = tools.load(folder, dtype=settings.dtype)
    models = dict(zip(settings.models, loaded, strict=True))
    if base is not None and settings.base is not None:
        models[f"{settings.base} (base)"] = base
    if settings.by != "uniform" or settings.weights or settings.base:
        mean = fj.merge_params([x.params for x in loaded], [equal(x.params) for x in loaded])
        models["plain mean (not written)"] = dataclasses.replace(loaded[0], params=mean)
    models[f"merged: {settings.out}"] = written
    of_text = {text: measure_in_pieces(list(models.values()), found) for text, found in texts.items()}
    losses = {name: {text: of_text[text][i] for text in texts} for i, name in enumerate(models)}
    told = {name: {text: bits_per_byte(loss) for text, loss in of.items()} for name, of in losses.items()}
    console.print(table_of(told))
    *others, last = losses
    for name in others:
        changes = (change(losses[last][text], losses[name][text], text) for text in texts)
        console.print(f"  merged less {name}: {', '.join(changes)}")
    console.print("  (± 95% over documents)")
    return told


def table_of(told: dict[str, dict[str, float]]) -> Table:
    """Bits per byte of every model on every text, and on all of them."""
    texts = list(next(iter(told.values())))
    several = len(texts) > 1
    rows = {
        name: [*of.values(), *([float(np.mean(list(of.values())))] if several else [])] for name, of in told.items()
    }
    header = ["bits per byte", *texts, *(["mean"] if several else [])]
    return table(header, ([name, *(f"{x:.4f}" for x in values)] for name, values in rows.items()))


def change(after: Loss, before: Loss, text: str) -> str:
    mean, error = difference(after, before)
    return f"{mean:+.4f} ± {1.96 * error:.4f} on {text}"
