"""Judges: both orders, what order alone did, replies that cannot be read, servers that fail."""

import pytest

from iro_jax.evaluation import INSTRUCTION, TLDR, CallableJudge, ChatJudge, JudgeError
from tests.local_server import LocalServer


class ChatServer(LocalServer):
    """A chat endpoint; `say` makes a reply's text from the message."""

    def __init__(self, say):
        super().__init__()
        self.say = say

    def reply(self, path, body, number):
        if path != "/v1/chat/completions":
            return 404, {"error": {"message": "no such page"}}
        said = self.say(body["messages"][-1]["content"])
        if not isinstance(said, str):
            return said
        message = {"role": "assistant", "content": said}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }

    def judge(self, template):
        return ChatJudge("judge", template, base_url=f"{self.url}/v1", api_key="none")


def shown(message):
    """The two answers of a message in the order in which the judge sees them."""
    kind = "Summary" if "Summary A:" in message else "Answer"
    a = message.split(f"{kind} A:\n")[1].split(f"\n\n{kind} B:")[0]
    b = message.split(f"{kind} B:\n")[1].split("\n\nWhich")[0]
    return a, b


PROMPTS = ["one {a}", "two", "three", "four"]
FIRST = ["long answer", "x", "the same", "a {b} brace"]
SECOND = ["short", "a longer answer", "the same", "no"]


def test_the_longer_answer_wins_in_either_order():
    pytest.importorskip("openai")

    def longer(message):
        a, b = shown(message)
        letter = "A" if len(a) >= len(b) else "B"
        return f"Comparison: A is a summary and so is B.\nPreferred: {letter}"

    with ChatServer(longer) as server:
        verdicts = server.judge(TLDR)(PROMPTS, FIRST, SECOND)
        asked = [request["messages"][0]["content"] for request in server.requests]
    # The third pair is equal: this judge then names whatever comes first.
    assert verdicts.preference.tolist() == [1.0, 0.0, 0.5, 1.0]
    assert verdicts.changed == 0.25
    assert verdicts.shown_first == pytest.approx(5 / 8)
    assert verdicts.win_rate == pytest.approx(2.5 / 4)
    assert verdicts.unread == 0
    assert len(asked) == 8
    assert sum("one {a}" in message for message in asked) == 2
    assert sum("a {b} brace" in message for message in asked) == 2


def test_a_judge_that_looks_at_the_order_only_prefers_nobody():
    pytest.importorskip("openai")
    with ChatServer(lambda message: "A") as server:
        verdicts = server.judge(INSTRUCTION)(PROMPTS, FIRST, SECOND)
    assert verdicts.preference.tolist() == [0.5] * 4
    assert verdicts.shown_first == 1.0
    assert verdicts.changed == 1.0


def test_replies_that_cannot_be_read_are_ties_and_counted():
    pytest.importorskip("openai")

    def sometimes(message):
        return "I would rather not say." if ":\ntwo\n" in message else "B"

    with ChatServer(sometimes) as server:
        verdicts = server.judge(INSTRUCTION)(PROMPTS, FIRST, SECOND)
    assert verdicts.unread == 2
    assert verdicts.preference.tolist() == [0.5] * 4
    with ChatServer(lambda message: "Neither.") as server:
        judge = server.judge(TLDR)
        with pytest.raises(JudgeError, match="no reply names A or B"):
            judge(PROMPTS, FIRST, SECOND)


def test_a_server_that_refuses_is_named():
    pytest.importorskip("openai")

    def refuse(message):
        return 401, {"error": {"message": "wrong key", "type": "auth"}}

    with ChatServer(refuse) as server, pytest.raises(JudgeError, match=r"127\.0\.0\.1.*wrong key"):
        server.judge(INSTRUCTION)(PROMPTS, FIRST, SECOND)


@pytest.mark.parametrize(
    ("template", "reply", "letter"),
    [
        (INSTRUCTION, "B is better than A.", "B"),
        (INSTRUCTION, "Answer B. A is too long.", "B"),
        (INSTRUCTION, "**A**", "A"),
        (INSTRUCTION, "A better answer would be B", None),
        (TLDR, "Comparison: B is vague.\nPreferred: A", "A"),
        (TLDR, "comparison: ...\npreferred: **b**", "B"),
        (TLDR, "A is better", None),
        (INSTRUCTION, "B", "B"),
        (INSTRUCTION, "Answer A", "A"),
        (INSTRUCTION, "Both are bad", None),
    ],
)
def test_reading_replies(template, reply, letter):
    assert template.read(reply) == letter


def test_a_function_judges_in_both_orders():
    judge = CallableJudge(lambda prompt, a, b: 0.75 if len(a) > len(b) else 0.5)
    verdicts = judge(PROMPTS, FIRST, SECOND)
    assert verdicts.preference.tolist() == [0.625, 0.375, 0.5, 0.625]
    with pytest.raises(ValueError, match=r"from 0 to 1.*Got: 2\.0 for pair 0"):
        CallableJudge(lambda prompt, a, b: 2.0)(PROMPTS, FIRST, SECOND)
    with pytest.raises(ValueError, match="Got: 4, 4, 3"):
        judge(PROMPTS, FIRST, SECOND[:3])
