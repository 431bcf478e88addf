"""Reports of models with a soft cap, a multiplier and a bias at their logits."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from running import quick

import fisher_jax as fj
from fisher_jax import models

CONFIG = models.DecoderConfig(
    vocab_size=1, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_size=8, mlp_size=24, max_positions=64,
    norm_plus_one=True, norm_placement="around", embedding_multiplier=4.0, activation="gelu_tanh", window=9,
    window_layers=(True, False), attention_soft_cap=5.0, logit_soft_cap=2.0,
)  # fmt: skip
PARALLEL = dataclasses.replace(
    CONFIG, norm_plus_one=False, norm_placement="before", embedding_multiplier=1.0, attention_soft_cap=None,
    logit_soft_cap=None, window=None, window_layers=None, norm="layer", gated=False, qkv_bias=True, out_bias=True,
    mlp_bias=True, residual="parallel_one_norm", rope_size=4, head_bias=True, tied=False,
)  # fmt: skip
MULTIPLIED = dataclasses.replace(
    CONFIG, norm_plus_one=False, norm_placement="before", activation="silu", attention_soft_cap=None,
    logit_soft_cap=None, window=None, window_layers=None, attention_scale=0.2, logit_multiplier=0.125,
    residual_multiplier=0.5,
)  # fmt: skip
CONFIGS = {"gemma2": CONFIG, "phi": PARALLEL, "granite": MULTIPLIED}


def importance(logits_of, hidden, labels):
    """Sums of ``(dL / dz_v)^2 |h|^2`` over tokens, in float64, ``z = head @ h + bias``."""
    total = 0.0
    for h, label in zip(hidden, labels, strict=True):
        z, slope = logits_of(h)
        p = np.exp(z - z.max())
        p /= p.sum()
        p[label] -= 1
        total = total + (p * slope) ** 2 * np.sum(h**2)
    return total


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_importance_of_a_familys_head_is_that_of_a_plain_loop(kind, tmp_path):
    tokenizer = models.Tokenizer(tiny._tokenizer())
    config = dataclasses.replace(CONFIGS[kind], vocab_size=tokenizer.vocab_size)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + np.float32(0.3) * rng.normal(size=x.shape).astype(np.float32),
        models.init_params(config, jax.random.key(0)),
    )
    models.save(tmp_path / "model", config, params, tokenizer, settings={"model_type": kind})
    texts = tiny.write_texts(tmp_path / "texts", count=1, words=40)
    out = tmp_path / "report"
    report = ["report", "--model", str(tmp_path / "model"), "--text", *texts, "--row-length", "24", "--task", "a"]
    assert quick([*report, "--batch-size", "4", "--held-out-tokens", "0", "--out", str(out)]) == 0
    state = fj.checkpoint.restore(out / "state")["a"]

    model = models.load(tmp_path / "model")
    head = np.asarray(params["embedding"] if config.tied else params["head"], np.float64)
    bias = np.asarray(params.get("head_bias", 0.0), np.float64)
    cap = config.logit_soft_cap

    def logits_of(h):
        z = head @ h + bias
        return (z, 1.0) if cap is None else (cap * np.tanh(z / cap), 1 - np.tanh(z / cap) ** 2)

    total, tokens_seen = 0.0, 0
    for path in texts:
        # The report leaves out what does not fill its rows evenly: here one token.
        tokens = np.array(model.tokenizer.encode(Path(path).read_text("utf-8")))[: 3 * 23 + 1]
        for first in range(0, len(tokens) - 1, 23):
            row = tokens[first : first + 24]
            padded = np.pad(row, (0, 24 - len(row)))[None, :-1]
            hidden = np.asarray(model.hidden(params, padded), np.float64)[0, : len(row) - 1]
            total = total + importance(logits_of, hidden, row[1:])
            tokens_seen += len(row) - 1
    assert np.asarray(state["counts"]).sum() == tokens_seen
    got = np.asarray(fj.welford.mean(state["empirical"]))
    np.testing.assert_allclose(got, total / tokens_seen, rtol=5e-4, atol=1e-7)
