"""Makes a published MoE checkpoint dense."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, IncompleteSnapshotError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedConfig

from ones_lib.checkpoints.architectures import ENGINES, Architecture
from ones_lib.checkpoints.beside import SMALL, check_beside
from ones_lib.checkpoints.place import CONVERSION, Place
from ones_lib.checkpoints.plan import TwinPlan
from ones_lib.checkpoints.quantised import quantisation_files
from ones_lib.checkpoints.reconstruction import check_student_inputs, takes_student_inputs
from ones_lib.checkpoints.shards import WHOLE, Shards, weight_files, weights_to_fetch
from ones_lib.checkpoints.stored import open_checkpoint
from ones_lib.checkpoints.stream import LEAST_SLICES
from ones_lib.checkpoints.text import asked_for, check_tokens, described, found_text, text_blocks
from ones_lib.checkpoints.work import Work, read_layers
from ones_lib.data.files import file_stamps
from ones_lib.data.sources import HUB_NAME
from ones_lib.gathering.registry import check_options, needs_calibration, options_of
from ones_lib.gathering.scale import ROUTER_SCALES
from ones_lib.gathering.source import source_hash
from ones_lib.models.causal import SWITCHES, model_config, text_config

TOKENS = {"calibration": 4096, "reconstruct": 2**20}  # taken of a text where no number is asked for


def convert(
    source: str | Path,
    destination: str | Path,
    method: str = "svd",
    d_ff: int | str | None = None,
    *,
    calibration: str | Path | Tensor | None = None,
    calibration_tokens: int | None = None,
    approximate: bool = False,
    engine: str = "",
    check: str | Path | Tensor | None = None,
    reconstruct: str | Path | Tensor | None = None,
    reconstruct_tokens: int | None = None,
    student_inputs: bool | None = None,
    force: bool = False,
    **options,
) -> pd.DataFrame:
    """Make an MoE checkpoint dense: gather the experts of every layer, copy the rest, and write a folder that
    transformers loads.

    A gathered network is multiplied by the sum of a token's gates, which is known (1, or a scaling factor) or measured
    as a mean. Shared experts without a gate are joined to it exactly. The twin's layers have one width: a narrower
    network gets hidden units of no effect. The default scale of a method is ``"router"`` (see
    :mod:`ones_lib.gathering.scale`), not the paper's, with which E experts add up to E times the size.

    An interrupted conversion is continued by the same call, where only ``check`` may be another, and of a finished one the same
    call returns the table. Until it is whole it stays in a hidden folder beside ``destination``.

    Args:
        source: a folder, or a name on the Hugging Face hub, of an MoE in safetensors files. Quantised weights become bfloat16, see
            :mod:`ones_lib.checkpoints.quantised`.
        destination: a folder that does not exist, is empty, or was made by the same call.
        method: one of :func:`ones_lib.gathering_methods`.
        d_ff: hidden units to gather the routed experts to, see :func:`ones_lib.gather`. ``"active"``: those that a token
            passes through, the router's k times an expert's; ``"4x"``: four times as many. None: one expert's.
        calibration: a text (see :func:`ones_lib.checkpoints.text.text_blocks`) or token ids [n, L]. The MoE is run on
            it once, for methods that use data, router statistics and output errors. None: that of ``reconstruct``; else
            none of these, and sums of gates are measured on random tokens where they are not known.
        calibration_tokens: number of tokens of it. None: 4,096, or what a shorter text has.
        approximate: where the exact twin is not a plain dense class (Qwen2-MoE), make one that is, but is not exact.
        engine: make a twin that this engine starts (``"vllm"``), where it refuses the usual one: some experts stay then, always
            chosen.
        check: a text or token ids to measure the perplexity of MoE and twin on, and the KL of the twin to the MoE.
        reconstruct: a text or token ids [n, L] to regress every gathered network, shared experts included, onto its MoE layer
            on, see :mod:`ones_lib.checkpoints.reconstruction`. None: no regression.
        reconstruct_tokens: number of tokens of the text. None: 2**20, or what a shorter text has.
        student_inputs: regress on what the twin's earlier layers make of the text, so that a layer makes up for their errors. None:
            where the blocks add their network's output as it is; True is refused elsewhere.
        force: replace what another call has made at ``destination``, when the new one is whole, and another call's unfinished work
            at once. A folder with other files is left alone.
        options: of the method.

    Returns:
        One row an MoE layer: ``layer, experts, d_ff, shared, width, gate_sum, gates, output_error, seconds``.
        ``width`` is the width of the twin's layer, ``gates`` the source of ``gate_sum``, and ``output_error`` the
        relative error of the routed part, right after gathering, on tokens that the method did not see. A reconstruction has
        two other errors in its place, of the same targets on the same held-out tokens: ``start_error`` before, of the gathered
        network, and ``reconstruction_error`` after. ``conversion.csv`` in the destination holds the same, ``reconstruction.csv``
        the error by tokens seen. With ``check``, ``attrs["perplexity"]`` has those of ``MoE`` and ``dense``, and
        ``attrs["kl"]`` that of ``dense`` to the MoE, in nats a token.
        ``conversion.json`` has the arguments, and what was taken of the texts.

    Raises:
        FileNotFoundError, FileExistsError, ValueError, TypeError, ConnectionError, OSError: before long work starts, and nothing is
            left behind. If something fails later, such as a sum that float16 can't hold, what is done stays for the next call.
    """
    options = _checked_options(method, options)
    if engine and engine not in ENGINES:
        raise ValueError(f"engine: expected one of {list(ENGINES)}, or none, found {engine!r}")
    place = Place(destination, "destination", CONVERSION, force)
    check_tokens("calibration_tokens", calibration_tokens)
    check_tokens("reconstruct_tokens", reconstruct_tokens)
    calibration, reconstruct, check = (
        found_text(name, text)
        for name, text in (("calibration", calibration), ("reconstruct", reconstruct), ("check", check))
    )
    for name, value in {"student_inputs": student_inputs, "reconstruct_tokens": reconstruct_tokens}.items():
        if value is not None and reconstruct is None:
            raise ValueError(f"{name}: expected a text to reconstruct on (reconstruct), found None")
    if calibration is None and reconstruct is None and needs_calibration(method, options.get("scale", 1.0)):
        raise ValueError(f"calibration: expected a text, which method {method!r} needs, found None")

    folder = local_folder(source)
    config = read_config(folder)
    architecture = Architecture(config, folder, approximate, engine)
    if architecture.normed and (reconstruct is not None or "calibration" in options_of(method)):
        name = "method" if reconstruct is None else "reconstruct"
        raise ValueError(
            f"{name}: expected experts whose outputs are added as they are, found {config.model_type!r}, which norms each; take a"
            " gathering that looks at weights alone"
        )
    if reconstruct is not None and not architecture.streams:
        raise ValueError(
            "reconstruct: expected a causal model whose blocks hand on hidden states and nothing else, found"
            f" {config.model_type!r}"
        )
    plan = TwinPlan(open_checkpoint(folder, config, architecture.model), architecture, method, d_ff, options)
    check_beside(folder, plan.config)
    texts = {"reconstruct": reconstruct, "calibration": calibration, "check": check}
    needed = {"calibration": calibration_tokens or TOKENS["calibration"]}
    needed["reconstruct"] = max(reconstruct_tokens or TOKENS["reconstruct"], needed["calibration"])  # it may be both
    ids = {
        name: text if text is None else _blocks(name, text, folder, config, needed.get(name))
        for name, text in texts.items()
    }
    if calibration is None and reconstruct is not None:
        texts["calibration"], ids["calibration"] = reconstruct, ids["reconstruct"]
    tokens = {"calibration": calibration_tokens, "reconstruct": reconstruct_tokens}
    for name, count in tokens.items():
        if torch.is_tensor(texts[name]) and (name == "reconstruct" or calibration is not None):
            tokens[name] = ids[name].numel()
        elif ids[name] is not None:
            ids[name] = asked_for(f"{name}_tokens", ids[name], count, TOKENS[name], texts[name])
    if reconstruct is not None and len(ids["reconstruct"]) < LEAST_SLICES:
        found, length = ids["reconstruct"].shape
        raise ValueError(
            f"reconstruct, reconstruct_tokens: expected at least {LEAST_SLICES} blocks of {length} tokens, found {found}"
        )

    asked = student_inputs
    if reconstruct is not None and asked is None:
        student_inputs = takes_student_inputs(plan, ids["reconstruct"])
    arguments = named(source, folder) | {"source_stamp": files_stamp(folder)}
    arguments |= {"method": method, "d_ff": plan.d_ff, "options": options, "approximate": approximate}
    if architecture.for_engine:
        arguments["engine"] = engine
    if code := source_hash(method):
        arguments["method_source"] = code
    arguments |= {name: text if text is None else described(text, ids[name]) for name, text in texts.items()}
    arguments |= {
        "calibration_tokens": tokens["calibration"] or TOKENS["calibration"],
        "student_inputs": bool(student_inputs),
    }
    arguments["reconstruct_tokens"] = None if reconstruct is None else tokens["reconstruct"] or TOKENS["reconstruct"]
    work = Work(place, plan, arguments)
    with only_one(place.folder):
        if place.done(work.facts()):
            if work.unfinished() is None:
                shutil.rmtree(work.folder, ignore_errors=True)  # a killed call finished this and was about to do so
            return read_layers(place.folder)
        try:
            work.begin(ids)
            if method == "expert_selection":
                plan.check_router()
            if asked:
                check_student_inputs(plan, ids["reconstruct"])
            work.run_moe(ids["calibration"])
            if reconstruct is not None:
                work.reconstruct(ids["reconstruct"])
            work.write_shards()
            work.write_config()
            return work.finish({} if check is None else work.evaluate(ids["check"]))
        except BaseException:  # what is done stays for the next call
            if not work.begun():
                shutil.rmtree(work.folder, ignore_errors=True)
            raise


def _blocks(name: str, text: str | Path | Tensor, folder: Path, config: PreTrainedConfig, needed: int | None) -> Tensor:
    """Token ids [n, L] of a text, all or as many as are ``needed``, or those that an argument of this name gives, checked."""
    if isinstance(text, (str, Path)):
        text = text_blocks(text, folder, split="validation" if name == "check" else "train", name=name, most=needed)
    check_ids(name, text, text_config(config).vocab_size)
    return text


def _checked_options(method: str, options: Mapping) -> dict:
    """A method's options with the default scale."""
    check_options(method, options)
    for name, value in options.items():
        if not isinstance(value, (str, int, float, list, tuple, type(None))):
            raise TypeError(f"{name}: expected a number, text or list, found {type(value).__name__}")
    return {**options, "scale": options.get("scale", "router")} if method in ROUTER_SCALES else dict(options)


def local_folder(source: str | Path, name: str = "source") -> Path:
    """The checkpoint's folder. A hub name's is in the hub's cache; missing files are downloaded. Errors call it ``name``."""
    path = Path(source).expanduser()
    folder = Path(os.path.abspath(path)) if path.is_dir() else _hub_folder(str(source), name)  # "." has no name
    if (folder / "adapter_config.json").is_file():
        warnings.warn(
            f"{folder}: adapter_config.json: an adapter beside the MoE is not part of it, and not read", stacklevel=3
        )
    return folder


def _hub_folder(source: str, name: str) -> Path:
    path = Path(source).expanduser()
    if path.exists() or path.suffix in (".safetensors", ".json", ".gguf") or not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(f"{name}: expected a folder or a hub name like owner/name, found {source!r}")
    try:
        folder = _fetched(source, None, [*SMALL, WHOLE])
        if weights := weights_to_fetch(folder):
            _fetched(source, folder.name, weights)
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConnectionError(
            f"{name}: expected a folder or a model on the Hugging Face hub, found no folder {source!r}, and the hub"
            f" failed: {error}"
        ) from error


def _fetched(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the hub's cache. Without the hub it may lack files; those that are needed are named when they are read."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of the MoE in a folder, with a dtype: see :func:`ones_lib.models.causal.model_config`."""
    config = model_config(folder)
    if config.dtype is None:
        config.dtype = text_config(config).dtype or Shards(folder, lambda name: True).dtype
    return config


def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise an error that names the parameter unless it is token ids [n, L] of a vocabulary."""
    if not torch.is_tensor(ids):
        raise TypeError(f"{name}: expected a text or token ids [n, L], found {type(ids).__name__}")
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
        raise ValueError(f"{name}: expected token ids [n, L], found {ids.dtype} {list(ids.shape)}")
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        found = f"{int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"{name}: expected token ids from 0 to {vocab_size - 1}, found {found}")


def named(source: str | Path, folder: Path) -> dict[str, str]:
    """What a checkpoint is called in the records of what is made of it: ``source``, and a hub name's ``revision``."""
    hub = not Path(source).expanduser().is_dir()
    return {"source": str(source), "revision": folder.name} if hub else {"source": folder.name}


def files_stamp(folder: Path) -> str:
    """SHA-256 of what a checkpoint's config says of the model, and of names, sizes and times of its other files: another one if
    they were changed."""

    def of_the_model(values: dict) -> dict:
        return {name: value for name, value in values.items() if name not in SWITCHES}

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"), object_hook=of_the_model)
    weights = [file for file in weight_files(folder)[0] if file.exists()]
    stamps = file_stamps([*weights, *quantisation_files(folder)])
    return hashlib.sha256(json.dumps([config, stamps], sort_keys=True).encode()).hexdigest()


@contextmanager
def only_one(destination: Path) -> Iterator[None]:
    """Refuse a second conversion or distillation to the same place, from this machine or another: it would start the first one's
    work over."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    path = destination.with_name(f".{destination.name}.lock")
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # while it is held: who opened it before tries again
    except Timeout as error:
        raise FileExistsError(f"{destination}: another conversion or distillation to it is under way") from error
