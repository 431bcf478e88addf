"""A question to a person: several answers fit, and the command line spells out a command for each."""

import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fisher_jax._support.errors import InputError

_MOST = 6  # commands in one sentence


class Way(NamedTuple):
    """How a command line has to change to name a task."""

    added: tuple[str, ...] = ()
    # Words behind `option` (None: words that are no option's) and what stands in their place.
    replaced: Mapping[str, tuple[str, ...]] = {}
    option: str | None = None

    def applied(self, arguments: Sequence[str]) -> list[str]:
        done: list[str] = []
        behind: str | None = None
        for word in arguments:
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                behind = None if equals else name
                ours = self.option is not None and self.option.startswith(name) and value in self.replaced
                done += [f"{name}={self.replaced[value][0]}"] if ours else [word]
                continue
            ours = behind is None if self.option is None else self.option.startswith(behind or "-")
            done += self.replaced.get(word, (word,)) if ours else (word,)
            behind = behind if self.option else None
        return [*done, *self.added]


class TaskChoiceError(InputError):
    """Several tasks fit; the command line, which alone knows its words, spells out a command for each."""

    def __init__(self, sentence: str, ways: Sequence[Way]):
        super().__init__(sentence)
        self.ways = list(ways)

    def told(self, arguments: Sequence[str]) -> str:
        """The sentence with every command, to be pasted."""
        shown = [f"`{shlex.join(['fisher-jax', *way.applied(arguments)])}`" for way in self.ways[:_MOST]]
        if len(self.ways) > _MOST:
            shown.append(f"the same with one of {len(self.ways) - _MOST} more")
        return f"{self}; give one of these commands: {listed(shown, 'or')}"


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
