"""Groups of parameters: over which axes of a kernel squared scores are summed."""

import dataclasses
import re

__all__ = ["Experts", "Group", "Heads", "column", "expert", "head", "param", "resolve", "row", "tensor"]


@dataclasses.dataclass(frozen=True)
class Group:
    """One reduction of the squared scores of a kernel ``[out, in]``; squares are *summed* within a group.

    Example:
        >>> import fisher_jax as fj
        >>> fj.groups.row.name
        'row'
    """

    name: str


param = Group("param")
"""Every entry is its own group."""
row = Group("row")
"""One group per output unit, whatever the axis order of the kernel; for an embedding and ``lm_head`` one per
vocabulary token; every entry of a bias or scale is its own."""
column = Group("column")
"""One group per input feature; for an embedding one per feature of its vectors. A bias is one column, every entry of
a scale its own."""
tensor = Group("tensor")
"""The whole kernel is one group; of a stack of layers, the kernel of each layer."""


@dataclasses.dataclass(frozen=True)
class Experts(Group):
    """Experts of a mixture, see `expert`."""


expert = Experts("expert")
"""One group per expert of the kernels of a mixture of experts, after the axes of stacked layers; of any other
parameter all of it, as in ``tensor``. The program says which kernels are experts' and which axis they lie along: what
a router ranked (``top_k``, ``sort``, ``argmax``) decides over their outputs."""

# What libraries put around an array: no names of it.
_WRAPPERS = ("kernel", "w", "weight", "b", "bias", "value", "raw_value")

_ALL = {group.name: group for group in (param, row, column, tensor)}


@dataclasses.dataclass(frozen=True)
class Heads(Group):
    """Attention heads, see `head`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int | None
    query: str
    key: str
    value: str
    output: str
    fused: str
    layout: str | None
    fused_layout: str | None

    def part_of(self, path: str) -> str | None:
        """``query``, ``key``, ``value``, ``output`` or ``fused``, by the last name that tells; otherwise ``None``.

        Args:
            path: names joined by ``/``. Names that libraries put around an array (``kernel``, ``w``, ``weight``, the
                ``value`` of ``kernel/value``) do not count.
        """
        *outer, last_name = path.split("/")
        if outer and last_name in _WRAPPERS:
            inside = self._named("/".join(outer))
            # A ``value`` is a name where nothing else before it is one.
            if outer[-1] in _WRAPPERS or (inside and inside[0] == len("/".join(outer))) or not self._named(last_name):
                return self.part_of("/".join(outer))
        found = self._named(path)
        return found[1] if found else None

    def _named(self, path: str) -> tuple[int, str] | None:
        """The last name that tells, where it ends, and what it tells."""
        last: dict[int, str] = {}
        for part in ("query", "key", "value", "output", "fused"):
            for match in re.finditer(f"(?:^|/)(?:{getattr(self, part)})(?=/|$)", path):
                last[match.end()] = part
        return max(last.items()) if last else None


def head(
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    *,
    query: str = "q|query|q_proj|query_proj|wq|to_q",
    key: str = "k|key|k_proj|key_proj|wk|to_k",
    value: str = "v|value|v_proj|value_proj|wv|to_v",
    output: str = "o|out|o_proj|out_proj|output|wo|to_out",
    fused: str = "qkv|qkv_proj|c_attn|query_key_value|in_proj",
    layout: str | None = None,
    fused_layout: str | None = None,
) -> Heads:
    """One group per attention head: rows of the query, key and value kernels, columns of the output kernel.

    Sums are ``[num_heads]`` for query and output and ``[num_kv_heads]`` for key and value, after the axes of stacked
    layers; a kernel that holds several of them gives a dict by part. Biases of query, key and value belong to the
    heads; every other parameter, the output bias too, is one group, as in ``tensor``.

    The program of the model says which kernel is what, and which of its units belong to which head: queries meet keys
    in a product, its result weights the values, and the next kernel is the output. Names are asked where it does not
    say (an attention without such a product, a kernel of the device's own): of a kernel whose outputs go into none
    but an output kernel, and of an output kernel that follows none but query, key and value kernels.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads (grouped-query attention); ``None``: as many as query heads.
        head_dim: size of a head; ``None``: units / heads.
        query, key, value, output: regular expressions for whole names of a path like ``layers/attention/q/kernel``;
            the last name that matches counts, and ``attention/(o|out)`` asks for two names in a row. Names such as
            ``kernel``, ``w`` and the ``value`` of ``kernel/value`` do not count.
        fused: the same for a kernel that holds query, key and value together.
        layout: how units lie along a kernel, where names are asked: ``"heads"``, head by head, all units of one side
            by side; ``"units"``, unit by unit, one of each head side by side. There is no default: both are in use.
        fused_layout: how it holds them along its output units, where names are asked: ``"q k v"``, all queries, then
            all keys, then all values; ``"heads"``, for every key-value head its queries, its key and its value.
            There is no default: both are in use.

    Raises:
        ValueError: numbers of heads that are not positive or do not divide, an unknown layout; while tracing, a
            layout that is needed and not given.

    Example:
        >>> import fisher_jax as fj
        >>> fj.groups.head(9, 3).part_of("layers/attention/k/kernel")
        'key'
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is a positive multiple of num_kv_heads, found num_heads={num_heads}, "
            f"num_kv_heads={num_kv_heads}"
        )
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim is positive, found {head_dim}")
    if layout not in (None, "heads", "units"):
        raise ValueError(f"layout is 'heads' or 'units', found {layout!r}")
    if fused_layout not in (None, "q k v", "heads"):
        raise ValueError(f"fused_layout is 'q k v' or 'heads', found {fused_layout!r}")
    return Heads(
        "head", num_heads, num_kv_heads, head_dim, query, key, value, output, fused, layout, fused_layout
    )  # fmt: skip


def resolve(group: "Group | str") -> Group:
    """A group from itself or from its name.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import fisher_jax as fj
        >>> fj.groups.resolve("row") is fj.groups.row
        True
    """
    name = group.name if isinstance(group, Group) else group
    if name not in _ALL:
        raise ValueError(f"groups is one of {', '.join(_ALL)}, found {name!r}")
    return _ALL[name]
