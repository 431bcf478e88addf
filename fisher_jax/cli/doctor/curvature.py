"""Checks of K-FAC, operators, Lanczos and block spectra."""

from typing import Any

import jax
import numpy as np
import scipy.sparse.linalg

import fisher_jax as fj
from fisher_jax.cli.doctor.loops import by_path
from fisher_jax.cli.doctor.records import Check, Leaves
from fisher_jax.cli.doctor.subject import Subject

_BLOCKS = r"attention_norm|\['k'\]"
_DENSE_LIMIT = 1024  # parameters of a block above which the dense inverse is taken by its two factors
_K = 3


def matrix(factor: Any) -> np.ndarray:
    """A stack of factors as dense matrices, float64 ``[N, n, n]``."""
    parts = {name: np.asarray(x, np.float64) for name, x in factor._asdict().items()}
    if "columns" in parts:
        return parts["columns"] @ parts["columns"].swapaxes(-1, -2)
    if "vectors" in parts:
        return parts["vectors"] * parts["values"][:, None] @ parts["vectors"].swapaxes(-1, -2)
    return parts["values"][:, :, None] * np.eye(parts["values"].shape[-1])


def matrices(factors: Any) -> Leaves:
    """The factors ``A`` and ``G`` of every block, or its diagonal, by path."""
    found = {}
    for block, own in zip(factors.plan, factors.blocks, strict=True):
        if own.diagonal is not None:
            found[f"{block.path} diagonal"] = np.asarray(own.diagonal, np.float64)
        else:
            found[f"{block.path} A"], found[f"{block.path} G"] = matrix(own.A), matrix(own.G)
    return found


def matrices_reference(subject: Subject) -> Leaves:
    """Second moments of inputs and cotangents of single rows, summed over rows."""
    loops = subject.loops
    number = loops.labels.size
    found: Leaves = {}
    for taps in loops.taps:
        for path, g in taps.cotangents.items():
            a = taps.inputs[path]
            if "scale" in path:
                part = {"diagonal": ((a * g) ** 2).sum(1).reshape(loops.shapes[path])}
            elif path == "['embedding']":
                onehot = np.eye(loops.shapes[path][0])[a[..., 0].astype(int)]
                part = {"A": onehot.swapaxes(1, 2) @ onehot, "G": g.swapaxes(1, 2) @ g}
            else:
                part = {"A": a.swapaxes(1, 2) @ a, "G": g.swapaxes(1, 2) @ g}
            for name, x in part.items():
                key = f"{path} {name}"
                found[key] = found.get(key, 0) + x / number
    return found


def preconditioned(subject: Subject) -> Leaves:
    return by_path(jax.jit(fj.precondition)(subject.factors, subject.direction))


def preconditioned_reference(subject: Subject) -> Leaves:
    """``(A (x) G + damping I)^-1`` of the library's own factors, dense, in float64."""
    tree, parts = by_path(subject.direction), matrices(subject.factors)
    damping, found = float(subject.factors.damping), {}
    for path, x in tree.items():
        if f"{path} diagonal" in parts:
            found[path] = x / (parts[f"{path} diagonal"] + damping)
            continue
        # Kernels lie as [in, out], an embedding as [in, out] of its one-hot inputs, the head as [out, in].
        turned = path != "['head']"
        stack = x.reshape(-1, *x.shape[-2:])
        stack = stack.swapaxes(1, 2) if turned else stack
        layers = zip(parts[f"{path} A"], parts[f"{path} G"], stack, strict=True)
        solved = np.stack([_solve(A, G, M, damping) for A, G, M in layers])
        found[path] = (solved.swapaxes(1, 2) if turned else solved).reshape(x.shape)
    return found


def _solve(A: np.ndarray, G: np.ndarray, M: np.ndarray, damping: float) -> np.ndarray:
    if M.size <= _DENSE_LIMIT:
        return np.linalg.solve(np.kron(G, A) + damping * np.eye(M.size), M.ravel()).reshape(M.shape)
    (a, P), (g, V) = np.linalg.eigh(A), np.linalg.eigh(G)
    return V @ ((V.T @ M @ P) / (np.outer(g, a) + damping)) @ P.T


def _condition(subject: Subject) -> float:
    """Largest eigenvalue of a block over the damping, by which errors of a solve grow."""
    parts = matrices(subject.factors)
    products = [
        np.linalg.norm(parts[f"{path} A"], 2, (1, 2)) * np.linalg.norm(parts[f"{path} G"], 2, (1, 2))
        for path in (name.removesuffix(" A") for name in parts if name.endswith(" A"))
    ]
    return 1 + max(float(x.max()) for x in products) / float(subject.factors.damping)


def product(subject: Subject) -> Leaves:
    """The empirical Fisher matrix of all parameters times a vector."""
    matvec = fj.operators.empirical_fisher(subject.model.apply, fj.categorical, subject.params, subject.few)
    return by_path(jax.jit(lambda matvec, v: matvec(v))(matvec, subject.params))


def product_reference(subject: Subject) -> Leaves:
    scores = _scores(subject)
    vector = np.concatenate([x.ravel() for x in by_path(subject.loops.params).values()])
    return subject.loops.leaves((scores @ vector) @ scores / len(scores))


def _scores(subject: Subject) -> np.ndarray:
    """``[scored tokens, P]``, float64."""
    found = subject.loops.own_scores
    return found.reshape(-1, found.shape[-1]).astype(np.float64)


def lanczos(subject: Subject) -> Leaves:
    """The largest eigenvalues of the GGN of the head's parameters."""
    matvec = fj.operators.ggn(
        subject.model.apply, fj.categorical, subject.params, subject.batch, parameters="head"
    )  # fmt: skip
    like = {**jax.tree.map(lambda x: None, subject.params), "head": subject.params["head"]}
    found = fj.lanczos(matvec, like, num_steps=40, num_eigenvalues=_K, key=subject.key)
    return {"eigenvalues": found.eigenvalues}


def lanczos_reference(subject: Subject) -> Leaves:
    """ARPACK in float64 on ``V -> sum_t (diag(p) - p p^T) V h h^T / T``."""
    loops = subject.loops
    h = loops.hidden.reshape(-1, loops.hidden.shape[-1]).astype(np.float64)
    logits = loops.logits.reshape(len(h), -1)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)

    def product(v):
        u = h @ v.reshape(p.shape[1], -1).T
        return ((p * u - p * (p * u).sum(1, keepdims=True)).T @ h / len(h)).ravel()

    size = p.shape[1] * h.shape[1]
    operator = scipy.sparse.linalg.LinearOperator((size, size), product, dtype=np.float64)
    start = np.random.default_rng(4).normal(size=size)
    values = scipy.sparse.linalg.eigsh(operator, k=_K, which="LA", v0=start, return_eigenvectors=False)
    return {"eigenvalues": np.sort(values)[::-1]}


def blocks(subject: Subject) -> Leaves:
    found = fj.block_spectrum(
        subject.model.apply, fj.categorical, subject.params, subject.few, stacked=True, parameters=_BLOCKS, top_k=_K
    )
    return {name: spectrum.eigenvalues for name, spectrum in found.items()}


def blocks_reference(subject: Subject) -> Leaves:
    """Eigenvalues of the Gram matrix of the tokens' scores."""
    found, leaves = {}, subject.loops.leaves(_scores(subject))
    for path in ("['layers']['attention']['k']['kernel']", "['layers']['attention_norm']['scale']"):
        for layer in range(leaves[path].shape[1]):
            scores = leaves[path][:, layer].reshape(len(leaves[path]), -1)
            found[f"{path}[{layer}]"] = np.linalg.eigvalsh(scores @ scores.T / len(scores))[::-1][:_K]
    return found


CHECKS = (
    Check("K-FAC factors", lambda subject: matrices(subject.factors), matrices_reference),
    Check(
        "K-FAC damped inverse", preconditioned, preconditioned_reference, growth=_condition, in_statistics=True
    ),
    Check("operators.empirical_fisher", product, product_reference),
    Check("lanczos of the head's GGN", lanczos, lanczos_reference),
    Check("block_spectrum", blocks, blocks_reference),
)  # fmt: skip
