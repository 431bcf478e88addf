"""Spectra of blocks on 1,024 tokens, against loops of ``jax.grad`` compiled apart."""

import jax
import numpy as np
import pytest

import fisher_jax as fj
from tests.oracle_loops import case, scores


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_blocks_have_the_eigenvalues_of_a_loop(unit):
    """The scores of a row of 512 tokens are one vmapped pullback of what several rows are elsewhere."""
    of = case(2, 512)
    found = fj.block_spectrum(of.apply, fj.categorical, of.params, of.batch, unit=unit, parameters="mlp|norm")
    w, row = of.weights, of.counted // 512
    leaves = {jax.tree_util.keystr(p): s for p, s in jax.tree_util.tree_leaves_with_path(scores(2, 512))}
    assert len(found) == 6
    for name, block in found.items():
        s = next(s for path, s in leaves.items() if name.startswith(path))
        x = np.sqrt(w)[:, None] * s.reshape(len(w), -1)
        if unit == "sequence":
            x = np.stack([np.sqrt(w[row == r]) @ x[row == r] for r in np.unique(row)])
        wanted = np.linalg.svd(x / np.sqrt(w.sum()), compute_uv=False) ** 2
        values = block.eigenvalues[: len(wanted)]
        np.testing.assert_allclose(values, wanted[: len(values)], atol=1e-4 * wanted[0], rtol=0, err_msg=name)
