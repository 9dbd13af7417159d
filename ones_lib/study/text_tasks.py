"""The text study's tasks for :func:`ones_lib.study.training.fit`: masked language modelling, classification, question answering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling

from ones_lib.data import Share, evaluation_keys, training_keys
from ones_lib.data.keys import WHOLE
from ones_lib.data.rows import task_spec
from ones_lib.data.squad import best_no_answer_threshold, best_spans, span_texts, squad_scores
from ones_lib.data.text import Corpus, TextTasks
from ones_lib.models.text import (
    WideNetForMaskedLM,
    WideNetForQuestionAnswering,
    WideNetForSequenceClassification,
    WideNetTextConfig,
)
from ones_lib.study.processes import merged, own_share
from ones_lib.study.training import Training

EVALUATION_BATCH = 128


def finetuning_task(name: str, tasks: TextTasks) -> Classification | QuestionAnswering:
    """The task of that name, one of ``tasks``."""
    return (QuestionAnswering if tasks.spec(name).labels is None else Classification)(tasks, name)


def pretraining_model(model: dict, data: Corpus, seed: int) -> WideNetForMaskedLM:
    """A freshly initialised masked language model. ``model`` holds arguments of its configuration."""
    of_data = {"vocab_size": data.vocab_size, "pad_token_id": data.tokenizer.pad_token_id}
    with torch.random.fork_rng():
        set_seed(seed)
        return WideNetForMaskedLM(WideNetTextConfig(**of_data | model))


def finetuning_model(
    pretrained: WideNetForMaskedLM, task: str, seed: int, length: int = 0, own: Mapping[str, Mapping] | None = None
) -> nn.Module:
    """A model with a new head for ``task`` on a copy of the encoder, for examples of up to ``length`` tokens. Where the encoder
    has fewer position embeddings, new ones follow its own. ``own`` as for :func:`ones_lib.data.text.text_tasks`."""
    labels, old = task_spec(task, own).labels, pretrained.config
    changes = {"max_position_embeddings": max(length, old.max_position_embeddings)}
    if labels is not None:
        changes |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    with torch.random.fork_rng():
        set_seed(seed)
        head = WideNetForQuestionAnswering if labels is None else WideNetForSequenceClassification
        model = head(type(old).from_dict(old.to_dict() | changes))
    weights, positions = pretrained.encoder.state_dict(), model.encoder.position_embeddings.weight.detach()
    weights["position_embeddings.weight"] = torch.cat(
        [weights["position_embeddings.weight"], positions[old.max_position_embeddings :]]
    )
    model.encoder.load_state_dict(weights)
    return model


class MaskedBatch(NamedTuple):
    """``ids`` [B, L] with masks in them, ``predicted`` [B, L] where something is to be predicted, ``labels`` [n] there."""

    ids: Tensor
    predicted: Tensor
    labels: Tensor


class MaskedLanguageModelling:
    """Masked language modelling as BERT's: of the tokens that are chosen 80% become [MASK], 10% random, 10% stay.

    Masks are drawn anew in every step; those of the validation sequences are always the same.
    """

    metrics = ("loss", "accuracy")

    def __init__(self, data: Corpus) -> None:
        self.data = data

    def mask(self, ids: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Choose and mask tokens [B, L], without a generator by the global one: ids with masks, and labels, -100 where nothing
        is to be predicted."""
        collator = DataCollatorForLanguageModeling(self.data.tokenizer, mlm_probability=self.data.mask_rate)
        collator.generator, ids = generator, ids.long()
        return collator.torch_mask_tokens(ids.clone(), torch.isin(ids, self.data.special_ids))

    def batches(
        self, training: Training, seed: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[MaskedBatch]:
        ids = self.data.train
        for keys in training_keys(len(ids), training.batch_size, seed, start, training.steps):
            masked, labels = self.mask(ids[keys[:, 0]])  # the whole batch's, the same in every process
            for part in zip(share.of(masked), share.of(labels), strict=True):
                yield self._batch(*part, device)

    def _batch(self, masked: Tensor, labels: Tensor, device: torch.device) -> MaskedBatch:
        predicted = labels != -100
        return MaskedBatch(masked.to(device), predicted.to(device), labels[predicted].to(device))

    def count(self, batch: MaskedBatch) -> int:
        return len(batch.labels)

    def forward(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        """Logits of the masked positions [n, V]."""
        return model(batch.ids, predicted=batch.predicted).logits

    def loss(self, logits: Tensor, batch: MaskedBatch) -> Tensor:
        # The mean of nothing would be NaN, and so would its product with the part's weight, which is 0.
        return F.cross_entropy(logits, batch.labels) if len(batch.labels) else logits.sum()

    def accuracy(self, logits: Tensor, batch: MaskedBatch) -> Tensor:
        right = (logits.argmax(dim=-1) == batch.labels).float()
        return right.mean() if len(right) else right.sum()

    def predict(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Of every masked token of the validation sequences: ``loss`` (nats), ``accuracy`` (right or not)."""
        model.eval()
        parts, generator = [], torch.Generator().manual_seed(0)
        every = [self.mask(ids, generator) for ids in self.data.validation.split(EVALUATION_BATCH)]
        for masked, labels in own_share(every):
            batch = self._batch(masked, labels, device)
            with torch.inference_mode():
                logits = self.forward(model, batch).float()
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            parts.append(torch.stack([losses, logits.argmax(dim=-1) == batch.labels]).cpu())
        return dict(zip(self.metrics, torch.cat(merged(parts, len(every)), dim=1), strict=True))


class TokenBatch(NamedTuple):
    """Token ids, their mask and types [B, L], and targets as in :class:`ones_lib.data.text.EncodedText`."""

    ids: Tensor
    mask: Tensor
    types: Tensor
    targets: Tensor


class _Finetuning:
    """What the tasks on encoded text have in common."""

    def __init__(self, tasks: TextTasks, name: str) -> None:
        self.tasks, self.name, self.spec = tasks, name, tasks.spec(name)

    def batches(
        self, training: Training, seed: int, start: int, device: torch.device, share: Share = WHOLE
    ) -> Iterator[TokenBatch]:
        size = len(self.tasks.encoded(self.name, "train"))
        for keys in training_keys(size, training.batch_size, seed, start, training.steps, share):
            yield self._batch("train", keys[:, 0], device)

    def _batch(self, split: str, index: Tensor, device: torch.device) -> TokenBatch:
        """Rows of a split, cut to the longest of them."""
        encoded = self.tasks.encoded(self.name, split)
        lengths = encoded.lengths[index]
        length = int(lengths.max())
        mask = (torch.arange(length) < lengths[:, None]).long()
        rows = (encoded.ids[index, :length], mask, encoded.types[index, :length], encoded.targets[index])
        return TokenBatch(*(tensor.to(device) for tensor in rows))

    def count(self, batch: TokenBatch) -> int:
        return len(batch.ids)

    @torch.inference_mode()
    def _evaluate(self, split: str, device: torch.device, compute: Callable[[TokenBatch], Tensor]) -> Tensor:
        """``compute(batch)`` of all batches of a split, joined on the last axis."""
        every = evaluation_keys(len(self.tasks.encoded(self.name, split)), EVALUATION_BATCH)
        parts = [compute(self._batch(split, keys[:, 0], device)).cpu() for keys in own_share(every)]
        return torch.cat(merged(parts, len(every)), dim=-1)

    def _splits(self) -> dict[str, str]:
        """Validation splits that are there, and what is added to the names of their metrics."""
        first = self.spec.validation[0]
        found = [split for split in self.spec.validation if split in self.tasks.rows(self.name)]
        return {split: "" if split == first else f"_{split.rpartition('_')[2]}" for split in found}


class Classification(_Finetuning):
    """Classification of one sentence or a pair; the main metric is ``accuracy``."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(f"accuracy{suffix}" for suffix in self._splits().values())

    def forward(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        return model(batch.ids, batch.mask, batch.types).logits

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return F.cross_entropy(logits, batch.targets)

    def accuracy(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return (logits.argmax(dim=-1) == batch.targets).float().mean()

    def predict(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Of every validation example whether it is right, and the class predicted."""
        model.eval()
        result = {}
        for split, suffix in self._splits().items():
            predicted = self._evaluate(split, device, lambda batch: self.forward(model, batch).argmax(dim=-1))
            result[f"accuracy{suffix}"] = (predicted == self.tasks.encoded(self.name, split).targets).float()
            result[f"predicted{suffix}"] = predicted
        return result


class QuestionAnswering(_Finetuning):
    """Extractive question answering; the main metric is SQuAD's ``f1``."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("f1", "exact_match", *(("best_f1", "best_exact_match") if self.spec.unanswerable else ()))

    def forward(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """Logits of the first and the last token [B, 2, L]; only the context and the first place, "no answer", can be."""
        output = model(batch.ids, batch.mask, batch.types)
        possible = (batch.types == 1) & (batch.mask == 1)
        possible[:, 0] = True
        logits = torch.stack([output.start_logits, output.end_logits], dim=1)
        return logits.masked_fill(~possible[:, None], -1e4)  # not infinity, whose differences KD would have to take

    def loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())

    def accuracy(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        return (logits.argmax(dim=-1) == batch.targets).all(dim=1).float().mean()

    def predict(self, model: nn.Module, device: torch.device) -> dict[str, Tensor]:
        """Of every question ``f1`` and ``exact_match`` (0 to 1) of the answer given, and, where there may be none, also
        ``best_f1`` and ``best_exact_match``: at the no-answer threshold that is best for these questions, as the official
        script of SQuAD 2.0 gives them."""
        model.eval()
        split = self.spec.validation[0]
        encoded, rows = self.tasks.encoded(self.name, split), self.tasks.rows(self.name)[split]

        def spans(batch: TokenBatch) -> Tensor:
            return torch.stack([part.float() for part in best_spans(self.forward(model, batch).float())])

        score, first, last, null = self._evaluate(split, device, spans)
        first, last = first.long(), last.long()
        texts, odds = span_texts(list(rows["context"]), encoded, score, first, last, null)
        answers = [answer["text"] for answer in rows["answers"]]
        result = squad_scores(texts, answers)
        if self.spec.unanswerable:
            silent = squad_scores([""] * len(texts), answers)
            for metric in ("f1", "exact_match"):
                threshold = best_no_answer_threshold(result[metric], silent[metric], odds)
                result[f"best_{metric}"] = torch.where(odds > threshold, silent[metric], result[metric])
            result |= {m: torch.where(odds > 0, silent[m], result[m]) for m in ("f1", "exact_match")}
        return result
