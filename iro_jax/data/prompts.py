"""Prompts: what one is, where they are read from, and which of them an iteration uses.

`read_prompts` is the one way in: JSON lines, CSV, Hugging Face datasets and
tensorflow-datasets become a list of `Prompt`s, or one error that names the place. `subset`
deals these out to the iterations. How the formats are opened is in `sources.py`; text becomes
tokens elsewhere (`iro_jax.models.render`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from iro_jax.data.sources import PromptError, rows, shorten
from iro_jax.models import Conversation


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt of a run.

    Attributes:
      id: unique in a run; every random draw for the prompt derives from the seed and the id.
      conversation: raw text, or messages with `role` and `content`, kept as a tuple of dicts.
      reference: JSON value that a verifier compares with: a gold answer, constraints, ...

    Raises:
      ValueError: the id or the conversation is empty or malformed, or the reference is not a
        JSON value.
    """

    id: str
    conversation: Conversation = dataclasses.field(hash=False)
    reference: Any = dataclasses.field(default=None, hash=False)

    def __post_init__(self):
        if not isinstance(self.id, str) or not self.id:
            raise ValueError(f"A prompt's id must be a string that is not empty. Got: {self.id!r}")
        object.__setattr__(self, "conversation", _check_conversation(self.conversation))
        try:
            # What is stored comes back as JSON has it, so that a prompt equals its stored self.
            plain = json.loads(json.dumps(self.reference, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"A prompt's reference must be a JSON value ({error}). Got: {self.reference!r}"
            ) from error
        object.__setattr__(self, "reference", plain)

    def to_json(self) -> dict[str, Any]:
        """The prompt as a JSON object: `id`, `prompt`, `reference`."""
        conversation = self.conversation
        text = conversation if isinstance(conversation, str) else [dict(m) for m in conversation]
        return {"id": self.id, "prompt": text, "reference": self.reference}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Prompt:
        """The prompt that `to_json` gave `value` for."""
        return cls(value["id"], value["prompt"], value["reference"])


def read_prompts(
    source: str,
    *,
    prompt_field: str = "prompt",
    id_field: str | None = None,
    reference_field: str | None = None,
    split: str = "train",
    skip: int = 0,
    limit: int | None = None,
    template: str | None = None,
    chat: bool = False,
    system: str | None = None,
    duplicates: Literal["error", "drop"] = "error",
) -> list[Prompt]:
    """Reads prompts, in the order of the source.

    Args:
      source: one of
        `FILE.jsonl`: an object a line; blank lines are skipped;
        `FILE.json`: a list of objects;
        `FILE.csv`: with a header;
        `hf:FOLDER`: what `datasets` saved with `save_to_disk`, or a folder it can load;
        `hf:NAME` or `hf:NAME:CONFIG`: a dataset of the Hugging Face hub;
        `hf:NAME/FILE.json`: one file of such a dataset, of the kinds above;
        `tfds:NAME` (or `tfds:NAME/CONFIG:VERSION`): from tensorflow-datasets, prepared on
        first use; `tfds:FOLDER`: one that is prepared already, as ArrayRecord.
        The first three are UTF-8.
      prompt_field: holds the conversation: text, or messages with `role` and `content`.
      id_field: holds the id, text or an integer. Without one, the id is a digest of the
        conversation: it does not change when the source is reordered or grows.
      reference_field: holds the reference; without one, references are None.
      split: of a dataset; files have no splits.
      skip: leaves out so many prompts at the beginning, which another part of a run may use.
      limit: reads only the first `limit` prompts after these.
      template: text around prompts that are text, with `{prompt}` in their place.
      chat: text is what a user says to the chat template, not a raw prompt.
      system: what the system says before each conversation that has no such message; needs
        conversations, or `chat`.
      duplicates: what happens when an id comes again, which, without `id_field`, means the
        same conversation: `error`, or `drop` all but the first. Rows with the same id that
        differ in anything else are an error in either case.

    Raises:
      PromptError: the source does not exist or a part of it is broken; names file and line
        (or dataset and row, counted from 0). Nothing has been written by then.
      ImportError: the package that the source needs is not installed; names the extra.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be None or at least 1. Got: {limit}")
    if skip < 0:
        raise ValueError(f"skip must be at least 0. Got: {skip}")
    if template is not None and "{prompt}" not in template:
        raise ValueError(f"template must have {{prompt}} in it. Got: {template!r}")
    if duplicates not in ("error", "drop"):
        raise ValueError(f"duplicates must be 'error' or 'drop'. Got: {duplicates!r}")
    prompts: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    fields = [name for name in (prompt_field, id_field, reference_field) if name is not None]
    for place, row in rows(source, split, list(dict.fromkeys(fields))):
        try:
            conversation = _check_conversation(_field(row, prompt_field))
            if template is not None and isinstance(conversation, str):
                conversation = template.replace("{prompt}", conversation)
            conversation = _as_chat(conversation, chat, system)
            prompt = _prompt(row, conversation, id_field, reference_field)
        except ValueError as error:
            raise PromptError(f"{place}: {error}") from error
        first = prompts.setdefault(prompt.id, prompt)
        if first is prompt:
            places[prompt.id] = place
        elif duplicates == "error" or first != prompt:
            same = "the same prompt" if first == prompt else "another prompt with the same id"
            hint = "; duplicates='drop' keeps the first" if first == prompt else ""
            raise PromptError(
                f"{place}: expected a prompt that did not come before{hint}. "
                f"Got: {same} as {places[prompt.id]} (id {prompt.id!r})"
            )
        if limit is not None and len(prompts) == skip + limit:
            break
    if len(prompts) <= skip:
        after = f" after the first {skip}" if skip else ""
        raise PromptError(f"{source}: expected at least one prompt{after}. Got: none")
    return list(prompts.values())[skip:]


def write_prompts(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Writes JSON lines for `read_prompts(path, id_field="id", reference_field="reference")`."""
    lines = (json.dumps(prompt.to_json(), ensure_ascii=False) + "\n" for prompt in prompts)
    Path(path).write_text("".join(lines), encoding="utf-8")


def subset(prompts: Sequence[Prompt], iteration: int, size: int, seed: int) -> list[Prompt]:
    """The prompts of one iteration.

    The prompts are shuffled and dealt out, `size` at a time, so that the subsets of different
    iterations are disjoint while prompts last. When they run out in the middle of a subset, a
    new pass in a new order fills it up, without a prompt that the subset has already; that
    one stays at the head of the new pass. The result depends on the ids and the seed only,
    not on the order of `prompts`.

    Args:
      prompts: all prompts of the run, with different ids.
      iteration: counted from 0.
      size: prompts an iteration, at most all of them.
      seed: any integer.

    Raises:
      ValueError: `size` is not between 1 and the number of prompts, `iteration` is negative,
        or an id comes twice.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    if len(by_id) != len(prompts):
        raise ValueError(
            f"Prompts must have different ids. Got: {len(by_id)} ids for {len(prompts)} prompts"
        )
    if not 1 <= size <= len(prompts):
        raise ValueError(f"size must be between 1 and {len(prompts)}, all prompts. Got: {size}")
    if iteration < 0:
        raise ValueError(f"iteration must be at least 0. Got: {iteration}")

    queue: list[str] = []
    passes = 0
    dealt: list[str] = []
    for _ in range(iteration + 1):
        dealt, queue = queue[:size], queue[size:]
        if len(dealt) < size:
            fresh = sorted(by_id, key=lambda id: digest(seed, "pass", passes, id))
            passes += 1
            have = set(dealt)
            fill = [id for id in fresh if id not in have][: size - len(dealt)]
            dealt = dealt + fill
            have = set(fill)
            queue = [id for id in fresh if id not in have]
    return [by_id[id] for id in dealt]


def digest(*parts: str | int) -> bytes:
    """32 bytes that are a function of the parts: a source of draws that depend on ids only."""
    plain = [part if isinstance(part, str) else int(part) for part in parts]
    return hashlib.sha256(json.dumps(plain).encode()).digest()


def _as_chat(conversation: Conversation, chat: bool, system: str | None) -> Conversation:
    """Text as a user's message, if it is one, and messages behind what the system says."""
    if isinstance(conversation, str):
        if not chat:
            if system is not None:
                raise ValueError("a system prompt needs conversations, or chat=True. Got: raw text")
            return conversation
        conversation = ({"role": "user", "content": conversation},)
    if system is not None and conversation[0]["role"] != "system":
        return ({"role": "system", "content": system}, *conversation)
    return conversation


def _prompt(
    row: Mapping[str, Any],
    conversation: Conversation,
    id_field: str | None,
    reference_field: str | None,
) -> Prompt:
    if id_field is None:
        plain = conversation if isinstance(conversation, str) else [dict(m) for m in conversation]
        id = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    else:
        value = _field(row, id_field)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise ValueError(
                f"field {id_field!r} must be text that is not empty, or an integer. Got: {value!r}"
            )
        id = str(value)
    return Prompt(
        id, conversation, None if reference_field is None else _field(row, reference_field)
    )


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"expected a field {name!r}. Got: {sorted(map(str, row))}")
    return row[name]


def _check_conversation(value: Any) -> Conversation:
    """Text as it is; messages as a tuple of dicts with `role` and `content` alone."""
    if isinstance(value, str):
        if not value:
            raise ValueError("the prompt must not be empty. Got: ''")
        return _check_text(value)
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        raise ValueError(
            f"the prompt must be text, or messages with 'role' and 'content'. Got: {shorten(value)}"
        )
    messages = []
    for message in value:
        # Datasets fill the fields that only some of their messages have with None.
        fields = (
            {key: text for key, text in message.items() if text is not None}
            if isinstance(message, Mapping)
            else {}
        )
        if set(fields) != {"role", "content"} or not all(
            isinstance(text, str) for text in fields.values()
        ):
            raise ValueError(
                "a message must have 'role' and 'content', both text, and nothing else. "
                f"Got: {shorten(message)}"
            )
        messages.append({key: _check_text(fields[key]) for key in ("role", "content")})
    return tuple(messages)


def _check_text(text: str) -> str:
    """JSON can escape halves of surrogate pairs, which tokenizers refuse much later."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "text must be Unicode without lone surrogates. "
            f"Got: {error.object[error.start]!r} at character {error.start}"
        ) from error
    return text
