"""SQuAD: answer spans from logits, F1 and exact match, and SQuAD 2.0's threshold for giving no answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LONGEST_ANSWER = 30  # tokens, as in BERT's SQuAD code


def squad_scores(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """SQuAD's ``f1`` and ``exact_match`` of each prediction, 0 to 1, [n] each: the best over a question's answers.

    Case, punctuation and articles are ignored. A question without answers is unanswerable; only the empty prediction
    scores 1 on it, as in SQuAD 2.0.
    """
    from torchmetrics.functional.text import squad  # half a second to import

    scores = {"f1": [], "exact_match": []}
    for text, right in zip(predictions, answers, strict=True):
        target = {"id": "0", "answers": {"text": list(right) or [""], "answer_start": [0] * max(1, len(right))}}
        found = squad([{"id": "0", "prediction_text": text}], [target])
        for name, values in scores.items():
            values.append(found[name] / 100)
    return {name: torch.stack(values) for name, values in scores.items()}


def best_no_answer_threshold(answered: Tensor, silent: Tensor, odds: Tensor) -> float:
    """The threshold on ``odds`` with the highest mean score; questions above it get no answer (SQuAD 2.0's script).

    Args:
        answered, silent: score of each question if the answer is given, and if none is, [n].
        odds: score of "no answer" minus score of the answer, [n].
    """
    values, order = odds.sort()
    # totals[i]: total score if the i questions with the lowest odds are answered.
    totals = torch.cat([silent.sum()[None], silent.sum() + (answered - silent)[order].cumsum(0)])
    # No threshold separates questions with equal odds.
    possible = torch.cat([values.new_tensor([True]), values.diff() != 0, values.new_tensor([True])]).bool()
    best = int(totals.masked_fill(~possible, -torch.inf).argmax())
    return -math.inf if best == 0 else float(values[best - 1])


def best_spans(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best answer span of each window: its score, first token, last token, and the score of "no answer"; each [B].

    ``logits`` [B, 2, L] are of the first and last token. A span's score is their sum; position 0 means no answer.
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
    """The best answer to each question over all windows of its context, and the odds of "no answer".

    Args:
        contexts: context of each question.
        encoded: the windows: ``example`` [n], their questions, and ``offsets`` [n, L, 2], their tokens' characters.
        score, first, last, null: of each window, from :func:`best_spans`.

    Returns:
        The answers' texts and, [questions], the lowest ``null`` over the windows (as in BERT's SQuAD code) minus the
        best ``score``.
    """
    best, highest = [""] * len(contexts), torch.full((len(contexts),), -torch.inf)
    lowest_null = -highest
    for window, question in enumerate(encoded.example.tolist()):
        lowest_null[question] = torch.minimum(lowest_null[question], null[window])
        if score[window] > highest[question]:
            highest[question] = score[window]
            start, end = encoded.offsets[window, first[window], 0], encoded.offsets[window, last[window], 1]
            best[question] = contexts[question][start:end] if start >= 0 else ""
    return best, lowest_null - highest
