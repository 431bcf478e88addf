"""What every parameter of a model weighs in a merging: from the state of a report, or from a safetensors file."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax._support.errors import InputError
from fisher_jax.cli.report.layers import on_parts, part_sizes
from fisher_jax.cli.report.task_choice import candidates, choose, lacks_layers
from fisher_jax.cli.report.task_state import Task, check_model, layer_settings, read_task
from fisher_jax.cli.run.choice_error import Way
from fisher_jax.cli.run.json_files import digest
from fisher_jax.models import LanguageModel
from fisher_jax.models.weight_names import flatten, unflatten
from fisher_jax.uses.trees import check_not_negative


class Weights(NamedTuple):
    """Fisher information of one model."""

    values: Any  # a tree like the parameters, of arrays that broadcast against them: of one parameter of each group
    kind: str | None  # empirical or true, where it is known
    words: str  # how fine it is


def read_weights(sources: Sequence[str], loaded: Sequence[LanguageModel]) -> list[Weights]:
    """One for each model, in order.

    A report keeps sums over groups. Each parameter gets the mean of its group: rows of the head (entries, with
    ``--groups param``), as they were measured in their use as head; attention heads and experts of each layer; else
    whole tensors of each layer. A safetensors file of `fj.exchange.save` brings groups of its own, down to single
    parameters.

    Raises:
        InputError: a state of another model, one that lacks groups, a negative Fisher, or states of different kinds.
    """
    tasks = _tasks(sources)
    found = [_read(source, tasks.get(source), model, loaded) for source, model in zip(sources, loaded, strict=True)]
    kinds = {weights.kind: source for weights, source in zip(found, sources, strict=True) if weights.kind}
    if len(kinds) > 1:
        told = " and ".join(f"the {kind} Fisher in {source}" for kind, source in kinds.items())
        raise InputError(f"the states hold {told}, which weigh differently; measure all of them with one --kind.")
    return found


def _tasks(sources: Sequence[str]) -> dict[str, Task]:
    """The task of every source that is a report."""
    reports = [source for source in dict.fromkeys(sources) if not source.endswith(".safetensors")]
    found = [candidates(source, lacks=lacks_layers) for source in reports]

    def way(tasks: tuple[Task, ...]) -> Way:
        asked = [(report, task.place) for report, task, of in zip(reports, tasks, found, strict=True) if len(of) > 1]
        return Way(replaced={report: (place,) for report, place in asked}, option="--states")

    def one_kind(tasks: tuple[Task, ...]) -> bool:
        return len({task.progress.settings["--kind"] for task in tasks}) == 1

    return dict(zip(reports, choose(reports, found, together=one_kind, way=way), strict=True))


def states_digest(sources: Sequence[str]) -> str:
    """A short name for what the states of a merging hold."""
    tasks = _tasks(sources)
    return digest([asdict(tasks[source].progress) if source in tasks else _of_file(source) for source in sources])


def _of_file(source: str) -> str:
    fj.exchange.describe(source)  # says what is wrong with it
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()


def _read(source: str, task: Task | None, model: LanguageModel, loaded: Sequence[LanguageModel]) -> Weights:
    if task is None:
        sums, kind, words = _from_file(Path(source))
    else:
        _check_order(task, model, loaded)
        task = read_task(task)
        sums, kind, words = _from_report(task, model)
    try:
        values = fj.per_parameter(sums, model.params)
        check_not_negative(values, source)
    except ValueError as error:
        raise InputError(f"{source} does not go with {model.name}: {error}.") from None
    return Weights(values, kind, words)


def _check_order(task: Task, model: LanguageModel, loaded: Sequence[LanguageModel]) -> None:
    other = next((x for x in loaded if x.fingerprint == task.progress.model), None)
    if other is not None and other.fingerprint != model.fingerprint:
        raise InputError(
            f"{task.place} was measured on {other.name} ({other.fingerprint}) and stands beside {model.name} "
            f"({model.fingerprint}); give --states in the order of --models."
        )
    check_model(task, model)


def _from_file(path: Path) -> tuple[Any, str | None, str]:
    content = fj.exchange.describe(path)
    if content["content"] == "foreign":
        raise InputError(f"{path} was not written by fj.exchange.save; save the Fisher information with it.")
    kind = content["metadata"].get("kind")
    return fj.mean(fj.exchange.load(path)), kind, "groups of the file"


def _from_report(task: Task, model: LanguageModel) -> tuple[Any, str | None, str]:
    if "layers" not in task.arrays:
        raise InputError(
            f"{task.place} holds rows of the head alone, and merging needs every tensor; measure the model with "
            "fisher-jax report --parameters all."
        )
    kind = task.progress.settings["--kind"]
    parts = on_parts(fj.welford.mean(task.arrays["layers"]), part_sizes(model, layer_settings(task.progress)))
    by_entry = "param" in task.arrays
    rows = fj.welford.mean(task.arrays["param" if by_entry else kind])
    leaves, size = flatten(model.params), model.config.head_size
    found = {path: sums_of_groups(path, leaf.shape, parts, size) for path, leaf in leaves.items()}
    found["embedding" if model.config.tied else "head"] = rows if by_entry else rows[:, None]
    units = f"{'entries' if by_entry else 'rows'} of the head (in its use as head), attention heads"
    return unflatten(found), kind, f"{units}{', experts' if parts['experts'] else ''}, else whole tensors"


def sums_of_groups(path: str, shape: tuple[int, ...], parts: dict[str, dict[str, np.ndarray]], head_size: int) -> Any:
    """Sums over the groups of one parameter, with its axes: of length 1 where they were summed."""
    if path not in parts["heads"]:
        total = parts["experts"].get(path, parts["tensors"][path])
        return jnp.asarray(total.reshape(total.shape + (1,) * (len(shape) - total.ndim)), jnp.float32)
    by_head = parts["heads"][path]  # [layers, heads]
    # Heads lie along the inputs of the output kernel, else along the outputs; each unit gets its share of its head.
    axis = 1 if path.endswith("attention/o/kernel") else len(shape) - 1
    units = np.repeat(by_head / head_size, head_size, axis=1)
    return jnp.asarray(units.reshape([n if i in (0, axis) else 1 for i, n in enumerate(shape)]), jnp.float32)
