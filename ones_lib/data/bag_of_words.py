"""A bag-of-words baseline for the text tasks. A task that it solves has trivial cues and does not test a language model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.svm import LinearSVC

from ones_lib.data.squad import squad_scores
from ones_lib.data.text import TextTasks

ANSWERS = 200  # the most frequent answers of the training split, which are the classes for question answering


def bag_of_words(task: str, tasks: TextTasks) -> dict[str, float]:
    """Scores of two baselines: a task's main metric, 0 to 1, on its first validation split.

    Returns:
        ``constant``: the best single answer to everything: the training split's most frequent class or answer.
        ``bag_of_words``: a linear classifier of the words and pairs of neighbouring words in each text. For question
        answering it scores the training split's most frequent answers (the empty one included), and the best that stands
        in the context is the answer.
    """
    spec, rows = tasks.spec(task), tasks.rows(task)
    train, validation = rows["train"], rows[spec.validation[0]]
    words = ColumnTransformer(
        [(column, CountVectorizer(ngram_range=(1, 2), min_df=2, binary=True), column) for column in spec.texts]
    )
    features, unseen = words.fit_transform(train.to_pandas()), words.transform(validation.to_pandas())
    classifier = LinearSVC(C=0.03, tol=1e-2, random_state=0)
    if spec.labels is not None:
        known, labels = np.asarray(train["label"]), np.asarray(validation["label"])
        most_frequent = np.bincount(known).argmax()
        predicted = classifier.fit(features, known).predict(unseen)
        return {
            "constant": float((labels == most_frequent).mean()),
            "bag_of_words": float((labels == predicted).mean()),
        }

    def f1(predictions: Sequence[str]) -> float:
        return squad_scores(predictions, [a["text"] for a in validation["answers"]])[spec.metric].mean().item()

    known = np.array([a["text"][0] if a["text"] else "" for a in train["answers"]])
    frequent = [text for text, _ in Counter(known.tolist()).most_common(ANSWERS)]
    kept = np.isin(known, frequent)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes")  # answers are many, and meant
        classifier.fit(features[kept], known[kept])
    predicted = []
    for context, scores in zip(validation["context"], classifier.decision_function(unseen), strict=True):
        there = [text in context for text in classifier.classes_]  # always true of the empty answer
        predicted.append(str(classifier.classes_[np.where(there, scores, -np.inf).argmax()]) if any(there) else "")
    constant = max(f1([text] * len(validation)) for text in frequent[:3])
    return {"constant": constant, "bag_of_words": f1(predicted)}
