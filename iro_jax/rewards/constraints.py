"""Format constraints that a program can check, of the kinds of IFEval (arXiv 2311.07911).

A `Constraint` is plain data, `{"kind": "no_commas"}` or `{"kind": "sentences", "relation":
"at least", "count": 3}`: it stands in a prompt's reference, and `describe` gives the sentence
that asks for it. `KINDS` lists what there is; how text is counted is in
`iro_jax.rewards.counting`. An empty answer satisfies nothing.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from iro_jax.data import Prompt
from iro_jax.rewards import counting
from iro_jax.rewards.types import Answer, check_pairs, check_rewards

RELATIONS = ("at least", "at most", "exactly")
_QUOTES = (('"', '"'), ("“", "”"))


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of constraint; arguments come by name.

    Attributes:
      check: whether a text, stripped and not empty, satisfies it.
      describe: the sentence that asks for it.
      arguments: what it takes: a check for each name, which says what is expected if it fails.
    """

    check: Callable[..., bool]
    describe: Callable[..., str]
    arguments: Mapping[str, Callable[[Any], str | None]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A kind of `KINDS` and its arguments.

    Raises:
      ValueError: there is no such kind, or its arguments are others; names them.
    """

    kind: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self):
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(
                f"The kind of a constraint must be one of {sorted(KINDS)}. Got: {self.kind!r}"
            )
        wanted = KINDS[self.kind].arguments
        if set(self.arguments) != set(wanted):
            raise ValueError(
                f"A constraint {self.kind!r} has the arguments {sorted(wanted)}."
                f" Got: {sorted(map(str, self.arguments))}"
            )
        for name, expected in wanted.items():
            problem = expected(self.arguments[name])
            if problem is not None:
                raise ValueError(
                    f"The argument {name!r} of a constraint {self.kind!r} must be {problem}."
                    f" Got: {self.arguments[name]!r}"
                )

    def to_json(self) -> dict[str, Any]:
        """The constraint as a JSON object: its kind beside its arguments."""
        return {"kind": self.kind, **self.arguments}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Constraint:
        """The constraint that `to_json` gave `value` for.

        Raises:
          ValueError: it is none.
        """
        if not isinstance(value, Mapping) or "kind" not in value:
            raise ValueError(f"A constraint must be an object with a 'kind'. Got: {value!r}")
        arguments = {name: argument for name, argument in value.items() if name != "kind"}
        return cls(value["kind"], arguments)


def check(constraint: Constraint, text: str) -> bool:
    """Whether a text satisfies a constraint; white space around it does not count."""
    text = text.strip()
    return bool(text) and KINDS[constraint.kind].check(text, **constraint.arguments)


def describe(constraint: Constraint) -> str:
    """The constraint as an English sentence that asks for it."""
    return KINDS[constraint.kind].describe(**constraint.arguments)


@dataclasses.dataclass(frozen=True)
class ConstraintReward:
    """1 if the answer satisfies all constraints of its prompt's reference, else 0.

    The reference is one constraint or a list of them, as `Constraint.to_json` gives them.

    Attributes:
      share: whether the reward is the share of constraints satisfied instead.
    """

    share: bool = False

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`.

        Raises:
          ValueError: a reference holds no constraints; names the prompt's id.
        """
        check_pairs(prompts, answers)
        rewards = []
        for prompt, answer in zip(prompts, answers, strict=True):
            met = [check(constraint, answer.text) for constraint in read_constraints(prompt)]
            rewards.append(sum(met) / len(met) if self.share else float(all(met)))
        return check_rewards(rewards, prompts)


def read_constraints(prompt: Prompt) -> list[Constraint]:
    """The constraints of a prompt's reference.

    Raises:
      ValueError: there is none, or one is broken; names the prompt's id.
    """
    reference = prompt.reference
    listed = reference if isinstance(reference, list) else [reference]
    if not listed:
        raise ValueError(f"Prompt {prompt.id!r}: the reference must hold constraints. Got: []")
    try:
        return [Constraint.from_json(value) for value in listed]
    except ValueError as error:
        raise ValueError(f"Prompt {prompt.id!r}: {error}") from error


def _relation(value: Any) -> str | None:
    return None if value in RELATIONS else f"one of {RELATIONS}"


def _count(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return None if whole and value >= 0 else "a whole number, 0 or more"


def _phrase(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "text that is not empty"


def _phrases(value: Any) -> str | None:
    texts = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return None if texts and not any(map(_phrase, value)) else "a list of texts, none empty"


_AMOUNT = {"relation": _relation, "count": _count}


def _holds(number: int, relation: str, count: int) -> bool:
    if relation == "exactly":
        return number == count
    return number >= count if relation == "at least" else number <= count


def _amount(count_in: Callable[[str], int], singular: str, plural: str) -> Kind:
    """A constraint on how many of something there are."""

    def holds(text: str, relation: str, count: int) -> bool:
        return _holds(count_in(text), relation, count)

    def sentence(relation: str, count: int) -> str:
        return f"Your answer must have {relation} {count} {singular if count == 1 else plural}."

    return Kind(holds, sentence, _AMOUNT)


def _plain(holds: Callable[[str], bool], sentence: str) -> Kind:
    """A constraint without arguments."""
    return Kind(holds, lambda: sentence)


def _keyword(text: str, keyword: str, relation: str, count: int) -> bool:
    return _holds(counting.count_keyword(text, keyword), relation, count)


def _ask_keyword(keyword: str, relation: str, count: int) -> str:
    times = "once" if count == 1 else f"{count} times"
    return f'Use the word "{keyword}" {relation} {times} in your answer.'


def _forbidden(text: str, words: Sequence[str]) -> bool:
    return all(counting.count_keyword(text, word) == 0 for word in words)


def _ask_forbidden(words: Sequence[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    if len(quoted) == 1:
        return f"Do not use the word {quoted[0]} in your answer."
    return f"Do not use the words {', '.join(quoted[:-1])} or {quoted[-1]} in your answer."


def _starts_with(text: str, phrase: str) -> bool:
    phrase = phrase.strip().lower()
    return re.match(re.escape(phrase) + _no_word_after(phrase), text.lower()) is not None


def _ends_with(text: str, phrase: str) -> bool:
    phrase = phrase.strip().lower()
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    return re.search(before + re.escape(phrase) + r"\Z", text.lower()) is not None


def _no_word_after(phrase: str) -> str:
    return r"(?!\w)" if re.search(r"\w\Z", phrase) else ""


def _quoted(text: str) -> bool:
    """One pair around something; quotation marks inside are allowed."""
    return any(
        text.startswith(opening) and text.endswith(closing) and text[1:-1].strip() != ""
        for opening, closing in _QUOTES
        if len(text) > 2
    )


def _json(text: str) -> bool:
    """An object or a list, alone or in one fenced block; a bare number or text is too little."""
    fenced = re.fullmatch(r"```(?:json|JSON)?\s*\n(.*)\n\s*```", text, re.DOTALL)
    try:
        value = json.loads(fenced.group(1) if fenced else text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


KINDS: Mapping[str, Kind] = {
    "no_commas": _plain(lambda text: "," not in text, "Do not use any commas in your answer."),
    "lower_case": _plain(
        str.islower, "Write your whole answer in lower case letters, without any capitals."
    ),
    "upper_case": _plain(str.isupper, "Write your whole answer in CAPITAL LETTERS only."),
    "quotation": _plain(_quoted, "Wrap your whole answer in double quotation marks."),
    "json": _plain(_json, "Write your whole answer as a JSON object or list."),
    "title": _plain(
        lambda text: re.search(r"<<[^\n<>]*\w[^\n<>]*>>", text) is not None,
        "Your answer must have a title, wrapped in double angular brackets, like <<a title>>.",
    ),
    "words": _amount(counting.count_words, "word", "words"),
    "sentences": _amount(counting.count_sentences, "sentence", "sentences"),
    "paragraphs": _amount(
        counting.count_paragraphs,
        "paragraph",
        "paragraphs, with an empty line between them",
    ),
    "bullets": _amount(
        counting.count_bullets,
        "bullet point, on a line that begins with * or -",
        "bullet points, each on a line that begins with * or -",
    ),
    "placeholders": _amount(
        counting.count_placeholders,
        "placeholder in square brackets, like [name]",
        "placeholders in square brackets, like [name]",
    ),
    "capital_words": _amount(
        counting.count_capital_words,
        "word in all capital letters",
        "words in all capital letters",
    ),
    "keyword": Kind(_keyword, _ask_keyword, {"keyword": _phrase, **_AMOUNT}),
    "forbidden_words": Kind(_forbidden, _ask_forbidden, {"words": _phrases}),
    "starts_with": Kind(
        _starts_with,
        lambda phrase: f'Begin your answer with this exact phrase: "{phrase}"',
        {"phrase": _phrase},
    ),
    "ends_with": Kind(
        _ends_with,
        lambda phrase: (
            f'End your answer with this exact phrase, and write nothing after it: "{phrase}"'
        ),
        {"phrase": _phrase},
    ),
}
"""Every kind of constraint by its name."""
