# ruff: noqa: RUF001 -- dashes are what they look like
"""Wiki markup to plain prose: templates, tables, references, links, HTML and headings removed."""

import html
import re

__all__ = ["strip_markup"]

# Sections that hold lists of sources and links rather than prose.
_END_SECTIONS = {
    "see also", "references", "external links", "further reading", "notes", "footnotes", "bibliography", "sources",
    "citations", "notes and references", "references and notes", "works cited", "gallery", "publications",
    "discography", "filmography",
}  # fmt: skip

_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_EMPTY_REFERENCE = re.compile(r"<ref\b[^<>]*/>", re.IGNORECASE)
# Elements whose contents are not prose; the closing tag must bear the same name.
_NOT_PROSE = re.compile(
    r"<(ref|math|gallery|timeline|score|hiero|imagemap|code|source|syntaxhighlight|pre|references|"
    r"table|chem|style|script|div|templatestyles)\b[^<>]*?(?:/>|>.*?</\1\s*>)",
    re.IGNORECASE | re.DOTALL,
)
_LINE_BREAK = re.compile(r"<br\s*/?\s*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{([^{}]*)\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]+\s*([^\]]*)\]")
_BARE_ADDRESS = re.compile(r"\b(?:https?|ftp)://[^\s|\])}]+")
_HEADING = re.compile(r"^(={1,6})\s*(.+?)\s*\1\s*$")
_QUOTES = re.compile(r"'{2,5}")
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_LIST_MARK = re.compile(r"^[*#:;]+\s*")
_EMPTY_BRACKETS = re.compile(r"[ \t]*\((?:[\s,;:/–—-]|\bor\b|\band\b)*\)|[ \t]*\[\s*\]")
_BRACKET_LEAD = re.compile(r"\(\s*[,;:]\s*")
_BRACKET_TAIL = re.compile(r"\s*[,;:]\s*\)")
_SPACE_BEFORE_STOP = re.compile(r"[ \t]+([,.;:!?)])(?=\s|$)")
_SPACES = re.compile(r"[ \t\u00a0]+")

# Templates that stand for text in the sentence; every other template is dropped.
_DASHES = {"ndash": "–", "en dash": "–", "snd": " – ", "spaced ndash": " – ", "mdash": "—", "em dash": "—"}
_LAST_ARGUMENT = frozenset({"lang", "nowrap", "nobr", "abbr", "smallcaps", "small", "transl", "unicode"})


def strip_markup(text: str) -> str:
    """Prose of one article, a paragraph a line, paragraphs and headings separated by blank lines."""
    text = html.unescape(_COMMENT.sub("", text))
    text = _NOT_PROSE.sub("", _EMPTY_REFERENCE.sub("", text))
    text = _TAG.sub("", _LINE_BREAK.sub("\n", text))
    text = _until_stable(_TEMPLATE, _template_text, text)
    text = _until_stable(_TABLE, lambda _: "", text)
    text = _until_stable(_LINK, _link_text, text)
    text = _BARE_ADDRESS.sub("", _EXTERNAL_LINK.sub(r"\1", text))
    text = _MAGIC_WORD.sub("", _QUOTES.sub("", text))
    paragraphs = _drop_empty_headings(_prose_lines(text))
    return "\n\n".join(words for _, words in paragraphs)


def _until_stable(pattern: re.Pattern[str], replacement, text: str) -> str:
    """Innermost first, so that nesting needs no parser."""
    while True:
        text, found = pattern.subn(replacement, text)
        if not found:
            return text


def _template_text(match: re.Match[str]) -> str:
    name, *arguments = (part.strip() for part in match[1].split("|"))
    name = name.lower().replace("_", " ")
    plain = [argument for argument in arguments if "=" not in argument]
    if name in _DASHES:
        return _DASHES[name]
    if name in {"convert", "cvt"} and len(plain) >= 2:
        return f"{plain[0]} {plain[1]}"
    if name in _LAST_ARGUMENT and plain:
        # {{abbr|UK|United Kingdom}} shows its first argument, {{lang|fr|mot}} its last.
        return plain[0] if name == "abbr" else plain[-1]
    return ""


def _link_text(match: re.Match[str]) -> str:
    target, *rest = match[1].split("|")
    namespace, colon, _ = target.partition(":")
    if colon and rest and target.startswith(":"):
        return rest[-1]
    if colon and (
        namespace.strip().lower() in {"file", "image", "category", "media", "template", "wikt"}
        or (namespace.islower() and 2 <= len(namespace) <= 3 and not rest)
    ):
        return ""
    return (rest[-1] if rest else target).strip()


def _prose_lines(text: str) -> list[tuple[int, str]]:
    """(heading level, words) of each line; level 0 is prose. Sections that only list sources are left out."""
    kept: list[tuple[int, str]] = []
    skip_below = 0
    for raw in text.split("\n"):
        line = _SPACES.sub(" ", raw).strip()
        heading = _HEADING.match(line)
        level = len(heading[1]) if heading else 0
        if heading:
            line = heading[2].strip("= ")
            if skip_below and level > skip_below:
                continue
            skip_below = level if line.lower() in _END_SECTIONS else 0
        if skip_below or not line or line[0] in "|!{}" or line.startswith("----"):
            continue
        line = _tidy(_LIST_MARK.sub("", line))
        if any(character.isalnum() for character in line):
            kept.append((level, line))
    return kept


def _tidy(line: str) -> str:
    """Mends what removed templates leave behind: "( ; born 1900 )" becomes "(born 1900)"."""
    line = line.replace("[[", "").replace("]]", "").replace("{{", "").replace("}}", "")
    line = _EMPTY_BRACKETS.sub("", line)
    line = _BRACKET_TAIL.sub(")", _BRACKET_LEAD.sub("(", line))
    line = line.replace("( ", "(").replace(" )", ")")
    return _SPACES.sub(" ", _SPACE_BEFORE_STOP.sub(r"\1", line)).strip()


def _drop_empty_headings(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """A heading with no prose before the next heading of its level or above says nothing."""
    kept: list[tuple[int, str]] = []
    for level, words in reversed(lines):
        following = kept[-1][0] if kept else 1
        if level and kept and following and following <= level:
            continue
        if level and not kept:
            continue
        kept.append((level, words))
    return kept[::-1]
