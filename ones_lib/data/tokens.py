"""Tokens: tokenizers, packed token ids for pre-training, encoded rows for fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ones_lib.data.sources import PIECE

if TYPE_CHECKING:  # a third of a second to import
    from datasets import Dataset


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        said = "it is code of its own, which is never run" if "trust_remote_code" in str(error) else error
        raise ValueError(
            f"tokenizer: could not open {name!r} as a folder or on the Hugging Face hub: {said}"
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-casing WordPiece tokenizer with BERT's special tokens (Devlin et al., arXiv 1810.04805).

    Numbers are split into digits, so that an answer inside a number consists of whole tokens.
    """
    special = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    texts, draft = list(texts), _word_pieces({})
    # Of equally frequent pairs the trainer merges the one with lower numbers, and it numbers a word's inner letters differently in
    # every run. As special tokens they have the same numbers in every run. Only the vocabulary is taken from this draft.
    letters = sorted(c for c in set().union(*map(set, map(draft.normalizer.normalize_str, texts))) if c.isalpha())
    fixed = [*special.values(), *(f"##{c}" for c in letters)]
    draft.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    )
    vocabulary = [*special.values(), *sorted(set(draft.get_vocab()) - set(special.values()))]
    tokenizer = _word_pieces({token: i for i, token in enumerate(vocabulary)})
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "token_type_ids", "attention_mask"], **special
    )


def _word_pieces(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), digits])
    return tokenizer


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """Ids of the tokens that begin and end a text: [CLS] and [SEP], or a causal model's beginning and end of text."""
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    last = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    return first, last


# Texts that are encoded at a time, and their characters: Python's integers of more would fill the memory.
BATCH, CHARACTERS = 10_000, 2**20
LEAST = 64  # of more pieces than these, half are dropped when there are tokens enough


def pack(
    texts: Iterable[str | Iterable[str]], tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None
) -> Tensor:
    """Join texts into one stream of tokens and cut it into sequences: token ids [n, length], int32.

    [SEP] follows each text; each sequence starts with [CLS] and ends with [SEP]. With a causal model's tokenizer, the end
    of text follows each text and the beginning of text, if there is one, starts each sequence.

    Args:
        texts: each a string, or the pieces of one.
        most: tokens that are enough. Of texts with more than twice so many, at least these are taken, as pieces of about
            :data:`ones_lib.data.sources.PIECE` characters from places evenly spread over them. None: all.
    """
    first, end = end_tokens(tokenizer)
    before, after, between = ([] if i is None else [i] for i in (first, tokenizer.sep_token_id, end))
    kept, every = [], 1
    for number, batch in enumerate(_batches(texts, CHARACTERS if most is None else PIECE)):
        if number % every:
            continue
        chunk = [piece for piece, _ in batch]
        encoded = tokenizer(chunk, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        ids = [i for ids, (_, last) in zip(encoded, batch, strict=True) for i in (*ids, *(between if last else ()))]
        kept.append(torch.tensor(ids, dtype=torch.int32))
        if most is not None and len(kept) > LEAST and sum(map(len, kept)) > 2 * most:
            kept, every = kept[::2], 2 * every
    stream, room = torch.cat([torch.empty(0, dtype=torch.int32), *kept]), length - len(before) - len(after)
    count = len(stream) // room
    if not count:
        raise ValueError(f"corpus: expected at least {room} tokens, found {len(stream)}")
    body = stream[: count * room].view(count, room)
    before, after = (body.new_tensor(mark).expand(count, -1) for mark in (before, after))
    return torch.cat([before, body, after], dim=1)


def _batches(texts: Iterable[str | Iterable[str]], characters: int) -> Iterator[list[tuple[str, bool]]]:
    """The pieces of texts, each with whether it is its text's last one, in lists to be encoded at a time."""
    batch, size = [], 0
    for piece, last in _pieces(texts):
        batch.append((piece, last))
        size += len(piece)
        if len(batch) == BATCH or size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(texts: Iterable[str | Iterable[str]]) -> Iterator[tuple[str, bool]]:
    for text in texts:
        pieces = iter([text] if isinstance(text, str) else text)
        piece = next(pieces)
        for following in pieces:
            yield piece, False
            piece = following
        yield piece, True


@dataclass(frozen=True)
class EncodedText:
    """A task's split as tokens: n examples, or n windows of contexts, padded to L tokens.

    Args:
        ids, types: token ids and token types [n, L].
        lengths: tokens without padding [n].
        targets: classes [n], or positions of the answer's first and last token [n, 2]; 0, 0 if the window lacks the answer.
        example: number of the row [n]; several windows may belong to one question.
        offsets: for question answering, the characters [n, L, 2] of the context that each token covers; -1 for others.
        lost: rows with an answer that no window holds whole.
    """

    ids: Tensor
    types: Tensor
    lengths: Tensor
    targets: Tensor
    example: Tensor
    offsets: Tensor | None = None
    lost: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.ids)

    def without(self, rows: Tensor) -> EncodedText:
        """The examples that are not of ``rows``."""
        kept = ~torch.isin(self.example, rows)
        names = ("ids", "types", "lengths", "targets", "example", "offsets")
        return replace(
            self, **{name: None if (value := getattr(self, name)) is None else value[kept] for name in names}
        )


def encode_classification(
    rows: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int
) -> EncodedText:
    """Encode one sentence or a pair per row. Long inputs lose their end, the longer of a pair first."""
    encoded = tokenizer(
        *(list(rows[column]) for column in columns),
        truncation=True,
        max_length=length,
        padding=True,
        return_token_type_ids=True,
        return_tensors="pt",
    )
    return EncodedText(
        encoded["input_ids"],
        encoded["token_type_ids"],
        encoded["attention_mask"].sum(dim=1),
        torch.tensor(list(rows["label"])),
        torch.arange(len(rows)),
    )


def encode_questions(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, stride: int, where: str = "rows"
) -> EncodedText:
    """Encode questions with windows of their contexts. The target is the first answer, if the window holds all of it.

    Raises:
        ValueError: a question leaves no room for the context. It names the row of ``where``.
    """
    questions = [question.strip() for question in rows["question"]]
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = length - special - stride - 1
    for i, ids in enumerate(tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]):
        if len(ids) > room and len(ids) + special + len(tokenizer.tokenize(rows["context"][i])) > length:
            raise ValueError(
                f"{where}: row {i}: column 'question': expected at most {room} tokens (task_length={length} less special tokens, "
                f"stride={stride} and one token of the context), found {len(ids)}"
            )
    encoded = tokenizer(
        questions,
        list(rows["context"]),
        truncation="only_second",
        max_length=length,
        stride=stride,
        padding=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    example = torch.tensor(encoded["overflow_to_sample_mapping"])
    in_context = torch.tensor([[s == 1 for s in encoded.sequence_ids(i)] for i in range(len(example))])
    offsets = torch.tensor(encoded["offset_mapping"])  # [n, L, 2]
    offsets[~in_context] = -1
    spans = torch.tensor(
        [
            (a["answer_start"][0], a["answer_start"][0] + len(a["text"][0])) if a["text"] else (-1, -1)
            for a in rows["answers"]
        ]
    )
    start, end = spans[example, :, None].unbind(dim=1)  # [n, 1] characters
    first = (
        in_context & (offsets[..., 0] <= start) & (start < offsets[..., 1])
    )  # the token with the answer's first character
    last = in_context & (offsets[..., 0] < end) & (end <= offsets[..., 1])
    whole = first.any(dim=1) & last.any(dim=1)
    held = torch.zeros(len(rows), dtype=torch.bool).index_fill(0, example[whole], True)
    return EncodedText(
        torch.tensor(encoded["input_ids"]),
        torch.tensor(encoded["token_type_ids"]),
        torch.tensor(encoded["attention_mask"]).sum(dim=1),
        torch.stack([first.int().argmax(dim=1), last.int().argmax(dim=1)], dim=1) * whole[:, None],
        example,
        offsets,
        ((spans[:, 0] >= 0) & ~held).nonzero()[:, 0],
    )
