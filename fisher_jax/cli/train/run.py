"""The run loop of `fisher-jax train`: one compiled step, evaluations, checkpoints, a clean stop on Ctrl-C."""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import fisher_jax as fj
from fisher_jax._support.errors import RejectedBatchError
from fisher_jax.batch.tokens import log_probs, mean_of
from fisher_jax.cli.run.checkpoints import checkpoints
from fisher_jax.cli.run.progress import duration
from fisher_jax.cli.run.tools import Tools
from fisher_jax.cli.train.data import Text
from fisher_jax.cli.train.model import Start
from fisher_jax.cli.train.optimizers import build
from fisher_jax.cli.train.progress import TrainDisplay
from fisher_jax.cli.train.settings import TrainSettings
from fisher_jax.cli.train.store import ONLY, Point, TrainProgress, TrainStore
from fisher_jax.models import from_config


def train(
    settings: TrainSettings, console: Console, start: Start, text: Text, store: TrainStore, progress: TrainProgress,
    tools: Tools,
) -> Any:  # fmt: skip
    """Trains from step `progress.step` on and returns the parameters.

    Batch, labels that K-FAC draws, and learning rate follow from the step, so a resumed run goes on through the
    same program to the same bits.

    Raises:
        RejectedBatchError: the loss or the parameters are not finite; what is saved is a state before it.
        KeyboardInterrupt: Ctrl-C or a termination signal, after saving.
    """
    apply_fn = from_config(start.config).apply
    tokens, mask = text.batch(settings, 0)
    tx = build(settings, apply_fn, jax.eval_shape(fj.next_token_batch, tokens, mask))
    params = start.fresh_params(settings.seed)
    state = {"params": params, "optimizer": tx.init(params)}
    if progress.step:
        state = store.restore(state)
    if progress.finished:
        return state["params"]
    started = time.monotonic()
    example = state, tokens, mask, np.int32(0)
    step = tools.program(lambda: _compiled(settings, apply_fn, tx, example), start.config, settings)
    progress.compile_seconds = time.monotonic() - started
    console.print(f"  compiled in {duration(progress.compile_seconds)}")
    held_out_loss = _evaluation(apply_fn, text, settings.batch_size)
    if not progress.points:
        progress.points.append(Point(0, 0, 0.0, None, held_out_loss(state["params"])))
    return _loop(settings, console, text, store, progress, state, step, held_out_loss, tools)


def _loop(settings, console, text, store, progress, state, step, held_out_loss, tools) -> Any:
    bits_per_nat = 1 / (math.log(2) * text.bytes_per_token)
    with (
        checkpoints(settings.checkpoint_every, tools) as checkpoint,
        TrainDisplay(console, progress.steps, progress.step, bits_per_nat) as display,
    ):
        display.evaluated(progress.points[-1].held_out_loss)
        while not progress.finished:
            tokens, mask = text.batch(settings, progress.step)
            started = time.monotonic()
            state, loss, finite = step(state, tokens, mask, np.int32(progress.step))
            loss = float(loss)
            progress.seconds += time.monotonic() - started
            _check(finite, loss, progress.step, store)
            progress.step += 1
            progress.tokens += int(np.sum(mask[:, 1:]))
            progress.loss_sum, progress.loss_steps = progress.loss_sum + loss, progress.loss_steps + 1
            if progress.step % settings.eval_every == 0 or progress.finished:
                _add_point(progress, held_out_loss(state["params"]), store)
                display.evaluated(progress.points[-1].held_out_loss)
            display.update(progress.step, loss, progress.tokens / max(progress.seconds, 1e-9))
            if checkpoint.due(progress.finished):
                store.save(ONLY, state, progress)
            checkpoint.stop_if_asked()
    return state["params"]


def _add_point(progress: TrainProgress, held_out: float, store: TrainStore) -> None:
    _check(True, held_out, progress.step, store, "held-out loss")
    mean = progress.loss_sum / progress.loss_steps
    progress.points.append(Point(progress.step, progress.tokens, progress.seconds, mean, held_out))
    progress.loss_sum, progress.loss_steps = 0.0, 0


def _check(finite: Any, loss: float, step: int, store: TrainStore, name: str = "loss") -> None:
    if bool(finite) and math.isfinite(loss):
        return
    what = f"the {name} is {loss}" if not math.isfinite(loss) else "the new parameters are not finite"
    kept = (
        f"the last good state is kept in {store.path}"
        if fj.checkpoint.revision(store.path)
        else "nothing was saved yet"
    )
    raise RejectedBatchError(
        f"training stopped at step {step}: {what}; {kept}. Start again with a smaller --learning-rate, or a larger "
        "--damping for kfac."
    )


def _compiled(
    settings: TrainSettings, apply_fn: Callable, tx: optax.GradientTransformationExtraArgs, example: tuple
) -> Callable:
    """(state, tokens, mask, step) -> (state, loss before the step, whether all is finite); the state is donated.

    Compiled ahead of the first call, so that the time of no step holds it.
    """

    def mean_loss(params, batch):
        return mean_of(_losses(apply_fn, params, batch), batch.weights)

    def step(state, tokens, mask, index):
        batch = fj.next_token_batch(tokens, mask)
        loss, grads = jax.value_and_grad(mean_loss)(state["params"], batch)
        key = jax.random.fold_in(jax.random.key(settings.seed), index)
        updates, optimizer = tx.update(grads, state["optimizer"], state["params"], batch=batch, key=key)
        params = optax.apply_updates(state["params"], updates)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
        return {"params": params, "optimizer": optimizer}, loss, finite

    return jax.jit(step, donate_argnums=0).lower(*example).compile()


def _losses(apply_fn: Callable, params: Any, batch: fj.Batch) -> jax.Array:
    """Of every token, 0 where it has no weight."""
    return -log_probs(fj.categorical, apply_fn(params, batch.inputs), batch.targets, batch.weights)


def _evaluation(apply_fn: Callable, text: Text, batch_size: int) -> Callable[[Any], float]:
    """params -> mean loss over all held-out tokens."""

    @jax.jit
    def summed(params, tokens, mask):
        batch = fj.next_token_batch(tokens, mask)
        return jnp.sum(batch.weights * _losses(apply_fn, params, batch)), jnp.sum(batch.weights)

    batches = list(text.held_out(batch_size))

    def held_out_loss(params) -> float:
        sums = [summed(params, *batch) for batch in batches]
        return sum(float(loss) for loss, _ in sums) / sum(float(weight) for _, weight in sums)

    return held_out_loss
