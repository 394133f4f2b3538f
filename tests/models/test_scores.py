"""Reward models score what `transformers` scores, wherever the padding stands."""

import jax
import numpy as np
import pytest

from iro_jax.models import CheckpointError, from_pretrained
from tests.models.references import VOCABULARY, all_families, torch

pytestmark = pytest.mark.slow
PAD = 0


@all_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_reward_models_score_the_same(variant, side, tmp_path):
    reference = variant.classifier()
    reference.save_pretrained(tmp_path / "model")
    model = from_pretrained(tmp_path / "model")
    assert model.network.config.head == "score"

    rng = np.random.default_rng(0)
    lengths = np.array([3, 12, 7, 20])
    slots = np.arange(20)[None]
    mask = slots < lengths[:, None] if side == "right" else slots >= 20 - lengths[:, None]
    tokens = np.where(mask, rng.integers(3, VOCABULARY, mask.shape), PAD).astype(np.int32)
    with torch.no_grad():
        want = reference(
            torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask).long()
        ).logits[:, 0]
    outputs = jax.jit(model.network.forward)(model.params, tokens, mask)
    last = np.where(mask, slots, -1).argmax(1)
    got = np.asarray(outputs.score)[np.arange(4), last]
    assert np.std(want.numpy()) > 0.1
    np.testing.assert_allclose(got, want.numpy(), atol=1e-4, rtol=0)

    cache = model.network.empty_cache(num_prompts=4, prompt_slots=20)
    prefilled, _ = jax.jit(model.network.prefill)(model.params, cache, tokens, mask)
    np.testing.assert_allclose(prefilled.score, got, atol=1e-5, rtol=0)


def test_a_policy_is_no_reward_model(tmp_path):
    from tests.models.references import VARIANTS

    VARIANTS[0].causal().save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"score\.weight.*missing.*not a reward model"):
        from_pretrained(tmp_path / "model", head="score")
    policy = from_pretrained(tmp_path / "model")
    tokens = np.ones((1, 4), np.int32)
    with pytest.raises(ValueError, match="no score head"):
        policy.network.forward(policy.params, tokens, tokens > 0, want=("score",))


def test_two_labels_are_not_a_reward(tmp_path):
    import transformers

    from tests.models.references import VARIANTS

    config = VARIANTS[0].hf_config(num_labels=2)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"score\.weight.*\(1, 32\).*Got: \(2, 32\)"):
        from_pretrained(tmp_path / "model")
