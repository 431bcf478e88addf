"""Would the tests see it if a line were wrong? Small faults are made one by one, and the tests of their room run.

A fault (a *mutant*) is one change of an operator, a constant, an index, a condition, an argument or a returned
value, made at a place of the syntax tree; never in texts, annotations, imports, decorators or what is raised. Files
get mutants in proportion to their mutable places. In a file a kind of change is drawn first, then a place of that
kind, at most one on each line. A mutant is known by its file, the text of its line, the column and the kind, so
that it can be made again where the line has moved. Each runs in a copy of the tracked files, with the tests of
`TESTS` in the order given there, until one fails.

    python experiments/mutants.py --list mutants.json                # draws 150, runs nothing
    python experiments/mutants.py --from mutants.json                # runs them; goes on with --resume
    python experiments/mutants.py --from left.json --tests tests     # survivors, which --left wrote, in all tests

What a rewriting did to the tests is seen on one list in two checkouts, here drawn in the older one. ``old=new`` pairs
say which files bear other names; rooms and tests go by either name.

    names="$(git diff -M30% --name-status --diff-filter=R OLD HEAD -- fisher_jax | awk '{print $2"="$3}')"
    python experiments/mutants.py --root ../old --moved $names --list mutants.json
    python experiments/mutants.py --root ../old --moved $names --from mutants.json --results before.jsonl
    python experiments/mutants.py --moved $names --from mutants.json --results after.jsonl

*Caught* are mutants with which a test fails, the process dies or the time runs out. *Gone* are those whose line is
not in the checkout exactly once. A *survivor* is either equivalent to the program, which nobody can tell
automatically, or a fault that these tests do not see: each is printed for a reader to judge. Compare two checkouts on
the mutants that are gone in neither.
"""

import argparse
import ast
import collections
import json
import os
import pathlib
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = pathlib.Path(__file__).parent / "results" / "mutants.jsonl"
PACKAGE = "fisher_jax"
ROOMS = ("welford", "lm_head", "_tracing", "kronecker/factors", "_support")
MOST_BYTES = 12 * 2**30  # of one process of a test

# Tests below `tests`, quickest first, of what begins so; the longest beginning holds. Patterns without a match are
# left out, so that the table also serves older checkouts.
TESTS = {
    "welford": (
        "**/test_plain.py", "**/test_precision.py", "**/test_welford.py", "**/test_confidence.py",
        "uses/test_reading.py", "**/test_groups.py", "**/test_sharding.py",
    ),
    "lm_head": ("lm_head/*.py", "**/test_head_and_taps.py"),
    "_tracing": (
        "**/test_ids.py", "**/test_structures.py", "**/test_capture_edges.py", "**/test_head_and_taps.py",
        "**/test_positions.py", "**/test_convolutions.py", "**/test_capture_zoo.py", "**/test_capture_sharded.py",
    ),
    "_tracing/experts.py": ("kronecker/test_experts.py",),
    "_tracing/heads.py": ("**/test_groups.py", "**/test_heads.py"),
    "_tracing/routing.py": ("kronecker/test_experts.py",),
    "kronecker/factors": (
        "**/test_damped_inverse.py", "**/test_factors.py", "**/test_corrected.py", "**/test_kfac_operator.py",
        "kronecker/test_kfac.py",
    ),
    "_support": ("support/*.py", "welford/*.py", "**/test_groups.py", "operators/*.py"),
    "_support/compensated.py": (
        "**/test_compensated.py", "**/test_plain.py", "**/test_precision.py", "**/test_lanczos.py",
    ),
    "_support/dtypes.py": ("**/test_precision.py", "**/test_merging.py", "lm_head/*.py"),
    "_support/errors.py": ("**/test_text_files.py", "**/test_rejection.py"),
    "_support/host_memory.py": ("**/test_packing.py", "**/test_row_length.py"),
    "_support/jax_internals.py": ("**/test_jax_internals.py", "**/test_ids.py", "**/test_capture_edges.py"),
    "_support/masked.py": ("**/test_tracking.py", "**/test_continual.py", "**/test_transformation.py"),
    "_support/meshes.py": ("**/test_products_sharded.py", "**/test_fisher_sharded.py", "**/test_blocks_sharded.py"),
    "_support/outline.py": ("test_names.py", "**/test_shift.py", "**/test_decisions.py"),
    "_support/passes.py": ("**/test_many_tokens.py", "**/test_estimators.py", "**/test_block_spectra.py"),
    "_support/placement.py": ("**/test_averaging.py", "**/test_prune_masks.py", "**/test_kfac_sharded.py"),
    "_support/printable.py": (
        "cli/test_names.py", "**/test_hf_folder.py", "cli/test_odd_files.py", "cli/test_bad_input.py",
    ),
    "_support/rejection.py": ("**/test_rejection.py", "**/test_tokens.py"),
    "_support/selection.py": ("**/test_products.py", "**/test_block_spectra.py"),
}  # fmt: skip

COMPARISONS = {
    ast.Lt: ("<", "<=", ">="), ast.LtE: ("<=", "<", ">"), ast.Gt: (">", ">=", "<="), ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", None, "!="), ast.NotEq: ("!=", None, "=="), ast.Is: ("is", None, "is not"),
    ast.IsNot: ("is not", None, "is"), ast.In: ("in", None, "not in"), ast.NotIn: ("not in", None, "in"),
}  # fmt: skip
OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "/"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
TEXTS = (ast.JoinedStr, ast.List, ast.Tuple)  # their sums are no arithmetic
# Swapped arguments give the same, or an error in whatever runs first.
UNSWAPPED = {
    "isinstance", "issubclass", "getattr", "hasattr", "cast", "max", "min", "maximum", "minimum", "add", "multiply",
    "logical_and", "logical_or", "isclose", "allclose", "array_equal",
}  # fmt: skip


Moved = dict[str, list[str]]  # the other names of files


class Mutant(NamedTuple):
    """One fault: what it is known by, and what its line becomes."""

    room: str
    file: str
    text: str
    column: int
    kind: str
    becomes: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.file, self.text, self.column, self.kind


class Place(NamedTuple):
    """Where a fault can be made: the line (from 0), the column behind its indentation, and the changes in bytes."""

    line: int
    column: int
    kind: str
    edits: tuple[tuple[int, int, bytes], ...]


class Places(ast.NodeVisitor):
    """All places of one file."""

    def __init__(self, source: bytes):
        self.source, self.lines, self.found = source, source.split(b"\n"), list[Place]()
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)
        self.indices: set[ast.AST | None] = set()
        self.functions = 0
        self.visit(ast.parse(source))

    def span(self, node) -> tuple[int, int]:
        end = self.starts[node.end_lineno - 1] + node.end_col_offset
        return self.starts[node.lineno - 1] + node.col_offset, end

    def code(self, node) -> bytes:
        begin, end = self.span(node)
        return self.source[begin:end]

    def add(self, kind: str, *edits: tuple[int, int, bytes]) -> None:
        anchor = min(begin for begin, _, _ in edits)
        line = self.source.count(b"\n", 0, anchor)
        indentation = len(self.lines[line]) - len(self.lines[line].lstrip())
        self.found.append(Place(line, anchor - self.starts[line] - indentation, kind, edits))

    def operator(self, left, right, old: str, new: str, kind: str) -> None:
        """The operator ``old`` between two operands."""
        begin, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[begin:end]
        if b"#" not in gap:
            at = begin + gap.index(old.encode())
            self.add(kind, (at, at + len(old), new.encode()))

    # What is left out.

    def visit_FunctionDef(self, node) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        self.functions += 1
        for child in node.body:
            self.visit(child)
        self.functions -= 1

    def visit_ClassDef(self, node) -> None:
        for child in node.body:
            self.visit(child)

    def visit_AnnAssign(self, node) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assert(self, node) -> None:
        self.visit(node.test)

    def left_out(self, node) -> None:
        pass

    visit_Raise = visit_JoinedStr = visit_Import = visit_ImportFrom = left_out  # noqa: N815

    # What is changed.

    def visit_Compare(self, node) -> None:
        operands = [node.left, *node.comparators]
        for left, right, op in zip(operands, node.comparators, node.ops, strict=False):
            old, bound, negated = COMPARISONS[type(op)]
            if bound:
                self.operator(left, right, old, bound, "bound of a comparison")
            self.operator(left, right, old, negated, "comparison negated")
        self.generic_visit(node)

    def visit_BinOp(self, node) -> None:
        both = (node.left, node.right)
        texts = any(isinstance(x, TEXTS) or (isinstance(x, ast.Constant) and isinstance(x.value, str)) for x in both)
        types = isinstance(node.op, ast.BitOr) and not self.functions
        if type(node.op) in OPERATORS and not texts and not types:
            old, new = OPERATORS[type(node.op)]
            self.operator(node.left, node.right, old, new, "operator")
        self.generic_visit(node)

    def visit_AugAssign(self, node) -> None:
        if type(node.op) in OPERATORS and not isinstance(node.value, TEXTS):
            old, new = OPERATORS[type(node.op)]
            self.operator(node.target, node.value, old, new, "operator")
        self.generic_visit(node)

    def visit_BoolOp(self, node) -> None:
        old, new = OPERATORS[type(node.op)]
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.operator(left, right, old, new, "and / or")
        self.generic_visit(node)

    def visit_UnaryOp(self, node) -> None:
        begin, _ = self.span(node)
        if isinstance(node.op, ast.Not):
            self.add("not dropped", (begin, begin + 3, b""))
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.add("minus dropped", (begin, begin + 1, b""))
        if node in self.indices:
            self.indices.add(node.operand)
        self.generic_visit(node)

    def visit_Subscript(self, node) -> None:
        axes = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for axis in axes:
            self.indices |= {axis.lower, axis.upper, axis.step} if isinstance(axis, ast.Slice) else {axis}
        self.generic_visit(node)

    def visit_Constant(self, node) -> None:
        begin, end = self.span(node)
        if isinstance(node.value, bool):
            self.add("boolean", (begin, end, repr(not node.value).encode()))
        elif isinstance(node.value, int | float):
            name = "index" if node in self.indices else "constant"
            self.add(f"{name} + 1", (begin, end, repr(node.value + 1).encode()))
            self.add(f"{name} - 1", (begin, end, repr(node.value - 1).encode()))

    def visit_Call(self, node) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name == "warn" or name.endswith("Error"):
            return
        if name in ("isinstance", "issubclass"):
            self.visit(node.args[0])
            return
        first = node.args[:2]
        if len(first) == 2 and name not in UNSWAPPED and not any(isinstance(x, ast.Starred) for x in first):
            (a, b), codes = map(self.span, first), [self.code(x) for x in first]
            if codes[0] != codes[1]:
                self.add("arguments swapped", (*a, codes[1]), (*b, codes[0]))
        if name == "zip":  # `strict` only guards against what does not happen
            node.keywords = []
        for keyword in node.keywords:
            if keyword.arg is not None:
                begin, end = self.span(keyword)
                before = re.search(rb",\s*$", self.source[:begin])
                after = re.match(rb"\s*,?\s*", self.source[end:])
                self.add(
                    "keyword dropped",
                    (begin, begin, b""),  # the place is that of the keyword
                    (before.start(), end, b"") if before else (begin, end + (after.end() if after else 0), b""),
                )
        self.generic_visit(node)

    def visit_IfExp(self, node) -> None:
        for branch, which in ((node.body, "first"), (node.orelse, "second")):
            self.add(f"always the {which} branch", (*self.span(node), b"(" + self.code(branch) + b")"))
        self.generic_visit(node)

    def visit_Return(self, node) -> None:
        if isinstance(node.value, ast.BinOp | ast.BoolOp):
            operand = node.value.left if isinstance(node.value, ast.BinOp) else node.value.values[0]
            self.add("first operand returned", (*self.span(node.value), b"(" + self.code(operand) + b")"))
        self.generic_visit(node)

    def negate(self, test) -> None:
        simple = not isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.NamedExpr)
        if simple and getattr(test, "id", "") != "TYPE_CHECKING":
            self.add("condition negated", (*self.span(test), b"not (" + self.code(test) + b")"))

    def visit_If(self, node) -> None:
        self.negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node) -> None:
        for test in node.ifs:
            self.negate(test)
        self.generic_visit(node)


class Source:
    """One file of a checkout, its places and its mutated texts."""

    def __init__(self, path: pathlib.Path):
        self.raw = path.read_bytes()
        self.texts = [line.strip().decode() for line in self.raw.split(b"\n")]
        times = collections.Counter(self.texts)
        # On a line that stands there twice a fault could not be found again.
        self.places = [place for place in Places(self.raw).found if times[self.texts[place.line]] == 1]

    def mutated(self, place: Place) -> bytes | None:
        """None where the change is not a program, or the same one."""
        raw = self.raw
        for begin, end, new in sorted(place.edits, reverse=True):
            raw = raw[:begin] + new + raw[end:]
        try:
            same = ast.dump(ast.parse(raw)) == ast.dump(ast.parse(self.raw))
        except SyntaxError:
            return None
        return None if same else raw

    def becomes(self, place: Place) -> str:
        changed = self.mutated(place) or b""
        first = min(begin for begin, _, _ in place.edits)
        line = self.raw.count(b"\n", 0, first)
        rest = len(self.raw) - max(end for _, end, _ in place.edits)
        begin = self.raw.rfind(b"\n", 0, first) + 1
        end = changed.find(b"\n", max(first, len(changed) - rest))
        shown = b" ".join(changed[begin:end].split()).decode()
        return shown or f"(nothing, line {line + 1})"

    def mutant(self, room: str, file: str, place: Place) -> Mutant:
        return Mutant(room, file, self.texts[place.line], place.column, place.kind, self.becomes(place))


def beginning(names: Sequence[str], rooms: Iterable[str]) -> str:
    """The longest of the rooms in which a file lies under one of its names; "" where none is."""
    found = [room for room in rooms for name in names if name == room or name.startswith(f"{room}/")]
    return max(found, key=len, default="")


def shares(sizes: dict[str, int], number: int) -> dict[str, int]:
    """``number`` in proportion to sizes, by the largest remainders."""
    exact = {name: number * size / sum(sizes.values()) for name, size in sizes.items()}
    given = {name: int(x) for name, x in exact.items()}
    left = number - sum(given.values())
    for name in sorted(exact, key=lambda name: given[name] - exact[name])[:left]:
        given[name] += 1
    return given


def drawn(source: Source, number: int, dice: random.Random) -> Iterator[Place]:
    kinds = collections.defaultdict(list)
    for place in source.places:
        kinds[place.kind].append(place)
    lines: set[int] = set()
    while number and kinds:
        kind = dice.choice(sorted(kinds))
        place = kinds[kind].pop(dice.randrange(len(kinds[kind])))
        if not kinds[kind]:
            del kinds[kind]
        if place.line not in lines and source.mutated(place) is not None:
            lines.add(place.line)
            number -= 1
            yield place


def draw(root: pathlib.Path, rooms: Iterable[str], moved: Moved, number: int, seed: int) -> list[Mutant]:
    package = root / PACKAGE
    files = sorted(path.relative_to(package).as_posix() for path in package.rglob("*.py"))
    room_of = {file: room for file in files if (room := beginning((file, *moved.get(file, ())), rooms))}
    sources = {file: Source(package / file) for file in room_of}
    found = []
    for file, share in shares({file: len(source.places) for file, source in sources.items()}, number).items():
        places = sorted(drawn(sources[file], share, random.Random(f"{seed} {file}")))
        found += [sources[file].mutant(room_of[file], file, place) for place in places]
    return found


def find(root: pathlib.Path, mutant: Mutant, moved: Moved) -> tuple[pathlib.Path, bytes] | None:
    """The file of a checkout and its text with the fault, where the line is there exactly once."""
    for file in (mutant.file, *moved.get(mutant.file, ())):
        path = root / PACKAGE / file
        if path.exists():
            source = Source(path)
            for place in source.places:
                if (source.texts[place.line], place.column, place.kind) == (mutant.text, mutant.column, mutant.kind):
                    raw = source.mutated(place)
                    return None if raw is None else (path.relative_to(root), raw)
    return None


def tests_of(root: pathlib.Path, names: Sequence[str]) -> tuple[str, ...]:
    """The tests of a file that has these names."""
    room = beginning(names, TESTS)
    if not room:
        raise SystemExit(f"no tests are known for {' or '.join(names)}: give --tests, or --moved with its later name")
    patterns = TESTS[room]
    found = [path for pattern in patterns for path in sorted((root / "tests").glob(pattern))]
    tests = [x.relative_to(root).as_posix() for x in found if x.name.startswith("test_")]
    return tuple(dict.fromkeys(tests))


def copied(root: pathlib.Path, folder: pathlib.Path) -> None:
    """The tracked files as they are now."""
    names = subprocess.run(["git", "-C", str(root), "ls-files", "-z"], check=True, capture_output=True, text=True)
    for name in filter(None, names.stdout.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)


def write(path: pathlib.Path, raw: bytes) -> None:
    """Compiled files go: a mutant of the same size within the same second would not be read."""
    path.write_bytes(raw)
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def run_tests(folder: pathlib.Path, tests: tuple[str, ...], limit: float | None) -> tuple[str, str, float]:
    """("passed", "failed", "died" or "timeout"; the test, or the last lines; seconds)."""
    conftest = (folder / "tests" / "conftest.py").read_text()
    more = ["--no-types"] if "--no-types" in conftest else []
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *more, *tests]
    environment = {**os.environ, "PYTHONPATH": str(folder)}

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))

    begin = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=bounded,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        told = said.read()
    seconds = time.monotonic() - begin
    if code == 0:
        return "passed", "", seconds
    if code == 5:
        raise SystemExit(f"pytest found no tests in {' '.join(tests)}")
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", told, re.MULTILINE)
    outcome = "timeout" if code is None else "failed" if code > 0 else "died"
    return outcome, failed[1] if failed else told[-1000:], seconds


def seconds_unmutated(folder: pathlib.Path, tests: tuple[str, ...]) -> float:
    outcome, told, seconds = run_tests(folder, tests, None)
    if outcome != "passed":
        raise SystemExit(f"These tests fail without a mutant ({outcome}): {' '.join(tests)}\n{told}")
    return seconds


def read(path: pathlib.Path) -> tuple[dict[tuple, dict], dict[tuple[str, ...], float]]:
    """Outcomes of mutants by key, and seconds of tests without a mutant, as far as an earlier run came."""
    outcomes, unmutated = {}, {}
    for line in path.read_text().splitlines() if path.exists() else ():
        fact = json.loads(line)
        if "mutant" in fact:
            outcomes[Mutant(*fact["mutant"].values()).key] = fact
        elif "unmutated" in fact:
            unmutated[tuple(fact["unmutated"])] = fact["seconds"]
    return outcomes, unmutated


def run(mutants: list[Mutant], moved: Moved, options: argparse.Namespace) -> list[dict]:
    outcomes, unmutated = read(options.results)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, options.results.open("a") as stream:

        def tell(fact: dict) -> None:
            stream.write(json.dumps(fact) + "\n")
            stream.flush()

        folder = pathlib.Path(name)
        copied(options.root, folder)
        if not outcomes:
            tell({"python": platform.python_version(), "jax": version("jax"), "flax": version("flax")})
        for i, mutant in enumerate(mutants):
            if mutant.key in outcomes:
                continue
            fact: dict = {"mutant": mutant._asdict(), "outcome": "gone"}
            place = find(options.root, mutant, moved)
            if place is not None:
                path, raw = place
                tests = tuple(options.tests) or tests_of(options.root, (mutant.file, *moved.get(mutant.file, ())))
                if tests not in unmutated:
                    unmutated[tests] = seconds_unmutated(folder, tests)
                    tell({"unmutated": tests, "seconds": unmutated[tests]})
                original = (folder / path).read_bytes()
                write(folder / path, raw)
                how, told, seconds = run_tests(folder, tests, options.limit or 60 + 3 * unmutated[tests])
                write(folder / path, original)
                outcome = "survived" if how == "passed" else "caught"
                fact |= {"outcome": outcome, "how": how, "told": told, "seconds": seconds, "path": path.as_posix()}
            outcomes[mutant.key] = fact
            tell(fact)
            print(f"{i + 1}/{len(mutants)} {fact['outcome']}: {mutant.file}: {mutant.becomes}", flush=True)
    return [outcomes[mutant.key] for mutant in mutants]


def table(facts: list[dict]) -> str:
    lines = ["| room | mutants | caught | survived | gone | share caught |", "| --- " * 6 + "|"]
    rooms = list(dict.fromkeys(fact["mutant"]["room"] for fact in facts))
    for room in (*rooms, "all"):
        outcomes = [fact["outcome"] for fact in facts if room in ("all", fact["mutant"]["room"])]
        caught, survived, gone = (outcomes.count(x) for x in ("caught", "survived", "gone"))
        share = f"{caught / (caught + survived):.1%}" if caught + survived else ""
        lines.append(f"| {room} | {len(outcomes)} | {caught} | {survived} | {gone} | {share} |")
    lines.append("\nSurvivors:\n")
    for fact in facts:
        if fact["outcome"] == "survived":
            mutant = Mutant(*fact["mutant"].values())
            lines.append(f"- `{fact['path']}`, {mutant.kind}: `{mutant.text}` became `{mutant.becomes}`")
    return "\n".join(lines) + "\n"


def listed(path: pathlib.Path) -> list[Mutant]:
    return [Mutant(**mutant) for mutant in json.loads(path.read_text())]


def write_list(path: pathlib.Path, mutants: list[Mutant]) -> None:
    path.write_text(json.dumps([mutant._asdict() for mutant in mutants], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=150)
    parser.add_argument("--rooms", nargs="+", default=ROOMS, help=f"folders or files below {PACKAGE}")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, help="the checkout; it is not changed")
    parser.add_argument("--list", type=pathlib.Path, help="draw, write the mutants there as JSON, and run nothing")
    parser.add_argument("--from", dest="source", type=pathlib.Path, help="take the mutants from such a list")
    parser.add_argument("--moved", nargs="+", default=[], metavar="OLD=NEW", help=f"of files below {PACKAGE}")
    parser.add_argument("--tests", nargs="+", default=[], help="run these instead of the tests of each room")
    parser.add_argument("--limit", type=float, help="seconds for a mutant; else three times as without it, and 60 s")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="JSON lines; a table lies beside them")
    parser.add_argument("--resume", action="store_true", help="go on with these results")
    parser.add_argument("--left", type=pathlib.Path, help="write the survivors there, as a list")
    options = parser.parse_args()
    options.root = options.root.resolve()
    moved: Moved = {}
    for pair in options.moved:
        old, _, new = (name.removeprefix(f"{PACKAGE}/") for name in pair.partition("="))
        moved.setdefault(old, []).append(new)
    if options.source:
        mutants = listed(options.source)
    else:
        mutants = draw(options.root, options.rooms, moved, options.number, options.seed)
    if options.list:
        write_list(options.list, mutants)
        return
    if options.results.exists() and not options.resume:
        parser.error(f"{options.results} exists: give --resume, or another file as --results")
    facts = run(mutants, moved, options)
    text = table(facts)
    options.results.with_suffix(".md").write_text(f"# {options.results.stem}\n\n{text}")
    print(text)
    if options.left:
        survivors = [mutant for mutant, fact in zip(mutants, facts, strict=True) if fact["outcome"] == "survived"]
        write_list(options.left, survivors)


if __name__ == "__main__":
    main()
