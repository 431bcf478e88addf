"""The run loop: one compiled step per batch, checkpoints in between, a clean stop on Ctrl-C."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fisher_jax as fj
from fisher_jax._support.errors import InputError, RejectedBatchError
from fisher_jax._support.printable import few
from fisher_jax.cli.report.layers import layer_estimator
from fisher_jax.cli.report.settings import KINDS, ReportSettings
from fisher_jax.cli.report.store import ReportStore, TaskProgress
from fisher_jax.cli.run.checkpoints import checkpoints
from fisher_jax.cli.run.progress import StreamProgress
from fisher_jax.cli.run.tools import Tools
from fisher_jax.models import LanguageModel
from fisher_jax.text.packing import Rows


def accumulate(
    model: LanguageModel,
    rows: Rows,
    settings: ReportSettings,
    store: ReportStore,
    progress: TaskProgress,
    state: dict[str, Any] | None,
    display: StreamProgress,
    tools: Tools,
) -> dict[str, Any]:
    """Streams the rows from their batch `progress.batches_done` on and returns the final state of the task.

    The state holds Welford states of the row groups, `empirical` and `true`, label `counts` for every vocabulary
    row, with `--groups param` the Welford state of every entry, `param`, and with `--parameters all` that of
    tensors, attention heads and layers, `layers`. A resumed run sees the same batches and random signs through the
    same program, so that it ends in the same bits.

    Raises:
        RejectedBatchError: a batch had a non-finite loss; what is saved is the state before it.
        KeyboardInterrupt: Ctrl-C or a termination signal, after saving.
    """
    step = tools.program(lambda: _make_step(model, settings), model.config, settings)
    if state is None:
        state = _initial_state(model, rows, settings)
    else:
        _check_form(state, jax.eval_shape(lambda: _initial_state(model, rows, settings)), store)
    with checkpoints(settings.checkpoint_every, tools) as checkpoint:
        for tokens, mask, units in rows.batches(settings.batch_size, start=progress.batches_done):
            started = time.monotonic()
            number = rows.first_batch + progress.batches_done
            state, loss_sum, count = step(model.params, state, tokens, mask, units, number)
            loss_sum, count = float(loss_sum), int(count)
            _check_batch(state, loss_sum, rows, progress.batches_done, settings.batch_size)
            progress.batches_done += 1
            progress.log_loss += loss_sum
            progress.tokens += count
            progress.seconds += time.monotonic() - started
            display.update(progress.tokens, progress.log_loss / max(progress.tokens, 1))
            if checkpoint.due(progress.finished):
                store.save(settings.task, state, progress)
            checkpoint.stop_if_asked()
    return state


def _observe(model: LanguageModel, settings: ReportSettings, params, tokens, mask, units):
    """(moments by name, log-likelihood, batch) of one batch: one forward pass and one logits product for rows."""
    batch = fj.next_token_batch(tokens, mask, units=units)
    hidden, head = model.hidden(params, batch.inputs), model.head(params)
    scored = batch.weights > 0  # bool: all weights are 0 or 1, which halves the state of token units
    options = {
        "unit": settings.unit,
        "units": batch.units,
        "bias": model.head_bias(params),
        "soft_cap": model.config.logit_soft_cap,
    }
    (empirical, true), log_likelihood = fj.lm_head.moments(
        hidden, head, batch.targets, scored, groups="row", kind=KINDS, with_log_likelihood=True, **options
    )
    observed = {"empirical": empirical, "true": true}
    if settings.groups == "param":
        observed["param"] = fj.lm_head.moments(
            hidden, head, batch.targets, scored, groups="param", kind=settings.kind, **options
        )
    return observed, log_likelihood, batch


def _observe_all(model: LanguageModel, settings: ReportSettings) -> Callable:
    """`_observe` of the batch with this index and, where wanted, one backward pass for the layers."""
    layers = layer_estimator(model, settings) if settings.parameters == "all" else None

    def observe(params, tokens, mask, units, index):
        observed, log_likelihood, batch = _observe(model, settings, params, tokens, mask, units)
        if layers is not None:
            key = jax.random.fold_in(jax.random.key(settings.seed), index)
            observed = {**observed, "layers": layers.observe(params, batch, key)}
        return observed, log_likelihood, batch

    return observe


def _make_step(model: LanguageModel, settings: ReportSettings) -> Callable:
    """(params, state, tokens, mask, units, index) -> (state, summed loss, scored tokens); the state is donated."""
    observe = _observe_all(model, settings)

    def step(params, state, tokens, mask, units, index):
        observed, log_likelihood, batch = observe(params, tokens, mask, units, index)
        scored = batch.weights > 0
        added = {name: fj.welford.add(state[name], moments) for name, moments in observed.items()}
        added["counts"] = state["counts"].at[batch.targets].add(scored.astype(jnp.int32), mode="drop")
        return added, -jnp.sum(jnp.where(scored, log_likelihood, 0.0)), jnp.sum(scored)

    return jax.jit(step, donate_argnums=1)


def _initial_state(model: LanguageModel, rows: Rows, settings: ReportSettings) -> dict[str, Any]:
    first = next(rows.batches(settings.batch_size))
    observed, _, _ = jax.eval_shape(lambda params: _observe_all(model, settings)(params, *first, 0), model.params)
    state = {name: fj.welford.init(moments) for name, moments in observed.items()}
    return {**state, "counts": jnp.zeros(model.config.vocab_size, jnp.int32)}


def _check_form(state: dict[str, Any], fresh: dict[str, Any], store: ReportStore) -> None:
    def form(tree: Any) -> list[Any]:
        return [(path, x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)]

    if form(state) != form(fresh):
        raise InputError(f"{store.path} holds other arrays than this run has; give --overwrite to start again.")


def _check_batch(state: dict[str, Any], loss_sum: float, rows: Rows, index: int, batch_size: int) -> None:
    reason = None if np.isfinite(loss_sum) else f"its loss is {loss_sum}"
    for name in (*KINDS, "layers"):
        try:
            if name in state:
                fj.check(state[name])
        except RejectedBatchError as error:
            reason = reason or str(error)
    if reason is None:
        return
    raise RejectedBatchError(
        f"batch {index} was rejected: {reason}; it holds {few(rows.names_in_batch(index, batch_size), 3)}. The state "
        "is left as it was before it."
    )


def hidden_and_targets(
    model: LanguageModel, rows: Rows, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Final hidden states [T, H], targets [T] and document numbers [T] of every target of the rows."""

    @jax.jit
    def forward(params, tokens, mask, units):
        batch = fj.next_token_batch(tokens, mask, units=units)
        return model.hidden(params, batch.inputs), batch.targets, batch.weights

    hiddens, targets, documents = [], [], []
    for tokens, mask, units in rows.batches(batch_size):
        hidden, target, weights = (np.asarray(x) for x in forward(model.params, tokens, mask, units))
        scored = weights > 0
        hiddens.append(hidden[scored])
        targets.append(target[scored])
        documents.append(np.broadcast_to(units[:, None], scored.shape)[scored])
    return np.concatenate(hiddens), np.concatenate(targets), np.concatenate(documents)
