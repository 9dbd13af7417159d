"""How far words without their order get on a text task: the baseline that says whether a task asks for more.

A task that it solves can be solved by trivial cues, and says nothing of a language model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from scipy.sparse import hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.svm import LinearSVC

from ones_lib.data.squad import squad_scores
from ones_lib.data.text import TASKS, TextData, TextTask

ANSWERS = 200  # answers of the training split, the most frequent, that the baseline chooses from


def bag_of_words(task: str, data: TextData) -> dict[str, float]:
    """A task's main metric, 0 to 1, on its (first) validation split.

    Returns:
        ``constant``: the best that one answer to everything gets: the training split's most frequent class or answer.
        ``bag_of_words``: a linear classifier on which words, and which pairs of neighbours, each of the texts has. For
        question answering its classes are the training split's most frequent answers and, where there may be none, the
        empty one; the answer is the best scored that stands in the context.
    """
    spec, rows = TASKS[task], data.rows(task)
    train, validation = rows["train"], rows[spec.validation[0]]
    features, unseen = _features(train, validation, spec)
    if spec.labels is not None:
        known, labels = np.asarray(train["label"]), np.asarray(validation["label"])
        most_frequent = np.bincount(known).argmax()
        predicted = _classifier().fit(features, known).predict(unseen)
        return {
            "constant": float((labels == most_frequent).mean()),
            "bag_of_words": float((labels == predicted).mean()),
        }

    def f1(predictions: Sequence[str]) -> float:
        return squad_scores(predictions, [a["text"] for a in validation["answers"]])[spec.metric].mean().item()

    known = np.array([a["text"][0] if a["text"] else "" for a in train["answers"]])
    frequent = [text for text, _ in Counter(known.tolist()).most_common(ANSWERS)]
    kept = np.isin(known, frequent)
    classifier = _classifier().fit(features[kept], known[kept])
    predicted = []
    for context, scores in zip(validation["context"], classifier.decision_function(unseen), strict=True):
        there = [text in context for text in classifier.classes_]  # the empty answer always is
        predicted.append(str(classifier.classes_[np.where(there, scores, -np.inf).argmax()]) if any(there) else "")
    constant = max(f1([text] * len(validation)) for text in frequent[:3])
    return {"constant": constant, "bag_of_words": f1(predicted)}


def _classifier() -> LinearSVC:
    return LinearSVC(C=0.03, tol=1e-2, random_state=0)


def _features(train: Dataset, validation: Dataset, spec: TextTask):
    """Presence of words and of neighbouring words in each text column, sparse [rows, features], for both splits."""
    parts = []
    for column in spec.texts:
        vectorizer = CountVectorizer(ngram_range=(1, 2), min_df=2, binary=True)
        parts.append((vectorizer.fit_transform(train[column]), vectorizer.transform(validation[column])))
    return tuple(hstack(split, format="csr") for split in zip(*parts, strict=True))
