"""Text classifiers in the manner of scikit-learn as rewards; scikit-learn is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from iro_jax.data import Prompt
from iro_jax.rewards.types import Answer, check_pairs, check_rewards, read_text


class ClassifierReward:
    """What a scikit-learn classifier, or a pipeline that ends in one, says of a text.

    Args:
      classifier: fitted, takes a list of texts; has `classes_` and the method below.
      label: the class whose probability or distance is the reward.
      method: `predict_proba` gives 0 to 1. `decision_function` is a signed distance or a
        log-odds, which does not saturate.
      whole_text: reads the prompt too; see `read_text`.

    Raises:
      ValueError: the classifier does not know the label or has no such method.
    """

    def __init__(
        self,
        classifier: Any,
        *,
        label: Any = 1,
        method: Literal["predict_proba", "decision_function"] = "predict_proba",
        whole_text: bool = True,
    ):
        if method not in ("predict_proba", "decision_function"):
            raise ValueError(
                f"method must be 'predict_proba' or 'decision_function'. Got: {method!r}"
            )
        if not hasattr(classifier, method):
            raise ValueError(f"The classifier has no {method}. Got: {type(classifier).__name__}")
        if not hasattr(classifier, "classes_"):
            raise ValueError(
                f"The classifier must be fitted. Got: a {type(classifier).__name__} without classes"
            )
        classes = list(classifier.classes_)
        if label not in classes:
            raise ValueError(f"label must be one of the classes {classes}. Got: {label!r}")
        self.classifier = classifier
        self.column = classes.index(label)
        self.method = method
        self.whole_text = whole_text

    def __call__(
        self, prompts: Sequence[Prompt], answers: Sequence[Answer]
    ) -> Float[np.ndarray, " n"]:
        """The rewards, `[n]`."""
        check_pairs(prompts, answers)
        if not answers:
            return np.zeros(0, np.float32)
        pairs = zip(prompts, answers, strict=True)
        texts = [read_text(*pair, whole_text=self.whole_text) for pair in pairs]
        scores = np.asarray(getattr(self.classifier, self.method)(texts))
        if scores.ndim == 1:
            # Of two classes a decision function speaks of the second alone.
            return check_rewards(scores if self.column == 1 else -scores, prompts)
        return check_rewards(scores[:, self.column], prompts)
