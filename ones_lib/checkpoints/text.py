"""Reads text as blocks of a model's tokens."""

from __future__ import annotations

import hashlib
import re
import warnings
from argparse import ArgumentTypeError
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from ones_lib.checkpoints.terminal import one_line
from ones_lib.data.sources import TEXT_ENDINGS, ending, is_hub_name
from ones_lib.data.text import EMBEDDED, read_texts
from ones_lib.data.tokens import pack
from ones_lib.models.causal import model_config, read_json, text_config

#: Files of which a tokenizer is made, as transformers' tokenizers of MoEs call them.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
TOKENIZERS += ("spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model", "tekken.json")
TOKENIZERS += ("tiktoken.model", "*.tiktoken")
READ_WHOLE = 2**24  # bytes of a text that is read as a whole, whatever is needed of it
BLOCK = 512  # tokens of a block, where the model can take that many
TOKEN_IDS = "token ids"  # what a text is called that was given as such
Given = TypeVar("Given")


def block_length(config: PreTrainedConfig) -> int:
    """Tokens of a block for a model."""
    return min(BLOCK, getattr(text_config(config), "max_position_embeddings", None) or BLOCK)


def found_text(name: str, text: Given) -> Given | Path:
    """A text that an argument called ``name`` asks for, with the path of a file or folder expanded; what is no text, as it is.

    Raises:
        FileNotFoundError: there is no such file or folder, and it can't be a hub name.
        ValueError: it is a file of another kind.
    """
    if not isinstance(text, (str, Path)) or str(text) in EMBEDDED:
        return text
    path = Path(text).expanduser()
    if path.is_file() and ending(path) not in TEXT_ENDINGS:
        raise ValueError(
            f"{name}: expected a file with one of the endings {', '.join(TEXT_ENDINGS)}, found {str(text)!r}"
        )
    if path.exists():
        return path
    if not is_hub_name(text):
        embedded = " or ".join(map(repr, EMBEDDED))
        raise FileNotFoundError(
            f"{name}: no such file or folder, {str(text)!r}; expected one, a hub name like owner/name, or {embedded}"
        )
    return text


def text_name(text: str | Path | Tensor) -> str:
    """What a text is called in the records of what is made of it: without the folders of this machine."""
    if torch.is_tensor(text):
        return TOKEN_IDS
    path = Path(text).expanduser()
    return path.resolve().name if path.exists() else str(text)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether there are files of a tokenizer in a folder."""
    return any(fnmatch(path.name, pattern) for path in Path(folder).iterdir() for pattern in TOKENIZERS)


def tokenizer_code(folder: str | Path) -> str:
    """The code that a tokenizer is, if transformers can't open it without; else empty."""
    file = Path(folder) / "tokenizer_config.json"
    values = read_json(file) if file.is_file() else {}
    classes = values.get("auto_map") or {}
    classes = classes.get("AutoTokenizer") if isinstance(classes, dict) else classes
    code = next(filter(None, [classes] if isinstance(classes, str) else classes or []), "")
    known = tokenizer_class_from_name(values.get("tokenizer_class") or "") is not None
    return "" if known or (Path(folder) / "tokenizer.json").is_file() else code


def open_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model. Code that comes with it is never run: ``tokenizer.json`` has what it does.

    Raises:
        ValueError: it can't be opened.
    """
    if code := tokenizer_code(folder):
        raise ValueError(
            f"{folder}: expected a tokenizer beside the model that is no code of its own, which is never run, or tokenizer.json,"
            f" found {code}"
        )
    try:
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, config=model_config(folder))
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # the tokenizers library has no class for its errors
        raise ValueError(f"{folder}: expected a tokenizer beside the model that opens: {one_line(error)}") from error


def text_blocks(
    text: str | Path,
    folder: str | Path,
    tokens: int | None = None,
    split: str = "validation",
    length: int | None = None,
    name: str = "text",
    most: int | None = None,
) -> Tensor:
    """Token ids [n, L] of a text, by the tokenizer of the model in ``folder``.

    Args:
        text: a text file, a file or folder of texts, ``"docstrings"`` or ``"names"`` (embedded text), or a hub name; see
            :func:`ones_lib.data.text.read_texts`.
        tokens: at most this many, in evenly spaced blocks. None: all.
        split: which split to read, where there are several.
        length: tokens of a block. None: :func:`block_length`.
        name: what errors call the text.
        most: tokens that are enough: of a text larger than :data:`READ_WHOLE`, about so many are taken, from places evenly
            spread over it. None: those of ``tokens``, or all.

    Raises:
        FileNotFoundError, ConnectionError: there is no such text.
        ValueError: the text is none, or too short; or the folder has no tokenizer, or one with more tokens than the model.
    """
    text = found_text(name, text)
    if not has_tokenizer(folder):  # transformers would make an empty one
        raise ValueError(f"{folder}: expected a tokenizer beside the model, to read text with, found none")
    tokenizer, config = open_tokenizer(folder), text_config(model_config(folder))
    length = length or block_length(config)
    try:
        texts, most = read_texts(text, split), most or tokens
        if texts.size <= READ_WHOLE or str(text) in EMBEDDED:
            blocks = pack(texts.whole(), tokenizer, length)
        else:
            blocks = pack(texts, tokenizer, length, most)
    except ConnectionError as error:
        raise ConnectionError(
            f"{name}: expected a file, a folder, or a data set on the Hugging Face hub, found no file or folder {str(text)!r},"
            f" and the hub failed: {error.__cause__ or error}"
        ) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {_without_name(error)}") from error
    except ValueError as error:
        raise ValueError(
            f"{name}: {text}: expected a text of {length} tokens or more in UTF-8: {_without_name(error)}"
        ) from error
    if int(blocks.max()) >= config.vocab_size:
        raise ValueError(
            f"{folder}: expected a tokenizer of at most {config.vocab_size} tokens, as the model's, found {len(tokenizer)}"
        )
    return blocks if tokens is None else thinned(blocks, tokens)


def _without_name(error: Exception) -> str:
    """An error's message without what the reader of texts calls its parameter."""
    return re.sub(r"^(corpus|text_dir)\b[^:]*: ", "", str(error))


def thinned(blocks: Tensor, tokens: int) -> Tensor:
    """At most so many tokens of blocks [n, L], but at least one block, evenly spaced over all of them."""
    count = min(len(blocks), max(1, tokens // blocks.shape[1]))
    return blocks[torch.arange(count) * len(blocks) // count]


def asked_for(name: str, blocks: Tensor, tokens: int | None, default: int, text: str | Path | Tensor) -> Tensor:
    """:func:`thinned` to ``tokens``, which an argument called ``name`` asks for; a warning says if they can't be had.

    None: to the default, or to what there is, without a warning.
    """
    found, length = thinned(blocks, tokens or default), blocks.shape[1]
    if tokens is not None and found.numel() > tokens:
        warnings.warn(f"{name}: asked for {tokens:,}, takes {length:,}, one block", stacklevel=3)
    elif tokens is not None and found.numel() <= tokens - length:
        warnings.warn(
            f"{name}: asked for {tokens:,}, takes the {found.numel():,} that {text_name(text)} has", stacklevel=3
        )
    return found


def check_tokens(name: str, tokens: int | None) -> None:
    """Raise ValueError unless it is None or a number of tokens."""
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
        raise ValueError(f"{name}: expected an integer of at least 1, found {tokens!r}")


def ids_hash(ids: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids.long().numpy().tobytes()).hexdigest()


def described(text: str | Path | Tensor, ids: Tensor) -> dict[str, str | int]:
    """A text and the tokens ``ids`` that were taken of it, for such records: ``text, tokens, sha256``."""
    return {"text": text_name(text), "tokens": ids.numel(), "sha256": ids_hash(ids)}


def token_count(text: str) -> int:
    """A number of tokens on a command line: 1000000, 1_000_000, 200k, 10M or 1.5B."""
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)([kMB]?)", text)
    if not found:
        raise ArgumentTypeError(f"expected a number such as 10M, 200k or 1_000_000, found {text!r}")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]])
