"""TODO."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ones_lib.data.text import pack, read_texts

BLOCK = 512  # tokens of a block of text, if the model can take so many


def block_length(config: PreTrainedConfig) -> int:
    """Tokens of a block of text for a model."""
    return min(BLOCK, getattr(config, "max_position_embeddings", None) or BLOCK)


def text_blocks(text: str | Path, folder: str | Path, tokens: int | None = None, split: str = "validation") -> Tensor:
    """Token ids [n, L] of a text, by the tokenizer of the model in ``folder``.

    Args:
        text: a plain text file, a file or folder of texts, ``"docstrings"`` (the embedded text), or a hub name; see
            :func:`ones_lib.data.text.read_texts`.
        tokens: how many to take, at most, in evenly spaced blocks. None: all.
        split: of what has several.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: expected a tokenizer beside the model, to read text with: {error}") from error
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    texts = read_texts(text, split)
    length = block_length(config)
    blocks = pack(texts, tokenizer, length)
    if int(blocks.max()) >= config.vocab_size:
        raise ValueError(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} tokens, as the model's, found {len(tokenizer)}"
        )
    count = len(blocks) if tokens is None else max(1, tokens // length)
    return blocks[:: max(1, len(blocks) // count)][:count]
