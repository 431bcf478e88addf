"""How wrong the common mistakes of ``docs/traps.md`` are, on small problems in NumPy."""

import math

import numpy as np

TOKENS, LENGTH, WIDTH, LABELS = 64, 16, 4, 5


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def problem():
    """Inputs, kernel, probabilities, labels drawn from the model, and per-token scores ``[T, in, labels]``."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((TOKENS, WIDTH)), rng.standard_normal((WIDTH, LABELS))
    p = softmax(x @ w)
    y = (p.cumsum(1) > rng.random((TOKENS, 1))).argmax(1)
    return x, p, y, scores(x, p, y)


def scores(x, p, y):
    return np.einsum("ti,tk->tik", x, np.eye(LABELS)[y] - p)


def square_of_a_batch_mean():
    """Total of the squared mean score over the mean of squared scores."""
    s = problem()[3]
    return (s.mean(0) ** 2).sum() / (s**2).mean(0).sum()


def argmax_for_a_sampled_label():
    """Total Fisher information with the likeliest label over the true one."""
    x, p, _, _ = problem()
    true = ((x**2).sum(1) * (p * (1 - p)).sum(1)).mean()
    return (scores(x, p, p.argmax(1)) ** 2).sum((1, 2)).mean() / true


def mean_over_entries():
    """How many times too small a kernel is beside its bias, if each is averaged over its entries."""
    _, p, y, s = problem()
    kernel, bias = (s**2).mean(0), ((np.eye(LABELS)[y] - p) ** 2).mean(0)
    return (kernel.mean() / bias.mean()) / (kernel.sum() / bias.sum())


def rows():
    """Inputs in rows of a few to all real positions, padding a constant vector."""
    rng = np.random.default_rng(1)
    real = np.arange(LENGTH) < np.array([16, 9, 4, 2])[:, None]
    x = np.where(real[..., None], rng.standard_normal((*real.shape, WIDTH)), np.ones(WIDTH))
    return x, real


def second_moment(x, mask):
    return np.einsum("bs,bsi,bsj->ij", mask, x, x) / mask.sum()


def off(found, right):
    return np.linalg.norm(found - right) / np.linalg.norm(right)


def padding_in_activation_factors():
    """Relative error of ``A`` over all positions in place of real ones."""
    x, real = rows()
    return off(second_moment(x, np.ones_like(real)), second_moment(x, real))


def masks_on_permuted_positions():
    """Relative error of ``A`` where the model reversed the positions and the mask did not follow."""
    x, real = rows()
    return off(second_moment(x[:, ::-1], real), second_moment(x, real))


def one_over_t_left_in_a_factor():
    """``G`` of the gradients of a mean loss over ``G`` of the gradients of each token's."""
    _, p, y, _ = problem()
    g = np.eye(LABELS)[y] - p
    return np.trace((g / TOKENS).T @ (g / TOKENS)) / np.trace(g.T @ g)


def sequence_scaling():
    """Trace of ``A (x) G`` where ``G`` is divided by rows and ``A`` by tokens, over that of tokens alone."""
    x, p, y, _ = problem()
    g = np.eye(LABELS)[y] - p
    by_token = np.trace(x.T @ x / TOKENS) * np.trace(g.T @ g / TOKENS)
    return np.trace(x.T @ x / TOKENS) * np.trace(g.T @ g / (TOKENS // LENGTH)) / by_token


def mse_by_mean():
    """Fisher information of a squared error averaged over outputs, over that of a Gaussian of unit variance."""
    residual = np.random.default_rng(2).standard_normal((TOKENS, LABELS))
    return ((2 * residual / LABELS) ** 2).sum() / (residual**2).sum()


def batch_norm_moved():
    """Fisher information of the kernel before a batch norm in training, over that with statistics held."""
    rng = np.random.default_rng(3)
    x, w, v = rng.standard_normal((8, WIDTH)), rng.standard_normal((WIDTH, 3)), rng.standard_normal((3, LABELS))
    h = x @ w
    mean, scale = h.mean(0), 1 / np.sqrt(h.var(0) + 1e-5)
    n = (h - mean) * scale
    p = softmax(n @ v)
    y = rng.integers(0, LABELS, 8)
    g = (np.eye(LABELS)[y] - p) @ v.T  # gradient of each token's own log-likelihood in its normalised row
    held = np.einsum("ti,to->tio", x, g * scale)
    moved = np.empty_like(held)
    for t in range(8):
        one = np.zeros_like(h)
        one[t] = g[t]
        back = scale * (one - one.mean(0) - n * (one * n).mean(0))  # every row's, through the statistics
        moved[t] = x.T @ back
    return (moved**2).sum() / (held**2).sum()


def inner(a, b):
    """Rounded once, so that every machine finds the same."""
    return np.float32(math.fsum(a * b))


def lanczos(eigenvalues, steps, reorthogonalise):
    """The tridiagonal matrix of a diagonal one and a start of equal entries, in float32."""
    eigenvalues = eigenvalues.astype(np.float32)
    n = len(eigenvalues)
    basis, alphas, betas = [np.full(n, 1 / np.sqrt(n), np.float32)], [], []
    for _ in range(steps):
        u = eigenvalues * basis[-1]
        alphas.append(inner(basis[-1], u))
        u = u - alphas[-1] * basis[-1]
        if len(basis) > 1:
            u = u - betas[-1] * basis[-2]
        for _ in range(2 * reorthogonalise):
            for q in basis:
                u = u - inner(q, u) * q
        betas.append(np.sqrt(inner(u, u)))
        basis.append(u / betas[-1])
    alphas, betas = np.array(alphas, np.float64), np.array(betas[:-1], np.float64)
    return np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)


def spectrum():
    return np.r_[10.0 ** np.linspace(-3, 0, 195), 20, 40, 60, 80, 100]


def slq_weights():
    """The trace from Ritz values of equal weight over the trace."""
    ritz = np.linalg.eigvalsh(lanczos(spectrum(), 20, True))
    return ritz.mean() * spectrum().size / spectrum().sum()


def ghosts():
    """Ritz values at the largest eigenvalue, which is one, without reorthogonalisation."""
    return int((np.abs(np.linalg.eigvalsh(lanczos(spectrum(), 60, False)) - 100) < 1e-3).sum())


MEASURED = {
    "The square of a batch's mean": square_of_a_batch_mean,
    "The likeliest label for a sampled one": argmax_for_a_sampled_label,
    "A mean over entries": mean_over_entries,
    "Padding in activation factors": padding_in_activation_factors,
    "Masks on moved positions": masks_on_permuted_positions,
    "1/T left in a factor": one_over_t_left_in_a_factor,
    "Sequences for tokens in K-FAC": sequence_scaling,
    "A squared error by its mean": mse_by_mean,
    "Batch norm in training": batch_norm_moved,
    "Lanczos without its weights": slq_weights,
    "Ghosts in Lanczos": ghosts,
}


if __name__ == "__main__":
    for name, measure in MEASURED.items():
        print(f"{name}: {measure():.2g}")  # noqa: T201
