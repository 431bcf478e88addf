"""Mixtures of experts as people write them: one function of the same parameters in several forms.

Every form is ``apply_fn(params, x [rows, positions, D]) -> logits [rows, positions, V]`` with a router, the ``K``
largest of its softmax renormalised, and two kernels for each expert.
"""

import jax
import jax.numpy as jnp

E, K, D, F, V = 3, 2, 3, 4, 5


def parameters(name, seed=0):
    """Of the form of this name."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def draw(*shape):
        return jax.random.normal(next(keys), shape) / 1.5

    params = {"router": draw(D, E) * 2, "up": draw(E, D, F), "down": draw(E, F, D), "head": draw(D, V)}
    if name == "by_leaves":
        up, down = params.pop("up"), params.pop("down")
        params["experts"] = [{"up": up[e], "down": down[e]} for e in range(E)]
    return params


def routed(params, x):
    """Weights of the experts ``[..., E]``, zero of those that a token is not routed to, and their indices."""
    values, index = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), K)
    values = values / values.sum(-1, keepdims=True)
    return values, index, jnp.sum(jax.nn.one_hot(index, E) * values[..., None], -2)


def finish(params, x, y):
    return (x + y) @ params["head"]


def expert(x, up, down):
    return jax.nn.gelu(x @ up) @ down


def by_einsum(params, x):
    _, _, gates = routed(params, x)
    h = jax.nn.gelu(jnp.einsum("bsd,edf->ebsf", x, params["up"]))
    return finish(params, x, jnp.einsum("ebsf,efd,bse->bsd", h, params["down"], gates))


def by_weighted_sum(params, x):
    """Outputs of all experts ``[b, s, e, d]``, then their weighted sum."""
    _, _, gates = routed(params, x)
    h = jax.nn.gelu(jnp.einsum("bsd,edf->bsef", x, params["up"]))
    y = jnp.einsum("bsef,efd->bsed", h, params["down"])
    return finish(params, x, jnp.sum(y * gates[..., None], 2))


def by_scan(params, x):
    _, _, gates = routed(params, x)

    def step(y, now):
        up, down, gate = now
        return y + gate[..., None] * expert(x, up, down), None

    y, _ = jax.lax.scan(step, jnp.zeros_like(x), (params["up"], params["down"], jnp.moveaxis(gates, -1, 0)))
    return finish(params, x, y)


def by_vmap(params, x):
    _, _, gates = routed(params, x)
    every = jax.vmap(expert, (None, 0, 0))(x, params["up"], params["down"])
    return finish(params, x, jnp.einsum("ebsd,bse->bsd", every, gates))


def by_loop(params, x):
    """Slices of stacked kernels, experts compared with the indices of tokens."""
    values, index, _ = routed(params, x)
    y = jnp.zeros_like(x)
    for e in range(E):
        gate = jnp.sum(jnp.where(index == e, values, 0), -1, keepdims=True)
        y += gate * expert(x, params["up"][e], params["down"][e])
    return finish(params, x, y)


def by_mask(params, x):
    """The same, tokens multiplied by the one-hot mask of their experts before and after (Tunix' Qwen 3)."""
    values, index, _ = routed(params, x)
    mask = jnp.swapaxes(jax.nn.one_hot(index, E, dtype=x.dtype), -1, -2)
    sent = jnp.einsum("btid,btek->bted", x[:, :, None, :], mask)
    every = [expert(sent[:, :, e], params["up"][e], params["down"][e]) for e in range(E)]
    weights = mask * jnp.tile(values[:, :, None, :], (1, 1, E, 1))
    return finish(params, x, jnp.einsum("bted,btek->btd", jnp.stack(every, 2), weights))


def by_leaves(params, x):
    """Kernels of their own for every expert, chosen with a mask."""
    values, index, _ = routed(params, x)
    y = jnp.zeros_like(x)
    for e, own in enumerate(params["experts"]):
        mine = (index == e).any(-1, keepdims=True)
        y += jnp.where(mine, jnp.sum(jnp.where(index == e, values, 0), -1, keepdims=True), 0) * expert(x, **own)
    return finish(params, x, y)


def by_capacity(params, x):
    """One-hot dispatch with room for all tokens."""
    _, _, gates = routed(params, x)
    flat, gates = x.reshape(-1, D), gates.reshape(-1, E)
    room = len(flat)
    place = (jnp.cumsum(gates > 0, 0) - 1) * (gates > 0)
    dispatch = jax.nn.one_hot(place, room) * (gates > 0)[..., None]  # token, expert, slot
    sent = jnp.einsum("tec,td->ecd", dispatch, flat)
    h = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", sent, params["up"]))
    out = jnp.einsum("ecf,efd->ecd", h, params["down"])
    y = jnp.einsum("tec,ecd->td", dispatch * gates[..., None], out)
    return finish(params, x, y.reshape(x.shape))


def by_ragged(params, x):
    """Tokens sorted by expert, products of ragged groups."""
    values, index, _ = routed(params, x)
    flat, owner = x.reshape(-1, D), index.reshape(-1)
    order = jnp.argsort(owner)
    sizes = jnp.bincount(owner, length=E)
    sent = flat[order // K]
    out = jax.lax.ragged_dot(jax.nn.gelu(jax.lax.ragged_dot(sent, params["up"], sizes)), params["down"], sizes)
    back = out[jnp.argsort(order)].reshape(*index.shape, D)
    return finish(params, x, jnp.sum(back * values[..., None], -2))


def by_gather(params, x):
    """The tokens of every expert by index, out of range where there are no more."""
    _, _, gates = routed(params, x)
    flat, gates = x.reshape(-1, D), gates.reshape(-1, E)

    def one(y, now):
        up, down, gate = now
        mine = jnp.nonzero(gate > 0, size=len(flat), fill_value=len(flat))[0]
        out = expert(flat.at[mine].get(mode="fill", fill_value=0), up, down)
        weight = gate.at[mine].get(mode="fill", fill_value=0)
        return y.at[mine].add(out * weight[:, None], mode="drop"), None

    y, _ = jax.lax.scan(one, jnp.zeros_like(flat), (params["up"], params["down"], gates.T))
    return finish(params, x, y.reshape(x.shape))


def by_weights(params, x):
    """Every token takes the kernels of its experts."""
    values, index, _ = routed(params, x)
    h = jax.nn.gelu(jnp.einsum("bsd,bskdf->bskf", x, params["up"][index]))
    y = jnp.einsum("bskf,bskfd->bskd", h, params["down"][index])
    return finish(params, x, jnp.sum(y * values[..., None], -2))


FORMS = {
    f.__name__: f
    for f in (
        by_einsum, by_weighted_sum, by_scan, by_vmap, by_loop, by_mask, by_leaves, by_capacity, by_ragged, by_gather,
        by_weights,
    )
}  # fmt: skip
