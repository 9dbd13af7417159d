"""Carries out a conversion in a hidden folder beside its destination, so that it can be interrupted."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.logging import tqdm

from ones_lib.calibration import LayerActivations
from ones_lib.checkpoints.activations import store_activations, stored_activations
from ones_lib.checkpoints.card import model_card
from ones_lib.checkpoints.plan import Block, TwinPlan
from ones_lib.checkpoints.shards import INDEX, Shards
from ones_lib.checkpoints.text import block_length
from ones_lib.data.files import file_stamps, remove_unfinished, save_tensors, write_text
from ones_lib.ffn import FeedForwardWeights, concatenate
from ones_lib.gathering.registry import gather_precisely, options_of
from ones_lib.gathering.scale import scaled_output
from ones_lib.models.causal import activation_of, load_language_model, perplexity

COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # tokenizer and generation files; never code


class Work:
    """A conversion under way.

    Args:
        destination: folder to make. ``model`` in the hidden folder becomes it.
        plan: the twin's.
        arguments: all that decides the result: ``source``, ``method``, ``d_ff``, ``options``, ``calibration``, ...
    """

    def __init__(self, destination: Path, plan: TwinPlan, arguments: Mapping) -> None:
        self.destination, self.plan, self.arguments = destination, plan, arguments
        self.folder = destination.with_name(f".{destination.name}.converting")
        self.model, self.rows, self.activations = (self.folder / name for name in ("model", "rows", "activations"))

    def begin(self) -> None:
        """Go on with an interrupted conversion if it is the same, else start over.

        Raises:
            OSError: there is not enough room on the disk.
        """
        source, mark = self.plan.shards.path, self.folder / "conversion.json"
        stamps = file_stamps([source / "config.json", *self.plan.shards.paths()])
        versions = [version("ones-lib"), version("transformers")]
        identity = json.dumps([str(source.resolve()), self.arguments, stamps, versions])
        if self.folder.exists() and (not mark.exists() or mark.read_text() != identity):
            warnings.warn(f"{self.folder}: unfinished work of another conversion, starting over", stacklevel=3)
            shutil.rmtree(self.folder)
        remove_unfinished(self.folder)
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        done = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
        needed, free = self.plan.bytes - done, shutil.disk_usage(self.destination.parent).free
        if needed > free:
            raise OSError(
                f"{self.destination.parent}: expected {needed / 1e9:.1f} GB of free disk space, found {free / 1e9:.1f} GB"
            )
        for folder in (self.model, self.rows):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(mark, identity)

    def run_moe(self, ids: Tensor | None) -> None:
        """Run the MoE on ``ids`` [n, L], or on random tokens if its gates have to be measured and there is no text."""
        config, architecture = self.plan.source_config, self.plan.architecture
        if ids is None and (architecture.gates(config) is None or architecture.mean_gated):
            length = block_length(config)
            shape = (max(1, self.arguments["calibration_tokens"] // length), length)
            ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
        if ids is not None:
            store_activations(self.plan.shards.path, ids, self.activations)

    def write_shards(self) -> None:
        """Write one shard a block, and the row of its MoE layer. A shard is written while the next one is gathered."""
        blocks = self.plan.blocks

        def write(path: Path, tensors: dict[str, Tensor], row: dict | None) -> None:
            write_text(self.rows / f"{path.stem}.json", json.dumps(row))
            save_tensors(path, tensors, {"format": "pt"})

        with ThreadPoolExecutor(1) as writer:
            writing = None
            for i, block in enumerate(tqdm(blocks, desc=self.destination.name, unit="block"), start=1):
                path = self.model / f"model-{i:05d}-of-{len(blocks):05d}.safetensors"
                if path.exists():
                    continue
                made = self.convert_block(block)
                if writing is not None:
                    writing.result()  # no more than two blocks are in memory
                writing = writer.submit(write, path, *made)
                del made
            if writing is not None:
                writing.result()

    def convert_block(self, block: Block) -> tuple[dict[str, Tensor], dict | None]:
        """The tensors of a block in the twin, and the row of its MoE layer, if it has one."""
        plan, started = self.plan, time.perf_counter()
        tensors = {name: plan.read(name) for name in block.copies}
        if block.sparse:
            ffn, row = self.gather_layer(block)
            tensors |= plan.gathered_tensors(block.ffn, ffn)
            return tensors, {**row, "seconds": time.perf_counter() - started}
        if block.ffn:
            tensors |= plan.dense_tensors(block.ffn, plan.ffn(block).widened(plan.width))
        return tensors, None

    def gather_layer(self, block: Block) -> tuple[FeedForwardWeights, dict]:
        """The network that replaces a block's MoE layer, and the layer's row."""
        plan, config = self.plan, self.plan.source_config
        seen = stored_activations(self.activations, block.name, activation_of(config))
        text = seen is not None and self.arguments["calibration"] is not None
        gate_sum, gates = plan.architecture.gates(config), "architecture"
        if gate_sum is None:
            gate_sum, gates = seen.gate_sum(), "calibration" if text else "random tokens"
        given, held_out = _split(seen) if text else (None, None)
        experts = plan.experts(block)
        routed = self._gather(block.ffn, experts, given, gate_sum)
        known = text and not plan.architecture.gpt_oss
        error = held_out.squared_error(routed) ** 0.5 if known else float("nan")
        ffn = self._with_shared(block, routed, seen)
        row = {"layer": block.ffn, "experts": len(experts), "d_ff": routed.d_ff, "shared": ffn.d_ff - routed.d_ff}
        row |= {"width": plan.width, "gate_sum": gate_sum, "gates": gates, "output_error": error}
        if text:
            row["frequency"] = seen.expert_frequencies().tolist()
            row["mean_gate"] = seen.gates.mean(dim=0).tolist()
        return ffn.widened(plan.width).map(lambda t: t.to(experts[0].up.dtype)), row

    def _gather(
        self, layer: str, experts: list[FeedForwardWeights], given: LayerActivations | None, gate_sum: float
    ) -> FeedForwardWeights:
        """The routed experts gathered, with the scale of the MoE layer."""
        method, options, width = self.arguments["method"], self.arguments["options"], self.plan.routed_width
        if "calibration" not in options_of(method) and options.get("scale") not in ("scalar", "vector"):
            given = None
        if method in ("readout", "fit") and len(given.inputs) < 4 * width:
            warnings.warn(
                f"calibration_tokens: expected at least 4 for each of the {width} hidden units that {method!r} solves for,"
                f" found {len(given.inputs)} in use; the twin may be far off on other text",
                stacklevel=2,
            )
        try:
            ffn = gather_precisely(experts, method, given, self.arguments["d_ff"], **options)
        except ValueError as error:
            raise ValueError(f"{self.plan.shards.path}: {layer}: {error}") from error
        return scaled_output(ffn, gate_sum) if given is None else ffn

    def _with_shared(
        self, block: Block, routed: FeedForwardWeights, seen: LayerActivations | None
    ) -> FeedForwardWeights:
        """A gathered network joined to the shared experts of its block, if there are any."""
        if not block.parts:
            return routed
        shared = self.plan.ffn(block).map(lambda t: t.float())
        if self.plan.architecture.mean_gated:
            gate = self.plan.read(f"{block.ffn}.{self.plan.architecture.shared}_gate.weight")
            logits = F.linear(seen.inputs.to(gate.dtype), gate).float()
            shared = scaled_output(shared, logits.sigmoid().mean().item())
        return concatenate([routed, shared])

    def write_config(self) -> None:
        """Write the index and the config, and copy the source's tokenizer and generation files."""
        files = Shards(self.model).files
        size = sum((self.model / file).stat().st_size for file in set(files.values()))
        write_text(self.model / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=1))
        self.plan.config.save_pretrained(self.model)
        for path in self.plan.shards.path.iterdir():
            if path.is_file() and path.name.endswith(COPIED) and path.name not in ("config.json", INDEX):
                shutil.copyfile(path, self.model / path.name)

    def perplexities(self, ids: Tensor) -> dict[str, float]:
        """Of the MoE and of the twin on blocks [n, L]."""
        found, offload = {}, self.folder / "offload"
        for name, folder in {"MoE": self.plan.shards.path, "dense": self.model}.items():
            model = load_language_model(folder, device_map="auto", offload_folder=offload)
            found[name] = perplexity(model, ids)
            del model
            shutil.rmtree(offload, ignore_errors=True)
        return found

    def finish(self, perplexities: Mapping[str, float]) -> pd.DataFrame:
        """Write tables and model card, and move all to the destination. Returns the table of layers."""
        rows = [json.loads(path.read_text()) for path in sorted(self.rows.iterdir())]
        layers = pd.DataFrame([row for row in rows if row is not None])
        if "frequency" in layers:
            usage = layers[["layer", "frequency", "mean_gate"]].explode(["frequency", "mean_gate"])
            usage.insert(1, "expert", usage.groupby("layer").cumcount())
            usage.to_csv(self.model / "router_statistics.csv", index=False)
            layers = layers.drop(columns=["frequency", "mean_gate"])
        layers.to_csv(self.model / "conversion.csv", index=False)
        write_text(self.model / "README.md", model_card(self.plan, self.arguments, layers, perplexities))
        if self.destination.exists():
            self.destination.rmdir()
        os.replace(self.model, self.destination)
        shutil.rmtree(self.folder)
        return layers


def _split(activations: LayerActivations) -> tuple[LayerActivations, LayerActivations]:
    """A random three quarters of the tokens, and the rest."""
    count = len(activations.inputs)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    parts = order.split(max(1, 3 * count // 4))[:2]
    return tuple(activations.map(lambda t, part=part: t[part]) for part in parts)
