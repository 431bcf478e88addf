"""The report of a model that no command knows: the user's own function, parameters and batches."""

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax._support.errors import InputError, RejectedBatchError, shown
from fisher_jax.cli.report.findings import Findings
from fisher_jax.cli.report.head_reader import HeadReader, Read, scored
from fisher_jax.cli.report.importance import importance
from fisher_jax.cli.report.orderings import orderings
from fisher_jax.cli.report.pruning import PruningResult, prune
from fisher_jax.cli.report.settings import KINDS, ReportSettings
from fisher_jax.cli.report.store import ReportStore, TaskProgress, Text
from fisher_jax.cli.report.token_texts import token_texts
from fisher_jax.cli.report.writing import ReportFolder
from fisher_jax.cli.run.options import DTYPES
from fisher_jax.cli.run.run_folder import run_folder
from fisher_jax.cli.run.stopping import InterruptedRunError
from fisher_jax.cli.run.tools import TOOLS, Tools
from fisher_jax.cli.run.values import is_task_name
from fisher_jax.estimators.head import of_leaf
from fisher_jax.welford.moments import reject_if

__all__ = ["report"]

UNITS = ("document", "sequence", "batch")
OTHER_KIND = {"empirical": "true", "true": "empirical"}


def report(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    out: str | PathLike[str],
    tokenizer: Any = None,
    head: Callable[[Any, Any], tuple] | None = None,
    soft_cap: float | None = None,
    held_out: Iterable[Any] = (),
    name: str = "the model",
    task: str = "batches",
    unit: str | None = None,
    kind: str = "empirical",
    level: float = 0.95,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: float = 30.0,
) -> Path:
    """Which vocabulary rows of a model's head matter: the page of ``fisher-jax report`` for any language model.

    The importance of row ``v`` of the head ``W`` is its Fisher information per token,
    ``sum_t w_t (p_tv - [v = y_t])**2 |h_t|**2 / sum_t w_t`` (empirical) or
    ``sum_t w_t p_tv (1 - p_tv) |h_t|**2 / sum_t w_t`` (true), for logits ``z_t = W h_t + b``; see
    `fisher_jax.lm_head.moments`. One forward pass a batch; logits are never held whole. Where the head is
    ``factor * leaf``, it is the information of the leaf.

    ``out`` gets ``report.html``, ``report.md``, ``importance.csv``, pictures, and the state
    (``fj.checkpoint.restore(out / "state")``). Several calls with one ``out`` and one model are tasks side by side.
    A call that was finished before computes nothing.

    Args:
        apply_fn: ``(params, inputs) -> logits [..., V]``.
        batches: `fj.Batch` objects, or token ids ``[rows, positions]`` (`fj.next_token_batch` makes batches of them).
            Read once; batches of other shapes are compiled again.
        out: folder, made where it is missing.
        tokenizer: the texts of token ids: a list of texts; anything with ``decode([id])`` (transformers, tokenizers,
            tiktoken, `fj.models.Tokenizer`); a function of an id. ``None``: ids are shown.
        head: ``None``: found in the program of ``apply_fn``. Else ``(params, inputs) -> (hidden [..., H], W [V, H])``
            or, with a bias, ``(hidden, W, b [V])``; its logits are compared with those of ``apply_fn`` once.
        soft_cap: ``c`` of logits ``c tanh(z / c)``, where ``head`` is given.
        held_out: batches on which the loss after pruning is measured; without any it is not.
        name: of the model, and ``task``: of this measurement, on the page.
        unit: what intervals take as independent: ``"document"``, rows of one id in ``Batch.units``; ``"sequence"``, a
            row; ``"batch"``. ``None``: documents where the first batch has ``units``, else sequences.
        kind: ``"empirical"`` or ``"true"``, which the page is about; both are measured.
        level: of the intervals.
        seed: of random orders in pruning.
        resume: go on with an interrupted call; ``batches`` begin anew and are compared with those seen.
        overwrite: drop an earlier call of this task.
        checkpoint_every: seconds between saves of the state.

    Returns:
        The path of ``report.html``.

    Raises:
        InputError: what was given cannot be used, or ``out`` holds something else.
        RejectedBatchError: a batch has a loss that is not finite, a label out of range or a negative weight; what
            came before it is saved.
        KeyboardInterrupt: what was measured is saved; ``resume=True`` goes on.

    Example:
        >>> import fisher_jax as fj, jax, jax.numpy as jnp, pathlib, tempfile
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params = {"embedding": jax.random.normal(keys[0], (11, 8)), "head": jax.random.normal(keys[1], (8, 11))}
        >>> def apply_fn(params, tokens):
        ...     return jnp.tanh(params["embedding"][tokens]) @ params["head"]
        >>> tokens = jax.random.randint(keys[2], (4, 6), 0, 11)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = fj.report(apply_fn, params, [tokens], tokenizer=list("abcdefghijk"), out=folder)
        ...     len((pathlib.Path(folder) / "importance.csv").read_text().splitlines())
        12
    """
    return reported(
        apply_fn, params, batches, TOOLS, out=out, tokenizer=tokenizer, head=head, soft_cap=soft_cap,
        held_out=held_out, name=name, task=task, unit=unit, kind=kind, level=level, seed=seed, resume=resume,
        overwrite=overwrite, checkpoint_every=checkpoint_every,
    )  # fmt: skip


def reported(
    apply_fn: Callable, params: Any, batches: Iterable[Any], tools: Tools, *, out: str | PathLike[str],
    tokenizer: Any = None, head: Callable | None = None, soft_cap: float | None = None, held_out: Iterable[Any] = (),
    name: str = "the model", task: str = "batches", unit: str | None = None, **options: Any,
) -> Path:  # fmt: skip
    """`report` with tools of one's own."""
    with _in_words_of_python():
        first, batches = _first(map(_as_batch, batches))
        unit = unit or ("sequence" if first.units is None else "document")
        _check_options(task, unit, first, **options)
        reader = HeadReader(apply_fn, head, soft_cap)
        met = reader.checked(params, first)
        texts = token_texts(tokenizer, met.head.shape[0])
        others = [_as_batch(x) for x in held_out]
        rows, positions = (*met.hidden.shape[:-1], 1)[:2]
        # A state names the dtypes that the commands load; the page names the head's own.
        dtype = met.head.dtype.name if met.head.dtype.name in DTYPES else "float32"
        settings = ReportSettings(
            model=name, task=task, dtype=dtype, held_out_tokens=sum(int(scored(x, x.weights).sum()) for x in others),
            unit=unit, row_length=positions, batch_size=rows, out=Path(out), **options,
        )  # fmt: skip
        return _Run(settings, tools, reader, met, params, texts, others).report(batches)


class _Run(NamedTuple):
    """One call, from its batches to its page."""

    settings: ReportSettings
    tools: Tools
    reader: HeadReader
    met: Read  # its shapes
    params: Any
    texts: list[str]
    held_out: list[fj.Batch]

    def report(self, batches: Iterator[fj.Batch]) -> Path:
        s = self.settings
        store: ReportStore | None = None

        def left() -> str:
            saved = None if store is None else store.runs.get(s.task)
            kept = "nothing was saved" if saved is None else f"{saved.batches_done} batches are saved in {s.out}"
            return f"fj.report was interrupted; {kept}" + ("; resume=True goes on" if saved else "")

        with run_folder(s.out, interrupted=left):
            store = ReportStore(s.out)
            store.check_before_loading(s.task, resume=s.resume, overwrite=s.overwrite)
            progress, seen = self._begin(store, batches)
            state = store.restore()[s.task] if progress.batches_done else None
            if s.overwrite and s.task in store.runs:
                self._folder(store, store.restore()).drop()
            if state is None or not progress.finished:
                state, progress = self._stream(store, batches, state, progress, seen)
            folder = self._folder(store, {**store.restore(), s.task: state})
            found = folder.part()
            if not folder.is_current():
                folder.write(None if found else self._findings(state, progress))
        return s.out / "report.html"

    def _folder(self, store: ReportStore, states: dict[str, Any]) -> ReportFolder:
        return ReportFolder(self.settings, self.texts, None, store, states, self.tools)

    def _begin(self, store: ReportStore, batches: Iterator[fj.Batch]) -> tuple[TaskProgress, str]:
        """Where to go on, and the digest of the batches before; what an earlier call has seen must come again."""
        s, seen, number = self.settings, "", 1
        earlier = None if s.overwrite else store.runs.get(s.task)
        if earlier is not None:
            for batch in islice(batches, earlier.batches_done):
                seen = _digest(seen, batch)
            if earlier.finished and next(batches, None) is not None:
                seen = "more batches"
            number = earlier.num_batches
        model = _digest("", self.params)
        texts = [Text([s.task], "none", seen)]
        fresh = TaskProgress(s.fixed(), model, seen, number, model_name=s.model, texts=texts, page=s.of_page())
        return store.begin(s.task, fresh, overwrite=s.overwrite), seen

    def _stream(
        self, store: ReportStore, batches: Iterator[fj.Batch], state: Any, progress: TaskProgress, seen: str
    ) -> tuple[Any, TaskProgress]:
        step, saved_at, name = jax.jit(self._step), time.monotonic(), self.settings.task
        reached = state, progress
        try:
            for batch in batches:
                state, progress = reached
                started = time.monotonic()
                if state is None:
                    state = self._initial(batch)
                added, loss_sum, count = step(self.params, state, batch)
                _check(added, float(loss_sum), progress.batches_done)
                seen, done = _digest(seen, batch), progress.batches_done + 1
                reached = added, replace(
                    progress, text=seen, batches_done=done, num_batches=done + 1, tokens=progress.tokens + int(count),
                    log_loss=progress.log_loss + float(loss_sum),
                    seconds=progress.seconds + time.monotonic() - started,
                )  # fmt: skip
                if time.monotonic() - saved_at >= self.settings.checkpoint_every:
                    store.save(name, *reached)
                    saved_at = time.monotonic()
        except BaseException:
            if reached[0] is not None and store.runs.get(name) != reached[1]:
                store.save(name, *reached)
            raise
        state, progress = reached
        if state is None or not float(fj.welford.weight(state["empirical"])):
            raise InputError("no token of the batches has a weight, so there is nothing to report")
        progress = replace(progress, num_batches=progress.batches_done)
        store.save(name, state, progress)
        return state, progress

    def _observe(self, params: Any, batch: fj.Batch) -> tuple[dict[str, Any], Any, Any]:
        """Moments by kind, the log-likelihood and the weights of tokens."""
        found, unit = self.reader(params, batch), self.settings.unit
        moments, log_likelihood = fj.lm_head.moments(
            found.hidden, found.head, batch.targets, found.weights, groups="row", kind=KINDS, unit=unit,
            units=batch.units if unit == "document" else None, bias=found.bias, soft_cap=found.soft_cap,
            with_log_likelihood=True,
        )  # fmt: skip
        observed = [of_leaf(reject_if(x, x.reasons | found.bad), found.factor) for x in moments]
        weights = jnp.ones(log_likelihood.shape) if found.weights is None else found.weights
        return dict(zip(KINDS, observed, strict=True)), log_likelihood, weights

    def _step(self, params: Any, state: dict[str, Any], batch: fj.Batch) -> tuple[dict[str, Any], Any, Any]:
        observed, log_likelihood, weights = self._observe(params, batch)
        added: dict[str, Any] = {kind: fj.welford.add(state[kind], moments) for kind, moments in observed.items()}
        scored = weights > 0
        added["counts"] = state["counts"].at[batch.targets].add(scored.astype(jnp.int32), mode="drop")
        return added, -jnp.sum(jnp.where(scored, weights * log_likelihood, 0.0)), jnp.sum(scored)

    def _initial(self, batch: fj.Batch) -> dict[str, Any]:
        observed = jax.eval_shape(lambda params, batch: self._observe(params, batch)[0], self.params, batch)
        return {k: fj.welford.init(x) for k, x in observed.items()} | {
            "counts": jnp.zeros(len(self.texts), jnp.int32)
        }

    def _findings(self, state: dict[str, Any], progress: TaskProgress) -> Findings:
        s = self.settings
        pruning = self._prune(state) if s.held_out_tokens else None
        choice = f"{progress.tokens:,} tokens in {progress.batches_done:,} batches, as they were given"
        held_out = ""
        if pruning is not None:
            units = "documents" if s.unit == "document" else "rows"
            held_out = f"{pruning.num_tokens:,} tokens of {pruning.num_documents:,} {units} that were given for it"
            choice += f"; {pruning.num_tokens:,} tokens are held out for pruning"
        return Findings(
            settings=s,
            model_name=s.model,
            dtype=self.met.head.dtype.name,
            text=s.task,
            choice=choice,
            held_out=held_out,
            tied=self.met.tied,
            tokens=self.texts,
            main=importance(state, s.kind, s.level),
            other=importance(state, OTHER_KIND[s.kind], s.level),
            loss=progress.log_loss / float(fj.welford.weight(state["empirical"])),
            pruning=pruning,
            rate=progress.tokens / max(progress.seconds, 1e-9),
        )

    def _prune(self, state: dict[str, Any]) -> PruningResult:
        forward = jax.jit(lambda params, batch: (self.reader(params, batch).hidden, self._weights(params, batch)))
        found, rows = [], 0
        for batch in self.held_out:
            hidden, weights = (np.asarray(x) for x in forward(self.params, batch))
            counted = weights > 0
            own = np.arange(rows, rows := rows + len(counted)) if batch.units is None else np.asarray(batch.units)
            documents = np.broadcast_to(own.reshape(-1, *(1,) * (counted.ndim - 1)), counted.shape)
            found.append((hidden[counted], np.asarray(batch.targets)[counted], documents[counted]))
        hidden, targets, documents = (np.concatenate(x) for x in zip(*found, strict=True))
        head, bias = jax.jit(lambda params, batch: self.reader(params, batch)[1:3])(self.params, self.held_out[0])
        empirical, true = (np.asarray(fj.welford.mean(state[kind])) for kind in KINDS)
        weights = np.asarray(head, np.float32) / self.met.factor
        ranked = orderings(empirical, true, weights, np.asarray(state["counts"]), seed=self.settings.seed)
        shift = None if bias is None else np.asarray(bias, np.float32)
        return prune(hidden, targets, documents, head, ranked, bias=shift, soft_cap=self.met.soft_cap)

    def _weights(self, params: Any, batch: fj.Batch) -> jax.Array:
        weights = self.reader(params, batch).weights
        return jnp.ones(jnp.shape(batch.targets)) if weights is None else jnp.asarray(weights)


def _check(state: dict[str, Any], loss: float, index: int) -> None:
    try:
        for kind in KINDS:
            fj.check(state[kind])
    except RejectedBatchError as error:
        raise RejectedBatchError(f"batch {index} was rejected: {error}. What came before it is saved.") from None
    if not np.isfinite(loss):
        raise RejectedBatchError(f"batch {index} was rejected: its loss is {loss}. What came before it is saved.")


def _first(batches: Iterator[fj.Batch]) -> tuple[fj.Batch, Iterator[fj.Batch]]:
    """The first batch, and all of them."""
    first = next(batches, None)
    if first is None:
        raise InputError("there are no batches; an iterator that was read already is empty")
    return first, chain([first], batches)


def _as_batch(given: Any) -> fj.Batch:
    if isinstance(given, fj.Batch):
        return given
    if getattr(given, "ndim", 0) == 2 and jnp.issubdtype(given.dtype, jnp.integer):
        return fj.next_token_batch(given)
    raise InputError(
        f"batches= holds {shown(given)[:200]}, but needs fj.Batch objects or token ids [rows, positions], integers"
    )


def _check_options(
    task: str, unit: str, first: fj.Batch, kind: str = KINDS[0], level: float = 0.95, **others: Any
) -> None:
    if not is_task_name(task):
        raise InputError(
            f"task= is {shown(task)}: it begins with a letter or digit and goes on with these, spaces and _ . + - ( )"
        )
    for option, value, choices in (("unit", unit, UNITS), ("kind", kind, KINDS)):
        if value not in choices:
            raise InputError(f"{option}= is {shown(value)}, but must be one of {', '.join(choices)}")
    if unit == "document" and first.units is None:
        raise InputError("unit='document' needs batches with units, the number of the document of each row")
    if not 0 < level < 1:
        raise InputError(f"level= is {shown(level)}, but must lie between 0 and 1")


def _digest(seen: str, tree: Any) -> str:
    """SHA-256 of all arrays of a tree, after what was seen before."""
    digest = hashlib.sha256(seen.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


@contextmanager
def _in_words_of_python() -> Iterator[None]:
    """Sentences of the command line name its options; here they are arguments."""
    try:
        yield
    except InputError as error:
        said = re.sub(r"--(resume|overwrite)\b", r"\1=True", str(error))
        raise InputError(re.sub(r"--(out|task|level|kind|unit|seed)\b", r"\1=", said)) from error
    except InterruptedRunError as stopped:
        raise KeyboardInterrupt(str(stopped)) from None
