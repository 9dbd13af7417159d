"""What lies beside a checkpoint's weights: which of it a dense twin needs, and whether a finished folder opens."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ones_lib.checkpoints.shards import INDEX, Shards, weight_files
from ones_lib.checkpoints.stored import StoredModel
from ones_lib.checkpoints.text import TOKENIZERS, has_tokenizer, open_tokenizer, tokenizer_code
from ones_lib.models.causal import empty_model, model_config, read_json

#: Files that a dense model needs as its MoE does, by what transformers calls them. Nothing else goes along: no code, adapter, draft
#: model, or file that says how weights are quantised.
TRAVELS = (
    *TOKENIZERS,
    *("special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *(
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "audio_tokenizer_config.json",
    ),
    "generation_config.json",
)
_LICENSE = re.compile(r"(.*[-_ .])?(licen[sc]e|copying|notice|use_policy)([-_ .](?!py$|json$).*)?", re.IGNORECASE)
#: Patterns of what is fetched of a hub name, besides weights.
SMALL = (*TRAVELS, "*.json", "*LICEN?E*", "*icen?e*", "*NOTICE*", "*otice*", "USE_POLICY*")
_PROBE = "The 3 experts' names: Ada, Bo & Cy.\n\tif x == 10: return [é, 中文] 🙂"


def travelling(folder: Path) -> Iterator[str]:
    """Names of the files in a checkpoint's folder that go along with a twin."""
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (any(fnmatch(name, pattern) for pattern in TRAVELS) or _LICENSE.fullmatch(name)):
            yield name


def copy_files(source: Path, destination: Path) -> None:
    """Copy what goes along with a model from one folder to another. What refers to code or to MTP layers, which don't, is left out
    of it."""
    kept = tokenizer_code(source)
    for name in travelling(source):
        content, path = (source / name).read_bytes(), destination / name
        if name.endswith("_config.json") and not (kept and name == "tokenizer_config.json"):
            values = read_json(source / name)
            if values.keys() & {"auto_map", "use_mtp"}:
                values = {key: value for key, value in values.items() if key not in ("auto_map", "use_mtp")}
                content = json.dumps(values, indent=2, ensure_ascii=False).encode()
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)


def left_behind(folder: Path) -> list[str]:
    """Names of what is in a checkpoint's folder and is neither read nor goes along with a twin."""
    known = {*travelling(folder), "config.json", INDEX, "README.md", *(file.name for file in weight_files(folder)[0])}
    known.add("additional_chat_templates")
    return sorted(path.name for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))


def write_beside(folder: Path, config: PreTrainedConfig, twin: Path) -> None:
    """Write a twin's config, and copy what lies beside its MoE's weights in ``folder`` and goes along. ValueError: transformers
    can't write the config."""
    try:
        config.save_pretrained(twin)
    except (StrictDataclassError, ValueError, TypeError) as error:
        path = folder / "config.json"
        raise ValueError(f"{path}: expected a config that transformers can write, for the twin: {error}") from error
    copy_files(folder, twin)


def check_beside(folder: Path, config: PreTrainedConfig) -> None:
    """Look through what will lie beside the weights of a twin with this config, before it is made.

    A warning says if the tokenizer does not go along: it is code, needs a package that is not installed, or becomes another one
    beside the twin's type.

    Raises:
        ValueError: the tokenizer can't be opened, or another file is no JSON.
    """
    with TemporaryDirectory(prefix="ones-beside-") as scratch:
        write_beside(folder, config, Path(scratch))
        if code := tokenizer_code(folder):
            warnings.warn(f"{folder}: {no_tokenizer(code)}", stacklevel=2)
        if code or not has_tokenizer(folder):
            return
        try:
            one, two = open_tokenizer(folder), open_tokenizer(scratch)
        except ValueError as error:
            if not isinstance(error.__cause__, ImportError):
                raise
            warnings.warn(f"{error}", stacklevel=2)  # a package is not installed here
            return
    if one.get_vocab() != two.get_vocab() or _read(one) != _read(two):
        warnings.warn(
            f"{folder}: beside a {config.model_type} transformers opens this tokenizer as {type(two).__name__}, not as the MoE's"
            f" {type(one).__name__}, so texts become other tokens; open it with {type(one).__name__}.from_pretrained",
            stacklevel=2,
        )


def _read(tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The probe's tokens; None: it has letters that the tokenizer has not."""
    with suppress(Exception):  # the tokenizers library has no class for its errors
        return tokenizer(_PROBE)["input_ids"]
    return None


def no_tokenizer(code: str) -> str:
    """What is said of a twin whose MoE has a tokenizer that is ``code``."""
    return (
        f"the tokenizer is code of its own ({code}) and no tokenizer.json; no code is copied, so the dense model's tokenizer"
        " does not open"
    )


def check_whole(folder: Path) -> None:
    """Open a finished folder: its config, and names and shapes of its tensors. (Its tokenizer: :func:`check_beside`.)

    Raises:
        ValueError, FileNotFoundError: something is not what a model of its config has.
    """
    stored = StoredModel(Shards(folder), empty_model(model_config(folder)), ())
    stored.check()
    if stored.dropped:
        raise ValueError(f"{folder}: expected no tensors that transformers does not load, found {stored.dropped[:5]}")
