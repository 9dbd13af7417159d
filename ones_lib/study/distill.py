"""Distils a converted checkpoint from the MoE that it was made of: the paper's second step, for published models.

``python -m ones_lib.study.distill MOE DENSE OUT --text TEXT --tokens 10M`` is one process. On several GPUs:
``torchrun --nproc_per_node 8 -m ones_lib.study.distill MOE DENSE OUT ...``.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate.utils import get_max_memory
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedConfig

from ones_lib import __version__
from ones_lib.checkpoints.beside import check_whole, copy_files
from ones_lib.checkpoints.convert import files_stamp, local_folder, named, only_one, read_config
from ones_lib.checkpoints.evaluation import GUIDE, evaluate, loaded, parts_of
from ones_lib.checkpoints.place import CONVERSION, DISTILLATION, Place
from ones_lib.checkpoints.stream import load_checkpoint, open_stored
from ones_lib.checkpoints.terminal import Typed, add_version, exit_status
from ones_lib.checkpoints.text import block_length, found_text, ids_hash, text_blocks, text_name, token_count
from ones_lib.data.files import is_free, model_tensors, remove_unfinished, write_text
from ones_lib.data.text import is_whole
from ones_lib.distillation import Distillation
from ones_lib.models.causal import load_language_model, text_config
from ones_lib.study.language_task import LanguageModel, LanguageModelling
from ones_lib.study.processes import is_main, join, main_first, said_by_main, wait_for_all, whole_tensors, world_size
from ones_lib.study.training import Progress, Training, fit, share_of

HELD_OUT = 2**16  # tokens of held-out text, at most
EVALUATIONS = 10  # on it, of one training
EVALUATION_BATCH = 4  # blocks: logits of more may not fit, with a published model's vocabulary
SEED = 0  # of the order of the blocks


@dataclass(frozen=True)
class Blocks:
    """Token ids [n, L] of the text, and of the held-out text."""

    train: Tensor
    validation: Tensor


def distill(
    moe: str | Path,
    dense: str | Path,
    out: str | Path,
    text: str | Path,
    tokens: int,
    *,
    check: str | Path | None = None,
    length: int | None = None,
    alpha: float = 0.5,
    temperature: float = 1.0,
    learning_rate: float = 2e-4,
    warmup: float = 0.05,
    batch_size: int = 64,
    device_batch: int = 0,
    mixed_precision: str = "no",
    shard: bool = False,
    checkpoint_every: int = 100,
    force: bool = False,
) -> dict:
    """Train a converted checkpoint to give the logits of its MoE, and write a folder that transformers loads.

    The loop is the study's, :func:`ones_lib.study.training.fit`, with AdamW. The student trains in float32 and is stored in
    the dtype of ``dense``. Under torchrun, after :func:`ones_lib.study.processes.join`, each process takes its
    part of every batch. One process alone places the parts of an MoE that its device can't hold on other devices, in memory
    or on the disk.

    An interrupted distillation is continued by the same call, and of a finished one the same call returns what it found. Until it
    is whole it stays in a hidden folder beside ``out``.

    Args:
        moe: a folder, or a name on the Hugging Face hub.
        dense: a folder made of it by :func:`ones_lib.checkpoints.convert`, or by this function.
        out: a folder that does not exist, is empty, or was made by the same call.
        text: what :func:`ones_lib.checkpoints.text.text_blocks` reads. A shorter text is read several times.
        tokens: number of tokens to train on; the last incomplete batch is left out.
        check: a text to measure the perplexity on. None: the validation split of ``text``; of a file, or a folder without
            splits, every tenth block, which is then not trained on.
        length: tokens of a block. None: 512, or what the model can take.
        alpha: weight of the teacher; the rest is the weight of the text's own next tokens. Both together
            are better than the teacher alone (SlimQwen, arXiv 2605.08738).
        temperature: of the softmax of both models' logits.
        learning_rate: peak, after warm-up and before cosine decay. The nearer ``dense`` is to the MoE and the fewer the tokens, the
            smaller: a student that ends with a higher perplexity than it started with has had too large a rate, which is said.
        warmup: fraction of the steps.
        batch_size: blocks of a step, over all processes.
        device_batch: blocks that a process takes at a time. 0: no limit.
        mixed_precision: ``no``, ``bf16`` or ``fp16``.
        shard: spread both models over the processes.
        checkpoint_every: steps.
        force: replace what another call has made at ``out``, when the new one is whole. A folder with other files is left alone.

    Returns:
        What ``distillation.json`` in ``out`` holds: arguments, ``steps``, ``epochs`` of the text, ``versions``, and
        ``perplexity`` of ``MoE``, ``start`` and ``result``, and ``kl`` of the latter two to the MoE, in nats a token, on
        ``held_out_tokens``. ``history.csv`` there is the course of the training, with the loss in nats and ``val_perplexity``.

    Raises:
        ValueError, FileNotFoundError, FileExistsError, ConnectionError: before long work starts.
        Diverged: the loss is not finite; the last checkpoint stays.
    """
    loss = Distillation(temperature, alpha)
    recipe = Training(1, batch_size, learning_rate, warmup, balance_weight=0.0, mixed_precision=mixed_precision)
    _check_numbers(device_batch, shard, checkpoint_every)
    examples = batch_size // (world_size() * share_of(batch_size, device_batch).parts)
    place, dense = Place(out, "out", DISTILLATION, force), Path(dense).expanduser().resolve()
    if place.folder == dense:
        raise ValueError(f"out: expected another folder than dense, found {dense}")
    text, check = found_text("text", text), found_text("check", check)
    with main_first():  # it downloads
        source = local_folder(moe, "moe")
    name = named(moe, source)
    conversion = _conversion(source, dense, name["source"])
    length = _checked_length(length, read_config(dense))
    steps = int(tokens) // (batch_size * length)
    if steps < 1:
        step = f"a step of {batch_size} blocks of {length}"
        raise ValueError(f"tokens: expected at least {batch_size * length:,}, {step}, found {tokens:,}")
    recipe = replace(recipe, steps=steps, evaluations=min(EVALUATIONS, steps))
    with main_first():  # it makes the embedded text
        blocks = _read_blocks(text, check, dense, length, steps * batch_size * length)

    arguments = {"moe": name.pop("source"), **name, "dense": dense.name}
    arguments |= {"text": text_name(text), "check": None if check is None else text_name(check)}
    arguments |= {"tokens": int(tokens), "length": length, "alpha": alpha, "temperature": temperature}
    arguments |= {"learning_rate": learning_rate, "warmup": warmup, "batch_size": batch_size}
    arguments |= {"mixed_precision": mixed_precision}
    folders = {"moe": source, "dense": dense}
    arguments |= {f"{key}_stamp": files_stamp(folder) for key, folder in folders.items()}
    arguments |= {f"{key}_sha256": ids_hash(ids) for key, ids in vars(blocks).items()}
    if place.done(arguments):
        return place.found()
    epochs = steps * batch_size / len(blocks.train)
    if epochs > 1 and is_main():
        found = f"found {blocks.train.numel():,}, which are read {epochs:.1f} times"
        warnings.warn(f"text: expected {steps * batch_size * length:,} tokens to train on, {found}", stacklevel=2)
    arguments |= {"steps": steps, "epochs": epochs}
    work = _Work(source, dense, place, conversion, arguments)
    with only_one(place.folder) if is_main() else nullcontext():
        if is_main():
            work.begin(blocks)
        wait_for_all()
        task = _NextTokens(blocks, EVALUATION_BATCH)
        student, teacher = work.models(examples * length)
        with tqdm(total=steps, desc=place.folder.name, unit="step", dynamic_ncols=True, disable=not is_main()) as bar:
            student, history = fit(
                student,
                task,
                recipe,
                seed=SEED,
                teacher=teacher,
                distillation=loss,
                checkpoint=work.checkpoint,
                checkpoint_every=checkpoint_every,
                device_batch=device_batch,
                shard=shard,
                progress=_progress(bar, task),
            )
        weights = whole_tensors(model_tensors(student))
        del student, teacher
        if is_main():
            work.write(weights, history)
        del weights
        _free_memory()
        return said_by_main(work.finish(blocks.validation) if is_main() else None)


class _NextTokens(LanguageModelling):
    """The task, with the perplexity that was measured last, if any was."""

    perplexity: float | None = None

    def predict(self, model: nn.Module, device: torch.device) -> Mapping[str, Tensor]:
        found = super().predict(model, device)
        self.perplexity = found["loss"].double().mean().exp().item()
        return found


def _progress(bar: tqdm, task: _NextTokens) -> Progress:
    def progress(step: int, steps: int, loss: float, accuracy: float) -> None:
        measured = "" if task.perplexity is None else f", perplexity {task.perplexity:.4g}"
        bar.set_postfix_str(f"loss {loss:.4f}{measured}", refresh=False)
        bar.update(step - bar.n)

    return progress


class _Work:
    """A distillation under way, in a hidden folder beside its place. All but :meth:`models` is for the first process alone.

    Args:
        moe, dense: folders.
        conversion: how ``dense`` was made.
        arguments: all that decides the result.
    """

    def __init__(self, moe: Path, dense: Path, place: Place, conversion: Mapping, arguments: Mapping) -> None:
        self.moe, self.dense, self.place, self.conversion, self.arguments = moe, dense, place, conversion, arguments
        self.folder = place.folder.with_name(f".{place.folder.name}.distilling")
        self.model, self.offload = self.folder / "model", self.folder / "offload"
        self.checkpoint, self.measured = (self.folder / name for name in ("checkpoint.safetensors", "evaluation.json"))

    def begin(self, blocks: Blocks) -> None:
        """Go on with an interrupted distillation, or start one: measure MoE and start.

        All that can fail without a step does so now: the place is tried, and the model card is written.

        Raises:
            FileExistsError: there is unfinished work with other arguments, which is not to be replaced.
            OSError: nothing can be moved to the place.
        """
        identity = {**self.arguments, "versions": _versions()}
        mark = self.folder / "arguments.json"
        found = json.loads(mark.read_text()) if mark.exists() else {}
        if odd := [name for name in identity if found.get(name) != identity[name]]:
            if (self.checkpoint.exists() or self.measured.exists()) and not self.place.force:
                raise FileExistsError(
                    f"{self.folder}: expected unfinished work of the same arguments, found others: {', '.join(odd)};"
                    " force=True starts over"
                )
            shutil.rmtree(self.folder, ignore_errors=True)
        ones = dict.fromkeys(("MoE", "start", "result"), 1.0)
        about = {**identity, "perplexity": ones, "kl": ones, "held_out_tokens": 1}
        _card(self.conversion, about, read_config(self.dense))
        self.place.tried()
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        write_text(mark, json.dumps(identity))
        if not self.measured.exists():
            write_text(self.measured, json.dumps(self._evaluate("start", self.dense, blocks.validation)))
            _free_memory()

    def _evaluate(self, name: str, folder: Path, held_out: Tensor) -> dict[str, dict[str, float]]:
        """Of the MoE and of a dense model called ``name``: see :func:`ones_lib.checkpoints.evaluation.evaluate`."""
        parts = parts_of(held_out)
        dense, moe = loaded(folder, parts, self.offload / name), loaded(self.moe, parts, self.offload / "MoE")
        with dense as of_dense, moe as of_moe:  # in this order: the larger one gets what the other leaves of a GPU
            return evaluate(parts, of_moe, {name: of_dense})

    def models(self, tokens: int) -> tuple[LanguageModel, LanguageModel]:
        """Student and teacher, for passes of ``tokens``."""
        student = LanguageModel(load_language_model(self.dense, dtype=torch.float32))
        if world_size() > 1:
            return student, LanguageModel(load_checkpoint(self.moe))
        # Weights, gradients and two moments; logits of two models and what the loss makes of them.
        needed = (
            16 * sum(p.numel() for p in student.parameters())
            + 28 * tokens * text_config(student.model.config).vocab_size
        )
        memory = get_max_memory()
        first = next(iter(memory))
        memory[first] = max(0, memory[first] - needed)
        placed = {"device_map": "auto", "max_memory": memory, "offload_folder": self.offload}
        return student, LanguageModel(load_checkpoint(self.moe, **placed))

    def write(self, weights: Mapping[str, Tensor], history: pd.DataFrame) -> None:
        """Write the model, with the other files of ``dense``, and the course of the training."""
        shutil.rmtree(self.model, ignore_errors=True)  # of an interrupted call
        student = LanguageModel(load_language_model(self.dense))
        with torch.no_grad():
            for name, tensor in model_tensors(student).items():
                tensor.copy_(weights[name])
        # Some published files are refused when written; they are copied instead.
        student.model.generation_config = GenerationConfig.from_model_config(student.model.config)
        student.model.save_pretrained(self.model)
        copy_files(self.dense, self.model)
        shutil.copyfile(self.dense / CONVERSION, self.model / CONVERSION)
        history = history.assign(val_perplexity=np.exp(history["val_loss"]))
        history.to_csv(self.model / "history.csv", index=False)

    def finish(self, held_out: Tensor) -> dict:
        """Measure the result, write about it, and move all to its place. Returns ``distillation.json``."""
        start, result = json.loads(self.measured.read_text()), self._evaluate("result", self.model, held_out)
        about = {**self.arguments, **{name: start[name] | result[name] for name in start}}
        about |= {"held_out_tokens": held_out.numel(), "versions": _versions()}
        found = about["perplexity"]
        if found["result"] > found["start"]:
            rate = f"learning_rate: {self.arguments['learning_rate']:g} was too large"
            changed = f"the perplexity went from {found['start']:.4g} to {found['result']:.4g}"
            warnings.warn(f"{rate} for {self.arguments['steps']:,} steps: {changed}", stacklevel=2)
        earlier = self.dense / DISTILLATION
        if earlier.exists():
            about["earlier"] = json.loads(earlier.read_text())
        write_text(self.model / "README.md", _card(self.conversion, about, read_config(self.model)))
        check_whole(self.model)
        self.place.put(self.model, about)
        shutil.rmtree(self.folder)
        return self.place.found()


def _free_memory() -> None:
    """Else what models have held would count as used where the next ones are placed."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _versions() -> dict[str, str]:
    return {"ones-lib": __version__, **{name: version(name) for name in ("torch", "transformers")}}


# --- checks ------------------------------------------------------------------------------------------------------------


def _check_numbers(device_batch: int, shard: bool, checkpoint_every: int) -> None:
    if device_batch < 0:
        raise ValueError(f"device_batch: expected a number of at least 0, found {device_batch}")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every: expected a number of at least 1, found {checkpoint_every}")
    if shard and world_size() == 1:
        raise ValueError("shard: expected several processes, started by torchrun, found one")


def _checked_length(length: int | None, config: PreTrainedConfig) -> int:
    longest = getattr(text_config(config), "max_position_embeddings", None) or math.inf
    if length is not None and not 8 <= length <= longest:
        raise ValueError(f"length: expected 8 to {longest} tokens, found {length}")
    return length or block_length(config)


def _conversion(moe: Path, dense: Path, name: str) -> dict:
    """How ``dense`` was made, if it was made of ``moe``, which is called ``name``."""
    path = dense / CONVERSION
    if not dense.is_dir():
        raise FileNotFoundError(f"dense: no such folder, {str(dense)!r}")
    if not path.exists():
        raise ValueError(f"{dense}: expected conversion.json of a conversion, found none: its FFNs were never gathered")
    try:
        conversion = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a JSON object ({error})") from error
    if missing := [key for key in ("source", "model_type", "method", "d_ff", "options") if key not in conversion]:
        raise ValueError(f"{path}: expected what a conversion writes, found no {missing[0]!r}")
    teacher, student = read_config(moe), read_config(dense)
    for folder in (moe, dense):
        open_stored(folder)
    if teacher.is_encoder_decoder:
        raise ValueError(f"{moe}: expected a causal model, found {teacher.model_type}, an encoder-decoder")
    pairs = {"model_type": (conversion.get("model_type"), teacher.model_type)}
    sizes = ("hidden_size", "num_hidden_layers", "vocab_size")
    pairs |= {key: tuple(getattr(text_config(config), key) for config in (student, teacher)) for key in sizes}
    for key, (made_of, found) in pairs.items():
        if made_of != found:
            raise ValueError(f"{moe}: expected the MoE that {dense} was made of, with {key} {made_of}, found {found}")
    files = [folder / "tokenizer.json" for folder in (moe, dense)]
    if all(file.exists() for file in files):
        one, two = map(_vocabulary, files)
        if odd := sorted(token for token, _ in one.items() ^ two.items()):
            raise ValueError(f"{files[1]}: expected the tokens of {files[0]}, found others, such as {odd[0]!r}")
    if conversion.get("source") != name and is_main():
        found = f"found one made of {conversion.get('source')}, of the same form"
        warnings.warn(f"{dense}: expected a model made of {name}, {found}", stacklevel=3)
    return conversion


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        return Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # tokenizers has no other type of its own
        raise ValueError(f"{file}: expected a tokenizer ({error})") from error


def _read_blocks(text: str | Path, check: str | Path | None, dense: Path, length: int, tokens: int) -> Blocks:
    """The blocks of a text, of which so many ``tokens`` are needed to train on."""
    train = text_blocks(text, dense, split="train", length=length, most=tokens + tokens // 8)  # a tenth may be held out
    if check is not None:
        return Blocks(train, text_blocks(check, dense, HELD_OUT, length=length, name="check"))
    if not is_whole(text):
        return Blocks(train, text_blocks(text, dense, HELD_OUT, length=length))
    every = max(10, len(train) // max(1, HELD_OUT // length))
    if len(train) < 2:
        raise ValueError(f"check: expected a held-out text, since {text} has one block of {length} only, found None")
    held_out = torch.arange(len(train)) % every == 0
    return Blocks(train[~held_out], train[held_out])


# --- model card --------------------------------------------------------------------------------------------------------


def _card(conversion: Mapping, about: Mapping, config: PreTrainedConfig) -> str:
    """README.md of the result."""
    name, found, kl = conversion["source"], about["perplexity"], about["kl"]
    options = ({} if conversion["d_ff"] is None else {"d_ff": conversion["d_ff"]}) | conversion["options"]
    given = "".join(f", {option} = {value}" for option, value in options.items())
    trained = about["steps"] * about["batch_size"] * about["length"]
    rest = "" if about["alpha"] == 1 else f", of weight {about['alpha']:g}, and the text's own next tokens"
    earlier = " that was distilled before (see distillation.json)" if "earlier" in about else ""
    return f"""---
library_name: transformers
base_model: {name}
tags: [ones, knowledge-gathering, distillation, dense]
---
# {name}, made dense and distilled

A {config.architectures[0]}. Its feed-forward networks were gathered from the experts of {name} \
({conversion["model_type"]}) by `{conversion["method"]}`{given}; then all of its weights were trained to give the logits of \
that MoE. After "One Student Knows All Experts Know: From Sparse to Dense" (Xue et al., arXiv 2201.10890).

- Start: {about["dense"]}, a conversion{earlier}.
- Distillation: {trained:,} tokens of {about["text"]} ({about["epochs"]:.2g} times all of it), in {about["steps"]:,} steps \
of {about["batch_size"]} blocks of {about["length"]}.
- Loss: the KL divergence from the MoE at temperature {about["temperature"]:g}{rest}. AdamW, learning rate \
{about["learning_rate"]:g} after a warm-up of {about["warmup"]:.0%} of the steps, cosine decay.
- Perplexity on {about["held_out_tokens"]:,} held-out tokens of {about["check"] or about["text"]}: MoE {found["MoE"]:.4g}, \
start {found["start"]:.4g}, this model {found["result"]:.4g}. The course is in history.csv.
- KL to the MoE: start {kl["start"]:.3f}, this model {kl["result"]:.3f}. {" ".join(GUIDE.split())}

How it was gathered is in conversion.json, how it was distilled in distillation.json.
Made with ones_lib {about["versions"]["ones-lib"]}, transformers {about["versions"]["transformers"]}.
"""


# --- command line ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ones_lib.study.distill",
        description="Train a converted checkpoint to give the logits of the MoE that it was made of.",
        epilog="On several GPUs: torchrun --nproc_per_node 8 -m ones_lib.study.distill ... An interrupted command goes on"
        " when it is called again.",
    )
    add = parser.add_argument
    add("moe", metavar="MOE", help="folder or Hugging Face hub name of the MoE")
    add("dense", metavar="DENSE", help="folder that python -m ones_lib.checkpoints convert made of it, or this command")
    add("out", metavar="OUT", help="folder to make")
    text = "file, folder, hub name, or 'docstrings' or 'names' (embedded text)"
    add("--text", required=True, help=f"to train on: {text}")
    add(
        "--tokens",
        required=True,
        type=token_count,
        metavar="N",
        help="tokens to train on, such as 10M, 200k or 1_000_000",
    )
    add("--check", metavar="TEXT", help="held-out text (default: the text's own, of a file every tenth block)")
    add("--length", type=int, metavar="N", help="tokens of a block (default: 512, or what the model can take)")
    add(
        "--alpha",
        type=float,
        default=0.5,
        help="weight of the teacher, 0 to 1; the rest is the text's own (default: 0.5)",
    )
    add("--temperature", type=float, default=1.0, help="of the softmax (default: 1)")
    add("--learning-rate", type=float, default=2e-4, help="peak (default: 2e-4; small models want more, such as 2e-3)")
    add("--warmup", type=float, default=0.05, help="fraction of the steps (default: 0.05)")
    add("--batch-size", type=int, default=64, metavar="N", help="blocks of a step, over all processes (default: 64)")
    add("--device-batch", type=int, default=0, metavar="N", help="blocks that a process takes at a time (default: all)")
    add("--mixed-precision", default="no", choices=["no", "bf16", "fp16"], help="of the training (default: no)")
    add("--shard", action="store_true", help="spread the models over the processes (FSDP)")
    add("--checkpoint-every", type=int, default=100, metavar="N", help="steps (default: 100)")
    add("--force", action="store_true", help="replace what another call has made at OUT, when the new one is whole")
    add_version(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run :func:`distill` as the command line says; the exit status."""
    given = vars(_parser().parse_args(arguments))
    typed = Typed(given, {"moe": "MOE", "dense": "DENSE", "out": "OUT"})

    def work() -> None:
        state = join() if "WORLD_SIZE" in os.environ else None
        fresh = given["force"] or is_free(Path(given["out"]).expanduser())
        with typed.warnings(hidden=not fresh):
            about = distill(**given)
        if state is not None:
            state.destroy_process_group()
        if state is None or state.is_main_process:
            print(_report(about, given["out"]) if fresh else f"already done with these arguments: {given['out']}")

    goes_on = "interrupted; the same command goes on where the last checkpoint was written"
    return exit_status(work, typed.said, interrupted=goes_on, launched=True)


def _report(about: Mapping, out: str) -> str:
    trained = about["steps"] * about["batch_size"] * about["length"]
    asked = "" if trained == about["tokens"] else f", of {about['tokens']:,} asked for"
    return f"""\
trained on {trained:,} tokens{asked}: {about["steps"]} steps of {about["batch_size"]} x {about["length"]}
perplexity: {", ".join(f"{name} {value:.4g}" for name, value in about["perplexity"].items())}
KL to the MoE: {", ".join(f"{name} {value:.3f}" for name, value in about["kl"].items())}
{GUIDE}
wrote {out}"""


if __name__ == "__main__":
    sys.exit(main())
