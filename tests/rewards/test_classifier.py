"""Classifiers in the manner of scikit-learn, scikit-learn's own among them."""

import numpy as np
import pytest

from iro_jax.data import Prompt
from iro_jax.rewards import ClassifierReward, TextAnswer

PROMPTS = [Prompt("p", "The film"), Prompt("q", [{"role": "user", "content": "Well?"}])]
ANSWERS = [TextAnswer(" was good"), TextAnswer("It was bad")]


class Counter:
    """Probabilities and distances from the text's length, for three classes or two."""

    def __init__(self, classes):
        self.classes_ = np.array(classes)

    def _sizes(self, texts):
        return np.array([len(text) for text in texts], float)

    def predict_proba(self, texts):
        sizes = self._sizes(texts)[:, None]
        return sizes * (1 + np.arange(len(self.classes_)))

    def decision_function(self, texts):
        return self._sizes(texts) if len(self.classes_) == 2 else self.predict_proba(texts)


def test_the_label_chooses_the_column():
    classifier = Counter(["bad", "fair", "good"])
    lengths = np.array([len("The film was good"), len("Well?\nIt was bad")])
    for column, label in enumerate(classifier.classes_):
        for method in ("predict_proba", "decision_function"):
            reward = ClassifierReward(classifier, label=label, method=method)
            np.testing.assert_array_equal(reward(PROMPTS, ANSWERS), lengths * (1 + column))


def test_the_decision_of_two_classes_is_about_the_second():
    lengths = np.array([len(answer.text) for answer in ANSWERS])
    for label, sign in [(0, -1), (1, 1)]:
        reward = ClassifierReward(
            Counter([0, 1]), label=label, method="decision_function", whole_text=False
        )
        np.testing.assert_array_equal(reward(PROMPTS, ANSWERS), sign * lengths)


def test_what_a_classifier_needs():
    with pytest.raises(ValueError, match=r"one of the classes .*Got: 'ugly'"):
        ClassifierReward(Counter(["good", "bad"]), label="ugly")
    with pytest.raises(ValueError, match=r"has no predict_proba\. Got: object"):
        ClassifierReward(object())
    with pytest.raises(ValueError, match="method must be"):
        ClassifierReward(Counter([0, 1]), method="predict")


@pytest.mark.needs("sklearn")
def test_a_bag_of_words_with_logistic_regression():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = ["good film", "very good", "bad film", "very bad"]
    pipeline = make_pipeline(CountVectorizer(), LogisticRegression())
    with pytest.raises(ValueError, match=r"must be fitted|has no predict_proba"):
        ClassifierReward(pipeline)
    pipeline.fit(texts, [1, 1, 0, 0])
    good, bad = ClassifierReward(pipeline)(PROMPTS, ANSWERS)
    assert bad < 0.5 < good
    logits = ClassifierReward(pipeline, method="decision_function")(PROMPTS, ANSWERS)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), [good, bad], rtol=1e-5)
    assert ClassifierReward(pipeline)([], []).shape == (0,)
