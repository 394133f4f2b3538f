"""Instructions about the form of an answer, which a program can check.

A prompt asks for a short text about a topic and names one or two constraints of IFEval's kinds;
the reward is 1 if the answer meets all of them. Topics of the evaluation are not trained on.
"""

from __future__ import annotations

import hashlib
import itertools

from experiments.tasks import Context, Task
from experiments.tasks.prompts import start_function, value_start
from iro_jax.data import Prompt
from iro_jax.rewards import Constraint, ConstraintReward, describe

TOPICS = (
    "a walk in the rain", "learning to swim", "the first day of school", "baking bread",
    "a lost key", "the night sky", "riding a bicycle", "a small garden", "an old bookshop",
    "the sea in winter", "a train journey", "making tea", "a quiet library", "the morning market",
    "a broken clock", "planting a tree", "a birthday party", "the local museum", "a snowy street",
    "repairing a chair", "a letter from a friend", "the sound of bells", "a busy kitchen",
    "feeding the birds", "a mountain path", "the village fair", "an empty stage", "new neighbours",
    "painting a wall", "a summer storm", "the river at dawn", "a game of chess", "a long bridge",
    "waiting for a bus", "a bowl of soup", "an old lighthouse", "a school play", "fixing a radio",
    "a cat on the roof", "the smell of coffee", "a visit to the dentist", "a forgotten umbrella",
    "growing tomatoes", "a walk on the beach", "the first snow", "a family dinner", "a paper boat",
    "moving to a new city", "a bicycle repair shop", "an autumn forest", "a power cut",
    "the last train home", "a hot air balloon", "a handmade gift", "the weekly shopping",
    "a flock of geese", "a museum of stones", "an early flight", "a wooden toy", "a rainy picnic",
    "a walk with a dog", "an evening at the theatre", "a bag of apples", "the old mill",
    "a ferry crossing", "a storm at night", "learning to cook", "a farm in spring",
    "the corner shop", "a lost letter", "a day at the zoo", "a concert in the park",
    "a pair of boots", "an orchard in autumn", "the quiet street", "a new bicycle",
    "a lake in the hills", "the town square", "a box of photographs", "a long queue",
    "a hidden path", "a cup of cocoa", "the school garden", "a visit to a castle",
    "a broken window", "a street musician", "a kite on the beach", "an old piano",
    "a foggy morning", "the first day at work", "a trip to the library",
    "a field of sunflowers", "a windy afternoon", "an unexpected guest", "a jar of honey",
    "the night bus", "a wooden boat", "a game of football", "a crowded tram", "a winter coat",
)  # fmt: skip
EVALUATION_TOPICS = 20

CONSTRAINTS = (
    (Constraint("no_commas"),),
    (
        Constraint("no_commas"),
        Constraint("sentences", {"relation": "at most", "count": 3}),
    ),
    (
        Constraint("no_commas"),
        Constraint("forbidden_words", {"words": ["and"]}),
    ),
    (
        Constraint("no_commas"),
        Constraint("words", {"relation": "at least", "count": 30}),
    ),
    (Constraint("forbidden_words", {"words": ["the"]}),),
    (
        Constraint("forbidden_words", {"words": ["and"]}),
        Constraint("sentences", {"relation": "exactly", "count": 2}),
    ),
)


def build(context: Context) -> Task:
    """The task of `config.task`: all topics with all constraints."""
    train, evaluation = TOPICS[EVALUATION_TOPICS:], TOPICS[:EVALUATION_TOPICS]
    if context.config.eval.split not in ("test", "validation"):
        raise ValueError(
            f"eval.split must be 'test' or 'validation'. Got: {context.config.eval.split!r}"
        )
    if context.config.eval.split == "validation":
        train, evaluation = train[EVALUATION_TOPICS:], train[:EVALUATION_TOPICS]
    limit = context.config.task.num_evaluation
    prompts = _prompts(evaluation)
    # In an order that has every constraint among the first ones.
    chosen = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())
    start = start_function(context)
    return Task(
        name="format constraints",
        train=_prompts(train),
        evaluation=chosen[:limit],
        reward=ConstraintReward(),
        judge=ConstraintReward(share=True),
        **value_start(context, start, context.text_format(start.model)),
    )


def _prompts(topics: tuple[str, ...]) -> list[Prompt]:
    found = []
    for topic, (number, constraints) in itertools.product(topics, enumerate(CONSTRAINTS)):
        asked = " ".join(map(describe, constraints))
        text = f"Write a short text about {topic}. {asked}"
        found.append(
            Prompt(
                f"{topic}-{number}",
                ({"role": "user", "content": text},),
                [constraint.to_json() for constraint in constraints],
            )
        )
    return found
