"""What one device does in a compiled program: its dots and what it moves, loops counted as often as they run."""

import dataclasses
import math
import re
from collections.abc import Callable

__all__ = ["Work", "work_of"]

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16}


@dataclasses.dataclass
class Work:
    """Of one device: floating operations of products, and bytes of the results of collectives, by their kind."""

    dots: float
    moved: dict[str, int]

    @property
    def bytes_moved(self) -> int:
        return sum(self.moved.values())


@dataclasses.dataclass
class _Instruction:
    shape: str
    operation: str
    rest: str


def work_of(text: str) -> Work:
    """What the program of ``compiled.as_text()`` does.

    Raises:
        ValueError: a loop whose number of turns is not known, or a product that is not a ``dot``.
    """
    computations, entry = _parsed(text)
    counted: dict[str, Work] = {}

    def count(name: str) -> Work:
        if name not in counted:
            total = Work(0, dict.fromkeys(_COLLECTIVES, 0))
            for one in computations[name].values():
                _add(total, one, computations[name], count)
            counted[name] = total
        return counted[name]

    return count(entry)


def _parsed(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if not line.startswith(" "):
            if start := _COMPUTATION.match(line):
                current = start[1]
                computations[current] = {}
                entry = current if line.startswith("ENTRY") else entry
        elif one := _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line)):
            computations[current][one[1]] = _Instruction(*one.groups()[1:])
    return computations, entry


def _add(total: Work, one: _Instruction, names: dict[str, _Instruction], count: Callable[[str], Work]) -> None:
    kind = one.operation.removesuffix("-start")
    if kind == "dot":
        total.dots += _dot(one, names)
    elif kind == "custom-call" and re.search("matmul|gemm|dot", one.rest, re.IGNORECASE):
        raise ValueError(f"a product that is not a dot: {one.rest[:200]}")
    elif kind in _COLLECTIVES:
        total.moved[kind] += _bytes(one.shape)
    times = 1
    if kind == "while":
        known = _TRIPS.search(one.rest)
        if known is None:
            raise ValueError(f"a loop whose number of turns is not known: {one.rest[:200]}")
        times = int(known[1])
    parts = [count(name) for name in _CALLED.findall(one.rest)] if kind not in _COLLECTIVES else []
    if branches := _BRANCHES.search(one.rest):
        parts.append(max((count(x.strip().lstrip("%")) for x in branches[1].split(",")), key=lambda work: work.dots))
    for part in parts:
        total.dots += times * part.dots
        for key, moved in part.moved.items():
            total.moved[key] += times * moved


def _dot(one: _Instruction, names: dict[str, _Instruction]) -> float:
    operand = one.rest.split("%", 1)[1]
    left = names[re.match(r"[\w.\-]+", operand)[0]]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    axes = [int(i) for i in contracted[1].split(",") if i] if contracted else []
    shape = _sizes(left.shape)[0]
    return 2.0 * math.prod(_sizes(one.shape)[0]) * math.prod(shape[i] for i in axes)


def _sizes(shape: str) -> list[list[int]]:
    return [[int(n) for n in sizes.split(",") if n] for _, sizes in _SHAPE.findall(shape)]


def _bytes(shape: str) -> int:
    def bits(name: str) -> int:
        return _BITS.get(name) or int(re.sub(r"\D", "", name))

    return sum(
        bits(name) // 8 * math.prod(sizes)
        for (name, _), sizes in zip(_SHAPE.findall(shape), _sizes(shape), strict=True)
    )
