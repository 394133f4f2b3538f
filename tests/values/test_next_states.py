"""One token behind every prefix: as in whole texts, and what CD-Q makes of it."""

import numpy as np
import pytest

from iro_jax.values import (
    AnswerTokens,
    FitSettings,
    Head,
    NextStates,
    StateCache,
    ValueFitter,
    ValueSettings,
    new_head,
)
from tests.values import cases

MODEL = cases.model()


@pytest.mark.slow
@pytest.mark.parametrize("layer", [None, 1])
def test_states_and_probabilities_are_those_of_whole_texts(layer):
    rng = np.random.default_rng(0)
    readings = [
        (rng.integers(4, 49, asked), rng.integers(4, 49, answered))
        for asked, answered in [(3, 5), (7, 0), (1, 9)]
    ]
    reader = NextStates(MODEL, layer, count=4, temperature=0.7, rows=2)
    for (prompt, answer), (states, probabilities) in zip(readings, reader(readings), strict=True):
        assert states.shape[:2] == probabilities.shape == (len(answer) + 1, 4)
        for length in range(len(answer) + 1):
            prefix = np.concatenate([prompt, answer[:length]])
            logits = whole(prefix, "logits")[-1] / 0.7
            best = np.argsort(-logits)[:4]
            expected = np.exp(logits[best] - logits[best].max())
            np.testing.assert_allclose(probabilities[length], expected / expected.sum(), atol=1e-4)
            for place, token in enumerate(best):
                text = np.append(prefix, token)
                want = whole(text, reader.depth)[-1]
                np.testing.assert_allclose(
                    states[length, place], want, rtol=0, atol=1e-4 * np.abs(want).max()
                )


def whole(text, want):
    tokens = np.asarray(text, np.int32)[None]
    outputs = MODEL.network.forward(MODEL.params, tokens, np.ones(tokens.shape, bool), want=(want,))
    return np.asarray(outputs.logits if want == "logits" else outputs.at(want))[0]


def fitter(next_states=None, head=Head((16,))):
    fit = FitSettings(learning_rate=3e-2, batch_size=16, num_epochs=300, patience=3)
    settings = ValueSettings(loss="cdq", trainable="head", head=head, layer=1, fit=fit)
    tokens = AnswerTokens(cases.TOKENIZER, MODEL)
    return ValueFitter(settings, tokens, states=StateCache(MODEL, 1), next_states=next_states)


@pytest.mark.slow
def test_a_fit_reaches_what_the_policy_expects_of_itself(tmp_path):
    rollouts = cases.rollouts(8, 4)
    store = cases.store(tmp_path / "store", rollouts)
    reader = NextStates(MODEL, 1, count=5)
    start = new_head(MODEL, Head((16,)), layer=1)
    fit = fitter(next_states=reader)
    found = fit(start, [store], rollouts[:24], rollouts[24:], folder=tmp_path / "fit")
    assert found.best_epoch == 300, "its losses are not compared: all epochs, the last weights"

    def bellman_error(function):
        """Of prefixes before the last, where the reward does not come in, and at the last."""
        values = fit.values(function, [store], rollouts[:24])
        following = reader([fit.tokens(r.prompt, r) for r in rollouts[:24]])
        inner, ends = [], []
        for rollout, value, (states, probabilities) in zip(
            rollouts[:24], values, following, strict=True
        ):
            head, params = function.network.head, function.params.head
            expected = (probabilities * np.asarray(head(params, states))[..., 0]).sum(axis=-1)
            inner += list(np.abs(value - expected)[:-1])
            ends.append(abs(value[-1] - rollout.reward))
        return np.mean(inner), np.mean(ends)

    inner, ends = bellman_error(found.function)
    before = bellman_error(start)
    assert inner < 0.1
    assert ends < 0.3 * before[1]


def test_it_needs_heads_on_the_policys_own_states(tmp_path):
    start = new_head(MODEL, Head((16,)), layer=1)
    with pytest.raises(ValueError, match="needs the policy's next tokens"):
        fitter().check(start, compress=False)
    with pytest.raises(ValueError, match="those that the head reads"):
        fitter(next_states=NextStates(MODEL, None)).check(start, compress=False)
    distribution = fitter(NextStates(MODEL, 1), Head(output="categorical"))
    with pytest.raises(ValueError, match="heads that give a value"):
        distribution.check(start, compress=False)
    with pytest.raises(ValueError, match=r"at least 1.*Got: 0"):
        NextStates(MODEL, count=0)
