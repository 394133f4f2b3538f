r"""One spelling for answers that say the same in different notations.

`1,234`, `\$1234.00` and `1234.` are one answer, and so are `0.5`, `\frac12`, `\dfrac{1}{2}` and
`1/2`; `5\text{ cm}` is `5`, and `50\%` is `50`, as in the references of MATH. This is notation
only: `2\sqrt{2}` and `\sqrt{8}` stay different, as do `1/3` and `0.333`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

LONGEST = 500
"""Characters of an answer; a model that repeats itself writes more."""

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"([-+]?)\s*({_DECIMAL})")
_RATIO = re.compile(
    rf"([-+]?)(?:\\frac\{{([-+]?)({_DECIMAL})\}}\{{([-+]?)({_DECIMAL})\}}"
    rf"|()({_DECIMAL})\s*/\s*([-+]?)({_DECIMAL}))"
)
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s*(?:\\frac\{(\d+)\}\{(\d+)\}|\s(\d+)\s*/\s*(\d+))")

_SPACE = re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad\b|\\(?:displaystyle|limits)\b|\s+")
_NOTHING = re.compile(r"\\!\s*|\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?|\\?\$|[€£]|\\?%")
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\\circ\b|\{\s*\\circ\s*\})|°|\\degree\b|\bdegrees?\b)")
_ROMAN = re.compile(r"\\(?:text|textbf|textrm|textit|mbox|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
_UNIT_TEXT = re.compile(
    r"(?<=[\d})])\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$"
)
# Words after a number that belong to the answer.
_NO_UNIT = (
    r"(?:pi|sqrt|infinity|or|and|to|plus|minus|times|by|is"
    r"|dozen|hundred|thousand|million|billion|trillion)\b"
)
_UNIT_WORDS = re.compile(
    rf"^([-+]?(?:{_DECIMAL})(?:\s*/\s*\d+)?)\s+(?!{_NO_UNIT})[a-zA-Z][a-zA-Z]+"
    r"(?:[\s/-]+[a-zA-Z]+|\^\d){0,4}$"
)
_PERCENT = re.compile(r"(?<=\d)\s*percent$")
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(\{|[^\s{}\\]|\\[a-zA-Z]+)")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_BRACED_SCRIPT = re.compile(r"([_^])\s*\{\s*(\w)\s*\}")
_NAMED = re.compile(r"^\s*\\?[a-zA-Z]{1,2}\s*=\s*([^=]+)$")
_CHOICE = re.compile(r"^\(([A-Za-z])\)$")
_COMMAND = re.compile(r"(\\[a-zA-Z]+)\s+(?=[A-Za-z])")


def normalise_answer(answer: str) -> str:
    """The one spelling of an answer; empty if the answer says nothing.

    Numbers become a whole number or a fraction in lowest terms. The items of a list, a tuple or
    an interval are normalised one by one. Of anything else, spaces and typesetting go; of an
    answer longer than `LONGEST` spaces only.
    """
    if len(answer) > LONGEST:
        return "".join(answer.split())
    text = _typeset(answer)
    return _items(text) if text else ""


def _typeset(answer: str) -> str:
    """The answer without what only concerns its looks."""
    text = answer.replace("\u2212", "-").replace("{,}", ",")
    text = _NOTHING.sub("", text)
    text = _DEGREES.sub("", text)
    text = _SPACE.sub(" ", text).strip()
    text = _UNIT_TEXT.sub("", text)
    while (plain := _ROMAN.sub(lambda match: match.group(1), text)) != text:
        text = plain
    text = _PERCENT.sub("", text.strip().rstrip(".").strip())
    named = _NAMED.match(text)
    if named:
        text = named.group(1).strip()
    text = _UNIT_WORDS.sub(lambda match: match.group(1), text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", _full_fractions(text))
    text = _BRACED_SCRIPT.sub(r"\1\2", text)
    choice = _CHOICE.match(text)
    return choice.group(1) if choice else text


def _full_fractions(text: str) -> str:
    r"""`\frac12`, `\dfrac1{2}` and `\frac 1 2` as `\frac{1}{2}`."""
    parts = []
    place = 0
    for match in _SHORT_FRACTION.finditer(text):
        if match.start() < place:
            continue
        parts.append(text[place : match.start()])
        numerator, place = _group(text, match.start(1))
        denominator, place = _group(text, place)
        parts.append(rf"\frac{{{_full_fractions(numerator)}}}{{{_full_fractions(denominator)}}}")
    return "".join([*parts, text[place:]])


def _group(text: str, start: int) -> tuple[str, int]:
    """One argument of a LaTeX command, without its braces, and where it ends."""
    start += len(text[start:]) - len(text[start:].lstrip())
    if text[start : start + 1] != "{":
        command = re.match(r"\\[a-zA-Z]+|.?", text[start:])
        assert command is not None
        return command.group(), start + command.end()
    depth = 0
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + 1 : index].strip(), index + 1
    return text[start + 1 :], len(text)


def _items(text: str) -> str:
    """A number, or what else it is, item by item."""
    number = _number(text)
    if number is not None:
        return str(number)
    bracketed = text[0] in "([" and text[-1] in ")]" and _closes_last(text)
    inner = text[1:-1] if bracketed else text
    items = list(_split(inner))
    if len(items) > 1:
        joined = ",".join(_items(item.strip()) if item.strip() else "" for item in items)
        return f"{text[0]}{joined}{text[-1]}" if bracketed else joined
    return _without_spaces(text)


def _without_spaces(text: str) -> str:
    r"""Without spaces, except where one ends a command: `\cot x`."""
    return _COMMAND.sub(r"\1\t", text).replace(" ", "").replace("\t", " ")


def _closes_last(text: str) -> bool:
    """Whether the bracket that opens the text is closed by its last character."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return index == len(text) - 1
    return False


def _split(text: str) -> Iterator[str]:
    """At the commas that stand in no brackets."""
    depth = start = 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]


def _number(text: str) -> Fraction | None:
    if match := _NUMBER.fullmatch(text):
        return _signed(match[1]) * _decimal(match[2])
    if match := _MIXED.fullmatch(text):
        sign, whole, *parts = (group for group in match.groups() if group is not None)
        numerator, denominator = map(int, parts)
        if denominator == 0:
            return None
        return _signed(sign) * (int(whole) + Fraction(numerator, denominator))
    if match := _RATIO.fullmatch(text):
        first, *rest = (group for group in match.groups() if group is not None)
        sign_above, above, sign_below, below = rest
        if _decimal(below) == 0:
            return None
        sign = _signed(first) * _signed(sign_above) * _signed(sign_below)
        return sign * _decimal(above) / _decimal(below)
    return None


def _signed(sign: str) -> int:
    return -1 if sign == "-" else 1


def _decimal(digits: str) -> Fraction:
    digits = digits.replace(",", "")
    return Fraction(f"0{digits}" if digits.startswith(".") else digits.rstrip("."))
