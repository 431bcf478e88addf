"""The parts of a GGUF file that was split: ``NAME-00001-of-00003.gguf`` and the others beside it."""

import re
from pathlib import Path

from fisher_jax._support.errors import InputError, shown
from fisher_jax._support.printable import printable
from fisher_jax.models.gguf_header import GgufHeader, read_header

__all__ = ["name_of", "parts_of"]

PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
MOST = 4096


def name_of(path: Path) -> str:
    """The model's name: that of the file, without which part it is."""
    part = PART.fullmatch(path.stem)
    return part["name"] if part else path.stem


def parts_of(path: Path, block_sizes: dict[int, tuple[int, int]]) -> dict[Path, GgufHeader]:
    """The headers of all parts, the first of which holds the metadata; of one file where it is not split.

    Raises:
        InputError: a part is missing, belongs to another file, or holds a tensor that another one holds too.
    """
    header = read_header(path, block_sizes)
    if (count := split(header, "count", 1)) <= 1:
        return {path: header}
    named = PART.fullmatch(path.stem)
    if named is None or int(named["count"]) != count or path.suffix != ".gguf":
        raise InputError(
            f"{printable(path.name)} is one of {count:,} parts of a split GGUF file, and its name must say which: "
            f"NAME-00001-of-{count:05}.gguf"
        )
    paths = [path.with_name(f"{named['name']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if absent := [part.name for part in paths if not part.is_file()]:
        raise InputError(
            f"{printable(absent[0])} is missing; all {count} parts of a split GGUF file lie in one folder"
        )
    parts = {part: header if part == path else read_header(part, block_sizes) for part in paths}
    seen: set[str] = set()
    for number, (part, found) in enumerate(parts.items()):
        of = split(found, "count", 1), split(found, "no", -1), split(found, "tensors.count", -1)
        if of[:2] != (count, number) or of[2] != split(parts[paths[0]], "tensors.count", -1):
            raise InputError(
                f"{printable(part.name)} is not part {number + 1} of the file that {path.name} belongs to"
            )
        if twice := seen & found.tensors.keys():
            raise InputError(f"{printable(part.name)} holds {shown(min(twice))}, which another part holds too")
        seen |= found.tensors.keys()
    if (number := split(parts[paths[0]], "tensors.count", len(seen))) != len(seen):
        raise InputError(
            f"the parts of {printable(path.name)} hold {len(seen):,} tensors of {number:,}; fetch them again"
        )
    return parts


def split(header: GgufHeader, what: str, default: int) -> int:
    """A number of the entries on splitting."""
    found = header.metadata.get(f"split.{what}", default)
    if not isinstance(found, int) or isinstance(found, bool) or (what == "count" and not 0 <= found <= MOST):
        raise InputError(f"a GGUF file has split.{what} {shown(found)}, which cannot be")
    return found
