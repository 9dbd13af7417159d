"""Reads text as blocks of a model's tokens."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ones_lib.data.text import read_texts
from ones_lib.data.tokens import pack
from ones_lib.models.causal import text_config

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    ".model",
    "vocab.json",
    "vocab.txt",
    ".tiktoken",
)  # files' ends
BLOCK = 512  # tokens of a block, where the model can take that many


def block_length(config: PreTrainedConfig) -> int:
    """Tokens of a block for a model."""
    return min(BLOCK, getattr(text_config(config), "max_position_embeddings", None) or BLOCK)


def text_blocks(
    text: str | Path,
    folder: str | Path,
    tokens: int | None = None,
    split: str = "validation",
    length: int | None = None,
) -> Tensor:
    """Token ids [n, L] of a text, by the tokenizer of the model in ``folder``.

    Args:
        text: a text file, a file or folder of texts, ``"docstrings"`` (the embedded text), or a hub name; see
            :func:`ones_lib.data.text.read_texts`.
        tokens: at most this many, in evenly spaced blocks. None: all.
        split: which split to read, where there are several.
        length: tokens of a block. None: :func:`block_length`.

    Raises:
        ValueError: the folder has no tokenizer, or one with more tokens than the model.
    """
    # Without any, transformers makes an empty one.
    if Path(folder).is_dir() and not any(p.name.endswith(_TOKENIZERS) for p in Path(folder).iterdir()):
        raise ValueError(f"{folder}: expected a tokenizer beside the model, to read text with, found none")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: expected a tokenizer beside the model, to read text with: {error}") from error
    config = text_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    length = length or block_length(config)
    try:
        blocks = pack(read_texts(text, split), tokenizer, length)
    except ValueError as error:
        raise ValueError(f"{text}: expected a text of {length} tokens or more in UTF-8, found: {error}") from error
    if int(blocks.max()) >= config.vocab_size:
        raise ValueError(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} tokens, as the model's, found {len(tokenizer)}"
        )
    return blocks if tokens is None else thinned(blocks, tokens)


def thinned(blocks: Tensor, tokens: int) -> Tensor:
    """At most so many tokens of blocks [n, L], but at least one block, evenly spaced."""
    count = max(1, tokens // blocks.shape[1])
    return blocks[:: max(1, len(blocks) // count)][:count]


def token_count(text: str) -> int:
    """A number of tokens on a command line: 1000000, 1_000_000, 200k, 10M or 1.5B."""
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([kMB]?)", text)
    if not found:
        raise ArgumentTypeError(f"expected a number such as 10M, 200k or 1_000_000, found {text!r}")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]])
