"""TODO."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """SQuAD's ``f1`` and ``exact_match`` of every prediction, 0 to 1, [n] each; the best over a question's answers.

    Case, punctuation and articles do not count. No answers at all stand for an unanswerable question, which the empty
    prediction alone answers rightly, as in SQuAD 2.0.
    """
    from torchmetrics.functional.text import squad  # half a second to import, which all that starts would pay

    scores = {"f1": [], "exact_match": []}
    for text, right in zip(predictions, answers, strict=True):
        target = {"id": "0", "answers": {"text": list(right) or [""], "answer_start": [0] * max(1, len(right))}}
        found = squad([{"id": "0", "prediction_text": text}], [target])
        for name, values in scores.items():
            values.append(found[name] / 100)
    return {name: torch.stack(values) for name, values in scores.items()}


def best_no_answer_threshold(answered: Tensor, silent: Tensor, odds: Tensor) -> float:
    """The threshold on ``odds`` above which giving no answer makes the mean score highest (SQuAD 2.0's official script).

    Args:
        answered, silent: score of each question if the answer is given, and if none is, [n].
        odds: by how much the model prefers no answer, [n].
    """
    values, order = odds.sort()
    # Threshold at the i-th value: the i + 1 lowest are answered; -inf: none is.
    totals = torch.cat([silent.sum()[None], silent.sum() + (answered - silent)[order].cumsum(0)])
    # Equal odds are answered together.
    whole = torch.cat([values.new_tensor([True]), values.diff() != 0, values.new_tensor([True])]).bool()
    best = int(totals.masked_fill(~whole, -torch.inf).argmax())
    return -math.inf if best == 0 else float(values[best - 1])


LONGEST_ANSWER = 30  # tokens, as in BERT's SQuAD code


def best_spans(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best answer span of each window: its score, first and last token, and the score of "no answer"; each [B].

    ``logits`` [B, 2, L] of first and last token; a span's score is their sum, and position 0 stands for no answer.
    """
    start, end = logits.unbind(dim=1)
    length = logits.shape[-1]
    spans = start[:, :, None] + end[:, None, :]  # [B, L, L]
    allowed = torch.ones(length, length, dtype=torch.bool, device=logits.device).triu().tril(LONGEST_ANSWER - 1)
    allowed[0] = False
    score, at = spans.masked_fill(~allowed, -torch.inf).flatten(1).max(dim=1)
    return score, at // length, at % length, spans[:, 0, 0]


def span_texts(
    contexts: list[str], encoded, score: Tensor, first: Tensor, last: Tensor, null: Tensor
) -> tuple[list[str], Tensor]:
    """The best answer to every question over all windows of its context, as a piece of the context, and by how much
    "no answer" (its lowest score over the windows, as in BERT's SQuAD code) is better; text and [questions]."""
    best, odds = [""] * len(contexts), torch.full((len(contexts),), -torch.inf)
    highest, lowest_null = odds.clone(), -odds
    for window, question in enumerate(encoded.example.tolist()):
        lowest_null[question] = torch.minimum(lowest_null[question], null[window])
        if score[window] > highest[question]:
            highest[question] = score[window]
            start, end = encoded.offsets[window, first[window], 0], encoded.offsets[window, last[window], 1]
            best[question] = contexts[question][start:end] if start >= 0 else ""
    return best, lowest_null - highest
