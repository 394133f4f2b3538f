"""How the pieces of a text are counted: words, sentences, paragraphs, bullet points.

Rules that a reader can apply by hand, for prose as language models write it.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_BULLET = re.compile(r"^[ \t]*[*+•-][ \t]+\S", re.MULTILINE)
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\w[^\[\]\n]*\]")
_SENTENCE_END = re.compile(r"""[.!?…]+["'”\u2019)\]*_]*(?=\s|\Z)""")
_TITLES = ("mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "e.g", "i.e", "cf", "approx")
# Before a full stop that ends no sentence: such a word, one letter (J. or U.S.), or the number
# of a list's item.
_NO_END = re.compile(
    rf"(?:(?<![\w.])(?:{'|'.join(map(re.escape, _TITLES))})|(?<![^\W\d_])[A-HJ-Z]|^\W*\d+)\.\Z",
    re.IGNORECASE,
)


def count_words(text: str) -> int:
    """Runs of letters and digits; `don't` and `well-known` are one word each."""
    return len(_WORD.findall(text))


def count_capital_words(text: str) -> int:
    """Words with letters, all of them capitals; `I` and `A` count."""
    return sum(word.isupper() for word in _WORD.findall(text))


def count_keyword(text: str, keyword: str) -> int:
    """How often a word or phrase occurs, in any case, not as a part of longer words."""
    words = r"\s+".join(map(re.escape, keyword.split()))
    before = r"(?<!\w)" if re.match(r"\w", keyword.strip()) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", keyword.strip()) else ""
    return len(re.findall(before + words + after, text, re.IGNORECASE))


def count_sentences(text: str) -> int:
    """Pieces with a letter or digit in them, between ends of sentences.

    A sentence ends at a full stop, exclamation or question mark (or several, with closing
    quotation marks and brackets) before white space, and at the end of a line. A full stop
    ends none after an abbreviation such as `Dr.` or `e.g.`, a single letter other than I
    (`J. Smith`, `U.S.`; so `plan B.` within a line is missed), and the number of a list's item.
    """
    return sum(_count_in_line(line) for line in text.splitlines())


def count_paragraphs(text: str) -> int:
    """Pieces with a letter or digit in them, between empty lines."""
    return sum(map(_says_something, re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n"))))


def count_bullets(text: str) -> int:
    """Lines that begin with `*`, `-`, `+` or `•`, a space, and text."""
    return len(_BULLET.findall(text))


def count_placeholders(text: str) -> int:
    """Square brackets around text, such as `[name]`."""
    return len(_PLACEHOLDER.findall(text))


def _count_in_line(line: str) -> int:
    count = start = 0
    for end in _SENTENCE_END.finditer(line):
        before = line[start : end.start() + 1]
        last = end.end() == len(line.rstrip())
        if end.group()[:2] == "." and not last and _NO_END.search(before):
            continue
        count += _says_something(before)
        start = end.end()
    return count + _says_something(line[start:])


def _says_something(text: str) -> bool:
    return any(character.isalnum() for character in text)
