"""From conversations to tokens: the one text format of the library.

`render` is the only function that turns prompts or conversations into tokens. Sampling,
value training and reward scoring all call it, so that they see the same tokens for the
same conversation. `pad_prompts` puts prompts into a batch whose length is one of a few
buckets, so that programs are compiled once a bucket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import jinja2
import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
Conversation = str | Sequence[Message]
"""A raw prompt, or messages with `role` and `content` for the chat template."""

SMALLEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class TextFormat:
    """How `render` treats every conversation.

    Attributes:
      max_length: most tokens a prompt may have, its answer not counted, so that a prompt is
        the same with and without its answer; None for no limit.
      truncation: what to do with more. `error` raises. `left` drops the oldest tokens, `right`
        the newest. A raw prompt keeps its BOS. A conversation keeps its template whole: `left`
        takes text from the messages (the system's excepted) from the oldest on, `right` from
        the end of the last message.
      bos: `auto` follows the template for conversations and the tokenizer for raw prompts;
        `always` adds one where there is none; `never` takes one away (but not the token with
        which a template begins every turn). There is never more than one.
    """

    max_length: int | None = None
    truncation: Literal["error", "left", "right"] = "error"
    bos: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self):
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be None or at least 1. Got: {self.max_length}")
        if self.truncation not in ("error", "left", "right"):
            raise ValueError(
                f"truncation must be 'error', 'left' or 'right'. Got: {self.truncation!r}"
            )
        if self.bos not in ("auto", "always", "never"):
            raise ValueError(f"bos must be 'auto', 'always' or 'never'. Got: {self.bos!r}")

    def beside(self, max_new_tokens: int, context_lengths: Iterable[int]) -> TextFormat:
        """The format with prompts no longer than contexts leave beside an answer.

        Args:
          context_lengths: of every network that reads both; none leave the format as it is.

        Raises:
          ValueError: they leave no room.
        """
        shortest = min(context_lengths, default=None)
        if shortest is None:
            return self
        room = shortest - max_new_tokens
        if room < 1:
            raise ValueError(
                "max_new_tokens must leave room for a prompt in the context of every network."
                f" Got: max_new_tokens={max_new_tokens}, {shortest} tokens"
            )
        limit = room if self.max_length is None else min(room, self.max_length)
        return dataclasses.replace(self, max_length=limit)


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    answer: str | Sequence[int] | None = None,
    finished: bool = True,
    text_format: TextFormat = TextFormat(),
) -> Int[np.ndarray, " length"]:
    """The tokens that a model sees for a conversation.

    Without an answer these end where the model's own begins: after the generation prompt of
    the chat template. An answer is tokenised on its own and followed by the token that ends
    a turn, as if the model had sampled it. A conversation that ends with an assistant's
    message is the same as the conversation before it with that answer.

    Args:
      tokenizer: of the model that will read the tokens.
      conversation: a raw prompt, or messages.
      answer: the assistant's answer: text, or the very tokens that were sampled.
      finished: whether the answer, if text, ended by itself; one cut short gets no end token.
      text_format: length limit and BOS rule.

    Returns:
      Token ids, int32.

    Raises:
      ValueError: the prompt is empty or too long, a message is malformed, the tokenizer has
        no chat template, or the template refuses the conversation.
    """
    messages = None if isinstance(conversation, str) else _check_messages(conversation)
    if messages is not None and messages[-1]["role"] == "assistant":
        if answer is not None:
            raise ValueError("The conversation has an answer already. Got: another one")
        answer, messages = messages[-1]["content"], _check_messages(messages[:-1])

    if messages is None:
        assert isinstance(conversation, str)
        prompt_ids = _render_raw(tokenizer, conversation, text_format)
    else:
        prompt_ids = _render_chat(tokenizer, messages, text_format)
    answer_ids: list[int] = []
    if isinstance(answer, str):
        answer_ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        if finished:
            answer_ids.append(end_of_turn(tokenizer, chat=messages is not None))
    elif answer is not None:
        answer_ids = [int(token) for token in answer]
    return np.asarray(prompt_ids + answer_ids, np.int32)


def end_of_turn(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> int:
    """The token that ends an answer: what the template writes after one, or EOS.

    Raises:
      ValueError: there is none.
    """
    if chat:
        marker = "answer"
        turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": marker}]
        closing = _apply_template(tokenizer, turn, generate=False).rpartition(marker)[2]
        added = tokenizer.added_tokens_decoder.items()
        special = {token for token, entry in added if entry.special}
        special.update(tokenizer.all_special_ids)
        for token in tokenizer(closing, add_special_tokens=False)["input_ids"]:
            if token in special:
                return token
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token to end an answer with")
    return tokenizer.eos_token_id


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every token the same id."""
    return a is b or a.get_vocab() == b.get_vocab()


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """Prompts padded on the right to one bucket's length.

    Attributes:
      tokens: ids, zero where padded, `[P, S]`.
      mask: which tokens are real.
    """

    tokens: Int[np.ndarray, "P S"]
    mask: Bool[np.ndarray, "P S"]


def bucket_length(length: int) -> int:
    """The bucket of a prompt: the next power of two, at least `SMALLEST_BUCKET`."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def pad_prompts(
    prompts: Sequence[Int[np.ndarray, " length"]],
    *,
    length: int | None = None,
    rows: int | None = None,
) -> PromptBatch:
    """Pads rendered prompts into a batch.

    Args:
      prompts: token ids of each prompt.
      length: S; by default the bucket of the longest prompt.
      rows: P; by default the number of prompts. Further rows hold one token, so that they
        can be read like any other.

    Raises:
      ValueError: there are no prompts, one is empty, or they do not fit.
    """
    if not prompts:
        raise ValueError("A batch needs at least one prompt. Got: []")
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    if shortest == 0:
        raise ValueError("A prompt is empty: it has no tokens")
    length = bucket_length(longest) if length is None else length
    rows = len(prompts) if rows is None else rows
    if longest > length or len(prompts) > rows:
        raise ValueError(
            f"{len(prompts)} prompts of up to {longest} tokens do not fit into a batch of"
            f" {rows} rows of {length}"
        )
    tokens = np.zeros((rows, length), np.int32)
    mask = np.zeros((rows, length), bool)
    mask[:, 0] = True
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        mask[row, : len(prompt)] = True
    return PromptBatch(tokens, mask)


def check_ids(ids: Int[np.ndarray, " length"], vocab_size: int) -> None:
    """Checks that every token has an embedding.

    Raises:
      ValueError: one has not.
    """
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ValueError(
            f"The tokenizer does not fit the network: token ids must be below"
            f" vocab_size={vocab_size} and not negative. Got: {int(ids.min())} to {int(ids.max())}"
        )


def _check_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    if not isinstance(messages, Sequence):
        raise ValueError(f"A prompt is text or a list of messages. Got: {type(messages).__name__}")
    if not messages:
        raise ValueError("The prompt is empty: it has no messages")
    for index, message in enumerate(messages):
        valid = isinstance(message, Mapping) and all(
            isinstance(message.get(field), str) for field in ("role", "content")
        )
        if not valid:
            raise ValueError(
                f"Message {index} must have a role and a content, both text. Got: {message!r}"
            )
    if not messages[-1]["content"].strip() and messages[-1]["role"] != "assistant":
        raise ValueError("The prompt is empty: its last message has no content")
    return [dict(message) for message in messages]


def _render_raw(
    tokenizer: PreTrainedTokenizerBase, text: str, text_format: TextFormat
) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    if not text or not tokenizer(text, add_special_tokens=False)["input_ids"]:
        raise ValueError(f"The prompt is empty: it has no tokens. Got: {text!r}")
    if tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        # Some tokenizers close what they take for a whole text; a prompt goes on.
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not bare or bare[-1] != tokenizer.eos_token_id:
            ids.pop()
    ids = _with_bos_rule(tokenizer, ids, text_format)
    limit = text_format.max_length
    if limit is None or len(ids) <= limit:
        return ids
    if text_format.truncation == "error":
        raise _too_long(len(ids), limit)
    if text_format.truncation == "right":
        return ids[:limit]
    has_bos = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    head = ids[:1] if has_bos else []
    return head + ids[len(ids) - (limit - len(head)) :]


def _render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    text_format: TextFormat,
) -> list[int]:
    def tokens() -> list[int]:
        text = _apply_template(tokenizer, messages, generate=True)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return _with_bos_rule(tokenizer, ids, text_format)

    ids = tokens()
    limit, full_length = text_format.max_length, len(ids)
    if limit is None or full_length <= limit:
        return ids
    if text_format.truncation == "error":
        raise _too_long(full_length, limit)
    order = [i for i, message in enumerate(messages) if message["role"] != "system"]
    if text_format.truncation == "right":
        order = [len(messages) - 1]
    for index in order:
        while len(ids) > limit and messages[index]["content"]:
            shorter = _cut(
                tokenizer, messages[index]["content"], len(ids) - limit, text_format.truncation
            )
            messages[index]["content"] = shorter
            ids = tokens()
        if len(ids) <= limit:
            break
    if len(ids) > limit or not messages[-1]["content"]:
        raise ValueError(
            f"max_length={limit} leaves no room for the last message beside the chat template"
            f" (and, truncating on the right, the messages before it). Got: {full_length} tokens"
        )
    return ids


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, count: int, side: str) -> str:
    """The text without `count` tokens (at least a character) on one side."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if count >= len(spans):
        return ""
    if side == "left":
        return text[max(spans[count][0], 1) :]
    return text[: min(spans[len(spans) - count][0], len(text) - 1)]


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, generate: bool
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has no chat template: pass the prompt as text, or set"
            " tokenizer.chat_template"
        )
    try:
        return tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=generate
        )
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(f"The chat template refuses roles {roles}: {error}") from error


def _with_bos_rule(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], text_format: TextFormat
) -> list[int]:
    bos = tokenizer.bos_token_id
    if bos is None:
        if text_format.bos == "always":
            raise ValueError("The tokenizer has no BOS token. Got: bos='always'")
        return ids
    body = list(ids)
    # Models that begin every turn with their "BOS" (SmolLM2's <|im_start|>) repeat it
    # later; only a run at the very front is the sequence's own.
    while len(body) > 1 and body[0] == body[1] == bos:
        body.pop(0)
    if text_format.bos == "always" and (not body or body[0] != bos):
        return [bos, *body]
    if text_format.bos == "never" and body[:1] == [bos] and body.count(bos) == 1:
        return body[1:]
    return body


def _too_long(length: int, limit: int) -> ValueError:
    return ValueError(
        f"The prompt is longer than the {limit} tokens there are for it (set truncation to"
        f" 'left' or 'right' to cut it). Got: {length} tokens"
    )
